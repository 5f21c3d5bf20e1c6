// The left of the page: the prompt, its references and its options.

import { addFiles, run } from "./actions.js";
import { button, fill, h, note, segments } from "./dom.js";
import { createJobs } from "./jobs.js";
import { on, state } from "./state.js";

const SHAPES = ["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21"];
const chosen = { shape: "", count: "1", model: "" };
let nodes;

export function createComposer(root) {
  const prompt = h("textarea", {
    id: "prompt",
    rows: 4,
    maxlength: 4000,
    placeholder: "A red fox asleep in snow, soft morning light",
    onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && generate(),
    onpaste: (event) => event.clipboardData.files.length && (event.preventDefault(), addFiles(event.clipboardData.files)),
  });
  nodes = {
    prompt,
    references: h("ul", { class: "references", "aria-label": "References" }),
    go: h("button", { class: "primary go" }, "Generate"),
    shape: h("select", { id: "shape", onchange: () => showSize() }),
    width: h("input", { id: "width", type: "number", min: 64, max: 2048, step: 16, value: 512, "aria-label": "Width" }),
    height: h("input", { id: "height", type: "number", min: 64, max: 2048, step: 16, value: 512, "aria-label": "Height" }),
    size: h("div", { class: "row", hidden: true }),
    seed: h("input", { id: "seed", inputmode: "numeric", pattern: "[0-9]*", placeholder: "Random", autocomplete: "off" }),
    model: h("select", { id: "model", onchange: (event) => (chosen.model = event.target.value) }),
    jobs: h("section", { class: "jobs", "aria-label": "Now", hidden: true }),
  };
  nodes.shape.append(
    h("option", { value: "" }, "Automatic"),
    ...SHAPES.map((shape) => h("option", { value: shape }, shape)),
    h("option", { value: "exact" }, "Exact size…"),
  );
  nodes.size.append(nodes.width, h("span", { class: "soft" }, "×"), nodes.height);
  const row = (label, id, ...controls) => h("div", { class: "option" }, h("label", { for: id }, label), ...controls);
  const counts = ["1", "2", "3", "4"].map((count) => [count, count]);
  const form = h(
    "form",
    { novalidate: true },
    h("label", { class: "title", for: "prompt" }, "Prompt"),
    prompt,
    nodes.references,
    nodes.go,
    h(
      "details",
      { class: "options", open: !matchMedia("(max-width: 760px)").matches },
      h("summary", {}, "Options"),
      row("Shape", "shape", nodes.shape),
      nodes.size,
      segments("count", "Images", counts, "1", (count) => (chosen.count = count)),
      row("Seed", "seed", nodes.seed),
      row("Model", "model", nodes.model),
    ),
  );
  form.addEventListener("submit", (event) => (event.preventDefault(), generate()));
  root.append(form, nodes.jobs);
  createJobs(nodes.jobs);
  acceptDrops(document.body);
  on("references", renderReferences);
  on("engine", renderModels);
  renderReferences();
  renderModels();
}

function showSize() {
  chosen.shape = nodes.shape.value;
  nodes.size.hidden = chosen.shape !== "exact";
}

function renderModels() {
  const models = state.engine?.models ?? [];
  const auto = h("option", { value: "" }, state.engine?.auto ? `Best installed (${state.engine.auto})` : "Best installed");
  fill(nodes.model, auto, models.filter((each) => each.installed).map((each) => h("option", { value: each.name }, each.name)));
  nodes.model.value = chosen.model;
}

function renderReferences() {
  const picker = h("input", {
    type: "file",
    accept: "image/*",
    multiple: true,
    class: "offscreen",
    id: "files",
    onchange: (event) => addFiles(event.target.files),
  });
  const items = state.references.map((reference, index) =>
    h(
      "li",
      {},
      h("img", { src: reference.src, alt: reference.words, title: reference.words, width: 56, height: 56 }),
      h("b", {}, String(index + 1)),
      button("Remove", "close", () => (state.references.splice(index, 1), renderReferences()), {
        class: "only-icon",
        "aria-label": `Remove reference ${index + 1}`,
      }),
    ),
  );
  const words = items.length ? "Add" : "Add images to change or combine";
  fill(nodes.references, items, h("li", { class: "add" }, picker, h("label", { for: "files" }, words)));
  nodes.references.classList.toggle("none", !items.length);
}

/** Take dropped images anywhere on the page. */
function acceptDrops(target) {
  const files = (event) => event.dataTransfer?.types.includes("Files");
  target.addEventListener("dragover", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    target.classList.add("dropping");
  });
  target.addEventListener("dragleave", (event) => event.relatedTarget ?? target.classList.remove("dropping"));
  target.addEventListener("drop", (event) => {
    target.classList.remove("dropping");
    if (!files(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

async function generate() {
  const prompt = nodes.prompt.value.trim();
  const seed = nodes.seed.value.trim();
  if (!prompt) {
    nodes.prompt.focus();
    return note("Describe the image first.");
  }
  if (!/^[0-9]*$/.test(seed)) {
    nodes.seed.focus();
    return note("A seed is a whole number; empty means random.");
  }
  const input = { prompt, count: Number(chosen.count) };
  if (seed) input.seed = seed;
  if (chosen.model) input.model = chosen.model;
  if (chosen.shape === "exact") Object.assign(input, { width: Number(nodes.width.value), height: Number(nodes.height.value) });
  else if (chosen.shape) input.aspect_ratio = chosen.shape;
  const references = state.references.map((each) => each.ref);
  if (references.length) await run("compose_references", { ...input, images: references });
  else await run("generate_image", input);
}
