// The left of the page: the prompt, its references and its options.

import { addFiles, addReference, fail, run } from "./actions.js";
import { button, fill, h, note, onSubmit, segments } from "./dom.js";
import { createJobs } from "./jobs.js";
import { emit, modelOf, on, state } from "./state.js";

const SHAPES = ["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21"];
const chosen = { shape: "", count: "1" };
/** The type under which an image of this page is dragged. */
const DRAGGED = "application/x-klein-handle";
let nodes;

/** Tell whether a key belongs to an input method, which confirms its words with Enter, too. Safari tells it by the code. */
const composes = (event) => event.isComposing || event.keyCode === 229;

export function createComposer(root) {
  const prompt = h("textarea", {
    id: "prompt",
    rows: 4,
    dir: "auto",
    onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && !composes(event) && generate(),
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
    model: h("select", { id: "model", onchange: (event) => ((state.model = event.target.value), emit("model")) }),
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
  const narrow = matchMedia("(max-width: 760px)");
  const options = h(
    "details",
    { class: "options", open: !narrow.matches },
    h("summary", {}, "Options"),
    row("Shape", "shape", nodes.shape),
    nodes.size,
    segments("count", "Images", counts, "1", (count) => (chosen.count = count)),
    row("Seed", "seed", nodes.seed),
    row("Model", "model", nodes.model),
  );
  // A wide page has no word to press that would open them.
  narrow.addEventListener("change", () => narrow.matches || (options.open = true));
  const form = h(
    "form",
    { novalidate: true },
    h("label", { class: "title", for: "prompt" }, "Prompt"),
    prompt,
    nodes.references,
    nodes.go,
    options,
  );
  onSubmit(form, generate);
  root.append(form, nodes.jobs);
  createJobs(nodes.jobs);
  acceptDrops(document.body);
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    // Spreadsheets copy an image of their cells beside the words, and HTML; file managers a file beside its name alone.
    const words = types.includes("text/plain") && types.includes("text/html") && event.target.closest?.("textarea, input");
    if (files.length && !words) takeFiles(event, files);
  });
  on("references", renderReferences);
  on("engine model", renderModels);
  renderReferences();
  renderModels();
}

function showSize() {
  chosen.shape = nodes.shape.value;
  nodes.size.hidden = chosen.shape !== "exact";
}

function renderModels() {
  const models = (state.engine?.models ?? []).filter((each) => each.installed);
  const auto = h("option", { value: "" }, state.engine?.auto ? `Best installed (${state.engine.auto})` : "Best installed");
  fill(nodes.model, auto, models.map((each) => h("option", { value: each.name }, each.name)));
  // A model that is not installed any more cannot be chosen.
  if (models.length && !models.some((each) => each.name === state.model)) state.model = "";
  nodes.model.value = state.model;
  nodes.prompt.placeholder = modelOf()?.examples[0] ?? "";
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

/** Take files as references, and show where they are. */
function takeFiles(event, files) {
  event.preventDefault();
  state.view = "create";
  emit("view");
  addFiles(files);
}

/** Take images that are dropped anywhere on the page: files, and images of the page itself. */
function acceptDrops(target) {
  const welcome = ({ dataTransfer }) => dataTransfer?.types.some((type) => type === "Files" || type === DRAGGED);
  target.addEventListener("dragstart", (event) => {
    const handle = event.target.closest?.("button")?.dataset.key;
    if (handle) event.dataTransfer.setData(DRAGGED, handle);
  });
  target.addEventListener("dragover", (event) => {
    if (!welcome(event)) return;
    event.preventDefault();
    target.classList.add("dropping");
  });
  target.addEventListener("dragleave", (event) => event.relatedTarget ?? target.classList.remove("dropping"));
  target.addEventListener("drop", (event) => {
    target.classList.remove("dropping");
    if (!welcome(event)) return;
    const handle = event.dataTransfer.getData(DRAGGED);
    takeFiles(event, handle ? [] : event.dataTransfer.files);
    if (handle) addReference(handle).catch(fail);
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
  if (state.model) input.model = state.model;
  if (chosen.shape === "exact") Object.assign(input, { width: Number(nodes.width.value), height: Number(nodes.height.value) });
  else if (chosen.shape) input.aspect_ratio = chosen.shape;
  const references = state.references.map((each) => each.ref);
  // One image and words are an edit, which keeps what is not to change; words about "image 1" make another of it.
  const changes = references.length === 1 && !chosen.shape && !/image 1\b/i.test(prompt);
  if (changes) await run("edit_image", { ...input, image: references[0] });
  else if (references.length) await run("compose_references", { ...input, images: references });
  else await run("generate_image", input);
}
