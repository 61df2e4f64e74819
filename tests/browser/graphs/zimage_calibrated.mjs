import { calibrated, ownModel } from "./parts.mjs";

export default calibrated({
  note: ownModel("Z-Image Turbo", "the published mix of NVFP4 and MXFP8, for RTX 50. For RTX 40 take `fp8`, for RTX 30 and 20 `int8`."),
  prefix: "zimage",
  loader: ["UNETLoader", "unet_name", "z_image_turbo_bf16.safetensors"],
  encoder: ["CLIPLoader", { clip_name: "qwen_3_4b.safetensors", type: "lumina2" }],
  vae: "ae.safetensors",
  sampling: { steps: 8, cfg: 1, sampler_name: "res_multistep", scheduler: "simple", width: 1024, height: 1024, frames: 1 },
  calibrate: { samples: 32, seed: 1000 },
  plan: "zimage-nvfp4-mixed",
  says: ["Z-Image Turbo", "NVFP4 and MXFP8, calibrated", "RTX 50"],
});
