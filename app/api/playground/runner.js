// Classifies any number of pictures: in parts that the server accepts, some at the same time, with progress.
import { batchesOf, firstBatch } from "./batches.js";
import { catalogue } from "./catalogue.js";
import { formValue } from "./code.js";
import { isBusy, jsonOptions, requestJson, RequestError } from "./requests.js";
import { isTogether, needsRequest, questionOf, requestFields, waitText } from "./classify_state.js";

const AT_ONCE = 2;
// Of images whose features the server keeps: a request takes milliseconds.
const MAX_KEPT = 64;
const ATTEMPTS = 5;
const RETRY_S = 2;
// Shorter waits are not worth a sentence.
const SILENT_S = 3;
// Labels are often added one after the other.
const DEBOUNCE_MS = 250;

/** Problems of single images; if all images of a request have one, the whole request is refused with it. */
const IMAGE_PROBLEMS = ["not-an-image", "image-too-large", "image-not-fetched", "unknown-image"];

/**
 * Return the functions that classify the pictures of a state.
 *
 * `changed` is called whenever the state has changed, `fail` with an error that concerns all pictures.
 */
export function createRunner(state, { changed, fail }) {
  const requests = new Set(); // an AbortController for each request in progress
  let limits = null; // what the server accepts in a request, null until it has said so
  let timer = 0;

  const waiting = (question) => state.pictures.filter((picture) => needsRequest(picture, question));

  function pump() {
    const question = questionOf(state);
    if (!state.isLive || !limits || state.run?.isStopped) {
      changed();
      return;
    }
    const pending = question === null ? [] : waiting(question);
    if (!state.run && pending.length) {
      state.run = { question, total: 0, since: performance.now(), elapsedMs: 0, isStopped: false };
      state.problem = null;
      state.announcement = pending.length > 1 ? `Classifying ${pending.length} images.` : "Classifying.";
    }
    if (state.run) {
      const remaining = pending.length + state.pictures.filter((picture) => picture.isSending).length;
      if (state.run.question !== question) Object.assign(state.run, { question, total: remaining, since: performance.now(), elapsedMs: 0 });
      state.run.total = Math.max(state.run.total, remaining);
    }
    while (requests.size < AT_ONCE && pending.length && !state.run.wait) {
      let batch;
      try {
        batch = nextBatch(pending);
      } catch (error) {
        halt(error);
        return;
      }
      pending.splice(0, batch.length);
      start(batch, question);
    }
    if (state.run && !requests.size) finish();
    changed();
  }

  /** Ask for the limits unless they are known: somebody may be faster than the first responses of the server. */
  async function learnLimits() {
    ({ images: limits } = await catalogue());
  }

  /** Return the pictures of the next request; they are the first of `pending`. */
  function nextBatch(pending) {
    if (isTogether(state)) {
      const maxImages = limits.max_per_request ?? MAX_KEPT;
      if (pending.length > maxImages) {
        throw new RequestError(`A small set of labels for all images works with at most ${maxImages} images; there are ${pending.length}. Remove images, or switch it off in the options.`);
      }
      return [...pending];
    }
    const isKept = isReference(pending[0]);
    const end = pending.findIndex((picture) => isReference(picture) !== isKept);
    const alike = end < 0 ? pending : pending.slice(0, end);
    return isKept ? alike.slice(0, Math.min(MAX_KEPT, limits.max_per_request ?? MAX_KEPT)) : firstBatch(alike, limits);
  }

  async function start(batch, question) {
    const controller = new AbortController();
    requests.add(controller);
    for (const picture of batch) picture.isSending = true;
    await send(batch, question, requestFields(state), controller.signal);
    for (const picture of batch) picture.isSending = false;
    requests.delete(controller);
    pump();
  }

  /** Send one request; a part that is too large is sent as two. */
  async function send(batch, question, fields, signal) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        accept(batch, await requestJson("v1/classify", await requestOf(batch, fields, signal)), question);
        return;
      } catch (error) {
        if (signal.aborted) return;
        if (isBusy(error) && attempt < ATTEMPTS) {
          await pause(error, signal);
          if (signal.aborted) return;
          continue;
        }
        if (isTooMuch(error) && batch.length > 1 && !isTogether(state)) {
          const half = Math.ceil(batch.length / 2);
          await send(batch.slice(0, half), question, fields, signal);
          await send(batch.slice(half), question, fields, signal);
          return;
        }
        refuse(batch, error, question, fields);
        return;
      }
    }
  }

  /** Wait as long as the server asks. The page shows the wait, and Stop ends it. */
  async function pause(error, signal) {
    const seconds = error.retryAfterS ?? RETRY_S, until = Date.now() + 1000 * seconds;
    const wait = { until, isLimit: error.status === 429, reason: error.detail };
    if (seconds > SILENT_S && !(state.run?.wait?.until >= until)) {
      state.run.wait = wait;
      state.announcement = waitText(wait, Date.now());
    }
    // By the clock, because timers stop while a computer sleeps, and once a second for the countdown.
    while (!signal.aborted && Date.now() < until) {
      changed();
      await moment(Math.min(1000, until - Date.now()), signal);
    }
    if (state.run?.wait === wait) state.run.wait = null;
  }

  function accept(batch, response, question) {
    const { results, ...answer } = response;
    state.answer = answer;
    batch.forEach((picture, index) => take(picture, results[index], question));
  }

  function take(picture, result, question) {
    if (result.error && kindOf(result.error) === "unknown-image") {
      picture.imageId = null; // the server has forgotten its features: the file is sent again
      return;
    }
    if (result.error && kindOf(result.error) === "image-not-fetched") {
      picture.failure = new Error(result.error.detail); // its host may answer later
      return;
    }
    picture.result = result;
    picture.answeredFor = question;
    picture.imageId = result.image_id ?? picture.imageId;
    picture.explanation = null; // of an earlier result
  }

  function refuse(batch, error, question, fields) {
    if (leaveOut(labelProblems(error, fields))) return; // the rest is asked again without these labels
    const results = resultsOf(error, batch.length);
    if (results) {
      batch.forEach((picture, index) => {
        if (results[index]) take(picture, results[index], question);
      });
    } else if (error.status >= 400 && error.status < 500 && error.kind !== "body-too-large" && !isBusy(error)) {
      halt(error); // the question is wrong, not an image
    } else {
      for (const picture of batch) picture.failure = error;
    }
  }

  /** Leave labels, [[label, problem], ...], out of further requests; return whether there are any. */
  function leaveOut(labels) {
    for (const [label, problem] of labels) state.refused.set(label, problem);
    return labels.length > 0;
  }

  async function requestOf(batch, fields, signal) {
    const all = [...fields, ["keep_features", true]];
    if (batch.every(isReference) || batch.some((picture) => !picture.file)) {
      const images = await Promise.all(batch.map(jsonImage));
      return { ...jsonOptions("POST", { ...Object.fromEntries(all), images }), signal };
    }
    const form = new FormData();
    for (const picture of batch) form.append("image", picture.file, picture.name);
    for (const [name, value] of all) form.append(name, formValue(value));
    return { method: "POST", body: form, signal };
  }

  /** End the run because of an error that concerns all pictures. */
  function halt(error) {
    abort();
    state.run = null;
    state.isLive = false;
    fail(error);
  }

  function abort() {
    for (const controller of requests) controller.abort();
  }

  function finish() {
    state.run = null;
    const failed = state.pictures.filter((picture) => picture.failure).length;
    const done = state.pictures.filter((picture) => picture.result).length;
    state.announcement = `${done} ${done === 1 ? "image" : "images"} classified${failed ? `, ${failed} not` : ""}.`;
  }

  /** Return the results of requests apart from the run, one for each picture; `fields` are those of each request. */
  async function ask(pictures, fields) {
    const isOne = fields.some(([name]) => name === "group"); // its labels are those of all images
    const results = [];
    await learnLimits();
    for (const batch of isOne ? [pictures] : batchesOf(pictures, limits)) results.push(...(await askOnce(batch, fields, !isOne)));
    return results;
  }

  async function askOnce(batch, fields, isDivisible) {
    try {
      return (await requestJson("v1/classify", await requestOf(batch, fields, undefined))).results;
    } catch (error) {
      if (error.kind === "unknown-image" && batch.some((picture) => picture.imageId)) {
        for (const picture of batch) picture.imageId = null;
        return askOnce(batch, fields, isDivisible);
      }
      if (isTooMuch(error) && batch.length > 1 && isDivisible) {
        const half = Math.ceil(batch.length / 2);
        return [...(await askOnce(batch.slice(0, half), fields, true)), ...(await askOnce(batch.slice(half), fields, true))];
      }
      const results = resultsOf(error, batch.length);
      if (!results || results.includes(undefined)) throw error;
      return results;
    }
  }

  return {
    /** Classify all pictures that have no result, and from now on again whenever the labels change. */
    async start() {
      for (const picture of state.pictures) Object.assign(picture, { isWanted: true, failure: null });
      Object.assign(state, { isLive: true, isStarting: true, problem: null });
      if (state.run) state.run.isStopped = false;
      changed();
      try {
        await learnLimits();
      } catch (error) {
        halt(error);
        return;
      } finally {
        state.isStarting = false;
      }
      pump();
    },
    /** Stop; the results so far stay. */
    stop() {
      if (!state.run) return;
      Object.assign(state.run, { wait: null, isStopped: true, elapsedMs: state.run.elapsedMs + performance.now() - state.run.since });
      abort();
      state.announcement = "Stopped.";
      changed();
    },
    /** End the run; its pictures have been removed. */
    cancel() {
      abort();
      state.run = null;
    },
    /** Continue after `stop`. */
    resume() {
      Object.assign(state.run, { isStopped: false, since: performance.now() });
      pump();
    },
    /** Try the pictures again whose requests failed. */
    retry() {
      for (const picture of state.pictures) picture.failure = null;
      pump();
    },
    /** The question or the pictures have changed: once it has been live, answer again. */
    revise() {
      clearTimeout(timer);
      if (state.isLive) timer = setTimeout(pump, DEBOUNCE_MS);
      changed();
    },
    ask,
  };
}

