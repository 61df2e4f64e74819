// Runs Quantization Plan on a model and edits its map as a user does, in both renderers.
//
//     node tests/browser/check_plan_map.mjs URL MODEL [FOLDER_FOR_SCREENSHOTS]
//
// MODEL: in Z-Image's layout, with some blocks. Prints one line per check; the exit status is 1 if any failed. Environment:
// see page.mjs.
import { join } from "node:path";
import { checks, closeDialog, fit, openPage, queueAndWait } from "./page.mjs";

const [url, model, shots] = process.argv.slice(2);
if (!model) throw new Error("usage: check_plan_map.mjs URL MODEL [FOLDER_FOR_SCREENSHOTS]");
const check = (...told) => checks.check(...told);
const MAP = ".calibquant-plan .cq-map";

function build([name, strategy]) {
  window.app.graph.clear();
  const [node, sink] = ["CalibQuantPlan", "PreviewAny"].map((type) => window.LiteGraph.createNode(type));
  for (const [i, each] of [node, sink].entries()) {
    each.pos = [100 + 1000 * i, 100];
    window.app.graph.add(each);
  }
  const set = (widget, value) => (node.widgets.find((w) => w.name === widget).value = value);
  set("model_name", name);
  set("strategy", strategy);
  if (strategy === "bits") set("strategy.formats", "nvfp4,fp8,mxfp8,bf16");
  node.connect(0, sink, 0);
  window.app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();
}

/** In the page: what the map and the inputs behind it say. */
function look() {
  const node = window.app.graph.nodes.find((n) => n.comfyClass === "CalibQuantPlan");
  const value = (name) => node.widgets.find((w) => w.name === name)?.value;
  const box = document.querySelector(".calibquant-plan");
  const cells = [...(box?.querySelectorAll(".cq-layer") ?? [])];
  return {
    title: box?.querySelector(".cq-sums")?.firstChild?.textContent ?? "",
    sums: box?.querySelector(".cq-sums")?.textContent ?? "",
    edits: value("edits") ? JSON.parse(value("edits")) : {},
    bits: value("strategy.bits"),
    letters: Object.fromEntries(cells.map((c) => [c.layer.name, c.textContent])),
    colours: Object.fromEntries(cells.map((c) => [c.layer.name, c.style.background])),
    kept: cells.filter((c) => c.classList.contains("cq-kept")).map((c) => c.layer.name),
    marked: cells.filter((c) => c.classList.contains("cq-edited")).map((c) => c.layer.name).sort(),
    selected: [...(box?.querySelectorAll(".cq-chosen .cq-layer") ?? [])].map((c) => c.layer.name),
    counts: Object.fromEntries([...(box?.querySelectorAll(".cq-tools button:has(.cq-key)") ?? [])].map((b) => [b.children[1].textContent, Number(b.children[2].textContent)])),
    text: node.widgets.find((w) => w.name === "calibquant_result")?.element.textContent ?? "",
    position: [...node.pos],
    nodes: window.app.graph.nodes.length,
  };
}

const cell = (page, row, column) => page.locator(`${MAP} [id$="-${row}-${column}"]`);
const button = (page, name) => page.locator(".calibquant-plan button", { hasText: name });
const bytes = (title) => Number(title.match(/([\d.]+) [MG]B/)[1]);

async function press(page, ...keys) {
  for (const key of keys) await page.keyboard.press(key);
  await page.waitForTimeout(300);
  return page.evaluate(look);
}

async function drag(page, from, to) {
  const [a, b] = [await from.boundingBox(), await to.boundingBox()];
  await page.mouse.move(a.x + a.width / 2, a.y + a.height / 2);
  await page.mouse.down();
  await page.mouse.move(b.x + b.width / 2, b.y + b.height / 2, { steps: 6 });
  await page.mouse.up();
  return page.evaluate(look);
}

async function checkFirst(name, page) {
  const seen = await page.evaluate(look);
  const counted = Object.values(seen.letters).filter(Boolean).length;
  check(`${name}: every layer is on the map, protected ones hatched`, seen.kept.length === 6 && counted === Object.keys(seen.letters).length - 6, seen);
  const told = Object.entries(seen.counts).filter(([, n]) => n).map(([format, n]) => `${n} ${format}`);
  check(`${name}: as many of each format as the node says`, told.length > 1 && told.every((t) => seen.text.includes(t)), [told, seen.text]);
  const [, after] = seen.text.match(/→ ([\d.]+ MB)/) ?? [];
  check(`${name}: and the same size, not estimated`, seen.title.startsWith(after), [seen.title, after]);
  return seen;
}

