// What is asked is kept in two lists, pictures and words, and in the fields of the form.

import { ask, at, headers, made, option, percent, showIn } from "./ask.js";

let pictures = []; // {name, file, url}
let words = [];
let methods = [];
let asked = 0;

// --- pictures ------------------------------------------------------------------------------------------------------

function addPictures(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/") || file.type === "");
  pictures.push(...images.map((file) => ({ name: file.name || "pasted", file, url: URL.createObjectURL(file) })));
  showPictures();
}

function showPictures() {
  at("pictures").replaceChildren(
    ...pictures.map((picture, index) => {
      const remove = made("button", { type: "button", className: "remove", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${picture.name}`);
      remove.onclick = () => {
        URL.revokeObjectURL(picture.url);
        pictures.splice(index, 1);
        showPictures();
      };
      return made("li", {}, made("img", { src: picture.url, alt: picture.name }), remove);
    }),
  );
}

function drawn(name, paint) {
  const canvas = made("canvas", { width: 320, height: 240 });
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#f2efe6";
  brush.fillRect(0, 0, 320, 240);
  paint(brush);
  return new Promise((done) => canvas.toBlob((blob) => done(new File([blob], `${name}.png`, { type: "image/png" }))));
}

const SAMPLES = {
  "red circle": (b) => { b.fillStyle = "#d12f2f"; b.beginPath(); b.arc(160, 120, 80, 0, 7); b.fill(); },
  "blue square": (b) => { b.fillStyle = "#2456c9"; b.fillRect(90, 50, 140, 140); },
  "green triangle": (b) => {
    b.fillStyle = "#2f9a4a";
    b.beginPath(); b.moveTo(160, 40); b.lineTo(250, 200); b.lineTo(70, 200); b.fill();
  },
  "yellow star": (b) => {
    b.fillStyle = "#e8b714";
    b.beginPath();
    for (let point = 0; point < 10; point += 1) {
      const angle = (point * Math.PI) / 5 - Math.PI / 2, radius = point % 2 ? 38 : 95;
      b.lineTo(160 + radius * Math.cos(angle), 125 + radius * Math.sin(angle));
    }
    b.fill();
  },
  "smiling face": (b) => {
    b.fillStyle = "#f4c430"; b.beginPath(); b.arc(160, 120, 90, 0, 7); b.fill();
    b.fillStyle = "#222"; b.beginPath(); b.arc(130, 95, 10, 0, 7); b.arc(190, 95, 10, 0, 7); b.fill();
    b.lineWidth = 8; b.strokeStyle = "#222"; b.beginPath(); b.arc(160, 120, 55, 0.3, Math.PI - 0.3); b.stroke();
  },
  "house": (b) => {
    b.fillStyle = "#c9875a"; b.fillRect(100, 110, 120, 90);
    b.fillStyle = "#8c3b2e"; b.beginPath(); b.moveTo(85, 110); b.lineTo(160, 45); b.lineTo(235, 110); b.fill();
    b.fillStyle = "#5b3a26"; b.fillRect(145, 150, 30, 50);
    b.fillStyle = "#bfe3f2"; b.fillRect(112, 125, 24, 24); b.fillRect(184, 125, 24, 24);
  },
  "tree": (b) => {
    b.fillStyle = "#7a5230"; b.fillRect(148, 140, 24, 70);
    b.fillStyle = "#3c8f4a";
    for (const [x, y] of [[160, 80], [120, 110], [200, 110], [160, 120]]) { b.beginPath(); b.arc(x, y, 48, 0, 7); b.fill(); }
  },
  "sailing boat": (b) => {
    b.fillStyle = "#9bd0ee"; b.fillRect(0, 0, 320, 240); b.fillStyle = "#2d6f9e"; b.fillRect(0, 170, 320, 70);
    b.fillStyle = "#7a4a2a"; b.beginPath(); b.moveTo(80, 165); b.lineTo(240, 165); b.lineTo(210, 200); b.lineTo(110, 200); b.fill();
    b.fillStyle = "#fff"; b.beginPath(); b.moveTo(160, 35); b.lineTo(160, 155); b.lineTo(235, 155); b.fill();
  },
  "night sky with moon": (b) => {
    b.fillStyle = "#0d1430"; b.fillRect(0, 0, 320, 240);
    b.fillStyle = "#f4f0d0"; b.beginPath(); b.arc(200, 80, 45, 0, 7); b.fill();
    for (let star = 0; star < 40; star += 1) b.fillRect((star * 73) % 320, (star * 47) % 240, 2, 2);
  },
  "flag with stripes": (b) => {
    for (const [row, colour] of ["#b22234", "#fff", "#b22234", "#fff", "#b22234"].entries()) {
      b.fillStyle = colour; b.fillRect(40, 50 + row * 28, 240, 28);
    }
  },
};

// --- words ---------------------------------------------------------------------------------------------------------

function addWords() {
  for (const word of at("word").value.split(/[,\n]/).map((each) => each.trim()).filter(Boolean)) {
    if (!words.some((each) => each.toLowerCase() === word.toLowerCase())) words.push(word);
  }
  at("word").value = "";
  showWords();
}

function showWords() {
  at("chips").replaceChildren(
    ...words.map((word, index) => {
      const remove = made("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${word}`);
      remove.onclick = () => { words.splice(index, 1); showWords(); };
      return made("li", {}, word, remove);
    }),
  );
}

const source = () => document.querySelector("input[name=words]:checked").value;

function showSource() {
  for (const each of ["labels", "label_set", "none"]) at(`words-${each}`).hidden = each !== source();
  if (source() === "label_set") loadLabelSets().catch(showError);
}

async function loadLabelSets() {
  const chosen = at("label-set").value;
  const told = await ask("v1/label-sets?limit=1000");
  at("label-set").replaceChildren(...told.label_sets.map((each) => made("option", { value: each.name, textContent: `${each.name} (version ${each.version})` })));
  if (chosen) at("label-set").value = chosen;
  at("no-label-sets").hidden = told.label_sets.length > 0;
}

// --- the question and its answer -----------------------------------------------------------------------------------

function question() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const given = {
    labels: source() === "labels" ? words : undefined, label_set: source() === "label_set" ? at("label-set").value : undefined,
    group: source() === "none" && at("group").checked ? true : undefined, method: at("method").value, model: at("model").value,
    template: at("template").value.trim(), top_k: number("top-k"), reject_below: number("reject-below"),
    explain: at("explain").checked ? true : undefined,
  };
  return Object.entries(given).filter(([, value]) => value !== undefined && value !== "");
}

