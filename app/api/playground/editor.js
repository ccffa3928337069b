// The editor of a label set: its fields, its versions, saving without overwriting the changes of others, deleting.
import { byId, countText, create, formatTime, option, splitLabels } from "./elements.js";
import { requestJson, fetchOrThrow, jsonOf, jsonOptions, pathOf, RequestError } from "./requests.js";
import { clearRequestError, showLoadError, showRequestError } from "./request_errors.js";
import { confirmDialog } from "./dialog.js";
import { addressOf, currentView, renameTo } from "./views.js";
import { bodyOf, differences, draftOf, emptyDraft, isChanged, isStoredAs, mergeDrafts, takeThresholds } from "./draft.js";
import { classRows } from "./class_rows.js";
import { countOf, labelledCount, startExamples } from "./examples.js";

// Versions are numbered from 1, and no route lists them. Only the latest ones are offered.
const MAX_VERSIONS = 200;
const FILTER_FROM = 12;

const drafts = new Map(); // unsaved edits by label set name, "" for a new one; they survive leaving the view
let draft = null;
let rows = null;
let latestRequest = 0;
let listChanged = () => {};
let toolsFor = () => {};
let forget = () => {};
let wasUnsaved = false;

const path = (name) => pathOf("label-sets", name);

export const hasUnsaved = (name) => drafts.has(name) && isChanged(drafts.get(name));
export const anyUnsaved = () => [...drafts.values()].some(isChanged);

/** Edit a label set, with unsaved edits if there are any; "" is a new one. Returns whether that changed what is shown. */
export async function edit(name) {
  latestRequest += 1;
  const request = latestRequest;
  if (!draft || drafts.get(name) !== draft) hideDraft();
  try {
    if (!hasUnsaved(name)) {
      const loaded = await loadDraft(name);
      if (request !== latestRequest) return false;
      if (hasUnsaved(name)) return false; // it is shown, and was edited meanwhile
      drafts.set(name, loaded);
    }
    show(drafts.get(name), draft?.name === name ? rows.opened() : new Set());
    return true;
  } catch (requestError) {
    if (request !== latestRequest) return false;
    byId("editor-loading").hidden = true;
    showLoadError(requestError, byId("editor-failed"), () => edit(name));
    return false;
  }
}

/** Hide what belongs to another label set than the address says, until this one is loaded. */
function hideDraft() {
  draft = null;
  startExamples("", [], () => {}); // answers that arrive belong to no label set shown
  clearRequestError(byId("editor-failed"));
  byId("editor").hidden = byId("editor-loading").hidden = false;
  byId("label-set-form").hidden = byId("editor-tools").hidden = true;
}

/** Show a version that others have saved, unless there are unsaved edits or it is shown already. */
export async function showNewer(name, version) {
  if (draft?.name === name && draft.newest < version && !isChanged(draft) && !byId("new-classes").value) await edit(name);
}

/** Take over thresholds that were stored as a newer version, without touching other edits. */
export function thresholdsStored(change) {
  const edited = drafts.get(change.labelSet.name);
  if (!edited) return;
  takeThresholds(edited, change);
  if (edited !== draft) return;
  latestRequest += 1; // what is being loaded is older
  showVersions();
  rows.refresh();
  changed();
}

/** Show no label set. */
export function closeEditor() {
  latestRequest += 1;
  hideDraft();
  byId("editor").hidden = true;
}

async function loadDraft(name, version = null) {
  if (!name) return emptyDraft();
  const response = await fetchOrThrow(path(name));
  const newest = await jsonOf(response);
  const shown = version === null || version === newest.version ? newest : await requestJson(`${path(name)}?version=${version}`);
  return draftOf(shown, newest, response.headers.get("etag"));
}

// --- showing ---------------------------------------------------------------------------------------------------------

