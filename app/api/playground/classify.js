// The view Classify: images and labels in, verdicts out. classify_view.js draws its state, runner.js sends the requests.
import { byId, focusLater, isTyping, keepFocus, splitLabels } from "./elements.js";
import { RequestError } from "./requests.js";
import { allDatabases, allLabelSets, catalogue } from "./catalogue.js";
import { dropZone, pathOfFile, splitFiles } from "./file_drops.js";
import { render } from "./lit.js";
import { newState, missingInput, downloadProblem, isStale, isUnreadable, questionOf, requestFields, shownPictures } from "./classify_state.js";
import { classifyView } from "./classify_view.js";
import { createRunner } from "./runner.js";
import { createThumbnails } from "./thumbnails.js";
import { SAMPLE_LABELS, sampleFile } from "./samples.js";
import { applyLink, linkOf, restore, store } from "./shared_link.js";
import { csvOf, jsonOf, save, zipOf } from "./downloads.js";
import { createTools } from "./classify_tools.js";

// As many images show what there is; more would only take longer.
const IMAGES_FOR_SUGGESTIONS = 16;
const LABELS_PER_IMAGE = 3;
const MAX_SUGGESTIONS = 12;

const state = newState();
const runner = createRunner(state, { changed, fail });
const thumbnails = createThumbnails(changed);
const view = byId("view-classify");
const find = (selector) => view.querySelector(selector);
const tools = createTools(state, runner, { relabel, again, whenDrawn, find, forClick });
let lastId = 0;
let clicks = 0; // on what has a module of its own
let loads = 0; // of the names of label sets or databases
const fetching = new Set(); // the names of samples

// --- drawing -------------------------------------------------------------------------------------------------------------

let isScheduled = false;
let afterwards = []; // functions to call once the page shows the state

function changed() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(draw);
}

function draw() {
  isScheduled = false;
  if (state.pictures.length === 0) state.filter = "all";
  render(classifyView(state, actions), view);
  const called = afterwards;
  afterwards = [];
  for (const call of called) call();
  tools.drawn();
  for (const picture of state.pictures) if (picture.isExplained) loadExplanation(picture);
}

function whenDrawn(call) {
  afterwards.push(call);
  changed();
}

/** The labels or options have changed. */
function revised() {
  if (state.problem?.status !== 401) state.problem = null;
  state.sharedLink = "";
  store(state);
  runner.revise();
}

function fail(error) {
  state.problem = error;
  whenDrawn(revealProblem);
}

/** Focus the field that a problem concerns, unless somebody is typing in another one. */
function revealProblem() {
  if (view.hidden) return;
  if (state.problem?.status === 401) {
    if (!isTyping()) byId("key").focus();
    return;
  }
  const field = find("[aria-invalid=true]");
  if (!field) {
    find("#error")?.scrollIntoView({ block: "nearest" });
    return;
  }
  for (let section = field.closest("details"); section; section = section.parentElement.closest("details")) section.open = true;
  if (!isTyping()) field.focus();
}

// --- pictures ------------------------------------------------------------------------------------------------------------

/** Add files to the pictures. */
export function takePictures(files) {
  const { pictures: found, skippedNote } = splitFiles(files);
  state.skippedNote = skippedNote;
  const added = found.map((file) => ({ file, path: pathOfFile(file) }));
  if (added.some(({ path }) => path.includes("/"))) added.sort(byPath);
  for (const { file, path } of added) {
    const picture = newPicture({ file, name: file.name || "pasted", path });
    state.pictures.push(picture);
    thumbnails.add(picture);
  }
  runner.revise();
}

/** Add pictures {name, path, remoteUrl} that the server fetches. */
function takeRemotePictures(added) {
  state.pictures.push(...added.map(({ name, path, remoteUrl }) => newPicture({ name, path, remoteUrl, file: null, hasNoThumbnail: true })));
  runner.revise();
}

