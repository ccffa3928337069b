// The view Classify as a template of its state. `actions` are the functions of classify.js that its controls call.
import { countText, durationText, percent } from "./elements.js";
import { html, live, nothing, repeat } from "./lit.js";
import { curlCode, pythonCode } from "./code.js";
import { SAMPLES, sampleUrl } from "./samples.js";
import { commonWarnings, downloadProblem, groupCounts, hasSeveralLabels, isAlone, isLabelSetOfSeveral, isOfWeakMatch, isRejected, isStale, LAYOUTS, needsRequest, ORDERS, progressOf, questionOf, requestFields, SOURCES, waitText } from "./classify_state.js";
import { gallery, sentence } from "./results.js";

// Further labels are in a select element.
const MAX_FILTER_CHIPS = 8;

// Of labels that are left out.
const MAX_REASONS = 3;

// Fewer images are found faster by looking.
const MIN_FOR_SEARCH = 8;

/** Return the template of the view. */
export function classifyView(state, actions) {
  const isEmpty = !state.pictures.length;
  return html`<div class="workspace ${isEmpty ? "empty" : ""}">
    <form id="classify-form" class="side" aria-label="Labels and options" @submit=${actions.submit}>
      ${labelsPanel(state, actions)}
      ${optionsPanel(state, actions)}
      ${classifyButton(state, actions)}
      ${links(state, actions)}
      <p class="panel-links"><button id="earlier" type="button" class="link" @click=${actions.showEarlier}>Earlier results</button></p>
    </form>
    <section id="results" class="main-column" tabindex="-1" aria-label=${isEmpty ? "Images" : "Results"}>
      <div role="alert">${state.problem && state.problem.message !== state.loadProblem?.message ? html`<div id="error" class="problem">${problemText(state)}</div>` : nothing}${state.loadProblem ? html`<div id="load-error" class="problem with-button"><span>${state.loadProblem.message}</span><button type="button" class="secondary" @click=${actions.reload}>Try again</button></div>` : nothing}</div>
      ${isEmpty ? hero(state, actions) : nothing}
      ${sources(state, actions)}
      ${isEmpty ? samples(actions) : nothing}
      <p id="status" class="visually-hidden" role="status">${state.announcement}</p>
      ${isEmpty ? nothing : html`${state.source === "label_set" && state.learnedSet === state.labelSet ? html`<div id="learning"></div>` : nothing}${progress(state, actions)}${notices(state, actions)}${toolbar(state, actions)}${gallery(state, actions)}`}
    </section>
  </div>`;
}

// --- images --------------------------------------------------------------------------------------------------------------

const hero = () => html`<div class="hero">
  <h2>Which label fits each image?</h2>
  <p>Type labels in plain words and add images. Deixis says which label fits each of them. There is nothing to train, and the images are sent only to this server.</p>
</div>`;

function sources(state, actions) {
  const isEmpty = !state.pictures.length;
  return html`<div id="drop" class="sources ${isEmpty ? "drop" : ""}">
    ${isEmpty ? html`<p class="drop-title">Drop images or folders here</p>` : nothing}
    <p class="source-buttons">
      <label class="button secondary">${isEmpty ? "Choose images" : "Add images"}<input id="files" class="visually-hidden" type="file" accept="image/*" multiple @change=${actions.filesSelected}></label>
      <label class="button secondary folder">Folder<input id="folder" class="visually-hidden" type="file" webkitdirectory multiple @change=${actions.filesSelected}></label>
      <button type="button" class="secondary" id="camera" @click=${actions.camera}>Camera</button>
      ${state.limits.urls ? html`<button type="button" class="secondary" id="image-urls" @click=${actions.imageUrls}>URL</button>` : nothing}
      ${isEmpty ? nothing : html`<button type="button" class="link" id="remove-pictures" @click=${actions.removeAll}>Remove all</button>`}
    </p>
    ${isEmpty ? html`<p class="hint">Any number. You can also paste.</p>` : nothing}
    <p id="left-out" class="hint" role="status">${state.skippedNote}</p>
  </div>`;
}

const samples = (actions) => html`<div class="samples">
  <div class="samples-head">
    <p>No images? Click one of these.</p>
    <button type="button" id="samples" @click=${() => actions.useSamples(SAMPLES)}>Try these six photographs</button>
  </div>
  <ul>${SAMPLES.map((sample) => html`<li><button type="button" class="sample" aria-label=${`Classify the photograph of ${sample.subject}`} @click=${() => actions.useSamples([sample])}><img src=${sampleUrl(sample.name)} alt="" width="320" height="240"></button></li>`)}</ul>
</div>`;

