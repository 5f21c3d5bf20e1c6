// The middle of the page: the image, what can be done with it, the next edit, and its family.

import { addReference, again, copy, download, fail, open, pick, run, save, stop } from "./actions.js";
import { button, clip, fill, h, icon, note, onSubmit, placeNotes } from "./dom.js";
import { named, nameOf } from "./focus.js";
import { fractionOf, jobOf, shownCall, statusWords } from "./jobs.js";
import { lineage } from "./lineage.js";
import { Mask } from "./mask.js";
import { emit, modelOf, on, state } from "./state.js";
import { Zoom } from "./zoom.js";

let nodes, zoom, mask, before, shown;
let opening = false;
/** What was begun on images that were left: {mask, words} by handle, the latest last. */
const begun = new Map();
const MOST_BEGUN = 10;
/** The name of the control that had the focus before the actions were off. */
let resume = null;

export function createViewer(root) {
  nodes = {
    sheet: h("div", { class: "sheet", role: "group", "aria-label": "Images of this sheet", hidden: true }),
    stage: h("div", { class: "stage", tabindex: "0", role: "region", "aria-label": "Image" }),
    level: h("output", {}),
    tools: h("div", { class: "tools" }),
    edit: h("div", { class: "edit" }),
    family: h("div", { class: "family" }),
  };
  nodes.zoom = h(
    "div",
    { class: "zoom", role: "group", "aria-label": "Zoom" },
    button("Smaller", null, () => zoom.by(1 / 1.5), { class: "mark", "data-mark": "−" }),
    nodes.level,
    button("Larger", null, () => zoom.by(1.5), { class: "mark", "data-mark": "+" }),
    button("Fit", "fit", () => zoom.fit(), { class: "only-icon" }),
  );
  const around = h("div", { class: "around" }, nodes.stage);
  root.append(nodes.sheet, around, nodes.tools, h("div", { class: "foot" }, nodes.edit, nodes.zoom), nodes.family);
  new ResizeObserver(placeNotes).observe(around);
  zoom = new Zoom(nodes.stage, {
    wheel: state.bridge.kind === "web",
    changed: (percent) => (nodes.level.textContent = `${percent} %`),
  });
  on("image view", render);
  on("jobs engine model", renderStage);
  on("shown", () => {
    if (matchMedia("(max-width: 760px)").matches) nodes.stage.parentElement.scrollIntoView({ block: "start" });
  });
  // Until another image is there, its actions would still mean the one before.
  on("opening", () => ((opening = true), renderInert()));
  on("opened image", () => ((opening = false), renderInert()));
  on("picked", renderSheet);
  render();
}

function render() {
  if (shown !== state.image?.image) {
    keepBegun();
    shown = state.image?.image;
    mask = begun.get(shown)?.mask;
    before = null;
  }
  renderSheet();
  renderStage();
  renderTools();
  renderEdit();
  const tree = state.image && !state.card ? lineage(state.image) : null;
  fill(nodes.family, tree);
  const leaf = tree?.querySelector("li:has([aria-current])");
  // The tree alone: scrollIntoView would also move a phone's page down to it.
  if (leaf) tree.scrollTo(leaf.offsetLeft - (tree.clientWidth - leaf.offsetWidth) / 2, leaf.offsetTop - (tree.clientHeight - leaf.offsetHeight) / 2);
}

/** Keep the mask and the words of the image that leaves the stage, for when it is back. */
function keepBegun() {
  const words = document.getElementById("change")?.value;
  begun.delete(shown);
  const drawn = mask?.empty ? null : mask;
  if (words || drawn) begun.set(shown, { mask: drawn, words });
  if (begun.size > MOST_BEGUN) begun.delete(begun.keys().next().value);
}

