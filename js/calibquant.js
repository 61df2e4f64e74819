// Shows what a CalibQuant node is doing, then its result (sizes, layers per format, worst layer), on the node.
//
// The words come from results.js. A DOM widget, because both renderers draw one: the canvas and Vue nodes.
import { grow } from "./heatmap/widget.js";
import { onWords } from "./results.js";

const WIDGET = "calibquant_result";
const LINE = 16; // pixels
const PADDING = 6;
const MARGIN = 6; // kept free around the box by the canvas renderer

function makeElements() {
  const box = document.createElement("div");
  const text = document.createElement("div");
  box.className = "calibquant-result";
  box.style.cssText =
    `box-sizing:border-box;width:100%;height:100%;padding:${PADDING}px;overflow:auto;border-radius:4px;` +
    "color:var(--input-text);background:var(--comfy-input-bg)";
  text.style.cssText =
    `font:12px/${LINE}px sans-serif;white-space:pre-wrap;overflow-wrap:anywhere;user-select:text`;
  box.append(text);
  return { box, text };
}

function addWidget(node) {
  const { box, text } = makeElements();
  const widget = node.addDOMWidget(WIDGET, "calibquant_text", box, {
    serialize: false, // not in the prompt …
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => 2 * (MARGIN + PADDING) + Math.max(LINE, text.offsetHeight), // wrapped lines are known once drawn
  });
  widget.serialize = false; // … nor in the workflow file
  new ResizeObserver(() => grow(node)).observe(text);
  return widget;
}

onWords((node, { text = "", failed = false }) => {
  const found = node.widgets?.find((w) => w.name === WIDGET);
  if (!text && !found) return;
  const line = (found ?? addWidget(node)).element.firstChild;
  line.textContent = text.trim();
  line.style.color = failed ? "var(--error-text, #ff6b6b)" : "";
  grow(node);
});
