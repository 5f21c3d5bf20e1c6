// What the engine does now: one card for each job, with its preview, its progress and a way to cancel it.

import { fail } from "./actions.js";
import { button, fill, h } from "./dom.js";
import { emit, on, state } from "./state.js";

/** Say in words where a job is. */
export function statusWords(job) {
  const part = job.count > 1 ? `Image ${job.index + 1} of ${job.count}: ` : "";
  if (job.state === "queued" && !job.index) {
    const wait = job.seconds ? `, about ${Math.ceil(job.seconds)} s` : "";
    return job.position > 0 ? `${job.position} ahead${wait}` : `Next${wait}`;
  }
  if (job.state === "loading") return `Loading ${job.model ?? "the model"}`;
  if (job.step) return `${part}step ${job.step} of ${job.steps}`.replace(/^s/, "S");
  if (part) return `${part}${job.stage === "decode" ? "finishing" : "starting"}`;
  return { prompt: "Reading the prompt", references: "Reading the references", decode: "Finishing" }[job.stage] ?? "Starting";
}

/** How far a job is, 0 … 1; null while nothing is known. */
export function fractionOf(job) {
  return job.fraction ?? (job.index ? job.index / job.count : null);
}

/** The job of this page's newest call, or a stand-in until the server tells of it. */
export function ownJob() {
  const call = [...state.calls].at(-1);
  if (!call) return null;
  const mine = state.now.jobs.filter((job) => job.mine);
  const job = mine.findLast((each) => each.prompt === call.prompt) ?? mine.at(-1);
  if (job) call.latest = job;
  return job ?? call.latest ?? { state: "starting", prompt: call.prompt, fraction: null };
}

export function createJobs(root) {
  on("jobs", () => render(root));
  render(root);
}

function render(root) {
  root.hidden = !state.now.jobs.length;
  fill(root, h("h2", {}, "Now"), h("ul", {}, state.now.jobs.map(card)));
}

function card(job) {
  const who = job.mine ? "" : ` · ${job.who || "an agent"}`;
  const meter = h("progress", { max: 1, "aria-label": "Progress" });
  if (fractionOf(job) !== null) meter.value = fractionOf(job);
  return h(
    "li",
    {},
    job.preview ? h("img", { src: job.preview, alt: "", width: 56, height: 56 }) : h("span", { class: "blank" }),
    h("div", {}, h("p", {}, job.prompt), h("p", { class: "soft" }, statusWords(job) + who), meter),
    state.bridge.can.cancel && button("Cancel", "close", () => cancel(job), {
        class: "quiet only-icon",
        title: "Cancel",
        "data-key": job.job,
      }),
  );
}

async function cancel(job) {
  try {
    await state.bridge.cancel(job.job);
    emit("jobs");
  } catch (error) {
    fail(error);
  }
}
