// A label set is edited as a draft, and saved as a version that names the one it was made from: if somebody was faster,
// the server refuses, nothing is lost, and one is asked which of the two shall be.

import { Refusal, ask, askWith, at, made, option, percent, send, showIn, waited } from "./ask.js";

const PER_UPLOAD = 16;

let draft = null; // {name, version, classes}; version 0: not saved yet
let counts = {}; // of example images, by class
let tests = new Map(); // test pictures by class, kept here alone
let newest = 0;
let theirs = 0; // the version that somebody else has saved meanwhile; 0 where it was deleted

const path = (name, more = "") => `v1/label-sets/${encodeURIComponent(name)}${more}`;
const tell = (text) => { at("set-status").textContent = text; };
const lines = (text) => text.split("\n").map((each) => each.trim()).filter(Boolean);
const failed = (error) => { tell(""); showIn("set-error", error); };
const doing = (work) => (...given) => work(...given).catch(failed);

// --- the list --------------------------------------------------------------------------------------------------------

async function loadList() {
  const told = await ask("v1/label-sets?limit=1000");
  at("sets").replaceChildren(
    ...told.label_sets.map((each) => {
      const button = made("button", { type: "button", className: "secondary" }, made("b", { textContent: each.name }), ` ${each.classes} ${each.classes === 1 ? "class" : "classes"}, version ${each.version}`);
      if (each.name === draft?.name) button.setAttribute("aria-current", "true");
      button.onclick = doing(async () => { if (mayLeave()) await open(each.name); });
      return made("li", {}, button);
    }),
  );
  at("no-sets").hidden = told.label_sets.length > 0;
}

// --- the draft -------------------------------------------------------------------------------------------------------

const written = () => JSON.stringify([at("set-template").value, at("merge").value, read()]);
let unchanged = "";
const mayLeave = () => at("editor").hidden || written() === unchanged || confirm("What you changed is not saved. Leave it?");

async function open(name, version = null) {
  const body = await ask(path(name, version === null ? "" : `?version=${version}`));
  if (version === null) newest = body.version;
  draft = { name, version: body.version, classes: body.classes };
  tests = new Map();
  at("set-template").value = body.templates;
  at("merge").value = body.merge_synonyms;
  await loadCounts();
  showDraft();
  await loadList();
}

function begin() {
  if (!mayLeave()) return;
  draft = { name: "", version: 0, classes: [] };
  newest = 0;
  [counts, tests] = [{}, new Map()];
  at("set-template").value = "photo";
  at("merge").value = "mean";
  showDraft();
  at("set-name").value = "";
  at("set-name").focus();
}

async function loadCounts() {
  const told = await ask(path(draft.name, "/images?limit=1"));
  counts = told.counts.labelled;
}

function showDraft() {
  showIn("set-error", null);
  at("conflict").hidden = true;
  at("leaderboard").replaceChildren();
  at("confusion").replaceChildren();
  const isNew = draft.version === 0, isOld = draft.version !== newest;
  at("no-set").hidden = true;
  at("editor").hidden = false;
  at("editor-title").textContent = isNew ? "New label set" : draft.name;
  at("name-field").hidden = !isNew;
  at("version-field").hidden = isNew;
  at("version").replaceChildren(...Array.from({ length: newest }, (_, index) => option(newest - index, newest - index)));
  at("version").value = draft.version;
  at("delete-set").hidden = isNew;
  at("evaluation").hidden = isNew || isOld;
  at("classes").replaceChildren(...draft.classes.map((each) => classItem(each)));
  unchanged = written();
  tell(isOld && !isNew ? `This is version ${draft.version} of ${newest}. To save it makes version ${newest + 1} of it.` : "");
  showTests();
}

