// The comparison of all methods on the labelled example images: the job, its leaderboard, its confusion matrices.
import { at, counted, create, option, percent } from "./elements.js";
import { ask, json } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { followed, stop } from "./jobs.js";
import { catalogue } from "./catalogue.js";
import { labelledCount } from "./examples.js";
import { matrix } from "./matrix.js";

let labelSet = "";
let running = null;

const path = () => `v1/label-sets/${encodeURIComponent(labelSet)}`;

/** Use a label set; the comparison for another label set is removed. */
export function evaluateFor(name) {
  if (name === labelSet) return;
  labelSet = name;
  running = null;
  clearRefusal(at("evaluate-error"));
  at("evaluation").hidden = at("evaluate-progress").hidden = at("stop-evaluate").hidden = true;
  at("evaluate-status").textContent = "";
  at("evaluate").disabled = false;
}

async function evaluate() {
  const name = labelSet;
  clearRefusal(at("evaluate-error"));
  if (!labelledCount()) {
    at("evaluate-status").textContent = "There are no labelled example images yet. Open a class above and add some.";
    return;
  }
  at("evaluate").disabled = true;
  at("evaluate-status").textContent = "Comparing…";
  try {
    const job = await ask(`${path()}:evaluate`, json("POST", {}));
    if (name !== labelSet) return;
    running = job;
    at("stop-evaluate").hidden = at("evaluate-progress").hidden = false;
    const result = await followed(job, (state) => { if (running === job) showProgress(state); });
    const { methods } = await catalogue();
    if (name === labelSet) showEvaluation(result, new Set(methods.filter((each) => each.control).map((each) => each.name)));
  } catch (refusal) {
    if (name !== labelSet) return;
    at("evaluate-status").textContent = "";
    showRefusal(refusal, at("evaluate-error"));
  } finally {
    if (name === labelSet) {
      running = null;
      at("evaluate").disabled = false;
      at("stop-evaluate").hidden = at("evaluate-progress").hidden = true;
    }
  }
}

function showProgress(job) {
  const progress = at("evaluate-progress");
  if (job.total) Object.assign(progress, { max: job.total, value: job.done });
  else progress.removeAttribute("value");
  at("evaluate-status").textContent = job.total ? `Comparing: step ${job.done} of ${job.total}…` : "Comparing…";
}

function showEvaluation(result, controls) {
  const held = result.folds ? ` by cross-validation (${result.folds} folds)` : "";
  at("evaluate-status").textContent = `Compared on ${counted(result.images, "image")}${held}, model ${result.model}.`;
  at("verdict").replaceChildren(...result.verdict.map((sentence) => create("p", { textContent: sentence })));
  const methods = [...result.methods].sort((one, other) => other.evaluation.top1 - one.evaluation.top1);
  at("leaderboard").tBodies[0].replaceChildren(...methods.map((each) => row(each, controls.has(each.method))));
  at("not-run").hidden = !result.not_run.length;
  at("not-run-list").replaceChildren(...result.not_run.map((each) => create("li", { textContent: each })));
  at("confusion-of").replaceChildren(...methods.map((each) => option(each.method)));
  at("confusion-of").onchange = () => showConfusion(methods);
  showConfusion(methods);
  at("evaluation").hidden = false;
}

function row(each, isControl) {
  const name = create("th", { scope: "row" }, each.method);
  if (isControl) name.append(create("span", { className: "hint", textContent: " control with random words" }));
  for (const warning of each.warnings) name.append(create("span", { className: "hint aside", textContent: warning }));
  const [low, high] = each.interval;
  const drawn = create("div", { className: "interval", "aria-hidden": "true" }, create("i", { className: "fill" }), create("i", { className: "range" }));
  drawn.children[0].style.width = `${100 * each.evaluation.top1}%`;
  drawn.children[1].style.left = `${100 * low}%`;
  drawn.children[1].style.width = `${100 * (high - low)}%`;
  const accuracy = `${(100 * each.evaluation.top1).toFixed(1)} % (${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)})`;
  return create(
    "tr", {}, name, create("td", { className: "accuracy" }, drawn, create("span", { textContent: accuracy })), create("td", { textContent: gain(each.to_baseline) }),
    create("td", { textContent: each.prompts_per_class.toFixed(each.prompts_per_class % 1 ? 1 : 0) }), create("td", { textContent: each.ms_per_image.toFixed(2) }),
  );
}

function gain(difference) {
  if (!difference) return "–";
  const points = 100 * difference.mean;
  const p = difference.p < 0.001 ? "p < 0.001" : `p = ${difference.p.toFixed(difference.p < 0.1 ? 3 : 2)}`;
  return `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(1)} points, ${p}`;
}

function showConfusion(methods) {
  const { method, evaluation } = methods.find((each) => each.method === at("confusion-of").value);
  const names = evaluation.classes.map((each) => each.name);
  at("held-out-confusion").replaceChildren(...matrix(names, evaluation.confusion, `Predictions of ${method}, ${percent(evaluation.top1)} correct`));
}

/** Register the event handlers. */
export function startEvaluate() {
  at("evaluate").onclick = evaluate;
  at("stop-evaluate").onclick = async () => {
    try {
      if (running) await stop(running);
    } catch (refusal) {
      showRefusal(refusal, at("evaluate-error"));
    }
  };
}
