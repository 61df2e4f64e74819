import { CALIBRATION, COLOUR, COMPARED, comparison, MODEL, VAE } from "./parts.mjs";

const NOTE = `# Small, and how close?

1. **Quantize Model** asks which model and for which card. The file lies below \`output/diffusion_models\`. The calibration is
optional: with it 4-bit layers err several times less (*calibrate_with_prompts* makes one).
2. The stock **Load Diffusion Model** loads it, and the original.
3. **Compare Models** draws the same prompts from the same noise with both, and says in one sentence whether you would see it.

*For your own model*: choose it in **Quantize Model** and in the lower **Load Diffusion Model**, and link prompts of its own text
encoder (**Encode Prompt Set**) and its VAE.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 380], { text: NOTE }],
  ["calibration", "CalibQuantLoadCalibration", [40, 560], [400, 110], { calibration_name: CALIBRATION }],
  ["easy", "CalibQuantEasy", [500, 80], [400, 300], { model_name: MODEL, card: "RTX 50" }],
  ["small", "UNETLoader", [960, 80], [360, 90], { weight_dtype: "default" }],
  ["large", "UNETLoader", [960, 240], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [960, 470], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["vae", "VAELoader", [960, 640], [360, 70], VAE],
  comparison("digits", [1380, 80]),
];
const LINKS = [
  ["calibration", 0, "easy", "calibration"],
  ["easy", 0, "small", "unet_name"],
  ...COMPARED,
];
const GROUPS = [
  ["What its layers see", COLOUR.shared, [20, 470, 440, 300]],
  ["Make it small", COLOUR.work, [480, 0, 440, 690]],
  ["Both models, by the stock loader", COLOUR.original, [940, 0, 400, 370]],
  ["What to draw", COLOUR.shared, [940, 390, 400, 340]],
  ["How close is it?", COLOUR.quantized, [1360, 0, 560, 1520]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
