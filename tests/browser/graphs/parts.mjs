// What the example graphs share. A node is [key, type, [x, y], [width, height], {widget: value}], a link [from, output, to,
// input], a group [title, colour, [x, y, width, height]]; make_workflows.mjs builds them in the frontend. Links go from
// left to right, so that none runs behind a node. muted: keys of nodes that do not run. says: lines of the thumbnail, of a
// graph whose models do not ship and that is not run for it.
import { MODEL } from "../page.mjs";

export { MODEL };
export const COLOUR = { work: "#3f789e", shared: "#b58b2a", quantized: "#88A", original: "#8A8" };
export const SEED = 7;
export const CALIBRATION = "digits.calibration.safetensors";
const DIGIT = 3;

export const SAMPLER = { seed: SEED, control_after_generate: "fixed", steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", denoise: 1 };
export const PROMPTS = { prompt_set: "digits.safetensors", index: DIGIT };
export const LATENT = { width: 64, height: 64, length: 1, batch_size: 1 };
export const UPSCALE = { upscale_method: "nearest-exact", width: 256, height: 256, crop: "disabled" }; // 64 pixels are hard to see
export const SAMPLING = { steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", width: 64, height: 64, frames: 1 }; // of our own nodes
export const VAE = { vae_name: "calibquant_digits_vae.safetensors" };

/** What all rows of pictures share: prompt, size, decoder, seed. They stand between two rows, left of what they feed. */
export function shared(x, y) {
  return [
    ["prompts", "CalibQuantLoadPromptSet", [x + 420, y], [360, 110], PROMPTS],
    ["latent", "EmptyHunyuanLatentVideo", [x + 420, y + 170], [360, 140], LATENT],
    ["vae", "VAELoader", [x + 920, y], [320, 70], VAE],
    ["seed", "PrimitiveInt", [x + 420, y + 370], [360, 90], { value: SEED }],
  ];
}

/** A model and the picture that it draws, from left to right. */
export function row(key, x, y) {
  const right = x + 920;
  return [
    [`${key}.unet`, "UNETLoader", [x, y], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
    [`${key}.sampler`, "KSampler", [right, y], [320, 270], SAMPLER],
    [`${key}.decode`, "VAEDecode", [right + 420, y], [260, 50], {}],
    [`${key}.scale`, "ImageScale", [right + 740, y], [260, 150], UPSCALE],
    [`${key}.picture`, "PreviewImage", [right + 1060, y], [280, 300], {}],
  ];
}

/** Links of a row whose MODEL comes from the node `model`. */
export function pictured(key, model) {
  return [
    ["seed", 0, `${key}.sampler`, "seed"],
    [model, 0, `${key}.sampler`, "model"],
    ["prompts", 1, `${key}.sampler`, "positive"],
    ["prompts", 1, `${key}.sampler`, "negative"], // unused: cfg is 1
    ["latent", 0, `${key}.sampler`, "latent_image"],
    [`${key}.sampler`, 0, `${key}.decode`, "samples"],
    ["vae", 0, `${key}.decode`, "vae"],
    [`${key}.decode`, 0, `${key}.scale`, "image"],
    [`${key}.scale`, 0, `${key}.picture`, "images"],
  ];
}

/**
 * Calibrate, plan, save, compare, for a model of your own. loader: [type, its name widget, file]; encoder: [type, values] of
 * the node that loads the CLIP, muted like those that encode. vae: null where the loader brings one.
 */
export function calibrated({ note, prefix, loader: [type, widget, file], encoder, vae, sampling, calibrate, plan, negative, says }) {
  const [set, avoid] = [`${prefix}_prompts`, `${prefix}_negative`];
  const nodes = [
    ["note", "MarkdownNote", [40, 80], [400, 430], { text: note }],
    ["large", type, [500, 620], [360, 100], { [widget]: file }],
    ["prompts", "CalibQuantLoadPromptSet", [500, 790], [360, 110], { prompt_set: `${set}.safetensors`, index: 0 }],
    ...(negative ? [["negative", "CalibQuantLoadPromptSet", [500, vae ? 1090 : 960], [360, 110], { prompt_set: `${avoid}.safetensors`, index: 0 }]] : []),
    ...(vae ? [["vae", "VAELoader", [500, 960], [360, 70], { vae_name: vae }]] : []),
    ["calibrate", "CalibQuantCalibrate", [1000, 80], [360, 420], { ...sampling, ...calibrate }],
    ["plan", "CalibQuantPlan", [1420, 80], [400, 420], { model_name: vae ? file : `checkpoints/${file}`, strategy: "recipe", "strategy.recipe": plan }],
    ["save", "CalibQuantQuantize", [1880, 80], [400, 420], { filename_prefix: `calibquant/${prefix}`, verify: true }],
    ["small", type, [2340, 80], [360, 100], {}],
    ["compare", "CalibQuantCompare", [2780, 620], [520, 1300], { ...sampling, prompts: 4, seeds: 1, seed: 7, filename_prefix: prefix }],
    ["clip", encoder[0], [500, 1370], [360, 150], encoder[1]],
    ["encode", "CalibQuantPromptSet", [1000, 1370], [400, 300], { name: set }],
    ...(negative ? [["encodeNegative", "CalibQuantPromptSet", [1000, 1730], [400, 300], { name: avoid, prompts: negative }]] : []),
  ];
  const clip = ["clip", vae ? 0 : 1];
  const avoided = (to) => (negative ? [["negative", 1, to, "negative"]] : []);
  const links = [
    ["large", 0, "calibrate", "model"],
    ["prompts", 0, "calibrate", "conditioning"],
    ...avoided("calibrate"),
    ["calibrate", 0, "plan", "calibration"],
    ["plan", 0, "save", "plan"],
    ["save", 0, "small", widget],
    ["large", 0, "compare", "model_a"],
    ["small", 0, "compare", "model_b"],
    ["prompts", 0, "compare", "conditioning"],
    vae ? ["vae", 0, "compare", "vae"] : ["small", 2, "compare", "vae"],
    ...avoided("compare"),
    [...clip, "encode", "clip"],
    ...(negative ? [[...clip, "encodeNegative", "clip"]] : []),
  ];
  const groups = [
    ["Calibrate, plan, save", COLOUR.work, [980, 0, 1740, 540]],
    ["The 16-bit model, prompts", COLOUR.shared, [480, 540, 400, 690]],
    ["How close is it?", COLOUR.quantized, [2760, 540, 560, 1400]],
    ["Once: unmute these (Ctrl+M), queue, mute them again", COLOUR.original, [480, 1290, 940, negative ? 760 : 400]],
  ];
  const muted = ["clip", "encode", ...(negative ? ["encodeNegative"] : [])];
  return { nodes, links, groups, muted, says };
}

/** The note of such a graph. */
export function ownModel(model, card, more = "") {
  return `# ${model}, calibrated

**First, once**: select the nodes of the muted group, unmute them (Ctrl+M), queue, and mute them again. That encodes the 64 prompts
that ship with the pack (write your own instead) and saves them, so that no later run loads a text encoder. Press R.

1. **Calibrate** samples them with the 16-bit model. Set steps, cfg, sampler and size as *you* use the model.
2. **Quantization Plan**: ${card}
3. **Save Quantized Model** rounds by what the layers saw.
4. **Compare Models** draws other seeds with both.

${more}Another file: choose it in the loader *and* in the plan.`;
}

/** Both models drawn from the same prompts and seeds. prefix: of the report's files. */
export function comparison(prefix, at) {
  return ["compare", "CalibQuantCompare", at, [520, 1400], { ...SAMPLING, prompts: 4, seeds: 1, seed: 7, filename_prefix: prefix }];
}

/** Of the nodes large, small, prompts and vae with it. */
export const COMPARED = [
  ["large", 0, "compare", "model_a"],
  ["small", 0, "compare", "model_b"],
  ["prompts", 0, "compare", "conditioning"],
  ["vae", 0, "compare", "vae"],
];
