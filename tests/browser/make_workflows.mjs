// Makes the example workflows, their API twins and their thumbnails in the real frontend.
//
//     node tests/browser/make_workflows.mjs URL_OF_A_COMFYUI_SERVER_WITH_THIS_PACK [NAME…]
//
// Environment: see page.mjs. The demo model is the only model the graphs need.
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { fit, MODEL, openPage, queueAndWait } from "./page.mjs";

const WORKFLOWS = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "workflows");
const SEED = 7;
const DIGIT = 3;
const DIGITS = 10;

const SAMPLER = { seed: SEED, control_after_generate: "fixed", steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", denoise: 1 };
const PROMPTS = { prompt_set: "digits.safetensors", index: DIGIT };
const LATENT = { width: 64, height: 64, length: 1, batch_size: 1 };
const UPSCALE = { upscale_method: "nearest-exact", width: 256, height: 256, crop: "disabled" }; // 64 pixels are hard to see

const QUANTIZE_NOTE = `# One model in, one small file out

1. **Quantization Plan** chooses a format for every layer. Try another recipe.
2. **Save Quantized Model** writes the file below \`output/diffusion_models\`. Its first output is the file's name.
3. The stock **Load Diffusion Model** takes that name and samples. Leave its \`weight_dtype\` on \`default\`.

Both rows use the same seed, so what differs between the two pictures is what quantizing cost.
The digit is the \`index\` of **Load Prompt Set**.

*For your own model*: choose its file in both nodes of step 1 and 2, and sample with the text encoder and VAE it needs.`;

// Key, node type, position, size, widget values by name.
const QUANTIZE_NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 340], { text: QUANTIZE_NOTE }],
  ["plan", "CalibQuantPlan", [500, 80], [360, 190], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [920, 80], [400, 300],
    { model_name: MODEL, filename_prefix: "calibquant/digits", verify: true }],
  ["prompts", "CalibQuantLoadPromptSet", [40, 620], [400, 110], PROMPTS],
  ["latent", "EmptyHunyuanLatentVideo", [40, 800], [400, 140], LATENT],
  ["vae", "VAELoader", [40, 1010], [400, 70], { vae_name: "calibquant_digits_vae.safetensors" }],
  ["seed", "PrimitiveInt", [40, 1150], [400, 90], { value: SEED }],
  ...row("small", 620),
  ...row("large", 1010),
];

function row(key, y) {
  return [
    [`${key}.unet`, "UNETLoader", [500, y], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
    [`${key}.sampler`, "KSampler", [920, y], [320, 270], SAMPLER],
    [`${key}.decode`, "VAEDecode", [1300, y], [260, 50], {}],
    [`${key}.scale`, "ImageScale", [1300, y + 110], [260, 150], UPSCALE],
    [`${key}.picture`, "PreviewImage", [1620, y], [280, 300], {}],
  ];
}

// From node, output, to node, input.
const QUANTIZE_LINKS = [
  ["plan", 0, "save", "plan"],
  ["save", 0, "small.unet", "unet_name"],
  ...pictured("small", "small.unet"), ...pictured("large", "large.unet"),
];

/** Links of a row whose MODEL comes from the node `model`. */
function pictured(key, model) {
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

// Title, colour, [x, y, width, height].
const QUANTIZE_GROUPS = [
  ["Quantize", "#3f789e", [480, 0, 880, 500]],
  ["Prompt, size, seed: the same for both", "#b58b2a", [20, 540, 440, 760]],
  ["The quantized file, by the stock loader", "#88A", [480, 540, 1440, 390]],
  ["The 16-bit model", "#8A8", [480, 940, 1440, 390]],
];

const CALIBRATE_NOTE = `# What does each layer see?

**Calibrate** samples the prompts itself and collects, for every layer, how large its inputs and outputs are and a sample of
its inputs. No KSampler is needed. **Save Calibration** keeps it as one file below \`output/calibrations\`.

*For your own model*: load it, link a prompt set of its text encoder (**Encode Prompt Set** makes one, with 64 prompts that
ship with the pack), and set steps, cfg, sampler and size as you use the model. 32 samples are plenty.

A cancel keeps what finished samples gave, below \`output/calibrations/unfinished\`.`;

const CALIBRATE_NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 380], { text: CALIBRATE_NOTE }],
  ["unet", "UNETLoader", [500, 80], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 250], [360, 110], PROMPTS],
  ["calibrate", "CalibQuantCalibrate", [920, 80], [360, 420],
    { samples: 20, steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", width: 64, height: 64, frames: 1,
      seed: 2000, rows: 128 }],
  ["save", "CalibQuantSaveCalibration", [1340, 80], [400, 220], { filename_prefix: "digits", merge_with: "none" }],
];
const CALIBRATE_LINKS = [
  ["unet", 0, "calibrate", "model"],
  ["prompts", 0, "calibrate", "conditioning"],
  ["calibrate", 0, "save", "calibration"],
];

