// Models and methods, fetched once; label sets and caption databases, fetched every time.
import { requestJson, fetchAllPages } from "./requests.js";

let cached = null;

/** Return {models, methods, images} of the server; `images` are the limits of a request. */
export function catalogue() {
  cached ??= Promise.all([requestJson("v1/models"), requestJson("v1/methods")])
    .then(([{ models, images = {} }, { methods }]) => ({ models, methods, images }))
    .catch((error) => {
      cached = null; // fetched again when a key has been entered
      throw error;
    });
  return cached;
}

export const allLabelSets = () => fetchAllPages("v1/label-sets?limit=1000", "label_sets");

export const allDatabases = async () => (await requestJson("v1/databases")).databases;
