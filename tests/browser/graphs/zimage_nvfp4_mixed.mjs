import { COLOUR } from "./parts.mjs";

const MODEL = "z_image_turbo_bf16.safetensors";
const NOTE = `# Z-Image Turbo as NVFP4 with MXFP8 and BF16

The recipe is the published one: the layers that lose most in NVFP4 get MXFP8, and the most delicate stay in 16 bit. For RTX 50.

No calibration and no text encoder is needed: two nodes, a few minutes. The file lies below \`output/diffusion_models\`; **Load Diffusion
Model** takes it, with \`weight_dtype\` on \`default\`.

A fine-tune of Z-Image: choose its file in **Quantization Plan**. Closer to the original by a calibration: *zimage_calibrated*.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 300], { text: NOTE }],
  ["plan", "CalibQuantPlan", [500, 80], [400, 400], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "zimage-nvfp4-mixed" }],
  ["save", "CalibQuantQuantize", [960, 80], [400, 400], { filename_prefix: "calibquant/zimage_nvfp4_mixed", verify: true }],
];
const LINKS = [["plan", 0, "save", "plan"]];
const GROUPS = [["Plan by the published recipe, save", COLOUR.work, [480, 0, 900, 560]]];

export default { nodes: NODES, links: LINKS, groups: GROUPS, says: ["Z-Image Turbo", "NVFP4 with MXFP8 and BF16", "by the published recipe"] };
