// The bridge of a browser tab: fetch and server-sent events to the server the page came from.

const ENDED = "This session has ended. Run klein-mcp studio again for a new link.";
const GONE =
  "The studio's server does not answer. If it was ended, run klein-mcp studio again and open the new link; your prompt is still here.";

export class WebBridge {
  kind = "web";
  can = { read: true, call: true, download: true, fullscreen: false, cancel: true, remove: true };
  context = {};

  constructor({ now, lost, reached }) {
    this.listeners = { now, reached, lost: () => lost(new Error(ENDED)) };
  }

  async start() {
    const session = await this.fetchJson("/studio/session");
    this.csrf = session.csrf;
    const events = new EventSource("/studio/events");
    events.addEventListener("now", (event) => this.listeners.now(JSON.parse(event.data)));
    events.addEventListener("open", () => this.listeners.reached(true));
    events.addEventListener("error", () => this.checkSession(events));
  }

  /** An EventSource tries again by itself, except where the server refuses it. */
  async checkSession(events) {
    this.listeners.reached(false);
    if (events.readyState === EventSource.CLOSED) this.listeners.lost();
  }

  async fetchJson(path, options = {}) {
    const answer = await this.fetch(path, options);
    this.listeners.reached(answer.status !== 401);
    // The same words from here, since whoever asked shows what it catches, over what was shown before.
    if (answer.status === 401) throw new Error(ENDED);
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(body.error ?? `The server answered ${answer.status}.`);
    return body;
  }

  /** Fetch; a server that does not answer is told of in words, and by the mark in the header. */
  async fetch(path, options) {
    try {
      return await fetch(path, { credentials: "same-origin", ...options });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      this.listeners.reached(false);
      throw new Error(GONE);
    }
  }

  post(path, body, signal) {
    const headers = { "X-CSRF-Token": this.csrf };
    if (body instanceof Blob) headers["Content-Type"] = body.type || "application/octet-stream";
    else headers["Content-Type"] = "application/json";
    return this.fetchJson(path, { method: "POST", headers, body: body instanceof Blob ? body : JSON.stringify(body), signal });
  }

  async read(uri) {
    return (await this.fetchJson(`/studio/read?uri=${encodeURIComponent(uri)}`)).contents;
  }

  async readJson(uri) {
    return JSON.parse((await this.read(uri))[0].text);
  }

  call(tool, input, signal) {
    return this.post("/studio/call", { tool, arguments: input }, signal);
  }

  pick(picked) {
    return this.call("pick", picked);
  }

  cancel(job) {
    return this.post("/studio/cancel", { job });
  }

  remove(images) {
    return this.post("/studio/delete", { images });
  }

  async image(handle, part = "") {
    return `/studio/images/${encodeURIComponent(handle)}${part && "/" + part}`;
  }

  async upload(file) {
    return (await this.post("/studio/upload", file)).image;
  }

  async download(handle) {
    const link = document.createElement("a");
    link.href = `/studio/images/${encodeURIComponent(handle)}`;
    link.download = `${handle}.png`;
    link.click();
  }
}
