// How well the labels of images that may have several are found, as tables.
import { countText, create } from "./elements.js";

const figure = (value) => (value === null ? "–" : value.toFixed(3));

/** Return the figures of all labels together, at three kinds of thresholds, and those of each label at its threshold. */
export function labelTables({ at_default: inUse, at_shared: shared, at_fitted: fitted }) {
  const kinds = [["in use", inUse], ["one for all labels, fitted to other images", shared], ["one for each label, fitted to other images", fitted]];
  const rest = inUse.label_count - inUse.labels.length;
  return [
    create("p", {}, "Mean average precision (mAP) ", create("strong", { textContent: figure(inUse.mean_average_precision) }), ". It needs no threshold: 1 if every image of a label has a higher score for it than all other images."),
    table("Thresholds", ["thresholds", "micro F1", "macro F1"], kinds.map(([name, at]) => [name, figure(at.micro_f1), figure(at.macro_f1)])),
    table(
      "Labels, at the thresholds in use", ["label", "images", "average precision", "threshold", "precision", "recall"],
      inUse.labels.map((row) => [row.name, row.support.toLocaleString("en"), figure(row.average_precision), Number.isFinite(row.threshold) ? row.threshold.toFixed(2) : "–", figure(row.precision), figure(row.recall)]),
    ),
    ...(rest > 0 ? [create("p", { className: "hint", textContent: `${countText(rest, "further label has", "further labels have")} fewer images and ${rest === 1 ? "is" : "are"} not shown.` })] : []),
  ];
}

function table(caption, columns, rows) {
  return create(
    "div", { className: "scroll", role: "region", "aria-label": caption, tabIndex: 0 },
    create(
      "table", {}, create("caption", { textContent: caption }),
      create("thead", {}, create("tr", {}, ...columns.map((name) => create("th", { scope: "col", textContent: name })))),
      create("tbody", {}, ...rows.map(([name, ...cells]) => create("tr", {}, create("th", { scope: "row", textContent: name }), ...cells.map((text) => create("td", { textContent: text }))))),
    ),
  );
}
