// The state of the view Classify, and what follows from it. Nothing here changes the page or sends requests.
import { durationText } from "./elements.js";

export const SOURCES = { labels: "My labels", label_set: "Label set", none: "Discover" };
export const LAYOUTS = { cards: "Cards", grid: "Grid", table: "Table" };
export const ORDERS = { added: "Order added", label: "Label", high: "Highest score", low: "Lowest score", name: "File name" };

export const DEFAULT_OPTIONS = { method: "", model: "", template: "", topK: 5, database: "", group: false, multiLabel: false, reject: "" };

// With several labels per image, the threshold of the page applies to all labels, so the scores of many are needed.
const SEVERAL_TOP_K = 100;

// Two scores that are this close are a close call.
const CLOSE = 0.1;

/**
 * Return the state of an empty view.
 *
 * A picture is {id, file, name, path, url, remoteUrl, result, answeredFor, imageId, failure, isWanted, isSending,
 * explanation}: `url` is that of its thumbnail, `remoteUrl` replaces a file that the server fetches, `result` that of the
 * server, `answeredFor` the question that it answers (see `questionOf`), `imageId` the id of the features that the
 * server keeps, and `failure` the RequestError of a request that can be tried again. `refused` has the labels that the
 * server does not accept, with the reason; requests leave them out.
 */
export function newState() {
  return {
    pictures: [], skippedNote: "", hasNoThumbnails: false,
    labels: [], refused: new Map(), source: "labels", labelSet: "", options: { ...DEFAULT_OPTIONS },
    models: [], methods: [], labelSets: null, databases: null, limits: {},
    isLive: false, isStarting: false, run: null, problem: null, loadProblem: null, answer: null, announcement: "",
    threshold: 0, layout: "cards", order: "added", filter: "all", search: "",
    suggestions: null, sharedLink: "", learnedSet: "", lessons: 0,
  };
}

// --- the question ----------------------------------------------------------------------------------------------------

/** Return the label set that is selected, undefined if there is none or the names are not loaded yet. */
const selectedLabelSet = ({ source, labelSet, labelSets }) => (source === "label_set" ? labelSets?.find(({ name }) => name === labelSet) : undefined);

/** Return whether the label set itself says that an image may have several labels. */
export const isLabelSetOfSeveral = (state) => Boolean(selectedLabelSet(state)?.multi_label);

/** Return whether an image may have several labels: the option says so, or the label set. */
export const hasSeveralLabels = (state) => state.source !== "none" && (state.options.multiLabel || isLabelSetOfSeveral(state));

/** Return the labels that requests have. */
export const acceptedLabels = ({ labels, refused }) => labels.filter((label) => !refused.has(label));

/** Return the fields of a request as [[name, value], ...], without those that have their default. */
export function requestFields(state) {
  const { source, labelSet, options } = state;
  const { method, model, template, topK, database, group, reject } = options;
  const severalLabels = hasSeveralLabels(state);
  const values = { method, model, template: template.trim(), top_k: topK === DEFAULT_OPTIONS.topK ? "" : topK };
  if (severalLabels) Object.assign(values, { multi_label: true, top_k: SEVERAL_TOP_K });
  if (source === "labels") values.labels = acceptedLabels(state);
  if (source === "label_set") values.label_set = labelSet;
  if (source === "none") Object.assign(values, { database, group: group || "" });
  else values.reject = severalLabels ? "" : reject;
  return Object.entries(values).filter(([, value]) => value !== "");
}

/** Return what is asked of every picture as a text to compare, null if something is missing. */
export function questionOf(state) {
  if (missingInput(state)) return null;
  const together = isTogether(state) ? state.pictures.map((picture) => picture.id) : [];
  const version = state.source === "label_set" ? selectedLabelSet(state)?.version : null;
  return JSON.stringify([requestFields(state), together, version, state.lessons]);
}

/** Return whether all pictures are classified in one request, because they share the labels that are discovered. */
export const isTogether = (state) => state.source === "none" && state.options.group;

/** Return what the user has to enter before anything can be classified, empty if nothing is missing. */
export function missingInput(state) {
  const { source, labels, labelSet } = state;
  if (source === "labels" && !acceptedLabels(state).length) return labels.length ? "Enter a label that the server accepts." : "Enter at least one label.";
  if (source === "label_set" && !labelSet) return "Select a label set.";
  return "";
}

/** Return whether a result answers another question than the one that is asked now. */
export const isStale = (picture, question) => Boolean(picture.result) && !isUnreadable(picture) && picture.answeredFor !== question;

