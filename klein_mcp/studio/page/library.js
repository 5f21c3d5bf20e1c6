// The library: newest first, endless, searchable; several images can be chosen to compose or delete.

import { addReference, fail, open, remove } from "./actions.js";
import { button, fill, h } from "./dom.js";
import { emit, on, state } from "./state.js";

const PAGE = 40;
const RECENT = 9;

function tile(card, { onclick, selected = null }) {
  const words = card.prompt || card.source || card.image;
  const picture = h("img", { alt: words, loading: "lazy", class: card.alpha ? "checker" : "" });
  state.bridge.image(card.image, "thumb").then((src) => (picture.src = src)).catch(() => {});
  const pressed = selected === null ? null : String(selected);
  return h(
    "li",
    {},
    h("button", { type: "button", title: words, "aria-pressed": pressed, "data-key": card.image, onclick }, picture),
    card.picked && h("span", { class: "tag right" }, "Picked"),
  );
}

/** The newest few beside the composer, kept up to date. */
export function createRecent(root) {
  let token;
  const load = async () => {
    if (state.card) return;
    const mine = (token = {});
    try {
      const page = await state.bridge.readJson(`klein://library?limit=${RECENT}`);
      if (token === mine) show(page.images);
    } catch (error) {
      fail(error);
    }
  };
  const show = (cards) => {
    root.hidden = !cards.length;
    const all = button("All images", null, () => ((state.view = "library"), emit("view")), { class: "quiet" });
    const tiles = cards.map((card) => tile(card, { onclick: () => open(card.image) }));
    fill(root, h("div", { class: "row" }, h("h2", {}, "Recent"), all), h("ul", { class: "grid" }, tiles));
  };
  on("library", load);
  on("view", () => root.hidden && load());
}

export function createLibrary(root) {
  const library = new Library(root);
  on("library", () => library.refresh());
  on("view", () => state.view === "library" && library.refresh());
}

class Library {
  cards = [];
  /** Where the next page begins; null at the end. */
  cursor = null;
  /** The words that `cards` were searched by. */
  words = "";
  chosen = new Set();
  choosing = false;
  /** Whether the last request for a further page ended in an error. */
  failed = false;

  constructor(root) {
    this.search = h("input", { type: "search", placeholder: "Words in the prompt", "aria-label": "Search", maxlength: 200 });
    this.search.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.refresh(), 200);
    });
    this.bar = h("div", { class: "row end" });
    this.grid = h("ul", { class: "grid wide" });
    this.further = button("Load more", null, () => this.more());
    this.empty = h("p", { class: "soft centre" }, "");
    root.append(h("div", { class: "row head" }, this.search, this.bar), this.grid, this.empty, h("div", { class: "centre" }, this.further));
    // After an error only the button asks again: news, messages and thumbnails bring it into sight time and again.
    this.observer = new IntersectionObserver(([entry]) => entry.isIntersecting && !this.failed && this.more());
    this.observer.observe(this.further);
    this.renderBar();
  }

  /** Load anew as many images as were there: news must not take a person back to the beginning. */
  async refresh() {
    this.loading = null;
    await this.load([], null, this.search.value === this.words ? this.cards.length : 0);
  }

  more() {
    if (!this.loading && this.cursor) return this.load(this.cards, this.cursor, 0);
  }

  /** Load pages behind `cards` until there are `least` images, one page at any rate. */
  async load(cards, cursor, least) {
    if (state.view !== "library") return;
    const mine = (this.loading = {});
    if (cursor || this.words !== this.search.value) this.failed = false;
    this.words = this.search.value;
    try {
      do {
        const query = new URLSearchParams({ limit: PAGE, search: this.words.trim(), cursor: cursor ?? "" });
        const page = await state.bridge.readJson(`klein://library?${query}`);
        if (this.loading !== mine) return; // another search was begun meanwhile
        cards = [...cards, ...page.images];
        cursor = page.next;
      } while (cursor && cards.length < least);
      [this.cards, this.cursor] = [cards, cursor];
      this.render();
      // Observed anew, it tells once more where the button is still in sight.
      this.observer.unobserve(this.further);
      this.observer.observe(this.further);
    } catch (error) {
      this.failed = cursor !== null;
      fail(error);
    } finally {
      if (this.loading === mine) this.loading = null;
    }
  }

  render() {
    const tiles = [];
    for (const card of this.cards) {
      const selected = this.choosing ? this.chosen.has(card.image) : null;
      const item = tile(card, { selected, onclick: () => (this.choosing ? this.toggle(card) : open(card.image)) });
      // Neighbours of one sheet stand together under one outline.
      if (card.sheet && tiles.at(-1)?.sheet === card.sheet) tiles.at(-1).items.push(item);
      else tiles.push({ sheet: card.sheet, items: [item] });
    }
    fill(this.grid, tiles.flatMap(({ items }) => (items.length > 1 ? items.map((item) => (item.classList.add("drafts"), item)) : items)));
    this.further.hidden = !this.cursor;
    this.empty.hidden = this.cards.length > 0;
    this.empty.textContent = this.search.value ? "No image has these words." : "No images yet. The first one appears here.";
  }

  toggle(card) {
    if (!this.chosen.delete(card.image)) this.chosen.add(card.image);
    this.render();
    this.renderBar();
  }

  renderBar() {
    const { size } = this.chosen;
    const set = (choosing) => {
      this.choosing = choosing;
      this.chosen.clear();
      this.renderBar();
      this.render();
    };
    if (!this.choosing) return fill(this.bar, button("Select", "pick", () => set(true)));
    const none = size === 0;
    fill(
      this.bar,
      h("span", { class: "soft", role: "status" }, `${size} selected`),
      button("Combine", "add", () => this.compose(), { class: "primary", disabled: none }),
      state.bridge.can.remove && button("Delete", "trash", () => this.remove(), { disabled: none }),
      button("Done", null, () => set(false)),
    );
  }

  async compose() {
    for (const handle of this.chosen) {
      const card = this.cards.find((each) => each.image === handle);
      await addReference(handle, null, card?.prompt);
    }
    this.chosen.clear();
    this.choosing = false;
    this.renderBar();
    state.view = "create";
    emit("view");
    document.getElementById("prompt").focus();
  }

  async remove() {
    if (!(await remove([...this.chosen]))) return;
    this.chosen.clear();
    this.renderBar();
  }
}
