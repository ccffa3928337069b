// Background jobs.
import { ask, Refusal } from "./ask.js";

const FIRST_WAIT_MS = 200;
const MAX_WAIT_MS = 2000;

/** Return the result of a job when it is finished; `onProgress` receives its state at every poll. Throws Refusal. */
export async function followed(job, onProgress) {
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(1.5 * waitMs, MAX_WAIT_MS)) {
    if (job.status === "succeeded") return job.result;
    if (job.status === "cancelled") throw new Refusal("The job was cancelled.");
    if (job.status === "failed") throw new Refusal(job.error);
    onProgress(job);
    await new Promise((done) => setTimeout(done, waitMs));
    job = await ask(`v1/jobs/${job.id}`);
  }
}

export const stop = (job) => ask(`v1/jobs/${job.id}`, { method: "DELETE" });
