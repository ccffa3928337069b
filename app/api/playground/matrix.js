// A confusion matrix: a row for each true class, a column for each predicted one, darker the more pictures are there.
import { counted, made, percent } from "./elements.js";

const MOST_CLASSES = 40;

/** Return what is shown of counts[true][predicted]: only the classes that occur, and not more than fit on a screen. */
export function matrix(names, counts, caption) {
  const occurs = (index) => counts[index].some(Boolean) || counts.some((row) => row[index]);
  const all = names.map((_, index) => index).filter(occurs);
  const shown = all.slice(0, MOST_CLASSES);
  const head = made("tr", {}, made("td", { className: "corner" }, made("span", { className: "axis", textContent: "true ↓ answered →" })), ...shown.map((index) => made("th", { scope: "col", textContent: names[index] })), made("th", { scope: "col", textContent: "right" }));
  const body = shown.map((index) => row(names, counts, index, shown));
  const table = made("table", { className: "matrix" }, made("caption", { textContent: caption }), made("thead", {}, head), made("tbody", {}, ...body));
  const region = made("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption }, table);
  const rest = all.length - shown.length;
  return rest > 0 ? [region, made("p", { className: "hint", textContent: `${counted(rest, "further class is", "further classes are")} not shown.` })] : [region];
}

function row(names, counts, truth, shown) {
  const total = counts[truth].reduce((sum, each) => sum + each, 0);
  const cells = shown.map((predicted) => {
    const count = counts[truth][predicted];
    const cell = made("td", { textContent: String(count), className: truth === predicted ? "right" : "wrong" });
    cell.style.setProperty("--share", String(total ? count / total : 0));
    if (!count) cell.classList.add("none");
    return cell;
  });
  const right = made("td", { className: "total", textContent: total ? percent(counts[truth][truth] / total) : "–" });
  return made("tr", {}, made("th", { scope: "row", textContent: names[truth] }), ...cells, right);
}
