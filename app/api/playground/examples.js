// Example images of the label set in the editor: counting, adding and deleting them.
import { byId, countText, create } from "./elements.js";
import { blobOf, requestJson, fetchOrThrow, pathOf, RequestError } from "./requests.js";
import { clearRequestError, showLoadError, showRequestError } from "./request_errors.js";
import { fileChooser, dropZone, splitFiles } from "./file_drops.js";
import { confirmDialog } from "./dialog.js";
import { batchesOf } from "./batches.js";
import { catalogue } from "./catalogue.js";

const PAGE = 24;

let counts = null; // {labelled, labelled_images, unlabelled, without_features}, null until they are loaded
let latestCounts = 0; // those that were asked for or received last
let labelSet = "";
let classes = new Set();
let onCounts = () => {};
const deleting = new Set(); // the URLs of what is being deleted
const seen = new Map(); // URLs of images added in this tab, by the SHA-256 of their file; the server may not store files

const path = (name, query) => `${pathOf("label-sets", name, "images")}${query}`;

/** Return the place of a message on a label set: the shared one if its row was drawn again, null if another set is shown. */
const placeOf = (name, place, shared) => (name !== labelSet ? null : place.isConnected ? place : byId(shared));

export const countOf = (classname) => counts?.labelled[classname] || 0;

/** Return the number of labelled images, null until it is loaded. */
export const labelledCount = () => counts?.labelled_images ?? null;

/** Return a function that shows the state of a request on a label set. */
const sayAbout = (name, status) => (text) => Object.assign(placeOf(name, status, "unlabelled-status") ?? {}, { textContent: text });

/** Use a label set and its classes, "" for an unsaved one; `changed` is called whenever the counts change. */
export function startExamples(name, classnames, changed) {
  labelSet = name;
  classes = new Set(classnames);
  onCounts = changed;
  counts = null;
  byId("unlabelled-zone").replaceChildren(...(name ? zone(null, byId("unlabelled-status")) : []));
  byId("unlabelled-status").textContent = byId("examples-counts").textContent = ""; // not those of another label set
  clearRequestError(byId("examples-error"));
  byId("stray-examples").replaceChildren();
  byId("delete-unlabelled").hidden = true;
  byId("examples-section").hidden = !name;
  latestCounts += 1;
  if (name) loadCounts();
}

async function loadCounts() {
  latestCounts += 1;
  const request = latestCounts;
  try {
    const { counts: current } = await requestJson(path(labelSet, "?limit=1"));
    if (request === latestCounts) setCounts(current);
  } catch (requestError) {
    if (request === latestCounts) showLoadError(requestError, byId("examples-error"), loadCounts);
  }
}

function setCounts(current) {
  latestCounts += 1;
  counts = current;
  const labelled = labelledCount();
  const parts = [`${countText(labelled, "labelled image")} in ${countText(Object.keys(counts.labelled).length, "class", "classes")}`, `${counts.unlabelled} unlabelled`];
  if (counts.without_features) parts.push(`${counts.without_features} without features of the default model`);
  byId("examples-counts").textContent = labelled + counts.unlabelled ? `${parts.join(", ")}.` : "There are no example images yet.";
  byId("delete-unlabelled").hidden = !counts.unlabelled;
  const removedClasses = Object.keys(counts.labelled).filter((classname) => !classes.has(classname));
  byId("stray-examples").replaceChildren(...removedClasses.map(removedClassItem));
  onCounts();
}

