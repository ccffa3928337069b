// The last results, stored in this browser: labels, options, answers, and small pictures. The server knows nothing of it.
import { answerText } from "./classify_state.js";
import { countText, create, formatTime, scoreText } from "./elements.js";

const DATABASE = "deixis";
const STORE = "runs";
const MAX_RUNS = 20;
const MAX_BYTES = 50 * 2 ** 20;
const MAX_SMALL = 60; // pictures of a run that have a copy
const SIDE_PX = 160; // of the stored pictures
const JPEG_QUALITY = 0.8;

let newest = 0; // the order of the last run; the clock is too coarse to tell runs apart

/**
 * Store a run, {pictures, labels, options, answer}, and return its id; with an `id`, it replaces the run of this id.
 *
 * `pictures` are {name, path, file}; smaller copies of them are stored. `options` are the other fields of the request,
 * and `answer` is its response, whose `results` belong to the pictures in order. The oldest runs are removed while there
 * are more than 20, or more than 50 MB.
 */
export async function save({ id = crypto.randomUUID?.() ?? String(Math.random()), pictures, labels, options, answer }) {
  const stored = [];
  let bytes = JSON.stringify(answer).length;
  for (const { name, path = "", file } of pictures) {
    const small = file && stored.length < MAX_SMALL && bytes < MAX_BYTES / 2 ? await smallCopy(file) : null;
    bytes += small?.size ?? 0;
    stored.push({ name, path, small });
  }
  newest = Math.max(newest + 0.001, performance.timeOrigin + performance.now());
  const run = { id, savedAt: new Date().toISOString(), order: newest, labels, options, answer, pictures: stored, bytes };
  const { store } = await opened();
  await store("readwrite", (runs) => runs.put(run));
  let total = 0;
  for (const [index, entry] of (await list()).entries()) {
    total += entry.bytes;
    if (index > 0 && (index >= MAX_RUNS || total > MAX_BYTES)) await remove(entry.id);
  }
  return run.id;
}

/** Return the runs without their answers, the newest first: {id, savedAt, labels, options, count, small, bytes}. */
export async function list() {
  const { store } = await opened();
  const runs = await store("readonly", (entries) => entries.getAll());
  return runs
    .sort((one, other) => other.order - one.order)
    .map(({ id, savedAt, labels, options, pictures, bytes }) => ({ id, savedAt, labels, options, bytes, count: pictures.length, small: pictures.find((entry) => entry.small)?.small ?? null }));
}

/** Return a run with its answer and its pictures, {name, path, small: Blob or null}; null if it was removed. */
export async function load(id) {
  const { store } = await opened();
  return (await store("readonly", (runs) => runs.get(id))) ?? null;
}

export async function remove(id) {
  const { store } = await opened();
  await store("readwrite", (runs) => runs.delete(id));
}

export async function removeAll() {
  const { store } = await opened();
  await store("readwrite", (runs) => runs.clear());
}

/** Return whether runs survive a reload; browsers may deny storage, for example in private windows. */
export const isLasting = async () => (await opened()).isLasting;

let opening = null;

/** Return the object store, or one in memory if the browser denies storage. */
function opened() {
  opening ??= openDatabase().then(
    (database) => ({ isLasting: true, store: (mode, use) => answerOf(use(database.transaction(STORE, mode).objectStore(STORE))) }),
    () => {
      const runs = new Map();
      const inMemory = {
        put: (run) => runs.set(run.id, run), getAll: () => [...runs.values()], get: (id) => runs.get(id), delete: (id) => runs.delete(id), clear: () => runs.clear(),
      };
      return { isLasting: false, store: async (mode, use) => use(inMemory) };
    },
  );
  return opening;
}

async function openDatabase() {
  const request = indexedDB.open(DATABASE, 1); // throws where storage is denied
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  const database = await answerOf(request);
  database.onversionchange = () => database.close();
  return database;
}

function answerOf(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
    request.onblocked = () => failed(new Error("blocked"));
  });
}

const copies = new WeakMap(); // by file, because a run is stored again whenever its labels change

async function smallCopy(file) {
  if (!copies.has(file)) copies.set(file, await copied(file));
  return copies.get(file);
}

