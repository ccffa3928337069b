// "Wrong? It is …": a picture with a wrong label becomes an example image of the right class.
import { countText, create, focusLater, percent } from "./elements.js";
import { fetchOrThrow, jsonOptions, pathOf, requestJson } from "./requests.js";
import { waitForJob } from "./jobs.js";
import { openModal } from "./modal.js";

const DEFAULT_NAME = "my-labels";
const MAX_NAMES_TRIED = 100;
const MAX_BUTTONS = 12;

/**
 * Ask for the right label of a picture, {name, file}, in a dialog, and store the picture as an example image of it.
 *
 * `result` is the picture's result. `labels` are the labels of the request, or `labelSet` is the label set that it used,
 * `name` or `name@version`. For labels alone, a label set is created, with a name that the person may change.
 * `onLearned({labelSet, label, counts, job})` is called when the picture is stored: classify again with `labelSet`;
 * `counts` and `job` are those of POST /v1/label-sets/{name}/images.
 */
export function openCorrection(picture, { result, labels = [], labelSet = "", onLearned }) {
  let setName = labelSet.split("@")[0];
  const choices = create("div", { className: "label-choices", role: "group", "aria-label": "The right label" });
  const other = create("input", { id: "right-label", autocomplete: "off", placeholder: "another label" });
  const name = create("input", { id: "new-label-set-name", autocomplete: "off", value: DEFAULT_NAME });
  const nameField = create(
    "div", { className: "field" }, create("label", { htmlFor: name.id, textContent: "Name of the label set" }), name,
    create("p", { className: "hint", textContent: "Your labels are saved under this name, so that they can have example images." }),
  );
  const problem = create("p", { className: "problem", role: "alert", hidden: true });
  const status = create("p", { className: "hint", role: "status" });
  const form = create(
    "form", {}, choices,
    create("div", { className: "field" }, create("label", { htmlFor: other.id, textContent: "Or a new label" }), create("div", { className: "row" }, other, create("button", { type: "submit", textContent: "It is this" }))),
    ...(setName ? [] : [nameField]), problem, status,
  );
  const wrong = result?.predictions?.[0]?.label ?? "";
  const { close, dialog } = openModal(`${picture.name}: it is …`, { className: "correction" }, ...(picture.url ? [create("img", { src: picture.url, alt: "" })] : []), form);

  async function show() {
    if (!picture.file) {
      showProblem(new Error("The page does not have the file of this image, because the server fetched it. Save the image, add it as a file, and classify it."));
      form.inert = true;
      return;
    }
    const focus = focusLater();
    try {
      const known = setName ? (await requestJson(pathOf("label-sets", setName))).classes.map((entry) => entry.name) : labels;
      const ranked = (result?.predictions ?? []).map((entry) => entry.label).filter((label) => known.includes(label));
      const offered = [...new Set([...ranked, ...known])].filter((label) => label !== wrong);
      choices.replaceChildren(...offered.slice(0, MAX_BUTTONS).map((label) => create("button", { type: "button", className: "secondary", textContent: label, onclick: () => learn(label) })));
      if (offered.length > MAX_BUTTONS) choices.append(create("p", { className: "hint", textContent: `${countText(offered.length - MAX_BUTTONS, "further label")}: type the name.` }));
      focus(choices.querySelector("button") ?? other);
    } catch (error) {
      showProblem(error); // a label can be typed nevertheless
    }
  }

  form.onsubmit = (event) => {
    event.preventDefault();
    if (other.value.trim()) learn(other.value.trim());
    else other.focus();
  };

  async function learn(label) {
    problem.hidden = true;
    status.textContent = "Storing the example…";
    form.inert = true;
    try {
      if (setName) await addClass(setName, label);
      else setName = await createLabelSet(name.value.trim(), labels, label);
      nameField.hidden = true; // it exists now, also if the example is refused
      const added = await addExample(setName, picture, label);
      close();
      onLearned({ labelSet: setName, label, counts: added.counts, job: added.job });
    } catch (error) {
      form.inert = false;
      status.textContent = "";
      showProblem(error);
      if (error.suggested) {
        name.value = error.suggested;
        name.select();
      }
    }
  }

  function showProblem(error) {
    problem.textContent = error.message;
    problem.hidden = false;
    if (!dialog.contains(document.activeElement)) dialog.focus();
  }

  show();
}

