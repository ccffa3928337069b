// The results of pictures as cards, as a grid, or as a table; and the bars that other views share.
import { create, scoreText } from "./elements.js";
import { html, nothing, repeat } from "./lit.js";
import { commonWarnings, isAlone, isOfWeakMatch, isStale, labelsOf, questionOf, shownPictures, verdictOf } from "./classify_state.js";

/** Return a row of a bar chart: a text on a bar, and a figure after it. */
export function bar(text, share, figure, title = "") {
  const fill = create("i");
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return create(
    "li", {}, create("div", { className: "bar", title }, fill, create("span", { textContent: text })), create("span", { className: "score", textContent: figure }),
  );
}

const RUNNERS_UP = 2;

/** Return the template of all pictures that are shown, in the layout of the state. */
export function gallery(state, actions) {
  const shown = shownPictures(state), question = questionOf(state);
  const context = { state, actions, question, common: commonWarnings(state) };
  if (!shown.length) return html`<p class="nothing">No image matches. <button type="button" class="link" @click=${actions.showAll}>Show all images</button></p>`;
  if (state.layout === "table") return table(shown, context);
  const item = state.layout === "grid" ? tile : card;
  return html`<ul class="gallery ${state.layout}" aria-label="Images">${repeat(shown, (picture) => picture.id, (picture) => item(picture, context))}</ul>`;
}

const classes = (picture, verdict, context) => `${verdict.kind}${isStale(picture, context.question) ? " stale" : ""}`;

function card(picture, context) {
  const verdict = verdictOf(context.state, picture);
  return html`<li class="card ${classes(picture, verdict, context)}">
    ${shot(picture, context)}
    <div class="card-body">
      ${staleTag(picture, context)}
      <p class="verdict"><strong>${verdict.title}</strong>${score(picture, verdict)}</p>
      ${verdict.note ? html`<p class="verdict-note">${verdict.note}</p>` : nothing}
      ${runnersUp(picture, verdict, context)}
      ${warnings(picture, context)}
      <p class="file-name" title=${picture.path}>${picture.name}</p>
      ${verdict.kind === "failed" ? html`<button type="button" class="secondary small" @click=${context.actions.retry}>Try again</button>` : nothing}
      ${picture.result && !picture.result.error ? explanation(picture, context) : nothing}
      ${wrong(picture, context)}
    </div>
  </li>`;
}

/** Return the button that corrects a label; a picture without a file cannot become an example. */
function wrong(picture, { state, actions }, text = "Wrong? It is …") {
  if (!picture.file || state.source === "none" || !picture.result || picture.result.error || picture.failure) return nothing;
  return html`<button type="button" class="link wrong" aria-label=${`Correct the label of ${picture.name}`} title="Wrong? It is …" @click=${() => actions.correct(picture)}>${text}</button>`;
}

function tile(picture, context) {
  const verdict = verdictOf(context.state, picture);
  return html`<li class="tile-item ${classes(picture, verdict, context)}">
    ${shot(picture, context)}
    <p class="caption" title=${`${picture.path}${verdict.note ? `: ${verdict.note}` : ""}`}><strong>${verdict.title}</strong>${score(picture, verdict)}</p>
    ${staleTag(picture, context)}
    ${wrong(picture, context, "Wrong?")}
  </li>`;
}

function table(shown, context) {
  return html`<div class="scroll" role="region" aria-label="Results as a table" tabindex="0">
    <table class="results-table">
      <thead><tr><th scope="col">Image</th><th scope="col">File</th><th scope="col">Verdict</th><th scope="col" class="number">Score</th><th scope="col">Runner-up</th><th scope="col" class="number">Similarity</th><th scope="col"><span class="visually-hidden">Correct or remove</span></th></tr></thead>
      <tbody>${repeat(shown, (picture) => picture.id, (picture) => tableRow(picture, context))}</tbody>
    </table>
  </div>`;
}

function tableRow(picture, context) {
  const verdict = verdictOf(context.state, picture);
  const [best, ...others] = picture.result?.predictions ?? [];
  const second = verdict.labels ? others.find(({ label }) => !verdict.labels.includes(label)) : others[0];
  return html`<tr class=${classes(picture, verdict, context)}>
    <td>${openButton(picture, context)}</td>
    <th scope="row" class="path">${picture.path}</th>
    <td><strong>${verdict.title}</strong>${verdict.note ? html`<span class="aside">${verdict.note}</span>` : nothing}${staleTag(picture, context)}</td>
    <td class="number">${best && !isAlone(picture) ? scoreText(best.score) : ""}</td>
    <td>${second ? html`${second.label} <span class="quiet-figure">${scoreText(second.score)}</span>` : nothing}</td>
    <td class="number">${best ? best.similarity.toFixed(2) : ""}</td>
    <td class="row-tools">${wrong(picture, context, "Wrong?")}${removeButton(picture, context)}</td>
  </tr>`;
}