/** The actions are those of the image on the stage: off while another is made or opened. */
function renderInert() {
  const off = opening || Boolean(shownCall());
  const held = document.activeElement;
  if (off && (nodes.tools.contains(held) || nodes.edit.contains(held))) {
    resume = nameOf(held);
    nodes.stage.focus({ preventScroll: true });
  }
  nodes.tools.inert = nodes.edit.inert = nodes.zoom.inert = off;
  if (off || !resume) return;
  // Back to the control that was used, unless the person went elsewhere. On a phone the keys would hide the image.
  const waiting = held === nodes.stage || held === document.body;
  const next = [nodes.tools, nodes.edit].map((node) => named(node, resume)).find(Boolean);
  resume = null;
  if (waiting && next && !matchMedia("(pointer: coarse)").matches) next.focus({ preventScroll: true });
}

/** The images of a sheet as a row of thumbnails with their letters; one of them is the pick. */
function renderSheet() {
  const many = state.sheet.length > 1 && (state.bridge.can.read || !state.image?.sheetSrc);
  nodes.sheet.hidden = !many;
  if (!many) return;
  const thumbs = state.sheet.map((handle, index) => {
    const letter = state.image?.labels?.[handle] ?? "ABCD"[index];
    const current = handle === state.image?.image;
    const picture = h("img", { alt: `Image ${letter}`, width: 64, height: 64 });
    state.bridge.image(handle, "thumb").then((src) => (picture.src = src)).catch(() => {});
    const select = () => open(handle, state.sheet);
    return h("button", { type: "button", "aria-pressed": String(current), "data-key": handle, onclick: select }, picture, h("b", {}, letter));
  });
  fill(nodes.sheet, thumbs);
}

// -- the stage ----------------------------------------------------------------------------------------------------

async function renderStage() {
  const call = shownCall();
  const { image } = state;
  nodes.stage.classList.toggle("empty", !call && !image);
  nodes.zoom.hidden = !image;
  renderInert();
  if (call) return renderJob(call);
  if (!image) return renderEmpty();
  if (nodes.stage.shown === `${image.image}/${state.tool}` && !nodes.stage.working) return;
  nodes.stage.shown = `${image.image}/${state.tool}`;
  nodes.stage.working = null;
  const { can } = state.bridge;
  // Where images cannot be read the result shows a sheet whole. A mask is drawn on one image.
  const whole = !can.read && state.sheet.length > 1 && state.tool === "look" && !mask && image.sheetSrc;
  const src = whole || image.src;
  const picture = h("img", { class: "picture", alt: image.prompt || image.source || `Image ${image.image}`, draggable: "false" });
  const frame = h("div", { class: image.alpha ? "frame checker" : "frame" }, picture);
  fill(nodes.stage, frame);
  picture.onload = () => {
    // A preview has the image's shape; without details its own size is the best that is known.
    if (whole || !image.width) fitStage(frame, picture.naturalWidth, picture.naturalHeight);
  };
  if (src) picture.src = src;
  const [width, height] = [image.width || 1, image.height || 1];
  fitStage(frame, width, height);
  zoom.enabled = state.tool !== "mask";
  if (state.tool === "mask" || (state.tool === "look" && mask)) showMask(frame, width, height);
  if (state.tool === "compare") await showCompare(frame);
  if (state.tool === "changes") await showChanges(frame);
  if (!can.read && (src || !can.call)) return;
  try {
    const full = await state.bridge.image(image.image);
    await preload(full);
    picture.src = full;
  } catch (error) {
    if (!src) fail(error);
  }
}

function preload(src) {
  const image = new Image();
  image.src = src;
  return image.decode();
}

