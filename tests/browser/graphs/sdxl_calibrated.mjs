import { calibrated, ownModel } from "./parts.mjs";

export default calibrated({
  note: ownModel("SDXL", "`int8`, which RTX 20 and newer run. For RTX 40 and 50 `fp8` does as well.",
    "The file is an all-in-one checkpoint: its text encoders and VAE are copied as they are. The negative prompt is a set of one.\n\n"),
  prefix: "sdxl",
  loader: ["CheckpointLoaderSimple", "ckpt_name", "sd_xl_base_1.0.safetensors"],
  encoder: ["CheckpointLoaderSimple", { ckpt_name: "sd_xl_base_1.0.safetensors" }],
  sampling: { steps: 25, cfg: 7, sampler_name: "dpmpp_2m", scheduler: "karras", width: 1024, height: 1024, frames: 1 },
  calibrate: { samples: 32, seed: 1000 },
  plan: "int8",
  negative: "blurry, low quality, deformed",
  says: ["SDXL base", "INT8, calibrated", "RTX 20 and newer"],
});
