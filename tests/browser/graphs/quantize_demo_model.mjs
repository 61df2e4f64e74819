import { COLOUR, MODEL, pictured, row, shared } from "./parts.mjs";

const NOTE = `# One model in, one small file out

1. **Quantization Plan** chooses a format for every layer. Try another recipe.
2. **Save Quantized Model** writes the file below \`output/diffusion_models\`. Its first output is the file's name.
3. The stock **Load Diffusion Model** takes that name and samples. Leave its \`weight_dtype\` on \`default\`.

Both rows use the same seed, so what differs between the two pictures is what quantizing cost.
The digit is the \`index\` of **Load Prompt Set**.

*For your own model*: choose its file in both nodes of step 1 and 2, and sample with the text encoder and VAE it needs.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 400], { text: NOTE }],
  ["plan", "CalibQuantPlan", [500, 80], [360, 190], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [920, 80], [400, 300],
    { model_name: MODEL, filename_prefix: "calibquant/digits", verify: true }],
  ...shared(1420, 540),
  ...row("small", 1420, 80),
  ...row("large", 1420, 1160),
];

const LINKS = [
  ["plan", 0, "save", "plan"],
  ["save", 0, "small.unet", "unet_name"],
  ...pictured("small", "small.unet"), ...pictured("large", "large.unet"),
];

const GROUPS = [
  ["Quantize", COLOUR.work, [480, 0, 880, 700]],
  ["Prompt, size, seed: the same for both", COLOUR.shared, [1820, 460, 860, 560]],
  ["The quantized file, by the stock loader", COLOUR.quantized, [1400, 0, 2300, 420]],
  ["The 16-bit model", COLOUR.original, [1400, 1080, 2300, 420]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS, thumbnail: "digits" };
