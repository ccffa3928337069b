// Side by side: the same pictures classified in two ways, with the differences marked and counted.
import { html, render } from "./lit.js";
import { allLabelSets, catalogue } from "./catalogue.js";
import { answerText } from "./classify_state.js";
import { countText, scoreText } from "./elements.js";

const SIDES = ["A", "B"];

/**
 * Show the form of a comparison, and its result, in an element.
 *
 * `pictures` are {name, url}. `classify(pictures, options)` resolves to one result per picture, as in the response of
 * POST /v1/classify; `options` are {method, model, label_set} without those left at their defaults. `labelled` says what
 * classifies without a label set, for example "these 4 labels"; "" if nothing does.
 */
export function compare(container, { pictures, classify, labelled = "these labels" }) {
  const state = {
    choices: { models: [], methods: [], labelSets: [] }, sides: [{}, {}], running: "", problem: "", results: null, onlyDifferences: false,
  };
  const update = (changes) => {
    Object.assign(state, changes);
    render(page(), container);
  };

  const page = () => html`
    <form class="compare-form" @submit=${run}>
      ${SIDES.map((side, index) => choice(side, index))}
      <p class="actions">
        <button type="submit" ?disabled=${Boolean(state.running)}>Compare ${countText(pictures.length, "image")}</button>
        <span role="status" class="hint">${state.running}</span>
      </p>
    </form>
    <p class="problem" role="alert" ?hidden=${!state.problem}>${state.problem}</p>
    ${state.results ? outcome() : ""}`;

  const choice = (side, index) => html`
    <fieldset ?disabled=${Boolean(state.running)}>
      <legend>${side}</legend>
      ${select(index, "method", "Method", "default", ["auto", ...state.choices.methods])}
      ${select(index, "model", "Model", "default", state.choices.models)}
      ${select(index, "label_set", "Labels", labelled || "choose a label set", state.choices.labelSets)}
    </fieldset>`;

  const select = (index, field, label, otherwise, values) => html`
    <label class="field">${label}
      <select @change=${(event) => set(index, field, event.target.value)}>
        <option value="">${otherwise}</option>
        ${values.map((value) => html`<option value=${value} ?selected=${state.sides[index][field] === value}>${value}</option>`)}
      </select>
    </label>`;

  function set(index, field, value) {
    state.sides[index] = { ...state.sides[index], [field]: value };
    update({ results: null });
  }

  async function run(event) {
    event.preventDefault();
    const [one, other] = state.sides.map(given);
    if (JSON.stringify(one) === JSON.stringify(other)) {
      update({ problem: "A and B are the same. Choose another method, model or label set for one of them.", results: null });
      return;
    }
    if (!labelled && !(one.label_set && other.label_set)) {
      update({ problem: "Choose a label set for both.", results: null });
      return;
    }
    update({ problem: "", results: null });
    try {
      const results = [];
      for (const [index, options] of [one, other].entries()) {
        update({ running: `Classifying with ${SIDES[index]}…` });
        results.push(await classify(pictures, options));
      }
      update({ running: "", results });
      container.querySelector(".compare-summary").focus();
    } catch (error) {
      update({ running: "", problem: error.message });
    }
  }

  const outcome = () => {
    const pairs = pictures.map((picture, index) => pairOf(picture, state.results[0][index], state.results[1][index]));
    const shown = state.onlyDifferences ? pairs.filter((pair) => pair.differs) : pairs;
    return html`
      <p class="compare-summary" tabindex="-1">${summary(pairs)}</p>
      <label><input type="checkbox" .checked=${state.onlyDifferences} @change=${(event) => update({ onlyDifferences: event.target.checked })}> only images that differ</label>
      <div class="scroll" role="region" aria-label="Comparison" tabindex="0">
        <table class="compare-table">
          <thead><tr><th scope="col">image</th>${SIDES.map((side, index) => html`<th scope="col">${side}: ${described(state.sides[index])}</th>`)}<th scope="col"></th></tr></thead>
          <tbody>${shown.map(row)}</tbody>
        </table>
      </div>`;
  };

  const described = (side) => Object.values(given(side)).join(", ") || "defaults";

  update({});
  Promise.all([catalogue(), allLabelSets()]).then(
    ([{ models, methods }, labelSets]) => update({
      choices: {
        models: models.map((entry) => entry.name), labelSets: labelSets.map((entry) => entry.name),
        methods: methods.filter((entry) => !entry.vocabulary_free).map((entry) => entry.name),
      },
    }),
    (error) => update({ problem: error.message }),
  );
}

const given = (side) => Object.fromEntries(Object.entries(side).filter(([, value]) => value));

/** Return the answers of both sides for a picture: {picture, sides: [{label, score, problem}], differs, surer}. */
function pairOf(picture, ...results) {
  const sides = results.map((result) => {
    const [best] = result.predictions ?? [];
    if (result.error || !best) return { label: "", score: 0, problem: result.error?.detail ?? "no prediction" };
    return { label: answerText(result), score: best.score, problem: "" };
  });
  const failed = sides.some((side) => side.problem);
  const gap = sides[0].score - sides[1].score;
  return { picture, sides, failed, differs: !failed && sides[0].label !== sides[1].label, surer: failed || Math.abs(gap) < 0.005 ? -1 : Number(gap < 0) };
}

/** Return the comparison in a sentence. */
export function summary(pairs) {
  const compared = pairs.filter((pair) => !pair.failed), differing = compared.filter((pair) => pair.differs);
  const surer = SIDES.map((side, index) => [side, differing.filter((pair) => pair.surer === index).length]).filter(([, count]) => count);
  const parts = [differing.length ? `${differing.length} of ${countText(compared.length, "image")} ${differing.length === 1 ? "differs" : "differ"}` : `All ${countText(compared.length, "image")} get the same label`];
  if (surer.length) parts.push(surer.map(([side, count]) => `${side} is surer on ${count}`).join(", "));
  const failed = pairs.length - compared.length;
  if (failed) parts.push(`${countText(failed, "image")} could not be compared`);
  return `${parts.join("; ")}.`;
}

const row = ({ picture, sides, differs, surer }) => html`
  <tr class=${differs ? "differs" : ""}>
    <th scope="row">${picture.url ? html`<img src=${picture.url} alt="" loading="lazy">` : ""}<span>${picture.name}</span></th>
    ${sides.map((side, index) => html`<td>${side.problem ? html`<span class="hint">${side.problem}</span>` : html`<span class=${index === surer ? "surer" : ""}>${side.label}</span> <span class="score">${scoreText(side.score)}</span>`}</td>`)}
    <td>${differs ? html`<span class="unequal" aria-hidden="true">≠</span><span class="visually-hidden">differs</span>` : ""}</td>
  </tr>`;
