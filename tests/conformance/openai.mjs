// Every images call of openai-node against the server at argv[2]: one line of JSON per check.
// argv[3], argv[4]: an image, and a mask of its size whose left half is transparent.
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "anything", maxRetries: 0 });
const image = (name) => toFile(fs.readFileSync(process.argv[3]), name, { type: "image/png" });
const mask = () => toFile(fs.readFileSync(process.argv[4]), "mask.png", { type: "image/png" });
const say = (check, facts) => console.log(JSON.stringify({ check, ...facts }));
const prompt = "an apple on a yellow background";

const one = await client.images.generate({ prompt, model: "gpt-image-1", seed: 7 });
say("generate", { data: one.data.map((item) => item.b64_json), seed: one.data[0].seed, usage: one.usage });

const three = await client.images.generate({ prompt, n: 3, size: "64x64" });
say("three", { data: three.data.map((item) => item.b64_json) });

const edited = await client.images.edit({ image: await image("a.png"), prompt: "make the background green" });
say("edit", { data: edited.data.map((item) => item.b64_json) });

const both = [await image("a.png"), await image("b.png")];
const composed = await client.images.edit({ image: both, prompt: "the apple from image 1 beside the apple from image 2" });
say("compose", { data: composed.data.map((item) => item.b64_json) });

const masked = await client.images.edit({ image: await image("a.png"), mask: await mask(), prompt: "make it green" });
say("mask", { data: masked.data.map((item) => item.b64_json) });

const events = [];
for await (const event of await client.images.generate({ prompt, stream: true, partial_images: 3 })) events.push(event);
say("stream", { types: events.map((event) => event.type), data: events.map((event) => event.b64_json) });

const edits = [];
const streamed = { image: await image("a.png"), prompt: "make it red", stream: true, partial_images: 1 };
for await (const event of await client.images.edit(streamed)) edits.push(event);
say("stream of an edit", { types: edits.map((event) => event.type), data: edits.map((event) => event.b64_json) });

const long = await client.images.generate({ prompt, size: "512x512", n: 10, steps: 200, stream: true, partial_images: 3 });
for await (const event of long) {
  say("hang up", { types: [event.type], data: [event.b64_json] });
  long.controller.abort();
  break;
}

for (const fields of [{ n: 0 }, { n: 11 }, { model: "sdxl" }, { output_format: "gif" }]) {
  try {
    await client.images.generate({ prompt, ...fields });
    say("error", { fields, name: "none" });
  } catch (error) {
    say("error", { fields, name: error.constructor.name, status: error.status, param: error.param });
  }
}
say("models", { names: (await client.models.list()).data.map((model) => model.id) });
