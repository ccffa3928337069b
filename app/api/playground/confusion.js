// Test images per class, classified and shown as a confusion matrix. They are not stored.
import { byId, countText, create, option, percent } from "./elements.js";
import { requestJson } from "./requests.js";
import { clearRequestError, showLoadError, showRequestError } from "./request_errors.js";
import { fileChooser, dropZone, splitFiles } from "./file_drops.js";
import { batchesOf } from "./batches.js";
import { catalogue } from "./catalogue.js";
import { matrix } from "./matrix.js";

const MAX_CLASSES = 60;

let labelSet = "";
let classes = [];
let pictures = []; // {file, classname}
let latestRun = 0;

/** Use a label set and its classes; test images of another label set are removed. */
export async function setTestedLabelSet(name, classnames) {
  const isOther = name !== labelSet;
  labelSet = name;
  classes = classnames;
  if (isOther) pictures = [];
  pictures = pictures.filter((entry) => classes.includes(entry.classname));
  clear();
  if (name) await loadMethods();
}

async function loadMethods() {
  try {
    const { methods } = await catalogue();
    const kept = byId("test-method").value;
    const usable = methods.filter((entry) => !entry.vocabulary_free);
    byId("test-method").replaceChildren(option("", "default"), option("auto"), ...usable.map((entry) => option(entry.name)));
    byId("test-method").value = kept;
  } catch (requestError) {
    showLoadError(requestError, byId("test-error"), loadMethods);
  }
}

function clear() {
  latestRun += 1;
  clearRequestError(byId("test-error"));
  byId("test-status").textContent = "";
  byId("test-result").replaceChildren();
  byId("test").disabled = false;
  showZones();
}

function showZones() {
  const query = byId("test-class-filter").value.trim().toLowerCase();
  const found = classes.filter((entry) => entry.toLowerCase().includes(query));
  byId("test-class-filter-field").hidden = classes.length <= MAX_CLASSES;
  byId("test-zones").replaceChildren(...found.slice(0, MAX_CLASSES).map(zone));
  showCount();
}

function zone(classname) {
  const count = create("span", { className: "hint" });
  const receive = (files) => {
    const { pictures: added, skippedNote } = splitFiles(files);
    pictures.push(...added.map((file) => ({ file, classname })));
    byId("test-status").textContent = skippedNote;
    showOwn();
    showCount();
  };
  const showOwn = () => {
    const own = pictures.filter((entry) => entry.classname === classname).length;
    count.textContent = own ? countText(own, "image") : "drop here";
  };
  const item = create("li", { className: "drop small" }, create("strong", { textContent: classname }), " ", count, " ", fileChooser("choose", `Select test images of ${classname}`, receive));
  dropZone(item, receive);
  showOwn();
  return item;
}

function showCount() {
  byId("test").textContent = pictures.length ? `Classify ${countText(pictures.length, "test image")}` : "Classify the test images";
  byId("forget-tests").hidden = !pictures.length;
}

async function test() {
  clearRequestError(byId("test-error"));
  byId("test-result").replaceChildren();
  if (!pictures.length) {
    byId("test-status").textContent = "Add test images to at least one class first.";
    return;
  }
  latestRun += 1;
  const run = latestRun, tested = [...pictures], results = [];
  const method = byId("test-method").value;
  byId("test").disabled = true;
  try {
    let used = "";
    const { images } = await catalogue();
    if (run !== latestRun) return;
    for (const batch of batchesOf(tested, images)) {
      byId("test-status").textContent = `Classifying ${results.length + batch.length} of ${tested.length}…`;
      const form = new FormData();
      for (const { file } of batch) form.append("image", file, file.name || "pasted");
      // Each test image has one class, also where the label set allows several.
      for (const [name, value] of Object.entries({ label_set: labelSet, method, top_k: "1", multi_label: "false" })) if (value) form.append(name, value);
      const response = await classify(form, batch.length);
      if (run !== latestRun) return;
      used = response.method || used;
      results.push(...response.results);
    }
    show(tested, results, used);
  } catch (requestError) {
    if (run !== latestRun) return;
    byId("test-status").textContent = "";
    showRequestError(requestError, byId("test-error"));
  } finally {
    if (run === latestRun) byId("test").disabled = false;
  }
}

/** Return the response. If every image fails, the server rejects the request; then return one error per image. */
async function classify(form, count) {
  try {
    return await requestJson("v1/classify", { method: "POST", body: form });
  } catch (requestError) {
    const isPerImage = requestError.errors.length === count && requestError.errors.every(({ field }) => field.startsWith("image."));
    if (!isPerImage && !["not-an-image", "image-too-large"].includes(requestError.kind)) throw requestError;
    const details = isPerImage ? requestError.errors.map((entry) => entry.problem) : Array(count).fill(requestError.detail);
    return { method: "", results: details.map((detail) => ({ error: { detail } })) };
  }
}

function show(tested, results, method) {
  const cells = new Map();
  const wrong = [], unreadable = [];
  let right = 0;
  tested.forEach(({ file, classname }, position) => {
    const { error, predictions } = results[position];
    if (error) {
      unreadable.push(`${file.name}: ${error.detail}`);
      return;
    }
    const [best] = predictions;
    const key = JSON.stringify([classname, best.label]);
    if (!cells.has(key)) cells.set(key, { label: classname, predicted: best.label, count: 0 });
    cells.get(key).count += 1;
    if (best.label === classname) right += 1;
    else wrong.push({ file, classname, best });
  });
  const read = tested.length - unreadable.length;
  const sentence = read ? `${right} of ${read} correct: ${percent(right / read)}, method ${method}.` : "None of the images could be read.";
  byId("test-status").textContent = sentence;
  const shown = read ? matrix(classes, [...cells.values()], `${countText(read, "test image")}, method ${method}`) : [];
  const mistakes = wrong.length ? [create("h4", { textContent: "Misclassified" }), create("ul", { className: "mistakes" }, ...wrong.slice(0, 24).map(mistake))] : [];
  const bad = unreadable.length ? [create("p", { className: "problem", textContent: `Could not be read: ${unreadable.join("; ")}` })] : [];
  byId("test-result").replaceChildren(...shown, ...mistakes, ...bad);
}

function mistake({ file, classname, best }) {
  const url = URL.createObjectURL(file);
  const picture = create("img", { src: url, alt: file.name, onload: () => URL.revokeObjectURL(url) });
  return create("li", {}, picture, create("span", { textContent: `${classname} predicted as ${best.label} (${percent(best.score)})` }));
}

/** Register the event handlers. */
export function startConfusion() {
  byId("test").onclick = test;
  byId("forget-tests").onclick = () => {
    pictures = [];
    clear();
    byId("test").focus();
  };
  byId("test-class-filter").oninput = showZones;
}