/** The preview of a running job, growing clear, with its progress. */
function renderJob(call) {
  const job = jobOf(call);
  if (nodes.stage.working?.call !== call) {
    const picture = h("img", { class: "picture preview", alt: "" });
    const meter = h("progress", { max: 1, "aria-label": "Progress" });
    const words = h("span", {});
    const frame = h("div", { class: "frame working" }, picture);
    const cancel = button("Cancel", null, () => stop(call), { class: "quiet" });
    cancel.hidden = Boolean(call.agent);
    nodes.stage.working = { call, picture, meter, words, frame };
    fill(nodes.stage, frame, h("div", { class: "progress" }, words, meter, cancel));
  }
  const { picture, meter, words, frame } = nodes.stage.working;
  words.textContent = statusWords(job);
  if (fractionOf(job) === null) meter.removeAttribute("value");
  else meter.value = fractionOf(job);
  if (job.preview && picture.getAttribute("src") !== job.preview) {
    picture.onload = () => fitStage(frame, picture.naturalWidth, picture.naturalHeight);
    picture.src = job.preview;
    // Sharper with each step: a preview is an eighth of the image's size.
    picture.style.setProperty("--blur", `${(6 * (1 - (job.step ?? 0) / (job.steps || 1))).toFixed(1)}px`);
  }
  // Between two images of a sheet the one before stays in sight.
  picture.hidden = !picture.src;
  if (!picture.src) fitStage(frame, 1, 1);
}

/** Give the stage and the frame in it the shape of what they show. */
function fitStage(frame, width, height) {
  nodes.stage.style.setProperty("--shape", `${width} / ${height}`);
  zoom.show(frame, width, height);
}

function renderEmpty() {
  const words = modelOf()?.examples ?? [];
  const key = `empty/${state.pending}/${words}`;
  if (nodes.stage.shown === key && !nodes.stage.working) return;
  nodes.stage.shown = key;
  nodes.stage.working = null;
  const examples = words.map((example) =>
    button(example, null, () => {
      const prompt = document.getElementById("prompt");
      prompt.value = example;
      prompt.focus();
    }),
  );
  const card = state.pending ? "The image is still being made. The agent can wait for it." : "The image appears here.";
  const greeting = state.card ? card : "Describe an image and press Generate, or drop an image to change it.";
  fill(nodes.stage, h("div", { class: "welcome" }, h("p", {}, greeting), !state.card && examples));
}

// -- compare, changes, mask -----------------------------------------------------------------------------------------

/** The images it came from, the nearest first, without deleted ones. */
function ancestors(image) {
  const family = new Map((image.family ?? []).map((card) => [card.image, card]));
  const found = [];
  const waiting = [...(family.get(image.image)?.parents ?? [])];
  while (waiting.length) {
    const card = family.get(waiting.shift());
    if (!card || found.includes(card)) continue;
    found.push(card);
    waiting.push(...card.parents);
  }
  return found;
}

async function showCompare(frame) {
  const choices = ancestors(state.image);
  before ??= choices[0]?.image;
  if (!before) return;
  const old = h("img", { class: "picture before", alt: `Before: ${before}`, draggable: "false" });
  const slide = (value) => frame.style.setProperty("--at", `${value}%`);
  const slider = h("input", {
    type: "range",
    class: "slider",
    min: 0,
    max: 100,
    step: 1,
    value: 50,
    "aria-label": "Before and after",
    oninput: (event) => slide(event.target.value),
  });
  slide(50);
  const label = (words, side) => h("span", { class: `tag ${side}` }, words);
  frame.append(old, h("span", { class: "divider" }), label("Before", "left"), label("After", "right"), slider);
  if (choices.find((card) => card.image === before)?.alpha) frame.classList.add("checker");
  old.src = await state.bridge.image(before);
}

async function showChanges(frame) {
  const layer = h("img", { class: "picture changes", alt: "" });
  frame.append(layer);
  try {
    layer.src = await state.bridge.image(state.image.image, "changes");
  } catch (error) {
    fail(error);
  }
}

/** Show the mask: to draw on it, or what counts for the next edit. */
function showMask(frame, width, height) {
  mask ??= new Mask(width, height, renderEditWords);
  mask.canvas.inert = state.tool !== "mask";
  frame.append(mask.canvas, mask.ring);
  mask.draw();
}

// -- tools ----------------------------------------------------------------------------------------------------------

function setTool(tool) {
  state.tool = state.tool === tool ? "look" : tool;
  if (mask?.empty) mask = null;
  renderStage();
  renderTools();
  renderEdit();
  if (state.tool === "mask") {
    emit("shown");
    mask.canvas.focus({ preventScroll: true });
  }
}

