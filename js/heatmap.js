// The result of Probe Model Weights: a heatmap of all layers and a table by layer type.
//
// Input: the node's `calibquant_probe` output, made by nodes/probe.py: document(). Everything is HTML and not a canvas,
// so that text stays sharp at every zoom and row labels stay put while a wide map scrolls. A DOM widget, because both
// renderers draw one: the canvas and Vue nodes.
import { app } from "../../scripts/app.js";
import { onWords } from "./results.js";

const NODE = "CalibQuantProbe";
const WIDGET = "calibquant_heatmap";
const PROPERTY = "calibquant_metric"; // of the node: the workflow file remembers the choice
const MARGIN = 6; // pixels kept free around the box by the canvas renderer
const CELL = { min: 10, max: 34, height: 15 }; // pixels
const LABELS = 16; // at most so many block numbers above the map
const NODE_WIDTH = { least: 520, most: 1000, beside: 240 }; // pixels; beside: row labels and paddings
const OUTSIDE = "outside the blocks";
const LOG_FROM = 8; // the colour scale is logarithmic when the largest value is so many times the smallest
const DECISIONS = ["NVFP4", "FP8", "KEEP"];

// viridis (CC0): equal steps look equal, its brightness only rises, and colour-blind readers see the order too.
const COLOURS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

const STATISTICS = [
  ["kurtosis", "Excess kurtosis", "0 for a Gaussian; large where a few weights stand out"],
  ["dynamic_range", "Dynamic range", "largest minus smallest |w|"],
  ["outlier_share", "Outlier share", "weights further than 3 standard deviations from the mean", percent],
  ["row_spread", "Spread of rows", "standard deviation of log2(largest |w|) over the rows, in bits"],
  ["block16_spread", "Spread of blocks of 16", "the same over blocks of 16 weights, as NVFP4 scales them"],
  ["block32_spread", "Spread of blocks of 32", "the same over blocks of 32 weights, as MXFP8 scales them"],
  ["std", "Standard deviation", "of the weights"],
];

const STYLE = `
.calibquant-heatmap { box-sizing: border-box; width: 100%; height: 100%; overflow: auto; padding: 8px; border-radius: 4px;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); font: 11px/15px sans-serif; text-align: left; }
.calibquant-heatmap select { font: inherit; color: inherit; background: var(--comfy-menu-bg, #333); padding: 2px 4px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; }
.calibquant-heatmap .cq-head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; }
.calibquant-heatmap .cq-legend { display: flex; flex-wrap: wrap; align-items: center; gap: 0 6px; }
.calibquant-heatmap .cq-bar { width: 120px; height: 11px; border-radius: 2px; }
.calibquant-heatmap .cq-swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; }
.calibquant-heatmap .cq-note { margin: 5px 0; color: var(--descrip-text, #999); }
.calibquant-heatmap .cq-scroll { overflow: auto; max-height: 640px; }
.calibquant-heatmap .cq-map { display: grid; gap: 1px; width: 100%; min-width: min-content; }
.calibquant-heatmap .cq-label { position: sticky; left: 0; z-index: 1; padding-right: 8px; white-space: nowrap;
  background: var(--comfy-input-bg, #222); box-shadow: 0 1px var(--comfy-input-bg, #222); }
.calibquant-heatmap .cq-number { color: var(--descrip-text, #999); text-align: center; width: 0; justify-self: center;
  display: flex; justify-content: center; }
.calibquant-heatmap .cq-cell { display: flex; height: ${CELL.height}px; border-radius: 1px; overflow: hidden; }
.calibquant-heatmap .cq-layer { flex: 1; }
.calibquant-heatmap .cq-layer:hover { outline: 2px solid var(--input-text, #ddd); outline-offset: -2px; }
.calibquant-heatmap .cq-kept { background: repeating-linear-gradient(135deg, #8a8a8a 0 2px, #a8a8a8 2px 4px); }
.calibquant-heatmap .cq-outside { display: flex; gap: 1px; grid-column: 2 / -1; }
.calibquant-heatmap .cq-outside .cq-layer { flex: none; width: 15px; height: ${CELL.height}px; border-radius: 1px; }
.calibquant-heatmap .cq-table { overflow: auto; max-height: 240px; margin-top: 8px; }
.calibquant-heatmap table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.calibquant-heatmap th { position: sticky; top: 0; cursor: pointer; font-weight: 600; background: var(--comfy-menu-bg, #333); }
.calibquant-heatmap th, .calibquant-heatmap td { padding: 1px 7px; text-align: right; }
.calibquant-heatmap td { white-space: nowrap; }
.calibquant-heatmap th:first-child, .calibquant-heatmap td:first-child { text-align: left; }
.calibquant-heatmap tbody tr:hover { background: var(--comfy-menu-bg, #333); }
.calibquant-tooltip { position: fixed; z-index: 10000; pointer-events: none; max-width: 420px; padding: 7px 9px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; color: var(--input-text, #ddd);
  background: var(--comfy-menu-bg, #333); font: 12px/16px sans-serif; box-shadow: 0 2px 8px #0008; }
.calibquant-tooltip table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 4px; }
.calibquant-tooltip td { padding: 0 14px 0 0; }
`;

