// How sparse an answer was: what the chunks say, and the panel that shows it.

import { element } from "./markdown.js";

// from asleep to awake: the night and what glows in it
const COLOURS = [[20, 11, 52], [74, 18, 107], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 245, 165]];
const SCALES = [0.1, 0.25, 0.5, 1];
const COLUMNS = [5, 10]; // pixels of a token: wide while there is room
const $ = (id) => document.getElementById(id);

/** The figures of one answer. `cells` are the shares of active neurons, 0 to 255, token by token. */
export class Figures {
  constructor(saved = {}) {
    Object.assign(this, { layers: 0, active: 0, read: 0, skipped: 0, rate: 0, lengths: [], ...saved });
    this.cells = Array.from(atob(saved.cells ?? ""), (character) => character.charCodeAt(0));
  }

  get tokens() {
    return this.lengths.length;
  }

  /** Of all neurons and tokens. */
  get asleep() {
    return 1 - this.active / this.tokens;
  }

  add(piece, said) {
    this.layers = said.layers.length;
    for (const share of said.layers) this.cells.push(Math.round(255 * share));
    this.lengths.push(piece.length);
    this.active += said.active;
    this.read += said.rows_read;
    this.skipped += said.rows_skipped;
    this.rate = said.tokens_per_second;
    this.experts = said.experts;
  }

  toJSON() {
    const cells = this.cells.map((cell) => String.fromCharCode(cell)).join("");
    return { ...this, active: Number(this.active.toFixed(4)), cells: btoa(cells) };
  }

  /** The figures in a few words. */
  get words() {
    return `${this.rate.toFixed(1)} tokens/s · ${percent(this.asleep)} asleep`;
  }
}

/** With a digit behind the point where it matters. */
export const percent = (share) => `${(100 * share).toFixed((share > 0 && share < 0.1) || (share > 0.99 && share < 1) ? 1 : 0)} %`;
const number = (value) => value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });

function colour(share) {
  const at = Math.min(share, 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[low].map((value, index) => value + (at - low) * (COLOURS[low + 1][index] - value));
}

/** Paints shares, each a pixel: `at(x, y)` gives them. The style sheet makes the pixels large. */
function paint(canvas, width, height, at) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) image.data.set([...colour(at(x, y)), 255], 4 * (y * width + x));
  context.putImageData(image, 0, 0);
}

export class Panel {
  constructor() {
    paint($("ramp"), 64, 1, (x) => x / 63);
    for (const kind of ["pointermove", "pointerdown"]) $("map").addEventListener(kind, (event) => this.#point(event));
    $("map").addEventListener("pointerleave", () => $("cell").replaceChildren());
  }

  /** Show the figures of an answer with this text; nothing where there are none. */
  show(figures, text) {
    this.figures = figures;
    this.text = text;
    const some = Boolean(figures?.tokens);
    $("figures").hidden = !some;
    $("pill").textContent = some ? `${percent(figures.asleep)} asleep` : "Sparsity";
    if (some) this.#draw();
  }

  #draw() {
    const { figures } = this;
    this.#drawMap();
    $("asleep").textContent = percent(figures.asleep);
    $("dense").hidden = figures.asleep > 0;
    $("last-layer").textContent = `${figures.layers}`;
    const rows = figures.read + figures.skipped;
    $("bar-read").style.width = `${(100 * figures.read) / rows}%`;
    $("read").textContent = `${number(figures.read)} (${percent(figures.read / rows)})`;
    $("skipped").textContent = `${number(figures.skipped)} (${percent(figures.skipped / rows)})`;
    const { experts, prompt, cached } = figures;
    const list = { "tokens/s": figures.rate.toFixed(1), tokens: figures.tokens };
    if (prompt) list["prompt tokens read"] = `${prompt - cached} of ${prompt}`;
    if (experts?.of > 1) list["experts used"] = `${experts.used} of ${experts.of}`;
    const lines = Object.entries(list).map(([name, value]) => element("div", element("dt", name), element("dd", value)));
    $("list").replaceChildren(...lines);
  }

  #drawMap() {
    const { layers, tokens, cells } = this.figures;
    const most = cells.reduce((a, b) => Math.max(a, b)) / 255;
    const scale = SCALES.find((value) => value >= most) ?? 1;
    const map = $("map"), strip = $("strip");
    const atEnd = strip.scrollLeft + strip.clientWidth > strip.scrollWidth - 4 * COLUMNS[0];
    const column = COLUMNS[Number(tokens * COLUMNS[1] <= strip.clientWidth)];
    paint(map, tokens, layers, (x, y) => cells[x * layers + y] / 255 / scale);
    map.style.width = `${tokens * column}px`;
    map.style.height = `${layers * Math.max(4, Math.min(30, Math.floor(240 / layers)))}px`;
    map.ariaLabel = `Active neurons of ${layers} layers over ${tokens} tokens`;
    $("scale").textContent = `${100 * scale} % awake`;
    if (atEnd) strip.scrollLeft = strip.scrollWidth;
  }

  #point(event) {
    const { layers, lengths, cells } = this.figures;
    const box = $("map").getBoundingClientRect();
    const token = Math.floor(((event.clientX - box.left) / box.width) * lengths.length);
    const layer = Math.floor(((event.clientY - box.top) / box.height) * layers);
    if (!(token in lengths) || layer < 0 || layer >= layers) return;
    const start = lengths.slice(0, token).reduce((sum, length) => sum + length, 0);
    const piece = this.text.slice(start, start + lengths[token]).replace(/\n/g, "↵");
    const share = percent(cells[token * layers + layer] / 255);
    $("cell").replaceChildren(`layer ${layer + 1} · token ${token + 1} `, element("q", piece), ` · ${share} awake`);
  }
}