// --- labels --------------------------------------------------------------------------------------------------------------

function labelsPanel(state, actions) {
  return html`<section class="panel" aria-labelledby="labels-title">
    <h2 id="labels-title">Labels${state.source === "labels" && state.labels.length ? html` <span class="count">${state.labels.length.toLocaleString("en")}</span>` : nothing}</h2>
    <div class="segments" role="radiogroup" aria-label="Where the labels are from">
      ${Object.entries(SOURCES).map(([value, text]) => html`<label><input type="radio" name="source" .value=${value} .checked=${live(state.source === value)} @change=${() => actions.setSource(value)}><span>${text}</span></label>`)}
    </div>
    ${{ labels: ownLabels, label_set: labelSetChoice, none: discovery }[state.source](state, actions)}
  </section>`;
}

function ownLabels(state, actions) {
  return html`<div id="source-labels">
    <ul id="labels" class="chips" aria-label="Labels">${repeat(state.labels, (label) => label, (label, index) => html`<li class=${state.refused.has(label) ? "refused" : ""} title=${state.refused.get(label) ?? nothing}><span>${label}</span>${state.refused.has(label) ? html`<span class="visually-hidden">, left out</span>` : nothing}<button type="button" aria-label=${`Remove ${label}`} @click=${() => actions.removeLabel(index)}>×</button></li>`)}</ul>
    ${leftOut(state)}
    <div class="field">
      <label for="new-labels">Add labels, separated by commas</label>
      <div class="row">
        <textarea id="new-labels" rows="1" placeholder="cat, dog, coffee cup" aria-invalid=${invalid(state, "labels")} aria-describedby=${describedBy(state, "labels")} @keydown=${actions.labelKey}></textarea>
        <button id="add-labels" type="button" class="secondary" @click=${actions.addTyped}>Add</button>
      </div>
      ${fieldProblem(state, "labels")}
    </div>
    ${state.labels.length === 1 && !state.options.multiLabel ? html`<p id="one-label" class="note">One label has nothing to compete with. Add labels for what an image may show instead, such as “something else”.</p>` : nothing}
    <p class="panel-links">
      ${state.pictures.length ? html`<button id="suggest" type="button" class="link" ?disabled=${state.suggestions?.isLoading} @click=${actions.suggest}>${state.suggestions?.isLoading ? "Looking…" : "Suggest labels"}</button>` : nothing}
      ${state.labels.length > 1 ? html`<button id="remove-labels" type="button" class="link" @click=${actions.removeLabels}>Remove all labels</button>` : nothing}
    </p>
    ${suggestions(state, actions)}
  </div>`;
}

function leftOut({ labels, refused }) {
  const problems = labels.filter((label) => refused.has(label)).map((label) => refused.get(label));
  if (!problems.length) return nothing;
  const more = problems.length > MAX_REASONS ? ` And ${problems.length - MAX_REASONS} more.` : "";
  return html`<p id="left-out-labels" class="field-problem" role="alert">${countText(problems.length, "label is", "labels are")} left out. ${problems.slice(0, MAX_REASONS).map(sentence).join(" ")}${more}</p>`;
}

function suggestions({ suggestions: found, labels }, actions) {
  if (!found || found.isLoading) return nothing;
  if (found.error) return html`<p class="problem" role="alert">${found.error.message}</p>`;
  const added = new Set(labels.map((label) => label.toLowerCase()));
  const left = found.labels.filter((label) => !added.has(label.toLowerCase()));
  if (!left.length) return html`<p class="hint" role="status">${found.labels.length ? "All suggestions are added." : "No labels were found in these images."}</p>`;
  return html`<div id="suggestions" role="group" aria-label="Suggested labels"><p class="hint">Seen in your images. Click to add:</p>
    <ul class="chips suggested">${left.map((label) => html`<li><button type="button" aria-label=${`Add ${label}`} @click=${() => actions.addLabels([label])}>+ ${label}</button></li>`)}</ul></div>`;
}

function labelSetChoice(state, actions) {
  const found = state.labelSets;
  if (found === null) return state.loadProblem || state.problem?.status === 401 ? nothing : html`<p class="hint">Loading…</p>`;
  if (!found.length) return html`<p id="no-label-sets" class="hint">There are no label sets yet. <a href="#label-sets">Import or create one</a>.</p>`;
  return html`<div id="source-label_set"><div class="field">
    <label for="label-set">Label set</label>
    <select id="label-set" aria-invalid=${invalid(state, "label_set")} @change=${(event) => actions.setLabelSet(event.target.value)}>
      ${found.map((entry) => html`<option value=${entry.name} .selected=${live(entry.name === state.labelSet)}>${entry.name} (${countText(entry.classes, "class", "classes")})</option>`)}
    </select>
    ${fieldProblem(state, "label_set")}
  </div>
  ${state.labelSet ? html`<p class="panel-links"><a href=${`#label-sets/${encodeURIComponent(state.labelSet)}`}>Edit this label set</a></p>` : nothing}</div>`;
}

