// The entry point: connects the views. The modules of a view that is not open at first are loaded when it is.
import { byId, tryAgainButton } from "./elements.js";
import { acceptFilesAnywhere } from "./file_drops.js";
import { currentView, startViews } from "./views.js";
import { showClassify, startClassify, takePictures } from "./classify.js";
import { startJobs, watchJobs } from "./job_list.js";

/** Return a function that loads once; after a failure, the next call tries again. */
const once = (load) => {
  let loaded = null;
  return () => (loaded ??= load().catch((error) => {
    loaded = null;
    throw error;
  }));
};

const labelSets = once(async () => {
  const view = await import("./label_sets.js");
  view.startLabelSets();
  return view;
});

const captions = once(async () => {
  const view = await import("./search.js");
  view.startSearch();
  return view;
});

/** Load a view and show it; say so in its field for errors if it cannot be loaded. */
async function open(load, errorId, show) {
  const problem = byId(errorId);
  let view;
  try {
    view = await load();
  } catch {
    problem.replaceChildren("This view cannot be loaded. Is the server running? ", tryAgainButton(problem, () => open(load, errorId, show)));
    problem.hidden = false;
    return;
  }
  if (problem.textContent.startsWith("This view cannot")) problem.hidden = true;
  await show(view);
}

startClassify();
startJobs();
const views = startViews({
  classify: showClassify,
  "label-sets": (place) => open(labelSets, "label-sets-error", (view) => view.showLabelSets(place)),
  captions: (place) => open(captions, "search-error", (view) => view.showCaptions(place)),
});

// A file dropped outside of every zone goes to the current view. The label sets view has many zones and no default one.
acceptFilesAnywhere(() => ({ classify: takePictures, captions: async (files) => (await captions()).takeSearchPicture(files) })[currentView()]);
byId("key").onchange = () => {
  views.again();
  watchJobs();
};
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // the hash is not the address of a view
  byId("main").focus();
};
