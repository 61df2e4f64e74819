// Runs Probe Model Weights on a model and checks its heatmap and table as a user sees them, in both renderers.
//
//     node tests/browser/check_heatmap.mjs URL MODEL EVEN [FOLDER_FOR_SCREENSHOTS]
//
// MODEL must have some 30 blocks, so that its map can be wider than a node; all layers of EVEN are alike. Prints one line per check; the exit status is
// 1 if any failed. Environment: see page.mjs.
import { join } from "node:path";
import { MODEL as SMALL, checks, closeDialog, fit, openPage, queueAndWait } from "./page.mjs";

const [url, model, even, shots] = process.argv.slice(2);
if (!even) throw new Error("usage: check_heatmap.mjs URL MODEL EVEN [FOLDER_FOR_SCREENSHOTS]");

const check = (...told) => checks.check(...told);

function addNode(name) {
  window.app.graph.clear();
  const node = window.LiteGraph.createNode("CalibQuantProbe");
  node.pos = [100, 100];
  window.app.graph.add(node);
  node.widgets.find((w) => w.name === "model_name").value = name;
}

/** What the map shows: every layer's colour and value of one field of the node's output. */
function readMap(field) {
  const node = window.app.graph.nodes[0];
  const [raw] = window.app.nodeOutputs[node.id].calibquant_probe;
  const boxes = [...document.querySelectorAll(".calibquant-heatmap .cq-layer")];
  return {
    inData: raw.layers.length,
    boxes: boxes.map((b) => ({
      name: b.layer.name,
      kept: b.classList.contains("cq-kept"),
      protected: Boolean(b.layer.protected),
      value: field === "errors" ? b.layer.errors[0][0] : b.layer[field],
      colour: b.style.background,
      width: b.getBoundingClientRect().width,
    })),
    rows: [...document.querySelectorAll(".calibquant-heatmap .cq-label")].map((l) => l.textContent),
    legend: ["least", "most"].map((end) => document.querySelector(`.calibquant-heatmap .cq-${end}`)?.textContent),
    table: [...document.querySelectorAll(".calibquant-heatmap tbody tr")].map((r) => [...r.cells].map((c) => c.textContent)),
    position: [...node.pos],
    saved: JSON.stringify(window.app.graph.serialize()),
  };
}

/** The brighter the colour the larger the value: the luminance of viridis only rises. */
function ordered(boxes) {
  const light = (colour) => colour.match(/\d+/g).map(Number).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const sorted = boxes.filter((b) => !b.kept).sort((a, b) => a.value - b.value);
  return sorted.every((b, i) => i === 0 || light(b.colour) >= light(sorted[i - 1].colour) - 1);
}

async function checkMap(name, page) {
  const seen = await page.evaluate(readMap, "errors");
  check(`${name}: every layer is on the map once`, seen.inData > 0 && new Set(seen.boxes.map((b) => b.name)).size === seen.inData
    && seen.boxes.length === seen.inData, seen.boxes.length);
  check(`${name}: protected layers and no others are hatched`, seen.boxes.every((b) => b.kept === b.protected), seen.boxes);
  check(`${name}: boxes can be seen`, seen.boxes.every((b) => b.width >= 6), seen.boxes.map((b) => b.width));
  check(`${name}: a larger error is brighter`, ordered(seen.boxes), seen.boxes);
  check(`${name}: the workflow file does not hold the result`, !seen.boxes.some((b) => seen.saved.includes(b.name)), seen.saved.length);
  await page.locator(".calibquant-heatmap select").selectOption("kurtosis");
  const kurtosis = await page.evaluate(readMap, "kurtosis");
  check(`${name}: another measure, another colouring`, ordered(kurtosis.boxes) && !ordered(kurtosis.boxes.map((b, i) => ({ ...b, value: seen.boxes[i].value }))));
  check(`${name}: the legend follows`, kurtosis.legend.every((text, i) => text && text !== seen.legend[i]), kurtosis.legend);
  check(`${name}: the workflow file holds the choice`, kurtosis.saved.includes('"calibquant_metric":"kurtosis"'));
  return seen;
}

async function checkTooltip(name, page) {
  const boxes = page.locator(".calibquant-heatmap .cq-layer");
  await boxes.nth(3).hover();
  const tooltip = page.locator(".calibquant-tooltip");
  const [text, layer] = [await tooltip.textContent(), await boxes.nth(3).evaluate((b) => b.layer)];
  const error = (1e4 * layer.errors[0][0]).toPrecision(3);
  check(`${name}: the tooltip tells name, shape and error`,
    text.startsWith(layer.name) && text.includes(layer.shape.join(" × ")) && text.includes(error), text);
  if (shots) await page.screenshot({ path: join(shots, `heatmap_${name}.png`) });
  await page.mouse.move(5, 5);
  check(`${name}: the tooltip goes away`, (await tooltip.count()) === 0);
}