/** Return whether a picture waits for a request. */
export function needsRequest(picture, question) {
  if (!picture.isWanted || picture.isSending || picture.failure || isUnreadable(picture)) return false;
  return !picture.result || picture.answeredFor !== question;
}

/** Return why results cannot be saved to a file now, empty if they can: a file does not show what is out of date. */
export function downloadProblem(state) {
  const question = questionOf(state);
  if (state.run && !state.run.isStopped) return "New results are on their way.";
  if (!state.pictures.some((picture) => !picture.failure && isStale(picture, question))) return "";
  return state.run ? "Some results are for earlier labels. Continue first." : "These results are for earlier labels. Update them first.";
}

/** Return whether the server cannot read the image, whatever is asked about it. */
export const isUnreadable = (picture) => Boolean(picture.result?.error);

// --- the answer ------------------------------------------------------------------------------------------------------

/**
 * Return what the page says of a picture: {kind, title, label, labels, note}; `label` is that of the group that it
 * belongs to, and `labels` are those of an image that may have several.
 *
 * Kinds: `waiting`, `sending`, `failed`, `unreadable`, `none` (rejected), `weak` (probably none of the labels fits),
 * `alone` (a single label), `close` (two labels are about equally likely), `match`.
 */
export function verdictOf(state, picture) {
  if (picture.failure) return { kind: "failed", title: "Not classified", note: picture.failure.message };
  if (!picture.result) return { kind: picture.isSending ? "sending" : "waiting", title: !picture.isSending ? "Not classified yet" : state.run?.wait ? "Waiting…" : "Classifying…", note: "" };
  const { result } = picture;
  if (result.error) return { kind: "unreadable", title: "Not readable", note: result.error.detail };
  const [best, second] = result.predictions;
  if (!best) return { kind: "none", title: "None found", note: "No label was discovered for this image." };
  const { label } = best;
  const labels = labelsOf(state, result);
  if (labels?.length) return { kind: "match", title: labels.map((each) => `✓ ${each}`).join(", "), label: labels[0], labels, note: "" };
  if (labels) return { kind: "none", title: "None of these", note: `Closest: ${label}.` };
  if (isRejected(state, result)) return { kind: "none", title: "None of these", note: `Closest: ${label}.` };
  const place = isAlone(picture) ? placeOf(state, picture) : "";
  if (result.weak_match) return { kind: "weak", title: "No good fit", label, note: `Closest: ${label}. ${place}`.trim() }; // the warning says why
  if (place) return { kind: "alone", title: label, label, note: place };
  if (second && best.score - second.score < CLOSE) return { kind: "close", title: `${label} or ${second.label}?`, label, note: "A close call." };
  return { kind: "match", title: label, label, note: pathText(result) };
}

/** Return the label of a result, or all where an image may have several; the best one may be far from fitting. */
export function answerText({ labels, rejected, predictions }) {
  if (rejected || labels?.length === 0) return "none of these";
  return labels?.join(", ") ?? predictions[0].label;
}

/** Return the labels above the end of the path of a hierarchy, empty without one. */
const pathText = ({ path }) => (path?.length > 1 ? `${path.slice(0, -1).map((step) => step.label).join(" › ")} ›` : "");

/** Return the labels of an image that may have several, by the threshold of the page if it is set; null if it has one. */
export function labelsOf(state, { labels, predictions }) {
  if (!labels || !state.threshold) return labels ?? null;
  return predictions.filter(({ score }) => score >= state.threshold).map(({ label }) => label);
}

/** Return whether an image shows none of the labels: by the threshold of the page, or by the server. */
export const isRejected = (state, result) => (result.labels ? !labelsOf(state, result).length : result.rejected === true) || (state.threshold > 0 && (result.predictions[0]?.score ?? 0) < state.threshold);

/** Return whether a result compares one label with nothing; with independent probabilities, its score has a meaning. */
export const isAlone = ({ result }) => !result.labels && result.predictions.length === 1 && result.predictions[0].score > 0.9999 && Boolean(result.out_of_vocabulary) && result.out_of_vocabulary.mcm < 1e-6;

