// Small helpers for building the page. Text always goes in as text nodes: prompts and file names are never HTML.

import { focusFallback, holdFocus, leaveHidden, nameOf, named } from "./focus.js";

const SVG = "http://www.w3.org/2000/svg";

/** Create an element; `on…` properties become listeners, the rest attributes. */
export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Create an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const ICONS = {
  compare: "M12 3v18M8 7l-5 5 5 5M16 7l5 5-5 5",
  brush: "M4 20c3 0 4-1 4-3 0-1-1-2-2-2s-2 1-2 2M8.5 15.5 19 5a1.5 1.5 0 0 0-2-2L7 13.5",
  changes: "M12 3a9 9 0 1 0 0 18M12 3c5 0 9 4 9 9s-4 9-9 9M12 3v18M12 8h8M12 12h9M12 16h8",
  more: "M5 5h6v6H5zM13 13h6v6h-6zM13 5h6v6h-6zM5 13h6v6H5z",
  again: "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
  cut: "M6 9a3 3 0 1 0 0-6 3 3 0 0 0 0 6M6 21a3 3 0 1 0 0-6 3 3 0 0 0 0 6M8 8l12 11M8 16 20 5",
  save: "M12 3v12M7 10l5 5 5-5M4 20h16",
  folder: "M3 6h6l2 2h10v11H3z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  pick: "m5 12 5 5L20 6",
  add: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6 6 18",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  undo: "M9 8 4 12l5 5M4 12h10a6 6 0 0 1 6 6",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
};

/** Draw one of the icons; decoration only, its button says the same in words. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** Create a button with an icon and words. */
export function button(words, iconName, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, iconName && icon(iconName), h("span", {}, words));
}

/** Replace the children of a node. The control that has the focus keeps it, or its successor gets it. */
export function fill(node, ...children) {
  const giveBack = holdFocus(node);
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  giveBack();
  return node;
}

/** Shorten words and text that are too long to be read in a message. Emoji stay whole. */
export function clip(text, most = 300) {
  const first = (words, number) => `${[...words].slice(0, number).join("")}…`;
  const short = text.replace(/\S{41,}/gu, (word) => first(word, 32));
  return [...short].length > most ? first(short, most - 1) : short;
}

/** Tell a screen reader, and nobody else. */
export function announce(words) {
  document.getElementById("announced").textContent = words;
}

/** Messages that are shown at once. */
const NOTES = 3;
/** Milliseconds until a message leaves, unless somebody points at it or has the focus in it. */
const NOTE_TIME = 6000;

/** Show a short message, read out by screen readers; it leaves by itself. */
export function note(text, action = null) {
  const list = document.getElementById("notes");
  const words = clip(text);
  const leave = () => {
    const focused = node.contains(document.activeElement);
    node.remove();
    if (focused) focusFallback();
  };
  const node = h(
    "p",
    {},
    h("span", { dir: "auto" }, words),
    action && button(action.words, null, () => (leave(), action.run())),
    button("Dismiss", "close", leave, { class: "only-icon" }),
  );
  for (const old of [...list.children]) if (old.firstChild.textContent === words) old.remove();
  list.append(node);
  const spare = [...list.children].filter((each) => !each.contains(document.activeElement));
  while (list.children.length > NOTES && spare.length > 1) spare.shift().remove();
  placeNotes();
  const wait = () => setTimeout(() => (node.matches(":hover, :focus-within") ? wait() : leave()), NOTE_TIME);
  wait();
}

/** Take away the messages about what was before, except where somebody may still act on one. */
export function clearNotes() {
  for (const node of document.querySelectorAll("#notes p")) {
    if (node.children.length < 3 && !node.matches(":focus-within")) node.remove();
  }
}

addEventListener("resize", placeNotes);

/** Put the messages over the top of the image, where no control is; elsewhere they stand at the bottom. */
export function placeNotes() {
  const list = document.getElementById("notes");
  const stage = document.querySelector(".around");
  const box = stage?.getBoundingClientRect();
  const inSight = box?.width && box.top >= 0 && box.top < innerHeight / 2;
  list.style.top = inSight ? `${box.top + 8}px` : "";
  list.style.bottom = inSight ? "auto" : "";
  list.style.left = inSight ? `${box.left + box.width / 2}px` : "";
  list.style.maxWidth = inSight ? `${Math.min(box.width - 16, 560)}px` : "";
}

/** Do `act` when a form's button is pressed, or Enter in a field. */
export function onSubmit(form, act) {
  form.addEventListener("submit", (event) => (event.preventDefault(), act()));
  // Frames without allow-forms never fire submit. Enter in a field clicks the button there, too.
  form.querySelector("button:not([type])").addEventListener("click", (event) => {
    event.preventDefault();
    if (form.noValidate || form.reportValidity()) act();
  });
}

/** Ask in a dialog; resolves to the form's values, or null if it was closed. `fields` are labelled controls. */
export function ask({ title, words, fields = [], yes, danger = false }) {
  return new Promise((resolve) => {
    const form = h(
      "form",
      { method: "dialog" },
      h("h2", {}, title),
      words && h("p", {}, words),
      fields,
      h(
        "div",
        { class: "row end" },
        button("Cancel", null, () => dialog.close()),
        h("button", { class: danger ? "danger" : "primary", value: "yes" }, yes),
      ),
    );
    const dialog = h("dialog", { "aria-label": title }, form);
    const opener = document.activeElement;
    const name = nameOf(opener);
    const finish = () => {
      dialog.remove();
      // The browser gives the focus back to what had it, unless that was painted anew meanwhile.
      if (!opener.isConnected) (named(document, name) ?? document.body).focus();
      leaveHidden();
      resolve(dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null);
    };
    dialog.addEventListener("close", finish);
    onSubmit(form, () => dialog.close("yes"));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Create a group of radio buttons that looks like one segmented control. */
export function segments(name, label, options, value, onchange) {
  return h(
    "fieldset",
    { class: "segments" },
    h("legend", {}, label),
    options.map(([key, words]) => {
      const radio = h("input", { type: "radio", name, value: key, onchange: () => onchange(key) });
      radio.checked = key === value;
      return h("label", {}, radio, h("span", {}, words));
    }),
  );
}
