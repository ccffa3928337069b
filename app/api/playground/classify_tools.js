// What the view Classify offers beyond its own state: corrections, comparisons, and earlier results. The modules are
// loaded when they are first used.
import { acceptedLabels, isUnreadable, requestFields } from "./classify_state.js";
import { openModal } from "./modal.js";
import { create } from "./elements.js";

/**
 * Return the tools of a state; `relabel({labels, labelSet})` sets its labels, `again()` asks about every picture again, and
 * `forClick(load, use)` uses a module.
 */
export function createTools(state, runner, { relabel, again, whenDrawn, find, forClick }) {
  let runId = null; // of the stored result of these pictures, which later results of them replace
  let wasRunning = false;
  let saving = Promise.resolve(); // the last save

  const readable = () => state.pictures.filter((picture) => picture.result && !isUnreadable(picture));

  /** Ask for the right label of a picture, and classify again with the label set that learns from it. */
  const correct = (picture) => forClick(() => import("./correct.js"), ({ openCorrection, showLearning }) => {
    const onLearned = async (learned) => {
      relabel({ labelSet: learned.labelSet });
      state.learnedSet = learned.labelSet;
      again();
      const place = await new Promise((done) => whenDrawn(() => done(find("#learning"))));
      if (place) await showLearning(place, learned); // it is gone if all pictures were removed
      again(); // the method that the new examples favour is chosen by now
    };
    openCorrection(picture, { result: picture.result, labels: acceptedLabels(state), labelSet: state.source === "label_set" ? state.labelSet : "", onLearned });
  });

  const compareTwo = () => forClick(() => import("./compare.js"), ({ compare }) => {
    const place = create("div");
    openModal("Compare two ways", { className: "comparison" }, place);
    const own = state.source === "labels" ? `these ${acceptedLabels(state).length} labels` : state.source === "label_set" ? state.labelSet : "discovered labels";
    compare(place, { pictures: readable(), classify, labelled: own });
  });

  function classify(pictures, options) {
    const chosen = options.label_set ? ["method", "model", "labels", "label_set", "database", "group"] : ["method", "model"];
    const fields = [...requestFields(state).filter(([name]) => !chosen.includes(name)), ...Object.entries(options)];
    return runner.ask(pictures, fields);
  }

  const showEarlier = () => forClick(() => import("./history.js"), ({ showHistory, showRun }) => {
    const place = create("div");
    const { close } = openModal("Earlier results", { className: "earlier" }, place);
    const list = () => showHistory(place, {
      onOpen: (run) => showRun(place, run, { back: list, use: () => { close(); relabel({ labels: run.labels, labelSet: run.options.label_set ?? "" }); } }),
    });
    list();
  });

  /** Store the results when a run has ended. */
  function drawn() {
    const hasEnded = wasRunning && !state.run;
    wasRunning = Boolean(state.run);
    if (!state.pictures.length) runId = null;
    if (!hasEnded || !readable().length) return;
    const options = Object.fromEntries(requestFields(state).filter(([name]) => name !== "labels"));
    runId ??= crypto.randomUUID?.() ?? String(Math.random());
    const results = state.pictures.map((picture) => picture.result ?? { predictions: [], error: { detail: "not classified" } });
    const run = { id: runId, pictures: [...state.pictures], labels: state.source === "labels" ? acceptedLabels(state) : [], options, answer: { ...state.answer, results } };
    // One after the other, so that an earlier result of the same pictures does not replace a later one.
    saving = saving.then(async () => {
      try {
        await (await import("./history.js")).save(run);
      } catch (error) {
        console.warn("The results are not among the earlier ones:", error); // a full disk, for example
      }
    });
  }

  return { correct, compareTwo, showEarlier, drawn };
}
