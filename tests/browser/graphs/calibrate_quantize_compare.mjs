import { COLOUR, COMPARED, comparison, MODEL, SAMPLING, VAE } from "./parts.mjs";

const NOTE = `# As close as 4 bits get

1. **Calibrate** samples prompts with the 16-bit model and collects what each layer sees.
2. **Quantization Plan** gives its layers activation scales; **Save Quantized Model** rounds with GPTQ, which knows the inputs.
3. **Compare Models** draws both from other seeds than calibration saw.

*For your own model*: **Encode Prompt Set** makes prompts with its text encoder (64 varied ones ship with the pack). 32 samples
are plenty. Add **Save Calibration** behind **Calibrate** to keep it.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 420], { text: NOTE }],
  ["large", "UNETLoader", [500, 620], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 790], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["vae", "VAELoader", [500, 960], [360, 70], VAE],
  ["calibrate", "CalibQuantCalibrate", [1000, 80], [360, 420], { ...SAMPLING, samples: 20, seed: 2000, rows: 512 }],
  ["plan", "CalibQuantPlan", [1420, 80], [380, 420], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [1860, 80], [400, 420], { filename_prefix: "calibquant/digits_calibrated", verify: true }],
  ["small", "UNETLoader", [2320, 80], [360, 90], { weight_dtype: "default" }],
  comparison("digits_calibrated", [2760, 620]),
];
const LINKS = [
  ["large", 0, "calibrate", "model"],
  ["prompts", 0, "calibrate", "conditioning"],
  ["calibrate", 0, "plan", "calibration"],
  ["plan", 0, "save", "plan"],
  ["save", 0, "small", "unet_name"],
  ...COMPARED,
];
const GROUPS = [
  ["The 16-bit model, prompts", COLOUR.shared, [480, 540, 400, 510]],
  ["Calibrate, plan, save", COLOUR.work, [980, 0, 1720, 560]],
  ["The same prompts, other seeds, both models", COLOUR.quantized, [2740, 540, 560, 1520]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
