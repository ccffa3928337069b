// The view Label sets: the list, the editor, and the tools for the open label set.
import { byId, countText, create, isTyping } from "./elements.js";
import { clearRequestError, showLoadError } from "./request_errors.js";
import { allLabelSets } from "./catalogue.js";
import { addressOf } from "./views.js";
import { anyUnsaved, closeEditor, edit, hasUnsaved, showNewer, startEditor, thresholdsStored } from "./editor.js";
import { startExampleButtons } from "./examples.js";
import { setEvaluatedLabelSet, startEvaluate } from "./evaluate.js";
import { anyUnstored, forgetThresholds, hasUnstored, setThresholdsOf, startThresholds } from "./thresholds.js";
import { setTestedLabelSet, startConfusion } from "./confusion.js";
import { showShipped } from "./shipped.js";

let labelSets = null; // null until they are loaded
let latestRequest = 0;
let open = null; // the name of the open label set, "" for a new one

/** Show the view, with a label set or a new one in the editor. */
export async function showLabelSets({ name = "", isNew = false, focus = false }) {
  open = isNew ? "" : name || null;
  if (open !== null) byId("label-sets-status").textContent = "";
  const loaded = load();
  byId("shipped").hidden = open !== null;
  byId("to-shipped").hidden = open === null;
  if (open === null) closeEditor();
  const isShown = open !== null && (await edit(open));
  // The focus moves before the list is there: afterwards somebody may be typing in the editor.
  if (focus && isShown && !isTyping()) byId("editor-title").focus();
  await loaded;
  if (focus && isShown) byId("editor").scrollIntoView({ block: "start" });
}

async function load() {
  latestRequest += 1;
  const request = latestRequest;
  clearRequestError(byId("label-sets-error")); // now: while the list is loaded, another error may be shown
  try {
    const found = await allLabelSets();
    if (request !== latestRequest) return;
    labelSets = found;
    showList();
    await showShipped(new Set(labelSets.map((entry) => entry.name)), load);
  } catch (requestError) {
    if (request === latestRequest) showLoadError(requestError, byId("label-sets-error"), load);
  }
}

function showList() {
  if (labelSets === null) return;
  byId("label-set-list").replaceChildren(...labelSets.map(line));
  byId("no-label-sets-yet").hidden = labelSets.length > 0;
}

function line(entry) {
  const link = create("a", { href: addressOf("label-sets", entry.name), textContent: entry.name });
  if (entry.name === open) link.setAttribute("aria-current", "true");
  const unsaved = hasUnsaved(entry.name) ? " · not saved" : hasUnstored(entry.name) ? " · thresholds not stored" : "";
  return create("li", {}, link, " ", create("span", { className: "hint", textContent: `${countText(entry.classes, "class", "classes")} · version ${entry.version}${unsaved}` }));
}

function listChanged({ isStored = false, shown = null } = {}) {
  open = shown ?? open;
  if (isStored) load();
  else showList();
}

/** Register the event handlers of the view. */
export function startLabelSets() {
  startEditor({
    list: listChanged,
    tools: (name, classnames, version) => {
      setEvaluatedLabelSet(name, classnames);
      setThresholdsOf(name, classnames, version);
      setTestedLabelSet(name, classnames);
    },
    deleted: forgetThresholds,
  });
  startExampleButtons();
  startEvaluate();
  startThresholds({
    changed: showList,
    loaded: showNewer,
    stored: (change) => {
      thresholdsStored(change);
      load();
    },
  });
  startConfusion();
  addEventListener("beforeunload", (event) => { if (anyUnsaved() || anyUnstored()) event.preventDefault(); });
}
