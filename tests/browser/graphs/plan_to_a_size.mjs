import { CALIBRATION, COLOUR, COMPARED, comparison, MODEL, SAMPLING, VAE } from "./parts.mjs";

const NOTE = `# The best file of a size you choose

1. **Measure Sensitivity** adds to a calibration what an error of each layer does to the prediction.
2. **Quantization Plan**, strategy \`bits\` (or \`size\` in GB): each layer gets the format with which the whole file loses least on that
card. Drag the slider along the curve; click layers in the map and set a format; run again for the exact size.
3. **Compare Models** says what it drew.

The calibration ships with the pack; your own comes from **Calibrate** or **Monitor Calibration**.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 320], { text: NOTE }],
  ["large", "UNETLoader", [500, 1420], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["calibration", "CalibQuantLoadCalibration", [500, 80], [360, 110], { calibration_name: CALIBRATION }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 1590], [360, 110], { prompt_set: "digits.safetensors", index: 0 }],
  ["vae", "VAELoader", [500, 1760], [360, 70], VAE],
  ["sensitivity", "CalibQuantSensitivity", [1000, 80], [360, 520], { ...SAMPLING, samples: 5, seed: 3000 }],
  ["plan", "CalibQuantPlan", [1420, 80], [640, 1200],
    { model_name: MODEL, strategy: "bits", "strategy.bits": 5.5, "strategy.gpu": "blackwell", "strategy.formats": "nvfp4,mxfp8,bf16" }],
  ["save", "CalibQuantQuantize", [2120, 80], [400, 420], { filename_prefix: "calibquant/digits_planned", verify: true }],
  ["small", "UNETLoader", [2580, 80], [360, 90], { weight_dtype: "default" }],
  comparison("digits_planned", [3000, 1420]),
];
const LINKS = [
  ["large", 0, "sensitivity", "model"],
  ["calibration", 0, "sensitivity", "calibration"],
  ["prompts", 0, "sensitivity", "conditioning"],
  ["sensitivity", 0, "plan", "calibration"],
  ["plan", 0, "save", "plan"],
  ["save", 0, "small", "unet_name"],
  ...COMPARED,
];
const GROUPS = [
  ["The shipped calibration", COLOUR.shared, [480, 0, 400, 240]],
  ["Model, prompts", COLOUR.shared, [480, 1340, 400, 510]],
  ["What is each layer worth?", COLOUR.work, [980, 0, 400, 1320]],
  ["Plan and edit", COLOUR.work, [1400, 0, 680, 1320]],
  ["Save, load", COLOUR.work, [2100, 0, 860, 560]],
  ["How close is it?", COLOUR.quantized, [2980, 1340, 560, 1520]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