// --- numbers

function short(value) {
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? size.toExponential(1) : size >= 1000 ? size.toFixed(0) : size.toPrecision(3);
  return value < 0 ? `−${text}` : text;
}

function percent(value) {
  return `${short(100 * value)} %`;
}

function tenThousandths(value) {
  return short(1e4 * value);
}

function error(value) {
  return `${tenThousandths(value)} × 10⁻⁴`;
}

function mean(values) {
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN;
}

// --- the document of nodes/probe.py, as objects

function read(raw) {
  const layers = raw.layers.map((row) => Object.fromEntries(raw.fields.map((name, i) => [name, row[i]])));
  return { ...raw, layers, metrics: metrics(raw), flat: raw.formats.map((_, i) => isFlat(errorsOf(layers, i), raw.noise[i])) };
}

function errorsOf(layers, i) {
  return layers.filter((layer) => !layer.protected).map((layer) => layer.errors[i][0]);
}

/** Whether as many alike layers would differ as much, by the chance of which weights were sampled. */
function isFlat(values, noise) {
  const widest = 2 * Math.sqrt(2 * Math.log(Math.max(values.length, 2))) * noise; // of so many normal deviates
  return Math.max(...values) <= Math.min(...values) * (1 + widest);
}

/** What the map can show: {key, title, note, of(layer), show(value), correlation}. */
function metrics(raw) {
  const found = [];
  const nvfp4 = raw.formats.indexOf("nvfp4");
  const measured = (i, how, title) => ({
    key: `error.${raw.formats[i]}.${how}`,
    title,
    note: "‖W − Ŵ‖² / ‖W‖² of the weights, measured",
    of: (layer) => layer.errors[i][how],
    noise: raw.noise[i],
    show: error,
  });
  raw.formats.forEach((_, i) => found.push(measured(i, 0, `Error in ${raw.titles[i]}`)));
  if (nvfp4 >= 0) found.splice(nvfp4 + 1, 0, measured(nvfp4, 1, "Error in NVFP4, searched scales"));
  for (const [key, title, note, show = short] of STATISTICS) {
    found.push({ key, title, note, show, of: (layer) => layer[key], correlation: raw.correlations[key] });
  }
  found.push({ key: "score", title: "Score", note: "quant_probe's: kurtosis, range and aspect ratio", show: short, of: (l) => l.score });
  found.push({ key: "decision", title: "Decision by score", note: "KEEP: stays 16-bit", of: (l) => DECISIONS.indexOf(l.decision) });
  return found;
}

function note(data, metric, range) {
  const parts = [metric.note];
  if (range.flat) parts.push("flat: these layers differ by no more than the chance of which weights were sampled");
  if (metric.correlation) {
    const told = metric.correlation.map((r, i) => `${data.titles[i]} ${data.flat[i] ? "flat" : r === null ? "–" : short(r)}`);
    parts.push(`rank correlation with the measured error here: ${told.join(" · ")}`);
  }
  parts.push(`least and largest are of the ${range.count} layers that are not hatched`);
  return parts.join(" – ");
}

// --- colour

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  const mix = COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (at - low)));
  return `rgb(${mix.join(",")})`;
}

