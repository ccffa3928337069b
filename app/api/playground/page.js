// Which view is shown: the address says it, so that one can link to it and go back.

import { at } from "./ask.js";
import * as captions from "./captions.js";
import * as classify from "./classify.js";
import * as labelSets from "./label_sets.js";

const VIEWS = { "classify": classify, "label-sets": labelSets, "captions": captions };

const shown = () => (VIEWS[location.hash.slice(1)] ? location.hash.slice(1) : "classify");

function show() {
  for (const name of Object.keys(VIEWS)) {
    at(`view-${name}`).hidden = name !== shown();
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === shown()) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  VIEWS[shown()].show();
}

addEventListener("hashchange", () => { show(); at(`view-${shown()}`).focus(); });
at("key").onchange = () => VIEWS[shown()].show();
// Dropped beside a place for pictures, a picture must not take the place of the page.
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => { event.preventDefault(); event.target.closest?.(".drop")?.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => { event.preventDefault(); event.target.closest?.(".drop")?.classList.remove("over"); });
show();
