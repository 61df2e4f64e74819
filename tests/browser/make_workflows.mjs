// Makes workflows/quantize_demo_model.json, its API twin and its thumbnail in the real frontend.
//
//     node tests/browser/make_workflows.mjs URL_OF_A_COMFYUI_SERVER_WITH_THIS_PACK
//
// Environment: see page.mjs. The demo model is the only model the graph needs.
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { fit, MODEL, openPage, queueAndWait } from "./page.mjs";

const WORKFLOWS = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "workflows");
const NAME = "quantize_demo_model";
const SEED = 7;
const DIGIT = 3;
const DIGITS = 10;

const NOTE = `# One model in, one small file out

1. **Quantization Plan** chooses a format for every layer. Try another recipe.
2. **Save Quantized Model** writes the file below \`output/diffusion_models\`. Its first output is the file's name.
3. The stock **Load Diffusion Model** takes that name and samples. Leave its \`weight_dtype\` on \`default\`.

Both rows use the same seed, so what differs between the two pictures is what quantizing cost.
The digit is the \`index\` of **Load Prompt Set**.

*For your own model*: choose its file in both nodes of step 1 and 2, and sample with the text encoder and VAE it needs.`;

// Key, node type, position, size, widget values by name.
const NODES = [
  ["note", "MarkdownNote", [40, 80], [400, 340], { text: NOTE }],
  ["plan", "CalibQuantPlan", [500, 80], [360, 190], { model_name: MODEL, strategy: "recipe", "strategy.recipe": "nvfp4" }],
  ["save", "CalibQuantQuantize", [920, 80], [400, 300],
    { model_name: MODEL, filename_prefix: "calibquant/digits", verify: true }],
  ["prompts", "CalibQuantLoadPromptSet", [40, 620], [400, 110], { prompt_set: "digits.safetensors", index: DIGIT }],
  ["latent", "EmptyHunyuanLatentVideo", [40, 800], [400, 140], { width: 64, height: 64, length: 1, batch_size: 1 }],
  ["vae", "VAELoader", [40, 1010], [400, 70], { vae_name: "calibquant_digits_vae.safetensors" }],
  ["seed", "PrimitiveInt", [40, 1150], [400, 90], { value: SEED }],
  ...row("small", 620),
  ...row("large", 1010),
];

function row(key, y) {
  const sampler = { seed: SEED, control_after_generate: "fixed", steps: 12, cfg: 1, sampler_name: "euler", scheduler: "simple", denoise: 1 };
  return [
    [`${key}.unet`, "UNETLoader", [500, y], [360, 90], { unet_name: MODEL, weight_dtype: "default" }],
    [`${key}.sampler`, "KSampler", [920, y], [320, 270], sampler],
    [`${key}.decode`, "VAEDecode", [1300, y], [260, 50], {}],
    [`${key}.scale`, "ImageScale", [1300, y + 110], [260, 150],
      { upscale_method: "nearest-exact", width: 256, height: 256, crop: "disabled" }], // 64 pixels are hard to see
    [`${key}.picture`, "PreviewImage", [1620, y], [280, 300], {}],
  ];
}

// From node, output, to node, input.
const LINKS = [
  ["plan", 0, "save", "plan"],
  ["save", 0, "small.unet", "unet_name"],
  ...["small", "large"].flatMap((key) => [
    ["seed", 0, `${key}.sampler`, "seed"],
    [`${key}.unet`, 0, `${key}.sampler`, "model"],
    ["prompts", 1, `${key}.sampler`, "positive"],
    ["prompts", 1, `${key}.sampler`, "negative"], // unused: cfg is 1
    ["latent", 0, `${key}.sampler`, "latent_image"],
    [`${key}.sampler`, 0, `${key}.decode`, "samples"],
    ["vae", 0, `${key}.decode`, "vae"],
    [`${key}.decode`, 0, `${key}.scale`, "image"],
    [`${key}.scale`, 0, `${key}.picture`, "images"],
  ]),
];

// Title, colour, [x, y, width, height].
const GROUPS = [
  ["Quantize", "#3f789e", [480, 0, 880, 500]],
  ["Prompt, size, seed: the same for both", "#b58b2a", [20, 540, 440, 760]],
  ["The quantized file, by the stock loader", "#88A", [480, 540, 1440, 390]],
  ["The 16-bit model", "#8A8", [480, 940, 1440, 390]],
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
      const y = NODES.find(([name]) => name === `${key}.picture`)[2][1];
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

const url = process.argv[2];
if (!url) throw new Error("usage: make_workflows.mjs URL");
const { browser, page } = await openPage(url);
try {
  await page.evaluate(build, { nodes: NODES, links: LINKS, groups: GROUPS });
  await fit(page);
  const { workflow, output } = await page.evaluate(() => window.app.graphToPrompt());
  mkdirSync(join(WORKFLOWS, "api"), { recursive: true });
  writeFileSync(join(WORKFLOWS, `${NAME}.json`), json(workflow));
  writeFileSync(join(WORKFLOWS, "api", `${NAME}.json`), json(output));
  await contactSheet(page, url, join(WORKFLOWS, `${NAME}.jpg`));
} finally {
  await browser.close();
}