/** From a value to its place on the colour scale, 0 to 1, and back. noise: relative standard error of the values. */
function scale(values, noise = 0) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const kind = low > 0 && high / low >= LOG_FROM ? LOG : low <= 0 && high - low >= LOG_FROM ? SIGNED_LOG : LINEAR;
  const [from, to] = [kind.to(low), kind.to(high)];
  const flat = noise > 0 && isFlat(values, noise);
  return {
    low, high, name: kind.name, count: values.length, flat,
    place: (value) => (to > from && !flat ? (kind.to(value) - from) / (to - from) : 0.5),
    value: (place) => kind.from(from + place * (to - from)),
  };
}

const LINEAR = { name: "", to: (x) => x, from: (x) => x };
const LOG = { name: "log scale", to: Math.log, from: Math.exp };
const SIGNED_LOG = { name: "log scale", to: Math.asinh, from: Math.sinh }; // kurtosis: below 0, and far above

// --- elements

function make(tag, className = "", text = "", children = []) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

function addStyle() {
  if (document.getElementById("calibquant-heatmap-style")) return;
  const style = make("style", "", STYLE);
  style.id = "calibquant-heatmap-style";
  document.head.append(style);
}

/** Drawn hatched: a format is never chosen for it, or it has no value here. */
function isKept(layer, metric) {
  return Boolean(layer.protected) || ((metric.key === "score" || metric.key === "decision") && !layer.decision);
}

function legend(metric, range) {
  const kept = [swatch("cq-kept"), "protected"];
  if (metric.key === "decision") {
    const parts = DECISIONS.flatMap((name, i) => [swatch("", decisionColour(i)), name]);
    return make("div", "cq-legend", "", [...parts, ...kept]);
  }
  const bar = make("span", "cq-bar");
  bar.style.background = `linear-gradient(90deg, ${COLOURS.map((_, i) => colour(i / (COLOURS.length - 1))).join(",")})`;
  if (range.flat) bar.style.background = colour(0.5);
  const middle = range.flat ? ["(flat)"] : range.name ? [`(middle ${metric.show(range.value(0.5))}, ${range.name})`] : [];
  const numbers = [make("span", "cq-least", metric.show(range.low)), bar, make("span", "cq-most", metric.show(range.high))];
  return make("div", "cq-legend", "", [...numbers, ...middle, ...kept]);
}

function swatch(className, background = "") {
  const element = make("span", `cq-swatch ${className}`);
  if (background) element.style.background = background;
  return element;
}

function decisionColour(index) {
  return colour([0.35, 0.65, 1][index]);
}

/** One coloured box; the layer hangs on it for the tooltip. */
function box(layer, metric, range) {
  const element = make("div", isKept(layer, metric) ? "cq-layer cq-kept" : "cq-layer");
  const value = metric.of(layer);
  if (!isKept(layer, metric)) {
    element.style.background = metric.key === "decision" ? decisionColour(value) : colour(range.place(value));
  }
  element.layer = layer;
  return element;
}

function drawMap(data, metric, range) {
  const inside = data.layers.filter((layer) => layer.block !== null);
  const outside = data.layers.filter((layer) => layer.block === null);
  const blocks = [...new Set(inside.map((layer) => layer.block))].sort((a, b) => a - b);
  const map = make("div", "cq-map");
  map.style.gridTemplateColumns = `max-content repeat(${blocks.length}, minmax(${CELL.min}px, ${CELL.max}px))`;
  map.append(make("div", "cq-label", "block"), ...numbers(blocks));
  const byType = group(inside, (layer) => layer.type);
  for (const type of data.types) {
    const byBlock = group(byType.get(type), (layer) => layer.block);
    const cells = blocks.map((block) => {
      const here = byBlock.get(block) ?? [];
      return make("div", "cq-cell", "", here.map((layer) => box(layer, metric, range)));
    });
    map.append(make("div", "cq-label", type), ...cells);
  }
  if (outside.length) {
    map.append(make("div", "cq-label", OUTSIDE));
    map.append(make("div", "cq-outside", "", outside.map((layer) => box(layer, metric, range))));
  }
  return map;
}

function numbers(blocks) {
  const step = [1, 2, 5, 10, 20, 50].find((n) => blocks.length / n <= LABELS) ?? 100;
  return blocks.map((block, i) => make("div", "cq-number", i % step ? "" : String(block)));
}

