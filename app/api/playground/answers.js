// What the classifier answered for one picture: bars of scores, notes, and the reasons.
import { made, percent } from "./elements.js";

/** Return the list item of a picture's result. */
export function answerItem(result, picture) {
  const told = made("div", {}, made("p", { className: "file-name", textContent: picture.name }));
  if (result.error) told.append(made("p", { className: "problem", textContent: `${result.error.title}: ${result.error.detail}` }));
  else told.append(...answered(result));
  return made("li", {}, made("img", { src: picture.url, alt: "" }), told);
}

/** Return a row of a chart: a text on a bar, and the figure behind it. */
export function bar(text, share, figure, title = "") {
  const filled = made("i");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return made(
    "li", {}, made("div", { className: "bar", title }, filled, made("span", { textContent: text })), made("span", { className: "score", textContent: figure }),
  );
}

function answered(result) {
  const bars = result.predictions.map((each) => bar(each.label, each.score, percent(each.score), `cosine ${each.similarity.toFixed(3)}`));
  const parts = [made("ol", { className: "bars" }, ...bars)];
  if (result.rejected) parts.push(made("p", { className: "note", textContent: "None of these: the best score is below the threshold." }));
  parts.push(...result.warnings.map((warning) => made("p", { className: "note", textContent: warning })));
  const unlike = result.out_of_vocabulary ? [unlikeness(result.out_of_vocabulary.mcm)] : [];
  if (result.explanation) parts.push(explanation(result.explanation, unlike));
  else parts.push(...unlike);
  return parts;
}

function unlikeness(mcm) {
  const sentence = `Unlike all of the words: ${mcm.toFixed(2)} of 1, by maximum concept matching. Compare it between pictures: it is higher for something else.`;
  return made("p", { className: "hint", textContent: sentence });
}

function explanation(given, more) {
  const labels = given.labels.map((each) => {
    const title = each.rival ? `${each.label}, against ${each.rival}` : each.label;
    const prompts = [
      ...each.supporting.map((prompt) => spoken("+", "for", prompt.cosine, prompt.prompt)),
      ...each.opposing.map((prompt) => spoken("−", "against", prompt.cosine, prompt.prompt)),
    ];
    return made("div", {}, made("h3", { textContent: title }), made("ul", { className: "prompts" }, ...prompts));
  });
  const captions = given.captions.map((each) => spoken("", "near", each.similarity, each.suggested.length ? `${each.caption} (${each.suggested.join(", ")})` : each.caption));
  const near = captions.length ? [made("div", {}, made("h3", { textContent: "Captions near it" }), made("ul", { className: "prompts" }, ...captions))] : [];
  const legend = labels.length ? "+ is nearer to the picture than the other word’s prompts are, − is not; the figure is the cosine." : "The figure is the cosine; in brackets, the names that were found in it.";
  return made("details", {}, made("summary", { textContent: "Why" }), made("p", { className: "hint", textContent: legend }), ...labels, ...near, ...more);
}

const SAID = { "+": "speaks for it", "−": "speaks against it" };

function spoken(sign, kind, cosine, text) {
  const symbol = made("span", {}, made("span", { textContent: sign, "aria-hidden": "true" }), made("span", { className: "visually-hidden", textContent: SAID[sign] || "" }));
  return made("li", { className: kind }, symbol, made("span", { textContent: cosine.toFixed(3) }), made("span", { textContent: text }));
}
