// Keeps what a person was making over a reload, in this tab's session storage alone.

import { addReference, open, resume } from "./actions.js";
import { emit, state } from "./state.js";

const KEY = "klein studio";

/** Keep it whenever the page may go. */
export function keepOverReload() {
  addEventListener("pagehide", keep);
  document.addEventListener("visibilitychange", keep);
}

const fields = () => [...document.querySelectorAll("#prompt, #shape, #width, #height, #seed")];

function keep() {
  const { image, sheet, view, references, calls, model } = state;
  const values = Object.fromEntries(fields().map((field) => [field.id, field.value]));
  const count = document.querySelector("[name=count]:checked")?.value;
  const kept = { image: image?.image, sheet, view, values, count, model, change: document.getElementById("change")?.value };
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...kept, references: references.map(({ ref, words }) => ({ ref, words })), calls: [...calls].map(({ name, prompt }) => ({ name, prompt })) }));
  } catch {
    // A browser that stores nothing loses it, as it wants to.
  }
}

/** Bring back what was kept. What was deleted meanwhile is left out. */
export async function restore() {
  let kept;
  try {
    kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch {
    return;
  }
  state.model = kept.model ?? "";
  emit("model");
  for (const field of fields()) {
    const value = kept.values?.[field.id];
    if (!value) continue;
    field.value = value;
    field.dispatchEvent(new Event("change"));
  }
  if (kept.count) document.querySelector(`[name=count][value="${kept.count}"]`)?.click();
  for (const { ref, words } of kept.references ?? []) {
    if (await exists(ref)) await addReference(ref, null, words);
  }
  if (kept.image && (await exists(kept.image))) await open(kept.image, kept.sheet);
  const change = document.getElementById("change");
  if (change && kept.change) change.value = kept.change;
  for (const call of kept.calls ?? []) resume(call);
  if (kept.view && kept.view !== state.view) {
    state.view = kept.view;
    emit("view");
  }
}

function exists(handle) {
  return state.bridge.readJson(`klein://images/${handle}/details`).then(() => true, () => false);
}
