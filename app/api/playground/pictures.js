// A list of chosen pictures with a way to remove each.
import { made, refocus } from "./elements.js";
import { sorted } from "./dropping.js";

/** Keep and show pictures in a list element; `otherwise` gets the focus when the last was removed. */
export function pictureList(list, { otherwise, note }) {
  const pictures = []; // {name, file, url}

  const show = () => list.replaceChildren(...pictures.map(item));

  function item(picture, index) {
    const remove = made("button", { type: "button", className: "remove", textContent: "×", "aria-label": `Remove ${picture.name}` });
    remove.onclick = () => {
      URL.revokeObjectURL(picture.url);
      pictures.splice(index, 1);
      show();
      refocus(list, index, otherwise);
    };
    return made("li", {}, made("img", { src: picture.url, alt: picture.name }), remove);
  }

  return {
    add(files) {
      const { pictures: found, leftOut } = sorted(files);
      pictures.push(...found.map((file) => ({ name: file.name || "pasted", file, url: URL.createObjectURL(file) })));
      note.textContent = leftOut;
      show();
    },
    all: () => [...pictures],
  };
}
