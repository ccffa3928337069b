// The view Captions: the captions of a database that are nearest to a text or a picture.
import { at, counted, made, option } from "./elements.js";
import { ask, json, Refusal } from "./ask.js";
import { hush, tell } from "./refusals.js";
import { dropZone, onChosen, sorted } from "./dropping.js";
import { allDatabases } from "./catalogue.js";
import { bar } from "./answers.js";

let picture = null; // {file, url}
let asked = 0;
let query = null; // what the captions on the screen are an answer to
let offsets = [0]; // of the pages up to the one that is shown

/** Show the view. */
export async function showCaptions() {
  try {
    const chosen = at("search-database").value;
    const found = await allDatabases();
    at("search-database").replaceChildren(...found.map(choice));
    if (found.some((each) => each.name === chosen && !each.problem)) at("search-database").value = chosen;
    at("search").hidden = !found.length;
    at("no-databases").hidden = found.length > 0;
    hush(at("search-error"));
  } catch (refusal) {
    tell(refusal, at("search-error"));
  }
}

function choice(each) {
  if (each.problem) return option(each.name, `${each.name}: ${each.problem}`, { disabled: true });
  return option(each.name, `${each.name} (${counted(each.captions, "caption")})`);
}

/** Take the first picture of what was dropped, pasted or chosen. */
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
  at("search-picture").replaceChildren(...(picture ? [made("img", { src: picture.url, alt: picture.file.name })] : []));
}

async function search(event) {
  event.preventDefault();
  const byPicture = at("search-by-picture").checked;
  if (!byPicture && !at("search-text").value.trim()) return refuse("text", "Say what the captions shall be near to.");
  if (byPicture && !picture) return refuse(null, "Choose a picture.");
  const fields = { limit: Number(at("search-limit").value) };
  if (!byPicture) fields.text = at("search-text").value.trim();
  if (at("search-contains").value.trim()) fields.contains = at("search-contains").value.trim();
  if (at("search-min-score").value !== "") fields.min_score = Number(at("search-min-score").value);
  query = { database: at("search-database").value, fields, file: byPicture ? picture.file : null };
  offsets = [0];
  return show();
}

function refuse(field, problem) {
  tell(new Refusal(problem, { errors: field ? [{ field, problem }] : [] }), at("search-error"), controlOf);
}

const CONTROLS = { text: "search-text", contains: "search-contains", min_score: "search-min-score", limit: "search-limit" };

const controlOf = (field) => (field in CONTROLS ? at(CONTROLS[field]) : null);

async function show() {
  asked += 1;
  const mine = asked;
  hush(at("search-error"));
  at("search-status").textContent = "Searching…";
  try {
    const answer = await ask(`v1/databases/${encodeURIComponent(query.database)}/search`, request());
    if (mine === asked) showPage(answer);
  } catch (refusal) {
    if (mine !== asked) return;
    at("search-status").textContent = "";
    tell(refusal, at("search-error"), controlOf);
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
  const range = results.length ? `Captions ${first + 1} to ${first + results.length}, the nearest first` : "No caption passes";
  const filtered = query.fields.contains || query.fields.min_score !== undefined ? `, of the ${answer.searched.toLocaleString("en")} nearest` : "";
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

/** Begin to listen to the form. */
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
