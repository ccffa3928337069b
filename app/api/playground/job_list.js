// The background jobs that run, on every view: their progress, a button that stops each, and those that have failed.
import { create } from "./elements.js";
import { requestJson } from "./requests.js";
import { cancelJob } from "./jobs.js";

const WAIT_MS = 1000;
const LIMIT = 50; // of the newest jobs
// Most jobs that follow new example images end within a second; the list shows those that do not.
const POLLS_BEFORE_SHOWN = 2;

const NAMES = {
  "build-captions": (job) => `Caption database ${job.database}`, evaluate: (job) => `Evaluation, ${job.label_set}`, "select-method": (job) => `Choice of a method, ${job.label_set}`,
  "import-images": (job) => `Import of images, ${job.label_set}`, describe: (job) => `Descriptions of ${job.label_set}`,
};
const isRunning = (job) => ["queued", "running"].includes(job.status);

let polls = new Map(); // by the id of each running job, how often it was seen
let isExpecting = false; // a job was started, and the jobs were not read since
let latestRequest = 0;
let running = []; // those in the list
const refusals = new Map(); // by the id of a job, why it could not be stopped
let failed = []; // jobs that ran while the page was open
let listeners = [];
let timer = null;
let place = null; // {details, summary, list}

/** Call a function with the newest jobs whenever they are read. */
export const onJobs = (listener) => listeners.push(listener);

/** Add the list to the page. */
export function startJobs() {
  const summary = create("summary", { textContent: "Jobs" });
  const list = create("ul", { className: "plain" });
  const clear = create("button", { type: "button", className: "quiet", textContent: "clear failed jobs" });
  const details = create("details", { className: "jobs", "aria-label": "Jobs", hidden: true }, summary, list, clear);
  place = { details, summary, list, clear };
  clear.onclick = () => {
    failed = [];
    show();
  };
  document.body.append(details);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) readJobs(); });
  readJobs();
}

/** Read the jobs now, and again while one is unfinished; call it after a job was started. */
export function watchJobs() {
  isExpecting = true;
  return readJobs();
}

async function readJobs() {
  latestRequest += 1;
  const request = latestRequest;
  clearTimeout(timer);
  let jobs;
  try {
    ({ jobs } = await requestJson(`v1/jobs?limit=${LIMIT}`));
  } catch (error) {
    // The views show why the server refuses requests. One that is busy or starts again is asked again while jobs run.
    const isRefused = error.status >= 400 && error.status < 500 && error.status !== 429;
    if (request !== latestRequest) return;
    if ((polls.size || isExpecting) && !isRefused && !document.hidden) timer = setTimeout(readJobs, Math.max(WAIT_MS, 1000 * (error.retryAfterS ?? 0)));
    return;
  }
  if (request !== latestRequest) return; // a later call knows of later jobs
  isExpecting = false;
  const unfinished = jobs.filter(isRunning);
  failed.unshift(...jobs.filter((job) => job.status === "failed" && polls.has(job.id)));
  polls = new Map(unfinished.map((job) => [job.id, (polls.get(job.id) ?? 0) + 1]));
  running = unfinished.filter((job) => polls.get(job.id) >= POLLS_BEFORE_SHOWN);
  show();
  if (unfinished.length && !document.hidden) timer = setTimeout(readJobs, WAIT_MS);
  for (const listener of listeners) listener(jobs);
}

function show() {
  place.details.hidden = !running.length && !failed.length;
  document.body.classList.toggle("has-jobs", !place.details.hidden);
  place.clear.hidden = !failed.length;
  place.details.classList.toggle("failed", failed.length > 0);
  const parts = [...(running.length ? [`${running.length} running${running.length === 1 ? progressText(running[0]) : ""}`] : []), ...(failed.length ? [`${failed.length} failed`] : [])];
  place.summary.textContent = `Jobs: ${parts.join(", ")}`;
  const focused = document.activeElement?.dataset.job;
  place.list.replaceChildren(...running.map(runningRow), ...failed.map(failedRow));
  if (focused) (place.list.querySelector(`[data-job="${CSS.escape(focused)}"]`) ?? place.summary).focus();
}

const progressText = (job) => (job.total ? `, ${Math.floor((100 * job.done) / job.total)} %` : "");

const nameOf = (job) => NAMES[job.kind]?.(job) ?? job.kind;

function runningRow(job) {
  const progress = create("progress", { "aria-label": `Progress: ${nameOf(job)}` });
  if (job.total) Object.assign(progress, { max: job.total, value: job.done });
  const stop = create("button", { type: "button", className: "secondary", textContent: "Stop", "aria-label": `Stop: ${nameOf(job)}` });
  stop.dataset.job = job.id;
  const refused = create("p", { className: "field-problem", textContent: refusals.get(job.id) ?? "", hidden: !refusals.has(job.id) });
  stop.onclick = async () => {
    refusals.delete(job.id);
    try {
      await cancelJob(job);
      await watchJobs();
    } catch (error) {
      refusals.set(job.id, error.message); // the rows are drawn again at every poll
      show();
    }
  };
  const state = job.status === "queued" ? "waiting" : job.total ? `step ${job.done.toLocaleString("en")} of ${job.total.toLocaleString("en")}` : "running";
  return create("li", {}, create("span", { className: "job-name", textContent: nameOf(job) }), stop, progress, create("span", { className: "hint", textContent: state }), refused);
}

function failedRow(job) {
  return create("li", {}, create("span", { className: "job-name", textContent: nameOf(job) }), create("span", { className: "field-problem", textContent: `failed: ${job.error}` }));
}
