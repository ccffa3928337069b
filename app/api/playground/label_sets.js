// The view Label sets: the list, the editor, and the tools for the open label set.
import { at, counted, create } from "./elements.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { allLabelSets } from "./catalogue.js";
import { addressOf } from "./views.js";
import { anyUnsaved, closeEditor, edit, hasUnsaved, startEditor } from "./editor.js";
import { startExampleButtons } from "./examples.js";
import { evaluateFor, startEvaluate } from "./evaluate.js";
import { confusionFor, startConfusion } from "./confusion.js";

let known = [];
let open = null; // the name of the open label set, "" for a new one

/** Show the view, with a label set or a new one in the editor. */
export async function showLabelSets({ name = "", isNew = false, focus = false }) {
  open = isNew ? "" : name || null;
  if (open !== null) at("label-sets-status").textContent = "";
  const loaded = load();
  if (open === null) closeEditor();
  else await edit(open);
  await loaded;
  if (focus && open !== null) {
    at("editor-title").focus();
    at("editor").scrollIntoView({ block: "start" });
  }
}

async function load() {
  try {
    known = await allLabelSets();
    clearRefusal(at("label-sets-error"));
    showList();
  } catch (refusal) {
    showRefusal(refusal, at("label-sets-error"));
  }
}

function showList() {
  at("label-set-list").replaceChildren(...known.map(line));
  at("no-label-sets-yet").hidden = known.length > 0;
}

function line(each) {
  const link = create("a", { href: addressOf("label-sets", each.name), textContent: each.name });
  if (each.name === open) link.setAttribute("aria-current", "true");
  const unsaved = hasUnsaved(each.name) ? " · not saved" : "";
  return create("li", {}, link, " ", create("span", { className: "hint", textContent: `${counted(each.classes, "class", "classes")} · version ${each.version}${unsaved}` }));
}

function listChanged({ saved = null } = {}) {
  if (saved === null) {
    showList();
    return;
  }
  open = saved;
  load();
}

/** Register the event handlers of the view. */
export function startLabelSets() {
  startEditor({
    list: listChanged,
    tools: (name, classnames) => {
      evaluateFor(name, classnames);
      confusionFor(name, classnames);
    },
  });
  startExampleButtons();
  startEvaluate();
  startConfusion();
  addEventListener("beforeunload", (event) => { if (anyUnsaved()) event.preventDefault(); });
}
