import { calibrated, ownModel } from "./parts.mjs";

export default calibrated({
  note: ownModel("Flux.1 dev", "`nvfp4`, for RTX 50. For RTX 40 take `fp8`, for RTX 30 and 20 `int8`."),
  prefix: "flux",
  loader: ["UNETLoader", "unet_name", "flux1-dev.safetensors"],
  encoder: ["DualCLIPLoader", { clip_name1: "clip_l.safetensors", clip_name2: "t5xxl_fp16.safetensors", type: "flux" }],
  vae: "ae.safetensors",
  sampling: { steps: 20, cfg: 1, sampler_name: "euler", scheduler: "simple", width: 1024, height: 1024, frames: 1 },
  calibrate: { samples: 32, seed: 1000 },
  plan: "nvfp4",
  says: ["Flux.1 dev", "NVFP4, calibrated", "RTX 50"],
});
