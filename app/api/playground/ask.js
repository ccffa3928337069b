// Requests to the server: with the key, which is kept in its field alone, and with refusals as sentences.
import { at } from "./elements.js";

/** What the server, or the way to it, had against a request. */
export class Refusal extends Error {
  /** `errors` are those of a problem: [{field, problem}]; `detail` is its sentence without the title, `kind` its type. */
  constructor(message, { status = 0, errors = [], detail = message, kind = "" } = {}) {
    super(message);
    this.status = status;
    this.detail = detail;
    this.kind = kind;
    this.errors = errors;
  }
}

const key = () => at("key").value.trim();

export const hasKey = () => key() !== "";

/** Return the response to a request that was not refused; throws Refusal. */
export async function fetched(path, options = {}) {
  const headers = { ...(hasKey() ? { Authorization: `Bearer ${key()}` } : {}), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Refusal("The server cannot be reached. Is it running?");
  }
  if (!answer.ok) throw await refusalOf(answer);
  return answer;
}

/** Return the JSON that a request is answered with, null where the answer is empty; throws Refusal. */
export async function ask(path, options = {}) {
  const answer = await fetched(path, options);
  return answer.status === 204 ? null : answer.json();
}

/** Return the options of a request with a JSON body. */
export function json(method, body, headers = {}) {
  return { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
}

/** Return what is listed in pages under `member`, all of it. */
export async function everyPage(path, member) {
  const found = [];
  for (let after = null; ;) {
    const page = await ask(after === null ? path : `${path}&after=${encodeURIComponent(after)}`);
    found.push(...page[member]);
    if (page.next_after === null) return found;
    after = page.next_after;
  }
}

async function refusalOf(answer) {
  const status = answer.status;
  if (status === 401) {
    const sentence = hasKey()
      ? "The server does not know this API key. Check it in the field “API key” at the top."
      : "The server asks for an API key. Type yours into the field “API key” at the top; only this tab keeps it.";
    return new Refusal(sentence, { status });
  }
  const body = await answer.json().catch(() => null);
  const wait = answer.headers.get("retry-after");
  const told = body?.detail ? `${body.title}: ${body.detail}` : `The server answered ${status}.`;
  return new Refusal(`${told}${wait ? ` Try again in ${wait} s.` : ""}`, {
    status, errors: body?.errors || [], detail: body?.detail || told, kind: (body?.type || "").split(":").at(-1),
  });
}
