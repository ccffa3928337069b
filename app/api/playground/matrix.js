// A confusion matrix: rows are true classes, columns are predicted classes; darker cells have more images.
import { countText, create, percent } from "./elements.js";

const MAX_CLASSES = 40;

/** Return the table of counts[true][predicted], with at most 40 of the classes that occur. */
export function matrix(names, counts, caption) {
  const occurs = (index) => counts[index].some(Boolean) || counts.some((row) => row[index]);
  const all = names.map((_, index) => index).filter(occurs);
  const shown = all.slice(0, MAX_CLASSES);
  const head = create("tr", {}, create("td", { className: "corner" }, create("span", { className: "axis", textContent: "true ↓ predicted →" })), ...shown.map((index) => create("th", { scope: "col", textContent: names[index] })), create("th", { scope: "col", textContent: "correct" }));
  const body = shown.map((index) => row(names, counts, index, shown));
  const table = create("table", { className: "matrix" }, create("caption", { textContent: caption }), create("thead", {}, head), create("tbody", {}, ...body));
  const region = create("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption }, table);
  const rest = all.length - shown.length;
  return rest > 0 ? [region, create("p", { className: "hint", textContent: `${countText(rest, "further class is", "further classes are")} not shown.` })] : [region];
}

function row(names, counts, truth, shown) {
  const total = counts[truth].reduce((sum, count) => sum + count, 0);
  const cells = shown.map((predicted) => {
    const count = counts[truth][predicted];
    const cell = create("td", { textContent: String(count), className: truth === predicted ? "right" : "wrong" });
    cell.style.setProperty("--share", String(total ? count / total : 0));
    if (!count) cell.classList.add("none");
    return cell;
  });
  const right = create("td", { className: "total", textContent: total ? percent(counts[truth][truth] / total) : "–" });
  return create("tr", {}, create("th", { scope: "row", textContent: names[truth] }), ...cells, right);
}