/** Map of key -> layers, in the order of the file. */
function group(layers, key) {
  const groups = new Map();
  for (const layer of layers) groups.set(key(layer), [...(groups.get(key(layer)) ?? []), layer]);
  return groups;
}

// --- the table by layer type

function tableRows(data) {
  return [...group(data.layers, (layer) => layer.type)].map(([type, layers]) => [
    type,
    layers.length,
    mean(layers.map((layer) => layer.kurtosis)),
    ...data.formats.map((_, i) => mean(layers.map((layer) => layer.errors[i][0]))),
  ]);
}

function drawTable(data, state) {
  const rows = tableRows(data);
  const titles = ["error × 10⁻⁴ by layer type", "n", "kurtosis", ...data.titles];
  const show = [String, String, short, ...data.titles.map(() => tenThousandths)];
  const body = make("tbody");
  const heads = titles.map((title, i) => {
    const head = make("th", "", title);
    head.title = i < 3 ? "Click to sort" : "Mean error × 10⁻⁴ (nearest rounding). Click to sort";
    head.onclick = () => {
      state.descending = state.column === i ? !state.descending : i > 0;
      state.column = i;
      fill();
    };
    return head;
  });
  function fill() {
    const sign = state.descending ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    rows.sort((a, b) => sign * compare(a[state.column], b[state.column]));
    heads.forEach((head, i) => {
      head.textContent = titles[i] + (i === state.column ? (state.descending ? " ▼" : " ▲") : "");
    });
    body.replaceChildren(...rows.map((row) => make("tr", "", "", row.map((value, i) => make("td", "", show[i](value))))));
  }
  fill();
  const table = make("table", "", "", [make("thead", "", "", [make("tr", "", "", heads)]), body]);
  return make("div", "cq-table", "", [table]);
}

// --- the tooltip, one for all nodes

const tooltip = {
  element: null,
  show(layer, data, event) {
    this.element ??= document.body.appendChild(make("div", "calibquant-tooltip"));
    if (this.element.layer !== layer) this.element.replaceChildren(...describe(layer, data));
    this.element.layer = layer;
    const { width, height } = this.element.getBoundingClientRect();
    this.element.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
    const below = event.clientY + 16;
    this.element.style.top = `${Math.max(0, below + height > innerHeight ? event.clientY - height - 10 : below)}px`;
  },
  hide() {
    this.element?.remove();
    this.element = null;
  },
};

function describe(layer, data) {
  const decided = layer.decision ? `${layer.decision} (score ${short(layer.score)}, ${layer.reason.replaceAll("_", " ")})` : "";
  const stays = layer.protected ? `protected: ${layer.protected}` : "not scored";
  const statistics = STATISTICS.map(([key, title, , show = short]) => [title, show(layer[key])]);
  const errors = data.titles.map((title, i) => [title, ...layer.errors[i].map(tenThousandths)]);
  return [
    make("b", "", layer.name),
    make("div", "", `${layer.shape.join(" × ")} – ${decided || stays}`),
    plainTable(statistics),
    plainTable([["Error × 10⁻⁴", "nearest", "searched"], ...errors]),
  ];
}

function plainTable(rows) {
  return make("table", "", "", rows.map((row) => make("tr", "", "", row.map((text) => make("td", "", text)))));
}

// --- the widget

class Heatmap {
  constructor(node) {
    this.node = node;
    this.content = make("div");
    this.element = make("div", "calibquant-heatmap", "", [this.content]);
    this.select = make("select");
    this.select.onchange = () => this.choose(this.select.value);
    this.sorting = null;
    this.element.addEventListener("pointermove", (event) => this.hover(event));
    this.element.addEventListener("pointerleave", () => tooltip.hide());
    // A press in here is meant for the list and the table, not for dragging the node.
    this.element.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  }

  hover(event) {
    const { layer } = event.target;
    if (layer && this.data) tooltip.show(layer, this.data, event);
    else tooltip.hide();
  }

  choose(key) {
    this.node.properties[PROPERTY] = key;
    this.draw();
  }

  show(raw) {
    tooltip.hide();
    this.data = read(raw);
    this.sorting ??= { column: 3 + Math.max(0, raw.formats.indexOf("nvfp4")), descending: true };
    this.select.replaceChildren(...this.data.metrics.map((metric) => new Option(metric.title, metric.key)));
    this.draw();
  }

