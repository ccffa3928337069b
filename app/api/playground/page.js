// Where the page begins: it joins the views, and what they share.
import { at } from "./elements.js";
import { dropAnywhere } from "./dropping.js";
import { currentView, startViews } from "./views.js";
import { showClassify, startClassify, takePictures } from "./classify.js";
import { showLabelSets, startLabelSets } from "./label_sets.js";
import { showCaptions, startSearch, takeSearchPicture } from "./search.js";

startClassify();
startLabelSets();
startSearch();
const views = startViews({ classify: showClassify, "label-sets": showLabelSets, captions: showCaptions });

// A picture that misses every zone goes where the view wants pictures; label sets have many such places, and none by default.
dropAnywhere(() => ({ classify: takePictures, captions: takeSearchPicture })[currentView()]);
at("key").onchange = views.again;
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // its address is no view's
  at("main").focus();
};
