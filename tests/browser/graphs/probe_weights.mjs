import { COLOUR, MODEL } from "./parts.mjs";

const NOTE = `# What would each format cost, layer by layer?

**Probe Model Weights** reads every weight once and shows a map: layer type × block, and the measured error of each format. No
sampling, no calibration, and memory for the largest tensor only.

The plan beside it keeps the quarter of the layers that lose most in NVFP4 in 16 bit. Nothing is written here: link the plan to
**Save Quantized Model** for that.

Weights tell which format is fit, not which layer matters: a calibration with sensitivities does (*plan_to_a_size*).`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 300], { text: NOTE }],
  ["probe", "CalibQuantProbe", [500, 80], [620, 700], { model_name: MODEL }],
  ["plan", "CalibQuantPlan", [1180, 80], [620, 500],
    { model_name: MODEL, strategy: "keep_ratio", "strategy.ratio": 0.25, "strategy.base": "nvfp4" }],
];
const LINKS = [["probe", 0, "plan", "probe"]];
const GROUPS = [
  ["Look", COLOUR.work, [480, 0, 660, 900]],
  ["Decide", COLOUR.quantized, [1160, 0, 660, 900]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