/** Return the example images of a class, for its row. */
export function classExamples(name, classname) {
  if (!name || classname === null) {
    return create("p", { className: "hint", textContent: "Save the label set before adding example images to this class." });
  }
  const status = create("p", { className: "status", role: "status" });
  const tiles = create("ul", { className: "pictures", "aria-label": `Example images of ${classname}` });
  const more = create("button", { type: "button", className: "secondary", textContent: "Show more", hidden: true });
  const all = create("button", { type: "button", className: "secondary danger", textContent: `Delete all images of ${classname}…`, hidden: true });
  const error = create("div", { className: "problem", role: "alert", hidden: true });
  const places = { name, status, error };
  let after = 0, latestRequest = 0;

  async function load() {
    latestRequest += 1;
    const request = latestRequest;
    try {
      const page = await requestJson(path(name, `?class=${encodeURIComponent(classname)}&limit=${PAGE}&after=${after}`));
      if (request !== latestRequest) return;
      tiles.append(...page.images.map((entry) => tile(entry, classname, places)));
      after = page.next_after ?? 0;
      more.hidden = page.next_after === null;
      const count = page.counts.labelled[classname] || 0;
      all.hidden = count < 2;
      all.onclick = async () => {
        if (await deleteExamples(`?class=${encodeURIComponent(classname)}`, `all ${count} example images of ${classname}`, places)) await reload();
      };
    } catch (requestError) {
      if (request === latestRequest) showLoadError(requestError, error, load);
    }
  }

  function reload() {
    after = 0;
    tiles.replaceChildren();
    return load();
  }

  more.onclick = () => {
    clearRequestError(error);
    load();
  };
  const drop = create("div", { className: "drop small" }, ...zone(classname, status, reload, error));
  load();
  return create(
    "div", { className: "tool" }, create("h4", { textContent: "Example images" }), drop, status, error, tiles, create("p", { className: "actions" }, more, all),
  );
}

/** Return a drop zone with a file chooser for images of a class, null for unlabelled images. */
function zone(classname, status, done = () => {}, error = byId("examples-error")) {
  const what = classname === null ? "unlabelled images" : `images of ${classname}`;
  const area = create("div", { className: "drop-area" });
  const receive = (files) => add(files, classname, { status, error }).then(done);
  const text = create("p", {}, `Drop ${what} here, or `, fileChooser("choose files", `Select ${what}`, receive));
  area.append(text);
  dropZone(area, receive);
  return [area];
}

async function add(files, classname, { status, error }) {
  clearRequestError(error);
  const { pictures, skippedNote } = splitFiles(files);
  const totals = { added: 0, relabelled: 0, duplicates: 0, skipped: [], done: 0 };
  const name = labelSet;
  const say = sayAbout(name, status);
  try {
    const { images } = await catalogue();
    for (const entries of batchesOf(pictures.map((file) => ({ file })), images)) {
      const batch = entries.map(({ file }) => file);
      say(`Adding ${totals.done + batch.length} of ${pictures.length}…`);
      await send(name, batch, classname, totals);
      totals.done += batch.length;
    }
    say([skippedNote, ...(pictures.length ? summary(totals, classname) : [])].filter(Boolean).join(" "));
  } catch (requestError) {
    const sent = totals.done ? `${totals.done} of ${pictures.length} images were sent before the error.` : "";
    say(sent);
    failed(name, requestError, error, ["The images are not added.", sent]);
  }
}

async function send(name, files, classname, totals) {
  const form = new FormData();
  for (const file of files) form.append("image", file, file.name || "pasted");
  if (classname !== null) form.append("class", classname);
  let response;
  try {
    response = await requestJson(pathOf("label-sets", name, "images"), { method: "POST", body: form });
  } catch (requestError) {
    // An error with status 413 or 415 concerns an image; sending the images one by one shows which.
    if (![413, 415].includes(requestError.status)) throw requestError;
    if (files.length === 1) totals.skipped.push(`${files[0].name}: ${requestError.detail}`);
    else for (const file of files) await send(name, [file], classname, totals);
    return;
  }
  for (const kind of ["added", "relabelled", "duplicates"]) totals[kind] += response[kind];
  totals.skipped.push(...response.skipped.map((entry) => `${files[entry.image].name}: ${entry.problem}`));
  await Promise.all(files.map(keepPreview));
  if (name === labelSet) setCounts(response.counts);
}

