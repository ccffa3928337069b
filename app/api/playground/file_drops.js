// Images that are dropped, pasted or selected.
import { create } from "./elements.js";

/** Accept files dropped on an element; `receive` receives them. */
export function dropZone(element, receive) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.remove("over");
    receive(await filesOf(event.dataTransfer));
  });
}

/** Accept files dropped outside of every drop zone, and pasted files; `receiverOf` returns their receiver, or null. */
export function acceptFilesAnywhere(receiverOf) {
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    receiverOf()?.(await filesOf(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) receiverOf()?.([...event.clipboardData.files]);
  });
}

/** Call `receive` with the files whenever some are selected in a file input. */
export function onFilesSelected(input, receive) {
  input.onchange = () => {
    const files = [...input.files];
    input.value = ""; // allows selecting the same file again
    receive(files);
  };
}

/** Return a button that opens a file chooser; `name` is its accessible name. */
export function fileChooser(text, name, receive, { multiple = true } = {}) {
  const input = create("input", { type: "file", accept: "image/*", multiple, className: "visually-hidden", "aria-label": name });
  onFilesSelected(input, receive);
  return create("label", { className: "button secondary" }, text, input);
}

const paths = new WeakMap(); // of files in dropped folders

/** Return the path of a file in the folder that was dropped or selected, its name if there was no folder. */
export const pathOfFile = (file) => paths.get(file) || file.webkitRelativePath || file.name || "pasted";

/** Return the images among files, and a sentence about the other files, empty if there are none. */
export function splitFiles(files) {
  const isHidden = (file) => file.name.startsWith("."); // as .DS_Store in folders
  const isPicture = (file) => file.type.startsWith("image/") || (file.type === "" && !isHidden(file));
  const others = files.filter((file) => !isPicture(file) && !isHidden(file)).map((file) => file.name);
  const named = `${others.slice(0, 5).join(", ")}${others.length > 5 ? ` and ${others.length - 5} more` : ""}`;
  return { pictures: files.filter(isPicture), skippedNote: others.length ? `Skipped, not an image: ${named}.` : "" };
}

async function filesOf(transfer) {
  // Entries must be read before the first await; the browser clears them afterwards.
  const dropped = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => {
      const entry = item.webkitGetAsEntry?.();
      return entry?.isDirectory ? entry : item.getAsFile();
    });
  const found = await Promise.all(dropped.map((entry) => (entry instanceof File ? [entry] : filesIn(entry))));
  return found.flat();
}

async function filesIn(folder) {
  const reader = folder.createReader(), files = [];
  for (;;) {
    const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!entries.length) return files;
    for (const entry of entries) {
      if (entry.isDirectory) files.push(...(await filesIn(entry)));
      else {
        const file = await new Promise((done, failed) => entry.file(done, failed));
        paths.set(file, entry.fullPath.slice(1));
        files.push(file);
      }
    }
  }
}
