// What nodes say reaches them: in subgraphs, in the tab that asked, after a tab was left, after a mistake was mended.
//
//     node tests/browser/check_words.mjs URL [FOLDER_FOR_SCREENSHOTS]
//
// Prints one line per check; the exit status is 1 if any failed. Environment: see page.mjs.
import { join } from "node:path";
import { MODEL, checks, closeDialog, fit, openPage, queueAndWait } from "./page.mjs";

const WRONG = "zimage-nvfp4-mixed"; // a recipe that is not for the demo model
const SAMPLES = 4000; // more than anybody waits for
const [url, shots] = process.argv.slice(2);
if (!url) throw new Error("usage: check_words.mjs URL [FOLDER_FOR_SCREENSHOTS]");
const check = (...told) => checks.check(...told);

/** In the page: an empty graph with one of our nodes, its widgets set, whose last output a PreviewAny takes. */
function build({ type, values }) {
  window.app.graph.clear();
  const [node, sink] = [type, "PreviewAny"].map((name) => window.LiteGraph.createNode(name));
  for (const [i, each] of [node, sink].entries()) {
    each.pos = [100 + 700 * i, 100];
    window.app.graph.add(each);
  }
  for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
  node.connect(node.outputs.length - 1, sink, 0);
}

/** In the page: what the nodes of the open graph and of its subgraphs say, by the node's id. */
function texts() {
  const all = (graph) => graph.nodes.flatMap((n) => [n, ...(n.subgraph ? all(n.subgraph) : [])]);
  const words = (node) => node.widgets?.find((w) => w.name === "calibquant_result")?.element.textContent ?? "";
  return all(window.app.rootGraph).filter((n) => n.comfyClass?.startsWith("CalibQuant")).map((n) => `${n.id}:${words(n)}`);
}

const plan = (recipe) => ({ type: "CalibQuantPlan", values: { model_name: MODEL, "strategy.recipe": recipe } });
const set = (page, name, value) => page.evaluate(([n, v]) => {
  window.app.graph.nodes[0].widgets.find((w) => w.name === n).value = v;
}, [name, value]);
const command = (page, name) => page.evaluate((id) => window.app.extensionManager.command.execute(id), name);
const quietly = (page) => queueAndWait(page, url).catch(() => page.waitForTimeout(1000));

async function openTab(page, index) {
  await page.locator(".workflow-label").nth(index).click();
  await page.waitForTimeout(1000);
}

async function post(path, body) {
  const answer = await fetch(url + path, { method: "POST", body: JSON.stringify(body) });
  return answer.json().catch(() => null);
}

/** Keeps the server busy until it is interrupted. */
function holdQueue() {
  const calibrate = {
    model: ["1", 0], conditioning: ["2", 0], samples: SAMPLES, steps: 50, cfg: 1, sampler_name: "euler", scheduler: "simple",
    width: 64, height: 64, frames: 1, seed: 0, rows: 0,
  };
  return post("/prompt", { prompt: {
    1: { class_type: "UNETLoader", inputs: { unet_name: MODEL, weight_dtype: "default" } },
    2: { class_type: "CalibQuantLoadPromptSet", inputs: { prompt_set: "digits.safetensors", index: 0 } },
    3: { class_type: "CalibQuantCalibrate", inputs: calibrate },
    4: { class_type: "PreviewAny", inputs: { source: ["3", 0] } },
  } });
}

async function checkMended(name, page) {
  await page.evaluate(build, { type: "CalibQuantLoadPromptSet", values: { prompt_set: "digits.safetensors", index: 10 } });
  await quietly(page);
  const [wrong] = await page.evaluate(texts);
  check(`${name}: an error is told in the node's words`, wrong.endsWith("must be below that (digits.safetensors)"), wrong);
  await set(page, "index", 3);
  await queueAndWait(page, url);
  const [mended] = await page.evaluate(texts);
  check(`${name}: it goes away with the mistake`, mended.split(":")[1] === "", mended);
}

