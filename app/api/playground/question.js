// A question before something that cannot be taken back.
import { made } from "./elements.js";

/** Ask in a dialog; returns whether `yes` was chosen. Escape means no. */
export function agreed(title, text, yes) {
  const no = made("button", { type: "button", className: "secondary", textContent: "Keep it" });
  const go = made("button", { type: "button", className: "danger", textContent: yes });
  const heading = made("h2", { id: "question-title", textContent: title });
  const dialog = made("dialog", { "aria-labelledby": heading.id }, heading, made("p", { textContent: text }), made("p", { className: "actions" }, go, no));
  document.body.append(dialog);
  return new Promise((done) => {
    const before = document.activeElement;
    dialog.onclose = () => {
      dialog.remove();
      before?.focus?.();
      done(dialog.returnValue === "yes");
    };
    go.onclick = () => dialog.close("yes");
    no.onclick = () => dialog.close("");
    dialog.showModal();
    no.focus();
  });
}
