// Test pictures by class: what the label set answers for them, as a confusion matrix. Nothing of it is stored.
import { at, counted, made, option, percent } from "./elements.js";
import { ask } from "./ask.js";
import { hush, tell } from "./refusals.js";
import { chooser, dropZone, sorted } from "./dropping.js";
import { catalogue } from "./catalogue.js";
import { matrix } from "./matrix.js";

// Of one request: below the limits that a server has by default.
const MOST_IMAGES = 32;
const MOST_BYTES = 32 * 2 ** 20;
const MOST_CLASSES = 60;

let labelSet = "";
let classes = [];
let pictures = []; // {file, classname}
let started = 0;

/** Begin with a label set and its classes; what was tested of another one goes. */
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
    at("test-method").replaceChildren(option("", "by default"), option("auto"), ...usable.map((each) => option(each.name)));
    at("test-method").value = kept;
  } catch (refusal) {
    tell(refusal, at("test-error"));
  }
}

function clear() {
  started += 1;
  hush(at("test-error"));
  at("test-status").textContent = "";
  at("test-result").replaceChildren();
  showZones();
}

function showZones() {
  const wanted = at("test-class-filter").value.trim().toLowerCase();
  const found = classes.filter((each) => each.toLowerCase().includes(wanted));
  at("test-class-filter-field").hidden = classes.length <= MOST_CLASSES;
  at("test-zones").replaceChildren(...found.slice(0, MOST_CLASSES).map(zone));
  showCount();
}

function zone(classname) {
  const count = made("span", { className: "hint" });
  const take = (files) => {
    const { pictures: added, leftOut } = sorted(files);
    pictures.push(...added.map((file) => ({ file, classname })));
    at("test-status").textContent = leftOut;
    showOwn();
    showCount();
  };
  const showOwn = () => {
    const own = pictures.filter((each) => each.classname === classname).length;
    count.textContent = own ? counted(own, "picture") : "drop here";
  };
  const item = made("li", { className: "drop small" }, made("strong", { textContent: classname }), " ", count, " ", chooser("choose", `Choose test pictures of ${classname}`, take));
  dropZone(item, take);
  showOwn();
  return item;
}

function showCount() {
  at("test").textContent = pictures.length ? `Classify ${counted(pictures.length, "test picture")}` : "Classify the test pictures";
  at("forget-tests").hidden = !pictures.length;
}

async function test() {
  hush(at("test-error"));
  at("test-result").replaceChildren();
  if (!pictures.length) {
    at("test-status").textContent = "Drop or choose test pictures on at least one class first.";
    return;
  }
  started += 1;
  const mine = started, asked = [...pictures], answers = [];
  const method = at("test-method").value;
  at("test").disabled = true;
  try {
    let used = "";
    for (const some of parts(asked)) {
      at("test-status").textContent = `Classifying ${answers.length + some.length} of ${asked.length}…`;
      const form = new FormData();
      for (const { file } of some) form.append("image", file, file.name || "pasted");
      for (const [name, value] of Object.entries({ label_set: labelSet, method, top_k: "1" })) if (value) form.append(name, value);
      const answer = await classified(form, some.length);
      if (mine !== started) return;
      used = answer.method || used;
      answers.push(...answer.results);
    }
    show(asked, answers, used);
  } catch (refusal) {
    if (mine !== started) return;
    at("test-status").textContent = "";
    tell(refusal, at("test-error"));
  } finally {
    at("test").disabled = false;
  }
}

function* parts(all) {
  let some = [], bytes = 0;
  for (const each of all) {
    if (some.length && (some.length === MOST_IMAGES || bytes + each.file.size > MOST_BYTES)) {
      yield some;
      [some, bytes] = [[], 0];
    }
    some.push(each);
    bytes += each.file.size;
  }
  yield some;
}

/** Return the answer; where every image is bad, that is the refusal, and here the result of each of them. */
async function classified(form, count) {
  try {
    return await ask("v1/classify", { method: "POST", body: form });
  } catch (refusal) {
    const toldEach = refusal.errors.length === count && refusal.errors.every(({ field }) => field.startsWith("image."));
    if (!toldEach && !["not-an-image", "image-too-large"].includes(refusal.kind)) throw refusal;
    const details = toldEach ? refusal.errors.map((each) => each.problem) : Array(count).fill(refusal.detail);
    return { method: "", results: details.map((detail) => ({ error: { detail } })) };
  }
}

function show(asked, answers, method) {
  const occurring = new Set(asked.map((each) => each.classname));
  for (const { predictions } of answers) if (predictions?.length) occurring.add(predictions[0].label);
  const names = classes.filter((each) => occurring.has(each));
  const index = new Map(names.map((name, at) => [name, at]));
  const counts = names.map(() => names.map(() => 0));
  const wrong = [], unread = [];
  let right = 0;
  asked.forEach(({ file, classname }, at) => {
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
  const read = asked.length - unread.length;
  const sentence = read ? `${right} of ${read} right: ${percent(right / read)}, method ${method}.` : "None of the pictures could be read.";
  at("test-status").textContent = sentence;
  const shown = read ? matrix(names, counts, `Your ${counted(read, "test picture")}, by method ${method}`) : [];
  const mistakes = wrong.length ? [made("h4", { textContent: "Answered wrongly" }), made("ul", { className: "mistakes" }, ...wrong.slice(0, 24).map(mistake))] : [];
  const bad = unread.length ? [made("p", { className: "problem", textContent: `Not read: ${unread.join("; ")}` })] : [];
  at("test-result").replaceChildren(...shown, ...mistakes, ...bad);
}

function mistake({ file, classname, best }) {
  const url = URL.createObjectURL(file);
  const picture = made("img", { src: url, alt: file.name, onload: () => URL.revokeObjectURL(url) });
  return made("li", {}, picture, made("span", { textContent: `${classname} answered as ${best.label} (${percent(best.score)})` }));
}

/** Begin to listen to the buttons. */
export function startConfusion() {
  at("test").onclick = test;
  at("forget-tests").onclick = () => {
    pictures = [];
    clear();
    at("test").focus();
  };
  at("test-class-filter").oninput = showZones;
}
