// Work that goes on after its request was answered.
import { ask, Refusal } from "./ask.js";

const FIRST_WAIT_MS = 200;
const LONGEST_WAIT_MS = 2000;

/** Wait for a job; `heard` gets it whenever it was asked after. Returns its result; throws Refusal if there is none. */
export async function followed(job, heard) {
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(1.5 * waitMs, LONGEST_WAIT_MS)) {
    if (job.status === "succeeded") return job.result;
    if (job.status === "cancelled") throw new Refusal("It was stopped before its end.");
    if (job.status === "failed") throw new Refusal(job.error);
    heard(job);
    await new Promise((done) => setTimeout(done, waitMs));
    job = await ask(`v1/jobs/${job.id}`);
  }
}

export const stop = (job) => ask(`v1/jobs/${job.id}`, { method: "DELETE" });
