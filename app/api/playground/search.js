// The view Captions: searches a caption database by text or image.
import { byId, countText, create, focusLater, option } from "./elements.js";
import { requestJson, jsonOptions, pathOf, RequestError } from "./requests.js";
import { clearRequestError, showLoadError, showRequestError } from "./request_errors.js";
import { dropZone, onFilesSelected, splitFiles } from "./file_drops.js";
import { allDatabases } from "./catalogue.js";
import { showBuilt, startBuilding } from "./build_database.js";
import { bar } from "./results.js";

let picture = null; // {file, url}
let requests = 0;
let loads = 0; // of the databases

/** Show the view. */
export async function showCaptions() {
  loads += 1;
  const load = loads;
  clearRequestError(byId("search-error"));
  try {
    const found = await allDatabases();
    if (load !== loads) return;
    const chosen = byId("search-database").value;
    byId("search-database").replaceChildren(...found.map(choice));
    if (found.some((entry) => entry.name === chosen && !entry.problem)) byId("search-database").value = chosen;
    byId("search").hidden = !found.length;
    byId("no-databases").hidden = found.length > 0;
    showBuilt(found);
  } catch (requestError) {
    if (load === loads) showLoadError(requestError, byId("search-error"), showCaptions);
  }
}

function choice(entry) {
  if (entry.problem) return option(entry.name, `${entry.name}: ${entry.problem}`, { disabled: true });
  return option(entry.name, `${entry.name} (${countText(entry.captions, "caption")})`);
}

/** Use the first image of dropped, pasted or selected files. */
export function takeSearchPicture(files) {
  const { pictures, skippedNote } = splitFiles(files);
  byId("search-note").textContent = skippedNote;
  if (!pictures.length) return;
  forgetPicture();
  picture = { file: pictures[0], url: URL.createObjectURL(pictures[0]) };
  byId("search-by-picture").checked = true;
  showKind();
}

function forgetPicture() {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = null;
}

function showKind() {
  const byPicture = byId("search-by-picture").checked;
  byId("search-text-field").hidden = byPicture;
  byId("search-drop").hidden = !byPicture;
  byId("search-picture").replaceChildren(...(picture ? [create("img", { src: picture.url, alt: picture.file.name })] : []));
}

async function search(event) {
  event.preventDefault();
  const byPicture = byId("search-by-picture").checked;
  if (!byPicture && !byId("search-text").value.trim()) return refuse("text", "Enter a text to search for.");
  if (byPicture && !picture) return refuse(null, "Select an image.");
  const fields = { limit: Number(byId("search-limit").value) };
  if (!byPicture) fields.text = byId("search-text").value.trim();
  if (byId("search-contains").value.trim()) fields.contains = byId("search-contains").value.trim();
  if (byId("search-min-score").value !== "") fields.min_score = Number(byId("search-min-score").value);
  return show({ database: byId("search-database").value, fields, file: byPicture ? picture.file : null }, [0]);
}

function refuse(field, problem) {
  showRequestError(new RequestError(problem, { errors: field ? [{ field, problem }] : [] }), byId("search-error"), controlOf);
}

const CONTROLS = { text: "search-text", contains: "search-contains", min_score: "search-min-score", limit: "search-limit" };

const controlOf = (field) => (field in CONTROLS ? byId(CONTROLS[field]) : null);

/** Show a page of the captions of a query; `offsets` are those of the pages up to it. */
async function show(query, offsets) {
  requests += 1;
  const current = requests, focus = focusLater();
  clearRequestError(byId("search-error"));
  byId("search-status").textContent = "Searching…";
  try {
    const response = await requestJson(pathOf("databases", query.database, "search"), request(query, offsets.at(-1)));
    if (current === requests) showPage(response, query, offsets, focus);
  } catch (requestError) {
    if (current !== requests) return;
    byId("search-status").textContent = "";
    showRequestError(requestError, byId("search-error"), controlOf);
  }
}

function request(query, offset) {
  const fields = { ...query.fields, offset };
  if (!query.file) return jsonOptions("POST", fields);
  const form = new FormData();
  form.append("image", query.file, query.file.name || "pasted");
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  return { method: "POST", body: form };
}

function showPage(response, query, offsets, focus) {
  const first = offsets.at(-1), { results } = response;
  const range = results.length ? `Captions ${first + 1} to ${first + results.length}, nearest first` : "No caption matches";
  const filtered = query.fields.contains || query.fields.min_score !== undefined ? `, among the ${response.searched.toLocaleString("en")} nearest` : "";
  byId("search-status").textContent = `${range}${filtered}; ${response.database}, model ${response.model}.`;
  byId("captions").start = first + 1;
  byId("captions").replaceChildren(...results.map((entry) => bar(entry.caption, entry.score, entry.score.toFixed(3))));
  byId("previous-captions").hidden = offsets.length < 2;
  byId("next-captions").hidden = response.next_offset === null;
  byId("previous-captions").onclick = () => show(query, offsets.slice(0, -1));
  byId("next-captions").onclick = () => show(query, [...offsets, response.next_offset]);
  focus(byId("found-captions"));
}

/** Register the event handlers of the form. */
export function startSearch() {
  byId("search").addEventListener("submit", search);
  for (const radio of document.querySelectorAll("input[name=search-by]")) radio.onchange = showKind;
  startBuilding(showCaptions);
  onFilesSelected(byId("search-file"), takeSearchPicture);
  dropZone(byId("search-drop"), takeSearchPicture);
  showKind();
}
