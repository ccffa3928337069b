// Background jobs.
import { isBusy, requestJson, pathOf, RequestError } from "./requests.js";

const FIRST_WAIT_MS = 200;
const MAX_WAIT_MS = 2000;
const MAX_FAILURES = 5; // polls that fail one after the other; the job goes on without them

/** Return the result of a job when it is finished; `onProgress` receives its state at every poll. Throws RequestError. */
export async function waitForJob(job, onProgress) {
  let failures = 0;
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(1.5 * waitMs, MAX_WAIT_MS)) {
    if (job.status === "succeeded") return job.result;
    if (job.status === "cancelled") throw new RequestError("The job was cancelled.");
    if (job.status === "failed") throw new RequestError(job.error);
    onProgress(job);
    await sleep(waitMs);
    try {
      job = await requestJson(pathOf("jobs", job.id));
      failures = 0;
    } catch (error) {
      const isRefused = error.status >= 400 && error.status < 500;
      if (!isBusy(error)) failures += 1;
      if (!isBusy(error) && (isRefused || failures === MAX_FAILURES)) throw error;
      await sleep(1000 * (error.retryAfterS ?? 0));
    }
  }
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Cancel a job, unless it has ended meanwhile. */
export async function cancelJob(job) {
  try {
    await requestJson(pathOf("jobs", job.id), { method: "DELETE" });
  } catch (error) {
    if (error.status !== 409) throw error;
  }
}