function show(shown, open = new Set()) {
  if (draft?.name !== shown.name) byId("new-classes").value = "";
  latestRequest += 1; // what is being loaded is older
  draft = shown;
  const isNew = draft.etag === null;
  byId("editor").hidden = byId("label-set-form").hidden = false;
  byId("editor-loading").hidden = true;
  clearRequestError(byId("editor-failed"));
  clearRequestError(byId("editor-error"));
  byId("conflict").hidden = true;
  byId("editor-title").textContent = isNew ? "New label set" : draft.name;
  byId("editor-name-field").hidden = !isNew;
  byId("editor-name").value = draft.name;
  byId("version-field").hidden = byId("delete-label-set").hidden = byId("classify-with").hidden = isNew;
  showVersions();
  byId("classify-with").href = addressOf("classify", draft.name);
  byId("editor-templates").value = draft.templates;
  byId("editor-merge").value = draft.merge;
  byId("editor-multi-label").checked = draft.multiLabel;
  rows = classRows(draft, { changed, countOf });
  rows.open(open);
  byId("class-filter").value = "";
  changed();
  setBusy(draft, draft.busy ?? "");
  const name = isNew ? "" : draft.name;
  const classnames = draft.classes.map((entry) => entry.stored).filter((entry) => entry !== null);
  byId("editor-tools").hidden = isNew;
  startExamples(name, classnames, () => rows.refresh());
  toolsFor(name, classnames, draft.newest);
}

function showVersions() {
  const isNew = draft.etag === null;
  const oldest = Math.max(1, draft.newest - MAX_VERSIONS + 1);
  const versions = Array.from({ length: isNew ? 0 : draft.newest - oldest + 1 }, (_, index) => draft.newest - index);
  byId("editor-version").replaceChildren(...versions.map((entry) => option(String(entry), entry === draft.newest ? `${entry} (latest)` : String(entry))));
  byId("editor-version").value = String(draft.shown);
  byId("version-made").textContent = isNew ? "" : `created ${formatTime(draft.createdAt)}`;
  byId("old-version").hidden = draft.shown === draft.newest;
  byId("old-version").textContent = `This is the old version ${draft.shown}. Saving it makes it the latest version, ${draft.newest + 1}.`;
  byId("save-label-set").textContent = isNew ? "Save" : `Save as version ${draft.newest + 1}`;
}

function changed() {
  const isNew = draft.etag === null;
  byId("no-classes").hidden = draft.classes.length > 0;
  byId("multi-label-hint").hidden = !draft.multiLabel;
  byId("class-count").textContent = countText(draft.classes.length, "class", "classes");
  byId("class-filter-field").hidden = draft.classes.length < FILTER_FROM;
  byId("editor-status").textContent = "";
  const unsaved = isChanged(draft);
  byId("unsaved").hidden = !unsaved;
  byId("undo-changes").hidden = isNew || !unsaved;
  if (unsaved !== wasUnsaved) listChanged();
  wasUnsaved = unsaved;
}

function addTyped() {
  const typed = splitLabels(byId("new-classes").value);
  if (!typed.length) return;
  rows.add(typed);
  byId("new-classes").value = "";
  changed();
}

/** Say what a draft waits for, empty for nothing. Until then it cannot be edited: the answer would overwrite the edits. */
function setBusy(waiting, text) {
  const form = byId("label-set-form"), { from } = waiting;
  waiting.busy = text;
  waiting.from = text && form.contains(document.activeElement) ? document.activeElement : null;
  if (waiting !== draft) return;
  form.inert = text !== "";
  byId("editor-status").textContent = text;
  if (document.activeElement === document.body) from?.focus(); // an inert element loses the focus
}

// --- saving ----------------------------------------------------------------------------------------------------------

async function save(event) {
  event.preventDefault();
  if (draft.busy) return; // a key may arrive before the form is inert
  addTyped();
  const edited = draft, isNew = edited.etag === null;
  clearRequestError(byId("editor-error"));
  byId("conflict").hidden = true;
  if (!isNew && edited.shown === edited.newest && !isChanged(edited)) {
    byId("editor-status").textContent = "There are no changes to save.";
    return;
  }
  const open = rows.opened();
  setBusy(edited, "Saving…");
  try {
    checkName(edited.name);
    const headers = isNew ? { "If-None-Match": "*" } : { "If-Match": edited.etag };
    const response = await fetchOrThrow(path(edited.name), jsonOptions("PUT", bodyOf(edited), headers));
    saved(await jsonOf(response), response.headers.get("etag"), { isNew, open, isShown: edited === draft });
  } catch (requestError) {
    if (requestError.status === 412) await conflicted(edited, requestError, open);
    else refused(edited, onTemplates(requestError));
  } finally {
    setBusy(edited, "");
  }
}