/** Create a label set of labels, unless the name is taken; throws an error with the next free name as `suggested`. */
async function createLabelSet(name, labels, label) {
  const classes = labels.some((entry) => entry.toLowerCase() === label.toLowerCase()) ? labels : [...labels, label];
  if (!name) throw new Error("Enter a name for the label set.");
  if (name.includes("/") || name.startsWith(".")) throw new Error("The name of a label set must not contain / or start with a dot.");
  try {
    await fetchOrThrow(pathOf("label-sets", name), jsonOptions("PUT", { classes }, { "If-None-Match": "*" }));
    return name;
  } catch (error) {
    if (error.status !== 412) throw error;
    const suggested = await freeName(name);
    throw Object.assign(new Error(`A label set “${name}” exists already, and is not changed. Take another name, for example “${suggested}”; or classify with the label set “${name}” to add to it.`), { suggested });
  }
}

async function freeName(name) {
  for (let number = 2; number < MAX_NAMES_TRIED; number += 1) {
    try {
      await fetchOrThrow(pathOf("label-sets", `${name}-${number}`));
    } catch (error) {
      if (error.status === 404) return `${name}-${number}`;
      throw error;
    }
  }
  return `${name}-${Date.now()}`;
}

/** Add a class to a label set that does not have it. */
async function addClass(setName, label) {
  const { classes } = await requestJson(pathOf("label-sets", setName));
  if (classes.some((entry) => entry.name.toLowerCase() === label.toLowerCase())) return;
  await requestJson(pathOf("label-sets", setName, "classes"), jsonOptions("POST", { classes: [label] }));
}

async function addExample(setName, picture, label) {
  const form = new FormData();
  form.append("image", picture.file, picture.name || "image");
  form.append("class", label);
  return requestJson(pathOf("label-sets", setName, "images"), { method: "POST", body: form });
}

// --- the counter -----------------------------------------------------------------------------------------------------

/**
 * Show the number of examples of a label set in an element, and what they are known to change.
 *
 * `learned` is what `onLearned` received; without `counts`, they are read. The sentence about accuracy follows when the
 * server has compared the methods on the examples.
 */
export async function showLearning(container, { labelSet, counts = null, job = null }) {
  const sentence = create("p", { className: "learning", role: "status" });
  container.replaceChildren(sentence);
  try {
    const current = counts ?? (await requestJson(`${pathOf("label-sets", labelSet, "images")}?limit=1`)).counts;
    sentence.textContent = `${countedExamples(current)} ${await whatIsKnown(labelSet, current.labelled, job)}`;
  } catch (error) {
    sentence.textContent = error.message;
  }
}

function countedExamples({ labelled, labelled_images: total }) {
  return `${countText(total, "example")} in ${countText(Object.keys(labelled).length, "class", "classes")}.`;
}

async function whatIsKnown(labelSet, labelled, job) {
  const most = Math.max(0, ...Object.values(labelled));
  if (most < 2) return "Two of one class are needed before the server can check whether learning from them helps.";
  if (job) await waitForJob(await requestJson(pathOf("jobs", job)), () => {});
  const selection = await requestJson(pathOf("label-sets", labelSet, "selection"));
  return selection.current ? describeSelection(selection) : "The server is comparing the methods on them.";
}

/** Say what a selection shows: the measured accuracies, with their intervals, and whether a difference is clear. */
export function describeSelection({ method, folds, labelled, leaderboard }) {
  if (!folds) return "More per class will show whether learning from them helps.";
  const rowOf = (wanted) => leaderboard.find((row) => row.method === wanted);
  const chosen = rowOf(method), plain = rowOf("zero-shot");
  const share = (row) => `${percent(row.accuracy)} (95 % interval ${Math.round(100 * row.interval[0])} to ${Math.round(100 * row.interval[1])} %)`;
  if (!chosen || !plain) return "More per class will show whether learning from them helps.";
  const on = `Measured on these ${countText(labelled, "example")}, each held out in turn`;
  if (chosen === plain) return `${on}: no method that learns is clearly better than the text alone, which is right on ${share(plain)}. More examples per class narrow this.`;
  const isClear = chosen.to_zero_shot && chosen.to_zero_shot.p < 0.05;
  return `${on}: ${method} is right on ${share(chosen)}, the text alone on ${share(plain)}; ${isClear ? "a significant gain" : "too few examples to be sure of the gain"}. ${method} is now used.`;
}
