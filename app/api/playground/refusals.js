// Refusals where they belong: a sentence in a place for it, and what is wrong with a field beside that field.
import { at, counted, made } from "./elements.js";

// Of a thousand wrong entries so many are opened for; the others follow when these are mended.
const MOST_OPENED = 30;

let marks = 0;

/**
 * Show an error.
 *
 * `controlOf` takes the path of a field, such as `classes.3.descriptions.0`, and returns the control that it was typed
 * into, or null. Where a control holds several entries, the sentence about one quotes it.
 */
export function tell(error, place, controlOf = () => null) {
  hush(place);
  const marked = [], elsewhere = [];
  for (const { field, problem } of error.errors || []) {
    const control = controlOf(field);
    if (control) marked.push(mark(control, problem));
    else elsewhere.push(`${field}: ${problem}`);
  }
  const refused = `${counted(marked.length, "entry is", "entries are")} refused; what is wrong stands beside it.`;
  place.textContent = marked.length ? [refused, ...elsewhere].join(" ") : error.message;
  place.hidden = false;
  if (error.status === 401) at("key").focus();
  else if (marked.length) reveal(marked);
  else place.scrollIntoView({ block: "nearest" });
}

/** Take back what was told in a place, and what stands beside the fields of the form or view around it. */
export function hush(place) {
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
  const noted = control.getAttribute("aria-invalid") && at(control.getAttribute("aria-describedby"));
  if (noted) {
    noted.textContent += ` ${problem}`;
    return control;
  }
  marks += 1;
  const note = made("p", { className: "field-problem", id: `field-problem-${marks}`, textContent: problem });
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", note.id);
  const field = control.closest(".field");
  if (field) field.append(note);
  else control.after(note);
  return control;
}

function reveal(controls) {
  for (const control of controls.slice(0, MOST_OPENED)) {
    for (let each = control.closest("details"); each; each = each.parentElement.closest("details")) each.open = true;
  }
  controls[0].focus();
}