function newPicture(given) {
  lastId += 1;
  // Once results follow the labels, further images are classified without another click.
  return { id: lastId, url: "", result: null, imageId: null, failure: null, isWanted: state.isLive, isSending: false, ...given };
}

/** Compare paths by their folders, as `deixis classify` orders them. */
function byPath({ path: one }, { path: other }) {
  const left = one.split("/"), right = other.split("/");
  for (let index = 0; index < Math.min(left.length, right.length); index += 1) {
    if (left[index] !== right[index]) return left[index] < right[index] ? -1 : 1;
  }
  return left.length - right.length;
}

function remove(picture) {
  const buttons = [...view.querySelectorAll(".main-column .remove")], place = buttons.indexOf(document.activeElement);
  state.pictures.splice(state.pictures.indexOf(picture), 1);
  thumbnails.remove(picture);
  runner.revise();
  whenDrawn(() => {
    const left = [...view.querySelectorAll(".main-column .remove")];
    (left[Math.min(Math.max(place, 0), left.length - 1)] ?? find("#files")).focus();
  });
}

function removeAll() {
  for (const picture of state.pictures) thumbnails.remove(picture);
  state.pictures.length = 0;
  runner.cancel();
  Object.assign(state, { isLive: false, filter: "all", search: "", skippedNote: "", suggestions: null, announcement: "All images removed." });
  whenDrawn(() => find("#files").focus());
}

async function useSamples(samples) {
  const names = samples.map(({ name }) => name).filter((name) => !fetching.has(name));
  if (!names.length) return; // the first click is being answered
  for (const name of names) fetching.add(name);
  try {
    const files = await Promise.all(names.map(sampleFile));
    if (state.source === "labels" && !state.labels.length && !find("#new-labels").value.trim()) state.labels = [...SAMPLE_LABELS];
    takePictures(files);
    whenDrawn(submit);
  } catch (error) {
    fail(error);
  } finally {
    for (const name of names) fetching.delete(name);
  }
}

/** Use the module of a dialog, unless the user has clicked again or left the view while it was loaded. */
async function forClick(load, use) {
  clicks += 1;
  const click = clicks;
  const module = await load().catch(() => fail(new RequestError("This dialog cannot be loaded. Is the server running? Then try again.")));
  if (module && click === clicks && !view.hidden) use(module);
}

const open = (picture) => forClick(() => import("./lightbox.js"), ({ openLightbox }) => {
  openLightbox(picture, { pictures: shownPictures(state), onCrop: (file) => takePictures([file]) });
});

const camera = () => forClick(() => import("./camera.js"), ({ openCamera }) => openCamera({ onPictures: takePictures }));

const imageUrls = () => forClick(() => import("./image_urls.js"), ({ openImageUrls }) => openImageUrls({ onPictures: takeRemotePictures }));

// --- labels --------------------------------------------------------------------------------------------------------------

function addLabels(added) {
  const known = new Set(state.labels.map((label) => label.toLowerCase()));
  for (const label of added) {
    if (!known.has(label.toLowerCase())) state.labels.push(label);
    known.add(label.toLowerCase());
  }
  revised();
  whenDrawn(() => find("#labels")?.scrollTo(0, find("#labels").scrollHeight)); // the end of a long list
}

function addTyped() {
  const input = find("#new-labels");
  if (!input?.value.trim()) return;
  addLabels(splitLabels(input.value));
  input.value = "";
}

function labelKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (event.target.value.trim()) addTyped();
  else if (state.pictures.length) submit();
}

function removeLabel(index) {
  for (const label of state.labels.splice(index, 1)) state.refused.delete(label);
  revised();
  whenDrawn(() => {
    const buttons = find("#labels").querySelectorAll("button");
    (buttons[Math.min(index, buttons.length - 1)] ?? find("#new-labels")).focus();
  });
}

/** Take other labels, or a label set. */
function relabel({ labels = [], labelSet = "" }) {
  if (labelSet) Object.assign(state, { source: "label_set", labelSet });
  else Object.assign(state, { source: "labels", labels: [...labels] });
  revised();
  reload();
}

