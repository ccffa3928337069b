// Example images of the label set in the editor: how many there are, adding them by drop or choice, deleting them.
import { at, counted, made } from "./elements.js";
import { ask, fetched, Refusal } from "./ask.js";
import { hush, tell } from "./refusals.js";
import { chooser, dropZone, sorted } from "./dropping.js";
import { agreed } from "./question.js";

const PAGE = 24;
// Of one request: so that progress can be told, and that few slow connections run into the server's time limit.
const MOST_FILES = 16;
const MOST_BYTES = 16 * 2 ** 20;

const NO_COUNTS = { labelled: {}, unlabelled: 0, without_features: 0 };

let counts = NO_COUNTS;
let labelSet = "";
let classes = new Set();
let heard = () => {};
const seen = new Map(); // pictures that this tab has added, by the SHA-256 of their file: the server keeps no pixels

const path = (rest = "") => `v1/label-sets/${encodeURIComponent(labelSet)}/images${rest}`;

export const countOf = (classname) => counts.labelled[classname] || 0;
export const labelledCount = () => Object.values(counts.labelled).reduce((sum, each) => sum + each, 0);

/** Begin with a label set and its classes, "" for one that is not saved; `changed` is called whenever counts change. */
export async function startExamples(name, classnames, changed) {
  labelSet = name;
  classes = new Set(classnames);
  heard = changed;
  counts = NO_COUNTS;
  at("unlabelled-zone").replaceChildren(...(name ? zone(null, at("unlabelled-status")) : []));
  at("unlabelled-status").textContent = "";
  at("examples-section").hidden = !name;
  if (!name) return;
  const told = (await ask(path("?limit=1"))).counts;
  if (name === labelSet) countsTold(told);
}

function countsTold(told) {
  counts = told;
  const labelled = labelledCount();
  const parts = [`${counted(labelled, "labelled image")} in ${counted(Object.keys(counts.labelled).length, "class", "classes")}`, `${counts.unlabelled} unlabelled`];
  if (counts.without_features) parts.push(`${counts.without_features} of no use to the default model`);
  at("examples-counts").textContent = labelled + counts.unlabelled ? `${parts.join(", ")}.` : "There are none yet.";
  at("delete-unlabelled").hidden = !counts.unlabelled;
  const strays = Object.keys(counts.labelled).filter((classname) => !classes.has(classname));
  at("stray-examples").replaceChildren(...strays.map(stray));
  heard();
}

