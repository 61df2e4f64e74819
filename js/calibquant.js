// Shows the result of a CalibQuant node (its `text` output: sizes, layers per format, worst layer) on the node.
// A DOM widget, because both renderers draw one: the canvas (LiteGraph) and Vue nodes.
import { app } from "../../scripts/app.js";

const PREFIX = "CalibQuant";
const WIDGET = "calibquant_result";
const LINE = 16; // pixels, with the style below
const PADDING = 12;

function makeElement() {
  const element = document.createElement("div");
  element.className = "calibquant-result";
  element.style.cssText =
    `box-sizing:border-box;width:100%;height:100%;padding:${PADDING / 2}px;overflow:auto;white-space:pre-wrap;` +
    `overflow-wrap:anywhere;user-select:text;font:12px/${LINE}px sans-serif;border-radius:4px;` +
    "color:var(--input-text);background:var(--comfy-input-bg)";
  return element;
}

function resultWidget(node) {
  const present = node.widgets?.find((widget) => widget.name === WIDGET);
  if (present) return present;
  const element = makeElement();
  const height = () => PADDING + LINE * Math.max(1, element.textContent.split("\n").length);
  const widget = node.addDOMWidget(WIDGET, "calibquant_text", element, {
    serialize: false, // not in the prompt …
    hideOnZoom: false,
    getMinHeight: height,
  });
  widget.serialize = false; // … nor in the workflow file
  return widget;
}

function show(node, text) {
  const { element } = resultWidget(node);
  element.textContent = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]); // grows, never shrinks what the user set
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "CalibQuant.Result",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const text = [output?.text ?? []].flat().join("\n");
      if (text) show(this, text);
    };
  },
});