function discovery(state, actions) {
  return html`<div id="source-none">
    <p class="hint">Labels are discovered in captions similar to each image. If you know the labels, type them: the results are better.</p>
    <div class="field"><label for="database">Caption database</label>${select("database", state, actions, [["", "Default"], ...(state.databases ?? []).map((entry) => [entry.name, entry.name])])}</div>
    <label class="check"><input id="group" type="checkbox" .checked=${live(state.options.group)} @change=${(event) => actions.setOption("group", event.target.checked)}> Use a small set of labels for all images</label>
    ${fieldProblem(state, "group")}
  </div>`;
}

// --- options -------------------------------------------------------------------------------------------------------------

/** Return the number of labels that was entered, and show it, since it may be the one that is used already. */
function topKOf(input) {
  const topK = Math.min(100, Math.max(1, Math.round(Number(input.value)) || 5));
  input.value = topK;
  return topK;
}

function optionsPanel(state, actions) {
  const summary = state.methods.find((entry) => entry.name === state.options.method)?.summary;
  const changed = ["method", "model", "template", "multiLabel"].filter((name) => state.options[name]).length;
  return html`<details id="options" class="panel">
    <summary>Options${changed ? html` <span class="count">${changed}</span>` : nothing}</summary>
    ${state.source === "none" ? nothing : html`<label class="check"><input id="multi-label" type="checkbox" .checked=${live(hasSeveralLabels(state))} ?disabled=${isLabelSetOfSeveral(state)} @change=${(event) => actions.setOption("multiLabel", event.target.checked)}> Several labels per image${isLabelSetOfSeveral(state) ? ", as the label set says" : nothing}</label>${fieldProblem(state, "multi_label")}`}
    <div class="field"><label for="method">Method</label>${select("method", state, actions, [["", "Default"], ["auto", "auto"], ...state.methods.map((entry) => [entry.name, entry.name])])}</div>
    ${summary ? html`<p id="method-summary" class="hint">${summary}</p>` : nothing}
    <div class="field"><label for="model">Model</label>${select("model", state, actions, state.models.map((entry, index) => [index ? entry.name : "", entry.name]))}</div>
    <div class="field"><label for="template">Template</label><input id="template" placeholder="a photo of a {}." autocomplete="off" .value=${state.options.template} aria-invalid=${invalid(state, "template")} aria-describedby=${describedBy(state, "template")} @change=${(event) => actions.setOption("template", event.target.value)}>${fieldProblem(state, "template")}</div>
    <div class="field"><label for="top-k">Labels per image</label><input id="top-k" type="number" min="1" max="100" .value=${String(state.options.topK)} aria-invalid=${invalid(state, "top_k")} @change=${(event) => actions.setOption("topK", topKOf(event.target))}>${fieldProblem(state, "top_k")}</div>
  </details>`;
}

const select = (name, state, actions, choices) => html`<select id=${name} aria-invalid=${invalid(state, name)} @change=${(event) => actions.setOption(name, event.target.value)}>
  ${choices.map(([value, text]) => html`<option value=${value} .selected=${live(value === state.options[name])}>${text}</option>`)}
</select>${fieldProblem(state, name)}`;

// --- the problem of a request, beside its field --------------------------------------------------------------------------

const CONTROLS = ["labels", "label_set", "database", "group", "multi_label", "method", "model", "template", "top_k"];

const problemsOf = (state, name) => (state.problem?.errors ?? []).filter(({ field }) => field.split(".")[0] === name);

const invalid = (state, name) => (problemsOf(state, name).length ? "true" : nothing);

const describedBy = (state, name) => (problemsOf(state, name).length ? `${name}-problem` : nothing);

function fieldProblem(state, name) {
  const found = problemsOf(state, name);
  return found.length ? html`<p id=${`${name}-problem`} class="field-problem">${found.map(({ problem }) => problem).join(" ")}</p>` : nothing;
}

function problemText({ problem }) {
  const marked = problem.errors.filter(({ field }) => CONTROLS.includes(field.split(".")[0]));
  if (!marked.length) return problem.message;
  const others = problem.errors.filter((entry) => !marked.includes(entry)).map(({ field, problem: text }) => `${field}: ${text}`);
  return [`${countText(marked.length, "entry is", "entries are")} invalid; see the message next to it.`, ...others].join(" ");
}

