// Everything that generates or changes something, whichever button asked for it.

import { announce, ask, clearNotes, clip, h, note } from "./dom.js";
import { emit, modelOf, state } from "./state.js";

/** Read a tool result: its line of JSON as an object, and its preview as an address. */
export function readResult(result) {
  const blocks = result.content ?? [];
  const text = blocks.find((block) => block.type === "text")?.text ?? "";
  const preview = blocks.find((block) => block.type === "image");
  let line = {};
  try {
    line = JSON.parse(text);
  } catch {
    // Errors are a sentence.
  }
  const handles = line.images?.map((one) => one.image).filter(Boolean) ?? (line.image ? [line.image] : []);
  const src = preview && `data:${preview.mimeType};base64,${preview.data}`;
  return { line, text, handles, src, failed: Boolean(result.isError) };
}

/** Call a tool that makes images, wait for them however long it takes, and show them. */
export async function run(tool, input, prompt = input.prompt) {
  const call = { prompt };
  state.aside = false;
  clearNotes();
  announce("Started.");
  return follow(call, state.bridge.call(tool, input, call));
}

/** Go on waiting for a call that was made before the page was loaded anew. */
export function resume(call) {
  return follow(call, state.bridge.result(call));
}

/** Milliseconds between two questions whether a job is done. */
const AGAIN = 1000;

/** Wait for the images of a call, by its answer or by the job in it, and show them. */
export async function follow(call, answer) {
  state.calls.add(call);
  state.error = "";
  emit("error");
  emit("jobs");
  emit("shown");
  try {
    let result = readResult(await answer);
    while (!result.failed && result.line.job && !result.handles.length) {
      if (call.stopped) throw new Error("Cancelled.");
      call.job = result.line.job;
      const asked = performance.now();
      result = readResult(await state.bridge.call("wait_for_job", { job: call.job }, call));
      // With a wait budget of 0 the answer comes at once, whether the image is there or not.
      if (!result.handles.length) await new Promise((done) => setTimeout(done, AGAIN - (performance.now() - asked)));
    }
    if (result.failed) throw new Error(result.text);
    announce(`Ready: ${clip(call.prompt)}`);
    for (const warning of result.line.warnings ?? []) note(warning);
    const newest = [...state.calls].at(-1) === call;
    await present(result, call.prompt, newest);
    return result.handles;
  } catch (error) {
    if (call.stopped) note("Cancelled.");
    // The agent hears of it by itself. The job on a card of an old chat is forgotten, and that is no alert.
    else if (call.agent) note(error.message);
    else fail(error);
    return [];
  } finally {
    state.calls.delete(call);
    state.aside &&= state.calls.size > 0;
    emit("jobs");
  }
}

/** Stop a call of this page, and with it its job. */
export async function stop(call) {
  call.stopped = true;
  try {
    await state.bridge.stop(call);
  } catch (error) {
    fail(error);
  }
}

export function fail(error) {
  state.error = error.message.split("\n").map((line) => clip(line)).join("\n");
  emit("error");
}

/** Show a result, or offer it to a person who looks at something else. */
export async function present(result, prompt, newest = true) {
  const { handles } = result;
  if (!handles.length) return;
  if (newest && !state.aside && state.view === "create") return showResult(result);
  note(`Ready: ${prompt}`, { words: "Open", run: () => open(handles[0], handles) });
}

/** Show the images of a tool result, at once from its preview and then in full. */
async function showResult({ handles, src, line }) {
  state.image = { image: handles[0], src: handles.length === 1 ? src : null, sheetSrc: src, ...pickFacts(line) };
  state.sheet = handles.length > 1 ? handles : [];
  state.tool = "look";
  emit("image");
  await load(handles[0], handles);
}

/** Read what a result's line tells of the image to show, of a sheet the first. */
function pickFacts(line) {
  const facts = line.images?.[0] ?? line;
  const [width, height] = facts.size ?? [facts.width, facts.height];
  return { prompt: "", parents: [], family: [], ...facts, width, height };
}

/** Put an image on the stage, also while another is being made. */
export function open(handle, sheet = null) {
  state.aside = state.calls.size > 0;
  return load(handle, sheet);
}