/** Return whether a picture is named in a request instead of sent. */
const isReference = (picture) => Boolean(picture.imageId || picture.remoteUrl);

/** Return a picture as an image of a JSON request; a form cannot contain the URL of an image. */
async function jsonImage({ imageId, remoteUrl, file }) {
  if (imageId) return { id: imageId };
  return remoteUrl ? { url: remoteUrl } : { base64: await base64Of(file) };
}

function base64Of(file) {
  const reader = new FileReader();
  return new Promise((done, failed) => {
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new RequestError(`The file ${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

const kindOf = (problem) => problem.type.split(/[:/]/).at(-1);

/** Return the labels that are the only reason why a request was refused, [[label, problem], ...]. */
function labelProblems({ status, errors }, fields) {
  const labels = Object.fromEntries(fields).labels ?? [];
  const found = errors.map(({ field, problem }) => [labels[/^labels\.(\d+)$/.exec(field)?.[1]], problem]);
  return status === 422 && found.every(([label]) => label !== undefined) ? found : [];
}

/** Return a result for each image that is the reason why a request was refused, null if there is another reason. */
function resultsOf({ status, kind, title, detail, errors }, count) {
  const result = (problem) => ({ predictions: [], warnings: [], error: { type: kind, ...problem } });
  if (IMAGE_PROBLEMS.includes(kind)) return Array(count).fill(result({ title, detail }));
  const indices = errors.map(({ field }) => /^images?\.(\d+)/.exec(field)?.[1]);
  if (status !== 422 || !errors.length || indices.includes(undefined)) return null;
  const results = Array(count).fill(undefined);
  errors.forEach(({ problem }, at) => { results[indices[at]] = result({ title: "Not readable", detail: problem }); });
  return results;
}

/** Return whether a request with fewer images may be accepted. */
const isTooMuch = (error) => error.kind === "body-too-large" || error.kind === "too-large";

function moment(milliseconds, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      done();
    });
  });
}
