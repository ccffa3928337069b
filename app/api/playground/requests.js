// Requests to the server. The API key is stored only in its input field; errors become sentences.
import { byId, durationText } from "./elements.js";

/** A request that failed, or that the server rejected. */
export class RequestError extends Error {
  /**
   * `errors` are the fields of a problem, [{field, problem}]; `detail` is its text without the `title`, `kind` its type.
   * `retryAfterS` is the time after which the server asks to try again, null if it does not.
   */
  constructor(message, { status = 0, errors = [], title = "", detail = message, kind = "", retryAfterS = null } = {}) {
    super(message);
    this.title = title;
    this.retryAfterS = retryAfterS;
    this.status = status;
    this.detail = detail;
    this.kind = kind;
    this.errors = errors;
  }
}

/** Return whether the server refuses requests for now, because of a limit or because it is busy. */
export const isBusy = (error) => error.status === 429 || (error.status === 503 && error.kind !== "not-configured");

/** Return the path of a resource below v1; throws RequestError for a name that browsers would remove from a URL. */
export function pathOf(...segments) {
  const removed = segments.find((text) => text === "" || text.split(/[/\\]/).some((part) => part === "." || part === ".."));
  if (removed !== undefined) throw new RequestError(`The name “${removed}” cannot be part of a URL.`);
  return ["v1", ...segments.map(encodeURIComponent)].join("/");
}

const key = () => byId("key").value.trim();

export const hasKey = () => key() !== "";

/** Return a successful response; throws RequestError. */
export async function fetchOrThrow(path, options = {}) {
  const headers = { ...(hasKey() ? { Authorization: `Bearer ${key()}` } : {}), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new RequestError("The server cannot be reached. Check that it is running.");
  }
  if (!response.ok) throw await requestErrorOf(response);
  return response;
}

/** Return the JSON of a response, null if it is empty; throws RequestError. */
export const requestJson = async (path, options = {}) => jsonOf(await fetchOrThrow(path, options));

/** Return the JSON of a response of `fetchOrThrow`, null if it is empty; throws RequestError. */
export const jsonOf = (response) => (response.status === 204 ? null : read(response.json()));

/** Return the bytes of a response of `fetchOrThrow` as a Blob; throws RequestError. */
export const blobOf = (response) => read(response.blob());

async function read(body) {
  try {
    return await body;
  } catch {
    throw new RequestError("The response of the server is incomplete. Try again.");
  }
}

/** Return the options of a request with a JSON body. */
export function jsonOptions(method, body, headers = {}) {
  return { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
}

/** Return the items of all pages, which are listed under `member`. */
export async function fetchAllPages(path, member) {
  const found = [];
  for (let after = null; ;) {
    const page = await requestJson(after === null ? path : `${path}&after=${encodeURIComponent(after)}`);
    found.push(...page[member]);
    if (page.next_after === null) return found;
    after = page.next_after;
  }
}

async function requestErrorOf(response) {
  const status = response.status;
  if (status === 401) {
    byId("key-field").hidden = false; // not shown before, because most servers need no key
    const sentence = hasKey()
      ? "The server does not accept this API key. Check the field “API key” at the top."
      : "The server requires an API key. Enter it in the field “API key” at the top; the page forgets it when it is closed or reloaded.";
    return new RequestError(sentence, { status });
  }
  const body = await response.json().catch(() => null);
  const scopes = body?.type?.endsWith(":forbidden") && /needs a key of scope (\w+);.* has scope (\w+)/.exec(body.detail);
  if (scopes) {
    const sentence = `This needs an API key of scope “${scopes[1]}”; yours has scope “${scopes[2]}”. Enter another one in the field “API key” at the top, or ask the operator for one.`;
    return new RequestError(sentence, { status, kind: "forbidden" });
  }
  const retryAfterS = secondsOf(response.headers.get("retry-after"));
  const message = body?.detail ? `${body.title}: ${body.detail}` : `The server responded with status ${status}.`;
  // The server only says “later”; the header has the time.
  const withTime = retryAfterS ? `${message.replace(/; try again( later)?$/, "").replace(/\.?$/, ".")} Try again in ${durationText(retryAfterS)}.` : message;
  return new RequestError(withTime, {
    status, errors: body?.errors || [], title: body?.title || "", detail: body?.detail || message, kind: (body?.type || "").split(":").at(-1),
    retryAfterS,
  });
}

/** Return the seconds of a Retry-After header, which has a number or a date; null without a time to come. */
function secondsOf(header) {
  const seconds = /^\d+$/.test(header ?? "") ? Number(header) : (Date.parse(header ?? "") - Date.now()) / 1000;
  return seconds > 0 ? Math.ceil(seconds) : null;
}
