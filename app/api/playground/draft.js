// A label set as it is being typed. Texts are kept as they were typed; `bodyOf` makes of them what is sent.
import { lines } from "./elements.js";

/** The texts of a class that are typed one a line. */
export const LISTS = ["synonyms", "descriptions", "features"];

export const newClass = (name) => ({ stored: null, name, synonyms: "", descriptions: "", features: "", prompt: "" });

/** Return the draft of a label set that there is not yet. */
export function emptyDraft() {
  const draft = { name: "", newest: 0, shown: 0, etag: null, templates: "photo", merge: "mean", classes: [] };
  return { ...draft, base: bodyOf(draft) };
}

/** Return the draft that a version of a label set begins as; it is to be saved over the newest one, which has `etag`. */
export function draftOf(labelSet, newest, etag) {
  const stored = new Set(newest.classes.map((each) => each.name)); // only these can have example images added
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

/** Tell whether there is anything in a draft that is not in the version that it began as. */
export function isChanged(draft) {
  return !same(bodyOf(draft), draft.base) || (draft.etag === null && draft.name !== "");
}

/** Return the draft of a newer version with what somebody typed into an older one; where both changed a class, mine. */
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

/** Return in words how a newer version differs from the body of an older one. */
export function differences(older, newer) {
  const before = byName(older), after = byName(newer);
  const told = [
    ["adds", [...after.keys()].filter((name) => !before.has(name))],
    ["leaves out", [...before.keys()].filter((name) => !after.has(name))],
    ["changes", [...after.keys()].filter((name) => before.has(name) && !same(before.get(name), after.get(name)))],
  ];
  const parts = told.filter(([, names]) => names.length).map(([verb, names]) => `${verb} ${shortened(names)}`);
  if (older.templates !== newer.templates) parts.push(`uses the templates ${newer.templates}`);
  return parts.join(", ") || "has the same classes";
}

const MOST_NAMED = 5;

function shortened(names) {
  const rest = names.length - MOST_NAMED;
  return `${names.slice(0, MOST_NAMED).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}
