// The view Captions: searches a caption database by text or image.
import { at, counted, create, option } from "./elements.js";
import { ask, json, Refusal } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { dropZone, onChosen, sorted } from "./dropping.js";
import { allDatabases } from "./catalogue.js";
import { bar } from "./answers.js";

let picture = null; // {file, url}
let requests = 0;
let query = null; // the query of the captions on the screen
let offsets = [0]; // of the pages up to the current one

/** Show the view. */
export async function showCaptions() {
  try {
    const chosen = at("search-database").value;
    const found = await allDatabases();
    at("search-database").replaceChildren(...found.map(choice));
    if (found.some((each) => each.name === chosen && !each.problem)) at("search-database").value = chosen;
    at("search").hidden = !found.length;
    at("no-databases").hidden = found.length > 0;
    clearRefusal(at("search-error"));
  } catch (refusal) {
    showRefusal(refusal, at("search-error"));
  }
}

function choice(each) {
  if (each.problem) return option(each.name, `${each.name}: ${each.problem}`, { disabled: true });
  return option(each.name, `${each.name} (${counted(each.captions, "caption")})`);
}

/** Use the first image of dropped, pasted or selected files. */
export function takeSearchPicture(files) {
  const { pictures, leftOut } = sorted(files);
  at("search-note").textContent = leftOut;
  if (!pictures.length) return;
  forgetPicture();
  picture = { file: pictures[0], url: URL.createObjectURL(pictures[0]) };
  at("search-by-picture").checked = true;
  showKind();
}

function forgetPicture() {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = null;
}

function showKind() {
  const byPicture = at("search-by-picture").checked;
  at("search-text-field").hidden = byPicture;
  at("search-drop").hidden = !byPicture;
  at("search-picture").replaceChildren(...(picture ? [create("img", { src: picture.url, alt: picture.file.name })] : []));
}

async function search(event) {
  event.preventDefault();
  const byPicture = at("search-by-picture").checked;
  if (!byPicture && !at("search-text").value.trim()) return refuse("text", "Enter a text to search for.");
  if (byPicture && !picture) return refuse(null, "Select an image.");
  const fields = { limit: Number(at("search-limit").value) };
  if (!byPicture) fields.text = at("search-text").value.trim();
  if (at("search-contains").value.trim()) fields.contains = at("search-contains").value.trim();
  if (at("search-min-score").value !== "") fields.min_score = Number(at("search-min-score").value);
  query = { database: at("search-database").value, fields, file: byPicture ? picture.file : null };
  offsets = [0];
  return show();
}

function refuse(field, problem) {
  showRefusal(new Refusal(problem, { errors: field ? [{ field, problem }] : [] }), at("search-error"), controlOf);
}

const CONTROLS = { text: "search-text", contains: "search-contains", min_score: "search-min-score", limit: "search-limit" };

const controlOf = (field) => (field in CONTROLS ? at(CONTROLS[field]) : null);

async function show() {
  requests += 1;
  const current = requests;
  clearRefusal(at("search-error"));
  at("search-status").textContent = "Searching…";
  try {
    const answer = await ask(`v1/databases/${encodeURIComponent(query.database)}/search`, request());
    if (current === requests) showPage(answer);
  } catch (refusal) {
    if (current !== requests) return;
    at("search-status").textContent = "";
    showRefusal(refusal, at("search-error"), controlOf);
  }
}

function request() {
  const fields = { ...query.fields, offset: offsets.at(-1) };
  if (!query.file) return json("POST", fields);
  const form = new FormData();
  form.append("image", query.file, query.file.name || "pasted");
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  return { method: "POST", body: form };
}

function showPage(answer) {
  const first = offsets.at(-1), { results } = answer;
  const range = results.length ? `Captions ${first + 1} to ${first + results.length}, nearest first` : "No caption matches";
  const filtered = query.fields.contains || query.fields.min_score !== undefined ? `, among the ${answer.searched.toLocaleString("en")} nearest` : "";
  at("search-status").textContent = `${range}${filtered}; ${answer.database}, model ${answer.model}.`;
  at("captions").start = first + 1;
  at("captions").replaceChildren(...results.map((each) => bar(each.caption, each.score, each.score.toFixed(3))));
  at("previous-captions").hidden = offsets.length < 2;
  at("next-captions").hidden = answer.next_offset === null;
  at("next-captions").onclick = () => {
    offsets.push(answer.next_offset);
    show();
  };
  at("found-captions").focus();
}

/** Register the event handlers of the form. */
export function startSearch() {
  at("search").addEventListener("submit", search);
  for (const radio of document.querySelectorAll("input[name=search-by]")) radio.onchange = showKind;
  onChosen(at("search-file"), takeSearchPicture);
  dropZone(at("search-drop"), takeSearchPicture);
  at("previous-captions").onclick = () => {
    offsets.pop();
    show();
  };
  showKind();
}
