// The view Classify: images and labels in, scores and explanations out.
import { at, create, option, refocus, labelsIn } from "./elements.js";
import { ask, Refusal } from "./ask.js";
import { clearRefusal, showRefusal } from "./refusals.js";
import { allDatabases, allLabelSets, catalogue } from "./catalogue.js";
import { dropZone, onChosen } from "./dropping.js";
import { pictureList } from "./pictures.js";
import { SAMPLE_NAMES, samplePictures } from "./samples.js";
import { answerItem } from "./answers.js";
import { inForm, showCode, startCopying } from "./code.js";

const pictures = pictureList(at("pictures"), { otherwise: at("files"), note: at("left-out") });
const labels = [];
let requests = 0;

export const takePictures = pictures.add;

/** Show the view; `name` is the label set to select. */
export async function showClassify({ name = "" }) {
  try {
    await loadChoices();
    if (name) {
      document.querySelector("input[name=source][value=label_set]").checked = true;
      await showSource(name);
    } else if (source() !== "labels") {
      await showSource();
    }
    clearRefusal(at("error"));
  } catch (error) {
    showError(error);
  }
}

// --- labels -----------------------------------------------------------------------------------------------------------

function addLabels(added = labelsIn(at("new-labels").value)) {
  for (const label of added) {
    if (!labels.some((each) => each.toLowerCase() === label.toLowerCase())) labels.push(label);
  }
  at("new-labels").value = "";
  showLabels();
}

function showLabels() {
  at("labels").replaceChildren(
    ...labels.map((label, index) => {
      const remove = create("button", { type: "button", textContent: "×", "aria-label": `Remove ${label}` });
      remove.onclick = () => {
        labels.splice(index, 1);
        showLabels();
        refocus(at("labels"), index, at("new-labels"));
      };
      return create("li", {}, label, remove);
    }),
  );
  at("remove-labels").hidden = labels.length < 2;
}

const source = () => document.querySelector("input[name=source]:checked").value;

async function showSource(name = "") {
  for (const each of ["labels", "label_set", "none"]) at(`source-${each}`).hidden = each !== source();
  if (source() === "label_set") {
    const found = await allLabelSets();
    choose(at("label-set"), found.map((each) => option(each.name, `${each.name} (${each.classes} classes)`)), name);
    at("label-set-field").hidden = !found.length;
    at("no-label-sets").hidden = found.length > 0;
  }
  if (source() === "none") {
    const found = (await allDatabases()).filter((each) => !each.problem);
    choose(at("database"), [option("", "default"), ...found.map((each) => option(each.name))]);
  }
}

/** Fill a select element; the selected option stays selected if it still exists. */
function choose(select, options, wanted = "") {
  const chosen = wanted || select.value;
  select.replaceChildren(...options);
  if (options.some((each) => each.value === chosen)) select.value = chosen;
}

// --- the request and its response -------------------------------------------------------------------------------------

function fields() {
  const number = (id) => (at(id).value === "" ? "" : Number(at(id).value));
  const values = {
    method: at("method").value, model: at("model").value, template: at("template").value.trim(), top_k: number("top-k"),
    reject_below: number("reject-below"), explain: at("explain").checked || "",
  };
  if (source() === "labels") values.labels = [...labels];
  if (source() === "label_set") values.label_set = at("label-set").value;
  if (source() === "none") Object.assign(values, { database: at("database").value, group: at("group").checked || "" });
  return Object.entries(values).filter(([, value]) => value !== "");
}

function missing() {
  if (!pictures.all().length) return "Select at least one image.";
  if (source() === "labels" && !labels.length) return "Enter at least one label.";
  if (source() === "label_set" && !at("label-set").value) return "Select a label set.";
  return "";
}

const CONTROLS = {
  template: "template", top_k: "top-k", reject_below: "reject-below", method: "method", model: "model", label_set: "label-set",
  database: "database", group: "group", labels: "new-labels",
};

function controlOf(field) {
  const [name] = field.split("."); // an error in labels.3 is shown at the input for labels
  return name in CONTROLS ? at(CONTROLS[name]) : null;
}

async function classify(event) {
  event.preventDefault();
  addLabels();
  if (missing()) {
    showError(new Refusal(missing()));
    return;
  }
  requests += 1;
  const current = requests, shown = pictures.all(), sent = fields();
  const form = new FormData();
  for (const picture of shown) form.append("image", picture.file, picture.name);
  for (const [name, value] of sent) form.append(name, inForm(value));
  clearRefusal(at("error"));
  at("status").textContent = "Classifying…";
  at("classify").disabled = true;
  try {
    const answer = await ask("v1/classify", { method: "POST", body: form });
    if (current === requests) showAnswer(answer, shown, sent);
  } catch (error) {
    if (current === requests) showError(error);
  } finally {
    at("classify").disabled = false;
  }
}

function showError(error) {
  at("status").textContent = "";
  at("answers").replaceChildren(); // the results of an earlier request
  at("code").hidden = true;
  showRefusal(error, at("error"), controlOf);
}

function showAnswer(answer, shown, sent) {
  const took = Object.values(answer.timing_ms).reduce((sum, each) => sum + each, 0);
  const method = `Method ${answer.method}, model ${answer.model}, ${Math.round(took)} ms`;
  at("status").textContent = answer.reason ? `${method}. Reason for this method: ${answer.reason}.` : `${method}.`;
  at("answers").replaceChildren(...answer.results.map((result, index) => answerItem(result, shown[index])));
  at("no-answers").hidden = true;
  at("code").hidden = false;
  showCode(shown.map((picture) => picture.name), sent);
  at("results").focus();
}

// --- the form --------------------------------------------------------------------------------------------------------

async function loadChoices() {
  const { models, methods } = await catalogue();
  choose(at("model"), models.map((each) => option(each.name)));
  choose(at("method"), [option("", "default"), option("auto"), ...methods.map((each) => option(each.name))]);
  at("method").onchange = () => {
    at("method-summary").textContent = methods.find((each) => each.name === at("method").value)?.summary || "";
  };
}

function useSamples() {
  pictures.add(samplePictures());
  at("left-out").textContent = "These are drawings, which are difficult for a model trained on photographs. Use your own images to judge the model.";
  if (!labels.length && !at("new-labels").value.trim() && source() === "labels") addLabels(SAMPLE_NAMES);
}

/** Register the event handlers of the form. */
export function startClassify() {
  at("classify-form").addEventListener("submit", classify);
  onChosen(at("files"), pictures.add);
  onChosen(at("camera"), pictures.add);
  at("camera-button").hidden = !navigator.maxTouchPoints; // without a touch screen, browsers treat it as another file chooser
  dropZone(at("drop"), pictures.add);
  at("samples").onclick = useSamples;
  at("add-labels").onclick = () => addLabels();
  at("remove-labels").onclick = () => {
    labels.length = 0;
    showLabels();
    at("new-labels").focus();
  };
  at("new-labels").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (at("new-labels").value.trim()) addLabels();
    else at("classify-form").requestSubmit();
  };
  for (const radio of document.querySelectorAll("input[name=source]")) {
    radio.onchange = () => showSource().then(() => clearRefusal(at("error")), showError);
  }
  startCopying();
}
