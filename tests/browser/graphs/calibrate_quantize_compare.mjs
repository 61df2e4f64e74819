import { COLOUR, MODEL, SAMPLING, VAE } from "./parts.mjs";

const NOTE = `# As close as 4 bits get

1. **Calibrate** samples prompts with the 16-bit model and collects what each layer sees.
2. **Quantization Plan** gives its layers activation scales; **Save Quantized Model** rounds with GPTQ, which knows the inputs.
3. **Compare Models** draws both from other seeds than calibration saw.

*For your own model*: **Encode Prompt Set** makes prompts with its text encoder (64 varied ones ship with the pack). 32 samples
are plenty. Add **Save Calibration** behind **Calibrate** to keep it.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 420], { text: NOTE }],
  ["large", "UNETLoader", [500, 80], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 240], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["vae", "VAELoader", [500, 420], [360, 70], VAE],
  ["calibrate", "CalibQuantCalibrate", [920, 80], [360, 420], { ...SAMPLING, samples: 20, seed: 2000, rows: 512 }],
  ["plan", "CalibQuantPlan", [1340, 80], [380, 420], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [1780, 80], [400, 420], { filename_prefix: "calibquant/digits_calibrated", verify: true }],
  ["small", "UNETLoader", [920, 700], [360, 90], { weight_dtype: "default" }],
  ["compare", "CalibQuantCompare", [1340, 700], [400, 520], { ...SAMPLING, prompts: 10, seeds: 1, seed: 7 }],
  ["sheet", "PreviewImage", [1800, 700], [520, 700], {}],
];
const LINKS = [
  ["large", 0, "calibrate", "model"],
  ["prompts", 0, "calibrate", "conditioning"],
  ["calibrate", 0, "plan", "calibration"],
  ["plan", 0, "save", "plan"],
  ["save", 0, "small", "unet_name"],
  ["large", 0, "compare", "model_a"],
  ["small", 0, "compare", "model_b"],
  ["prompts", 0, "compare", "conditioning"],
  ["vae", 0, "compare", "vae"],
  ["compare", 0, "sheet", "images"],
];
const GROUPS = [
  ["The 16-bit model, prompts", COLOUR.shared, [480, 0, 400, 510]],
  ["Calibrate, plan, save", COLOUR.work, [900, 0, 1300, 580]],
  ["The same prompts, other seeds, both models", COLOUR.quantized, [900, 620, 1440, 800]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
