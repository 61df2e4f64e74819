// Quantization Plan's map, as a widget of the node: it reads and writes the node's own inputs.
import { app } from "../../scripts/app.js";
import { addStyle } from "./heatmap/style.js";
import { tooltip } from "./heatmap/tooltip.js";
import { addMapWidget, goodWidth, grow } from "./heatmap/widget.js";
import { CELL, PlanMap } from "./plan_map/map.js";
import { STYLE } from "./plan_map/style.js";
import { onWords } from "./results.js";

const NODE = "CalibQuantPlan";
const WIDGET = "calibquant_plan";
const OPEN = "calibquant_map"; // properties of the node: the workflow file remembers them
const VIEW = "calibquant_view";

function find(node, name) {
  return node.widgets?.find((w) => w.name === name);
}

/** What the map reads and writes; whatever it writes is one step of ComfyUI's undo. */
function inputsOf(node) {
  const done = () => {
    refresh(node);
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
    node.setDirtyCanvas?.(true, true);
  };
  const write = (name, value) => {
    find(node, name).value = value;
    done();
  };
  const keep = (name, value) => {
    node.properties[name] = value;
    done();
  };
  return {
    edits: () => find(node, "edits")?.value ?? "",
    setEdits: (text) => write("edits", text),
    amount: (kind) => find(node, `strategy.${kind}`)?.value,
    setAmount: (kind, value) => write(`strategy.${kind}`, value),
    open: (data) => node.properties[OPEN] ?? data.priced, // a recipe's map is opened by who wants to change it
    setOpen: (on) => keep(OPEN, on),
    view: () => node.properties[VIEW],
    setView: (key) => keep(VIEW, key),
  };
}

function mapOf(node) {
  addStyle(); // the shared one first: this one changes some of it
  addStyle("calibquant-plan-style", STYLE);
  return (find(node, WIDGET) ?? addMapWidget(node, WIDGET, new PlanMap(inputsOf(node)))).view;
}

/** Show what the inputs say now; before the first run only that there are edits. */
function refresh(node) {
  watch(node);
  const shown = find(node, WIDGET);
  if (shown) shown.view.refresh();
  else if (find(node, "edits")?.value) mapOf(node).show(null);
}

/** Hear of what is typed into the inputs that the map shows; those of a strategy come and go with it. */
function watch(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.calibquantWatched || !(widget.name === "edits" || /^strategy\.(size|bits|max_error)$/.test(widget.name))) continue;
    const { callback } = widget;
    widget.callback = function () {
      const result = callback?.apply(this, arguments);
      refresh(node);
      return result;
    };
    widget.calibquantWatched = true;
  }
}

function show(node, raw, isNew) {
  const map = mapOf(node);
  if (map.raw !== raw) {
    map.raw = raw;
    map.show(raw);
    if (isNew && map.drawn) grow(node, goodWidth(map.data.layers, CELL));
    else if (node.calibquantSize) node.setSize(node.calibquantSize); // else undo would leave a node of another size behind
  }
  watch(node);
}

onWords((node, { output }, isNew) => {
  if (node.comfyClass !== NODE) return;
  const [raw] = output?.calibquant_plan ?? [];
  if (raw) show(node, raw, isNew);
  else refresh(node);
});

app.registerExtension({
  name: "CalibQuant.PlanMap",
  nodeCreated(node) {
    if (node?.comfyClass !== NODE) return;
    const { onRemoved, onConfigure } = node;
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      tooltip.hide();
    };
    node.onConfigure = function ({ size }) {
      onConfigure?.apply(this, arguments);
      node.calibquantSize = size && [...size];
      refresh(node);
    };
  },
});
