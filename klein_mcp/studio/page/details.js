// The right of the page: what was asked, with which seed and model, and what changed.

import { copy, download, open, remove, save } from "./actions.js";
import { button, fill, h } from "./dom.js";
import { on, state } from "./state.js";

export function createDetails(root) {
  on("image picked", () => render(root));
  render(root);
}

const TOOLS = {
  generate_image: "Generated",
  edit_image: "Edited",
  compose_references: "Composed",
  open: "Opened",
};

/** Say in a sentence how much of an image an edit changed. */
function changeWords(changed, partly) {
  if (!changed) return null;
  const percent = 100 * changed.share;
  if (!changed.box && percent < 0.2) return ["Nothing visible changed", "Try other words, or name the thing to change."];
  const share = percent < 1 ? "under 1 %" : `${Math.round(percent)} %`;
  const rest = changed.kept ? "Every other pixel is as it was." : "The rest may differ a little.";
  return [partly ? `${share} of the marked part changed` : `${share} changed`, rest];
}

function actions(image) {
  const { can } = state.bridge;
  return [
    can.download && button("Download", "save", () => download(image.image)),
    can.call && button("Save to folder", "folder", () => save(image.image)),
    can.remove && button("Delete", "trash", () => remove([image.image])),
  ];
}

function render(root) {
  const { image } = state;
  root.hidden = !image || (state.card && !image.created);
  if (root.hidden) return fill(root);
  const link = (handle) => h("button", { type: "button", class: "link", onclick: () => open(handle) }, handle);
  const changed = changeWords(image.changed, image.region || image.mask);
  const facts = [
    ["Handle", [image.image, " ", button("Copy", null, () => copy(image.image), { class: "small" })]],
    ["From", image.parents?.length ? image.parents.flatMap((each, i) => (i ? [", ", link(each)] : [link(each)])) : null],
    ["Read as", image.read_as],
    ["File", image.source],
    ["Seed", image.seed],
    ["Size", image.width && `${image.width} × ${image.height}`],
    ["Model", [image.model, image.dtype].filter(Boolean).join(", ")],
    ["Steps", image.steps],
    ["Made", image.created && new Date(image.created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "" && value?.length !== 0);
  fill(
    root,
    changed && h("div", { class: "changed" }, h("strong", {}, changed[0]), h("p", { class: "soft" }, changed[1])),
    image.picked && h("p", { class: "picked" }, "Picked for your agent."),
    image.prompt && h("blockquote", { dir: "auto" }, image.prompt),
    image.prompt && h("div", { class: "bar start" }, button("Copy", "copy", () => copy(image.prompt), { class: "small", "aria-label": "Copy prompt" })),
    h("h2", {}, TOOLS[image.tool] ?? "Image"),
    h("dl", {}, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", { dir: "auto" }, value)])),
    h("div", { class: "bar start" }, actions(image)),
  );
}
