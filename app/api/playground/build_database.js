// The caption databases that the server can build from words that it has, each with a button that builds it.
import { byId, countText, create } from "./elements.js";
import { jsonOptions, pathOf, requestJson } from "./requests.js";
import { cancelJob } from "./jobs.js";
import { onJobs, watchJobs } from "./job_list.js";

const SOURCES = [
  { name: "everyday", title: "Everyday words", hint: "Names of what everyday photographs show, which come with Deixis. Takes some seconds." },
  { name: "wordnet", title: "Nouns of WordNet", hint: "Rarer words, such as species. Takes some minutes; WordNet must be installed on the server." },
];

const rows = new Map(); // the parts of each row, by the name of its source
let rebuilt = () => {};

/** Show what is built already; `databases` are those of GET /v1/databases. */
export function showBuilt(databases) {
  for (const { name } of SOURCES) {
    const found = databases.find((entry) => entry.name === name);
    const { state, build, stop } = rows.get(name);
    if (!stop.hidden) continue; // it is being built
    build.textContent = found ? "Build again" : "Build";
    build.setAttribute("aria-label", `${build.textContent}: ${name}`);
    if (!found) state.textContent = "Not built yet.";
    else state.textContent = found.problem ? `Cannot be searched: ${found.problem}` : `Built: ${countText(found.captions, "name")}, model ${found.model}.`;
  }
}

/** Add the rows; `done` is called when a database was built. */
export function startBuilding(done) {
  rebuilt = done;
  byId("build-sources").replaceChildren(...SOURCES.map(row));
  onJobs(showProgress);
}

function row({ name, title, hint }) {
  const state = create("p", { className: "hint", role: "status" });
  const build = create("button", { type: "button", className: "secondary", textContent: "Build" });
  const stop = create("button", { type: "button", className: "secondary", textContent: "Stop", "aria-label": `Stop building ${name}`, hidden: true });
  const progress = create("progress", { "aria-label": `Progress of ${name}`, hidden: true });
  const problem = create("p", { className: "problem", role: "alert", hidden: true });
  const parts = { state, build, stop, progress, problem, job: null, isActing: false };
  build.onclick = () => act(parts, async () => follow(parts, await requestJson(pathOf("databases", name), jsonOptions("PUT", { source: name }))));
  stop.onclick = () => act(parts, () => cancelJob(parts.job));
  rows.set(name, parts);
  return create("li", {}, create("div", {}, create("strong", { textContent: title }), create("p", { className: "hint", textContent: hint }), state), create("div", { className: "actions" }, build, stop), progress, problem);
}

async function act(parts, action) {
  if (parts.isActing) return;
  parts.isActing = true;
  parts.problem.hidden = true;
  try {
    await action();
  } catch (error) {
    parts.problem.textContent = error.message;
    parts.problem.hidden = false;
  }
  parts.isActing = false;
  watchJobs();
}

function follow(parts, job) {
  const isRunning = ["queued", "running"].includes(job.status);
  const hadFocus = [parts.build, parts.stop].includes(document.activeElement);
  parts.job = job;
  parts.build.hidden = isRunning;
  parts.stop.hidden = parts.progress.hidden = !isRunning;
  if (hadFocus) (isRunning ? parts.stop : parts.build).focus();
  if (job.total) Object.assign(parts.progress, { max: job.total, value: job.done });
  else parts.progress.removeAttribute("value");
  if (isRunning) parts.state.textContent = job.total ? `Encoding: ${job.done.toLocaleString("en")} of ${job.total.toLocaleString("en")}.` : "Waiting to be built.";
}

/** Follow the newest build of each source, also one that somebody else has started. */
function showProgress(jobs) {
  for (const [name, parts] of rows) {
    const job = jobs.find((entry) => entry.kind === "build-captions" && entry.database === name);
    const wasRunning = parts.job && ["queued", "running"].includes(parts.job.status);
    if (!job || !(wasRunning || ["queued", "running"].includes(job.status))) continue;
    follow(parts, job);
    if (!wasRunning || ["queued", "running"].includes(job.status)) continue;
    parts.problem.hidden = job.status !== "failed";
    parts.problem.textContent = job.error ?? "";
    rebuilt();
  }
}
