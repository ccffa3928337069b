// The thresholds of a label set: a chart for each label, with a slider over it. What is not stored yet is kept by the name
// of the label set, as the drafts of the editor are.
import { html, live, nothing, render, repeat, svg } from "./lit.js";
import { byId, countText, focusLater, percent } from "./elements.js";
import { fetchOrThrow, jsonOf, jsonOptions, pathOf } from "./requests.js";
import { confirmDialog } from "./dialog.js";
import { onJobs, watchJobs } from "./job_list.js";
import { BOX, ORDERS, across, figuresAt, figuresOfAll, findSame, height, ordered, pathsOf, shortened } from "./threshold_curves.js";

const PAGE = 60; // labels that are drawn at once
const SEARCH_FROM = 12;
const GOALS = { f1: "the highest F1", precision: "a precision of", recall: "a recall of" };

const states = new Map(); // by the name of the label set
let state = null; // that of the label set shown, null for none
let classCount = 0;
let unstoredChanged = () => {};
let afterStoring = () => {};
let afterLoading = () => {};

const newState = (name) => ({
  name, data: null, etag: null, job: null, paths: new Map(), changes: new Map(), shown: [], request: 0, isStoring: false, busy: "", status: "", problem: "", conflict: false,
  goal: "f1", share: "90", outcome: "", order: "given", query: "", count: PAGE, invalid: "",
});

const path = (name) => `${pathOf("label-sets", name)}/thresholds`;
const isOpen = () => byId("thresholds").open;

export const hasUnstored = (name) => Boolean(states.get(name)?.changes.size);
export const anyUnstored = () => [...states.values()].some(({ changes }) => changes.size);

/** Use a version of a label set with a number of classes; "" is one that is not saved. */
export function setThresholdsOf(name, classnames, version) {
  byId("thresholds").hidden = !name;
  if (!name) {
    state = null;
    return;
  }
  if (!states.has(name)) states.set(name, newState(name));
  const isOther = state?.name !== name;
  state = states.get(name);
  classCount = classnames.length;
  if (isOther) Object.assign(state, { status: "", problem: "" });
  if (isOpen() && (isOther || version > (state.data?.version ?? 0))) load(state);
  show();
}

/** Forget a label set that is deleted. */
export function forgetThresholds(name) {
  states.delete(name);
}

// --- what is stored, and what is changed -------------------------------------------------------------------------------

/** Return the threshold to store for a label, null for none of its own. */
const chosen = ({ changes }, { label, own }) => (changes.has(label) ? changes.get(label) : own);
const thresholdIn = (of) => (label) => chosen(of, label) ?? label.automatic;

/** Choose the threshold of a label; null is the automatic one. */
function choose(of, label, threshold) {
  const isStored = threshold === null ? label.own === null : threshold === label.threshold;
  if (isStored) of.changes.delete(label.label);
  else of.changes.set(label.label, threshold);
}

function edit(label, threshold) {
  choose(state, label, threshold);
  Object.assign(state, { status: "", invalid: state.invalid === label.label ? "" : state.invalid });
  show();
}

/** Return what a button of a card does, which may go with the change: the focus moves to the slider. */
const editor = (label, threshold) => (event) => {
  const slider = event.target.closest(".curve").querySelector("[type=range]");
  edit(label, threshold);
  slider.focus();
};

// --- requests --------------------------------------------------------------------------------------------------------

/** Load the curves, and with a query the suggestions of a goal; returns whether they are shown. */
async function load(of, { query = "", onlySameVersion = false } = {}) {
  of.request += 1;
  const { request } = of;
  Object.assign(of, { busy: "Computing the curves…", problem: "" });
  show();
  try {
    const response = await fetchOrThrow(`${path(of.name)}${query}`);
    const data = await jsonOf(response);
    if (request !== of.request || (onlySameVersion && data.version !== of.data.version)) return false;
    take(of, data, response.headers.get("etag"));
    return true;
  } catch (error) {
    if (request !== of.request) return false;
    of.problem = error.message;
    return false;
  } finally {
    if (request === of.request) of.busy = "";
    show();
  }
}