function classItem(given) {
  const area = (label, value, field) => made("label", {}, label, made("textarea", { rows: 2, value: value.join("\n"), className: field }));
  const title = made("span", { textContent: given.name });
  const name = made("input", { value: given.name, className: "name", maxLength: 1000 });
  name.oninput = () => { title.textContent = name.value; };
  const remove = made("button", { type: "button", className: "danger", textContent: "Remove the class" });
  const item = made(
    "li", {},
    made(
      "details", {},
      made("summary", {}, title, made("span", { className: "hint", textContent: summary(given) })),
      made(
        "div", { className: "fields" },
        made("label", {}, "Name", name),
        made("label", {}, "Prompt", made("input", { value: given.prompt || "", className: "prompt", placeholder: "in the place of the filled template" })),
        area("Synonyms, a line each", given.synonyms, "synonyms"),
        area("Descriptions, a line each", given.descriptions, "descriptions"),
        area("Features, a line each", given.features, "features"),
      ),
      images(given.name),
      made("p", {}, remove),
    ),
  );
  remove.onclick = () => { item.remove(); at("more-classes").focus(); };
  return item;
}

function summary(given) {
  const parts = [["synonyms", given.synonyms], ["descriptions", given.descriptions], ["features", given.features]].filter(([, each]) => each.length).map(([name, each]) => `${each.length} ${each.length === 1 ? name.slice(0, -1) : name}`);
  const count = counts[given.name];
  return [...parts, ...(count ? [`${count} example image${count === 1 ? "" : "s"}`] : [])].join(", ");
}

// Returns the classes as they are on the screen.
function read() {
  return [...at("classes").children].map((item) => {
    const value = (field) => item.querySelector(`.${field}`).value;
    const told = { name: value("name").trim() };
    for (const field of ["synonyms", "descriptions", "features"]) if (lines(value(field)).length) told[field] = lines(value(field));
    if (value("prompt").trim()) told.prompt = value("prompt").trim();
    return told;
  });
}

function addClasses() {
  const known = new Set(read().map((each) => each.name.toLowerCase()));
  for (const name of at("more-classes").value.split(/[,\n]/).map((each) => each.trim()).filter(Boolean)) {
    if (known.has(name.toLowerCase())) continue;
    known.add(name.toLowerCase());
    at("classes").append(classItem({ name, synonyms: [], descriptions: [], features: [], prompt: null }));
  }
  at("more-classes").value = "";
}

// Saves over the newest version that is known, or over the one that was shown as the other's.
async function save(over = newest) {
  addClasses();
  showIn("set-error", null);
  for (const each of document.querySelectorAll("#classes .problem")) each.remove();
  const name = draft.version ? draft.name : at("set-name").value.trim();
  if (!name) { at("set-name").focus(); throw new Error("Give it a name."); }
  const body = { classes: read(), templates: at("set-template").value.trim() || "photo", merge_synonyms: at("merge").value };
  const guard = over ? { "If-Match": `"${over}"` } : { "If-None-Match": "*" };
  try {
    await askWith("PUT", path(name), body, guard);
  } catch (error) {
    if (error.status === 412) {
      const now = await ask(path(name)).catch((missing) => { if (missing.status === 404) return null; throw missing; });
      theirs = now ? now.version : 0;
      at("theirs").hidden = !now;
      at("conflict").hidden = false;
      draft.name = name;
      if (!now) throw new Error("Somebody has deleted this label set meanwhile. What you see is still yours: save it anew?");
      throw new Error(newest ? "Somebody has saved another version meanwhile. What you see is still yours: which of the two shall it be?" : `There is a label set '${name}' already. Choose another name, or one of these:`);
    }
    if (error instanceof Refusal) error.errors.forEach(showField);
    throw error;
  }
  await open(name);
  tell(`Saved: ${name}, version ${newest}.`);
}

// What is wrong with a class is told at that class.
function showField({ field, problem }) {
  const place = /^classes\.(\d+)/.exec(field);
  const item = place && at("classes").children[Number(place[1])];
  if (!item) return;
  item.querySelector("details").open = true;
  item.querySelector("summary").after(made("p", { className: "problem", textContent: problem }));
}

async function remove() {
  if (!confirm(`Delete the label set '${draft.name}' with all of its versions and example images?`)) return;
  await send(path(draft.name), { method: "DELETE", headers: { "If-Match": `"${newest}"` } });
  const name = draft.name;
  draft = null;
  at("editor").hidden = at("evaluation").hidden = true;
  at("no-set").hidden = false;
  await loadList();
  tell(`Deleted: ${name}.`);
}