/** Show why a draft was not saved or deleted, also when another one is shown by now. */
function refused(edited, requestError, what = "saved") {
  setBusy(edited, ""); // an inert element cannot receive the focus
  if (edited === draft) showRequestError(requestError, byId("editor-error"), controlOf);
  else showRequestError(new RequestError(`“${edited.name}” is not ${what}. ${requestError.message}`), byId("label-sets-error"));
}

function saved(labelSet, etag, { isNew, open, isShown }) {
  if (isNew) drafts.delete("");
  drafts.set(labelSet.name, draftOf(labelSet, labelSet, etag));
  if (isShown) {
    show(drafts.get(labelSet.name), open);
    if (isNew && currentView() === "label-sets") renameTo("label-sets", labelSet.name);
    byId("editor-status").textContent = `Saved as version ${labelSet.version}.`;
    byId("save-label-set").focus();
  }
  listChanged({ isStored: true, shown: isShown ? labelSet.name : null });
}

/** Reject names that would change the path of the URL. */
function checkName(name) {
  let problem = "";
  if (!name) problem = "Enter a name.";
  if (name.startsWith(".")) problem = "A name must not start with a dot.";
  if (name.includes("/")) problem = "A name must not contain /; use -.";
  if (problem) throw new RequestError(problem, { errors: [{ field: "name", problem }] });
}

/** Assign an unknown template set, which the server reports as an unknown name, to the field for templates. */
function onTemplates(requestError) {
  if (requestError.kind === "unknown-name") requestError.errors = [{ field: "templates", problem: requestError.detail }];
  return requestError;
}

function controlOf(field) {
  if (field.startsWith("classes.")) return rows.controlOf(field);
  const control = { name: "editor-name", templates: "editor-templates", merge_synonyms: "editor-merge", multi_label: "editor-multi-label", classes: "new-classes" }[field];
  if (field === "name" && draft.etag !== null) return null;
  return control ? byId(control) : null;
}

// --- conflicts with the changes of others ---------------------------------------------------------------------------------

async function conflicted(edited, conflict, open) {
  try {
    const response = await fetchOrThrow(path(edited.name));
    const newest = await jsonOf(response), isNew = edited.etag === null;
    const etag = response.headers.get("etag");
    setBusy(edited, "");
    if (isStoredAs(edited, newest)) saved(newest, etag, { isNew, open, isShown: edited === draft }); // the answer was lost
    else if (edited !== draft) refused(edited, conflict);
    else if (isNew) nameIsTaken(edited.name);
    else savedByOthers(edited, newest, etag);
  } catch (requestError) {
    if (requestError.status === 404 && edited === draft) deletedByOthers(edited);
    else refused(edited, requestError);
  }
}

function nameIsTaken(name) {
  const open = create("a", { href: addressOf("label-sets", name), textContent: `Open “${name}”` });
  showConflict(`A label set “${name}” exists already. Choose another name, or open that label set. Your edits are kept.`, open);
  byId("editor-name").focus();
}

function savedByOthers(edited, newest, etag) {
  const next = newest.version + 1;
  const theirs = bodyOf(draftOf(newest, newest, etag));
  const merge = button("Merge both", () => {
    drafts.set(edited.name, mergeDrafts(edited, newest, etag));
    show(drafts.get(edited.name), rows.opened());
    byId("editor-status").textContent = `Both are merged here. Check the result, and save it as version ${next}.`;
    byId("editor-title").focus();
  });
  const overwrite = button(`Save my edits as version ${next}`, () => {
    Object.assign(edited, { etag, newest: newest.version });
    byId("label-set-form").requestSubmit();
  });
  const discard = button(`Discard my edits, use version ${newest.version}`, () => {
    drafts.set(edited.name, draftOf(newest, newest, etag));
    show(drafts.get(edited.name));
    byId("editor-title").focus();
  });
  const how = differences(edited.base, theirs);
  showConflict(`Another user saved version ${newest.version} while you edited version ${edited.shown}: it ${how}. Your edits are kept.`, merge, overwrite, discard);
  merge.focus();
}

function deletedByOthers(edited) {
  setBusy(edited, "");
  const createAgain = button("Create it again", () => {
    edited.etag = null;
    byId("label-set-form").requestSubmit();
  });
  showConflict(`Another user deleted “${edited.name}” while you edited it. Your edits are kept.`, createAgain);
  createAgain.focus();
}

