import { calibrated, ownModel } from "./parts.mjs";

export default calibrated({
  note: ownModel("Wan 2.1 text to video", "`fp8`, for RTX 40 and newer. For RTX 50 take `nvfp4` or `mxfp8`, for RTX 30 and 20 `int8`.",
    "The negative prompt is a set of one. Videos take time: 16 samples of 33 frames say enough.\n\n"),
  prefix: "wan",
  loader: ["UNETLoader", "unet_name", "wan2.1_t2v_1.3B_fp16.safetensors"],
  encoder: ["CLIPLoader", { clip_name: "umt5_xxl_fp8_e4m3fn_scaled.safetensors", type: "wan" }],
  vae: "wan_2.1_vae.safetensors",
  sampling: { steps: 30, cfg: 6, sampler_name: "uni_pc", scheduler: "simple", width: 832, height: 480, frames: 33 },
  calibrate: { samples: 16, seed: 1000 },
  plan: "fp8",
  negative: "blurry, low quality, overexposed, static, subtitles, deformed",
  says: ["Wan 2.1 1.3B", "FP8, calibrated", "RTX 40 and newer"],
});
