// Starts the page: as an app inside a client's frame, or as a page of its own in a browser.

import { fail, follow, present, readResult } from "./actions.js";
import { AppBridge } from "./app_bridge.js";
import { createComposer } from "./composer.js";
import { createDetails } from "./details.js";
import { button, fill, h } from "./dom.js";
import { leaveHidden } from "./focus.js";
import { createEngine, loadEngine } from "./engine.js";
import { createLibrary, createRecent } from "./library.js";
import { followHistory } from "./history.js";
import { keepOverReload, restore } from "./reload.js";
import { emit, on, state } from "./state.js";
import { createViewer } from "./viewer.js";
import { GONE, WebBridge } from "./web_bridge.js";

const LISTS = ["list_images"];
const $ = (id) => document.getElementById(id);

function receiveNow(now) {
  const before = state.now.library;
  state.now = now;
  emit("jobs");
  if (before !== now.library) emit("library");
}

/** Show the views' buttons and the one view that is open. */
function renderView() {
  for (const view of ["create", "library", "engine"]) $(view).hidden = state.view !== view;
  for (const tab of document.querySelectorAll("nav button")) {
    tab.toggleAttribute("aria-current", tab.dataset.view === state.view);
    if (tab.dataset.view === state.view) tab.setAttribute("aria-current", "page");
    if (tab.dataset.view === "create") tab.textContent = state.card ? "Image" : "Create";
  }
  document.body.classList.toggle("card", state.card);
  $("fullscreen").hidden = !state.bridge.can.fullscreen;
  document.querySelector("header").hidden = state.card && !state.bridge.can.read && !state.bridge.can.fullscreen;
  document.querySelector("nav").hidden = !state.bridge.can.read;
  if (document.activeElement !== document.body) leaveHidden();
}

/** The call that the agent made; the client itself has the means to stop it. */
const agentCall = { prompt: "", agent: true };

/** What a host tells: the tool's input while it runs, then its result, an error or that it was cancelled. */
const fromHost = {
  input(input) {
    agentCall.prompt = [input.prompt ?? ""].flat().join(" ");
    agentCall.job = input.job;
    if (!LISTS.includes(state.bridge.context.toolInfo?.tool?.name) && (input.prompt || input.job)) state.calls.add(agentCall);
    emit("jobs");
  },
  async result(result) {
    const read = readResult(result);
    // The agent's call may be over before its image is there.
    const pending = !read.failed && Boolean(read.line.job) && !read.handles.length;
    if (pending && state.bridge.can.call) return follow(agentCall, result);
    state.pending = pending;
    state.calls.delete(agentCall);
    emit("jobs");
    if (read.failed) return fail(new Error(read.text || "The call failed."));
    if (read.line.images && !read.src && LISTS.includes(state.bridge.context.toolInfo?.tool?.name)) {
      state.view = "library";
      return emit("view");
    }
    await present(read, agentCall.prompt);
  },
  cancelled() {
    state.calls.delete(agentCall);
    emit("jobs");
    fail(new Error("The call was cancelled."));
  },
  context(context) {
    state.card = context.displayMode !== "fullscreen";
    emit("view");
  },
};

/** Show the error above whichever view is open. */
function renderError() {
  const box = $("error");
  box.hidden = !state.error;
  const dismiss = button("Dismiss", "close", () => ((state.error = ""), renderError()), { class: "quiet" });
  fill(box, state.error && [h("p", {}, state.error), dismiss]);
}

/** The mark in the header: the model, or that nobody answers. */
function renderMark() {
  const chip = $("model-chip");
  chip.textContent = state.connected ? (state.engine?.loaded ?? state.engine?.auto ?? "") : "Not connected";
  chip.hidden = state.card || !chip.textContent;
  chip.classList.toggle("lost", !state.connected);
}

function reached(connected) {
  if (state.connected === connected) return;
  state.connected = connected;
  renderMark();
  if (!connected) return;
  if (state.error === GONE) state.error = "";
  emit("error");
  loadEngine();
  // Images that were asked for meanwhile are asked for anew.
  emit("library");
}

async function start() {
  const app = window.parent !== window;
  state.bridge = app ? new AppBridge({ ...fromHost, now: receiveNow, busy: () => state.calls.size > 0 }) : new WebBridge({ now: receiveNow, lost: fail, reached });
  state.card = app;
  on("view image jobs", renderView);
  on("engine", renderMark);
  on("error", renderError);
  for (const tab of document.querySelectorAll("nav button")) {
    tab.addEventListener("click", () => ((state.view = tab.dataset.view), emit("view")));
  }
  $("fullscreen").addEventListener("click", () => state.bridge.fullscreen().catch(fail));
  createViewer($("viewer"));
  createDetails($("details"));
  try {
    await state.bridge.start();
  } catch (error) {
    fail(error);
  }
  if (state.bridge.can.read) {
    createComposer($("composer"));
    createLibrary($("library"));
    createRecent($("recent"));
    createEngine($("engine"));
  }
  // A busy engine may take a while to answer.
  if (state.bridge.can.read) loadEngine();
  emit("view");
  emit("image");
  if (app) return;
  await restore();
  await followHistory();
  keepOverReload();
}

start();
