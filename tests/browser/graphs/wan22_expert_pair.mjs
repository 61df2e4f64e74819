import { COLOUR } from "./parts.mjs";

const EXPERTS = { high: "wan2.2_t2v_high_noise_14B_fp16.safetensors", low: "wan2.2_t2v_low_noise_14B_fp16.safetensors" };
const SAMPLING = { steps: 20, cfg: 3.5, sampler_name: "euler", scheduler: "simple", width: 640, height: 640, frames: 33, switch_at_step: 10 };
const SHIFT = { shift: 8 };
const NOTE = `# Wan 2.2: a pair of experts

Two models draw one video: the high-noise expert the first steps, the low-noise expert the others. Each is calibrated by **its own
steps only**, and saved as a file of its own.

**First, once**: select the nodes of the muted group, unmute them (Ctrl+M), queue, and mute them again. That encodes the prompts that
ship with the pack (write your own instead) and saves them. Press R.

1. **Calibrate** samples with both, as two KSamplers (Advanced) do: set steps, *switch_at_step*, cfg, sampler and size as *you* use them.
2. Each half goes through its own **Plan** and **Save**. \`fp8\` is for RTX 40 and newer; for RTX 50 take \`nvfp4\` or \`mxfp8\`, for
RTX 30 and 20 \`int8\`.
3. **Compare Models** draws other seeds with both pairs: put the same shift behind all four.

Few frames are enough for calibrating: 8 samples of 33. Another file: choose it in the loader *and* in its plan.`;

/** The way of one expert: large, the heights of its 16-bit model and, small, of its plan and its file. */
function row(key, large, small) {
  const file = EXPERTS[key];
  return [
    [`${key}.large`, "UNETLoader", [500, large], [360, 90], { unet_name: file }],
    [`${key}.shift`, "ModelSamplingSD3", [920, large], [300, 70], SHIFT],
    [`${key}.plan`, "CalibQuantPlan", [1740, small], [400, 420], { model_name: file, strategy: "recipe", "strategy.recipe": "fp8" }],
    [`${key}.save`, "CalibQuantQuantize", [2200, small], [400, 420], { filename_prefix: `calibquant/wan22_${key}_noise`, verify: true }],
    [`${key}.small`, "UNETLoader", [2680, small], [360, 90], {}],
    [`${key}.smallShift`, "ModelSamplingSD3", [3100, small], [300, 70], SHIFT],
  ];
}

const way = (key, input, output, compare) => [
  [`${key}.large`, 0, `${key}.shift`, "model"],
  [`${key}.shift`, 0, "calibrate", input],
  ["calibrate", output, `${key}.plan`, "calibration"],
  [`${key}.plan`, 0, `${key}.save`, "plan"],
  [`${key}.save`, 0, `${key}.small`, "unet_name"],
  [`${key}.small`, 0, `${key}.smallShift`, "model"],
  [`${key}.shift`, 0, "compare", `${compare}_a`],
  [`${key}.smallShift`, 0, "compare", `${compare}_b`],
];

export default {
  nodes: [
    ["note", "MarkdownNote", [500, 80], [720, 560], { text: NOTE }],
    ...row("high", 1200, 80),
    ...row("low", 1360, 580),
    ["prompts", "CalibQuantLoadPromptSet", [920, 1520], [300, 110], { prompt_set: "wan_prompts.safetensors", index: 0 }],
    ["negative", "CalibQuantLoadPromptSet", [920, 1690], [300, 110], { prompt_set: "wan_negative.safetensors", index: 0 }],
    ["vae", "VAELoader", [920, 1860], [300, 70], { vae_name: "wan_2.1_vae.safetensors" }],
    ["calibrate", "CalibQuantCalibrate", [1320, 80], [360, 460], { ...SAMPLING, samples: 8, seed: 1000 }],
    ["compare", "CalibQuantCompare", [3520, 1200], [520, 1300], { ...SAMPLING, prompts: 2, seeds: 1, seed: 7, filename_prefix: "wan22" }],
    ["clip", "CLIPLoader", [500, 2100], [360, 150], { clip_name: "umt5_xxl_fp8_e4m3fn_scaled.safetensors", type: "wan" }],
    ["encode", "CalibQuantPromptSet", [960, 2100], [400, 300], { name: "wan_prompts" }],
    ["encodeNegative", "CalibQuantPromptSet", [960, 2460], [400, 300], {
      name: "wan_negative", prompts: "blurry, low quality, overexposed, static, subtitles, deformed",
    }],
  ],
  links: [
    ...way("high", "model", 0, "model"),
    ...way("low", "low_noise_model", 1, "low_noise"),
    ["prompts", 0, "calibrate", "conditioning"],
    ["negative", 1, "calibrate", "negative"],
    ["prompts", 0, "compare", "conditioning"],
    ["negative", 1, "compare", "negative"],
    ["vae", 0, "compare", "vae"],
    ["clip", 0, "encode", "clip"],
    ["clip", 0, "encodeNegative", "clip"],
  ],
  groups: [
    ["Calibrate each expert by its own steps, plan and save both", COLOUR.work, [1300, 0, 1320, 1040]],
    ["The small pair", COLOUR.quantized, [2660, 0, 760, 1040]],
    ["The pair in 16 bit, prompts", COLOUR.shared, [480, 1120, 760, 860]],
    ["How close is it?", COLOUR.quantized, [3500, 1120, 560, 1420]],
    ["Once: unmute these (Ctrl+M), queue, mute them again", COLOUR.original, [480, 2020, 920, 780]],
  ],
  muted: ["clip", "encode", "encodeNegative"],
  says: ["Wan 2.2, both experts", "FP8, calibrated", "RTX 40 and newer"],
};
