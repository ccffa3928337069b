// Models and methods, fetched once; label sets and caption databases, fetched every time.
import { ask, everyPage } from "./ask.js";

let cached = null;

/** Return {models, methods} of the server. */
export function catalogue() {
  cached ??= Promise.all([ask("v1/models"), ask("v1/methods")])
    .then(([{ models }, { methods }]) => ({ models, methods }))
    .catch((error) => {
      cached = null; // fetched again when a key has been entered
      throw error;
    });
  return cached;
}

export const allLabelSets = () => everyPage("v1/label-sets?limit=1000", "label_sets");

export const allDatabases = async () => (await ask("v1/databases")).databases;