/** Return the place of a picture among all that were compared with the same single label. */
function placeOf(state, picture) {
  const label = picture.result.predictions[0].label;
  const others = state.pictures.filter((other) => other.result && !other.result.error && isAlone(other) && other.result.predictions[0].label === label);
  const place = others.filter((other) => other.result.predictions[0].similarity > picture.result.predictions[0].similarity).length + 1;
  const figure = `Similarity ${picture.result.predictions[0].similarity.toFixed(2)}`;
  return others.length > 1 ? `${figure}, number ${place} of ${others.length} images.` : `${figure}.`;
}

// After the labels, in this order.
const GROUPS = ["none", "errors", "waiting"];

/** Return the group of a picture: `waiting`, `errors`, `none`, or `label:` and its label. */
export function groupOf(state, picture) {
  const { kind, label } = verdictOf(state, picture);
  if (kind === "waiting" || kind === "sending") return "waiting";
  if (kind === "failed" || kind === "unreadable") return "errors";
  return kind === "none" ? "none" : `label:${label}`;
}

/** Return all groups of a picture: one for each label of an image that may have several. */
export function groupsOf(state, picture) {
  const { labels } = verdictOf(state, picture);
  return labels ? labels.map((label) => `label:${label}`) : [groupOf(state, picture)];
}

/** Return the number of pictures of each group, as a Map; labels first, the most frequent first. */
export function groupCounts(state) {
  const counts = new Map();
  for (const picture of state.pictures) {
    for (const group of groupsOf(state, picture)) counts.set(group, (counts.get(group) ?? 0) + 1);
  }
  return new Map([...counts].sort(([one, many], [other, few]) => GROUPS.indexOf(one) - GROUPS.indexOf(other) || few - many));
}

/** Return the pictures to show, in order. */
export function shownPictures(state) {
  const search = state.search.trim().toLowerCase();
  const shown = state.pictures.filter(
    (picture) => (state.filter === "all" || groupsOf(state, picture).includes(state.filter)) && picture.path.toLowerCase().includes(search),
  );
  const score = (picture) => picture.result?.predictions[0]?.score ?? -1;
  const names = new Intl.Collator("en", { numeric: true });
  const by = {
    label: (one, other) => {
      const [left, right] = [groupOf(state, one), groupOf(state, other)];
      return GROUPS.indexOf(left) - GROUPS.indexOf(right) || names.compare(left, right) || score(other) - score(one);
    },
    high: (one, other) => score(other) - score(one),
    low: (one, other) => score(one) - score(other),
    name: (one, other) => names.compare(one.path, other.path),
  }[state.order];
  return by ? shown.sort(by) : shown;
}

/** Return whether a warning says of one image what its verdict says; the page shows it once for all such images. */
export const isOfWeakMatch = (warning) => warning.startsWith("probably none of the labels fits");

/** Return the warnings that all results have, which need to be shown only once. */
export function commonWarnings(state) {
  const readable = state.pictures.filter((picture) => picture.result && !picture.result.error);
  const [first, ...others] = readable.map((picture) => picture.result.warnings);
  return (first ?? []).filter((warning) => !isOfWeakMatch(warning) && others.every((warnings) => warnings.includes(warning)));
}

/** Return the progress of a run: {done, total, secondsLeft}; null if nothing is running or waiting. */
export function progressOf(state, now) {
  if (!state.run) return null;
  const question = questionOf(state);
  const remaining = state.pictures.filter((picture) => picture.isSending || needsRequest(picture, question)).length;
  const done = Math.max(0, state.run.total - remaining);
  const elapsedS = (state.run.elapsedMs + (state.run.isStopped ? 0 : now - state.run.since)) / 1000;
  const secondsLeft = done > 0 && elapsedS > 1 ? (remaining * elapsedS) / done : null;
  return { done, total: state.run.total, secondsLeft, isStopped: state.run.isStopped };
}

// A longer wait has a time in place of a countdown.
const COUNTDOWN_S = 600;

/** Say that the server accepts no requests for now, and when the run goes on; `wait` is {until, isLimit, reason}. */
export function waitText({ until, isLimit, reason }, now) {
  const seconds = Math.max(1, Math.ceil((until - now) / 1000));
  const isToday = new Date(until).toDateString() === new Date(now).toDateString();
  const time = new Date(until).toLocaleString("en", { timeStyle: "short", ...(isToday ? {} : { dateStyle: "medium" }) });
  const when = seconds > COUNTDOWN_S ? `at ${time}, in ${durationText(seconds)}` : `in ${durationText(seconds)}`;
  return `${isLimit ? "The limit of the server is reached" : "The server is busy"}. The rest continues ${when}.${reason ? ` (${reason})` : ""}`;
}
