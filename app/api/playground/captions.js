// Captions near a text or a picture, a page at a time.

import { ask, askWith, at, made, option, showIn } from "./ask.js";

let query = null; // what was asked, so that the next page is of the same

async function loadDatabases() {
  const chosen = at("database").value;
  const { databases } = await ask("v1/databases");
  const usable = databases.filter((each) => each.problem === null);
  at("database").replaceChildren(...usable.map((each) => option(each.name, `${each.name} (${(each.captions || 0).toLocaleString()})`)));
  const preset = usable.find((each) => each.default);
  at("database").value = chosen || preset?.name || usable[0]?.name || "";
  at("no-databases").hidden = usable.length > 0;
  showIn("search-error", null);
}

const inBase64 = (file) =>
  new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

async function search(event) {
  event.preventDefault();
  const [picture] = at("search-picture").files, text = at("search-text").value.trim();
  const missing = !at("database").value ? "There is no caption database to search." : !picture && !text ? "Say a text, or choose a picture." : picture && text ? "A text or a picture, not both: remove one." : "";
  at("found").replaceChildren();
  at("more").hidden = true;
  at("search-status").textContent = "";
  if (missing) return showIn("search-error", new Error(missing));
  try {
    query = { name: at("database").value, offset: 0, limit: 20 };
    if (picture) query.image = { base64: await inBase64(picture) };
    else query.text = text;
    if (at("contains").value.trim()) query.contains = at("contains").value.trim();
    if (at("min-score").value) query.min_score = Number(at("min-score").value);
    await showNext();
  } catch (error) {
    showIn("search-error", error);
  }
}

async function showNext() {
  const { name, ...fields } = query;
  at("search-status").textContent = "Looking…";
  try {
    const { body } = await askWith("POST", `v1/databases/${encodeURIComponent(name)}/search`, fields);
    showIn("search-error", null);
    at("found").append(...body.results.map(item));
    at("search-status").textContent = at("found").children.length ? `in ${body.database}, by ${body.model}` : "Nothing is near enough.";
    at("more").hidden = body.next_offset === null;
    query.offset = body.next_offset;
  } catch (error) {
    at("search-status").textContent = "";
    throw error;
  }
}

function item(found) {
  const filled = made("i");
  filled.style.width = `${Math.max(0, Math.min(1, found.score)) * 100}%`;
  const bar = made("div", { className: "bar" }, filled, made("span", { textContent: found.caption }));
  return made("li", {}, bar, made("span", { className: "score", textContent: found.score.toFixed(3) }));
}

at("search").addEventListener("submit", search);
at("more").onclick = () => showNext().catch((error) => showIn("search-error", error));

export function show() {
  loadDatabases().catch((error) => showIn("search-error", error));
}
