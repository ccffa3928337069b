// Precision and recall of labels as step functions of their thresholds, and the order of labels. No DOM.

/** The width and height of the box in which paths are drawn: thresholds from left to right, shares from bottom to top. */
export const BOX = { width: 1000, height: 500 };

/** Return the figures of a label at a threshold; precision, recall and F1 are null where they are not defined. */
export function figuresAt({ images, curve }, threshold) {
  const index = firstAtLeast(curve.thresholds, threshold);
  return figures(curve.predicted[index] ?? 0, curve.correct[index] ?? 0, images);
}

/** Return whether two thresholds of a label find the same images. */
export const findSame = ({ curve }, one, other) => firstAtLeast(curve.thresholds, one) === firstAtLeast(curve.thresholds, other);

/** Return a threshold with as few decimals, but at least three, as find the same images. */
export function shortened(label, threshold) {
  const shorter = [3, 4, 5, 6].map((digits) => Number(threshold.toFixed(digits)));
  return shorter.find((candidate) => findSame(label, candidate, threshold)) ?? threshold;
}

/** Return the figures of all labels together; `thresholdOf` returns the threshold of a label. */
export function figuresOfAll(labels, thresholdOf) {
  const each = labels.map((label) => figuresAt(label, thresholdOf(label)));
  const sum = (name) => each.reduce((total, entry) => total + entry[name], 0);
  return figures(sum("found"), sum("right"), sum("images"));
}

function figures(found, right, images) {
  return {
    found, right, images, missed: images - right, precision: found ? right / found : null, recall: images ? right / images : null,
    f1: images ? (2 * right) / (found + images) : null,
  };
}

/** Return the index of the first value of an ascending list that is at least a number, the length if there is none. */
function firstAtLeast(ascending, number) {
  let low = 0, high = ascending.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle] < number) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Return the paths of precision and of recall; that of precision ends where no image reaches the threshold. */
export function pathsOf({ images, curve: { thresholds, predicted, correct } }) {
  return {
    precision: stepPath(thresholds, correct.slice(0, firstZero(predicted)).map((right, index) => right / predicted[index])),
    recall: stepPath([...thresholds, 1], [...correct.map((right) => right / images), 0]),
  };
}

const firstZero = (counts) => (counts.includes(0) ? counts.indexOf(0) : counts.length);

/** Return the path of a step function: a value holds up to its threshold, from the threshold before it. */
function stepPath(thresholds, values) {
  return values.map((value, index) => `${index ? "V" : "M0 "}${height(value)}H${across(thresholds[index])}`).join("");
}

const rounded = (number) => Number(number.toFixed(1));

/** Return the place of a threshold and of a share in the box. */
export const across = (threshold) => rounded(BOX.width * threshold);
export const height = (share) => rounded(BOX.height * (1 - share));

/** The orders of labels, with their names. */
export const ORDERS = {
  given: "as in the label set", name: "name", images: "images, most", f1: "F1, lowest", average_precision: "average precision, lowest",
};

/** Return labels in one of the orders; labels without a value come last. */
export function ordered(labels, order, thresholdOf) {
  if (order === "given") return labels;
  if (order === "name") return [...labels].sort((one, other) => one.label.localeCompare(other.label, "en", { numeric: true }));
  const value = { images: (label) => -label.images, f1: (label) => figuresAt(label, thresholdOf(label)).f1, average_precision: (label) => label.average_precision }[order];
  const keyed = labels.map((label) => ({ label, key: value(label) ?? Infinity }));
  return keyed.sort((one, other) => (one.key === other.key ? 0 : one.key - other.key)).map(({ label }) => label);
}