/** Show newly loaded curves; what was changed here stays changed, except for labels that are gone. */
function take(of, data, etag) {
  const changes = [...of.changes], isOther = of.data !== null && of.data.version !== data.version;
  const labels = new Map(data.labels.map((label) => [label.label, label]));
  Object.assign(of, { data, etag, conflict: false, outcome: "", changes: new Map(), paths: new Map(data.labels.map((label) => [label, label.images ? pathsOf(label) : null])) });
  for (const [label, threshold] of changes) if (labels.has(label)) choose(of, labels.get(label), threshold);
  const gone = changes.map(([label]) => label).filter((label) => !labels.has(label));
  if (isOther && changes.length) of.status = `Version ${data.version} is loaded, with your thresholds of ${countText(of.changes.size, "label")}. Check the result, and store it.`;
  if (gone.length) of.status += ` No longer in the label set, so their thresholds are dropped: ${gone.join(", ")}.`;
  sort(of);
  afterLoading(of.name, data.version);
  if (!data.calibrated) watchJobs();
}

/** Load the curves again when the job that calibrates the scores has ended, of the version that is shown. */
function calibrated(jobs) {
  const newest = jobs.find((job) => job.kind === "select-method" && job.label_set === state?.name);
  if (newest?.status !== "succeeded" || newest.id === state.job) return;
  const isKnown = state.job === null && state.data?.calibrated;
  state.job = newest.id;
  if (isOpen() && state.data && !state.busy && !isKnown) load(state, { onlySameVersion: true });
}

function sort(of) {
  of.shown = ordered(of.data.labels, of.order, thresholdIn(of));
}

async function suggest(event) {
  event.preventDefault();
  const of = state, { goal, share } = of;
  const query = goal === "f1" ? "" : `?${goal}=${Number(share) / 100}`;
  if (!(await load(of, { query }))) return;
  const reachable = of.data.labels.filter((label) => label.suggested !== null), now = thresholdIn(of);
  // The automatic threshold aims at the highest F1 too, and goes on doing so when images are added.
  const isMet = (label) => (goal === "f1" || chosen(of, label) !== null) && findSame(label, now(label), label.suggested);
  const moved = reachable.filter((label) => !isMet(label));
  for (const label of moved) choose(of, label, shortened(label, label.suggested));
  const rest = of.data.labels.length - reachable.length;
  const kept = rest ? ` ${countText(rest, "label keeps its threshold", "labels keep theirs")}; the reason is next to each.` : "";
  of.outcome = `${moved.length ? `${countText(moved.length, "threshold is", "thresholds are")} set.` : "No threshold has to move."}${kept}`;
  sort(of);
  show();
}

async function store() {
  const of = state, replaced = of.etag;
  if (of.isStoring) return;
  if (!of.changes.size) {
    of.status = "There are no changes to store.";
    show();
    return;
  }
  const done = focusLater();
  of.request += 1; // curves that are being loaded are those of the version before
  Object.assign(of, { isStoring: true, busy: "Storing…", status: "", problem: "", conflict: false });
  show();
  try {
    const thresholds = Object.fromEntries(of.changes);
    const { labelSet, etag } = await send(of, thresholds);
    stored(of, thresholds, labelSet, etag);
    afterStoring({ labelSet, etag: of.etag, replaced, thresholds });
  } catch (error) {
    if (error.status === 412) of.conflict = true;
    else of.problem = error.message;
  } finally {
    of.request += 1; // as are those that were asked for meanwhile
    Object.assign(of, { isStoring: false, busy: "" });
    show();
    if (of === state) done(storeButton());
  }
}

/** Store thresholds; returns the new version, also if it was stored by an earlier attempt whose answer was lost. */
async function send(of, thresholds) {
  const answer = async (response) => ({ labelSet: await jsonOf(response), etag: response.headers.get("etag") });
  try {
    return await answer(await fetchOrThrow(path(of.name), jsonOptions("PATCH", { thresholds }, { "If-Match": of.etag })));
  } catch (error) {
    if (error.status !== 412) throw error;
    const newest = await answer(await fetchOrThrow(pathOf("label-sets", of.name)));
    const own = new Map(newest.labelSet.classes.map((entry) => [entry.name, entry.threshold ?? null]));
    const isOwn = newest.labelSet.version === of.data.version + 1 && Object.entries(thresholds).every(([label, threshold]) => own.get(label) === threshold);
    if (!isOwn) throw error;
    return newest;
  }
}

