// Pictures that are dropped, pasted or chosen, on whichever part of the page wants them.
import { made } from "./elements.js";

/** Let pictures be dropped on an element; `take` gets the files. */
export function dropZone(element, take) {
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
    take(await filesOf(event.dataTransfer));
  });
}

/** Let pictures be dropped beside every zone, and pasted; `takerOf` returns who wants them now, or null. */
export function dropAnywhere(takerOf) {
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    takerOf()?.(await filesOf(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) takerOf()?.([...event.clipboardData.files]);
  });
}

/** Call `take` with what is chosen in a file field, as often as something is. */
export function onChosen(input, take) {
  input.onchange = () => {
    const files = [...input.files];
    input.value = ""; // so that the same file may be chosen again
    take(files);
  };
}

/** Return a button that lets pictures be chosen; `name` is what a screen reader says. */
export function chooser(text, name, take, { multiple = true } = {}) {
  const input = made("input", { type: "file", accept: "image/*", multiple, className: "visually-hidden", "aria-label": name });
  onChosen(input, take);
  return made("label", { className: "button secondary" }, text, input);
}

/** Return the pictures among files, and a sentence about the others, empty if there are none. */
export function sorted(files) {
  const isPicture = (file) => file.type.startsWith("image/") || (file.type === "" && !file.name.startsWith("."));
  const others = files.filter((file) => !isPicture(file)).map((file) => file.name);
  const named = `${others.slice(0, 5).join(", ")}${others.length > 5 ? ` and ${others.length - 5} more` : ""}`;
  return { pictures: files.filter(isPicture), leftOut: others.length ? `Left out, since no picture: ${named}.` : "" };
}

async function filesOf(transfer) {
  // Entries have to be taken before anything is waited for; afterwards the browser has forgotten them.
  const dropped = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => {
      const entry = item.webkitGetAsEntry?.();
      return entry?.isDirectory ? entry : item.getAsFile();
    });
  const found = await Promise.all(dropped.map((each) => (each instanceof File ? [each] : filesIn(each))));
  return found.flat();
}

async function filesIn(folder) {
  const reader = folder.createReader(), files = [];
  for (;;) {
    const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!entries.length) return files;
    for (const entry of entries) {
      if (entry.isDirectory) files.push(...(await filesIn(entry)));
      else files.push(await new Promise((done, failed) => entry.file(done, failed)));
    }
  }
}