async function checkPointer(name, page, before) {
  await cell(page, 0, 1).click();
  const one = await press(page, "4");
  const [layer] = one.selected;
  check(`${name}: a click and a number set a format`, one.selected.length === 1 && one.edits[layer] === "bf16" && one.letters[layer] === "16", one.edits);
  check(`${name}: size follows at once`, one.title.startsWith("≈") && bytes(one.title.slice(2)) > bytes(before.title), one.title);
  const boxed = await drag(page, cell(page, 1, 1), cell(page, 2, 3));
  check(`${name}: dragging selects a box and moves no node`, boxed.selected.length === 6 && boxed.position.join() === before.position.join(), boxed.selected);
  await button(page, "MXFP8").click();
  const set = await page.evaluate(look);
  check(`${name}: a button sets all of it`, set.selected.every((l) => set.edits[l] === "mxfp8") && Object.keys(set.edits).length === 7, set.edits);
  check(`${name}: what is set by hand is marked`, set.marked.join() === Object.keys(set.edits).sort().join(), set.marked);
  await page.locator(".calibquant-plan .cq-label").nth(3).click();
  const row = await page.evaluate(look);
  await page.locator(".calibquant-plan .cq-number").nth(2).click({ modifiers: ["Shift"] });
  const both = await page.evaluate(look);
  check(`${name}: labels select rows and columns, Shift adds`, row.selected.length > 3 && both.selected.length === row.selected.length + 5, [row.selected.length, both.selected.length]);
  return set;
}

async function checkUndo(name, page, set) {
  const after = await press(page, "2");
  check(`${name}: a whole selection is set by a key`, Object.keys(after.edits).length > Object.keys(set.edits).length, after.edits);
  await page.keyboard.press("Control+z");
  await page.waitForTimeout(1500);
  const undone = await page.evaluate(look);
  check(`${name}: Ctrl+Z brings the former edits and the map shows them`, JSON.stringify(undone.edits) === JSON.stringify(set.edits)
    && undone.marked.join() === set.marked.join() && undone.sums === set.sums, [undone.edits, undone.sums, set.sums]);
  await page.keyboard.press("Control+y");
  await page.waitForTimeout(1500);
  const redone = await page.evaluate(look);
  check(`${name}: Ctrl+Y sets them again`, JSON.stringify(redone.edits) === JSON.stringify(after.edits) && redone.sums === after.sums, redone.sums);
  await page.keyboard.press("Control+z");
  await page.waitForTimeout(1500);
  const again = await page.evaluate(look);
  check(`${name}: one step of undo is one edit`, JSON.stringify(again.edits) === JSON.stringify(set.edits), again.edits);
}

async function checkKeys(name, page) {
  await page.locator(MAP).focus();
  const first = await press(page, "ArrowDown");
  const more = await press(page, "ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown");
  check(`${name}: arrows move, Shift extends`, first.selected.length === 1 && more.selected.length === 4, [first.selected, more.selected]);
  const spoken = await page.evaluate((map) => {
    const grid = document.querySelector(map);
    const current = document.getElementById(grid.getAttribute("aria-activedescendant"));
    return [grid.getAttribute("role"), current?.getAttribute("role"), current?.getAttribute("aria-selected"), current?.getAttribute("aria-label")];
  }, MAP);
  check(`${name}: told to a screen reader`, spoken.slice(0, 3).join() === "grid,gridcell,true" && spoken[3].includes(": "), spoken);
  const locked = await press(page, "l");
  check(`${name}: L locks what is planned`, more.selected.every((l) => locked.edits[l]) && locked.title.startsWith("≈"), locked.edits);
  const reset = await press(page, "Delete");
  check(`${name}: Delete resets and leaves the node`, reset.nodes === 2 && !more.selected.some((l) => reset.edits[l]), [reset.nodes, reset.edits]);
  const none = await press(page, "Escape");
  check(`${name}: Escape deselects`, none.selected.length === 0 && none.nodes === 2);
}

async function checkSlider(name, page) {
  const before = await page.evaluate(look);
  await page.locator(".calibquant-plan .cq-slide").focus();
  const after = await press(page, "PageUp", "PageUp", "PageUp");
  check(`${name}: the slider sets the strategy's number`, after.bits > before.bits && bytes(after.title.slice(2)) > bytes(before.title.slice(2)), [after.bits, after.title]);
  check(`${name}: and leaves alone what is set by hand`, Object.entries(before.edits).length > 0
    && Object.keys(before.edits).every((l) => after.letters[l] === before.letters[l]), after.edits);
  return after;
}

