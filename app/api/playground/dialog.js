// Confirmation dialogs.
import { create } from "./elements.js";

/** Show a dialog; resolves to true if `yes` was chosen. Escape means no. */
export function confirmDialog(title, text, yes) {
  const no = create("button", { type: "button", className: "secondary", textContent: "Cancel" });
  const go = create("button", { type: "button", className: "danger", textContent: yes });
  const heading = create("h2", { id: "question-title", textContent: title });
  const dialog = create("dialog", { "aria-labelledby": heading.id }, heading, create("p", { textContent: text }), create("p", { className: "actions" }, go, no));
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
