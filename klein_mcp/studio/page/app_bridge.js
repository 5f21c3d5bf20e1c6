// The bridge inside an MCP App: JSON-RPC with the host by postMessage, after the ext-apps specification of 2026-01-26.

const PROTOCOL = "2026-01-26";
/** Milliseconds. Hosts start a frame at 150 px; one that never answers ui/initialize still learns the size. */
const SIZE_AFTER = 400;
/** Bytes of base64: below the 1,000,000 that one message may have. */
const MOST = 900_000;

export class AppBridge {
  kind = "app";
  /** What the host lets a view do; filled by its answer to ui/initialize. */
  can = { read: false, call: false, download: false, fullscreen: false, cancel: false, remove: false };
  context = {};

  constructor(listeners) {
    this.listeners = listeners;
    this.waiting = new Map();
    this.number = 0;
    this.images = new Map();
    this.polling = false;
    window.addEventListener("message", (event) => event.source === window.parent && this.receive(event.data));
  }

  async start() {
    setTimeout(() => this.watchSize(), SIZE_AFTER);
    const answer = await this.request("ui/initialize", {
      appInfo: { name: "klein studio", version: "1" },
      appCapabilities: { availableDisplayModes: ["inline", "fullscreen"] },
      protocolVersion: PROTOCOL,
    });
    const able = answer.hostCapabilities ?? {};
    this.can.read = Boolean(able.serverResources);
    this.can.call = Boolean(able.serverTools);
    this.can.download = Boolean(able.downloadFile) && this.can.read; // the file is read before it is handed over
    this.setContext(answer.hostContext ?? {});
    this.notify("ui/notifications/initialized", {});
    this.watchSize();
  }

  setContext(changed) {
    Object.assign(this.context, changed);
    const { theme, styles, safeAreaInsets, displayMode, availableDisplayModes } = this.context;
    const root = document.documentElement;
    if (theme) root.style.colorScheme = theme;
    for (const [name, value] of Object.entries(styles?.variables ?? {})) {
      if (name.startsWith("--") && value) root.style.setProperty(name, value);
    }
    for (const side of ["top", "right", "bottom", "left"]) {
      if (safeAreaInsets?.[side]) document.body.style.setProperty(`padding-${side}`, `${safeAreaInsets[side]}px`);
    }
    this.can.fullscreen = Boolean(availableDisplayModes?.includes("fullscreen")) && displayMode !== "fullscreen";
    this.listeners.context(this.context);
  }

  // -- what the page asks ---------------------------------------------------------------------------------------

  async read(uri) {
    if (!this.can.read) throw new Error("This client does not let the studio read images.");
    return (await this.request("resources/read", { uri })).contents;
  }

  async readJson(uri) {
    return JSON.parse((await this.read(uri))[0].text);
  }

  async call(tool, input, call) {
    if (!this.can.call) throw new Error("This client does not let the studio call tools. Ask the agent instead.");
    // Later: the caller has yet to note this call, and without one the news would end at once.
    queueMicrotask(() => this.poll());
    // The mark tells the server that a person asked, so that what is meant for the agent waits for the agent. A job of
    // the agent's goes on when its card is gone.
    const _meta = { "klein-mcp/view": call?.agent ? "agent" : true };
    return await this.request("tools/call", { name: tool, arguments: input, _meta }, call);
  }

  pick(picked) {
    return this.call("pick", picked);
  }

  /** Return an address for `<img>`: views may load data: addresses only. */
  image(handle, part = "") {
    const uri = `klein://images/${handle}${part && "/" + part}`;
    if (!this.images.has(uri)) {
      const loading = this.loadImage(handle, uri);
      loading.catch(() => this.images.delete(uri));
      this.images.set(uri, loading);
      if (this.images.size > 80) this.images.delete(this.images.keys().next().value);
    }
    return this.images.get(uri);
  }