function showConflict(sentence, ...buttons) {
  byId("conflict").replaceChildren(create("p", { textContent: sentence }), create("p", { className: "actions" }, ...buttons));
  byId("conflict").hidden = false;
}

function button(text, onclick) {
  return create("button", { type: "button", className: "secondary", textContent: text, onclick });
}

// --- versions, undoing, deleting -------------------------------------------------------------------------------------

async function showVersion() {
  const edited = draft, version = Number(byId("editor-version").value), { name, shown } = edited;
  const question = `“${name}” has unsaved edits. Discard them and show version ${version}?`;
  if (isChanged(draft) && !(await confirmDialog("Discard your edits?", question, "Discard"))) {
    if (edited === draft) byId("editor-version").value = String(shown);
    return;
  }
  await replaceBy(version, edited, "editor-version");
}

async function undo() {
  const edited = draft;
  if (!(await confirmDialog("Discard your edits?", `Discard all unsaved edits of “${edited.name}”?`, "Discard"))) return;
  await replaceBy(edited.shown, edited, "editor-title");
}

/** Replace a draft by a version of its label set, unless another one is shown by now. */
async function replaceBy(version, edited, focused) {
  if (edited !== draft) return;
  latestRequest += 1;
  const request = latestRequest;
  setBusy(edited, "Loading…");
  try {
    const loaded = await loadDraft(edited.name, version);
    if (request !== latestRequest) return;
    drafts.set(edited.name, loaded);
    if (isChanged(edited)) byId("new-classes").value = ""; // discarded as well
    show(loaded);
    byId(focused).focus();
  } catch (requestError) {
    if (request !== latestRequest) return;
    setBusy(edited, "");
    byId("editor-version").value = String(edited.shown);
    showRequestError(requestError, byId("editor-error"));
  } finally {
    setBusy(edited, "");
  }
}

async function remove() {
  const deleted = draft, { name, etag, newest } = deleted;
  const labelled = labelledCount();
  const images = labelled === null ? " and its example images" : labelled ? ` and ${countText(labelled, "labelled example image")}` : "";
  const question = `Delete “${name}” with ${newest === 1 ? "its version" : `all its versions up to ${newest}`}${images}? This cannot be undone.`;
  if (!(await confirmDialog("Delete the label set?", question, "Delete"))) return;
  setBusy(deleted, "Deleting…");
  try {
    await requestJson(path(name), { method: "DELETE", headers: { "If-Match": etag } }).catch((requestError) => {
      if (requestError.status !== 404) throw requestError; // or it is deleted, and the answer was lost
    });
    drafts.delete(name);
    forget(name);
    if (deleted === draft) toolsFor("", [], 0); // results of it are not those of a later label set of this name
    if (deleted === draft && currentView() === "label-sets") location.hash = addressOf("label-sets");
    else listChanged({ isStored: true });
    byId("label-sets-status").textContent = `“${name}” is deleted.`;
  } catch (requestError) {
    refused(deleted, requestError, "deleted");
  } finally {
    setBusy(deleted, "");
  }
}

/**
 * Register the event handlers. `list` is called when names or drafts change, `tools` with every label set shown, `deleted`
 * with the name of a label set that is deleted.
 */
export function startEditor({ list, tools, deleted }) {
  listChanged = list;
  toolsFor = tools;
  forget = deleted;
  byId("label-set-form").addEventListener("submit", save);
  byId("editor-name").oninput = () => {
    draft.name = byId("editor-name").value.trim();
    changed();
  };
  byId("editor-templates").oninput = () => {
    draft.templates = byId("editor-templates").value;
    changed();
  };
  byId("editor-merge").onchange = () => {
    draft.merge = byId("editor-merge").value;
    changed();
  };
  byId("editor-multi-label").onchange = () => {
    draft.multiLabel = byId("editor-multi-label").checked;
    rows.refresh();
    changed();
  };
  byId("editor-version").onchange = showVersion;
  byId("class-filter").oninput = () => rows.filter(byId("class-filter").value);
  byId("add-classes").onclick = addTyped;
  byId("new-classes").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    addTyped();
  };
  byId("undo-changes").onclick = undo;
  byId("delete-label-set").onclick = remove;
}
