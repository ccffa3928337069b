// The editor of a label set: its fields, its versions, saving without overwriting the changes of others, deleting.
import { at, counted, create, moment, option, labelsIn } from "./elements.js";
import { ask, fetched, json, Refusal } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { confirmed } from "./dialog.js";
import { addressOf, renameTo } from "./views.js";
import { bodyOf, differences, draftOf, emptyDraft, isChanged, merged } from "./draft.js";
import { classRows } from "./class_rows.js";
import { countOf, labelledCount, startExamples } from "./examples.js";

// Versions are numbered from 1, and no route lists them. Only the latest ones are offered.
const MAX_VERSIONS = 200;
const FILTER_FROM = 12;

const drafts = new Map(); // unsaved edits by label set name, "" for a new one; they survive leaving the view
let draft = null;
let rows = null;
let wanted = 0;
let listChanged = () => {};
let toolsFor = () => {};
let wasUnsaved = false;

const path = (name) => `v1/label-sets/${encodeURIComponent(name)}`;

export const hasUnsaved = (name) => drafts.has(name) && isChanged(drafts.get(name));
export const anyUnsaved = () => [...drafts.values()].some(isChanged);

/** Edit a label set, with unsaved edits if there are any; "" is a new one. */
export async function edit(name) {
  wanted += 1;
  const mine = wanted;
  try {
    if (!hasUnsaved(name)) drafts.set(name, await fresh(name));
    if (mine === wanted) show(drafts.get(name));
  } catch (refusal) {
    if (mine !== wanted) return;
    draft = null;
    at("editor").hidden = false;
    at("label-set-form").hidden = at("editor-tools").hidden = true;
    showRefusal(refusal, at("editor-failed"));
  }
}

/** Show no label set. */
export function closeEditor() {
  wanted += 1;
  draft = null;
  at("editor").hidden = true;
}

async function fresh(name, version = null) {
  if (!name) return emptyDraft();
  const answer = await fetched(path(name));
  const newest = await answer.json();
  const shown = version === null || version === newest.version ? newest : await ask(`${path(name)}?version=${version}`);
  return draftOf(shown, newest, answer.headers.get("etag"));
}

// --- showing ---------------------------------------------------------------------------------------------------------

function show(shown, open = new Set()) {
  draft = shown;
  const isNew = draft.etag === null;
  at("editor").hidden = at("label-set-form").hidden = false;
  clearRefusal(at("editor-failed"));
  clearRefusal(at("editor-error"));
  at("conflict").hidden = true;
  at("editor-status").textContent = "";
  at("editor-title").textContent = isNew ? "New label set" : draft.name;
  at("editor-name-field").hidden = !isNew;
  at("editor-name").value = draft.name;
  at("version-field").hidden = at("delete-label-set").hidden = at("classify-with").hidden = isNew;
  const oldest = Math.max(1, draft.newest - MAX_VERSIONS + 1);
  const versions = Array.from({ length: isNew ? 0 : draft.newest - oldest + 1 }, (_, index) => draft.newest - index);
  at("editor-version").replaceChildren(...versions.map((each) => option(String(each), each === draft.newest ? `${each} (latest)` : String(each))));
  at("editor-version").value = String(draft.shown);
  at("version-made").textContent = isNew ? "" : `created ${moment(draft.createdAt)}`;
  at("old-version").hidden = draft.shown === draft.newest;
  at("old-version").textContent = `This is the old version ${draft.shown}. Saving it makes it the latest version, ${draft.newest + 1}.`;
  at("classify-with").href = addressOf("classify", draft.name);
  at("editor-templates").value = draft.templates;
  at("editor-merge").value = draft.merge;
  rows = classRows(draft, { changed, countOf });
  rows.open(open);
  at("class-filter").value = at("new-classes").value = "";
  at("save-label-set").textContent = isNew ? "Save" : `Save as version ${draft.newest + 1}`;
  changed();
  const name = isNew ? "" : draft.name;
  const classnames = draft.classes.map((each) => each.stored).filter((each) => each !== null);
  at("editor-tools").hidden = isNew;
  startExamples(name, classnames, () => rows.refresh()).catch((refusal) => showRefusal(refusal, at("examples-error")));
  toolsFor(name, classnames);
}

