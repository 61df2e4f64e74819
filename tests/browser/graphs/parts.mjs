// What the example graphs share. A node is [key, type, [x, y], [width, height], {widget: value}], a link [from, output, to,
// input], a group [title, colour, [x, y, width, height]]; make_workflows.mjs builds them in the frontend.
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

/** What all rows of pictures share: prompt, size, decoder, seed. */
export function shared(x, y) {
  return [
    ["prompts", "CalibQuantLoadPromptSet", [x, y], [400, 110], PROMPTS],
    ["latent", "EmptyHunyuanLatentVideo", [x, y + 180], [400, 140], LATENT],
    ["vae", "VAELoader", [x, y + 390], [400, 70], VAE],
    ["seed", "PrimitiveInt", [x, y + 530], [400, 90], { value: SEED }],
  ];
}

/** A model and the picture that it draws, from left to right. */
export function row(key, y) {
  return [
    [`${key}.unet`, "UNETLoader", [500, y], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
    [`${key}.sampler`, "KSampler", [920, y], [320, 270], SAMPLER],
    [`${key}.decode`, "VAEDecode", [1300, y], [260, 50], {}],
    [`${key}.scale`, "ImageScale", [1300, y + 110], [260, 150], UPSCALE],
    [`${key}.picture`, "PreviewImage", [1620, y], [280, 300], {}],
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
