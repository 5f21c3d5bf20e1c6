// Keeps the keyboard's focus where a person left it, though the page is painted anew.

const CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex]";

function usable(node) {
  return !node.disabled && node.checkVisibility() && !node.closest("[inert]");
}

/** Tell a control from its neighbours, also after it was painted anew. */
export function nameOf(node) {
  const { dataset, id, title, value, type } = node;
  const words = dataset.key ?? (id || node.getAttribute("aria-label") || title || node.textContent.trim());
  return [node.tagName, words, type === "radio" ? value : ""].join(" ");
}

/** Return the control of that name in `root` that can have the focus now. */
export function named(root, name) {
  return [...root.querySelectorAll(CONTROLS)].find((node) => nameOf(node) === name && usable(node));
}

/** Remember which control in `node` has the focus. The returned function gives it back to it or to its successor. */
export function holdFocus(node) {
  const held = document.activeElement;
  if (!held || held === node || !node.contains(held)) return () => {};
  const name = nameOf(held);
  const place = [...node.querySelectorAll(CONTROLS)].indexOf(held);
  const caret = held.tagName === "INPUT" && held.type === "text" ? held.selectionStart : null;
  return () => {
    if (held.isConnected && usable(held)) return held.focus({ preventScroll: true });
    const all = [...node.querySelectorAll(CONTROLS)];
    // The same control; or what stands in its place now, or next to it.
    const next = named(node, name) ?? all.slice(Math.max(0, place)).find(usable) ?? all.findLast(usable);
    if (!next) return focusFallback();
    next.focus({ preventScroll: true });
    if (caret !== null && next.type === "text") next.setSelectionRange(caret, caret);
  };
}

/** Focus the middle of the view that is open: the image, or else the view's own tab. */
export function focusFallback() {
  const next = [".stage", "nav [aria-current]"].map((each) => document.querySelector(each)).find((node) => node && usable(node));
  next?.focus({ preventScroll: true });
}

/** Move the focus out of something that was just hidden. */
export function leaveHidden() {
  const held = document.activeElement;
  if (held === document.body || !usable(held)) focusFallback();
}
