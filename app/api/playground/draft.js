// A label set with unsaved edits. Texts are stored as typed; `bodyOf` converts them to a request body.
import { lines } from "./elements.js";

/** The texts of a class that are typed one per line. */
export const LISTS = ["synonyms", "descriptions", "features"];

export const newClass = (name) => ({ stored: null, name, synonyms: "", descriptions: "", features: "", prompt: "" });

/** Return the draft of a new label set. */
export function emptyDraft() {
  const draft = { name: "", newest: 0, shown: 0, etag: null, templates: "photo", merge: "mean", classes: [] };
  return { ...draft, base: bodyOf(draft) };
}

/** Return the draft of a version without edits; `etag` is that of the latest version, which saving replaces. */
export function draftOf(labelSet, newest, etag) {
  const stored = new Set(newest.classes.map((each) => each.name)); // example images can be added only to these
  const classes = labelSet.classes.map((each) => ({
    stored: stored.has(each.name) ? each.name : null, name: each.name, prompt: each.prompt || "",
    ...Object.fromEntries(LISTS.map((list) => [list, each[list].join("\n")])),
  }));
  const draft = {
    name: labelSet.name, newest: newest.version, shown: labelSet.version, etag, createdAt: labelSet.created_at,
    templates: labelSet.templates, merge: labelSet.merge_synonyms, classes,
  };
  return { ...draft, base: bodyOf(draft) };
}

/** Return the body of the request that saves a draft. */
export function bodyOf(draft) {
  return {
    classes: draft.classes.map((each) => ({
      name: each.name.trim(), prompt: each.prompt.trim() || null,
      ...Object.fromEntries(LISTS.map((list) => [list, lines(each[list])])),
    })),
    templates: draft.templates.trim(),
    merge_synonyms: draft.merge,
  };
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** Return whether a draft differs from the version it started from. */
export function isChanged(draft) {
  return !same(bodyOf(draft), draft.base) || (draft.etag === null && draft.name !== "");
}

/** Return the draft of a newer version with the edits of an older one; if both changed a class, mine wins. */
export function merged(mine, newest, etag) {
  const draft = draftOf(newest, newest, etag);
  const body = bodyOf(mine), theirs = bodyOf(draft), before = byName(mine.base), after = byName(theirs);
  const isUntouched = (each) => before.has(each.name) && same(before.get(each.name), each);
  const kept = [];
  body.classes.forEach((each, index) => {
    if (!isUntouched(each)) kept.push({ ...mine.classes[index], stored: after.has(each.name) ? each.name : null });
    else if (after.has(each.name)) kept.push(draft.classes.find((other) => other.name === each.name));
  });
  const have = new Set(body.classes.map((each) => each.name));
  kept.push(...draft.classes.filter((each) => !before.has(each.name) && !have.has(each.name)));
  draft.classes = kept;
  if (body.templates !== mine.base.templates) draft.templates = mine.templates;
  if (body.merge_synonyms !== mine.base.merge_synonyms) draft.merge = mine.merge;
  return draft;
}

const byName = (body) => new Map(body.classes.map((each) => [each.name, each]));

/** Describe how a newer version differs from an older one. */
export function differences(older, newer) {
  const before = byName(older), after = byName(newer);
  const changes = [
    ["adds", [...after.keys()].filter((name) => !before.has(name))],
    ["removes", [...before.keys()].filter((name) => !after.has(name))],
    ["changes", [...after.keys()].filter((name) => before.has(name) && !same(before.get(name), after.get(name)))],
  ];
  const parts = changes.filter(([, names]) => names.length).map(([verb, names]) => `${verb} ${shortened(names)}`);
  if (older.templates !== newer.templates) parts.push(`uses the templates ${newer.templates}`);
  return parts.join(", ") || "has the same classes";
}

const MAX_NAMED = 5;

function shortened(names) {
  const rest = names.length - MAX_NAMED;
  return `${names.slice(0, MAX_NAMED).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}
