// The views of the page and their addresses: #classify, #label-sets, #label-sets/pets, #new-label-set, #captions. A question
// mark separates what a link presets: #classify?label=cat&label=dog.
import { byId } from "./elements.js";

const TITLES = { classify: "Classify", "label-sets": "Label sets", captions: "Captions" };

/** Return the address of a view, or of a named item in it. */
export const addressOf = (view, name = "") => `#${view}${name ? `/${encodeURIComponent(name)}` : ""}`;

export const currentView = () => Object.keys(TITLES).find((view) => !byId(`view-${view}`).hidden);

/**
 * Show a view by its address, now and whenever the address changes.
 *
 * `shown` has one function per view. It receives the rest of the address as {name, isNew, query}, and `focus`: whether to move
 * the focus to the named item. Without a name, the view itself receives the focus.
 */
export function startViews(shown) {
  const show = ({ focus }) => {
    const { view, rest } = place();
    if (!view) return;
    mark(view, rest.name);
    if (focus && !rest.name && !rest.isNew) byId(`view-${view}`).focus();
    shown[view]({ ...rest, focus });
  };
  addEventListener("hashchange", () => show({ focus: true }));
  if (!place().view) history.replaceState(null, "", addressOf("classify"));
  show({ focus: false });
  return { again: () => show({ focus: false }) };
}

/** Change the address without showing the view again. */
export function renameTo(view, name) {
  history.replaceState(null, "", addressOf(view, name));
  mark(view, name);
}

function mark(view, name) {
  for (const other of Object.keys(TITLES)) byId(`view-${other}`).hidden = other !== view;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === addressOf(view)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name || TITLES[view]} · Deixis`;
}

function place() {
  const [path, ...queries] = location.hash.slice(1).split("?");
  const [first, ...others] = path.split("/"), query = new URLSearchParams(queries.join("?"));
  if (first === "new-label-set") return { view: "label-sets", rest: { isNew: true, query } };
  return { view: Object.hasOwn(TITLES, first) ? first : first === "" ? "classify" : null, rest: { name: decoded(others.join("/")), query } };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
