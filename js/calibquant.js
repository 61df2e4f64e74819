// Shows what a CalibQuant node is doing, then its result (sizes, layers per format, worst layer), on the node.
//
// Events: "calibquant.text" {node, text} from the server while the node works (nodes/comfyui.py), and the node's
// own `text` output at the end. A DOM widget, because both renderers draw one: the canvas and Vue nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PREFIX = "CalibQuant";
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

/** Make room for the text; the node never shrinks below what the user gave it. */
function grow(node) {
  const [width, height] = node.computeSize();
  if (width <= node.size[0] && height <= node.size[1]) return;
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  node.setDirtyCanvas?.(true, true);
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

function show(node, text) {
  const widget = node.widgets?.find((w) => w.name === WIDGET) ?? addWidget(node);
  widget.element.firstChild.textContent = text.trim();
  grow(node);
}

function isOurs(node) {
  return node?.comfyClass?.startsWith(PREFIX);
}

app.registerExtension({
  name: "CalibQuant.Result",
  setup() {
    const tell = (id, text) => {
      const node = app.graph.getNodeById(id);
      if (isOurs(node)) show(node, text);
    };
    api.addEventListener("calibquant.text", ({ detail }) => tell(detail.node, detail.text));
    api.addEventListener("execution_interrupted", ({ detail }) => tell(detail.node_id, "cancelled"));
    api.addEventListener("execution_error", ({ detail }) => tell(detail.node_id, detail.exception_message));
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const text = [output?.text ?? []].flat().join("\n");
      if (text) show(this, text);
    };
  },
});
