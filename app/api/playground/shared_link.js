// Labels and options in links, and in the storage of the browser so that they survive a reload.
import { DEFAULT_OPTIONS, LAYOUTS, SOURCES } from "./classify_state.js";

const STORAGE_KEY = "deixis.classify";

const NAMES = { method: "method", model: "model", template: "template", topK: "top_k", database: "database", group: "group", multiLabel: "multi_label", reject: "reject" };

/** Return the link that opens the page with these labels and options. */
export function linkOf(state) {
  const query = new URLSearchParams();
  if (state.source === "labels") for (const label of state.labels) query.append("label", label);
  if (state.source === "label_set") query.set("label_set", state.labelSet);
  if (state.source === "none") query.set("discover", "1");
  for (const [option, name] of Object.entries(NAMES)) {
    if (state.options[option] !== DEFAULT_OPTIONS[option]) query.set(name, String(state.options[option]));
  }
  if (state.threshold) query.set("reject_below", String(state.threshold));
  return new URL(`#classify?${query}`, document.baseURI).href;
}

/** Put the labels and options of a link into a state. */
export function applyLink(query, state) {
  state.labels = unique(query.getAll("label"));
  state.source = query.has("discover") ? "none" : query.has("label_set") ? "label_set" : "labels";
  state.labelSet = query.get("label_set") ?? state.labelSet;
  state.options = { ...DEFAULT_OPTIONS };
  for (const [option, name] of Object.entries(NAMES)) {
    if (query.has(name)) state.options[option] = parsed(option, query.get(name));
  }
  state.threshold = share(query.get("reject_below"));
}

/** Store the labels and options. Neither pictures nor results nor the API key are stored. */
export function store({ labels, source, labelSet, options, threshold, layout }) {
  try {
    localStorage.setItem(STORAGE_KEY, JSON.stringify({ labels, source, labelSet, options, threshold, layout }));
  } catch {
    // A browser may forbid or limit storage; then a reload loses the labels.
  }
}

/** Put the stored labels and options into a state. */
export function restore(state) {
  let stored;
  try {
    stored = JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? {};
  } catch {
    return;
  }
  if (Array.isArray(stored.labels)) state.labels = unique(stored.labels.filter((label) => typeof label === "string"));
  if (Object.hasOwn(SOURCES, stored.source)) state.source = stored.source;
  if (Object.hasOwn(LAYOUTS, stored.layout)) state.layout = stored.layout;
  if (typeof stored.labelSet === "string") state.labelSet = stored.labelSet;
  for (const option of Object.keys(NAMES)) {
    const value = stored.options?.[option];
    if (typeof value === typeof DEFAULT_OPTIONS[option]) state.options[option] = value;
  }
  state.threshold = share(stored.threshold);
}

const unique = (labels) => [...new Map(labels.map((label) => label.trim()).filter(Boolean).map((label) => [label.toLowerCase(), label])).values()];

function parsed(option, text) {
  if (option === "topK") return Math.min(100, Math.max(1, Math.round(Number(text)) || DEFAULT_OPTIONS.topK));
  return ["group", "multiLabel"].includes(option) ? text === "true" : text;
}

const share = (value) => Math.min(0.99, Math.max(0, Number(value) || 0));
