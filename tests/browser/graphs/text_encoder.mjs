import { COLOUR } from "./parts.mjs";

const FILE = "qwen_3_4b.safetensors";
const LOADED = { type: "lumina2", device: "default" };

export default {
  nodes: [
    ["note", "MarkdownNote", [40, 80], [400, 520], { text: `# A text encoder, small

Z-Image's text encoder has 8 GB, more than the quantized model. ComfyUI multiplies encoders in 16 bit on every card: what you
gain is memory, not speed.

1. **Calibrate Text Encoder** encodes 64 prompts that ship with the pack (or yours) and collects what the layers see.
2. **Quantization Plan**: NVFP4 is the smallest. For less loss take \`int8\` or \`mxfp8\`.
3. **Save Quantized Model** rounds by what the layers saw and saves below \`output/clip\`, where Load CLIP finds it.
4. **Compare Text Encoders** encodes 16 other prompts with both.

Another encoder: choose its file and type in *Load CLIP* (both) and its file in the plan. CLIP-L, CLIP-G and small T5s cannot be
loaded quantized.` }],
    ["large", "CLIPLoader", [500, 620], [360, 130], { clip_name: FILE, ...LOADED }],
    ["calibrate", "CalibQuantCalibrateClip", [1000, 80], [360, 420], { rows: 2048 }],
    ["plan", "CalibQuantPlan", [1420, 80], [400, 420], { model_name: `text_encoders/${FILE}`, strategy: "recipe", "strategy.recipe": "nvfp4" }],
    ["save", "CalibQuantQuantize", [1880, 80], [400, 420], { filename_prefix: "calibquant/qwen_3_4b", verify: true }],
    ["small", "CLIPLoader", [2340, 80], [360, 130], LOADED],
    ["compare", "CalibQuantCompareClip", [2780, 620], [460, 700], { filename_prefix: "qwen_3_4b" }],
  ],
  links: [
    ["large", 0, "calibrate", "clip"],
    ["calibrate", 0, "plan", "calibration"],
    ["plan", 0, "save", "plan"],
    ["save", 0, "small", "clip_name"],
    ["large", 0, "compare", "clip_a"],
    ["small", 0, "compare", "clip_b"],
  ],
  groups: [
    ["Calibrate, plan, save", COLOUR.work, [980, 0, 1740, 540]],
    ["The 16-bit encoder", COLOUR.shared, [480, 540, 400, 230]],
    ["How close is it?", COLOUR.quantized, [2760, 540, 500, 800]],
  ],
  says: ["A text encoder", "NVFP4, calibrated", "8 GB → 2.8 GB"],
};
