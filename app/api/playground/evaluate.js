// The evaluation on the labelled example images: the job, and the comparison of all methods, or the scores of the labels.
import { byId, countText, create, option, percent } from "./elements.js";
import { requestJson, jsonOptions, pathOf } from "./requests.js";
import { clearRequestError, showRequestError } from "./request_errors.js";
import { waitForJob, cancelJob } from "./jobs.js";
import { watchJobs } from "./job_list.js";
import { catalogue } from "./catalogue.js";
import { labelledCount } from "./examples.js";
import { matrix } from "./matrix.js";
import { labelTables } from "./label_tables.js";

let labelSet = "";
let latestRun = 0;
let running = null;

const path = () => pathOf("label-sets", labelSet);

/** Use a label set; the evaluation of another label set is removed. */
export function setEvaluatedLabelSet(name) {
  if (name === labelSet) return;
  labelSet = name;
  running = null;
  clearRequestError(byId("evaluate-error"));
  byId("evaluation").hidden = byId("label-evaluation").hidden = byId("evaluate-progress").hidden = byId("stop-evaluate").hidden = true;
  byId("evaluate-status").textContent = "";
  byId("evaluate").disabled = false;
}

async function evaluate() {
  const name = labelSet;
  clearRequestError(byId("evaluate-error"));
  if (labelledCount() === 0) {
    byId("evaluate-status").textContent = "There are no labelled example images yet. Open a class above and add some.";
    return;
  }
  latestRun += 1;
  const run = latestRun, isOld = () => run !== latestRun || name !== labelSet;
  byId("evaluate").disabled = true;
  byId("evaluate-status").textContent = "Evaluating…";
  try {
    const { methods } = await catalogue(); // before the job: without them, its result could not be shown
    if (isOld()) return;
    const job = await requestJson(`${path()}:evaluate`, jsonOptions("POST", {}));
    watchJobs();
    if (isOld()) return;
    running = job;
    byId("stop-evaluate").hidden = byId("evaluate-progress").hidden = false;
    const result = await waitForJob(job, (state) => { if (running === job) showProgress(state); });
    if (isOld()) return;
    byId("evaluation").hidden = !result.methods;
    byId("label-evaluation").hidden = Boolean(result.methods);
    if (result.methods) showEvaluation(result, new Set(methods.filter((entry) => entry.control).map((entry) => entry.name)));
    else showLabels(result);
  } catch (requestError) {
    if (isOld()) return;
    byId("evaluate-status").textContent = "";
    showRequestError(requestError, byId("evaluate-error"));
  } finally {
    if (!isOld()) {
      running = null;
      byId("evaluate").disabled = false;
      byId("stop-evaluate").hidden = byId("evaluate-progress").hidden = true;
    }
  }
}

function showProgress(job) {
  const progress = byId("evaluate-progress");
  if (job.total) Object.assign(progress, { max: job.total, value: job.done });
  else progress.removeAttribute("value");
  byId("evaluate-status").textContent = job.total ? `Evaluating: step ${job.done} of ${job.total}…` : "Evaluating…";
}

function showEvaluation(result, controls) {
  const validation = result.folds ? ` by cross-validation (${result.folds} folds)` : "";
  byId("evaluate-status").textContent = `Compared on ${countText(result.images, "image")}${validation}, model ${result.model}.`;
  byId("verdict").replaceChildren(...result.verdict.map((sentence) => create("p", { textContent: sentence })));
  const methods = [...result.methods].sort((one, other) => other.evaluation.top1 - one.evaluation.top1);
  byId("leaderboard").tBodies[0].replaceChildren(...methods.map((entry) => row(entry, controls.has(entry.method))));
  byId("not-run").hidden = !result.not_run.length;
  byId("not-run-list").replaceChildren(...result.not_run.map((entry) => create("li", { textContent: entry })));
  byId("confusion-of").replaceChildren(...methods.map((entry) => option(entry.method)));
  byId("confusion-of").onchange = () => showConfusion(methods);
  showConfusion(methods);
}

/** Show how well the labels of images that may have several are found. */
function showLabels(result) {
  byId("evaluate-status").textContent = `Measured on ${countText(result.images, "image")}, model ${result.model}.`;
  byId("label-evaluation").replaceChildren(...labelTables(result));
}

function row(entry, isControl) {
  const name = create("th", { scope: "row" }, entry.method);
  if (isControl) name.append(create("span", { className: "hint", textContent: " control with random words" }));
  for (const warning of entry.warnings) name.append(create("span", { className: "hint aside", textContent: warning }));
  const [low, high] = entry.interval;
  const interval = create("div", { className: "interval", "aria-hidden": "true" }, create("i", { className: "fill" }), create("i", { className: "range" }));
  interval.children[0].style.width = `${100 * entry.evaluation.top1}%`;
  interval.children[1].style.left = `${100 * low}%`;
  interval.children[1].style.width = `${100 * (high - low)}%`;
  const accuracy = `${(100 * entry.evaluation.top1).toFixed(1)} % (${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)})`;
  return create(
    "tr", {}, name, create("td", { className: "accuracy" }, interval, create("span", { textContent: accuracy })), create("td", { textContent: gain(entry.to_baseline) }),
    create("td", { textContent: entry.prompts_per_class.toFixed(entry.prompts_per_class % 1 ? 1 : 0) }), create("td", { textContent: entry.ms_per_image.toFixed(2) }),
  );
}

function gain(difference) {
  if (!difference) return "–";
  const points = 100 * difference.mean;
  const p = difference.p < 0.001 ? "p < 0.001" : `p = ${difference.p.toFixed(difference.p < 0.1 ? 3 : 2)}`;
  return `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(1)} points, ${p}`;
}

function showConfusion(methods) {
  const { method, evaluation } = methods.find((entry) => entry.method === byId("confusion-of").value);
  const names = evaluation.classes.map((entry) => entry.name);
  const shown = matrix(names, evaluation.confusion, `Predictions of ${method}, ${percent(evaluation.top1)} correct`);
  const rest = evaluation.confusion_count - evaluation.confusion.length;
  if (rest > 0) shown.push(create("p", { className: "hint", textContent: `${countText(rest, "further cell has", "further cells have")} fewer images and ${rest === 1 ? "is" : "are"} not shown.` }));
  byId("held-out-confusion").replaceChildren(...shown);
}

/** Register the event handlers. */
export function startEvaluate() {
  byId("evaluate").onclick = evaluate;
  byId("stop-evaluate").onclick = async () => {
    try {
      if (running) await cancelJob(running);
    } catch (requestError) {
      showRequestError(requestError, byId("evaluate-error"));
    }
  };
}
