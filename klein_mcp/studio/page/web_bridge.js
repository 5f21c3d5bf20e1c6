// The bridge of a browser tab: fetch and server-sent events to the server the page came from.

const ENDED = "This session has ended. Run klein-mcp studio again for a new link.";
export const GONE =
  "The studio's server does not answer. If it was ended, run klein-mcp studio again and open the new link; your prompt is still here.";

/** Milliseconds until a call that runs is asked after, if no news of its job says that it is over. */
const ASK_AFTER = 2000;
/** Questions in a row without an answer, after which the server counts as gone. */
const PATIENCE = 30;

/** Milliseconds from losing a request until a page that is left is gone. */
const LEAVING = 300;

/** No two are alike; it is no secret. */
const newName = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");

export class WebBridge {
  kind = "web";
  can = { read: true, call: true, download: true, fullscreen: false, cancel: true, remove: true };
  context = {};

  constructor({ now, lost, reached }) {
    this.listeners = { now, reached, lost: () => lost(new Error(ENDED)) };
    this.news = new EventTarget();
  }

  /** Learn the token of the session that the cookie belongs to. */
  async enter() {
    this.csrf = (await this.fetchJson("/studio/session")).csrf;
  }

  async start() {
    await this.enter();
    const events = new EventSource("/studio/events");
    events.addEventListener("now", (event) => this.receive(JSON.parse(event.data)));
    events.addEventListener("open", () => this.listeners.reached(true));
    events.addEventListener("error", () => this.checkSession(events));
  }

  receive(now) {
    this.jobs = now.jobs;
    this.listeners.now(now);
    this.news.dispatchEvent(new Event("now"));
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
    } catch {
      // A page that is being left loses its requests first, and must keep what it waited for.
      await new Promise((later) => setTimeout(later, LEAVING));
      this.listeners.reached(false);
      throw new Error(GONE);
    }
  }

  async post(path, body) {
    const file = body instanceof Blob;
    const type = file ? body.type || "application/octet-stream" : "application/json";
    const send = () => {
      const headers = { "X-CSRF-Token": this.csrf, "Content-Type": type };
      return this.fetchJson(path, { method: "POST", headers, body: file ? body : JSON.stringify(body) });
    };
    try {
      return await send();
    } catch (error) {
      if (error.message !== ENDED) throw error;
    }
    // Another tab may have come by a newer link: the cookie is of its session since, which has a token of its own.
    await this.enter();
    return send();
  }

  async read(uri) {
    return (await this.fetchJson(`/studio/read?uri=${encodeURIComponent(uri)}`)).contents;
  }

  async readJson(uri) {
    return JSON.parse((await this.read(uri))[0].text);
  }

  /** Call a tool. `call` gets the name by which the server knows it. */
  async call(tool, input, call = {}) {
    call.name ??= newName();
    const answer = await this.post("/studio/call", { tool, arguments: input, call: call.name });
    return answer.content ? answer : this.result(call);
  }

  /** Wait for the result of a call. It holds no connection meanwhile: a browser has six of them. */
  async result(call) {
    for (let failed = 0; ; ) {
      await this.over(call.name);
      try {
        const answer = await this.fetchJson(`/studio/result?call=${call.name}`);
        if (answer.content) return answer;
        failed = 0;
      } catch (error) {
        if (error.message !== GONE || ++failed > PATIENCE) throw error;
      }
    }
  }

  /** Resolve once no job of that call is among the news, or after a while. */
  over(name) {
    return new Promise((resolve) => {
      const settle = () => (clearTimeout(timer), this.news.removeEventListener("now", look), resolve());
      const look = () => this.jobs.some((job) => job.call === name) || settle();
      const timer = setTimeout(settle, ASK_AFTER);
      this.news.addEventListener("now", look);
    });
  }

  /** Stop a call, whether or not the server has told of its job. */
  stop(call) {
    return this.post("/studio/cancel", { call: call.name });
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
    link.href = await this.image(handle, "download");
    link.download = `${handle}.png`;
    link.click();
  }
}
