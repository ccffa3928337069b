// Results as files: CSV and JSON like those of the command line, and images sorted into folders.
import { groupsOf, isRejected, labelsOf } from "./classify_state.js";

// What spreadsheets take for a formula, as in app/cli/csv_output.py, after apostrophes.
const FORMULA = /^'*[=+\-@\t\r\n＝＋－＠]/;
const NUMBER = /^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$/;

/** Return the predictions as CSV like that of `deixis classify --format csv`: images without any have a row too. */
export function csvOf(state) {
  const answered = state.pictures.filter((picture) => picture.result || picture.failure);
  const rejected = ({ result }) => {
    if (!result || result.error || (!state.threshold && typeof result.rejected !== "boolean")) return "";
    return isRejected(state, result) ? "none of these" : "no";
  };
  const isRejecting = answered.some((picture) => rejected(picture));
  const hasSeveral = answered.some(({ result }) => result?.labels);
  // As on the command line, a hierarchy's path has a column only if it has a place in some result.
  const hasPath = answered.some(({ result }) => result?.path);
  const pathCell = (result) => (hasPath ? [safe((pathOf(state, result) ?? []).map(({ label }) => label).join("|"))] : []);
  const above = (result, { label, threshold }) => (hasSeveral ? [String(state.threshold || (threshold ?? "")), labelsOf(state, result)?.includes(label) ? "yes" : "no"] : []);
  const rows = answered.flatMap((picture) => {
    const { path, result, failure } = picture;
    const end = [...(isRejecting ? [rejected(picture)] : []), ...pathCell(result), safe(failure?.message ?? result.error?.detail ?? "")];
    const predictions = (failure ? [] : result.predictions).map((entry, index) => [
      String(index + 1), safe(entry.label), entry.score.toFixed(4), entry.similarity.toFixed(4), ...above(result, entry),
    ]);
    return (predictions.length ? predictions : [Array(hasSeveral ? 6 : 4).fill("")]).map((cells) => [safePath(path), ...cells, ...end]);
  });
  const columns = ["path", "rank", "label", "score", "similarity", ...(hasSeveral ? ["threshold", "above"] : []), ...(isRejecting ? ["rejected"] : []), ...(hasPath ? ["label path"] : []), "error"];
  return [columns, ...rows].map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

/** Return the results as JSON with the members of `deixis classify --format json`. */
export function jsonOf(state) {
  const results = state.pictures.filter((picture) => picture.result || picture.failure).map(({ path, result, failure }) => {
    if (failure) return { path, predictions: [], warnings: [], error: { title: "Not classified", detail: failure.message } };
    const { image_id: imageId, path: ignored, ...members } = result;
    const rejected = state.threshold > 0 && !result.error ? { rejected: isRejected(state, result) } : {};
    return { path, ...withoutNulls({ ...members, labels: labelsOf(state, result), ...rejected, label_path: pathOf(state, result) }) };
  });
  return `${JSON.stringify(results, null, 2)}\n`;
}

/** Return the path of a hierarchy; it is empty if the image has none of the labels. */
const pathOf = (state, result) => (result?.path && isRejected(state, result) ? [] : result?.path ?? null);

/** Return a zip file with the images in one folder per label; an image with several labels is in the folder of each. */
export async function zipOf(state) {
  const { downloadZip } = await import("./vendor/client-zip/index.js");
  const taken = new Set();
  const entries = state.pictures.filter((picture) => picture.file).flatMap((picture) => groupsOf(state, picture).map((group) => ({ name: uniqueName(folderOf(group), picture.name, taken), input: picture.file })));
  return downloadZip(entries).blob();
}

/** Offer a file for download. */
export function save(content, name) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content]));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may still read it
}

const MAX_NAME = 60; // of characters that may have four bytes each; file systems take 255 bytes

const FOLDERS = { none: "none of these", errors: "not classified", waiting: "not classified" };

function folderOf(group) {
  return group in FOLDERS ? FOLDERS[group] : fileName(group.slice("label:".length));
}

const RESERVED = /^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)/i; // as names of devices on Windows

/** Return a label as a name that every file system accepts. */
function fileName(label) {
  const short = [...label.replace(/[\u0000-\u001f<>:"/\\|?*]/g, "_")].slice(0, MAX_NAME).join("");
  return short.replace(/[. ]+$/, "").replace(RESERVED, "$1_") || "_";
}

function uniqueName(folder, name, taken) {
  const found = /^(.+)(\.\w{1,10})$/s.exec(name);
  const stem = fileName(found ? found[1] : name), suffix = found ? found[2] : "";
  for (let number = 1; ; number += 1) {
    const path = `${folder}/${stem}${number === 1 ? "" : `-${number}`}${suffix}`;
    if (taken.has(path.toLowerCase())) continue;
    taken.add(path.toLowerCase());
    return path;
  }
}

const safePath = (path) => (FORMULA.test(path) ? `./${path}` : path);

const safe = (text) => (FORMULA.test(text) && !NUMBER.test(text) ? `'${text}` : text);

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function withoutNulls(value) {
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).filter(([, member]) => member !== null).map(([name, member]) => [name, withoutNulls(member)]));
}
