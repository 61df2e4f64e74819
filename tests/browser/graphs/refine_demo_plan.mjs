import { CALIBRATION, COLOUR, MODEL, SAMPLING } from "./parts.mjs";

const NOTE = `# A plan that was tried before it is saved

A plan for a size adds up what each layer's error should cost. **Refine Plan by Sampling** draws a few prompts with that plan, as its
card will run it, measures each block alone, plans again by what it saw, and keeps the better of the two.

It takes minutes on the demo model and longer on a large one: \`minutes\` bounds it. With \`measure_controls\` it shows, beside the
two, what a uniform plan of as many bytes does.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 280], { text: NOTE }],
  ["unet", "UNETLoader", [1440, 420], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["calibration", "CalibQuantLoadCalibration", [500, 80], [360, 110], { calibration_name: CALIBRATION }],
  ["plan", "CalibQuantPlan", [920, 80], [460, 1200],
    { model_name: MODEL, strategy: "bits", "strategy.bits": 6.5, "strategy.gpu": "blackwell", "strategy.formats": "nvfp4,mxfp8,bf16" }],
  ["prompts", "CalibQuantLoadPromptSet", [1440, 590], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["refine", "CalibQuantRefinePlan", [1880, 80], [440, 1200],
    { ...SAMPLING, samples: 10, seed: 2000, minutes: 10, measure_controls: true }],
  ["save", "CalibQuantQuantize", [2380, 80], [400, 420], { filename_prefix: "calibquant/digits_refined", verify: true }],
];
const LINKS = [
  ["calibration", 0, "plan", "calibration"],
  ["unet", 0, "refine", "model"],
  ["plan", 0, "refine", "plan"],
  ["prompts", 0, "refine", "conditioning"],
  ["refine", 0, "save", "plan"],
];
const GROUPS = [
  ["The shipped calibration", COLOUR.shared, [480, 0, 400, 240]],
  ["Plan for a size", COLOUR.work, [900, 0, 500, 1500]],
  ["Model, prompts", COLOUR.shared, [1420, 340, 400, 400]],
  ["Try it, and plan again", COLOUR.quantized, [1860, 0, 480, 1500]],
  ["Save", COLOUR.work, [2360, 0, 440, 560]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
