// The result of one image: bars of scores, notes, and the explanation.
import { create, percent } from "./elements.js";

/** Return the list item of an image's result. */
export function resultItem(result, picture) {
  const content = create("div", {}, create("p", { className: "file-name", textContent: picture.name }));
  if (result.error) content.append(create("p", { className: "problem", textContent: `${result.error.title}: ${result.error.detail}` }));
  else content.append(...resultContent(result));
  return create("li", {}, create("img", { src: picture.url, alt: "" }), content);
}

/** Return a row of a bar chart: a text on a bar, and a figure after it. */
export function bar(text, share, figure, title = "") {
  const fill = create("i");
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return create(
    "li", {}, create("div", { className: "bar", title }, fill, create("span", { textContent: text })), create("span", { className: "score", textContent: figure }),
  );
}

function resultContent(result) {
  const bars = result.predictions.map((entry) => bar(entry.label, entry.score, percent(entry.score), `cosine similarity ${entry.similarity.toFixed(3)}`));
  const parts = [create("ol", { className: "bars" }, ...bars)];
  if (result.rejected) parts.push(create("p", { className: "note", textContent: "Rejected: the best score is below the threshold, so the image shows none of the labels." }));
  parts.push(...result.warnings.map((warning) => create("p", { className: "note", textContent: warning })));
  const unknown = result.out_of_vocabulary ? [unknownClassScore(result.out_of_vocabulary.mcm)] : [];
  if (result.explanation) parts.push(explanation(result.explanation, unknown));
  else parts.push(...unknown);
  return parts;
}

function unknownClassScore(mcm) {
  const sentence = `Unknown-class score: ${mcm.toFixed(2)} (maximum concept matching, from 0 to 1). Images that show none of the labels have a higher score than others.`;
  return create("p", { className: "hint", textContent: sentence });
}

function explanation(content, more) {
  const labels = content.labels.map((entry) => {
    const title = entry.rival ? `${entry.label}, compared with ${entry.rival}` : entry.label;
    const prompts = [
      ...entry.supporting.map((prompt) => promptRow("+", "for", prompt.cosine, prompt.prompt)),
      ...entry.opposing.map((prompt) => promptRow("−", "against", prompt.cosine, prompt.prompt)),
    ];
    return create("div", {}, create("h3", { textContent: title }), create("ul", { className: "prompts" }, ...prompts));
  });
  const captions = content.captions.map((entry) => promptRow("", "near", entry.similarity, entry.suggested.length ? `${entry.caption} (${entry.suggested.join(", ")})` : entry.caption));
  const near = captions.length ? [create("div", {}, create("h3", { textContent: "Similar captions" }), create("ul", { className: "prompts" }, ...captions))] : [];
  const legend = labels.length ? "+ supports the label: its prompt is more similar to the image than the prompts of the other label. − opposes it. The figure is the cosine similarity." : "The figure is the cosine similarity. In brackets: the labels discovered in the caption.";
  return create("details", {}, create("summary", { textContent: "Explanation" }), create("p", { className: "hint", textContent: legend }), ...labels, ...near, ...more);
}

const MEANINGS = { "+": "supports the label", "−": "opposes the label" };

function promptRow(sign, kind, cosine, text) {
  const symbol = create("span", {}, create("span", { textContent: sign, "aria-hidden": "true" }), create("span", { className: "visually-hidden", textContent: MEANINGS[sign] || "" }));
  return create("li", { className: kind }, symbol, create("span", { textContent: cosine.toFixed(3) }), create("span", { textContent: text }));
}
