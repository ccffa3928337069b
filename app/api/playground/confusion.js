// Test images per class, classified and shown as a confusion matrix. They are not stored.
import { at, counted, create, option, percent } from "./elements.js";
import { ask } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { chooser, dropZone, sorted } from "./dropping.js";
import { catalogue } from "./catalogue.js";
import { matrix } from "./matrix.js";

// Per request; below the default limits of a server.
const MAX_IMAGES = 32;
const MAX_BYTES = 32 * 2 ** 20;
const MAX_CLASSES = 60;

let labelSet = "";
let classes = [];
let pictures = []; // {file, classname}
let started = 0;

/** Use a label set and its classes; test images of another label set are removed. */
export async function confusionFor(name, classnames) {
  const isOther = name !== labelSet;
  labelSet = name;
  classes = classnames;
  if (isOther) pictures = [];
  pictures = pictures.filter((each) => classes.includes(each.classname));
  clear();
  if (!name) return;
  try {
    const { methods } = await catalogue();
    const kept = at("test-method").value;
    const usable = methods.filter((each) => !each.vocabulary_free);
    at("test-method").replaceChildren(option("", "default"), option("auto"), ...usable.map((each) => option(each.name)));
    at("test-method").value = kept;
  } catch (refusal) {
    showRefusal(refusal, at("test-error"));
  }
}

function clear() {
  started += 1;
  clearRefusal(at("test-error"));
  at("test-status").textContent = "";
  at("test-result").replaceChildren();
  showZones();
}

function showZones() {
  const wanted = at("test-class-filter").value.trim().toLowerCase();
  const found = classes.filter((each) => each.toLowerCase().includes(wanted));
  at("test-class-filter-field").hidden = classes.length <= MAX_CLASSES;
  at("test-zones").replaceChildren(...found.slice(0, MAX_CLASSES).map(zone));
  showCount();
}

function zone(classname) {
  const count = create("span", { className: "hint" });
  const take = (files) => {
    const { pictures: added, leftOut } = sorted(files);
    pictures.push(...added.map((file) => ({ file, classname })));
    at("test-status").textContent = leftOut;
    showOwn();
    showCount();
  };
  const showOwn = () => {
    const own = pictures.filter((each) => each.classname === classname).length;
    count.textContent = own ? counted(own, "image") : "drop here";
  };
  const item = create("li", { className: "drop small" }, create("strong", { textContent: classname }), " ", count, " ", chooser("choose", `Select test images of ${classname}`, take));
  dropZone(item, take);
  showOwn();
  return item;
}

function showCount() {
  at("test").textContent = pictures.length ? `Classify ${counted(pictures.length, "test image")}` : "Classify the test images";
  at("forget-tests").hidden = !pictures.length;
}

async function test() {
  clearRefusal(at("test-error"));
  at("test-result").replaceChildren();
  if (!pictures.length) {
    at("test-status").textContent = "Add test images to at least one class first.";
    return;
  }
  started += 1;
  const mine = started, tested = [...pictures], answers = [];
  const method = at("test-method").value;
  at("test").disabled = true;
  try {
    let used = "";
    for (const some of parts(tested)) {
      at("test-status").textContent = `Classifying ${answers.length + some.length} of ${tested.length}…`;
      const form = new FormData();
      for (const { file } of some) form.append("image", file, file.name || "pasted");
      for (const [name, value] of Object.entries({ label_set: labelSet, method, top_k: "1" })) if (value) form.append(name, value);
      const answer = await classified(form, some.length);
      if (mine !== started) return;
      used = answer.method || used;
      answers.push(...answer.results);
    }
    show(tested, answers, used);
  } catch (refusal) {
    if (mine !== started) return;
    at("test-status").textContent = "";
    showRefusal(refusal, at("test-error"));
  } finally {
    at("test").disabled = false;
  }
}

function* parts(all) {
  let some = [], bytes = 0;
  for (const each of all) {
    if (some.length && (some.length === MAX_IMAGES || bytes + each.file.size > MAX_BYTES)) {
      yield some;
      [some, bytes] = [[], 0];
    }
    some.push(each);
    bytes += each.file.size;
  }
  yield some;
}

/** Return the response. If every image fails, the server refuses the request; then return one error per image. */
async function classified(form, count) {
  try {
    return await ask("v1/classify", { method: "POST", body: form });
  } catch (refusal) {
    const isPerImage = refusal.errors.length === count && refusal.errors.every(({ field }) => field.startsWith("image."));
    if (!isPerImage && !["not-an-image", "image-too-large"].includes(refusal.kind)) throw refusal;
    const details = isPerImage ? refusal.errors.map((each) => each.problem) : Array(count).fill(refusal.detail);
    return { method: "", results: details.map((detail) => ({ error: { detail } })) };
  }
}

function show(tested, answers, method) {
  const occurring = new Set(tested.map((each) => each.classname));
  for (const { predictions } of answers) if (predictions?.length) occurring.add(predictions[0].label);
  const names = classes.filter((each) => occurring.has(each));
  const index = new Map(names.map((name, at) => [name, at]));
  const counts = names.map(() => names.map(() => 0));
  const wrong = [], unread = [];
  let right = 0;
  tested.forEach(({ file, classname }, at) => {
    const { error, predictions } = answers[at];
    if (error) {
      unread.push(`${file.name}: ${error.detail}`);
      return;
    }
    const [best] = predictions;
    counts[index.get(classname)][index.get(best.label)] += 1;
    if (best.label === classname) right += 1;
    else wrong.push({ file, classname, best });
  });
  const read = tested.length - unread.length;
  const sentence = read ? `${right} of ${read} correct: ${percent(right / read)}, method ${method}.` : "None of the images could be read.";
  at("test-status").textContent = sentence;
  const shown = read ? matrix(names, counts, `${counted(read, "test image")}, method ${method}`) : [];
  const mistakes = wrong.length ? [create("h4", { textContent: "Misclassified" }), create("ul", { className: "mistakes" }, ...wrong.slice(0, 24).map(mistake))] : [];
  const bad = unread.length ? [create("p", { className: "problem", textContent: `Could not be read: ${unread.join("; ")}` })] : [];
  at("test-result").replaceChildren(...shown, ...mistakes, ...bad);
}

function mistake({ file, classname, best }) {
  const url = URL.createObjectURL(file);
  const picture = create("img", { src: url, alt: file.name, onload: () => URL.revokeObjectURL(url) });
  return create("li", {}, picture, create("span", { textContent: `${classname} predicted as ${best.label} (${percent(best.score)})` }));
}

/** Register the event handlers. */
export function startConfusion() {
  at("test").onclick = test;
  at("forget-tests").onclick = () => {
    pictures = [];
    clear();
    at("test").focus();
  };
  at("test-class-filter").oninput = showZones;
}
