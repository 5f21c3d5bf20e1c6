// What the page shows, in one object, and who wants to hear when a part of it changes.

export const state = {
  bridge: null,
  view: "create",
  /** Whether this is a small card inside a chat: the image and its actions, without composer and tabs. */
  card: false,
  /** The image on the stage (see ImageDetails in contract.py), or null. */
  image: null,
  /** Handles of the sheet the image belongs to, in order. */
  sheet: [],
  /** look, compare, mask or changes. */
  tool: "look",
  /** References of the composer: {ref, src, words}. */
  references: [],
  /** The latest Now of the server. */
  now: { seq: 0, jobs: [], library: 0 },
  /** Calls of this page that have not returned: {name, prompt, job, agent, stopped, latest}. */
  calls: new Set(),
  /** Whether the agent's call returned before its image was there, and this page cannot wait for it. */
  pending: false,
  /** Whether the person looks at an image while a call of this page runs. */
  aside: false,
  engine: null,
  /** The model that was chosen, "" for the best installed. */
  model: "",
  /** Whether the server answers. */
  connected: true,
  error: "",
};

/** What is known of the model that would be used: its examples and how many references it takes. */
export const modelOf = () => state.engine?.models.find((each) => each.name === state.model) ?? state.engine;

const listeners = new Map();

/** Call `listener` each time one of the topics is told. */
export function on(topics, listener) {
  for (const topic of topics.split(" ")) {
    if (!listeners.has(topic)) listeners.set(topic, []);
    listeners.get(topic).push(listener);
  }
}

export function emit(topic) {
  for (const listener of listeners.get(topic) ?? []) listener();
}
