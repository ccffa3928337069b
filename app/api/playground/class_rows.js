// The classes of a draft, a row each: closed it tells what the class has, open it has the fields. Of ten thousand classes
// most rows stay closed, so that a row gets its fields when it is first opened.
import { at, counted, lines, made } from "./elements.js";
import { LISTS, newClass } from "./draft.js";
import { classExamples } from "./examples.js";

const FIELDS = {
  name: { label: "Name" },
  synonyms: { label: "Other names", hint: "One a line, as a caller might say it: hound." },
  descriptions: { label: "Descriptions", hint: "One sentence a line about how it looks." },
  features: { label: "Features", hint: "One short phrase a line, read as “NAME, which has …”: whiskers." },
  prompt: { label: "Prompt of its own", hint: "Takes the place of the templates; {} is the name: a photo of a {}, the bird." },
};

// From here on, rows that are out of sight are not laid out.
const MANY = 200;

let fieldCount = 0;

/** Show the classes of a draft; `changed` is called whenever something was typed, `counts` tells of example images. */
export function classRows(draft, { changed, countOf }) {
  const list = at("editor-classes");
  const rows = new Map(); // of each class: its row, summary, and fields once it was opened

  function row(each) {
    const title = made("strong");
    const has = made("span", { className: "hint" });
    const details = made("details", { className: "class" }, made("summary", {}, title, " ", has));
    const remove = made("button", { type: "button", className: "remove-class secondary", textContent: "×" });
    const item = made("li", {}, details, remove);
    const parts = { item, details, title, has, remove, controls: null, refresh };
    function refresh() {
      title.textContent = each.name.trim() || "(no name)";
      remove.setAttribute("aria-label", `Remove class ${title.textContent}`);
      const held = LISTS.map((kind) => [kind, lines(each[kind]).length]).filter(([, count]) => count);
      const told = held.map(([kind, count]) => counted(count, { synonyms: "other name", descriptions: "description", features: "feature" }[kind]));
      if (each.prompt.trim()) told.push("prompt");
      const images = each.stored === null ? 0 : countOf(each.stored);
      if (images) told.push(counted(images, "example image"));
      if (each.stored === null) told.push("not saved yet");
      has.textContent = told.join(" · ");
    }
    details.ontoggle = () => { if (details.open) opened(each, parts); };
    remove.onclick = () => {
      const index = draft.classes.indexOf(each);
      draft.classes.splice(index, 1);
      item.remove();
      rows.delete(each);
      refocusRow(index);
      changed();
    };
    refresh();
    rows.set(each, parts);
    return item;
  }

  function refocusRow(index) {
    const buttons = list.querySelectorAll(".remove-class");
    (buttons[Math.min(index, buttons.length - 1)] || at("new-classes")).focus();
  }

  function opened(each, parts) {
    if (parts.controls) return;
    parts.controls = {};
    const fields = Object.keys(FIELDS).map((kind) => field(each, kind, parts));
    parts.details.append(made("div", { className: "class-fields" }, ...fields, classExamples(draft.name, each.stored)));
  }

  function field(each, kind, parts) {
    fieldCount += 1;
    const id = `class-field-${fieldCount}`;
    const isList = LISTS.includes(kind);
    const rowsShown = Math.min(8, Math.max(2, lines(each[kind]).length));
    const control = isList ? made("textarea", { id, rows: rowsShown }) : made("input", { id, autocomplete: "off" });
    control.value = each[kind];
    control.oninput = () => {
      each[kind] = control.value;
      parts.refresh();
      changed();
    };
    parts.controls[kind] = control;
    const told = FIELDS[kind];
    const hint = told.hint ? [made("p", { className: "hint", textContent: told.hint })] : [];
    return made("div", { className: "field" }, made("label", { htmlFor: id, textContent: told.label }), control, ...hint);
  }

  list.replaceChildren(...draft.classes.map(row));
  list.classList.toggle("many", draft.classes.length > MANY);

  return {
    add(names) {
      const have = new Set(draft.classes.map((each) => each.name.trim().toLowerCase()));
      for (const name of names) {
        if (have.has(name.toLowerCase())) continue;
        have.add(name.toLowerCase());
        draft.classes.push(newClass(name));
        list.append(row(draft.classes.at(-1)));
      }
    },
    refresh: () => rows.forEach((parts) => parts.refresh()),
    /** Return the names of the classes whose rows are open. */
    opened: () => new Set([...rows].filter(([, parts]) => parts.details.open).map(([each]) => each.name.trim())),
    /** Open the rows of classes by their names. */
    open: (names) => rows.forEach((parts, each) => { if (names.has(each.name)) parts.details.open = true; }),
    /** Show only classes whose name has a text in it. */
    filter(text) {
      const wanted = text.trim().toLowerCase();
      rows.forEach((parts, each) => { parts.item.hidden = !each.name.toLowerCase().includes(wanted); });
    },
    /** Return the control of the field that a problem names by its path, opening its row. */
    controlOf(path) {
      const [, index, kind = "name"] = path.split(".");
      const each = draft.classes[Number(index)];
      const parts = rows.get(each);
      if (!parts || !(kind in FIELDS)) return null;
      opened(each, parts);
      parts.item.hidden = false;
      return parts.controls[kind];
    },
  };
}
