// The few functions that every view needs. Everything that came from elsewhere is written as text, never as HTML.

export const at = (id) => document.getElementById(id);

export function made(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

export const option = (value, text) => made("option", { value, textContent: text });

export const percent = (score) => `${(100 * score).toFixed(score > 0.0995 ? 0 : 1)} %`;

// The key is kept in its field, in memory, and nowhere else.
export function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export class Refusal extends Error {
  constructor(status, body, wait) {
    const told = body?.detail || `The server answered ${status}.`;
    super(`${body?.title ? `${body.title}: ` : ""}${told}${wait ? ` Try again in ${wait} s.` : ""}`);
    this.status = status;
    this.errors = body?.errors || [];
  }
}

// Returns the answer's JSON and its headers; throws a Refusal, or an Error where there was no answer.
export async function send(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch {
    throw new Error("The server cannot be reached. Is it running?");
  }
  const type = answer.headers.get("content-type") || "";
  const body = type.includes("json") ? await answer.json() : null;
  if (answer.ok) return { body, headers: answer.headers };
  if (answer.status === 401) at("key").focus();
  throw new Refusal(answer.status, body, answer.headers.get("retry-after"));
}

export const ask = async (path, options) => (await send(path, options)).body;

export const askWith = (method, path, value, more = {}) =>
  send(path, { method, body: JSON.stringify(value), headers: { "Content-Type": "application/json", ...more } });

// Asks again until a job is over, and tells each time how far it is.
export async function waited(job, tell) {
  for (let wait = 200; !["succeeded", "failed", "cancelled"].includes(job.status); wait = Math.min(wait * 1.5, 2000)) {
    tell(job);
    await new Promise((done) => setTimeout(done, wait));
    job = await ask(`v1/jobs/${job.id}`);
  }
  if (job.status !== "succeeded") throw new Error(job.error || `The job ${job.status}.`);
  return job.result;
}

export function showIn(id, error) {
  at(id).textContent = error ? error.message : "";
  at(id).hidden = !error;
}
