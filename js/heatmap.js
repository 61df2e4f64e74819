// The result of Probe Model Weights: a heatmap of all layers and a table by layer type.
//
// Input: the node's `calibquant_probe` output, made by nodes/probe.py: document(). Everything is HTML and not a canvas,
// so that text stays sharp at every zoom and row labels stay put while a wide map scrolls. A DOM widget, because both
// renderers draw one: the canvas and Vue nodes.
import { app } from "../../scripts/app.js";
import { colour, gradient, isFlat, scale } from "./heatmap/colours.js";
import { make, plainTable, swatch } from "./heatmap/elements.js";
import { arrange, drawGrid } from "./heatmap/grid.js";
import { error, group, mean, percent, short, tenThousandths } from "./heatmap/numbers.js";
import { drawTable } from "./heatmap/table.js";
import { tooltip } from "./heatmap/tooltip.js";
import { addMapWidget, goodWidth, grow } from "./heatmap/widget.js";
import { onWords } from "./results.js";

const NODE = "CalibQuantProbe";
const WIDGET = "calibquant_heatmap";
const PROPERTY = "calibquant_metric"; // of the node: the workflow file remembers the choice
const DECISIONS = ["NVFP4", "FP8", "KEEP"];

const STATISTICS = [
  ["kurtosis", "Excess kurtosis", "0 for a Gaussian; large where a few weights stand out"],
  ["dynamic_range", "Dynamic range", "largest minus smallest |w|"],
  ["outlier_share", "Outlier share", "weights further than 3 standard deviations from the mean", percent],
  ["row_spread", "Spread of rows", "standard deviation of log2(largest |w|) over the rows, in bits"],
  ["block16_spread", "Spread of blocks of 16", "the same over blocks of 16 weights, as NVFP4 scales them"],
  ["block32_spread", "Spread of blocks of 32", "the same over blocks of 32 weights, as MXFP8 scales them"],
  ["std", "Standard deviation", "of the weights"],
];

// --- the document of nodes/probe.py, as objects

function read(raw) {
  const layers = raw.layers.map((row) => Object.fromEntries(raw.fields.map((name, i) => [name, row[i]])));
  return { ...raw, layers, metrics: metrics(raw), flat: raw.formats.map((_, i) => isFlat(errorsOf(layers, i), raw.noise[i])) };
}

function errorsOf(layers, i) {
  return layers.filter((layer) => !layer.protected).map((layer) => layer.errors[i][0]);
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

// --- the map

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
  bar.style.background = range.flat ? colour(0.5) : gradient();
  const middle = range.flat ? ["(flat)"] : range.name ? [`(middle ${metric.show(range.value(0.5))}, ${range.name})`] : [];
  const numbers = [make("span", "cq-least", metric.show(range.low)), bar, make("span", "cq-most", metric.show(range.high))];
  return make("div", "cq-legend", "", [...numbers, ...middle, ...kept]);
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

// --- the table by layer type

function tableRows(data) {
  return [...group(data.layers, (layer) => layer.type)].map(([type, layers]) => [
    type,
    layers.length,
    mean(layers.map((layer) => layer.kurtosis)),
    ...data.formats.map((_, i) => mean(layers.map((layer) => layer.errors[i][0]))),
  ]);
}

function errorTable(data, state) {
  const titles = ["error × 10⁻⁴ by layer type", "n", "kurtosis", ...data.titles];
  const hints = titles.map((_, i) => (i < 3 ? "Click to sort" : "Mean error × 10⁻⁴ (nearest rounding). Click to sort"));
  const show = [String, String, short, ...data.titles.map(() => tenThousandths)];
  return drawTable({ titles, hints, show, rows: tableRows(data) }, state);
}

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
  }

  hover(event) {
    const { layer } = event.target;
    if (layer && this.data) tooltip.show(layer, () => describe(layer, this.data), event);
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
    const map = drawGrid(arrange(data.layers, data.types), (layer) => box(layer, metric, range));
    const scroll = make("div", "cq-scroll", "", [map]);
    const left = this.content.querySelector(".cq-scroll")?.scrollLeft ?? 0;
    this.content.replaceChildren(head, make("div", "cq-note", note(data, metric, range)), scroll, errorTable(data, this.sorting));
    scroll.scrollLeft = left;
  }
}

/** isNew: just computed. A map that comes back with its workflow leaves the node at the size it had. */
function show(node, raw, isNew) {
  const widget = node.widgets?.find((w) => w.name === WIDGET) ?? addMapWidget(node, WIDGET, new Heatmap(node));
  const heatmap = widget.view;
  if (heatmap.raw === raw) return;
  const before = heatmap.raw ? goodWidth(heatmap.data.layers) : 0;
  heatmap.raw = raw;
  heatmap.show(raw);
  const wanted = goodWidth(heatmap.data.layers);
  grow(node, isNew && wanted > before ? wanted : 0); // a node that the user made narrow stays so for a model of that size
}

onWords((node, { output }, isNew) => {
  const [raw] = output?.calibquant_probe ?? [];
  if (raw && node.comfyClass === NODE) show(node, raw, isNew);
});

app.registerExtension({
  name: "CalibQuant.Heatmap",
  nodeCreated(node) {
    if (node?.comfyClass !== NODE) return;
    const onRemoved = node.onRemoved;
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      tooltip.hide();
    };
  },
});
