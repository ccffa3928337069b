// Requests to the server. The API key is stored only in its input field; errors become sentences.
import { at } from "./elements.js";

/** A request that failed, or that the server refused. */
export class Refusal extends Error {
  /** `errors` are the fields of a problem, [{field, problem}]; `detail` is its text without the title, `kind` its type. */
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

/** Return a successful response; throws Refusal. */
export async function fetched(path, options = {}) {
  const headers = { ...(hasKey() ? { Authorization: `Bearer ${key()}` } : {}), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Refusal("The server cannot be reached. Check that it is running.");
  }
  if (!answer.ok) throw await refusalOf(answer);
  return answer;
}

/** Return the JSON of a response, null if it is empty; throws Refusal. */
export async function ask(path, options = {}) {
  const answer = await fetched(path, options);
  return answer.status === 204 ? null : answer.json();
}

/** Return the options of a request with a JSON body. */
export function json(method, body, headers = {}) {
  return { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
}

/** Return the items of all pages, which are listed under `member`. */
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
      ? "The server does not accept this API key. Check the field “API key” at the top."
      : "The server requires an API key. Enter it in the field “API key” at the top; it is stored only in this tab.";
    return new Refusal(sentence, { status });
  }
  const body = await answer.json().catch(() => null);
  const wait = answer.headers.get("retry-after");
  const message = body?.detail ? `${body.title}: ${body.detail}` : `The server responded with status ${status}.`;
  return new Refusal(`${message}${wait ? ` Try again in ${wait} s.` : ""}`, {
    status, errors: body?.errors || [], detail: body?.detail || message, kind: (body?.type || "").split(":").at(-1),
  });
}
