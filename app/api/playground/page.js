// The entry point: connects the views.
import { byId } from "./elements.js";
import { acceptFilesAnywhere } from "./file_drops.js";
import { currentView, startViews } from "./views.js";
import { showClassify, startClassify, takePictures } from "./classify.js";
import { showLabelSets, startLabelSets } from "./label_sets.js";
import { showCaptions, startSearch, takeSearchPicture } from "./search.js";
import { startJobs } from "./job_list.js";

startClassify();
startLabelSets();
startSearch();
startJobs();
const views = startViews({ classify: showClassify, "label-sets": showLabelSets, captions: showCaptions });

// A file dropped outside of every zone goes to the current view. The label sets view has many zones and no default one.
acceptFilesAnywhere(() => ({ classify: takePictures, captions: takeSearchPicture })[currentView()]);
byId("key").onchange = views.again;
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // the hash is not the address of a view
  byId("main").focus();
};
