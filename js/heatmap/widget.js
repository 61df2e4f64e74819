// A map as a widget of a node, in both renderers: the canvas and Vue nodes.
import { addStyle, CELL } from "./style.js";
import { tooltip } from "./tooltip.js";

const MARGIN = 6; // pixels kept free around the box by the canvas renderer
const NODE_WIDTH = { least: 520, most: 1000, beside: 240 }; // pixels; beside: row labels and paddings

/**
 * Add a view, {element, content}, as a widget: as high as its content, and the node with it. A press in it does not
 * drag the node, and the wheel scrolls what can be scrolled.
 */
export function addMapWidget(node, name, view) {
  addStyle();
  const widget = node.addDOMWidget(name, name, view.element, {
    serialize: false, // not in the prompt …
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => 2 * MARGIN + 16 + Math.max(view.least ?? 60, view.content.offsetHeight), // 16: its paddings
  });
  widget.serialize = false; // … nor in the workflow file
  widget.view = view;
  view.element.addEventListener("pointerleave", () => tooltip.hide());
  view.element.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  new ResizeObserver(() => grow(node)).observe(view.content);
  watchWheel();
  return widget;
}

/**
 * Make room; the node never shrinks below what the user gave it. Vue nodes are as high as their content by themselves:
 * another height would be a change of the workflow, and cost one more step of undo.
 */
export function grow(node, least = 0) {
  const [width, wished] = node.computeSize();
  const height = window.LiteGraph?.vueNodesMode ? 0 : wished;
  const wanted = [Math.max(width, least, node.size[0]), Math.max(height, node.size[1])];
  if (wanted[0] === node.size[0] && wanted[1] === node.size[1]) return;
  node.setSize(wanted);
  node.setDirtyCanvas?.(true, true);
}

/** The width at which the whole map is seen, within reason. */
export function goodWidth(layers, cell = CELL.min) {
  const blocks = new Set(layers.map((layer) => layer.block)).size;
  return Math.min(NODE_WIDTH.most, Math.max(NODE_WIDTH.least, NODE_WIDTH.beside + blocks * (cell + 2)));
}

let watching = false;

function watchWheel() {
  if (!watching) window.addEventListener("wheel", keepWheel, { capture: true, passive: true });
  watching = true;
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
