// The family of an image as a tree: what it was made from, and what was made from it.

import { h, svg } from "./dom.js";
import { open } from "./actions.js";
import { state } from "./state.js";

const WIDTH = 132;
const GAP = 30;
const HEIGHT = 108;

/** Place the cards: a column for each generation, a row for each leaf. The first parent is the one a card hangs from. */
function place(family) {
  const known = new Map(family.map((card) => [card.image, card]));
  const children = new Map(family.map((card) => [card.image, []]));
  const roots = [];
  for (const card of family) {
    const parent = card.parents.find((each) => known.has(each));
    if (parent) children.get(parent).push(card);
    else roots.push(card);
  }
  const places = new Map();
  let row = 0;
  const visit = (card, column) => {
    if (places.has(card.image)) return;
    const spot = { column, row };
    places.set(card.image, spot);
    children.get(card.image).forEach((child, index) => {
      if (index) row += 1;
      visit(child, column + 1);
    });
  };
  roots.forEach((root, index) => {
    if (index) row += 1;
    visit(root, 0);
  });
  // A card made from several references stands behind all of them.
  for (let moved = true, rounds = 0; moved && rounds < family.length; rounds += 1) {
    moved = false;
    for (const card of family) {
      const behind = Math.max(-1, ...card.parents.map((each) => places.get(each)?.column ?? -1)) + 1;
      const spot = places.get(card.image);
      if (spot.column < behind) [spot.column, moved] = [behind, true];
    }
  }
  // A further reference stands just before what was made from it, not at the far left.
  for (const root of roots.slice(1)) {
    const columns = family.filter((card) => card.parents.includes(root.image)).map((card) => places.get(card.image).column);
    if (columns.length) places.get(root.image).column = Math.max(0, Math.min(...columns) - 1);
  }
  return { places, columns: Math.max(0, ...[...places.values()].map((spot) => spot.column)) + 1, rows: row + 1 };
}

/** Draw the tree; null for an image without relatives. */
export function lineage(image) {
  const family = image.family ?? [];
  if (family.length < 2) return null;
  const { places, columns, rows } = place(family);
  const left = (spot) => spot.column * (WIDTH + GAP);
  const top = (spot) => spot.row * HEIGHT;
  const lines = svg("svg", { "aria-hidden": "true", width: columns * (WIDTH + GAP), height: rows * HEIGHT });
  const tree = h("ul", { class: "tree", "aria-label": "Lineage" });
  tree.style.width = `${columns * (WIDTH + GAP) - GAP}px`;
  tree.style.height = `${rows * HEIGHT}px`;
  for (const card of family) {
    const spot = places.get(card.image);
    for (const parent of card.parents.filter((each) => places.has(each))) {
      const from = places.get(parent);
      const [x1, y1, x2, y2] = [left(from) + WIDTH, top(from) + 32, left(spot), top(spot) + 32];
      const d = `M${x1} ${y1}C${x1 + 18} ${y1} ${x2 - 18} ${y2} ${x2} ${y2}`;
      lines.append(svg("path", { d, class: parent === card.parents[0] ? "" : "second" }));
    }
    tree.append(leaf(card, left(spot), top(spot)));
  }
  return h("div", { class: "lineage" }, h("div", { class: "canvas" }, lines, tree));
}

function leaf(card, left, top) {
  const current = card.image === state.image.image;
  const words = card.prompt || card.source || card.image;
  const picture = h("img", { alt: "", width: WIDTH, height: 64, loading: "lazy" });
  state.bridge.image(card.image, "thumb").then((src) => (picture.src = src)).catch(() => {});
  const node = h(
    "li",
    {},
    h(
      "button",
      { type: "button", title: words, "data-key": card.image, "aria-current": current ? "true" : null, onclick: () => open(card.image) },
      picture,
      h("span", { dir: "auto" }, words),
    ),
  );
  node.style.left = `${left}px`;
  node.style.top = `${top}px`;
  return node;
}
