import { COLOUR, LATENT, MODEL, PROMPTS, SAMPLER, UPSCALE, VAE } from "./parts.mjs";

const NOTE = `# Calibrate while you make pictures

Put **Monitor Calibration** between the model (after its LoRAs) and your sampler, and go on as ever: the pictures stay the
same, bit for bit. Each run adds to the file below \`output/calibrations\`, also after a restart.

**Save Calibration** takes a copy of what has been collected so far. Its \`after\` waits for the sampler; without
it the copy would be taken first.

Queue a few prompts and seeds: 32 runs are plenty. *reset* begins anew.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 280], { text: NOTE }],
  ["unet", "UNETLoader", [500, 80], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["monitor", "CalibQuantMonitor", [920, 80], [360, 200], { name: "digits_monitored", rows: 128, reset: false }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 440], [360, 110], PROMPTS],
  ["latent", "EmptyHunyuanLatentVideo", [500, 620], [360, 140], LATENT],
  ["sampler", "KSampler", [1340, 420], [320, 270], SAMPLER],
  ["vae", "VAELoader", [1340, 820], [320, 70], VAE],
  ["decode", "VAEDecode", [1720, 420], [260, 50], {}],
  ["scale", "ImageScale", [2040, 420], [260, 150], UPSCALE],
  ["picture", "PreviewImage", [2360, 420], [280, 300], {}],
  ["save", "CalibQuantSaveCalibration", [1720, 80], [400, 220], { filename_prefix: "digits_copy", merge_with: "none" }],
];
const LINKS = [
  ["unet", 0, "monitor", "model"],
  ["monitor", 0, "sampler", "model"],
  ["prompts", 1, "sampler", "positive"],
  ["prompts", 1, "sampler", "negative"], // unused: cfg is 1
  ["latent", 0, "sampler", "latent_image"],
  ["monitor", 1, "save", "calibration"],
  ["sampler", 0, "save", "after"],
  ["sampler", 0, "decode", "samples"],
  ["vae", 0, "decode", "vae"],
  ["decode", 0, "scale", "image"],
  ["scale", 0, "picture", "images"],
];

const GROUPS = [
  ["Your own graph", COLOUR.original, [480, 0, 400, 800]],
  ["Watch, keep", COLOUR.work, [900, 0, 1240, 320]],
  ["Your own graph, as ever", COLOUR.original, [1320, 340, 1340, 580]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