function changed() {
  const isNew = draft.etag === null;
  at("no-classes").hidden = draft.classes.length > 0;
  at("class-count").textContent = counted(draft.classes.length, "class", "classes");
  at("class-filter-field").hidden = draft.classes.length < FILTER_FROM;
  at("editor-status").textContent = "";
  const unsaved = isChanged(draft);
  at("unsaved").hidden = !unsaved;
  at("undo-changes").hidden = isNew || !unsaved;
  if (unsaved !== wasUnsaved) listChanged();
  wasUnsaved = unsaved;
}

function addTyped() {
  const typed = labelsIn(at("new-classes").value);
  if (!typed.length) return;
  rows.add(typed);
  at("new-classes").value = "";
  changed();
}

// --- saving ----------------------------------------------------------------------------------------------------------

async function save(event) {
  event.preventDefault();
  addTyped();
  const mine = draft, isNew = mine.etag === null;
  clearRefusal(at("editor-error"));
  at("conflict").hidden = true;
  if (!isNew && mine.shown === mine.newest && !isChanged(mine)) {
    at("editor-status").textContent = "There are no changes to save.";
    return;
  }
  at("editor-status").textContent = "Saving…";
  const open = rows.opened();
  // Prevents edits that the response would overwrite.
  at("label-set-form").inert = true;
  try {
    checkName(mine.name);
    const headers = isNew ? { "If-None-Match": "*" } : { "If-Match": mine.etag };
    const answer = await fetched(path(mine.name), json("PUT", bodyOf(mine), headers));
    saved(await answer.json(), answer.headers.get("etag"), { isNew, open, isShown: mine === draft });
  } catch (refusal) {
    at("label-set-form").inert = false; // an inert element cannot receive the focus
    at("editor-status").textContent = "";
    if (refusal.status === 412) await conflicted(mine);
    else showRefusal(onTemplates(refusal), at("editor-error"), controlOf);
  } finally {
    at("label-set-form").inert = false;
  }
}

function saved(labelSet, etag, { isNew, open, isShown }) {
  if (isNew) drafts.delete("");
  drafts.set(labelSet.name, draftOf(labelSet, labelSet, etag));
  if (isShown) {
    show(drafts.get(labelSet.name), open);
    if (isNew) renameTo("label-sets", labelSet.name);
    at("editor-status").textContent = `Saved as version ${labelSet.version}.`;
    at("label-set-form").inert = false;
    at("save-label-set").focus();
  }
  listChanged({ saved: labelSet.name });
}

/** Refuse names that would change the path of the URL. */
function checkName(name) {
  let problem = "";
  if (!name) problem = "Enter a name.";
  if (name.startsWith(".")) problem = "A name must not start with a dot.";
  if (name.includes("/")) problem = "A name must not contain /; use -.";
  if (problem) throw new Refusal(problem, { errors: [{ field: "name", problem }] });
}

/** Assign an unknown template set, which the server reports as an unknown name, to the field for templates. */
function onTemplates(refusal) {
  if (refusal.kind === "unknown-name") refusal.errors = [{ field: "templates", problem: refusal.detail }];
  return refusal;
}

function controlOf(field) {
  if (field.startsWith("classes.")) return rows.controlOf(field);
  const control = { name: "editor-name", templates: "editor-templates", merge_synonyms: "editor-merge", classes: "new-classes" }[field];
  if (field === "name" && draft.etag !== null) return null;
  return control ? at(control) : null;
}

// --- conflicts with the changes of others ---------------------------------------------------------------------------------

async function conflicted(mine) {
  try {
    const answer = await fetched(path(mine.name));
    const newest = await answer.json();
    const etag = answer.headers.get("etag");
    if (mine.etag === null) nameIsTaken(mine.name);
    else savedByOthers(mine, newest, etag);
  } catch (refusal) {
    if (refusal.status === 404) deletedByOthers(mine);
    else showRefusal(refusal, at("editor-error"));
  }
}

function nameIsTaken(name) {
  const open = create("a", { href: addressOf("label-sets", name), textContent: `Open “${name}”` });
  showConflict(`A label set “${name}” exists already. Choose another name, or open that label set. Your edits are kept.`, open);
  at("editor-name").focus();
}