async function copied(file) {
  try {
    const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, SIDE_PX / Math.max(bitmap.width, bitmap.height));
    const canvas = create("canvas", { width: Math.max(1, Math.round(scale * bitmap.width)), height: Math.max(1, Math.round(scale * bitmap.height)) });
    const brush = canvas.getContext("2d");
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    return await new Promise((done) => canvas.toBlob(done, "image/jpeg", JPEG_QUALITY));
  } catch {
    return null; // a file that the browser cannot show
  }
}

/**
 * Show the stored runs in an element; `onOpen(run)` receives the loaded run that was chosen.
 *
 * Returns a function that shows them again, after `save`.
 */
export function showHistory(container, { onOpen }) {
  const note = create("p", { className: "hint" });
  const rows = create("ul", { className: "runs", "aria-label": "Earlier results" });
  const forget = create("button", { type: "button", className: "quiet", textContent: "delete all" });
  container.replaceChildren(note, rows, forget);

  async function refresh() {
    const runs = await list();
    rows.replaceChildren(...runs.map(row));
    forget.hidden = !runs.length;
    const where = (await isLasting()) ? "Stored in this browser only." : "The browser allows no storage here, so a reload loses them.";
    note.textContent = runs.length ? `${countText(runs.length, "result")}. ${where}` : "Results appear here, and survive a reload.";
    if (!runs.length && !(await isLasting())) note.textContent = `Results appear here. ${where}`;
  }

  function row(run, index) {
    const title = labelText(run);
    const open = create("button", { type: "button", className: "run", onclick: () => chosen(run.id) }, thumbnail(run), create("span", {}, create("strong", { textContent: title }), create("span", { className: "hint", textContent: `${countText(run.count, "image")} · ${formatTime(run.savedAt)}` })));
    const discard = create("button", { type: "button", className: "secondary icon", textContent: "×", "aria-label": `Delete the result of ${formatTime(run.savedAt)}` });
    discard.onclick = async () => {
      await remove(run.id);
      await refresh();
      (rows.querySelectorAll(".icon")[Math.min(index, rows.children.length - 1)] ?? container).focus();
    };
    return create("li", {}, open, discard);
  }

  async function chosen(id) {
    const run = await load(id);
    if (run) onOpen(run);
    else await refresh(); // removed in another tab
  }

  container.tabIndex = -1;
  forget.onclick = async () => {
    await removeAll();
    await refresh();
    container.focus();
  };
  refresh();
  return refresh;
}

/** Return the small copy of a picture as an image; its URL is needed only until it is loaded. */
function thumbnail({ small }) {
  if (!small) return create("span", { className: "tile", textContent: "–" });
  const url = URL.createObjectURL(small), forget = () => URL.revokeObjectURL(url);
  return create("img", { src: url, alt: "", onload: forget, onerror: forget });
}

const MAX_LABELS = 4;

function labelText({ labels, options }) {
  if (options?.label_set) return options.label_set;
  if (!labels?.length) return "discovered labels";
  return `${labels.slice(0, MAX_LABELS).join(", ")}${labels.length > MAX_LABELS ? ` and ${labels.length - MAX_LABELS} more` : ""}`;
}

/** Show a loaded run in an element; `back()` returns to the list, and `use()` takes its labels. */
export function showRun(container, run, { back, use }) {
  const item = (entry, index) => {
    const result = run.answer.results[index] ?? {};
    const [best] = result.predictions ?? [];
    const verdict = result.error ? result.error.detail : best ? `${answerText(result)} ${result.rejected || result.labels ? "" : scoreText(best.score)}` : "no label";
    return create("li", {}, thumbnail(entry), create("span", {}, create("strong", { textContent: verdict }), create("span", { className: "hint", textContent: entry.path || entry.name })));
  };
  const first = create("button", { type: "button", className: "secondary", textContent: "All earlier results", onclick: back });
  container.replaceChildren(
    create("p", { className: "actions" }, first, ...(run.labels.length || run.options.label_set ? [create("button", { type: "button", textContent: run.labels.length ? "Use these labels" : "Use this label set", onclick: use })] : [])),
    create("p", { className: "hint", textContent: `${labelText(run)} · ${formatTime(run.savedAt)}` }),
    create("ul", { className: "run-pictures" }, ...run.pictures.map(item)),
  );
  first.focus();
}
