// The view Classify: pictures and words in, scores and reasons out.
import { at, made, option, refocus, words as wordsIn } from "./elements.js";
import { ask, Refusal } from "./ask.js";
import { hush, tell } from "./refusals.js";
import { allDatabases, allLabelSets, catalogue } from "./catalogue.js";
import { dropZone, onChosen } from "./dropping.js";
import { pictureList } from "./pictures.js";
import { SAMPLE_NAMES, samplePictures } from "./samples.js";
import { answerItem } from "./answers.js";
import { inForm, showCode, startCopying } from "./code.js";

const pictures = pictureList(at("pictures"), { otherwise: at("files"), note: at("left-out") });
const words = [];
let asked = 0;

export const takePictures = pictures.add;

/** Show the view; `name` is that of a label set to choose. */
export async function showClassify({ name = "" }) {
  try {
    await loadChoices();
    if (name) {
      document.querySelector("input[name=words][value=label_set]").checked = true;
      await showSource(name);
    } else if (source() !== "labels") {
      await showSource();
    }
    hush(at("error"));
  } catch (error) {
    showError(error);
  }
}

// --- words -----------------------------------------------------------------------------------------------------------

function addWords(added = wordsIn(at("word").value)) {
  for (const word of added) {
    if (!words.some((each) => each.toLowerCase() === word.toLowerCase())) words.push(word);
  }
  at("word").value = "";
  showWords();
}

function showWords() {
  at("chips").replaceChildren(
    ...words.map((word, index) => {
      const remove = made("button", { type: "button", textContent: "×", "aria-label": `Remove ${word}` });
      remove.onclick = () => {
        words.splice(index, 1);
        showWords();
        refocus(at("chips"), index, at("word"));
      };
      return made("li", {}, word, remove);
    }),
  );
  at("forget-words").hidden = words.length < 2;
}

const source = () => document.querySelector("input[name=words]:checked").value;

async function showSource(name = "") {
  for (const each of ["labels", "label_set", "none"]) at(`words-${each}`).hidden = each !== source();
  if (source() === "label_set") {
    const found = await allLabelSets();
    choose(at("label-set"), found.map((each) => option(each.name, `${each.name} (${each.classes} classes)`)), name);
    at("label-set-field").hidden = !found.length;
    at("no-label-sets").hidden = found.length > 0;
  }
  if (source() === "none") {
    const found = (await allDatabases()).filter((each) => !each.problem);
    choose(at("database"), [option("", "by default"), ...found.map((each) => option(each.name))]);
  }
}

/** Fill a list of choices; what is chosen stays, where it is still there. */
function choose(select, options, wanted = "") {
  const chosen = wanted || select.value;
  select.replaceChildren(...options);
  if (options.some((each) => each.value === chosen)) select.value = chosen;
}

// --- the question and its answer -------------------------------------------------------------------------------------

function fields() {
  const number = (id) => (at(id).value === "" ? "" : Number(at(id).value));
  const given = {
    method: at("method").value, model: at("model").value, template: at("template").value.trim(), top_k: number("top-k"),
    reject_below: number("reject-below"), explain: at("explain").checked || "",
  };
  if (source() === "labels") given.labels = [...words];
  if (source() === "label_set") given.label_set = at("label-set").value;
  if (source() === "none") Object.assign(given, { database: at("database").value, group: at("group").checked || "" });
  return Object.entries(given).filter(([, value]) => value !== "");
}

function missing() {
  if (!pictures.all().length) return "Choose at least one picture.";
  if (source() === "labels" && !words.length) return "Say at least one word.";
  if (source() === "label_set" && !at("label-set").value) return "Choose a label set.";
  return "";
}

const CONTROLS = {
  template: "template", top_k: "top-k", reject_below: "reject-below", method: "method", model: "model", label_set: "label-set",
  database: "database", group: "group", labels: "word",
};

function controlOf(field) {
  const [name] = field.split("."); // labels.3 is told at the place where labels are typed
  return name in CONTROLS ? at(CONTROLS[name]) : null;
}

async function classify(event) {
  event.preventDefault();
  addWords();
  if (missing()) {
    showError(new Refusal(missing()));
    return;
  }
  asked += 1;
  const mine = asked, shown = pictures.all(), sent = fields();
  const form = new FormData();
  for (const picture of shown) form.append("image", picture.file, picture.name);
  for (const [name, value] of sent) form.append(name, inForm(value));
  hush(at("error"));
  at("status").textContent = "Looking…";
  at("classify").disabled = true;
  try {
    const answer = await ask("v1/classify", { method: "POST", body: form });
    if (mine === asked) showAnswer(answer, shown, sent);
  } catch (error) {
    if (mine === asked) showError(error);
  } finally {
    at("classify").disabled = false;
  }
}

function showError(error) {
  at("status").textContent = "";
  at("answers").replaceChildren(); // they are to another question
  at("code").hidden = true;
  tell(error, at("error"), controlOf);
}

function showAnswer(answer, shown, sent) {
  const took = Object.values(answer.timing_ms).reduce((sum, each) => sum + each, 0);
  const method = `Method ${answer.method}, model ${answer.model}, ${Math.round(took)} ms`;
  at("status").textContent = answer.reason ? `${method}. Why this method: ${answer.reason}.` : `${method}.`;
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
  choose(at("method"), [option("", "by default"), option("auto"), ...methods.map((each) => option(each.name))]);
  at("method").onchange = () => {
    at("method-summary").textContent = methods.find((each) => each.name === at("method").value)?.summary || "";
  };
}

function useSamples() {
  pictures.add(samplePictures());
  at("left-out").textContent = "Drawings are hard for a model that learned from photographs: judge it by your own.";
  if (!words.length && !at("word").value.trim() && source() === "labels") addWords(SAMPLE_NAMES);
}

/** Begin to listen to the form. */
export function startClassify() {
  at("question").addEventListener("submit", classify);
  onChosen(at("files"), pictures.add);
  onChosen(at("camera"), pictures.add);
  at("camera-button").hidden = !navigator.maxTouchPoints; // elsewhere browsers take it for one more way to choose files
  dropZone(at("drop"), pictures.add);
  at("samples").onclick = useSamples;
  at("add").onclick = () => addWords();
  at("forget-words").onclick = () => {
    words.length = 0;
    showWords();
    at("word").focus();
  };
  at("word").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (at("word").value.trim()) addWords();
    else at("question").requestSubmit();
  };
  for (const radio of document.querySelectorAll("input[name=words]")) {
    radio.onchange = () => showSource().then(() => hush(at("error")), showError);
  }
  startCopying();
}