// --- running -------------------------------------------------------------------------------------------------------------

function classifyButton(state, actions) {
  if (!state.pictures.length) return nothing;
  const question = questionOf(state);
  const waiting = state.pictures.filter((picture) => !picture.isWanted || picture.failure || needsRequest(picture, question)).length;
  if (state.isStarting || (state.run && !state.run.isStopped)) return html`<p class="go"><button id="classify" type="submit" disabled>${state.isStarting || state.run.wait ? "Waiting for the server…" : "Classifying…"}</button></p>`;
  if (state.isLive && question && !waiting) return html`<p class="go hint" id="up-to-date">Results follow your labels. <button id="to-results" type="button" class="link" @click=${actions.toResults}>See them</button></p>`;
  const count = question ? waiting : state.pictures.length;
  return html`<p class="go"><button id="classify" type="submit">${state.run?.isStopped ? "Continue" : `Classify ${countText(count, "image")}`}</button></p>`;
}

function progress(state, actions) {
  const found = progressOf(state, performance.now());
  if (!found) return nothing;
  const wait = state.run.wait;
  const left = found.secondsLeft === null || found.isStopped || wait ? "" : ` · ${durationText(found.secondsLeft)} left`;
  return html`<div class="progress" role="group" aria-label="Progress">
    <progress max=${found.total} .value=${found.done} aria-label="Images classified"></progress>
    <span>${found.isStopped ? "Stopped at " : ""}${found.done.toLocaleString("en")} of ${found.total.toLocaleString("en")}${left}</span>
    ${found.isStopped ? html`<button id="resume" type="button" @click=${actions.resume}>Continue</button>` : html`<button id="stop" type="button" class="secondary" @click=${actions.stop}>Stop</button>`}
    ${wait ? html`<p id="wait" class="note">${waitText(wait, Date.now())}</p>` : nothing}
  </div>`;
}

function notices(state, actions) {
  const question = questionOf(state);
  const failed = state.pictures.filter((picture) => picture.failure);
  const stale = state.pictures.filter((picture) => isStale(picture, question)).length;
  const alone = state.pictures.some((picture) => picture.result && !picture.result.error && isAlone(picture));
  const weak = state.pictures.filter((picture) => picture.result?.weak_match);
  const reason = weak[0]?.result.warnings.find(isOfWeakMatch);
  return html`
    ${reason ? html`<p id="weak" class="note">${countText(weak.length, "image has", "images have")} no good fit. ${sentence(reason)} Add labels that fit.</p>` : nothing}
    ${failed.length ? html`<div class="problem with-button" role="alert"><span>${countText(failed.length, "image was", "images were")} not classified. ${failed[0].failure.message}</span><button id="retry" type="button" class="secondary" @click=${actions.retry}>Try again</button></div>` : nothing}
    ${stale && !state.run && !state.isLive ? html`<p class="note">These results are for earlier labels. Press Classify to update them.</p>` : nothing}
    ${stale && !question ? html`<p class="note">These results are for earlier labels. Add a label to update them.</p>` : nothing}
    ${alone ? html`<p class="note">With a single label there is no score, because nothing competes with it. The images are compared by their similarity to it.</p>` : nothing}
    ${state.answer?.priors ? html`<p id="priors" class="note">The scores use the priors of the label set: how often its images show each class.</p>` : nothing}
    ${commonWarnings(state).filter((warning) => !(alone && warning.includes("only one label"))).map((warning) => html`<p class="note">${sentence(warning)}</p>`)}`;
}

// --- results -------------------------------------------------------------------------------------------------------------

function toolbar(state, actions) {
  if (!state.pictures.some((picture) => picture.result || picture.failure)) return nothing;
  return html`<div class="toolbar">
    ${filters(state, actions)}
    <div class="tools">
      ${state.pictures.length >= MIN_FOR_SEARCH ? html`<input id="search-files" type="search" aria-label="Search file names" placeholder="Search file names" .value=${live(state.search)} @input=${(event) => actions.set({ search: event.target.value })}>` : nothing}
      <label class="tool-field">Sort by <select id="order" @change=${(event) => actions.set({ order: event.target.value })}>${Object.entries(ORDERS).map(([value, text]) => html`<option value=${value} .selected=${live(value === state.order)}>${text}</option>`)}</select></label>
      ${threshold(state, actions)}
      <div class="tool-actions">
      <div class="segments" role="radiogroup" aria-label="Layout">${Object.entries(LAYOUTS).map(([value, text]) => html`<label><input type="radio" name="layout" .value=${value} .checked=${live(state.layout === value)} @change=${() => actions.set({ layout: value })}><span>${text}</span></label>`)}</div>
      <button type="button" id="compare" class="secondary" @click=${actions.compareTwo}>Compare</button>
      ${downloads(state, actions)}
      </div>
    </div>
  </div>`;
}

