import { CALIBRATION, COLOUR, MODEL, pictured, row, shared } from "./parts.mjs";

const NOTE = `# Below the floor of 4-bit inputs: a split

Cards that run NVFP4 (RTX 50) round a layer's *inputs* to 4 bits, too; with good weights that is most of what is lost.
**Quantization Plan** with a \`split\` sets a small 16-bit branch beside each layer, which takes it up. It needs a calibration.

**Save Quantized Model** then saves two files that belong together; the main one alone draws noise. Two ways to load them:

1. **Load Split Model** finds the LoRA by itself; bypass LoRAs of yours may follow.
2. The stock way: **Load Diffusion Model**, then **Load LoRA (Bypass, Model Only)** at strength 1. No other bypass LoRA may
follow (it would replace the branch), and never take an ordinary LoRA loader for it.

All rows use the same seed.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 500], { text: NOTE }],
  ["calibration", "CalibQuantLoadCalibration", [500, 80], [360, 110], { calibration_name: CALIBRATION }],
  ["plan", "CalibQuantPlan", [920, 80], [360, 400],
    { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4", split: "16" }],
  ["save", "CalibQuantQuantize", [1340, 80], [560, 400],
    { model_name: MODEL, filename_prefix: "calibquant/digits", verify: true }],
  ...shared(2020, 540),
  ...row("both", 2020, 80).filter(([key]) => key !== "both.unet"),
  ["both.unet", "CalibQuantLoadSplit", [2020, 80], [360, 90], {}],
  ...row("stock", 2020, 1160).filter(([key]) => key !== "stock.unet"),
  ["stock.unet", "UNETLoader", [2020, 1310], [360, 90], { weight_dtype: "default" }],
  ["stock.lora", "LoraLoaderBypassModelOnly", [2440, 1160], [360, 110], { strength_model: 1 }],
  ...row("large", 2020, 1620),
];
const LINKS = [
  ["calibration", 0, "plan", "calibration"],
  ["plan", 0, "save", "plan"],
  ["save", 0, "both.unet", "model_name"],
  ["save", 0, "stock.unet", "unet_name"],
  ["stock.unet", 0, "stock.lora", "model"],
  ["save", 2, "stock.lora", "lora_name"],
  ...pictured("both", "both.unet"), ...pictured("stock", "stock.lora"), ...pictured("large", "large.unet"),
];
const GROUPS = [
  ["Quantize with a split", COLOUR.work, [480, 0, 1440, 700]],
  ["Prompt, size, seed: the same for all", COLOUR.shared, [2420, 460, 860, 560]],
  ["Both files, by Load Split Model", COLOUR.quantized, [2000, 0, 2300, 420]],
  ["Both files, by two stock nodes", COLOUR.quantized, [2000, 1080, 2300, 420]],
  ["The 16-bit model", COLOUR.original, [2000, 1540, 2300, 420]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
