// Lets the browser's Back and Forward lead through images and views: each has an address of its own behind the #.

import { clearStage, open } from "./actions.js";
import { emit, on, state } from "./state.js";

const VIEWS = ["library", "engine"];
let going = false;

const here = () => location.hash.slice(1);
const address = () => (state.view === "create" ? (state.image?.image ?? "") : state.view);
const path = () => location.pathname + (address() && `#${address()}`);

/** Write addresses from now on. One that the page was opened with comes first. */
export async function followHistory() {
  if (here()) await go();
  history.replaceState(null, "", path());
  on("view image", write);
  addEventListener("popstate", go);
}

function write() {
  if (going || address() === here()) return;
  // No image after one is there no longer: it was deleted, and nothing is to lead back to it.
  if (address()) history.pushState(null, "", path());
  else history.replaceState(null, "", path());
}

async function go() {
  const place = here();
  going = true;
  if (place && !VIEWS.includes(place) && place !== state.image?.image) await open(place);
  else {
    state.view = VIEWS.includes(place) ? place : "create";
    if (!place) clearStage();
    emit("view");
    emit("image");
  }
  going = false;
}
