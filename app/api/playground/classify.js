// The view Classify: images and labels in, scores and explanations out.
import { byId, create, focusLater, option, refocus, splitLabels } from "./elements.js";
import { requestJson, RequestError } from "./requests.js";
import { clearRequestError, showRequestError } from "./request_errors.js";
import { allDatabases, allLabelSets, catalogue } from "./catalogue.js";
import { dropZone, onFilesSelected } from "./file_drops.js";
import { pictureList } from "./pictures.js";
import { SAMPLE_NAMES, samplePictures } from "./samples.js";
import { resultItem } from "./results.js";
import { formValue, showCode, startCopying } from "./code.js";

const pictures = pictureList(byId("pictures"), { otherwise: byId("files"), note: byId("left-out") });
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
    clearRequestError(byId("error"));
  } catch (error) {
    showError(error);
  }
}

// --- labels -----------------------------------------------------------------------------------------------------------

function addLabels(added = splitLabels(byId("new-labels").value)) {
  for (const label of added) {
    if (!labels.some((entry) => entry.toLowerCase() === label.toLowerCase())) labels.push(label);
  }
  byId("new-labels").value = "";
  showLabels();
}

function showLabels() {
  byId("labels").replaceChildren(
    ...labels.map((label, index) => {
      const remove = create("button", { type: "button", textContent: "×", "aria-label": `Remove ${label}` });
      remove.onclick = () => {
        labels.splice(index, 1);
        showLabels();
        refocus(byId("labels"), index, byId("new-labels"));
      };
      return create("li", {}, label, remove);
    }),
  );
  byId("remove-labels").hidden = labels.length < 2;
}

const source = () => document.querySelector("input[name=source]:checked").value;

async function showSource(name = "") {
  for (const entry of ["labels", "label_set", "none"]) byId(`source-${entry}`).hidden = entry !== source();
  if (source() === "label_set") {
    const found = await allLabelSets();
    fillSelect(byId("label-set"), found.map((entry) => option(entry.name, `${entry.name} (${entry.classes} classes)`)), name);
    byId("label-set-field").hidden = !found.length;
    byId("no-label-sets").hidden = found.length > 0;
  }
  if (source() === "none") {
    const found = (await allDatabases()).filter((entry) => !entry.problem);
    fillSelect(byId("database"), [option("", "default"), ...found.map((entry) => option(entry.name))]);
  }
}

/** Fill a select element; the selected option stays selected if it still exists. */
function fillSelect(select, options, value = "") {
  const chosen = value || select.value;
  select.replaceChildren(...options);
  if (options.some((entry) => entry.value === chosen)) select.value = chosen;
}

// --- the request and its response -------------------------------------------------------------------------------------

function fields() {
  const number = (id) => (byId(id).value === "" ? "" : Number(byId(id).value));
  const values = {
    method: byId("method").value, model: byId("model").value, template: byId("template").value.trim(), top_k: number("top-k"),
    reject_below: number("reject-below"), explain: byId("explain").checked || "",
  };
  if (source() === "labels") values.labels = [...labels];
  if (source() === "label_set") values.label_set = byId("label-set").value;
  if (source() === "none") Object.assign(values, { database: byId("database").value, group: byId("group").checked || "" });
  return Object.entries(values).filter(([, value]) => value !== "");
}

function missingInput() {
  if (!pictures.all().length) return "Select at least one image.";
  if (source() === "labels" && !labels.length) return "Enter at least one label.";
  if (source() === "label_set" && !byId("label-set").value) return "Select a label set.";
  return "";
}

const CONTROLS = {
  template: "template", top_k: "top-k", reject_below: "reject-below", method: "method", model: "model", label_set: "label-set",
  database: "database", group: "group", labels: "new-labels",
};

function controlOf(field) {
  const [name] = field.split("."); // an error in labels.3 is shown at the input for labels
  return name in CONTROLS ? byId(CONTROLS[name]) : null;
}

async function classify(event) {
  event.preventDefault();
  addLabels();
  if (missingInput()) {
    showError(new RequestError(missingInput()));
    return;
  }
  requests += 1;
  const current = requests, shown = pictures.all(), sent = fields();
  const focus = focusLater(), form = new FormData();
  for (const picture of shown) form.append("image", picture.file, picture.name);
  for (const [name, value] of sent) form.append(name, formValue(value));
  clearRequestError(byId("error"));
  byId("status").textContent = "Classifying…";
  byId("classify").disabled = true;
  try {
    const response = await requestJson("v1/classify", { method: "POST", body: form });
    if (current === requests) showResponse(response, shown, sent, focus);
  } catch (error) {
    if (current === requests) showError(error);
  } finally {
    byId("classify").disabled = false;
  }
}

function showError(error) {
  byId("status").textContent = "";
  byId("answers").replaceChildren(); // the results of an earlier request
  byId("code").hidden = true;
  showRequestError(error, byId("error"), controlOf);
}

function showResponse(response, shown, sent, focus) {
  const totalMs = Object.values(response.timing_ms).reduce((sum, number) => sum + number, 0);
  const method = `Method ${response.method}, model ${response.model}, ${Math.round(totalMs)} ms`;
  byId("status").textContent = response.reason ? `${method}. Reason for this method: ${response.reason}.` : `${method}.`;
  byId("answers").replaceChildren(...response.results.map((result, index) => resultItem(result, shown[index])));
  byId("no-answers").hidden = true;
  byId("code").hidden = false;
  showCode(shown.map((picture) => picture.name), sent);
  focus(byId("results"));
}

// --- the form --------------------------------------------------------------------------------------------------------

async function loadChoices() {
  const { models, methods } = await catalogue();
  fillSelect(byId("model"), models.map((entry) => option(entry.name)));
  fillSelect(byId("method"), [option("", "default"), option("auto"), ...methods.map((entry) => option(entry.name))]);
  byId("method").onchange = () => {
    byId("method-summary").textContent = methods.find((entry) => entry.name === byId("method").value)?.summary || "";
  };
}

function useSamples() {
  pictures.add(samplePictures());
  byId("left-out").textContent = "These are drawings, which are difficult for a model trained on photographs. Use your own images to judge the model.";
  if (!labels.length && !byId("new-labels").value.trim() && source() === "labels") addLabels(SAMPLE_NAMES);
}

/** Register the event handlers of the form. */
export function startClassify() {
  byId("classify-form").addEventListener("submit", classify);
  onFilesSelected(byId("files"), pictures.add);
  onFilesSelected(byId("camera"), pictures.add);
  byId("camera-button").hidden = !navigator.maxTouchPoints; // without a touch screen, browsers treat it as another file chooser
  dropZone(byId("drop"), pictures.add);
  byId("samples").onclick = useSamples;
  byId("add-labels").onclick = () => addLabels();
  byId("remove-labels").onclick = () => {
    labels.length = 0;
    showLabels();
    byId("new-labels").focus();
  };
  byId("new-labels").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (byId("new-labels").value.trim()) addLabels();
    else byId("classify-form").requestSubmit();
  };
  for (const radio of document.querySelectorAll("input[name=source]")) {
    radio.onchange = () => showSource().then(() => clearRequestError(byId("error")), showError);
  }
  startCopying();
}
