// A label set with unsaved edits. Texts are stored as typed; `bodyOf` converts them to a request body.
import { lines } from "./elements.js";

/** The texts of a class that are typed one per line. */
export const LISTS = ["synonyms", "descriptions", "features"];

export const newClass = (name) => ({ stored: null, name, synonyms: "", descriptions: "", features: "", prompt: "", threshold: "", parent: "", prior: "" });

/** Return the draft of a new label set. */
export function emptyDraft() {
  const draft = { name: "", newest: 0, shown: 0, etag: null, templates: "photo", merge: "mean", multiLabel: false, classes: [] };
  return { ...draft, base: bodyOf(draft) };
}

/** Return the draft of a version without edits; `etag` is that of the latest version, which saving replaces. */
export function draftOf(labelSet, newest, etag) {
  const stored = new Set(newest.classes.map((entry) => entry.name)); // example images can be added only to these
  const classes = labelSet.classes.map((entry) => ({
    stored: stored.has(entry.name) ? entry.name : null, name: entry.name, prompt: entry.prompt || "", threshold: String(entry.threshold ?? ""),
    parent: entry.parent || "", prior: labelSet.priors ? String(labelSet.priors[entry.name]) : "",
    ...Object.fromEntries(LISTS.map((list) => [list, entry[list].join("\n")])),
  }));
  const draft = {
    name: labelSet.name, newest: newest.version, shown: labelSet.version, etag, createdAt: labelSet.created_at,
    templates: labelSet.templates, merge: labelSet.merge_synonyms, multiLabel: labelSet.multi_label, classes,
  };
  return { ...draft, base: bodyOf(draft) };
}

/** Return the body of the request that saves a draft. */
export function bodyOf(draft) {
  const priors = draft.classes.filter((entry) => entry.prior.trim()).map((entry) => [entry.name.trim(), Number(entry.prior.replace(",", "."))]);
  return {
    classes: draft.classes.map((entry) => ({
      name: entry.name.trim(), prompt: entry.prompt.trim() || null, threshold: thresholdOf(entry), parent: entry.parent.trim() || null,
      ...Object.fromEntries(LISTS.map((list) => [list, lines(entry[list])])),
    })),
    templates: draft.templates.trim(),
    merge_synonyms: draft.merge,
    multi_label: draft.multiLabel,
    priors: priors.length ? Object.fromEntries(priors) : null,
  };
}

/** Return the threshold of a class, null if there is none; the server says what is wrong with a text that is not a number. */
export function thresholdOf({ threshold }) {
  const text = threshold.trim();
  return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
}

/** Return whether a stored label set is what saving a draft stores. */
export const isStoredAs = (draft, labelSet) => same(bodyOf(draft), bodyOf(draftOf(labelSet, labelSet, null)));

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** Return whether a draft differs from the version it started from. */
export function isChanged(draft) {
  return !same(bodyOf(draft), draft.base) || (draft.etag === null && draft.name !== "");
}

/** Return the draft of a newer version with the edits of an older one; if both changed a class, mine wins. */
export function mergeDrafts(edited, newest, etag) {
  const draft = draftOf(newest, newest, etag);
  const body = bodyOf(edited), theirs = bodyOf(draft), before = byName(edited.base), after = byName(theirs);
  const priorOf = (from, name) => from.priors?.[name];
  const isUntouched = (entry) => before.has(entry.name) && same(before.get(entry.name), entry) && priorOf(body, entry.name) === priorOf(edited.base, entry.name);
  const kept = [];
  body.classes.forEach((entry, index) => {
    if (!isUntouched(entry)) kept.push({ ...edited.classes[index], stored: after.has(entry.name) ? entry.name : null });
    else if (after.has(entry.name)) kept.push(draft.classes.find((other) => other.name === entry.name));
  });
  const existing = new Set(body.classes.map((entry) => entry.name));
  kept.push(...draft.classes.filter((entry) => !before.has(entry.name) && !existing.has(entry.name)));
  draft.classes = kept;
  if (body.templates !== edited.base.templates) draft.templates = edited.templates;
  if (body.merge_synonyms !== edited.base.merge_synonyms) draft.merge = edited.merge;
  if (body.multi_label !== edited.base.multi_label) draft.multiLabel = edited.multiLabel;
  return draft;
}

/**
 * Take over thresholds that were stored as version `labelSet`, which replaced the version of ETag `replaced`. A threshold
 * that is edited in the draft stays. If others have saved meanwhile, the draft keeps its ETag, so that saving it says so.
 */
export function takeThresholds(draft, { thresholds, labelSet, etag, replaced }) {
  const isLatest = draft.shown === draft.newest, before = byName(draft.base);
  for (const entry of isLatest ? draft.classes : []) {
    if (entry.stored === null || !Object.hasOwn(thresholds, entry.stored)) continue;
    const base = before.get(entry.stored), threshold = thresholds[entry.stored];
    if (thresholdOf(entry) === base.threshold) entry.threshold = String(threshold ?? "");
    base.threshold = threshold;
  }
  if (draft.etag !== replaced) return;
  Object.assign(draft, { etag, newest: labelSet.version }, isLatest ? { shown: labelSet.version, createdAt: labelSet.created_at } : {});
}

const byName = (body) => new Map(body.classes.map((entry) => [entry.name, entry]));

/** Describe how a newer version differs from an older one. */
export function differences(older, newer) {
  const before = byName(older), after = byName(newer);
  const changes = [
    ["adds", [...after.keys()].filter((name) => !before.has(name))],
    ["removes", [...before.keys()].filter((name) => !after.has(name))],
    ["changes", [...after.keys()].filter((name) => before.has(name) && !same(before.get(name), after.get(name)))],
  ];
  const parts = changes.filter(([, names]) => names.length).map(([verb, names]) => `${verb} ${shortened(names)}`);
  if (!same(older.priors ?? null, newer.priors ?? null)) parts.push("has other priors");
  if (older.templates !== newer.templates) parts.push(`uses the templates ${newer.templates}`);
  if (older.multi_label !== newer.multi_label) parts.push(`allows ${newer.multi_label ? "several labels" : "one label"} per image`);
  return parts.join(", ") || "has the same classes";
}

const MAX_NAMED = 5;

function shortened(names) {
  const rest = names.length - MAX_NAMED;
  return `${names.slice(0, MAX_NAMED).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}