async function checkTable(name, page, before) {
  const means = before.table.map((row) => Number(row[3]));
  check(`${name}: the table begins with the largest NVFP4 error`, means.every((m, i) => i === 0 || m <= means[i - 1]), means);
  const head = page.locator(".calibquant-heatmap th");
  await head.nth(0).click();
  const names = (await page.evaluate(readMap, "errors")).table.map((row) => row[0]);
  check(`${name}: a click on a title sorts by it`, names.every((n, i) => i === 0 || n.localeCompare(names[i - 1]) >= 0), names);
  const { x, y } = await head.nth(1).boundingBox();
  await page.mouse.move(x + 5, y + 5);
  await page.mouse.down();
  await page.mouse.move(x + 60, y + 60, { steps: 5 });
  await page.mouse.up();
  const after = await page.evaluate(readMap, "errors");
  check(`${name}: a press on the table does not drag the node`, after.position.join() === before.position.join(), after.position);
}

async function checkNarrow(name, page) {
  await page.evaluate(() => {
    const node = window.app.graph.nodes[0];
    node.setSize([300, node.size[1]]);
    node.setDirtyCanvas(true, true);
  });
  await page.waitForTimeout(700);
  const moved = await page.evaluate(() => {
    const scroll = document.querySelector(".calibquant-heatmap .cq-scroll");
    scroll.scrollLeft = 60;
    const [label, map] = [scroll.querySelector(".cq-label"), scroll].map((e) => e.getBoundingClientRect().left);
    return { wide: scroll.scrollWidth > scroll.clientWidth, left: scroll.scrollLeft, label: Math.round(label - map) };
  });
  check(`${name}: a map wider than its node scrolls under its labels`, moved.wide && moved.left > 0 && moved.label === 0, moved);
}

/** Turns the wheel over a box; where the box was scrolled to, and whether the canvas moved. */
async function turnWheel(page, selector, x, y) {
  const place = await page.locator(selector).first().boundingBox();
  await page.mouse.move(place.x + place.width / 2, place.y + place.height / 2);
  const view = () => page.evaluate(() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset].join());
  const before = await view();
  await page.mouse.wheel(x, y);
  await page.waitForTimeout(500);
  const to = await page.locator(selector).first().evaluate((e) => [e.scrollLeft, e.scrollTop]);
  return { to, moved: (await view()) !== before };
}

async function checkWheel(name, page) {
  await page.evaluate(() => {
    document.querySelector(".calibquant-heatmap .cq-scroll").scrollLeft = 0;
    document.querySelector(".calibquant-heatmap .cq-table").style.maxHeight = "60px";
  });
  const down = await turnWheel(page, ".calibquant-heatmap .cq-table", 0, 50);
  check(`${name}: the wheel scrolls the table and not the canvas`, down.to[1] > 0 && !down.moved, down);
  const sideways = await turnWheel(page, ".calibquant-heatmap .cq-scroll", 40, 0);
  check(`${name}: the wheel scrolls the map sideways`, sideways.to[0] > 0 && !sideways.moved, sideways);
}

async function checkWidening(name, page) {
  const width = () => page.evaluate(() => window.app.graph.nodes[0].size[0]);
  const choose = (value) => page.evaluate((v) => {
    window.app.graph.nodes[0].widgets.find((w) => w.name === "model_name").value = v;
  }, value);
  await choose(SMALL);
  await queueAndWait(page, url);
  const small = await width();
  await choose(even);
  await queueAndWait(page, url);
  const [note, colours] = await page.evaluate(() => [document.querySelector(".cq-note").textContent,
    new Set([...document.querySelectorAll(".cq-layer:not(.cq-kept)")].map((e) => e.style.background)).size]);
  check(`${name}: differences within the sample's noise are one colour and called flat`, note.includes("flat") && colours === 1, [note, colours]);
  await choose(model);
  await queueAndWait(page, url);
  check(`${name}: and no others`, !(await page.locator(".cq-note").textContent()).includes("flat"));
  check(`${name}: a second model with more blocks widens the node`, (await width()) > small, [small, await width()]);
}

async function checkReturn(name, page) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
  await page.waitForTimeout(1000);
  const gone = await page.locator(".calibquant-heatmap").count();
  await page.locator(".workflow-label").first().click();
  const back = await page.locator(".calibquant-heatmap").waitFor({ timeout: 10_000 }).then(() => true, () => false);
  const choice = back && (await page.locator(".calibquant-heatmap select").inputValue());
  check(`${name}: the map is there again when its workflow is`, gone === 0 && choice === "kurtosis", [gone, choice]);
}

async function run(name, vue) {
  const { browser, page, errors } = await openPage(url, { vue, width: 1500, height: 1250 });
  try {
    await closeDialog(page);
    await page.evaluate(addNode, model);
    await checkWidening(name, page);
    await fit(page);
    const seen = await checkMap(name, page);
    await checkTooltip(name, page);
    await checkTable(name, page, seen);
    await checkNarrow(name, page);
    await checkWheel(name, page);
    await checkReturn(name, page);
    check(`${name}: no error in the page`, errors.length === 0, errors);
  } finally {
    await browser.close();
  }
}

await run("canvas", false);
await run("vue", true);
process.exit(checks.failed ? 1 : 0);