  async loadImage(handle, uri) {
    if (this.can.read) {
      const [content] = await this.read(uri);
      return `data:${content.mimeType};base64,${content.blob}`;
    }
    const { content = [] } = await this.call("view_image", { image: handle });
    const image = content.find((block) => block.type === "image");
    if (!image) throw new Error("No image came back.");
    return `data:${image.mimeType};base64,${image.data}`;
  }

  async upload(file) {
    const source = await createImageBitmap(file);
    for (let longest = 2048; ; longest = Math.round(longest * 0.75)) {
      const scale = Math.min(1, longest / Math.max(source.width, source.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(source.width * scale);
      canvas.height = Math.round(source.height * scale);
      canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
      const data = canvas.toDataURL("image/png");
      if (data.length < MOST) return data;
    }
  }

  /** Let the client save an image. Return what the server says of one that it had to make smaller. */
  async download(handle) {
    const [content, remark] = await this.read(`klein://images/${handle}`);
    const ending = content.mimeType === "image/jpeg" ? "jpg" : "png";
    const resource = { uri: `file:///${handle}.${ending}`, mimeType: content.mimeType, blob: content.blob };
    const answer = await this.request("ui/download-file", { contents: [{ type: "resource", resource }] });
    if (answer.isError) throw new Error("The client did not save the file.");
    return remark && JSON.parse(remark.text).note;
  }

  async fullscreen() {
    const { mode } = await this.request("ui/request-display-mode", { mode: "fullscreen" });
    this.setContext({ displayMode: mode });
  }

  /** Ask for news while a job may run. A read waits up to a second by itself, so this does not spin. */
  async poll() {
    if (this.polling || !this.can.read) return;
    this.polling = true;
    let seq = 0;
    let jobs = [];
    try {
      while (jobs.length || this.listeners.busy()) {
        const now = await this.readJson(`klein://now?after=${seq}`);
        ({ seq, jobs } = now);
        this.listeners.now(now);
      }
    } catch {
      // Hosts may refuse resources they were not told of; the result comes all the same.
    } finally {
      this.polling = false;
    }
  }

  // -- messages -------------------------------------------------------------------------------------------------

  send(message) {
    window.parent.postMessage({ jsonrpc: "2.0", ...message }, "*");
  }

  notify(method, params) {
    this.send({ method, params });
  }

  async stop(call) {
    this.notify("notifications/cancelled", { requestId: call.id, reason: "The user cancelled." });
    this.settle({ id: call.id, error: { message: "Cancelled." } });
  }

  request(method, params, call = {}) {
    const id = (call.id = ++this.number);
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.send({ id, method, params });
    });
  }

  settle({ id, result, error }) {
    const asked = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) asked?.reject(new Error(error.message ?? "The client refused."));
    else asked?.resolve(result);
  }

  receive(message) {
    if (!message || message.jsonrpc !== "2.0") return;
    if (!message.method) return this.settle(message);
    const params = message.params ?? {};
    switch (message.method) {
      case "ui/notifications/tool-input":
        this.listeners.input(params.arguments ?? {});
        return this.poll();
      case "ui/notifications/tool-result":
        return this.listeners.result(params);
      case "ui/notifications/tool-cancelled":
        return this.listeners.cancelled(params.reason ?? "");
      case "ui/notifications/host-context-changed":
        return this.setContext(params);
      case "ui/resource-teardown":
      case "ping":
        return this.send({ id: message.id, result: {} });
      default:
        if (message.id !== undefined) this.send({ id: message.id, error: { code: -32601, message: "Method not found" } });
    }
  }

  watchSize() {
    if (this.sizing) return;
    this.sizing = new ResizeObserver(() => {
      const { width, height } = document.body.getBoundingClientRect();
      this.notify("ui/notifications/size-changed", { width: Math.ceil(width), height: Math.ceil(height) });
    });
    this.sizing.observe(document.body);
  }
}
