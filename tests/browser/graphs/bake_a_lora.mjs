import { COLOUR, MODEL, SAMPLING, VAE } from "./parts.mjs";

const NOTE = `# A LoRA inside the small file

A LoRA on top of a 4-bit model meets weights that were rounded without it. Baked in first, it is rounded with them, and the file needs no
LoRA any more.

1. **Load LoRA** stands where it always does, behind **Load Diffusion Model**; several in a row work, too.
2. Link the last MODEL to **Save Quantized Model**: what LoRA and merge nodes changed is baked in, in float32, before rounding.
3. **Compare Models** draws the 16-bit model *with* the LoRA beside the baked file.

The LoRA here draws the digits bolder; it ships with the pack.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 400], { text: NOTE }],
  ["large", "UNETLoader", [500, 620], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["lora", "LoraLoaderModelOnly", [920, 620], [360, 110], { lora_name: "calibquant_digits_bold.safetensors", strength_model: 1 }],
  ["plan", "CalibQuantPlan", [920, 80], [400, 400], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [1380, 80], [400, 420], { filename_prefix: "calibquant/digits_bold", verify: true }],
  ["small", "UNETLoader", [1840, 80], [360, 90], { weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [1840, 790], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["vae", "VAELoader", [1840, 960], [360, 70], VAE],
  ["compare", "CalibQuantCompare", [2260, 620], [520, 1400], { ...SAMPLING, prompts: 4, seeds: 1, seed: 7, filename_prefix: "digits_bold" }],
];
const LINKS = [
  ["large", 0, "lora", "model"],
  ["plan", 0, "save", "plan"],
  ["lora", 0, "save", "model"],
  ["save", 0, "small", "unet_name"],
  ["lora", 0, "compare", "model_a"],
  ["small", 0, "compare", "model_b"],
  ["prompts", 0, "compare", "conditioning"],
  ["vae", 0, "compare", "vae"],
];
const GROUPS = [
  ["The 16-bit model with its LoRA", COLOUR.original, [480, 540, 820, 210]],
  ["Bake, quantize, load", COLOUR.work, [900, 0, 1320, 520]],
  ["What to draw", COLOUR.shared, [1820, 710, 400, 340]],
  ["How close is it?", COLOUR.quantized, [2240, 540, 560, 1520]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