async function checkSubgraph(name, page) {
  await page.evaluate(build, plan(WRONG));
  await page.evaluate(() => window.app.graph.convertToSubgraph(new Set(window.app.graph.nodes)));
  await quietly(page);
  const [told] = await page.evaluate(texts);
  check(`${name}: an error inside a subgraph is on its node`, told?.includes("is for zimage"), told);
  await page.evaluate(() => window.app.canvas.setGraph(window.app.graph.nodes[0].subgraph));
  await fit(page);
  const seen = await page.locator(".calibquant-result").filter({ hasText: "is for zimage" }).count();
  check(`${name}: where it can be seen`, seen === 1, seen);
  if (shots) await page.screenshot({ path: join(shots, `words_${name}_subgraph.png`) });
  await page.evaluate(() => window.app.canvas.setGraph(window.app.rootGraph));
}

async function checkTabs(name, page) {
  await page.evaluate(build, plan("nvfp4"));
  await holdQueue();
  const first = await page.evaluate(async () => {
    const queued = new Promise((resolve) => window.app.api.addEventListener("promptQueued", resolve, { once: true }));
    await window.app.queuePrompt(0, 1);
    await queued;
    return window.app.graph.nodes[0].id;
  });
  await command(page, "Comfy.NewBlankWorkflow");
  await page.waitForTimeout(1000);
  await page.evaluate(build, plan("mxfp8"));
  const second = await page.evaluate(() => window.app.graph.nodes[0].id);
  await post("/interrupt", {});
  for (let left = 100; left && (await (await fetch(`${url}/prompt`)).json()).exec_info.queue_remaining; left -= 1) {
    await page.waitForTimeout(200);
  }
  await page.waitForTimeout(1000);
  const [empty] = await page.evaluate(texts);
  check(`${name}: another tab's result is not written on a node of the same number`, first === second && empty === `${second}:`,
    [first, empty]);
  await queueAndWait(page, url);
  const [own] = await page.evaluate(texts);
  check(`${name}: a tab has its own result`, own.includes("MXFP8"), own);
  await openTab(page, 0);
  const [back] = await page.evaluate(texts);
  check(`${name}: what came meanwhile is on its node`, back.includes("NVFP4"), back);
  if (shots) await page.screenshot({ path: join(shots, `words_${name}_tab.png`) });
  await openTab(page, 1);
  const [again] = await page.evaluate(texts);
  check(`${name}: and the other tab kept its own`, again.includes("MXFP8"), again);
}

async function checkCancel(name, page) {
  await page.evaluate(build, { type: "CalibQuantCalibrate", values: { samples: SAMPLES, steps: 2, width: 64, height: 64, rows: 0 } });
  await page.evaluate((model) => {
    const [loader, prompts] = ["UNETLoader", "CalibQuantLoadPromptSet"].map((type) => window.LiteGraph.createNode(type));
    for (const node of [loader, prompts]) window.app.graph.add(node);
    loader.widgets[0].value = model;
    prompts.widgets[0].value = "digits.safetensors";
    const [calibrate] = window.app.graph.nodes;
    loader.connect(0, calibrate, 0);
    prompts.connect(0, calibrate, 1);
  }, MODEL);
  const ended = quietly(page);
  await page.waitForFunction(() => /sample [3-9]/.test(document.body.textContent), null, { timeout: 60_000 });
  await post("/interrupt", {});
  await ended;
  const [told] = await page.evaluate(texts);
  check(`${name}: a cancel says what was kept and where`,
    /cancelled: \d+ of 4000 samples are in output\/calibrations\/unfinished\/[\w.]+$/.test(told), told);
  if (shots) await page.screenshot({ path: join(shots, `words_${name}_cancel.png`) });
}

async function run(name, vue) {
  const { browser, page, errors } = await openPage(url, { vue });
  try {
    await closeDialog(page);
    await checkMended(name, page);
    await checkSubgraph(name, page);
    await checkTabs(name, page);
    await checkCancel(name, page);
    check(`${name}: no error in the page`, errors.length === 0, errors);
  } finally {
    await browser.close();
  }
}

await run("canvas", false);
await run("vue", true);
process.exit(checks.failed ? 1 : 0);