function savedByOthers(mine, newest, etag) {
  const next = newest.version + 1;
  const theirs = bodyOf(draftOf(newest, newest, etag));
  const both = button("Merge both", () => {
    drafts.set(mine.name, merged(mine, newest, etag));
    show(drafts.get(mine.name), rows.opened());
    at("editor-status").textContent = `Both are merged here. Check the result, and save it as version ${next}.`;
    at("editor-title").focus();
  });
  const over = button(`Save my edits as version ${next}`, () => {
    Object.assign(mine, { etag, newest: newest.version });
    at("label-set-form").requestSubmit();
  });
  const take = button(`Discard my edits, use version ${newest.version}`, () => {
    drafts.set(mine.name, draftOf(newest, newest, etag));
    show(drafts.get(mine.name));
    at("editor-title").focus();
  });
  const how = differences(mine.base, theirs);
  showConflict(`Another user saved version ${newest.version} while you edited version ${mine.shown}: it ${how}. Your edits are kept.`, both, over, take);
  both.focus();
}

function deletedByOthers(mine) {
  const anew = button("Create it again", () => {
    mine.etag = null;
    at("label-set-form").requestSubmit();
  });
  showConflict(`Another user deleted “${mine.name}” while you edited it. Your edits are kept.`, anew);
  anew.focus();
}

function showConflict(sentence, ...ways) {
  at("conflict").replaceChildren(create("p", { textContent: sentence }), create("p", { className: "actions" }, ...ways));
  at("conflict").hidden = false;
}

function button(text, act) {
  return create("button", { type: "button", className: "secondary", textContent: text, onclick: act });
}

// --- versions, undoing, deleting -------------------------------------------------------------------------------------

async function showVersion() {
  const version = Number(at("editor-version").value), { name, shown } = draft;
  const question = `“${name}” has unsaved edits. Discard them and show version ${version}?`;
  if (isChanged(draft) && !(await confirmed("Discard your edits?", question, "Discard"))) {
    at("editor-version").value = String(shown);
    return;
  }
  try {
    drafts.set(name, await fresh(name, version));
    show(drafts.get(name));
    at("editor-version").focus();
  } catch (refusal) {
    at("editor-version").value = String(shown);
    showRefusal(refusal, at("editor-error"));
  }
}

async function undo() {
  const { name, shown } = draft;
  if (!(await confirmed("Discard your edits?", `Discard all unsaved edits of “${name}”?`, "Discard"))) return;
  try {
    drafts.set(name, await fresh(name, shown));
    show(drafts.get(name));
    at("editor-title").focus();
  } catch (refusal) {
    showRefusal(refusal, at("editor-error"));
  }
}

async function remove() {
  const { name, etag, newest } = draft;
  const images = labelledCount() ? ` and ${counted(labelledCount(), "labelled example image")}` : "";
  const question = `Delete “${name}” with ${newest === 1 ? "its version" : `all its versions up to ${newest}`}${images}? This cannot be undone.`;
  if (!(await confirmed("Delete the label set?", question, "Delete"))) return;
  try {
    await ask(path(name), { method: "DELETE", headers: { "If-Match": etag } });
    drafts.delete(name);
    location.hash = addressOf("label-sets");
    at("label-sets-status").textContent = `“${name}” is deleted.`;
  } catch (refusal) {
    showRefusal(refusal, at("editor-error"));
  }
}

/** Register the event handlers. `list` is called when names or drafts change, `tools` with every label set shown. */
export function startEditor({ list, tools }) {
  listChanged = list;
  toolsFor = tools;
  at("label-set-form").addEventListener("submit", save);
  at("editor-name").oninput = () => {
    draft.name = at("editor-name").value.trim();
    changed();
  };
  at("editor-templates").oninput = () => {
    draft.templates = at("editor-templates").value;
    changed();
  };
  at("editor-merge").onchange = () => {
    draft.merge = at("editor-merge").value;
    changed();
  };
  at("editor-version").onchange = showVersion;
  at("class-filter").oninput = () => rows.filter(at("class-filter").value);
  at("add-classes").onclick = addTyped;
  at("new-classes").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    addTyped();
  };
  at("undo-changes").onclick = undo;
  at("delete-label-set").onclick = remove;
}
