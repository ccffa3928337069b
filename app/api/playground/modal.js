// Modal dialogs with content of their own.
import { create } from "./elements.js";

let count = 0;

/**
 * Open a modal dialog with a title and a close button; the focus returns to where it was when the dialog closes.
 *
 * `closed` is called when it closes, by whatever means. Returns the dialog element and `close`.
 */
export function openModal(title, { className = "", closed = () => {} } = {}, ...content) {
  count += 1;
  const heading = create("h2", { id: `modal-title-${count}`, textContent: title });
  const leave = create("button", { type: "button", className: "secondary icon", textContent: "×", "aria-label": "Close", title: "Close" });
  const dialog = create(
    "dialog", { className: `modal tool ${className}`, "aria-labelledby": heading.id },
    create("div", { className: "modal-head" }, heading, leave), ...content,
  );
  const before = document.activeElement;
  const close = () => dialog.close();
  leave.onclick = close;
  dialog.onclose = () => {
    dialog.remove();
    before?.focus?.();
    closed();
  };
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, heading, close };
}