  draw() {
    const { data } = this;
    const metric = data.metrics.find((m) => m.key === this.node.properties[PROPERTY]) ?? data.metrics[0];
    this.select.value = metric.key;
    const range = scale(data.layers.filter((layer) => !isKept(layer, metric)).map(metric.of), metric.noise);
    const head = make("div", "cq-head", "", [this.select, legend(metric, range)]);
    const scroll = make("div", "cq-scroll", "", [drawMap(data, metric, range)]);
    const left = this.content.querySelector(".cq-scroll")?.scrollLeft ?? 0;
    this.content.replaceChildren(head, make("div", "cq-note", note(data, metric, range)), scroll, drawTable(data, this.sorting));
    scroll.scrollLeft = left;
  }

  height() {
    return 2 * MARGIN + 16 + Math.max(60, this.content.offsetHeight); // 16: the paddings of the box
  }
}

/**
 * Vue nodes hand the wheel to the canvas, which zooms, before anything inside a node hears of it. Over what can be
 * scrolled it scrolls, as on the canvas renderer; with a key held it still zooms.
 */
function keepWheel(event) {
  const element = event.target.closest?.(".calibquant-heatmap");
  if (element && !event.ctrlKey && !event.metaKey && scrolls(event, element)) event.stopPropagation();
}

/** Whether something between the pointer and the element can be scrolled in the direction of the wheel. */
function scrolls({ target, deltaX, deltaY, shiftKey }, element) {
  const sideways = shiftKey || Math.abs(deltaX) > Math.abs(deltaY);
  for (let box = target; box && box !== element.parentElement; box = box.parentElement) {
    const { overflowX, overflowY } = getComputedStyle(box);
    const [overflow, more] = sideways
      ? [overflowX, box.scrollWidth - box.clientWidth]
      : [overflowY, box.scrollHeight - box.clientHeight];
    if (overflow === "auto" && more > 1) return true;
  }
  return false;
}

/** The width at which the whole map is seen, within reason. */
function goodWidth(data) {
  const blocks = new Set(data.layers.map((layer) => layer.block)).size;
  return Math.min(NODE_WIDTH.most, Math.max(NODE_WIDTH.least, NODE_WIDTH.beside + blocks * (CELL.min + 2)));
}

/** Make room; the node never shrinks below what the user gave it. */
function grow(node, least = 0) {
  const [width, height] = node.computeSize();
  const wanted = [Math.max(width, least, node.size[0]), Math.max(height, node.size[1])];
  if (wanted[0] === node.size[0] && wanted[1] === node.size[1]) return;
  node.setSize(wanted);
  node.setDirtyCanvas?.(true, true);
}

function addWidget(node) {
  addStyle();
  const heatmap = new Heatmap(node);
  const widget = node.addDOMWidget(WIDGET, "calibquant_heatmap", heatmap.element, {
    serialize: false, // not in the prompt …
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => heatmap.height(),
  });
  widget.serialize = false; // … nor in the workflow file
  widget.heatmap = heatmap;
  new ResizeObserver(() => grow(node)).observe(heatmap.content);
  return widget;
}

/** isNew: just computed. A map that comes back with its workflow leaves the node at the size it had. */
function show(node, raw, isNew) {
  const { heatmap } = node.widgets?.find((w) => w.name === WIDGET) ?? addWidget(node);
  if (heatmap.raw === raw) return;
  const before = heatmap.raw ? goodWidth(heatmap.data) : 0;
  heatmap.raw = raw;
  heatmap.show(raw);
  const wanted = goodWidth(heatmap.data);
  grow(node, isNew && wanted > before ? wanted : 0); // a node that the user made narrow stays so for a model of that size
}

onWords((node, { output }, isNew) => {
  const [raw] = output?.calibquant_probe ?? [];
  if (raw && node.comfyClass === NODE) show(node, raw, isNew);
});

app.registerExtension({
  name: "CalibQuant.Heatmap",
  setup() {
    window.addEventListener("wheel", keepWheel, { capture: true, passive: true });
  },
  nodeCreated(node) {
    if (node?.comfyClass !== NODE) return;
    const onRemoved = node.onRemoved;
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      tooltip.hide();
    };
  },
});
