// What may be named in requests: models and methods, asked for once; label sets, asked for each time.
import { ask, everyPage } from "./ask.js";

let kept = null;

/** Return {models, methods} as the server lists them. */
export function catalogue() {
  kept ??= Promise.all([ask("v1/models"), ask("v1/methods")])
    .then(([{ models }, { methods }]) => ({ models, methods }))
    .catch((error) => {
      kept = null; // asked again when there is a key
      throw error;
    });
  return kept;
}

export const allLabelSets = () => everyPage("v1/label-sets?limit=1000", "label_sets");

export const allDatabases = async () => (await ask("v1/databases")).databases;
