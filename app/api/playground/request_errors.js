// Errors of requests, shown in a place of their own or next to the field that they concern.
import { byId, countText, create, isTyping, tryAgainButton } from "./elements.js";

// At most this many collapsed sections are opened at once to show errors.
const MAX_OPENED = 30;

let marks = 0;

/**
 * Show an error.
 *
 * `controlOf` takes the path of a field, such as `classes.3.descriptions.0`, and returns its control, or null. If a
 * control holds several entries, the message quotes the invalid one.
 */
export function showRequestError(error, place, controlOf = () => null) {
  clearRequestError(place);
  const marked = [], elsewhere = [];
  for (const { field, problem } of error.errors || []) {
    const control = controlOf(field);
    if (control) marked.push(mark(control, problem));
    else elsewhere.push(`${field}: ${problem}`);
  }
  const refused = `${countText(marked.length, "entry is", "entries are")} invalid; see the message next to it.`;
  place.textContent = marked.length ? [refused, ...elsewhere].join(" ") : error.message;
  place.hidden = false;
  if (error.status === 401) byId("key").focus();
  else if (marked.length) reveal(marked);
  else place.scrollIntoView({ block: "nearest" });
}

/**
 * Show an error of loading, with a button that calls `again`. It must not take the focus from a field that somebody is
 * typing in.
 */
export function showLoadError(error, place, again) {
  if (isTyping() && error.status === 401) {
    clearRequestError(place);
    place.textContent = error.message;
    place.hidden = false;
  } else showRequestError(error, place);
  const retry = () => {
    clearRequestError(place);
    return again();
  };
  place.append(" ", tryAgainButton(place, retry));
}

/** Remove the error in a place, and the messages next to the fields of the surrounding form or view. */
export function clearRequestError(place) {
  place.hidden = true;
  place.textContent = "";
  const around = place.closest("form, .tool, .view");
  for (const note of around.querySelectorAll(".field-problem")) note.remove();
  for (const control of around.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

function mark(control, problem) {
  const noted = control.getAttribute("aria-invalid") && byId(control.getAttribute("aria-describedby"));
  if (noted) {
    noted.textContent += ` ${problem}`;
    return control;
  }
  marks += 1;
  const note = create("p", { className: "field-problem", id: `field-problem-${marks}`, textContent: problem });
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", note.id);
  const field = control.closest(".field");
  if (field) field.append(note);
  else control.after(note);
  return control;
}

function reveal(controls) {
  for (const control of controls.slice(0, MAX_OPENED)) {
    for (let section = control.closest("details"); section; section = section.parentElement.closest("details")) section.open = true;
  }
  controls[0].focus();
}