// --- pictures of a class ---------------------------------------------------------------------------------------------

function images(name) {
  if (!draft.version || draft.version !== newest || !draft.classes.some((each) => each.name === name)) {
    return made("p", { className: "hint", textContent: "Pictures can be added when the class is saved." });
  }
  const told = made("p", { className: "hint" });
  told.setAttribute("role", "status");
  const erase = made("button", { type: "button", className: "secondary", textContent: "delete its example images" });
  erase.hidden = !counts[name];
  erase.onclick = doing(async () => {
    if (!confirm(`Delete the example images of '${name}'?`)) return;
    const answer = await ask(path(draft.name, `/images?class=${encodeURIComponent(name)}`), { method: "DELETE" });
    refresh(name, answer.counts);
    told.textContent = `${answer.deleted} deleted.`;
    erase.hidden = true;
  });
  const add = doing(async (files) => {
    told.textContent = "Storing…";
    const sum = { added: 0, duplicates: 0, relabelled: 0, bad: [] };
    for (let start = 0; start < files.length; start += PER_UPLOAD) await upload(name, files.slice(start, start + PER_UPLOAD), sum);
    const parts = [`${sum.added} added`, ...(sum.duplicates ? [`${sum.duplicates} there already`] : []), ...(sum.relabelled ? [`${sum.relabelled} taken from another class`] : []), ...sum.bad];
    told.textContent = `${parts.join("; ")}.`;
    erase.hidden = !counts[name];
  });
  return made(
    "div", { className: "images" },
    chooser("Example images, to learn from: drop them here, or", `example images of ${name}`, add),
    chooser("Test pictures, not stored: drop them here, or", `test pictures of ${name}`, (files) => {
      tests.set(name, [...(tests.get(name) || []), ...files]);
      told.textContent = `${tests.get(name).length} test pictures are chosen.`;
      showTests();
    }),
    told, made("p", {}, erase),
  );
}

function chooser(text, label, take) {
  const input = made("input", { type: "file", accept: "image/*", multiple: true });
  input.setAttribute("aria-label", `Choose ${label}`);
  const place = made("div", { className: "drop" }, made("p", { textContent: text }), input);
  input.onchange = () => { take([...input.files]); input.value = ""; };
  place.addEventListener("drop", (event) => take([...event.dataTransfer.files]));
  return place;
}

async function upload(name, files, sum) {
  const form = new FormData();
  for (const file of files) form.append("image", file, file.name);
  form.append("class", name);
  try {
    const answer = await ask(path(draft.name, "/images"), { method: "POST", body: form });
    for (const each of ["added", "duplicates", "relabelled"]) sum[each] += answer[each];
    sum.bad.push(...answer.skipped.map((each) => `${files[each.image].name}: ${each.problem}`));
    refresh(name, answer.counts);
  } catch (error) {
    // Every image of the form was refused; which, only one at a time can tell.
    if (!(error instanceof Refusal) || ![413, 415, 422].includes(error.status)) throw error;
    if (files.length === 1) sum.bad.push(`${files[0].name}: ${error.message}`);
    else for (const each of files) await upload(name, [each], sum);
  }
}

function refresh(name, told) {
  counts = told.labelled;
  const place = read().findIndex((each) => each.name === name);
  const known = draft.classes.find((each) => each.name === name);
  if (place >= 0 && known) at("classes").children[place].querySelector("summary .hint").textContent = summary(known);
}

// --- evaluation ------------------------------------------------------------------------------------------------------

const testCount = () => [...tests.values()].reduce((sum, each) => sum + each.length, 0);

function showTests() {
  at("test-count").textContent = testCount();
  at("evaluate-tests").disabled = testCount() === 0;
  at("evaluate-examples").disabled = !Object.values(counts).some((each) => each > 0);
}

