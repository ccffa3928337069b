// Finding and making elements. Whatever text goes in is written as text: nothing here reads HTML.

export const at = (id) => document.getElementById(id);

/** Return a new element; what is no property of it becomes an attribute, as `aria-label` does. */
export function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const option = (value, text = value, more = {}) => made("option", { value, textContent: text, ...more });

/** Return a share in [0, 1] as text: whole percents, and one decimal where it is below ten. */
export const percent = (share) => `${(100 * share).toFixed(share > 0.0995 || share === 0 ? 0 : 1)} %`;

export const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** Return "a, b and c". */
export function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

export const moment = (iso) => new Date(iso).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });

/** Return what was written between commas or on lines, without what is empty. */
export const words = (text) => text.split(/[,\n]/).map((each) => each.trim()).filter(Boolean);

export const lines = (text) => text.split("\n").map((each) => each.trim()).filter(Boolean);

/** Show the children of a list anew after one was removed with the keyboard, and keep the focus near its place. */
export function refocus(list, index, otherwise) {
  const buttons = list.querySelectorAll("button");
  (buttons[Math.min(index, buttons.length - 1)] || otherwise).focus();
}
