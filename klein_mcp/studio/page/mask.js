// Drawing a mask by mouse, touch or keyboard. White where the image may change.

import { button, h, segments } from "./dom.js";

const LEAST = 4;

/** A mask over one image: strokes in the image's own pixels, so that undo can draw them again. */
export class Mask {
  strokes = [];
  mode = "brush";
  cursor = null;

  constructor(width, height, changed) {
    this.size = Math.max(LEAST * 2, Math.round(Math.min(width, height) / 8));
    this.changed = changed;
    this.canvas = h("canvas", {
      width,
      height,
      class: "mask",
      tabindex: "0",
      role: "application",
      "aria-label": "Mask: draw where the image may change. Arrow keys move the brush, space draws, B brush, E eraser, square brackets change its size.",
    });
    this.paint = h("canvas", { width, height });
    this.ring = h("div", { class: "ring", hidden: true });
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave"]) {
      this.canvas.addEventListener(type, (event) => this[type](event));
    }
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.moveCursor(0, 0));
    this.canvas.addEventListener("blur", () => (this.ring.hidden = true));
  }

  get empty() {
    return this.strokes.every((stroke) => stroke.mode === "erase");
  }

  /** The box as [x, y, width, height] where the mask is exactly one box. */
  get region() {
    const [only, more] = this.strokes;
    if (more || only?.mode !== "box") return null;
    const { x, y, width, height } = boxOf(only, this.canvas);
    return width >= LEAST && height >= LEAST ? [x, y, width, height] : null;
  }

  /** Return the mask as a PNG data address, white on black; null if nothing is white. */
  png() {
    const { width, height } = this.canvas;
    const pixels = this.paint.getContext("2d").getImageData(0, 0, width, height);
    let white = false;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const drawn = pixels.data[i + 3] > 127;
      white ||= drawn;
      pixels.data.fill(drawn ? 255 : 0, i, i + 3);
      pixels.data[i + 3] = 255;
    }
    if (!white) return null;
    const copy = h("canvas", { width, height });
    copy.getContext("2d").putImageData(pixels, 0, 0);
    return copy.toDataURL("image/png");
  }

  // -- pointer --------------------------------------------------------------------------------------------------

  at(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - left) * this.canvas.width) / width,
      y: ((event.clientY - top) * this.canvas.height) / height,
    };
  }

  pointerdown(event) {
    if (!event.isPrimary) return this.drop();
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.begin(this.at(event));
  }

  pointermove(event) {
    if (!event.isPrimary) return;
    this.cursor = this.at(event);
    this.showRing();
    if (!this.drawing) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) this.drawing.points.push(this.at(each));
    this.drawing.points.push(this.cursor);
    this.draw();
  }

  pointerup() {
    this.drawing = null;
    this.changed();
  }

  /** Take back the stroke that was begun: a second finger enlarges the image. */
  drop() {
    if (!this.drawing) return;
    this.drawing = null;
    this.undo();
  }

  pointercancel() {
    this.pointerup();
  }

  pointerleave() {
    if (document.activeElement !== this.canvas) this.ring.hidden = true;
  }

  // -- keyboard -------------------------------------------------------------------------------------------------

  key(event) {
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(this.size / 2));
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) this.moveCursor(...moves[event.key]);
    else if (event.key === " ") this.stamp();
    else if (event.key === "[") this.resize(this.size / 1.25);
    else if (event.key === "]") this.resize(this.size * 1.25);
    else if (event.key === "b" || event.key === "e") this.setMode(event.key === "b" ? "brush" : "erase");
    else if (event.key === "z" || event.key === "Backspace") this.undo();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  moveCursor(dx, dy) {
    const { width, height } = this.canvas;
    const from = this.cursor ?? { x: width / 2, y: height / 2 };
    this.cursor = { x: Math.min(width, Math.max(0, from.x + dx)), y: Math.min(height, Math.max(0, from.y + dy)) };
    this.showRing();
  }

  stamp() {
    const half = this.size / 2;
    if (this.mode === "box") {
      const { x, y } = this.cursor;
      this.begin({ x: x - half, y: y - half });
      this.drawing.points.push({ x: x + half, y: y + half });
      this.draw();
    } else this.begin(this.cursor);
    this.pointerup();
  }

  showRing() {
    const { width, height } = this.canvas;
    const { x, y } = this.cursor;
    const style = this.ring.style;
    this.ring.hidden = false;
    this.ring.classList.toggle("square", this.mode === "box");
    style.left = `${(100 * (x - this.size / 2)) / width}%`;
    style.top = `${(100 * (y - this.size / 2)) / height}%`;
    style.width = `${(100 * this.size) / width}%`;
    style.height = `${(100 * this.size) / height}%`;
  }

  // -- strokes --------------------------------------------------------------------------------------------------

  begin(point) {
    this.drawing = { mode: this.mode, size: this.size, points: [point] };
    this.strokes.push(this.drawing);
    this.draw();
  }

  undo() {
    this.strokes.pop();
    this.draw();
    this.changed();
  }

  clear() {
    this.strokes = [];
    this.draw();
    this.changed();
  }

  resize(size) {
    this.size = Math.round(Math.min(this.canvas.width / 2, Math.max(LEAST, size)));
    if (this.slider) this.slider.value = this.size;
    if (this.cursor) this.showRing();
  }

  setMode(mode) {
    this.mode = mode;
    const radio = this.tools?.querySelector(`input[value=${mode}]`);
    if (radio) radio.checked = true;
    if (this.cursor && !this.ring.hidden) this.showRing();
  }

  draw() {
    this.drawStrokes();
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    if (this.empty) return;
    // What may not change is dimmed; what may is tinted.
    context.fillStyle = "#000a";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.paint, 0, 0);
    context.globalCompositeOperation = "source-over";
    context.globalAlpha = 0.3;
    context.drawImage(this.paint, 0, 0);
    context.globalAlpha = 1;
  }

  drawStrokes() {
    const context = this.paint.getContext("2d", { willReadFrequently: true });
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, this.paint.width, this.paint.height);
    context.lineCap = context.lineJoin = "round";
    context.fillStyle = context.strokeStyle = "#ff4fa3";
    for (const stroke of this.strokes) {
      context.globalCompositeOperation = stroke.mode === "erase" ? "destination-out" : "source-over";
      if (stroke.mode === "box") {
        const { x, y, width, height } = boxOf(stroke, this.canvas);
        context.fillRect(x, y, width, height);
        continue;
      }
      context.lineWidth = stroke.size;
      context.beginPath();
      const [first, ...rest] = stroke.points;
      context.moveTo(first.x, first.y);
      for (const point of rest.length ? rest : [first]) context.lineTo(point.x, point.y);
      context.stroke();
    }
  }

  // -- controls -------------------------------------------------------------------------------------------------

  controls(done) {
    this.slider = h("input", {
      type: "range",
      min: LEAST,
      max: Math.round(this.canvas.width / 2),
      value: this.size,
      "aria-label": "Brush size",
      oninput: (event) => this.resize(Number(event.target.value)),
    });
    const modes = [
      ["brush", "Brush"],
      ["erase", "Eraser"],
      ["box", "Box"],
    ];
    this.tools = h(
      "div",
      { class: "bar", role: "group", "aria-label": "Mask tools" },
      segments("mask-mode", "Draw with", modes, this.mode, (mode) => this.setMode(mode)),
      h("label", { class: "size" }, h("span", {}, "Size"), this.slider),
      button("Undo", "undo", () => this.undo()),
      button("Clear", "close", () => this.clear()),
      done,
      h("p", { class: "soft hint" }, "Only inside changes. Its edge fades over a third of the way to its middle, at most 16 pixels."),
    );
    return this.tools;
  }
}

/** The part of a box that lies on the canvas: a drag may begin or end beside it. */
function boxOf({ points }, canvas) {
  const span = (one, other, most) => [Math.min(one, other), Math.max(one, other)].map((at) => Math.round(Math.min(most, Math.max(0, at))));
  const [from, to] = [points[0], points.at(-1)];
  const [left, right] = span(from.x, to.x, canvas.width);
  const [top, bottom] = span(from.y, to.y, canvas.height);
  return { x: left, y: top, width: right - left, height: bottom - top };
}
