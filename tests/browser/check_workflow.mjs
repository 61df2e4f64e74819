// Opens the example workflow from the template browser, runs it, and checks what a user sees, in both renderers.
//
//     node tests/browser/check_workflow.mjs URL [FOLDER_FOR_SCREENSHOTS]
//
// Prints one line per check; the exit status is 1 if any failed. Environment: see page.mjs.
import { join } from "node:path";
import { checks, fit, openPage, queueAndWait } from "./page.mjs";

const PACK = "ComfyUI-CalibQuant";
const TITLE = "quantize_demo_model";
const [url, shots] = process.argv.slice(2);
if (!url) throw new Error("usage: check_workflow.mjs URL [FOLDER_FOR_SCREENSHOTS]");

const check = (...told) => checks.check(...told);

async function openTemplate(page, name) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.BrowseTemplates"));
  const dialog = page.getByRole("dialog");
  await dialog.getByText(PACK, { exact: true }).click();
  await dialog.getByPlaceholder("Search ...").fill(TITLE); // the server lists them in no order, the page draws those in view
  const card = dialog.getByAltText(TITLE, { exact: true }).first();
  await card.waitFor();
  await page.waitForTimeout(500);
  if (shots) await page.screenshot({ path: join(shots, `${name}_templates.png`) });
  const loaded = await card.evaluate((image) => image.complete && image.naturalWidth > 0);
  check(`${name}: the template has a thumbnail`, loaded);
  await card.click();
  await page.waitForFunction(() => window.app.graph.nodes.some((n) => n.type === "CalibQuantQuantize"));
  await page.waitForTimeout(1000);
}

/** What the nodes of the open graph show. */
function readGraph() {
  const nodes = window.app.graph.nodes;
  const own = nodes.filter((n) => n.type.startsWith("CalibQuant"));
  return {
    missing: nodes.filter((n) => !(n.type in window.LiteGraph.registered_node_types)).map((n) => n.type),
    texts: own.map((n) => (n.widgets ?? []).filter((w) => w.name === "calibquant_result").map((w) => w.element.textContent)),
    visible: [...document.querySelectorAll(".calibquant-result")].map((e) => {
      const { width, height } = e.getBoundingClientRect();
      return { width, height, clipped: e.scrollHeight > e.clientHeight + 1, text: e.textContent };
    }),
    saved: JSON.stringify(window.app.graph.serialize()),
    pictures: nodes.filter((n) => n.type === "PreviewImage").map((n) => window.app.nodeOutputs[n.id]?.images?.length ?? 0),
  };
}

async function chooseRecipe(page, recipe) {
  await page.evaluate((value) => {
    const plan = window.app.graph.nodes.find((n) => n.type === "CalibQuantPlan");
    plan.widgets.find((w) => w.name === "strategy.recipe").value = value;
  }, recipe);
}

async function run(name, vue) {
  const { browser, page, errors } = await openPage(url, { vue });
  try {
    await openTemplate(page, name);
    const prompt = (await page.evaluate(() => window.app.graphToPrompt())).output;
    const loader = Object.values(prompt).find((n) => n.class_type === "UNETLoader" && Array.isArray(n.inputs.unet_name));
    check(`${name}: Load Diffusion Model takes the saved file by a link`,
      loader && prompt[loader.inputs.unet_name[0]].class_type === "CalibQuantQuantize", prompt);
    await queueAndWait(page, url);
    await chooseRecipe(page, "mxfp8"); // another plan, so that our nodes run again
    await queueAndWait(page, url);
    await fit(page);
    const seen = await page.evaluate(readGraph);
    check(`${name}: no node is missing`, seen.missing.length === 0, seen.missing);
    const [plan, save] = ["→", "worst layer"].map((word) => seen.texts.filter(([text]) => text?.includes(word)).length);
    check(`${name}: plan and save show their result`, plan === 2 && save === 1, seen.texts);
    check(`${name}: the result is that of the last run, shown once`,
      seen.texts.every((texts) => texts.length <= 1 && texts.every((t) => t.includes("MXFP8"))), seen.texts);
    check(`${name}: the result is drawn in full`,
      seen.visible.length === 2 && seen.visible.every((e) => e.width > 50 && e.height > 20 && !e.clipped), seen.visible);
    check(`${name}: the workflow file does not hold the result`, !seen.saved.includes("worst layer"), seen.saved);
    check(`${name}: both pictures arrive`, seen.pictures.join() === "1,1", seen.pictures);
    check(`${name}: no error in the page`, errors.length === 0, errors);
    if (shots) await page.screenshot({ path: join(shots, `${name}_graph.png`) });
    await chooseRecipe(page, "zimage-nvfp4-mixed"); // not for the demo model
    const reason = await queueAndWait(page, url).catch((error) => error.message);
    await page.waitForTimeout(1000);
    const told = (await page.evaluate(readGraph)).texts.flat();
    check(`${name}: an error is told on its node`, told.some((t) => t.includes("is for zimage")), [reason, told]);
    if (shots) await page.screenshot({ path: join(shots, `${name}_error.png`) });
  } finally {
    await browser.close();
  }
}

await run("canvas", false);
await run("vue", true);
process.exit(checks.failed ? 1 : 0);
