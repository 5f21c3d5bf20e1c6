// The host side of an MCP App: the reference AppBridge over a sandbox page on another origin. Bundled by esbuild.
// What the view asks of the server goes to `serverRequest`, which the test exposes: a real client of the real server.

import { AppBridge, PostMessageTransport } from "@modelcontextprotocol/ext-apps/app-bridge";

window.sizes = [];
window.downloads = [];

/** Show the page in a sandboxed frame. `policy`: spec or claude. `opaque`: without allow-same-origin. */
window.mount = async ({ sandbox, html, policy, opaque, capabilities, context, width }) => {
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", opaque ? "allow-scripts" : "allow-scripts allow-same-origin allow-forms");
  frame.style.cssText = `width:${width}px;height:150px;border:0`;
  document.body.append(frame);
  const loaded = new Promise((resolve) => (frame.onload = resolve));
  frame.src = `${sandbox}/sandbox.html?policy=${policy}`;
  await loaded;

  const bridge = new AppBridge(null, { name: "test host", version: "1" }, capabilities, { hostContext: context });
  window.bridge = bridge;
  const started = performance.now();
  bridge.onsizechange = ({ width, height }) => {
    window.sizes.push({ width, height, ms: performance.now() - started });
    if (height) frame.style.height = `${height}px`;
  };
  const ready = new Promise((resolve) => (bridge.oninitialized = resolve));
  if (capabilities.serverTools) {
    bridge.oncalltool = (params, { mcpReq }) => window.ask("tools/call", params, mcpReq?.signal);
  }
  if (capabilities.serverResources) bridge.onreadresource = (params) => window.ask("resources/read", params);
  bridge.ondownloadfile = async (params) => (window.downloads.push(params), {});
  bridge.onrequestdisplaymode = async ({ mode }) => {
    bridge.sendHostContextChange({ displayMode: mode });
    return { mode };
  };
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  frame.contentWindow.postMessage({ html }, "*");
  await ready;
};

let number = 0;
window.ask = async (method, params, signal) => {
  const id = ++number;
  signal?.addEventListener("abort", () => window.serverCancel(id));
  const answer = await window.serverRequest(id, method, params);
  if (answer.error) throw new Error(answer.error);
  return answer.result;
};
