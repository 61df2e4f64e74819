// Makes the example workflows, their API twins and their thumbnails in the real frontend.
//
//     node tests/browser/make_workflows.mjs URL_OF_A_COMFYUI_SERVER_WITH_THIS_PACK [NAME…]
//
// Environment: see page.mjs; SHOTS, a folder for a large picture of each graph, to look at. One file of graphs/ each; parts.mjs says how they are written.
import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { fit, openPage, queueAndWait } from "./page.mjs";

const HERE = dirname(fileURLToPath(import.meta.url));
const WORKFLOWS = join(HERE, "..", "..", "workflows");
const DIGITS = 10;

function build({ nodes, links, groups, muted = [] }) {
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
    if (muted.includes(key)) node.mode = 2; // never runs
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
async function contactSheet(page, url, output, graph) {
  const rows = { small: [], large: [] };
  let text = "";
  for (let digit = 0; digit < DIGITS; digit++) {
    await page.evaluate((index) => {
      const node = window.app.graph.nodes.find((n) => n.type === "CalibQuantLoadPromptSet");
      node.widgets.find((w) => w.name === "index").value = index;
    }, digit);
    const { outputs } = await queueAndWait(page, url);
    for (const key of Object.keys(rows)) {
      const y = graph.nodes.find(([name]) => name === `${key}.picture`)[2][1];
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

/** A square picture: an image, shown from its top, above lines of text. */
async function card(page, output, image, height, lines, size) {
  const sheet = await page.context().browser().newPage();
  await sheet.setViewportSize({ width: 400, height: 400 }); // as template cards are
  const text = lines.map((line) => `<p>${line.replaceAll("&", "&amp;").replaceAll("<", "&lt;")}</p>`).join("");
  await sheet.setContent(`<style>body{margin:0;background:#1d1f24;color:#ddd;font:600 ${size}px/1.35 sans-serif}p{margin:8px 16px}
    img{width:400px;height:${height}px;object-fit:${lines.length ? "contain" : "cover"};object-position:top;margin-bottom:8px;display:block}</style><img src="${image}">${text}`);
  await sheet.screenshot({ path: output, type: "jpeg", quality: 80 });
  await sheet.close();
}

/** The nodes and groups, and nothing of the page around them. */
async function graphShot(page) {
  await page.keyboard.press("Escape"); // the template browser may have opened late
  await fit(page);
  const clip = await page.evaluate(() => {
    const { graph, canvas } = window.app;
    const boxes = [...graph.nodes, ...graph.groups].map((one) => [...one.pos, one.pos[0] + one.size[0], one.pos[1] + one.size[1]]);
    const edge = (i, pick) => (pick(...boxes.map((box) => box[i])) + canvas.ds.offset[i % 2]) * canvas.ds.scale;
    const [x, y] = [edge(0, Math.min) - 8, edge(1, Math.min) - 8];
    const frame = canvas.canvas.getBoundingClientRect();
    return { x: x + frame.x, y: y + frame.y, width: edge(2, Math.max) + 8 - x, height: edge(3, Math.max) + 8 - y };
  });
  const shot = await page.screenshot({ clip });
  return `data:image/png;base64,${shot.toString("base64")}`;
}

/** What a run tells: the pictures of a comparison, or the graph, above what its last node says. */
async function picture(page, url, output, graph) {
  if (graph.says) return card(page, output, await graphShot(page), 217, graph.says, 26);
  const outputs = Object.values((await queueAndWait(page, url)).outputs);
  const compared = outputs.find((o) => o.calibquant_compare);
  if (compared) return card(page, output, await dataUrl(url, compared.images[0]), 400, [], 0); // it begins with the verdict
  const texts = outputs.flatMap((o) => o.text ?? []);
  const text = texts.find((t) => t.includes(".safetensors\n")) ?? texts.at(-1);
  return card(page, output, await graphShot(page), 217, text.split("\n").slice(text.includes(".safetensors\n") ? 1 : 0).slice(0, 4), 15);
}

async function largeShot(page, path) {
  const before = page.viewportSize();
  await page.setViewportSize({ width: 3200, height: 1600 });
  await fit(page);
  await page.screenshot({ path });
  await page.setViewportSize(before);
}

const [url, ...wanted] = process.argv.slice(2);
if (!url) throw new Error("usage: make_workflows.mjs URL [NAME…]");
const names = readdirSync(join(HERE, "graphs")).map((file) => file.replace(".mjs", "")).filter((name) => name !== "parts");
const { browser, page } = await openPage(url);
try {
  mkdirSync(join(WORKFLOWS, "api"), { recursive: true });
  for (const name of wanted.length ? wanted : names) {
    const { default: graph } = await import(`./graphs/${name}.mjs`);
    await page.evaluate(build, graph);
    await fit(page);
    const { workflow, output } = await page.evaluate(() => window.app.graphToPrompt());
    writeFileSync(join(WORKFLOWS, `${name}.json`), json(workflow));
    writeFileSync(join(WORKFLOWS, "api", `${name}.json`), json(output));
    const thumbnail = graph.thumbnail === "digits" ? contactSheet : picture;
    await thumbnail(page, url, join(WORKFLOWS, `${name}.jpg`), graph);
    if (process.env.SHOTS) await largeShot(page, join(process.env.SHOTS, `flow_${name}.png`));
  }
} finally {
  await browser.close();
}
