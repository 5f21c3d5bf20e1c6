// The engine: which model, under which licence, how much memory, how long an image takes.

import { fail } from "./actions.js";
import { fill, h } from "./dom.js";
import { emit, on, state } from "./state.js";

export async function loadEngine() {
  try {
    state.engine = await state.bridge.readJson("klein://engine");
    emit("engine");
  } catch (error) {
    if (state.bridge.kind === "web") fail(error);
  }
}

export function createEngine(root) {
  on("engine", () => render(root));
  on("view", () => state.view === "engine" && loadEngine());
}

const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(bytes < 1e10 ? 1 : 0)} GB`;

function render(root) {
  const { engine } = state;
  const facts = [
    ["State", engine.words],
    ["Model", engine.loaded ?? `none loaded; ${engine.auto} comes with the first image`],
    ["Licence", engine.licence],
    ["Device", [engine.device, engine.dtype].filter(Boolean).join(", ")],
    ["Weights", engine.placement],
    ["Free memory", engine.free_bytes === null ? null : gigabytes(engine.free_bytes)],
    ["An image takes", engine.seconds && `about ${engine.seconds < 10 ? engine.seconds.toFixed(1) : Math.round(engine.seconds)} s`],
    ["Tuning", engine.tuning],
    ["Version", engine.version],
  ].filter(([, value]) => value);
  const models = engine.models.map((each) =>
    h("tr", {}, [each.name, each.licence, each.installed ? "installed" : `klein-mcp pull ${each.name}`].map((cell) => h("td", {}, cell))),
  );
  fill(
    root,
    h("h2", {}, "Engine"),
    h("dl", {}, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("h2", {}, "Models"),
    h("table", {}, h("thead", {}, h("tr", {}, ["Name", "Licence", "State"].map((each) => h("th", { scope: "col" }, each)))), h("tbody", {}, models)),
  );
}
