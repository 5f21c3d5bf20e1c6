// Small helpers for building the page. Text always goes in as text nodes: prompts and file names are never HTML.

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
  erase: "M8 20h12M4 15 14 5l6 6-9 9H8z",
  box: "M4 5h16v14H4z",
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

/** Replace the children of a node. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Show a short message, read out by screen readers; it leaves by itself. */
export function note(words, action = null) {
  const node = h("p", {}, h("span", {}, words), action && button(action.words, null, () => (node.remove(), action.run())));
  document.getElementById("notes").append(node);
  setTimeout(() => node.remove(), 6000);
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
    const finish = () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null);
    };
    dialog.addEventListener("close", finish);
    // Frames without allow-forms block the form's own submission.
    form.addEventListener("submit", (event) => (event.preventDefault(), dialog.close("yes")));
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
