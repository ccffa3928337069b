// Results as files: CSV and JSON like those of the command line, and images sorted into folders.
import { groupOf, isRejected } from "./classify_state.js";

// What spreadsheets take for a formula, as in app/cli/csv_output.py, after apostrophes.
const FORMULA = /^'*[=+\-@\t\r\n＝＋－＠]/;
const NUMBER = /^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$/;

/** Return the predictions as CSV with the columns of `deixis classify --format csv`. */
export function csvOf(state) {
  const results = classified(state);
  const isRejecting = state.threshold > 0 || results.some(({ result }) => typeof result.rejected === "boolean");
  const rows = results.flatMap(({ path, result }) =>
    result.predictions.map((entry, index) => [
      safePath(path), String(index + 1), safe(entry.label), entry.score.toFixed(4), entry.similarity.toFixed(4),
      ...(isRejecting ? [isRejected(state, result) ? "none of these" : "no"] : []),
    ]),
  );
  const columns = ["path", "rank", "label", "score", "similarity", ...(isRejecting ? ["rejected"] : [])];
  return [columns, ...rows].map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

/** Return the results as JSON with the members of `deixis classify --format json`. */
export function jsonOf(state) {
  const results = state.pictures.filter((picture) => picture.result).map(({ path, result }) => {
    const { image_id: imageId, ...members } = result;
    const rejected = state.threshold > 0 ? { rejected: isRejected(state, result) } : {};
    return { path, ...withoutNulls({ ...members, ...rejected }) };
  });
  return `${JSON.stringify(results, null, 2)}\n`;
}

/** Return a zip file with the images in one folder per label. */
export async function zipOf(state) {
  const { downloadZip } = await import("./vendor/client-zip/index.js");
  const taken = new Set();
  const entries = state.pictures.filter((picture) => picture.file).map((picture) => ({ name: uniqueName(folderOf(state, picture), picture.name, taken), input: picture.file }));
  return downloadZip(entries).blob();
}

/** Offer a file for download. */
export function save(content, name) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content]));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may still read it
}

const FOLDERS = { none: "none of these", errors: "not classified", waiting: "not classified" };

function folderOf(state, picture) {
  const group = groupOf(state, picture);
  return group in FOLDERS ? FOLDERS[group] : fileName(group.slice("label:".length));
}

/** Return a label as a name that every file system accepts. */
const fileName = (label) => label.replace(/[\u0000-\u001f<>:"/\\|?*]/g, "_").replace(/[. ]+$/, "").slice(0, 100) || "_";

function uniqueName(folder, name, taken) {
  const clean = fileName(name), dot = clean.lastIndexOf(".");
  const [stem, suffix] = dot > 0 ? [clean.slice(0, dot), clean.slice(dot)] : [clean, ""];
  for (let number = 1; ; number += 1) {
    const path = `${folder}/${number === 1 ? clean : `${stem}-${number}${suffix}`}`;
    if (taken.has(path.toLowerCase())) continue;
    taken.add(path.toLowerCase());
    return path;
  }
}

const classified = (state) => state.pictures.filter((picture) => picture.result && !picture.result.error);

const safePath = (path) => (FORMULA.test(path) ? `./${path}` : path);

const safe = (text) => (FORMULA.test(text) && !NUMBER.test(text) ? `'${text}` : text);

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function withoutNulls(value) {
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).filter(([, member]) => member !== null).map(([name, member]) => [name, withoutNulls(member)]));
}