function renderTools() {
  const { image, bridge, tool } = state;
  if (!image) return fill(nodes.tools);
  if (tool === "mask") {
    const keep = button("Keep for the agent", "pick", () => {
      const drawn = drawnMask();
      if (drawn) pick({ image: image.image, mask: drawn });
    });
    return fill(nodes.tools, mask.controls([keep, button("Done", null, () => setTool("mask"), { class: "primary" })]));
  }
  const toggle = (name, words, iconName) =>
    button(words, iconName, () => setTool(name), { "aria-pressed": String(tool === name) });
  const choices = ancestors(image);
  const repeats = bridge.can.call && image.again;
  const actions = [
    choices.length > 0 && toggle("compare", "Compare", "compare"),
    bridge.can.call && toggle("mask", "Mask", "brush"),
    bridge.can.read && image.changed?.mask && toggle("changes", "Changes", "changes"),
    repeats && button("New seed", "again", () => again(1)),
    repeats && button("Variations", "more", () => again(4)),
    bridge.can.call && !image.alpha && button("Cut out", "cut", cutOut),
    !state.card && bridge.can.call && button("Use in prompt", "add", useInPrompt),
    bridge.can.call && button("Pick", "pick", () => pick({ image: image.image })),
    state.card && bridge.can.download && button("Download", "save", () => download(image.image)),
    state.card && bridge.can.call && button("Save", "folder", () => save(image.image)),
    state.card && button(image.image, "copy", () => copy(image.image), { "aria-label": `Copy handle ${image.image}` }),
  ];
  const choose = h(
    "label",
    { class: "inline" },
    h("span", {}, "Before"),
    h(
      "select",
      { onchange: (event) => ((before = event.target.value), (nodes.stage.shown = ""), renderStage()) },
      choices.map((card) => h("option", { value: card.image, selected: card.image === before }, clip(`${card.image} ${card.prompt || card.source || ""}`, 48))),
    ),
  );
  const bar = h("div", { class: "bar actions", role: "group", "aria-label": "Image actions" }, actions);
  fill(nodes.tools, tool === "compare" && choices.length > 1 && choose, bar);
}

/** Return the mask as a data address; null, with words, where nothing is drawn or all was erased. */
function drawnMask() {
  const drawn = mask.png();
  if (!drawn) note("Draw first: nothing is marked.");
  return drawn;
}

async function useInPrompt() {
  const { image } = state;
  await addReference(image.image, null, image.prompt || image.source);
  document.getElementById("prompt").focus();
}

function cutOut() {
  run("edit_image", { image: state.image.image, prompt: "remove the background", background: "transparent" });
}

// -- the next edit --------------------------------------------------------------------------------------------------

function renderEdit() {
  const { image, bridge } = state;
  if (!image || !bridge.can.call) return fill(nodes.edit);
  const typed = nodes.edit.image === image.image ? document.getElementById("change")?.value : null;
  nodes.edit.image = image.image;
  const words = h("input", {
    id: "change",
    type: "text",
    value: typed ?? begun.get(image.image)?.words ?? "",
    required: true,
    dir: "auto",
    autocomplete: "off",
    "aria-label": "What should change",
    placeholder: "What should change? make the background pink",
  });
  const form = h("form", {}, words, h("button", { class: "primary" }, icon("brush"), h("span", { id: "edit-words" }, "Edit")));
  onSubmit(form, () => edit(words.value.trim()));
  fill(nodes.edit, form);
  renderEditWords();
}

function renderEditWords() {
  const words = document.getElementById("edit-words");
  if (words) words.textContent = mask && !mask.empty ? "Edit inside the mask" : "Edit";
}

async function edit(prompt) {
  if (!prompt) return document.getElementById("change").focus();
  const input = { image: state.image.image, prompt };
  if (mask && !mask.empty) {
    if (mask.region) input.region = mask.region;
    else if (!(input.mask = drawnMask())) return;
  }
  await run("edit_image", input);
}