/** Ask about every picture again: the label set has learned something. */
function again() {
  state.lessons += 1; // also for answers on their way, which do not know it yet
  runner.revise();
}

function removeLabels() {
  state.labels = [];
  state.refused.clear();
  revised();
  whenDrawn(() => find("#new-labels").focus());
}

async function setSource(source) {
  state.source = source;
  revised();
  await reload();
}

/** Load the names of the source of labels. */
async function loadNames() {
  loads += 1;
  const load = loads;
  try {
    if (state.source === "label_set") {
      const found = await allLabelSets();
      if (load !== loads) return; // the label set may be a newer one
      state.labelSets = found;
      if (!state.labelSets.some((entry) => entry.name === state.labelSet)) state.labelSet = state.labelSets[0]?.name ?? "";
      store(state);
      runner.revise();
    }
    if (state.source === "none") {
      const found = await allDatabases();
      if (load !== loads) return;
      state.databases = found.filter((entry) => !entry.problem);
    }
    changed();
  } catch (error) {
    if (load === loads) failLoading(error);
  }
}

/** Show why names cannot be loaded, until they are: without them the page works, but does not offer everything. */
function failLoading(error) {
  if (error.status === 401) fail(error);
  else state.loadProblem = error;
  changed();
}

/** Discover labels in some of the images. */
async function suggest() {
  const readable = state.pictures.filter((picture) => !isUnreadable(picture));
  const step = Math.max(1, readable.length / IMAGES_FOR_SUGGESTIONS);
  const chosen = readable.filter((_, index) => Math.floor(index / step) !== Math.floor((index - 1) / step));
  const loading = { isLoading: true };
  state.suggestions = loading;
  changed();
  const { model, database } = state.options;
  const fields = Object.entries({ top_k: LABELS_PER_IMAGE, model, database }).filter(([, value]) => value !== "");
  let found;
  try {
    const results = await runner.ask(chosen, fields);
    if (results.every((result) => result.error)) throw new RequestError(results[0]?.error.detail ?? "The server cannot read any of these images.");
    const scores = new Map();
    for (const { label, score } of results.flatMap((result) => result.predictions)) scores.set(label, (scores.get(label) ?? 0) + score);
    const labels = [...scores].sort(([, one], [, other]) => other - one).map(([label]) => label);
    found = { labels: labels.slice(0, MAX_SUGGESTIONS) };
  } catch (error) {
    found = { error };
  }
  if (state.suggestions === loading) state.suggestions = found; // or the images have been removed
  changed();
}

// --- results -------------------------------------------------------------------------------------------------------------

async function submit(event) {
  event?.preventDefault();
  addTyped();
  if (state.run?.isStopped) {
    runner.resume();
    return;
  }
  if (state.source === "label_set" && !state.labelSets) {
    await reload();
    if (!state.labelSets) return; // the page says why
  }
  const missing = missingInput(state);
  if (missing) {
    const field = state.source === "labels" ? "labels" : "label_set";
    fail(new RequestError(missing, { status: 422, errors: [{ field, problem: missing }] }));
    return;
  }
  const focus = focusLater();
  await runner.start();
  if (state.loadProblem && state.isLive) reload();
  whenDrawn(() => focus(find("#results")));
}

function explain(picture, isOpen) {
  if (Boolean(picture.isExplained) === isOpen) return;
  picture.isExplained = isOpen;
  changed();
}

function explainAgain(picture) {
  picture.explanation = null;
  changed(); // loads it
}

async function loadExplanation(picture) {
  const question = questionOf(state);
  if (picture.explanation || !picture.result || isStale(picture, question)) return;
  const loading = { isLoading: true };
  picture.explanation = loading;
  let loaded;
  try {
    const [result] = await runner.ask([picture], [...requestFields(state), ["explain", true]]);
    loaded = result.error ? { error: new RequestError(result.error.detail) } : { content: result.explanation, words: result.out_of_vocabulary?.nearest ?? [] };
  } catch (error) {
    loaded = { error };
  }
  if (picture.explanation !== loading) return; // of an earlier result
  picture.explanation = loaded;
  changed();
}

