// Keeps what a person was making over a reload, in this tab's session storage alone.

import { addReference, open, resume } from "./actions.js";
import { emit, state } from "./state.js";

const KEY = "klein studio";

/** Keep it whenever the page may go. */
export function keepOverReload() {
  addEventListener("pagehide", keep);
  document.addEventListener("visibilitychange", keep);
}

const fields = () => [...document.querySelectorAll("#prompt, #shape, #width, #height, #seed, #model")];

function keep() {
  const { image, sheet, view, references, calls } = state;
  const values = Object.fromEntries(fields().map((field) => [field.id, field.value]));
  const count = document.querySelector("[name=count]:checked")?.value;
  const kept = { image: image?.image, sheet, view, values, count, change: document.getElementById("change")?.value };
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...kept, references: references.map(({ ref, words }) => ({ ref, words })), calls: [...calls].map(({ name, prompt }) => ({ name, prompt })) }));
  } catch {
    // A browser that stores nothing loses it, as it wants to.
  }
}

/** Bring back what was kept. What was deleted meanwhile is left out. `models`: settles when they can be chosen. */
export async function restore(models) {
  let kept;
  try {
    kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch {
    return;
  }
  const set = (field) => {
    const value = kept.values?.[field.id];
    if (!value) return;
    field.value = value;
    field.dispatchEvent(new Event("change"));
  };
  fields().forEach(set);
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
  // A busy engine may take a while to name them.
  await models;
  set(document.getElementById("model"));
}

function exists(handle) {
  return state.bridge.readJson(`klein://images/${handle}/details`).then(() => true, () => false);
}