function summary(totals, classname) {
  const parts = [`${countText(totals.added, "image")} added.`];
  if (totals.relabelled) parts.push(`${totals.relabelled} of another class ${classname === null ? "kept their class" : `now have the class ${classname}`}.`);
  if (totals.duplicates) parts.push(`${countText(totals.duplicates, "was", "were")} stored already.`);
  if (totals.skipped.length) parts.push(`Not added: ${totals.skipped.join("; ")}.`);
  return parts;
}

async function keepPreview(file) {
  if (!crypto.subtle) return; // available only over HTTPS or from localhost
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  const digest = [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (!seen.has(digest)) seen.set(digest, URL.createObjectURL(file));
}

function tile(example, classname, places) {
  const name = `example image ${example.id} of ${classname}`;
  const picture = create("div", { className: "tile", title: `Added ${new Date(example.created_at).toLocaleString("en")}` });
  const remove = create("button", { type: "button", className: "remove", textContent: "×", "aria-label": `Delete ${name}` });
  const item = create("li", {}, picture, remove);
  remove.onclick = async () => {
    if (await deleteExamples(`/${example.id}`, name, places)) item.remove();
  };
  if (seen.has(example.sha256)) picture.replaceChildren(create("img", { src: seen.get(example.sha256), alt: name }));
  else {
    picture.append(create("span", { textContent: `no. ${example.id}` }));
    if (example.kept) showKept(example, picture, places.name, name);
  }
  return item;
}

async function showKept(example, picture, owner, name) {
  try {
    const file = await blobOf(await fetchOrThrow(path(owner, `/${example.id}/content`)));
    seen.set(example.sha256, URL.createObjectURL(file));
    picture.replaceChildren(create("img", { src: seen.get(example.sha256), alt: name }));
  } catch (requestError) {
    if (!(requestError instanceof RequestError)) throw requestError; // a key without permission to read files sees only the ids
  }
}

/** Return the line of a class that was removed from the label set and still has images. */
function removedClassItem(classname) {
  const remove = create("button", { type: "button", className: "secondary danger", textContent: "Delete these images…" });
  const what = `all ${countOf(classname)} example images of ${classname}`;
  remove.onclick = () => deleteExamples(`?class=${encodeURIComponent(classname)}`, what, { status: byId("unlabelled-status"), error: byId("examples-error") });
  return create("li", { textContent: `${classname}, a class that the latest version does not have: ${countText(countOf(classname), "image")} ` }, remove);
}

async function deleteExamples(rest, what, { name = labelSet, status, error }) {
  const url = path(name, rest); // before the question: the address may change while it is open
  if (deleting.has(url)) return false;
  if (!(await confirmDialog("Delete example images?", `Delete ${what}, and everything fitted on them? This cannot be undone.`, "Delete"))) return false;
  clearRequestError(error);
  const say = sayAbout(name, status);
  say("Deleting…");
  deleting.add(url);
  try {
    const response = await requestJson(url, { method: "DELETE" });
    say(`${countText(response.deleted, "image")} deleted.`);
    if (name === labelSet) setCounts(response.counts);
    return true;
  } catch (requestError) {
    say("");
    failed(name, requestError, error, ["The images are not deleted."]);
    return false;
  } finally {
    deleting.delete(url);
  }
}

/** Show an error of adding or deleting images, also when another label set is shown by now. */
function failed(name, requestError, error, sentences) {
  const place = placeOf(name, error, "examples-error");
  if (place) showRequestError(requestError, place);
  else showRequestError(new RequestError([`“${name}”:`, ...sentences, requestError.message].filter(Boolean).join(" ")), byId("label-sets-error"));
}

/** Register the event handlers that are shared by all label sets. */
export function startExampleButtons() {
  const places = { status: byId("unlabelled-status"), error: byId("examples-error") };
  byId("delete-unlabelled").onclick = () => deleteExamples("?unlabelled=true", `all ${counts.unlabelled} unlabelled images`, places);
}
