// The classes of a draft, one row each: a closed row summarises the class, an open row has its fields. The fields are
// created when a row is first opened, because a label set may have ten thousand classes.
import { byId, countText, lines, create } from "./elements.js";
import { LISTS, newClass, thresholdOf } from "./draft.js";
import { classExamples } from "./examples.js";

const FIELDS = {
  name: { label: "Name" },
  synonyms: { label: "Other names", hint: "One per line, for example: hound." },
  descriptions: { label: "Descriptions", hint: "One sentence per line about the appearance of the class." },
  features: { label: "Features", hint: "One short phrase per line that completes “NAME, which has …”, for example: whiskers." },
  prompt: { label: "Class prompt", hint: "Used instead of the templates; {} stands for the name. For example: a photo of a {}, the bird." },
  parent: { label: "Parent", hint: "The label above this one, for example: dog, or with several levels: animal|dog." },
  prior: { label: "Prior", hint: "How often images show this class, as a count or a share; for every class, or for none." },
  threshold: { label: "Threshold", hint: "An image has this label from this score, between 0 and 1. Empty: fitted to the example images, or 0.5." },
};

// With more rows than this, rows outside the viewport are not laid out.
const MANY = 200;

let fieldCount = 0;

/** Show the classes of a draft; `changed` is called after every edit; `countOf` returns the number of example images of a class. */
export function classRows(draft, { changed, countOf }) {
  const list = byId("editor-classes");
  const rows = new Map(); // the parts of each class's row

  function row(entry) {
    const title = create("strong");
    const summaryText = create("span", { className: "hint" });
    const details = create("details", { className: "class" }, create("summary", {}, title, " ", summaryText));
    const remove = create("button", { type: "button", className: "remove-class secondary", textContent: "×" });
    const item = create("li", {}, details, remove);
    const parts = { item, details, title, summaryText, remove, controls: null, refresh };
    function refresh() {
      title.textContent = entry.name.trim() || "(no name)";
      remove.setAttribute("aria-label", `Remove class ${title.textContent}`);
      const filled = LISTS.map((kind) => [kind, lines(entry[kind]).length]).filter(([, count]) => count);
      const summary = filled.map(([kind, count]) => countText(count, { synonyms: "other name", descriptions: "description", features: "feature" }[kind]));
      if (entry.prompt.trim()) summary.push("class prompt");
      if (draft.multiLabel && thresholdOf(entry) !== null) summary.push(`from ${thresholdOf(entry)}`);
      const images = entry.stored === null ? 0 : countOf(entry.stored);
      if (images) summary.push(countText(images, "example image"));
      if (entry.stored === null) summary.push("not saved yet");
      summaryText.textContent = summary.join(" · ");
      // Also set by the charts of thresholds; assigning an equal text would move the caret.
      if (parts.controls && parts.controls.threshold.value !== entry.threshold) parts.controls.threshold.value = entry.threshold;
    }
    details.ontoggle = () => { if (details.open) opened(entry, parts); };
    remove.onclick = () => {
      const index = draft.classes.indexOf(entry);
      draft.classes.splice(index, 1);
      item.remove();
      rows.delete(entry);
      refocusRow(index);
      changed();
    };
    refresh();
    rows.set(entry, parts);
    return item;
  }

  function refocusRow(index) {
    const buttons = list.querySelectorAll(".remove-class");
    (buttons[Math.min(index, buttons.length - 1)] || byId("new-classes")).focus();
  }

  function opened(entry, parts) {
    if (parts.controls) return;
    parts.controls = {};
    const fields = Object.keys(FIELDS).map((kind) => field(entry, kind, parts));
    parts.details.append(create("div", { className: "class-fields" }, ...fields, classExamples(draft.name, entry.stored)));
  }

  function field(entry, kind, parts) {
    fieldCount += 1;
    const id = `class-field-${fieldCount}`;
    const isList = LISTS.includes(kind);
    const rowsShown = Math.min(8, Math.max(2, lines(entry[kind]).length));
    const control = isList ? create("textarea", { id, rows: rowsShown }) : create("input", { id, autocomplete: "off", inputMode: kind === "threshold" ? "decimal" : "" });
    control.value = entry[kind];
    control.oninput = () => {
      entry[kind] = control.value;
      parts.refresh();
      changed();
    };
    parts.controls[kind] = control;
    const texts = FIELDS[kind];
    const hint = texts.hint ? [create("p", { className: "hint", textContent: texts.hint })] : [];
    return create("div", { className: `field ${kind}-field` }, create("label", { htmlFor: id, textContent: texts.label }), control, ...hint);
  }

  list.replaceChildren(...draft.classes.map(row));
  list.classList.toggle("many", draft.classes.length > MANY);
  showFields();

  /** Show thresholds only if an image may have several labels. */
  function showFields() {
    list.classList.toggle("several-labels", draft.multiLabel);
  }

  return {
    add(names) {
      const existing = new Set(draft.classes.map((entry) => entry.name.trim().toLowerCase()));
      for (const name of names) {
        if (existing.has(name.toLowerCase())) continue;
        existing.add(name.toLowerCase());
        draft.classes.push(newClass(name));
        list.append(row(draft.classes.at(-1)));
      }
    },
    refresh() {
      showFields();
      rows.forEach((parts) => parts.refresh());
    },
    /** Return the names of the classes whose rows are open. */
    opened: () => new Set([...rows].filter(([, parts]) => parts.details.open).map(([entry]) => entry.name.trim())),
    /** Open the rows of classes by their names. */
    open: (names) => rows.forEach((parts, entry) => { if (names.has(entry.name)) parts.details.open = true; }),
    /** Show only classes whose name contains a text. */
    filter(text) {
      const query = text.trim().toLowerCase();
      rows.forEach((parts, entry) => { parts.item.hidden = !entry.name.toLowerCase().includes(query); });
    },
    /** Return the control of the field at a problem's path, after opening its row. */
    controlOf(path) {
      const [, index, kind = "name"] = path.split(".");
      const entry = draft.classes[Number(index)];
      const parts = rows.get(entry);
      if (!parts || !(kind in FIELDS) || (kind === "threshold" && !draft.multiLabel)) return null;
      opened(entry, parts);
      parts.item.hidden = false;
      return parts.controls[kind];
    },
  };
}