function stored(of, thresholds, labelSet, etag) {
  for (const label of of.data.labels) {
    if (Object.hasOwn(thresholds, label.label)) label.own = thresholds[label.label];
    label.threshold = label.own ?? label.automatic;
  }
  of.changes.clear();
  Object.assign(of.data, { version: labelSet.version, multi_label: labelSet.multi_label });
  Object.assign(of, { etag, outcome: "", status: `Stored as ${labelSet.name}@${labelSet.version}.` });
}

async function loadLatest() {
  const of = state;
  if ((await load(of)) && of === state) storeButton()?.focus();
}

const storeButton = () => byId("threshold-charts").querySelector(".store");

async function undoAll() {
  const of = state;
  if (!(await confirmDialog("Discard your thresholds?", `Discard all thresholds of “${of.name}” that are not stored?`, "Discard"))) return;
  of.changes.clear();
  Object.assign(of, { status: "", conflict: false, outcome: "" });
  show();
  if (of === state) storeButton()?.focus();
}

// --- showing ---------------------------------------------------------------------------------------------------------

let shownUnstored = "";

function show() {
  if (state) {
    byId("thresholds-unstored").hidden = !state.changes.size;
    byId("threshold-charts").inert = state.isStoring;
    if (isOpen()) render(page(), byId("threshold-charts"));
  }
  const unstored = JSON.stringify([...states.values()].filter(({ changes }) => changes.size).map(({ name }) => name));
  if (unstored !== shownUnstored) unstoredChanged();
  shownUnstored = unstored;
}

function set(changes) {
  Object.assign(state, changes);
  show();
}

const again = () => html`<button type="button" class="link" ?disabled=${Boolean(state.busy)} @click=${() => load(state)}>Load again</button>`;

const page = () => html`
  <p class="hint">An image has a label if its score is at least the threshold. Drag a line to see what that finds in the example images, or set all thresholds to a goal. Requests use them once you have stored them.</p>
  ${state.data?.images ? charts() : html`
    ${problem()}
    <p class="status" role="status">${state.busy}</p>
    ${state.data && !state.busy ? empty() : nothing}`}`;

const problem = () => (state.problem ? html`<p class="problem" role="alert">${state.problem} ${state.data ? nothing : again()}</p>` : nothing);

const empty = () => html`
  <p class="note">There are no labelled example images yet, so there are no curves. Open a class above and add images of it; with ten of them its scores can be calibrated. Images that show several classes are added with <code>deixis examples add ${state.name} FOLDER --image-labels FILE</code>. ${again()}</p>`;

function charts() {
  const { data, shown, query, count } = state;
  const found = shown.filter((label) => label.label.toLowerCase().includes(query.trim().toLowerCase()));
  const rest = classCount - data.labels.length;
  return html`
    ${data.multi_label ? nothing : oneLabel()}
    ${data.calibrated ? nothing : html`<p class="note">The scores are not calibrated by these images yet. A job on the server does so after each change of the images or the classes; it moves the scores, so choose thresholds when it has ended.</p>`}
    <div class="tools">
      ${goals()}
      <label class="tool-field">Sort by <select @change=${(event) => { state.order = event.target.value; sort(state); show(); }}>
        ${Object.entries(ORDERS).map(([order, name]) => html`<option value=${order} ?selected=${order === state.order}>${name}</option>`)}</select></label>
      ${data.labels.length > SEARCH_FROM ? html`<input type="search" aria-label="Search labels" placeholder="Search labels" autocomplete="off" .value=${live(query)} @input=${(event) => set({ query: event.target.value, count: PAGE })}>` : nothing}
      <ul class="curve-key"><li>${swatch("precision")} precision: share of the found that are right</li><li>${swatch("recall")} recall: share of the images with the label that are found</li></ul>
    </div>
    ${found.length ? html`<ul class="curves" aria-label="Thresholds of labels">${repeat(found.slice(0, count), (label) => label.label, card)}</ul>` : html`<p class="nothing">No label contains “${query}”.</p>`}
    ${found.length > count ? html`<p class="actions"><button type="button" class="secondary" @click=${showMore}>Show ${Math.min(PAGE, found.length - count)} more of ${found.length}</button></p>` : nothing}
    ${rest > 0 ? html`<p class="hint">${countText(rest, "further label is", "further labels are")} not shown.</p>` : nothing}
    <p class="hint">Measured on ${countText(data.images, "labelled image")} with the model ${data.model}. ${data.calibrated ? "The scores are calibrated by these images. " : ""}${again()}</p>
    ${storing()}`;
}