const fields = () => question().map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]);

async function classify(event) {
  event.preventDefault();
  addWords();
  const missing = !pictures.length ? "Choose at least one picture." : source() === "labels" && !words.length ? "Say at least one word." : source() === "label_set" && !at("label-set").value ? "Choose a label set." : "";
  if (missing) return showError(new Error(missing));
  asked += 1;
  const mine = asked, shown = [...pictures];
  const form = new FormData();
  for (const picture of shown) form.append("image", picture.file, picture.name);
  for (const [name, value] of fields()) form.append(name, value);
  at("error").hidden = true;
  at("status").textContent = "Looking…";
  at("classify").disabled = true;
  try {
    const answer = await ask("v1/classify", { method: "POST", body: form });
    if (mine === asked) showAnswer(answer, shown);
  } catch (error) {
    if (mine === asked) showError(error);
  } finally {
    at("classify").disabled = false;
  }
}

function showError(error) {
  at("status").textContent = "";
  showIn("error", error);
}

function showAnswer(answer, shown) {
  const took = Object.values(answer.timing_ms).reduce((sum, each) => sum + each, 0);
  at("status").textContent = `${answer.method} with ${answer.model}, ${Math.round(took)} ms${answer.reason ? `; ${answer.reason}` : ""}`;
  at("answers").replaceChildren(...answer.results.map((result, index) => item(result, shown[index])));
  at("code").hidden = false;
  showCode(shown);
  at("results").focus();
}

function item(result, picture) {
  const told = made("div");
  if (result.error) {
    told.append(made("p", { className: "problem", textContent: `${result.error.title}: ${result.error.detail}` }));
  } else {
    const bars = result.predictions.map((each) => {
      const filled = made("i");
      filled.style.width = `${Math.max(0, Math.min(1, each.score)) * 100}%`;
      const bar = made("div", { className: "bar", title: `cosine ${each.similarity.toFixed(3)}` }, filled, made("span", { textContent: each.label }));
      return made("li", {}, bar, made("span", { className: "score", textContent: percent(each.score) }));
    });
    told.append(made("ol", { className: "bars" }, ...bars));
    if (result.rejected) told.append(made("p", { className: "note", textContent: "None of these: the best score is below the threshold." }));
    if (result.out_of_vocabulary) told.append(made("p", { className: "hint", textContent: `unlike all words: ${result.out_of_vocabulary.mcm.toFixed(2)} (higher for something else)` }));
    for (const warning of result.warnings) told.append(made("p", { className: "note", textContent: warning }));
    if (result.explanation) told.append(explanation(result.explanation));
  }
  return made("li", {}, made("img", { src: picture.url, alt: picture.name }), told);
}