const MONITOR_NOTE = `# Calibrate while you make pictures

Put **Monitor Calibration** between the model (after its LoRAs) and your sampler, and go on as ever: the pictures stay the
same, bit for bit. Each run adds to the file below \`output/calibrations\`, also after a restart.

**Save Calibration** takes a copy of what has been collected so far. Its \`after\` waits for the sampler; without
it the copy would be taken first.

Queue a few prompts and seeds: 32 runs are plenty. *reset* begins anew.`;

const MONITOR_NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 340], { text: MONITOR_NOTE }],
  ["unet", "UNETLoader", [500, 80], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
  ["monitor", "CalibQuantMonitor", [500, 250], [360, 200], { name: "digits_monitored", rows: 128, reset: false }],
  ["prompts", "CalibQuantLoadPromptSet", [500, 520], [360, 110], PROMPTS],
  ["latent", "EmptyHunyuanLatentVideo", [500, 700], [360, 140], LATENT],
  ["sampler", "KSampler", [920, 80], [320, 270], SAMPLER],
  ["vae", "VAELoader", [920, 520], [320, 70], { vae_name: "calibquant_digits_vae.safetensors" }],
  ["decode", "VAEDecode", [1300, 520], [260, 50], {}],
  ["scale", "ImageScale", [1300, 630], [260, 150], UPSCALE],
  ["picture", "PreviewImage", [1620, 520], [280, 300], {}],
  ["save", "CalibQuantSaveCalibration", [1300, 80], [400, 220], { filename_prefix: "digits_copy", merge_with: "none" }],
];
const MONITOR_LINKS = [
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

const SPLIT_NOTE = `# Below the floor of 4-bit inputs: a split

Cards that run NVFP4 (RTX 50) round a layer's *inputs* to 4 bits, too; with good weights that is most of what is lost.
**Quantization Plan** with a \`split\` sets a small 16-bit branch beside each layer, which takes it up. It needs a calibration.

**Save Quantized Model** then saves two files that belong together; the main one alone draws noise. Two ways to load them:

1. **Load Split Model** finds the LoRA by itself; bypass LoRAs of yours may follow.
2. The stock way: **Load Diffusion Model**, then **Load LoRA (Bypass, Model Only)** at strength 1. No other bypass LoRA may
follow (it would replace the branch), and never take an ordinary LoRA loader for it.

All rows use the same seed.`;

const SPLIT_NODES = [
  ["note", "MarkdownNote", [40, 0], [400, 500], { text: SPLIT_NOTE }],
  ["calibration", "CalibQuantLoadCalibration", [500, 80], [360, 110], { calibration_name: "digits.calibration.safetensors" }],
  ["plan", "CalibQuantPlan", [920, 80], [360, 400],
    { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4", split: "16" }],
  ["save", "CalibQuantQuantize", [1340, 80], [560, 400],
    { model_name: MODEL, filename_prefix: "calibquant/digits", verify: true }],
  ...QUANTIZE_NODES.filter(([key]) => ["prompts", "latent", "vae", "seed"].includes(key)),
  ...row("both", 620).filter(([key]) => key !== "both.unet"),
  ["both.unet", "CalibQuantLoadSplit", [500, 620], [360, 90], {}],
  ...row("stock", 1010),
  ["stock.lora", "LoraLoaderBypassModelOnly", [500, 1150], [360, 110], { strength_model: 1 }],
  ...row("large", 1400),
];
const SPLIT_LINKS = [
  ["calibration", 0, "plan", "calibration"],
  ["plan", 0, "save", "plan"],
  ["save", 0, "both.unet", "model_name"],
  ["save", 0, "stock.unet", "unet_name"],
  ["stock.unet", 0, "stock.lora", "model"],
  ["save", 2, "stock.lora", "lora_name"],
  ...pictured("both", "both.unet"), ...pictured("stock", "stock.lora"), ...pictured("large", "large.unet"),
];
const SPLIT_GROUPS = [
  ["Quantize with a split", "#3f789e", [480, 0, 1440, 500]],
  ["Prompt, size, seed: the same for all", "#b58b2a", [20, 540, 440, 760]],
  ["Both files, by Load Split Model", "#88A", [480, 540, 1440, 390]],
  ["Both files, by two stock nodes", "#88A", [480, 940, 1440, 380]],
  ["The 16-bit model", "#8A8", [480, 1330, 1440, 390]],
];

const EXAMPLES = [
  { name: "quantize_demo_model", nodes: QUANTIZE_NODES, links: QUANTIZE_LINKS, groups: QUANTIZE_GROUPS, thumbnail: contactSheet },
  { name: "calibrate_with_prompts", nodes: CALIBRATE_NODES, links: CALIBRATE_LINKS, groups: [], thumbnail: graphPicture },
  { name: "monitor_my_own_graph", nodes: MONITOR_NODES, links: MONITOR_LINKS, groups: [], thumbnail: graphPicture },
  { name: "split_demo_model", nodes: SPLIT_NODES, links: SPLIT_LINKS, groups: SPLIT_GROUPS, thumbnail: graphPicture },
];

function build({ nodes, links, groups }) {
  const { app, LiteGraph, LGraphGroup } = window;
  app.graph.clear();
  const made = {};
  for (const [key, type, pos, size, values] of nodes) {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets.find((w) => w.name === name) ?? (type === "MarkdownNote" ? node.widgets[0] : null);
      if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets.map((w) => w.name)}`);
      widget.value = value;
      widget.callback?.(value);
    }
    node.pos = pos;
    const least = node.computeSize();
    node.setSize([size[0], Math.max(size[1], least[1])]);
    made[key] = node;
  }
  for (const [from, output, to, input] of links) {
    const slot = made[to].inputs.findIndex((i) => i.name === input);
    if (slot < 0 || !made[from].connect(output, made[to], slot)) throw new Error(`no link ${from} -> ${to}.${input}`);
  }
  for (const [title, color, [x, y, w, h]] of groups) {
    const group = new (LGraphGroup ?? LiteGraph.LGraphGroup)(title);
    Object.assign(group, { color, pos: [x, y], size: [w, h] });
    app.graph.add(group);
  }
}

const json = (value) => JSON.stringify(value, null, 1) + "\n";

async function dataUrl(url, image) {
  const answer = await fetch(`${url}/view?${new URLSearchParams(image)}`);
  return `data:image/png;base64,${Buffer.from(await answer.arrayBuffer()).toString("base64")}`;
}

/** All ten digits by both models, one column a digit. */
async function contactSheet(page, url, output) {
  const rows = { small: [], large: [] };
  let text = "";
  for (let digit = 0; digit < DIGITS; digit++) {
    await page.evaluate((index) => {
      const node = window.app.graph.nodes.find((n) => n.type === "CalibQuantLoadPromptSet");
      node.widgets.find((w) => w.name === "index").value = index;
    }, digit);
    const { outputs } = await queueAndWait(page, url);
    for (const key of Object.keys(rows)) {
      const y = QUANTIZE_NODES.find(([name]) => name === `${key}.picture`)[2][1];
      const id = await page.evaluate((top) => String(window.app.graph.nodes.find((n) => n.type === "PreviewImage" && n.pos[1] === top).id), y);
      rows[key].push(await dataUrl(url, outputs[id].images[0]));
    }
    text = Object.values(outputs).flatMap((o) => o.text ?? []).find((t) => t.includes("layers:")) ?? text;
  }
  const [before, after] = text.match(/([\d.]+ .B) → ([\d.]+ .B)/).slice(1);
  const strip = (title, images) => `<p>${title}</p><div>${images.map((i) => `<img src="${i}">`).join("")}</div>`;
  const sheet = await page.context().browser().newPage();
  await sheet.setViewportSize({ width: 400, height: 400 }); // template cards are square
  await sheet.setContent(`<style>body{margin:0;padding:18px 32px;background:#1d1f24;color:#ddd;font:600 20px/26px sans-serif}
    p{margin:6px 0}div{display:grid;grid-template-columns:repeat(5,64px);gap:4px;margin-bottom:12px}img{width:64px}</style>
    ${strip(`16-bit · ${before}`, rows.large)}${strip(`NVFP4 · ${after}`, rows.small)}`);
  await sheet.screenshot({ path: output, type: "jpeg", quality: 85 });
  await sheet.close();
}

/** The graph after a run, above what its Save node says. */
async function graphPicture(page, url, output) {
  const { outputs } = await queueAndWait(page, url);
  const text = Object.values(outputs).flatMap((o) => o.text ?? []).find((t) => t.includes(".safetensors\n"));
  await page.keyboard.press("Escape"); // the template browser may have opened late
  await fit(page);
  const graph = (await page.screenshot({ clip: { x: 60, y: 60, width: 1840, height: 1000 } })).toString("base64");
  const sheet = await page.context().browser().newPage();
  await sheet.setViewportSize({ width: 400, height: 400 }); // template cards are square
  const lines = text.split("\n").slice(1, 5).map((line) => `<p>${line}</p>`).join("");
  await sheet.setContent(`<style>body{margin:0;background:#1d1f24;color:#ddd;font:600 15px/21px sans-serif}p{margin:8px 16px}
    img{width:400px;height:217px;margin:12px 0}</style><img src="data:image/png;base64,${graph}">${lines}`);
  await sheet.screenshot({ path: output, type: "jpeg", quality: 80 });
  await sheet.close();
}

const [url, ...wanted] = process.argv.slice(2);
if (!url) throw new Error("usage: make_workflows.mjs URL [NAME…]");
const { browser, page } = await openPage(url);
try {
  mkdirSync(join(WORKFLOWS, "api"), { recursive: true });
  for (const { name, nodes, links, groups, thumbnail } of EXAMPLES) {
    if (wanted.length && !wanted.includes(name)) continue;
    await page.evaluate(build, { nodes, links, groups });
    await fit(page);
    const { workflow, output } = await page.evaluate(() => window.app.graphToPrompt());
    writeFileSync(join(WORKFLOWS, `${name}.json`), json(workflow));
    writeFileSync(join(WORKFLOWS, "api", `${name}.json`), json(output));
    await thumbnail(page, url, join(WORKFLOWS, `${name}.jpg`));
  }
} finally {
  await browser.close();
}
