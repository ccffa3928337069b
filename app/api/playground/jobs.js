// Background jobs.
import { isBusy, requestJson, pathOf, RequestError } from "./requests.js";

const FIRST_WAIT_MS = 200;
const MAX_WAIT_MS = 2000;

/** Return the result of a job when it is finished; `onProgress` receives its state at every poll. Throws RequestError. */
export async function waitForJob(job, onProgress) {
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(1.5 * waitMs, MAX_WAIT_MS)) {
    if (job.status === "succeeded") return job.result;
    if (job.status === "cancelled") throw new RequestError("The job was cancelled.");
    if (job.status === "failed") throw new RequestError(job.error);
    onProgress(job);
    await sleep(waitMs);
    job = await polled(job);
  }
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Return the state of a job: the last one, after the wait that the server asks for, if it refuses requests for now. */
async function polled(job) {
  try {
    return await requestJson(pathOf("jobs", job.id));
  } catch (error) {
    if (!isBusy(error)) throw error;
    await sleep(1000 * (error.retryAfterS ?? 0));
    return job;
  }
}

export const cancelJob = (job) => requestJson(pathOf("jobs", job.id), { method: "DELETE" });
