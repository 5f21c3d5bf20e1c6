// Generate, edit and compose through the TypeScript client: one line of JSON per picture. Argument: the Python to use.
import { Client } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

const client = new Client({ name: "typescript-client", version: "1" });
await client.connect(
  new StdioClientTransport({ command: process.argv[2], args: ["-m", "klein_mcp"], env: process.env }),
);

async function paint(name, args) {
  const result = await client.callTool({ name, arguments: args });
  if (result.isError) throw new Error(result.content[0].text);
  const facts = JSON.parse(result.content[0].text);
  console.log(JSON.stringify({ payload: facts, preview: result.content.find((block) => block.type === "image").data }));
  return facts.image;
}

const first = await paint("generate_image", { prompt: "an apple on a yellow background", seed: 7 });
const second = await paint("edit_image", { image: first, prompt: "make the background green", seed: 8 });
await paint("compose_references", { images: [first, second], prompt: "image 1 with the background from image 2" });
await client.close();
