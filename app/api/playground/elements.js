// Finding and creating elements. Texts are always inserted as text, never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** Return a new element; names that are not properties, such as `aria-label`, become attributes. */
export function create(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const option = (value, text = value, more = {}) => create("option", { value, textContent: text, ...more });

/** Return a share in [0, 1] as a percentage, with one decimal below ten percent. */
export const percent = (share) => `${(100 * share).toFixed(share > 0.0995 || share === 0 ? 0 : 1)} %`;

/** Return a score as a percentage that is 0 or 100 only if the score is. */
export function scoreText(score) {
  if (score > 0.995 && score < 1) return "> 99 %";
  return score < 0.0005 && score > 0 ? "< 0.1 %" : percent(score);
}

export const countText = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** Return a number of seconds in words, such as `40 s`, `5 min` or `3 h`. */
export function durationText(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 90 * 60 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

export const formatTime = (iso) => new Date(iso).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });

/** Return the labels in a text, as app/names/labels.py splits them, without empty ones. */
export function splitLabels(text) {
  const given = text.split(/[,\n]/).map((part) => part.trim()).filter(Boolean);
  return (given.length === 1 ? given[0].split(/[;|；，｜、،؛]/) : given).map((part) => part.trim()).filter(Boolean);
}

export const lines = (text) => text.split("\n").map((part) => part.trim()).filter(Boolean);

/** Return whether the focus is in a field, from which what loads by itself must not take it. */
export const isTyping = () => document.activeElement.matches("input, textarea, select");

/**
 * Return a function that moves the focus to the answer of a request that begins now, unless somebody has meanwhile typed,
 * or moved to another field.
 */
export function focusLater() {
  const from = document.activeElement;
  let hasTyped = false;
  addEventListener("input", () => { hasTyped = true; }, { once: true });
  return (answer) => {
    if (!isTyping() || (document.activeElement === from && !hasTyped)) answer.focus();
  };
}

/** Return a button in the place of an error that tries again. */
export function tryAgainButton(place, again) {
  const onclick = async () => {
    await again();
    keepFocus(place);
  };
  return create("button", { type: "button", className: "link", textContent: "Try again", onclick });
}

/** Move the focus of a button that is gone to the one that replaces it after another error, else to what is around it. */
export function keepFocus(place) {
  const at = document.activeElement;
  if (at === document.body || place.contains(at)) (place.querySelector("button") ?? place.closest("[tabindex]"))?.focus({ preventScroll: true });
}

/** Move the focus to the next remove button of a list, or to `otherwise` if the list is empty. */
export function refocus(list, index, otherwise) {
  const buttons = list.querySelectorAll("button");
  (buttons[Math.min(index, buttons.length - 1)] || otherwise).focus();
}