// --- parts -------------------------------------------------------------------------------------------------------------

const shot = (picture, context) => html`<div class="shot">${openButton(picture, context)}${removeButton(picture, context)}</div>`;

function openButton(picture, { actions }) {
  const suffix = picture.name.split(".").at(-1).slice(0, 5).toUpperCase();
  return html`<button type="button" class="open" aria-label=${`Enlarge ${picture.name}`} @click=${() => actions.open(picture)}>
    ${picture.url ? html`<img src=${picture.url} alt="" loading="lazy" decoding="async">` : html`<span class="no-preview">${picture.remoteUrl ? "URL" : picture.hasNoThumbnail ? suffix : ""}</span>`}
  </button>`;
}

const removeButton = (picture, { actions }) => html`<button type="button" class="remove" aria-label=${`Remove ${picture.name}`} title="Remove" @click=${() => actions.remove(picture)}>×</button>`;

const staleTag = (picture, context) => (isStale(picture, context.question) ? html`<span class="stale-tag">earlier labels</span>` : nothing);

/** Return the score behind a verdict; a single label has none, because it is 1 whatever the image shows. */
function score(picture, { kind, labels }) {
  if (labels) return nothing; // the bars below show the score of each
  if (kind !== "match" && kind !== "close") return nothing;
  return html` <span class="score">${scoreText(picture.result.predictions[0].score)}</span>`;
}

function runnersUp(picture, { kind, labels }, { state }) {
  if (!picture.result?.predictions.length || isAlone(picture)) return nothing;
  // A verdict that names no label shows the scores of all of the best ones.
  const from = kind === "match" && !labels ? 1 : 0, all = picture.result.predictions, above = labelsOf(state, picture.result) ?? [];
  const shown = all.slice(from, from + Math.max(RUNNERS_UP, above.length + 1, state.options.topK === 5 ? RUNNERS_UP : state.options.topK - 1));
  if (!shown.length) return nothing;
  return html`<ol class="runners" aria-label=${from ? "Runners-up" : "Best labels"}>${shown.map((entry) => html`<li title=${`cosine similarity ${entry.similarity.toFixed(3)}`}>
    <span class="runner">${above.includes(entry.label) ? `✓ ${entry.label}` : entry.label}</span><span class="track"><i .style=${`width: ${100 * entry.score}%`}></i></span><span class="score">${scoreText(entry.score)}</span>
  </li>`)}</ol>`;
}

const warnings = (picture, { common }) => (picture.result?.warnings ?? []).filter((warning) => !common.includes(warning) && !isOfWeakMatch(warning)).map((warning) => html`<p class="verdict-note">${sentence(warning)}</p>`);

/** Return a text of the server as a sentence. */
export const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// --- the explanation of a result -----------------------------------------------------------------------------------------

function explanation(picture, { actions }) {
  const { explanation: found } = picture;
  return html`<details class="why" .open=${Boolean(picture.isExplained)} @toggle=${(event) => actions.explain(picture, event.target.open)}>
    <summary>Why?</summary>
    ${!found || found.isLoading ? html`<p class="hint">Loading…</p>` : found.error ? html`<p class="problem">${found.error.message} <button type="button" class="link" @click=${() => actions.explainAgain(picture)}>Try again</button></p>` : explanationBody(found.content, found.words)}
  </details>`;
}

function explanationBody({ labels, captions }, words) {
  const legend = labels.length
    ? "+ supports the label: its prompt is more similar to the image than the prompts of the other label. − opposes it. The figure is the cosine similarity."
    : "Captions that are similar to the image. The figure is the cosine similarity; the labels found in the caption are in brackets.";
  return html`<p class="hint">${legend}</p>
    ${labels.map((entry) => html`<h4>${entry.rival ? `${entry.label}, compared with ${entry.rival}` : entry.label}</h4>
      <ul class="prompts">${entry.supporting.map((prompt) => promptRow("+", "for", prompt.cosine, prompt.prompt))}${entry.opposing.map((prompt) => promptRow("−", "against", prompt.cosine, prompt.prompt))}</ul>`)}
    ${words.length ? html`<h4>Words that are more similar than every label</h4><ul class="prompts">${words.map(({ word, similarity }) => promptRow("", "near", similarity, word))}</ul>` : nothing}
    ${captions.length ? html`<ul class="prompts">${captions.map((entry) => promptRow("", "near", entry.similarity, entry.suggested.length ? `${entry.caption} (${entry.suggested.join(", ")})` : entry.caption))}</ul>` : nothing}`;
}

const MEANINGS = { "+": "supports the label", "−": "opposes the label" };

const promptRow = (sign, kind, cosine, text) => html`<li class=${kind}><span><span aria-hidden="true">${sign}</span><span class="visually-hidden">${MEANINGS[sign] ?? ""}</span></span><span>${cosine.toFixed(3)}</span><span>${text}</span></li>`;