function filters(state, actions) {
  const counts = groupCounts(state), names = { all: "All", none: "None of these", errors: "Errors", waiting: "Waiting" };
  const labels = [...counts.keys()].filter((group) => group.startsWith("label:"));
  const chips = ["all", ...labels.slice(0, MAX_FILTER_CHIPS), ...["none", "errors", "waiting"].filter((group) => counts.has(group))];
  const more = labels.slice(MAX_FILTER_CHIPS);
  const text = (group) => names[group] ?? group.slice("label:".length);
  const count = (group) => (group === "all" ? state.pictures.length : counts.get(group));
  return html`<div class="filters" role="group" aria-label="Show">
    ${chips.map((group) => html`<button type="button" class="filter" data-group=${group} aria-pressed=${state.filter === group ? "true" : "false"} @click=${() => actions.set({ filter: group })}>${text(group)} <span class="count">${count(group).toLocaleString("en")}</span></button>`)}
    ${more.length ? html`<select aria-label="Further labels" @change=${(event) => actions.set({ filter: event.target.value })}><option value="all">${countText(more.length, "further label")}</option>${more.map((group) => html`<option value=${group} .selected=${live(state.filter === group)}>${text(group)} (${count(group)})</option>`)}</select>` : nothing}
  </div>`;
}

function threshold(state, actions) {
  const rejected = state.pictures.filter((picture) => picture.result && !picture.result.error && isRejected(state, picture.result)).length;
  const severalLabels = hasSeveralLabels(state);
  const automatic = state.source === "none" || severalLabels ? nothing : html`<label class="tool-field"><input id="reject-auto" type="checkbox" .checked=${live(Boolean(state.options.reject))} @change=${(event) => actions.setAutomaticRejection(event.target.checked)}> automatic</label>`;
  const isAutomatic = automatic !== nothing && state.options.reject;
  return html`<div class="tool-field" role="group" aria-labelledby="none-of-these"><span id="none-of-these">${severalLabels ? "Labels" : "None of these"}</span>${automatic}${isAutomatic ? nothing : html`<label class="tool-field threshold">${severalLabels ? "from" : "below"} <input id="threshold" type="range" min="0" max="0.99" step="0.01" .value=${live(String(state.threshold))} aria-valuetext=${percent(state.threshold)} @input=${(event) => actions.setThreshold(Number(event.target.value))}><output>${state.threshold ? html`${percent(state.threshold)} · ${countText(rejected, "image")}` : "off"}</output></label>`}</div>`;
}

const FILES = { csv: "one row per label, for spreadsheets", json: "everything, for programs", zip: "the images in one folder per label" };

function downloads(state, actions) {
  const problem = downloadProblem(state);
  return html`<details class="menu" @keydown=${actions.menuKey}>
    <summary class="button secondary">Download</summary>
    <div class="menu-items">
      <p id="download-problem" class="hint" role="status">${problem}</p>
      ${Object.entries(FILES).map(([kind, text]) => html`<button type="button" ?disabled=${Boolean(problem)} @click=${() => actions.download(kind)}>${kind.toUpperCase()} <span>${text}</span></button>`)}
    </div>
  </details>`;
}

// --- link and code -------------------------------------------------------------------------------------------------------

function links(state, actions) {
  if (!questionOf(state)) return nothing;
  const names = state.pictures.length ? state.pictures.map((picture) => picture.name) : ["image.jpg"];
  const fields = [...requestFields(state), ...(state.threshold ? [["reject_below", state.threshold]] : [])];
  return html`<div class="side-links">
    <button id="copy-link" type="button" class="link" @click=${actions.copyLink}>Copy a link to these labels</button>
    ${state.sharedLink ? html`<p role="status" class="hint">${state.sharedLink === true ? "Copied." : html`<input readonly aria-label="Link" .value=${state.sharedLink}>`}</p>` : nothing}
    <details id="code">
      <summary>Use from code</summary>
      <h3>curl <button type="button" class="copy secondary small" @click=${actions.copyCode}>Copy</button></h3>
      <pre id="curl" tabindex="0">${curlCode(names, fields)}</pre>
      <h3>Python <button type="button" class="copy secondary small" @click=${actions.copyCode}>Copy</button></h3>
      <pre id="python" tabindex="0">${pythonCode(names, fields)}</pre>
    </details>
  </div>`;
}
