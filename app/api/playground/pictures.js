// A list of selected images, each with a remove button.
import { create, refocus } from "./elements.js";
import { splitFiles } from "./file_drops.js";

/** Show images in a list element; `otherwise` receives the focus after the last one is removed. */
export function pictureList(list, { otherwise, note }) {
  const pictures = []; // {name, file, url}

  const show = () => list.replaceChildren(...pictures.map(item));

  function item(picture, index) {
    const remove = create("button", { type: "button", className: "remove", textContent: "×", "aria-label": `Remove ${picture.name}` });
    remove.onclick = () => {
      URL.revokeObjectURL(picture.url);
      pictures.splice(index, 1);
      show();
      refocus(list, index, otherwise);
    };
    return create("li", {}, create("img", { src: picture.url, alt: picture.name }), remove);
  }

  return {
    add(files) {
      const { pictures: found, skippedNote } = splitFiles(files);
      pictures.push(...found.map((file) => ({ name: file.name || "pasted", file, url: URL.createObjectURL(file) })));
      note.textContent = skippedNote;
      show();
    },
    all: () => [...pictures],
  };
}
