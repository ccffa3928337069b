// The label sets that come with the server, each with a button that imports it.
import { byId, countText, create, isTyping } from "./elements.js";
import { fetchOrThrow, jsonOptions, pathOf, requestJson } from "./requests.js";
import { addressOf, currentView } from "./views.js";

const MAX_NAMES = 20;

let shipped = []; // fetched once: they change only with the release
let stored = new Set();
let listChanged = () => {};
const imports = new Map(); // by name, why it could not be imported; empty while it is being imported

/**
 * Show the label sets that come with the server; `existing` are the names of the label sets that are stored already, and
 * `imported` is called when there is another one.
 */
export async function showShipped(existing, imported) {
  stored = existing;
  listChanged = imported;
  if (!shipped.length) ({ label_sets: shipped } = await requestJson("v1/shipped-label-sets"));
  show();
}

function show() {
  byId("shipped-list").replaceChildren(...shipped.map((entry) => card(entry, stored.has(entry.name))));
}

function card(entry, exists) {
  const rest = entry.class_names.length - MAX_NAMES;
  const names = `${entry.class_names.slice(0, MAX_NAMES).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  const reason = exists ? "" : imports.get(entry.name);
  const problem = create("p", { className: "problem", role: "alert", textContent: reason ?? "", hidden: !reason });
  const load = create("button", {
    type: "button", className: "secondary", textContent: reason === "" ? "Importing…" : "Import", disabled: reason === "", "aria-label": `Import ${entry.name}`,
  });
  load.onclick = () => importLabelSet(entry.name);
  const size = `${countText(entry.classes, "class", "classes")}, ${countText(entry.descriptions, "description")} · ${entry.licence}`;
  return create(
    "li", {}, create("h3", { textContent: entry.name }), create("p", { textContent: names }), create("p", { className: "hint", textContent: size }), problem,
    exists ? create("a", { className: "button secondary", href: addressOf("label-sets", entry.name), textContent: "Open", "aria-label": `Open ${entry.name}` }) : load,
  );
}

async function importLabelSet(name) {
  imports.set(name, "");
  show();
  try {
    const content = await requestJson(pathOf("shipped-label-sets", name));
    // Not over a label set that somebody has written meanwhile.
    await fetchOrThrow(pathOf("label-sets", name), jsonOptions("PUT", content, { "If-None-Match": "*" }));
    imports.delete(name);
    const isWaitedFor = currentView() === "label-sets" && !byId("shipped").hidden && !isTyping();
    if (isWaitedFor) location.hash = addressOf("label-sets", name);
    else listChanged();
    byId("label-sets-status").textContent = `“${name}” is imported.`;
  } catch (error) {
    imports.set(name, error.status === 412 ? `A label set “${name}” exists already.` : error.message);
    show();
  }
}