function explanation(given) {
  const inner = (given.labels || []).map((each) => {
    const title = `${each.label}${each.rival ? ` against ${each.rival}` : ""}`;
    const prompts = [
      ...each.supporting.map((prompt) => prompted(prompt, "+", "for")),
      ...each.opposing.map((prompt) => prompted(prompt, "−", "against")),
    ];
    return made("div", {}, made("h3", { textContent: title }), made("ul", { className: "prompts" }, ...prompts));
  });
  const captions = (given.captions || []).map((each) => made("li", {}, made("span"), made("span", { textContent: each.score.toFixed(3) }), made("span", { textContent: each.caption })));
  if (captions.length) inner.push(made("div", {}, made("h3", { textContent: "captions near it" }), made("ul", { className: "prompts" }, ...captions)));
  return made("details", { open: false }, made("summary", { textContent: "Why" }), ...inner);
}

function prompted(prompt, sign, kind) {
  return made("li", { className: kind }, made("span", { textContent: sign }), made("span", { textContent: prompt.cosine.toFixed(3) }), made("span", { textContent: prompt.prompt }));
}

// --- code to copy --------------------------------------------------------------------------------------------------

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const inPython = (value) =>
  Array.isArray(value) ? `[${value.map(inPython).join(", ")}]` : value === true ? "True" : JSON.stringify(value);

function showCode(shown) {
  const url = new URL("v1/classify", document.baseURI).href;
  const names = shown.map((picture) => picture.name);
  const hasKey = Boolean(headers().Authorization);
  at("curl").textContent = [
    "curl", ...(hasKey ? ['-H "Authorization: Bearer $DEIXIS_API_KEY"'] : []),
    ...names.map((name) => `-F image=@${inShell(name)}`),
    ...fields().map(([name, value]) => `-F ${inShell(`${name}=${value}`)}`), url,
  ].join(" \\\n  ");
  at("python").textContent = [
    `import deixis  # pip install deixis${hasKey ? "; takes the key from DEIXIS_API_KEY" : ""}`, "",
    `with deixis.Client(${JSON.stringify(new URL(".", document.baseURI).href)}) as client:`,
    "    answer = client.classify(",
    ...names.map((name) => `        ${JSON.stringify(name)},`),
    ...question().map(([name, value]) => `        ${name}=${inPython(value)},`),
    "    )", "for result in answer.results:", "    print(result.error or result.predictions[0])",
  ].join("\n");
}

// --- the form ------------------------------------------------------------------------------------------------------

async function loadChoices() {
  const [models, told] = await Promise.all([ask("v1/models"), ask("v1/methods")]);
  methods = told.methods;
  const chosen = [at("model").value, at("method").value];
  at("model").replaceChildren(...models.models.map((each) => option(each.name, each.name)));
  at("method").replaceChildren(option("", "by default"), option("auto", "auto"), ...methods.map((each) => option(each.name, each.name)));
  if (chosen[0]) [at("model").value, at("method").value] = chosen;
  at("error").hidden = true;
}

at("question").addEventListener("submit", classify);
at("files").onchange = at("camera").onchange = (event) => { addPictures(event.target.files); event.target.value = ""; };
at("samples").onclick = async () => addPictures(await Promise.all(Object.entries(SAMPLES).map(([name, paint]) => drawn(name, paint))));
at("add").onclick = addWords;
at("word").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (at("word").value.trim()) addWords();
  else at("question").requestSubmit();
};
at("method").onchange = () => { at("method-summary").textContent = methods.find((each) => each.name === at("method").value)?.summary || ""; };
for (const radio of document.querySelectorAll("input[name=words]")) radio.onchange = showSource;
for (const button of document.querySelectorAll(".copy")) {
  button.onclick = async () => {
    await navigator.clipboard.writeText(at(button.dataset.of).textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
}

export const isShown = () => !at("view-classify").hidden;

document.addEventListener("drop", (event) => { if (isShown()) addPictures(event.dataTransfer.files); });
document.addEventListener("paste", (event) => { if (isShown() && event.clipboardData.files.length) addPictures(event.clipboardData.files); });

export function show() {
  loadChoices().catch(showError);
  if (source() === "label_set") showSource();
}