async function download(kind) {
  if (downloadProblem(state)) return;
  find(".menu").open = false;
  try {
    if (kind === "csv") save(csvOf(state), "deixis.csv");
    if (kind === "json") save(jsonOf(state), "deixis.json");
    if (kind === "zip") save(await zipOf(state), "deixis.zip");
  } catch (error) {
    fail(new RequestError(`The file cannot be made: ${error.message}`));
  }
}

// --- link, code ----------------------------------------------------------------------------------------------------------

async function copyLink() {
  const link = linkOf(state);
  state.sharedLink = (await copy(link)) ? true : link;
  changed();
}

async function copyCode({ target }) {
  const code = target.closest("h3").nextElementSibling;
  if (await copy(code.textContent)) {
    target.textContent = "Copied";
    setTimeout(() => { target.textContent = "Copy"; }, 1500);
  } else {
    getSelection().selectAllChildren(code); // so that Ctrl+C copies it
  }
}

/** Return whether a text was copied; without HTTPS, pages cannot. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

// --- the view ------------------------------------------------------------------------------------------------------------

const actions = {
  submit, addLabels, addTyped, labelKey, removeLabel, removeLabels, setSource, suggest, remove, removeAll, useSamples, open, camera, imageUrls,
  correct: tools.correct, compareTwo: tools.compareTwo, showEarlier: tools.showEarlier, explain, explainAgain, download, copyLink, copyCode, stop: runner.stop, resume: runner.resume, retry: runner.retry,
  async reload() {
    await reload();
    whenDrawn(() => keepFocus(find("#results > [role=alert]")));
  },
  filesSelected({ target }) {
    takePictures([...target.files]);
    target.value = ""; // allows selecting the same file again
  },
  setOption(name, value) {
    state.options = { ...state.options, [name]: value };
    revised();
  },
  setLabelSet(name) {
    state.labelSet = name;
    revised();
  },
  setAutomaticRejection(isOn) {
    if (isOn) state.threshold = 0;
    actions.setOption("reject", isOn ? "auto" : "");
  },
  setThreshold(threshold) {
    state.threshold = threshold;
    store(state);
    changed();
  },
  set(change) {
    Object.assign(state, change);
    store(state);
    changed();
  },
  toResults: () => find("#results").focus(),
  showAll: () => actions.set({ filter: "all", search: "" }),
  menuKey(event) {
    if (event.key !== "Escape") return;
    event.currentTarget.open = false;
    event.currentTarget.querySelector("summary").focus();
  },
};

/** Show the view; `name` is the label set to select, `query` what a link presets. */
export async function showClassify({ name = "", query }) {
  if (query?.size) {
    applyLink(query, state);
    history.replaceState(null, "", "#classify"); // a reload keeps later changes
    revised();
  }
  if (name) {
    Object.assign(state, { source: "label_set", labelSet: name });
    revised();
  }
  await reload();
}

/** Load what the view offers. */
async function reload() {
  state.loadProblem = null;
  changed();
  try {
    const { models, methods, images } = await catalogue();
    const needsKey = state.problem?.status === 401;
    if (needsKey) state.problem = null;
    Object.assign(state, { models, methods, limits: images });
    await loadNames();
    if (needsKey && state.pictures.some((picture) => picture.isWanted)) runner.start();
  } catch (error) {
    failLoading(error);
  }
}

/** Register the event handlers that the template does not have. */
export function startClassify() {
  restore(state);
  dropZone(view, takePictures);
  document.addEventListener("click", ({ target }) => {
    const menu = find(".menu[open]");
    if (menu && !menu.contains(target)) menu.open = false;
  });
  draw();
}