/** Return the part of a class's row that has its example images. */
export function classExamples(name, classname) {
  if (!name || classname === null) {
    return made("p", { className: "hint", textContent: "Save first; then example images can be added to this class." });
  }
  const status = made("p", { className: "status", role: "status" });
  const tiles = made("ul", { className: "pictures", "aria-label": `Example images of ${classname}` });
  const more = made("button", { type: "button", className: "secondary", textContent: "Show more", hidden: true });
  const all = made("button", { type: "button", className: "secondary danger", textContent: `Delete all images of ${classname}…`, hidden: true });
  const error = made("div", { className: "problem", role: "alert", hidden: true });
  let after = 0;

  async function load() {
    try {
      const page = await ask(path(`?class=${encodeURIComponent(classname)}&limit=${PAGE}&after=${after}`));
      tiles.append(...page.images.map((each) => tile(each, classname, { status, error })));
      after = page.next_after ?? 0;
      more.hidden = page.next_after === null;
      all.hidden = (page.counts.labelled[classname] || 0) < 2;
    } catch (refusal) {
      tell(refusal, error);
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
  const drop = made("div", { className: "drop small" }, ...zone(classname, status, reload, error));
  load();
  return made(
    "div", { className: "tool" }, made("h4", { textContent: "Example images" }), drop, status, error, tiles, made("p", { className: "actions" }, more, all),
  );
}

/** Return the contents of a place where images of a class are dropped or chosen, null for unlabelled ones. */
function zone(classname, status, done = () => {}, error = at("examples-error")) {
  const what = classname === null ? "images without a class" : `images of ${classname}`;
  const area = made("div", { className: "drop-area" });
  const take = (files) => add(files, classname, { status, error }).then(done);
  const text = made("p", {}, `Drop ${what} here, or `, chooser("choose files", `Choose ${what}`, take));
  area.append(text);
  dropZone(area, take);
  return [area];
}

async function add(files, classname, { status, error }) {
  hush(error);
  const { pictures, leftOut } = sorted(files);
  const told = { added: 0, relabelled: 0, duplicates: 0, skipped: [], done: 0 };
  const name = labelSet;
  try {
    for (const some of chunks(pictures)) {
      status.textContent = `Adding ${told.done + some.length} of ${pictures.length}…`;
      await send(name, some, classname, told);
      told.done += some.length;
    }
    status.textContent = [leftOut, ...(pictures.length ? summary(told, classname) : [])].filter(Boolean).join(" ");
  } catch (refusal) {
    status.textContent = told.done ? `${told.done} of ${pictures.length} were sent before it failed.` : "";
    tell(refusal, error);
  }
}

/** Yield the files in parts that fit into a request. */
function* chunks(files) {
  let some = [], bytes = 0;
  for (const file of files) {
    if (some.length && (some.length === MOST_FILES || bytes + file.size > MOST_BYTES)) {
      yield some;
      [some, bytes] = [[], 0];
    }
    some.push(file);
    bytes += file.size;
  }
  if (some.length) yield some;
}

async function send(name, files, classname, told) {
  const form = new FormData();
  for (const file of files) form.append("image", file, file.name || "pasted");
  if (classname !== null) form.append("class", classname);
  let answer;
  try {
    answer = await ask(`v1/label-sets/${encodeURIComponent(name)}/images`, { method: "POST", body: form });
  } catch (refusal) {
    // A refusal of 413 or 415 is about images; each by itself tells about which.
    if (![413, 415].includes(refusal.status)) throw refusal;
    if (files.length === 1) told.skipped.push(`${files[0].name}: ${refusal.detail}`);
    else for (const file of files) await send(name, [file], classname, told);
    return;
  }
  for (const kind of ["added", "relabelled", "duplicates"]) told[kind] += answer[kind];
  told.skipped.push(...answer.skipped.map((each) => `${files[each.image].name}: ${each.problem}`));
  await Promise.all(files.map(remember));
  if (name === labelSet) countsTold(answer.counts);
}

function summary(told, classname) {
  const parts = [`${counted(told.added, "image")} added.`];
  if (told.relabelled) parts.push(`${told.relabelled} of another class ${classname === null ? "kept it" : `are now of ${classname}`}.`);
  if (told.duplicates) parts.push(`${counted(told.duplicates, "was", "were")} there already.`);
  if (told.skipped.length) parts.push(`Not added: ${told.skipped.join("; ")}.`);
  return parts;
}

async function remember(file) {
  if (!crypto.subtle) return; // only where the page came by HTTPS or from this machine
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  const digest = [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (!seen.has(digest)) seen.set(digest, URL.createObjectURL(file));
}

function tile(example, classname, places) {
  const name = `example image ${example.id} of ${classname}`;
  const picture = made("div", { className: "tile", title: `Added ${new Date(example.created_at).toLocaleString("en")}` });
  const remove = made("button", { type: "button", className: "remove", textContent: "×", "aria-label": `Delete ${name}` });
  const item = made("li", {}, picture, remove);
  remove.onclick = async () => {
    if (await deleted(`/${example.id}`, name, places)) item.remove();
  };
  if (seen.has(example.sha256)) picture.replaceChildren(made("img", { src: seen.get(example.sha256), alt: name }));
  else {
    picture.append(made("span", { textContent: `no. ${example.id}` }));
    if (example.kept) showKept(example, picture, name);
  }
  return item;
}

async function showKept(example, picture, name) {
  try {
    const file = await (await fetched(path(`/${example.id}/content`))).blob();
    seen.set(example.sha256, URL.createObjectURL(file));
    picture.replaceChildren(made("img", { src: seen.get(example.sha256), alt: name }));
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal; // a key that may not look at files sees their numbers
  }
}

/** Return the line of a class that the label set has no more, whose images are still there. */
function stray(classname) {
  const remove = made("button", { type: "button", className: "secondary danger", textContent: "Delete them…" });
  const what = `all ${countOf(classname)} example images of ${classname}`;
  remove.onclick = () => deleted(`?class=${encodeURIComponent(classname)}`, what, { status: at("unlabelled-status"), error: at("examples-error") });
  return made("li", { textContent: `${classname}, which is no class of the newest version: ${counted(countOf(classname), "image")} ` }, remove);
}

async function deleted(rest, what, { status, error }) {
  if (!(await agreed("Delete example images?", `Delete ${what}, and what was learned from it? This cannot be undone.`, "Delete"))) return false;
  hush(error);
  try {
    const answer = await ask(path(rest), { method: "DELETE" });
    status.textContent = `${counted(answer.deleted, "image")} deleted.`;
    countsTold(answer.counts);
    return true;
  } catch (refusal) {
    tell(refusal, error);
    return false;
  }
}

/** Begin to listen to what is there of every label set. */
export function startExampleButtons() {
  const places = { status: at("unlabelled-status"), error: at("examples-error") };
  at("delete-unlabelled").onclick = () => deleted("?unlabelled=true", `all ${counts.unlabelled} images without a class`, places);
}