function showMore() {
  const { count } = state;
  set({ count: count + PAGE });
  byId("threshold-charts").querySelectorAll(".curve [type=range]")[count].focus();
}

const oneLabel = () => html`
  <p class="note">Thresholds only apply if an image may have several labels, and this label set gives each image one. <button type="button" class="link" @click=${toSwitch}>Go to the switch in the editor</button></p>`;

function toSwitch() {
  byId("editor-multi-label").scrollIntoView({ block: "center" });
  byId("editor-multi-label").focus();
}

const goals = () => html`
  <form class="goal" @submit=${suggest}>
    <label class="tool-field">Set all to <select @change=${(event) => set({ goal: event.target.value })}>
      ${Object.entries(GOALS).map(([goal, name]) => html`<option value=${goal} ?selected=${goal === state.goal}>${name}</option>`)}</select></label>
    ${state.goal === "f1" ? nothing : html`<label class="tool-field"><input type="number" min="1" max="99" step="any" required aria-label="${state.goal} in percent" .value=${live(state.share)} @input=${(event) => { state.share = event.target.value; }}> %</label>`}
    <button type="submit" class="secondary" ?disabled=${Boolean(state.busy)}>Set</button>
    <span class="hint" role="status">${state.outcome}</span>
  </form>`;

function storing() {
  const { changes, conflict, busy, status, data } = state;
  const all = figuresOfAll(data.labels, thresholdIn(state));
  const size = changes.size ? `${changes.size.toLocaleString("en")} not stored` : "";
  return html`
    <div class="store-bar">
      ${problem()}
      ${conflict ? html`<div class="note" role="alert"><p>Somebody else has changed “${state.name}” in the meantime, so nothing is stored. Your thresholds are kept here.</p><p class="actions"><button type="button" class="secondary" @click=${loadLatest}>Load the new version, keep my thresholds</button></p></div>` : nothing}
      <p class="all-labels">All labels together: ${inWords(all)}${all.f1 === null ? "" : `, F1 ${all.f1.toFixed(2)}`}</p>
      <p class="actions">
        <button type="button" class="store" ?disabled=${Boolean(busy)} @click=${store}>Store</button>
        ${changes.size ? html`<button type="button" class="secondary" @click=${undoAll}>Undo all…</button>` : nothing}
        <span class="status" role="status">${busy || status || size}</span>
      </p>
    </div>`;
}

const inWords = ({ found, right, missed }) => (found ? `${right.toLocaleString("en")} of ${found.toLocaleString("en")} found are right, ${missed.toLocaleString("en")} missed` : `none found, ${missed.toLocaleString("en")} missed`);
const share = (value) => (value === null ? "–" : percent(value));

/** Return a threshold as text: four decimals are more than a slider or a chart can show. */
const text = (threshold) => (Number.isInteger(threshold * 100) ? threshold.toFixed(2) : String(Number(threshold.toFixed(4))));

const swatch = (kind) => html`<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line class=${kind} x1="1" x2="23" y1="4" y2="4"></line></svg>`;

