// A confusion matrix: rows are true classes, columns are predicted classes; darker cells have more images.
import { countText, create, percent } from "./elements.js";

const MAX_CLASSES = 40;

/** Return the table of cells {label, predicted, count}, with at most 40 of the classes that occur in `names`. */
export function matrix(names, cells, caption) {
  const counts = new Map();
  const occurring = new Set();
  for (const { label, predicted, count } of cells) {
    if (!counts.has(label)) counts.set(label, new Map());
    counts.get(label).set(predicted, count);
    occurring.add(label).add(predicted);
  }
  const all = names.filter((name) => occurring.has(name));
  const shown = all.slice(0, MAX_CLASSES);
  const head = create("tr", {}, create("td", { className: "corner" }, create("span", { className: "axis", textContent: "true ↓ predicted →" })), ...shown.map((name) => create("th", { scope: "col", textContent: name })), create("th", { scope: "col", textContent: "correct" }));
  const body = shown.map((name) => row(name, counts.get(name) ?? new Map(), shown));
  const table = create("table", { className: "matrix" }, create("caption", { textContent: caption }), create("thead", {}, head), create("tbody", {}, ...body));
  const region = create("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption }, table);
  const rest = all.length - shown.length;
  return rest > 0 ? [region, create("p", { className: "hint", textContent: `${countText(rest, "further class is", "further classes are")} not shown.` })] : [region];
}

function row(truth, counts, shown) {
  const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
  const cells = shown.map((predicted) => {
    const count = counts.get(predicted) ?? 0;
    const cell = create("td", { textContent: String(count), className: truth === predicted ? "right" : "wrong" });
    cell.style.setProperty("--share", String(total ? count / total : 0));
    if (!count) cell.classList.add("none");
    return cell;
  });
  const right = create("td", { className: "total", textContent: total ? percent((counts.get(truth) ?? 0) / total) : "–" });
  return create("tr", {}, create("th", { scope: "row", textContent: truth }), ...cells, right);
}
