// Example images of the label set in the editor: counting, adding and deleting them.
import { at, counted, create } from "./elements.js";
import { ask, fetched, Refusal } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { chooser, dropZone, sorted } from "./dropping.js";
import { confirmed } from "./dialog.js";

const PAGE = 24;
// Per request; small, to show progress and to stay within the server's time limit on slow connections.
const MAX_FILES = 16;
const MAX_BYTES = 16 * 2 ** 20;

const NO_COUNTS = { labelled: {}, unlabelled: 0, without_features: 0 };

let counts = NO_COUNTS;
let labelSet = "";
let classes = new Set();
let onCounts = () => {};
const seen = new Map(); // URLs of images added in this tab, by the SHA-256 of their file; the server may not store files

const path = (rest = "") => `v1/label-sets/${encodeURIComponent(labelSet)}/images${rest}`;

export const countOf = (classname) => counts.labelled[classname] || 0;
export const labelledCount = () => Object.values(counts.labelled).reduce((sum, each) => sum + each, 0);

/** Use a label set and its classes, "" for an unsaved one; `changed` is called whenever the counts change. */
export async function startExamples(name, classnames, changed) {
  labelSet = name;
  classes = new Set(classnames);
  onCounts = changed;
  counts = NO_COUNTS;
  at("unlabelled-zone").replaceChildren(...(name ? zone(null, at("unlabelled-status")) : []));
  at("unlabelled-status").textContent = "";
  at("examples-section").hidden = !name;
  if (!name) return;
  const { counts: current } = await ask(path("?limit=1"));
  if (name === labelSet) setCounts(current);
}

function setCounts(current) {
  counts = current;
  const labelled = labelledCount();
  const parts = [`${counted(labelled, "labelled image")} in ${counted(Object.keys(counts.labelled).length, "class", "classes")}`, `${counts.unlabelled} unlabelled`];
  if (counts.without_features) parts.push(`${counts.without_features} without features of the default model`);
  at("examples-counts").textContent = labelled + counts.unlabelled ? `${parts.join(", ")}.` : "There are no example images yet.";
  at("delete-unlabelled").hidden = !counts.unlabelled;
  const strays = Object.keys(counts.labelled).filter((classname) => !classes.has(classname));
  at("stray-examples").replaceChildren(...strays.map(stray));
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
  let after = 0;

  async function load() {
    try {
      const page = await ask(path(`?class=${encodeURIComponent(classname)}&limit=${PAGE}&after=${after}`));
      tiles.append(...page.images.map((each) => tile(each, classname, { status, error })));
      after = page.next_after ?? 0;
      more.hidden = page.next_after === null;
      all.hidden = (page.counts.labelled[classname] || 0) < 2;
    } catch (refusal) {
      showRefusal(refusal, error);
    }
  }

  function reload() {
    after = 0;
    tiles.replaceChildren();
    return load();
  }

  more.onclick = load;
  all.onclick = async () => {
    if (await deleted(`?class=${encodeURIComponent(classname)}`, `all ${countOf(classname)} example images of ${classname}`, { status, error })) await reload();
  };
  const drop = create("div", { className: "drop small" }, ...zone(classname, status, reload, error));
  load();
  return create(
    "div", { className: "tool" }, create("h4", { textContent: "Example images" }), drop, status, error, tiles, create("p", { className: "actions" }, more, all),
  );
}

/** Return a drop zone with a file chooser for images of a class, null for unlabelled images. */
function zone(classname, status, done = () => {}, error = at("examples-error")) {
  const what = classname === null ? "unlabelled images" : `images of ${classname}`;
  const area = create("div", { className: "drop-area" });
  const take = (files) => add(files, classname, { status, error }).then(done);
  const text = create("p", {}, `Drop ${what} here, or `, chooser("choose files", `Select ${what}`, take));
  area.append(text);
  dropZone(area, take);
  return [area];
}

async function add(files, classname, { status, error }) {
  clearRefusal(error);
  const { pictures, leftOut } = sorted(files);
  const totals = { added: 0, relabelled: 0, duplicates: 0, skipped: [], done: 0 };
  const name = labelSet;
  try {
    for (const some of chunks(pictures)) {
      status.textContent = `Adding ${totals.done + some.length} of ${pictures.length}…`;
      await send(name, some, classname, totals);
      totals.done += some.length;
    }
    status.textContent = [leftOut, ...(pictures.length ? summary(totals, classname) : [])].filter(Boolean).join(" ");
  } catch (refusal) {
    status.textContent = totals.done ? `${totals.done} of ${pictures.length} images were sent before the error.` : "";
    showRefusal(refusal, error);
  }
}

