import { COLOUR, MODEL, PROMPTS } from "./parts.mjs";

const NOTE = `# What does each layer see?

**Calibrate** samples the prompts itself and collects, for every layer, how large its inputs and outputs are and a sample of
its inputs. No KSampler is needed. **Save Calibration** keeps it as one file below \`output/calibrations\`.

*For your own model*: load it, link a prompt set of its text encoder (**Encode Prompt Set** makes one, with 64 prompts that
ship with the pack), and set steps, cfg, sampler and size as you use the model. 32 samples are plenty.

A cancel keeps what finished samples gave, below \`output/calibrations/unfinished\`.`;

const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 300], { text: NOTE }],
  ["unet", "UNETLoader", [500, 80], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 250], [360, 110], PROMPTS],
  ["calibrate", "CalibQuantCalibrate", [920, 80], [360, 420],
    { samples: 20, steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", width: 64, height: 64, frames: 1,
      seed: 2000, rows: 128 }],
  ["save", "CalibQuantSaveCalibration", [1340, 80], [400, 220], { filename_prefix: "digits", merge_with: "none" }],
];
const LINKS = [
  ["unet", 0, "calibrate", "model"],
  ["prompts", 0, "calibrate", "conditioning"],
  ["calibrate", 0, "save", "calibration"],
];

const GROUPS = [
  ["The 16-bit model, prompts", COLOUR.shared, [480, 0, 400, 580]],
  ["Calibrate and keep it", COLOUR.work, [900, 0, 860, 580]],
];

export default { nodes: NODES, links: LINKS, groups: GROUPS };