async function load(handle, sheet) {
  const token = (load.latest = {});
  const { view } = state;
  const src = state.image?.image === handle ? state.image.src : null;
  if (!state.bridge.can.read) {
    if (src || !state.bridge.can.call) return;
    state.image = { ...state.image, image: handle, src: await state.bridge.image(handle), family: [], parents: [] };
    return emit("image");
  }
  let details;
  emit("opening");
  try {
    details = await state.bridge.readJson(`klein://images/${handle}/details`);
  } catch (error) {
    emit("opened");
    return src ? null : fail(error); // the preview of the result is on the stage already
  }
  if (load.latest !== token) return; // a later click was answered first
  state.image = { ...details, src };
  state.sheet = sheet?.length > 1 ? sheet : details.siblings;
  if (!["look", "compare"].includes(state.tool)) state.tool = "look";
  // Whoever went to another view meanwhile stays there, and finds the image later.
  if (state.view === view) state.view = "create";
  emit("view");
  emit("image");
  emit("shown");
}

/** Make the image again by its recipe, which the server keeps whole, with new seeds. */
export function again(count) {
  const { image, prompt } = state.image;
  const [seed] = crypto.getRandomValues(new Uint32Array(1));
  return run("generate_image", { again: image, seed, count }, prompt);
}

export async function save(image) {
  const path = h("input", { name: "path", required: true, value: `${image}.png`, "aria-label": "File name" });
  const format = h("p", { class: "soft" }, "A file or folder in your project, or an absolute path. The ending chooses PNG, JPEG or WebP.");
  const answer = await ask({ title: "Save to a folder", fields: [path, format], yes: "Save" });
  if (!answer) return;
  try {
    const result = readResult(await state.bridge.call("save_image", { image, path: answer.path }));
    if (result.failed) throw new Error(result.text);
    note(`Saved as ${result.line.saved ?? answer.path}`);
  } catch (error) {
    fail(error);
  }
}

export async function download(image) {
  try {
    const remark = await state.bridge.download(image);
    if (remark) note(`${remark} Save writes it as it is.`);
  } catch (error) {
    fail(error);
  }
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Sandboxed frames have no clipboard interface; a selection can still be copied.
    const field = h("textarea", { value: text, class: "offscreen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  note(`Copied ${text}`);
}

/** Keep on the server that the person chose this image; the agent's next result says so. */
export async function pick(picked) {
  try {
    const result = readResult(await state.bridge.pick(picked));
    if (result.failed) throw new Error(result.text);
    note(`${picked.mask ? "Mask kept" : "Picked"}: your agent's next result names it.`);
    if (state.image?.image === picked.image) state.image.picked = true;
    emit("picked");
  } catch (error) {
    fail(error);
  }
}

/** Read anew what the stage knows of its image, such as its family after others were deleted. */
async function refresh() {
  const { image } = state;
  if (!image) return;
  const details = await state.bridge.readJson(`klein://images/${image.image}/details`);
  if (state.image !== image) return; // another one was opened meanwhile
  state.image = { ...details, src: image.src };
  state.sheet = details.siblings;
}

/** Show no image, nor the row of its sheet, nor one that is being opened. */
export function clearStage() {
  load.latest = null;
  state.image = null;
  state.sheet = [];
}

export async function remove(images) {
  const many = images.length === 1 ? "this image" : `${images.length} images`;
  const sure = await ask({
    title: `Delete ${many}?`,
    words: "The files are deleted for good. Images made from them stay.",
    yes: "Delete",
    danger: true,
  });
  if (!sure) return false;
  try {
    await state.bridge.remove(images);
    if (images.includes(state.image?.image)) clearStage();
    else await refresh().catch(fail);
    emit("image");
    emit("library");
    return true;
  } catch (error) {
    fail(error);
    return false;
  }
}

/** Tell whether the references are as many as the model takes, and say so to the person. */
function noRoom() {
  const most = modelOf()?.max_references ?? 4;
  if (state.references.length < most) return false;
  note(`The model takes ${most} references.`);
  return true;
}

/** Add an image to the composer's references. */
export async function addReference(ref, src, words) {
  if (noRoom()) return;
  state.references.push({ ref, src: src ?? (await state.bridge.image(ref, "thumb")), words: words || ref });
  emit("references");
}

/** Upload files and add them to the references. Each one that fails is named with the reason. */
export async function addFiles(files) {
  const failed = [];
  for (const file of files) {
    if (noRoom()) break;
    try {
      if (!file.type.startsWith("image/")) throw new Error("this is not an image.");
      const ref = await state.bridge.upload(file);
      await addReference(ref, ref.startsWith("data:") ? ref : null, file.name);
    } catch (error) {
      failed.push(`${clip(file.name, 60)}: ${error.message}`);
    }
  }
  if (failed.length) fail(new Error(failed.join("\n")));
}
