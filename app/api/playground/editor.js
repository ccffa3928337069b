// The editor of a label set: its fields, its versions, saving without overwriting the changes of others, deleting.
import { byId, countText, create, formatTime, option, splitLabels } from "./elements.js";
import { requestJson, fetchOrThrow, jsonOf, jsonOptions, pathOf, RequestError } from "./requests.js";
import { clearRequestError, showLoadError, showRequestError } from "./request_errors.js";
import { confirmDialog } from "./dialog.js";
import { addressOf, renameTo } from "./views.js";
import { bodyOf, differences, draftOf, emptyDraft, isChanged, mergeDrafts, takeThresholds } from "./draft.js";
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

/** Edit a label set, with unsaved edits if there are any; "" is a new one. */
export async function edit(name) {
  latestRequest += 1;
  const request = latestRequest;
  try {
    if (!hasUnsaved(name)) drafts.set(name, await loadDraft(name));
    if (request === latestRequest) show(drafts.get(name));
  } catch (requestError) {
    if (request !== latestRequest) return;
    draft = null;
    byId("editor").hidden = false;
    byId("label-set-form").hidden = byId("editor-tools").hidden = true;
    showLoadError(requestError, byId("editor-failed"));
  }
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
  showVersions();
  rows.refresh();
  changed();
}

/** Show no label set. */
export function closeEditor() {
  latestRequest += 1;
  draft = null;
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
  draft = shown;
  const isNew = draft.etag === null;
  byId("editor").hidden = byId("label-set-form").hidden = false;
  clearRequestError(byId("editor-failed"));
  clearRequestError(byId("editor-error"));
  byId("conflict").hidden = true;
  byId("editor-status").textContent = "";
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
  byId("class-filter").value = byId("new-classes").value = "";
  changed();
  const name = isNew ? "" : draft.name;
  const classnames = draft.classes.map((entry) => entry.stored).filter((entry) => entry !== null);
  byId("editor-tools").hidden = isNew;
  startExamples(name, classnames, () => rows.refresh()).catch((requestError) => showLoadError(requestError, byId("examples-error")));
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

// --- saving ----------------------------------------------------------------------------------------------------------

async function save(event) {
  event.preventDefault();
  addTyped();
  const edited = draft, isNew = edited.etag === null;
  clearRequestError(byId("editor-error"));
  byId("conflict").hidden = true;
  if (!isNew && edited.shown === edited.newest && !isChanged(edited)) {
    byId("editor-status").textContent = "There are no changes to save.";
    return;
  }
  byId("editor-status").textContent = "Saving…";
  const open = rows.opened();
  // Prevents edits that the response would overwrite.
  byId("label-set-form").inert = true;
  try {
    checkName(edited.name);
    const headers = isNew ? { "If-None-Match": "*" } : { "If-Match": edited.etag };
    const response = await fetchOrThrow(path(edited.name), jsonOptions("PUT", bodyOf(edited), headers));
    saved(await jsonOf(response), response.headers.get("etag"), { isNew, open, isShown: edited === draft });
  } catch (requestError) {
    byId("label-set-form").inert = false; // an inert element cannot receive the focus
    byId("editor-status").textContent = "";
    if (requestError.status === 412) await conflicted(edited);
    else showRequestError(onTemplates(requestError), byId("editor-error"), controlOf);
  } finally {
    byId("label-set-form").inert = false;
  }
}

function saved(labelSet, etag, { isNew, open, isShown }) {
  if (isNew) drafts.delete("");
  drafts.set(labelSet.name, draftOf(labelSet, labelSet, etag));
  if (isShown) {
    show(drafts.get(labelSet.name), open);
    if (isNew) renameTo("label-sets", labelSet.name);
    byId("editor-status").textContent = `Saved as version ${labelSet.version}.`;
    byId("label-set-form").inert = false;
    byId("save-label-set").focus();
  }
  listChanged({ saved: labelSet.name });
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

async function conflicted(edited) {
  try {
    const response = await fetchOrThrow(path(edited.name));
    const newest = await jsonOf(response);
    const etag = response.headers.get("etag");
    if (edited.etag === null) nameIsTaken(edited.name);
    else savedByOthers(edited, newest, etag);
  } catch (requestError) {
    if (requestError.status === 404) deletedByOthers(edited);
    else showRequestError(requestError, byId("editor-error"));
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
  const version = Number(byId("editor-version").value), { name, shown } = draft;
  const question = `“${name}” has unsaved edits. Discard them and show version ${version}?`;
  if (isChanged(draft) && !(await confirmDialog("Discard your edits?", question, "Discard"))) {
    byId("editor-version").value = String(shown);
    return;
  }
  try {
    drafts.set(name, await loadDraft(name, version));
    show(drafts.get(name));
    byId("editor-version").focus();
  } catch (requestError) {
    byId("editor-version").value = String(shown);
    showRequestError(requestError, byId("editor-error"));
  }
}

async function undo() {
  const { name, shown } = draft;
  if (!(await confirmDialog("Discard your edits?", `Discard all unsaved edits of “${name}”?`, "Discard"))) return;
  try {
    drafts.set(name, await loadDraft(name, shown));
    show(drafts.get(name));
    byId("editor-title").focus();
  } catch (requestError) {
    showRequestError(requestError, byId("editor-error"));
  }
}

async function remove() {
  const { name, etag, newest } = draft;
  const labelled = labelledCount();
  const images = labelled === null ? " and its example images" : labelled ? ` and ${countText(labelled, "labelled example image")}` : "";
  const question = `Delete “${name}” with ${newest === 1 ? "its version" : `all its versions up to ${newest}`}${images}? This cannot be undone.`;
  if (!(await confirmDialog("Delete the label set?", question, "Delete"))) return;
  try {
    await requestJson(path(name), { method: "DELETE", headers: { "If-Match": etag } });
    drafts.delete(name);
    forget(name);
    location.hash = addressOf("label-sets");
    byId("label-sets-status").textContent = `“${name}” is deleted.`;
  } catch (requestError) {
    showRequestError(requestError, byId("editor-error"));
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