/** Yield the files in batches that fit into one request. */
function* chunks(files) {
  let some = [], bytes = 0;
  for (const file of files) {
    if (some.length && (some.length === MAX_FILES || bytes + file.size > MAX_BYTES)) {
      yield some;
      [some, bytes] = [[], 0];
    }
    some.push(file);
    bytes += file.size;
  }
  if (some.length) yield some;
}

async function send(name, files, classname, totals) {
  const form = new FormData();
  for (const file of files) form.append("image", file, file.name || "pasted");
  if (classname !== null) form.append("class", classname);
  let answer;
  try {
    answer = await ask(`v1/label-sets/${encodeURIComponent(name)}/images`, { method: "POST", body: form });
  } catch (refusal) {
    // A refusal with 413 or 415 concerns an image; sending the images one by one shows which.
    if (![413, 415].includes(refusal.status)) throw refusal;
    if (files.length === 1) totals.skipped.push(`${files[0].name}: ${refusal.detail}`);
    else for (const file of files) await send(name, [file], classname, totals);
    return;
  }
  for (const kind of ["added", "relabelled", "duplicates"]) totals[kind] += answer[kind];
  totals.skipped.push(...answer.skipped.map((each) => `${files[each.image].name}: ${each.problem}`));
  await Promise.all(files.map(remember));
  if (name === labelSet) setCounts(answer.counts);
}

function summary(totals, classname) {
  const parts = [`${counted(totals.added, "image")} added.`];
  if (totals.relabelled) parts.push(`${totals.relabelled} of another class ${classname === null ? "kept their class" : `now have the class ${classname}`}.`);
  if (totals.duplicates) parts.push(`${counted(totals.duplicates, "was", "were")} stored already.`);
  if (totals.skipped.length) parts.push(`Not added: ${totals.skipped.join("; ")}.`);
  return parts;
}

async function remember(file) {
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
    if (await deleted(`/${example.id}`, name, places)) item.remove();
  };
  if (seen.has(example.sha256)) picture.replaceChildren(create("img", { src: seen.get(example.sha256), alt: name }));
  else {
    picture.append(create("span", { textContent: `no. ${example.id}` }));
    if (example.kept) showKept(example, picture, name);
  }
  return item;
}

async function showKept(example, picture, name) {
  try {
    const file = await (await fetched(path(`/${example.id}/content`))).blob();
    seen.set(example.sha256, URL.createObjectURL(file));
    picture.replaceChildren(create("img", { src: seen.get(example.sha256), alt: name }));
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal; // a key without permission to read files sees only the ids
  }
}

/** Return the line of a class that was removed from the label set and still has images. */
function stray(classname) {
  const remove = create("button", { type: "button", className: "secondary danger", textContent: "Delete these images…" });
  const what = `all ${countOf(classname)} example images of ${classname}`;
  remove.onclick = () => deleted(`?class=${encodeURIComponent(classname)}`, what, { status: at("unlabelled-status"), error: at("examples-error") });
  return create("li", { textContent: `${classname}, a class that the latest version does not have: ${counted(countOf(classname), "image")} ` }, remove);
}

async function deleted(rest, what, { status, error }) {
  if (!(await confirmed("Delete example images?", `Delete ${what}, and everything fitted on them? This cannot be undone.`, "Delete"))) return false;
  clearRefusal(error);
  try {
    const answer = await ask(path(rest), { method: "DELETE" });
    status.textContent = `${counted(answer.deleted, "image")} deleted.`;
    setCounts(answer.counts);
    return true;
  } catch (refusal) {
    showRefusal(refusal, error);
    return false;
  }
}

/** Register the event handlers that are shared by all label sets. */
export function startExampleButtons() {
  const places = { status: at("unlabelled-status"), error: at("examples-error") };
  at("delete-unlabelled").onclick = () => deleted("?unlabelled=true", `all ${counts.unlabelled} unlabelled images`, places);
}