function card(label) {
  const threshold = thresholdIn(state)(label), at = figuresAt(label, threshold), name = label.label;
  const isChanged = state.changes.has(name), isAutomatic = chosen(state, label) === null;
  const spoken = `${text(threshold)}: ${label.images ? `precision ${at.precision === null ? "undefined" : percent(at.precision)}, recall ${percent(at.recall)}` : "no curve"}`;
  return html`
    <li class="curve">
      <h4>${name}</h4>
      <p class="hint">${countText(label.images, "image")}${label.average_precision === null ? "" : ` · average precision ${label.average_precision.toFixed(2)}`}</p>
      <div class="plot">
        <div class="shares" aria-hidden="true"><span>100 %</span><span>50</span><span>0</span></div>
        <div class="chart">
          ${chart(state.paths.get(label), threshold, at, isChanged ? label.threshold : null)}
          ${label.images ? nothing : html`<p class="no-curve">No example image has this label, so there is no curve.</p>`}
          <input type="range" min="0" max="1" step="0.01" aria-label="Threshold of ${name}" aria-valuetext=${spoken} .value=${live(String(threshold))} @input=${(event) => edit(label, Number(event.target.value))}>
        </div>
        <div class="ticks" aria-hidden="true"><span>0</span><span>0.5</span><span>1</span></div>
      </div>
      ${label.images ? html`
        <dl class="figures">
          <div><dt>${swatch("precision")}Precision</dt><dd>${share(at.precision)}</dd></div><div><dt>${swatch("recall")}Recall</dt><dd>${share(at.recall)}</dd></div><div><dt>F1</dt><dd>${at.f1.toFixed(2)}</dd></div>
        </dl>
        <p class="counts">${inWords(at)}</p>` : nothing}
      <div class="own">
        <label>Threshold <input inputmode="decimal" autocomplete="off" aria-label="Threshold of ${name}, as a number" aria-invalid=${state.invalid === name ? "true" : nothing} .value=${state.invalid === name ? state.invalidText : text(threshold)} @change=${(event) => typed(label, event.target)}></label>
        ${isAutomatic ? html`<span class="hint">automatic</span>` : html`<button type="button" class="link" aria-label="Automatic threshold for ${name}" @click=${editor(label, null)}>Automatic</button>`}
        ${isChanged ? html`<button type="button" class="link" aria-label="Undo the threshold of ${name}" @click=${editor(label, label.own)}>Undo</button>` : nothing}
      </div>
      ${state.invalid === name ? html`<p class="no-number" role="alert">Enter a number from 0 to 1.</p>` : nothing}
      ${isChanged ? html`<p class="hint">Not stored yet; stored is ${label.own === null ? `the automatic one, ${text(label.automatic)}` : text(label.own)}.</p>` : nothing}
      ${state.outcome && label.suggested === null && label.reason ? html`<p class="hint">Kept: ${label.reason}.</p>` : nothing}
    </li>`;
}

/** Return the chart of a label; `before` is the threshold in use, if another one is chosen. */
function chart(paths, threshold, at, before) {
  const x = across(threshold), dots = paths ? [["recall", at.recall], ["precision", at.precision]].filter(([, value]) => value !== null) : [];
  return html`
    <svg viewBox="0 0 ${BOX.width} ${BOX.height}" preserveAspectRatio="none" aria-hidden="true">
      ${[0, 0.5, 1].map((value) => svg`<line class="grid" x1="0" x2=${BOX.width} y1=${height(value)} y2=${height(value)}></line>`)}
      ${paths ? svg`<path class="recall" d=${paths.recall}></path><path class="precision" d=${paths.precision}></path>` : nothing}
      ${before === null ? nothing : svg`<line class="before" x1=${across(before)} x2=${across(before)} y1="0" y2=${BOX.height}></line>`}
      <line class="chosen" x1=${x} x2=${x} y1="0" y2=${BOX.height}></line>
      ${dots.map(([kind, value]) => svg`<line class="dot ${kind}" x1=${x} x2=${x} y1=${height(value)} y2=${height(value)}></line>`)}
    </svg>`;
}

function typed(label, field) {
  const number = Number(field.value.trim().replace(",", "."));
  if (field.value.trim() !== "" && number >= 0 && number <= 1) edit(label, number);
  else set({ invalid: label.label, invalidText: field.value });
}

/**
 * Register the event handlers. `changed` is called when a label set gets or loses changes that are not stored, `loaded` with
 * the version of a label set that was loaded, `stored` with a version that was stored.
 */
export function startThresholds({ changed, loaded, stored: whenStored }) {
  unstoredChanged = changed;
  afterLoading = loaded;
  afterStoring = whenStored;
  onJobs(calibrated);
  byId("thresholds").ontoggle = () => { if (isOpen() && state) load(state); };
}
