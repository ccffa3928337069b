// The entry point: connects the views. The modules of a view that is not open at first are loaded when it is.
import { byId } from "./elements.js";
import { acceptFilesAnywhere } from "./file_drops.js";
import { currentView, startViews } from "./views.js";
import { showClassify, startClassify, takePictures } from "./classify.js";
import { startJobs } from "./job_list.js";

const once = (load) => {
  let loaded = null;
  return () => (loaded ??= load());
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

startClassify();
startJobs();
const views = startViews({
  classify: showClassify,
  "label-sets": async (place) => (await labelSets()).showLabelSets(place),
  captions: async (place) => (await captions()).showCaptions(place),
});

// A file dropped outside of every zone goes to the current view. The label sets view has many zones and no default one.
acceptFilesAnywhere(() => ({ classify: takePictures, captions: async (files) => (await captions()).takeSearchPicture(files) })[currentView()]);
byId("key").onchange = views.again;
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // the hash is not the address of a view
  byId("main").focus();
};
