// An agent's loop over stdio in TypeScript: drafts, one change, a composition, the result saved.
//
//     npm install && npm start -- FOLDER [COMMAND ARG…]
//
// COMMAND starts klein-mcp; without one it is `klein-mcp` from your PATH.

import { mkdirSync } from "node:fs";
import { resolve } from "node:path";
import { Client } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

type Facts = {
  image: string;
  seed: string;
  model: string;
  job?: string;
  saved?: string;
  images?: { label: string; image: string; seed: string }[];
};

const [folder = "klein-example", command = "klein-mcp", ...args] = process.argv.slice(2);
const project = resolve(folder);
mkdirSync(project, { recursive: true });

const client = new Client({ name: "klein-example", version: "1.0.0" });
const environment = { ...process.env, KLEIN_WRITE_ROOTS: project } as Record<string, string>;
await client.connect(new StdioClientTransport({ command, args, env: environment, stderr: "inherit" }));

async function call(name: string, given: Record<string, unknown>): Promise<Facts> {
  const result = await client.callTool({ name, arguments: given });
  const first = result.content[0];
  const text = first?.type === "text" ? first.text : "";
  if (result.isError) throw new Error(`${name}: ${text}`);
  const facts = JSON.parse(text) as Facts;
  // A slow machine: the picture is still being painted.
  return facts.job ? call("wait_for_job", { job: facts.job }) : facts;
}

const { tools } = await client.listTools();
console.log(`${tools.length} tools: ${tools.map((tool) => tool.name).join(", ")}`);

const drafts = await call("generate_image", { prompt: "a house on a white background", count: 2, seed: 3 });
const draft = drafts.images?.[0];
if (!draft) throw new Error("a call with a count of 2 returns two images");
console.log(`drafts by ${drafts.model}: ${drafts.images?.map((one) => one.image).join(", ")}`);

const edited = await call("edit_image", { image: draft.image, prompt: "make the background blue", seed: 3 });
const star = await call("generate_image", { prompt: "a yellow star on a black background", seed: 3 });
const together = await call("compose_references", {
  images: [edited.image, star.image],
  prompt: "the house from image 1 to the left of the star from image 2 on a black background",
  seed: 3,
});
const { saved } = await call("save_image", { image: together.image, path: resolve(project, "together.png") });
console.log(`saved ${saved}`);

await client.close();
