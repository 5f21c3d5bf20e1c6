// Zoom and pan of the stage: wheel, pinch, drag, double click, keys.

const MOST = 16;

/** Fits one frame of a given shape into a stage, and lets it be enlarged and moved. */
export class Zoom {
  scale = 1;
  x = 0;
  y = 0;
  pointers = new Map();
  enabled = true;

  constructor(stage, { wheel, changed }) {
    this.stage = stage;
    this.changed = changed;
    stage.addEventListener("wheel", (event) => this.wheel(event, wheel), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.move(event));
    for (const type of ["pointerup", "pointercancel"]) {
      stage.addEventListener(type, (event) => this.pointers.delete(event.pointerId));
    }
    stage.addEventListener("dblclick", () => this.enabled && (this.scale === 1 ? this.by(2) : this.fit()));
    stage.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.layout()).observe(stage);
  }

  /** Show `frame`, of width × height image pixels, as large as the stage allows. */
  show(frame, width, height) {
    const same = this.frame && this.width === width && this.height === height;
    [this.frame, this.width, this.height] = [frame, width, height];
    if (!same) [this.scale, this.x, this.y] = [1, 0, 0];
    this.layout();
  }

  layout() {
    if (!this.frame) return;
    const { clientWidth, clientHeight } = this.stage;
    const fit = Math.min(clientWidth / this.width, clientHeight / this.height);
    if (!fit) return;
    this.base = fit;
    this.frame.style.width = `${this.width * fit}px`;
    this.frame.style.height = `${this.height * fit}px`;
    this.apply();
  }

  apply() {
    const spareX = Math.max(0, (this.width * this.base * this.scale - this.stage.clientWidth) / 2);
    const spareY = Math.max(0, (this.height * this.base * this.scale - this.stage.clientHeight) / 2);
    this.x = Math.min(spareX, Math.max(-spareX, this.x));
    this.y = Math.min(spareY, Math.max(-spareY, this.y));
    this.frame.style.transform = this.scale === 1 ? "" : `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.stage.classList.toggle("zoomed", this.scale > 1);
    this.changed(Math.round(100 * this.base * this.scale));
  }

  fit() {
    [this.scale, this.x, this.y] = [1, 0, 0];
    this.apply();
  }

  /** Enlarge by a factor, about a point in stage coordinates from its centre. */
  by(factor, x = 0, y = 0) {
    const scale = Math.min(MOST, Math.max(1, this.scale * factor));
    const ratio = scale / this.scale;
    this.x = x - (x - this.x) * ratio;
    this.y = y - (y - this.y) * ratio;
    this.scale = scale;
    this.apply();
  }

  fromCentre({ clientX, clientY }) {
    const { left, top, width, height } = this.stage.getBoundingClientRect();
    return [clientX - left - width / 2, clientY - top - height / 2];
  }

  wheel(event, always) {
    if (!this.frame || !(always || event.ctrlKey)) return;
    event.preventDefault();
    this.by(Math.exp(-event.deltaY / 300), ...this.fromCentre(event));
  }

  down(event) {
    if (!this.frame || event.target.closest("input, button")) return;
    this.pointers.set(event.pointerId, event);
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    // A mouse's button was let go outside of the stage, which is not told of it.
    if (event.pointerType === "mouse" && !event.buttons) return this.pointers.delete(event.pointerId);
    const others = [...this.pointers.values()].filter((each) => each.pointerId !== event.pointerId);
    this.pointers.set(event.pointerId, event);
    if (others.length === 1) {
      const distance = (from) => Math.hypot(from.clientX - others[0].clientX, from.clientY - others[0].clientY);
      this.by(distance(event) / Math.max(1, distance(before)), ...this.fromCentre(event));
    } else if (this.enabled && this.scale > 1) {
      this.x += event.clientX - before.clientX;
      this.y += event.clientY - before.clientY;
      this.apply();
    }
  }

  key(event) {
    if (!this.frame || event.target !== this.stage) return;
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (event.key === "+" || event.key === "=") this.by(1.5);
    else if (event.key === "-") this.by(1 / 1.5);
    else if (event.key === "0") this.fit();
    else if (moves[event.key] && this.scale > 1) {
      this.x += moves[event.key][0];
      this.y += moves[event.key][1];
      this.apply();
    } else return;
    event.preventDefault();
  }
}