async function checkViews(name, page) {
  const colours = (await page.evaluate(look)).colours;
  await page.locator(".calibquant-plan select").selectOption("error");
  const other = await page.evaluate(look);
  check(`${name}: another view, other colours, the same letters`, other.colours["layers.0.attention.out"] !== colours["layers.0.attention.out"]
    && other.letters["layers.0.attention.out"] !== "", other.colours);
  if (shots) await page.screenshot({ path: join(shots, `plan_${name}_error.png`) });
  await page.locator(".calibquant-plan select").selectOption("format");
}

async function checkRun(name, page, edited) {
  const prompt = await page.evaluate(async () => Object.values((await window.app.graphToPrompt()).output).find((n) => n.class_type === "CalibQuantPlan").inputs);
  check(`${name}: the prompt holds edits and number`, JSON.stringify(JSON.parse(prompt.edits)) === JSON.stringify(edited.edits)
    && prompt["strategy.bits"] === edited.bits, prompt);
  await queueAndWait(page, url);
  const ran = await page.evaluate(look);
  check(`${name}: the plan follows`, ran.text.includes(`${Object.keys(edited.edits).length} layers set by hand`) && !ran.title.startsWith("≈")
    && Object.keys(edited.edits).every((l) => ran.letters[l] === edited.letters[l]), [ran.text, ran.title]);
  check(`${name}: and is as large as was told`, Math.abs(bytes(ran.title) / bytes(edited.title.slice(2)) - 1) < 0.02, [ran.title, edited.title]);
  if (shots) await fit(page);
  if (shots) await page.screenshot({ path: join(shots, `plan_${name}.png`) });
}

async function checkReload(name, page, edited) {
  const count = Object.keys(edited.edits).length;
  await page.evaluate(async () => {
    const saved = JSON.parse(JSON.stringify(window.app.graph.serialize()));
    await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
    await window.app.loadGraphData(saved);
  });
  await page.waitForTimeout(1500);
  const back = await page.evaluate(look);
  check(`${name}: a workflow brings its edits, and says so before it runs`, JSON.stringify(back.edits) === JSON.stringify(edited.edits)
    && back.title === `${count} layers set by hand. Run to see the map.`, [back.title, back.edits]);
  await button(page, "Reset all").click();
  check(`${name}: they can be dropped at once`, Object.keys((await page.evaluate(look)).edits).length === 0);
}

async function checkRecipe(name, page) {
  await page.evaluate(build, [model, "recipe"]);
  await queueAndWait(page, url);
  const closed = await page.evaluate(look);
  check(`${name}: a recipe's map waits to be opened`, Object.keys(closed.letters).length === 0 && closed.title.includes("MB"), closed.title);
  await button(page, "Show map").click();
  await fit(page);
  await cell(page, 1, 0).click();
  const set = await press(page, "1", "ArrowRight", "9");
  check(`${name}: has no slider, and can be edited`, (await page.locator(".cq-slide").count()) === 0 && Object.keys(set.edits).length >= 1, set.edits);
  await queueAndWait(page, url);
  const ran = await page.evaluate(look);
  check(`${name}: and is planned so`, Object.keys(set.edits).every((l) => ran.letters[l] === set.letters[l]) && !ran.title.startsWith("≈"), ran.title);
}

async function run(name, vue, theme) {
  const { browser, page, errors } = await openPage(url, { vue, width: 1500, height: 1250 });
  try {
    await closeDialog(page);
    await page.evaluate((id) => window.app.extensionManager.setting.set("Comfy.ColorPalette", id), theme);
    await page.evaluate(build, [model, "bits"]);
    await queueAndWait(page, url);
    await fit(page);
    const set = await checkPointer(name, page, await checkFirst(name, page));
    await checkUndo(name, page, set);
    await checkKeys(name, page);
    await checkViews(name, page);
    const edited = await checkSlider(name, page);
    await checkRun(name, page, edited);
    await checkReload(name, page, edited);
    await checkRecipe(name, page);
    check(`${name}: no error in the page`, errors.length === 0, errors);
  } finally {
    await browser.close();
  }
}

await run("canvas", false, "dark");
await run("vue", true, "light");
process.exit(checks.failed ? 1 : 0);