async function evaluate(withTests) {
  showIn("set-error", null);
  at("leaderboard").replaceChildren();
  at("confusion").replaceChildren();
  let options = { method: "POST", body: "{}", headers: { "Content-Type": "application/json" } };
  if (withTests) {
    const form = new FormData();
    for (const [name, files] of tests) for (const file of files) { form.append("image", file, file.name); form.append("class", name); }
    options = { method: "POST", body: form };
  }
  for (const id of ["evaluate-tests", "evaluate-examples"]) at(id).disabled = true;
  try {
    tell("Trying every method…");
    const job = await ask(path(draft.name, ":evaluate"), options);
    const result = await waited(job, (now) => tell(now.total ? `Trying every method: ${now.done} of ${now.total}.` : "Trying every method…"));
    tell(`${result.images} pictures, by ${result.model}.`);
    showLeaderboard(result);
  } finally {
    showTests();
  }
}

function showLeaderboard(result) {
  const rows = [...result.methods].sort((one, other) => other.evaluation.top1 - one.evaluation.top1);
  const table = made("table", {}, made("caption", { textContent: "Accuracy, with the interval in which it is likely to be" }));
  table.append(made("tr", {}, ...["Method", "Accuracy", "", "ms a picture"].map((each) => made("th", { scope: "col", textContent: each }))));
  for (const row of rows) {
    const [low, high] = row.interval;
    const bar = made("div", { className: "range" }, made("i"), made("b"));
    bar.firstChild.style.left = percent(low).replace(" ", "");
    bar.firstChild.style.width = percent(high - low).replace(" ", "");
    bar.lastChild.style.left = percent(row.evaluation.top1).replace(" ", "");
    const button = made("button", { type: "button", className: "secondary", textContent: row.method, title: "show what it confuses" });
    button.onclick = () => showConfusion(row);
    table.append(made("tr", {}, made("th", { scope: "row" }, button), made("td", { textContent: `${percent(row.evaluation.top1)} (${percent(low)} to ${percent(high)})` }), made("td", {}, bar), made("td", { textContent: row.ms_per_image.toFixed(1) })));
  }
  const notes = [...result.verdict, ...result.not_run.map((each) => `Not run: ${typeof each === "string" ? each : Object.values(each).join(": ")}`)];
  at("leaderboard").replaceChildren(made("div", { className: "wide" }, table), made("ul", { className: "hint" }, ...notes.map((each) => made("li", { textContent: each }))));
  showConfusion(rows[0]);
}

function showConfusion({ method, evaluation }) {
  const names = evaluation.classes.map((each) => each.name);
  const table = made("table", { className: "confusion" }, made("caption", { textContent: `What ${method} takes the pictures of each class for` }));
  table.append(made("tr", {}, made("th", { textContent: "is \\ taken for" }), ...names.map((each) => made("th", { scope: "col", textContent: each }))));
  evaluation.confusion.forEach((row, index) => {
    const sum = row.reduce((one, other) => one + other, 0);
    const cells = row.map((count, column) => {
      const cell = made("td", { textContent: count || "" , className: column === index ? "right" : "wrong" });
      cell.style.setProperty("--share", sum ? count / sum : 0);
      return cell;
    });
    table.append(made("tr", {}, made("th", { scope: "row", textContent: names[index] }), ...cells));
  });
  at("confusion").replaceChildren(made("div", { className: "wide" }, table));
}

// --- what is pressed -------------------------------------------------------------------------------------------------

at("new-set").onclick = begin;
at("add-classes").onclick = addClasses;
at("more-classes").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  addClasses();
};
at("editor").addEventListener("submit", (event) => { event.preventDefault(); doing(save)(); });
at("theirs").onclick = doing(() => open(draft.name));
at("mine").onclick = doing(() => save(theirs));
at("delete-set").onclick = doing(remove);
at("version").onchange = doing(async () => { if (mayLeave()) await open(draft.name, Number(at("version").value)); else at("version").value = draft.version; });
at("evaluate-tests").onclick = doing(() => evaluate(true));
at("evaluate-examples").onclick = doing(() => evaluate(false));
addEventListener("beforeunload", (event) => { if (draft && !at("editor").hidden && written() !== unchanged) event.preventDefault(); });

export function show() {
  loadList().then(() => showIn("set-error", null)).catch(failed);
}
