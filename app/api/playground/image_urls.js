// Pictures given by their URLs. The page cannot fetch them: the server does, if its operator allows it.
import { countText, create } from "./elements.js";
import { openModal } from "./modal.js";

/**
 * Ask for URLs in a dialog; `onPictures` receives pictures {name, path, file: null, url: "", remoteUrl}.
 *
 * Such a picture has no `url` for an <img>, because the page loads nothing from other hosts; `remoteUrl` is sent instead.
 */
export function openImageUrls({ onPictures }) {
  const field = create("textarea", { id: "image-addresses", rows: 4, spellcheck: false });
  const problem = create("p", { className: "field-problem", id: "image-addresses-problem", role: "alert", hidden: true });
  const form = create(
    "form", {}, create("div", { className: "field" }, create("label", { htmlFor: field.id, textContent: "Addresses of images, one per line" }), field, problem),
    create("p", { className: "hint", textContent: "The server fetches the images when you classify. The page itself loads nothing from other hosts, so it cannot show them." }),
    create("p", { className: "actions" }, create("button", { type: "submit", textContent: "Add" })),
  );
  const { close } = openModal("Images from URLs", {}, form);
  form.onsubmit = (event) => {
    event.preventDefault();
    const { pictures, wrong } = picturesOf(field.value);
    problem.textContent = wrong.length
      ? `${countText(wrong.length, "line is", "lines are")} not an address, which starts with https: or http:. ${wrong.slice(0, 3).join(", ")}`
      : "Enter at least one address.";
    problem.hidden = !wrong.length && pictures.length > 0;
    if (problem.hidden) {
      close();
      onPictures(pictures);
      return;
    }
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", problem.id);
    field.focus();
  };
  field.focus();
}

/** Return the pictures of the addresses in a text, one per line, and the lines that are not addresses. */
function picturesOf(text) {
  const addresses = text.split(/\s+/).filter(Boolean);
  const isAddress = (address) => ["http:", "https:"].includes(protocolOf(address));
  const pictures = addresses.filter(isAddress).map((address) => ({ name: nameOf(address), path: address, file: null, url: "", remoteUrl: address }));
  return { pictures, wrong: addresses.filter((address) => !isAddress(address)) };
}

function protocolOf(address) {
  try {
    return new URL(address).protocol;
  } catch {
    return "";
  }
}

function nameOf(address) {
  const { hostname, pathname } = new URL(address), last = pathname.split("/").at(-1);
  try {
    return decodeURIComponent(last) || hostname;
  } catch {
    return last;
  }
}
