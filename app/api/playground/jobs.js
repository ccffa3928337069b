// Background jobs.
import { requestJson, pathOf, RequestError } from "./requests.js";

const FIRST_WAIT_MS = 200;
const MAX_WAIT_MS = 2000;

/** Return the result of a job when it is finished; `onProgress` receives its state at every poll. Throws RequestError. */
export async function waitForJob(job, onProgress) {
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(1.5 * waitMs, MAX_WAIT_MS)) {
    if (job.status === "succeeded") return job.result;
    if (job.status === "cancelled") throw new RequestError("The job was cancelled.");
    if (job.status === "failed") throw new RequestError(job.error);
    onProgress(job);
    await new Promise((done) => setTimeout(done, waitMs));
    job = await requestJson(pathOf("jobs", job.id));
  }
}

export const cancelJob = (job) => requestJson(pathOf("jobs", job.id), { method: "DELETE" });
