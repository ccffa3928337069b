// The label sets that come with the server, each with a button that imports it.
import { byId, countText, create, isTyping } from "./elements.js";
import { fetchOrThrow, jsonOptions, pathOf, requestJson } from "./requests.js";
import { addressOf } from "./views.js";

const MAX_NAMES = 20;

let shipped = null; // fetched once: they change only with the release

/** Show the label sets that come with the server; `existing` are the names of the label sets that are stored already. */
export async function showShipped(existing) {
  const { label_sets: found } = shipped ?? (await requestJson("v1/shipped-label-sets"));
  shipped = { label_sets: found };
  byId("shipped-list").replaceChildren(...found.map((entry) => card(entry, existing.has(entry.name))));
}

function card(entry, exists) {
  const rest = entry.class_names.length - MAX_NAMES;
  const names = `${entry.class_names.slice(0, MAX_NAMES).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  const problem = create("p", { className: "problem", role: "alert", hidden: true });
  const load = create("button", { type: "button", className: "secondary", textContent: "Import", "aria-label": `Import ${entry.name}` });
  load.onclick = () => importLabelSet(entry.name, load, problem);
  const size = `${countText(entry.classes, "class", "classes")}, ${countText(entry.descriptions, "description")} · ${entry.licence}`;
  return create(
    "li", {}, create("h3", { textContent: entry.name }), create("p", { textContent: names }), create("p", { className: "hint", textContent: size }), problem,
    exists ? create("a", { className: "button secondary", href: addressOf("label-sets", entry.name), textContent: "Open", "aria-label": `Open ${entry.name}` }) : load,
  );
}

async function importLabelSet(name, load, problem) {
  problem.hidden = true;
  load.disabled = true;
  load.textContent = "Importing…";
  try {
    const content = await requestJson(pathOf("shipped-label-sets", name));
    // Not over a label set that somebody has written meanwhile.
    await fetchOrThrow(pathOf("label-sets", name), jsonOptions("PUT", content, { "If-None-Match": "*" }));
    if (!isTyping()) location.hash = addressOf("label-sets", name);
    byId("label-sets-status").textContent = `“${name}” is imported.`;
  } catch (error) {
    problem.textContent = error.status === 412 ? `A label set “${name}” exists already.` : error.message;
    problem.hidden = false;
    load.disabled = false;
    load.textContent = "Import";
  }
}
