// What the engine does now: one card for each job, with its preview, its progress and a way to cancel it.

import { fail, stop } from "./actions.js";
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

/** The job of a call, or what was last heard of it, or a stand-in until the server tells of it. */
export function jobOf(call) {
  let job = state.now.jobs.find((each) => each.call && each.call === call.name);
  if (state.bridge.kind === "app") {
    // The server does not know by name what a view or its agent calls.
    const mine = state.now.jobs.filter((each) => each.mine);
    job = mine.find((each) => each.job === call.job) ?? mine.findLast((each) => each.prompt === call.prompt) ?? mine.at(-1);
  }
  if (job) call.latest = job;
  return call.latest ?? { state: "starting", prompt: call.prompt, fraction: null };
}

/** The call that the stage shows: the first that has begun, else the newest; none while the person looks at an image. */
export function shownCall() {
  if (state.aside) return null;
  const calls = [...state.calls];
  const begun = (job) => job.index || ["loading", "running"].includes(job.state);
  return calls.find((call) => begun(jobOf(call))) ?? calls.at(-1);
}

export function createJobs(root) {
  const list = h("ul", {});
  const cards = new Map();
  root.append(h("h2", {}, "Now"), list);
  const render = () => {
    const { jobs } = state.now;
    root.hidden = !jobs.length;
    for (const { job } of jobs) if (!cards.has(job)) cards.set(job, new Card(job));
    for (const job of cards.keys()) if (!jobs.some((each) => each.job === job)) cards.delete(job);
    const nodes = jobs.map(({ job }) => cards.get(job).node);
    if (nodes.some((node, place) => node !== list.children[place]) || nodes.length < list.children.length) fill(list, nodes);
    for (const job of jobs) cards.get(job.job).show(job);
  };
  on("jobs", render);
  render();
}

/** One job. Its nodes stay: a click on a button that is painted anew between press and release would be lost. */
class Card {
  constructor(name) {
    this.picture = h("img", { alt: "", width: 56, height: 56 });
    this.watch = button("Watch", null, () => ((state.aside = false), emit("jobs")), { class: "small" });
    this.prompt = h("p", { dir: "auto" });
    this.words = h("p", { class: "soft" });
    this.meter = h("progress", { max: 1, "aria-label": "Progress" });
    this.node = h(
      "li",
      {},
      this.picture,
      h("div", {}, this.prompt, this.words, this.meter),
      h(
        "div",
        {},
        this.watch,
        state.bridge.can.cancel && button("Cancel", "close", () => cancel(this.job), { class: "quiet only-icon", title: "Cancel", "data-key": name }),
      ),
    );
  }

  show(job) {
    this.job = job;
    if (!job.preview) this.picture.removeAttribute("src");
    else if (this.picture.getAttribute("src") !== job.preview) this.picture.src = job.preview;
    this.watch.hidden = !state.aside || !ownCall(job);
    this.prompt.textContent = this.prompt.title = job.prompt;
    this.words.textContent = statusWords(job) + (job.mine ? "" : ` · ${job.who}`);
    if (fractionOf(job) === null) this.meter.removeAttribute("value");
    else this.meter.value = fractionOf(job);
  }
}

const ownCall = (job) => [...state.calls].find((call) => jobOf(call) === job);

async function cancel(job) {
  const own = ownCall(job);
  if (own) return stop(own);
  try {
    await state.bridge.cancel(job.job);
    emit("jobs");
  } catch (error) {
    fail(error);
  }
}
