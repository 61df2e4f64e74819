// A ComfyUI page in headless Chromium, and what the scripts beside this file do with it.
//
// Environment: PLAYWRIGHT_DIR, a folder whose node_modules holds playwright-core (default: the working directory);
// CHROMIUM, the browser's executable (default: /usr/bin/chromium).
import { createRequire } from "node:module";
import { join } from "node:path";

export const MODEL = "calibquant_digits_wan.safetensors";
const START_MS = 120_000; // 5 s on a quiet machine
const PROMPT_MS = 600_000;
const MIN_NODE_TYPES = 50; // fewer are registered only while the page still loads

export async function openPage(url, { vue = false, width = 1920, height = 1080 } = {}) {
  const require = createRequire(join(process.env.PLAYWRIGHT_DIR ?? process.cwd(), "package.json"));
  const browser = await require("playwright-core").chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync"],
  });
  const page = await browser.newPage({ viewport: { width, height } });
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(url);
  await page.waitForFunction(
    (least) => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > least,
    MIN_NODE_TYPES, { timeout: START_MS });
  await page.keyboard.press("Escape"); // a first visit opens the template browser
  await page.evaluate((on) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", on), vue);
  await page.waitForTimeout(500);
  return { browser, page, errors };
}

/** Queue the open graph and wait for its end; its history entry. Throws with the node errors. */
export async function queueAndWait(page, url) {
  const answer = page.waitForResponse((r) => r.url().endsWith("/prompt") && r.request().method() === "POST");
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  const response = await answer;
  if (!response.ok()) throw new Error(`prompt refused (${response.status()}): ${await response.text()}`);
  const { prompt_id: id } = await response.json();
  for (const end = Date.now() + PROMPT_MS; Date.now() < end; await page.waitForTimeout(100)) {
    const entry = (await (await fetch(`${url}/history/${id}`)).json())[id];
    if (!entry) continue;
    if (entry.status.status_str !== "success") throw new Error(JSON.stringify(entry.status.messages.at(-1)));
    await page.waitForTimeout(1000); // the pictures reach the page by websocket, then load
    return entry;
  }
  throw new Error(`prompt ${id} did not finish within ${PROMPT_MS} ms`);
}

/** One line per check on stdout; `failed` counts. */
export const checks = {
  failed: 0,
  check(what, ok, detail = "") {
    console.log(`${ok ? "ok  " : "FAIL"} ${what}${ok ? "" : ` ${JSON.stringify(detail)}`}`);
    if (!ok) this.failed += 1;
  },
};

/** On a first visit the template browser opens some time after the page. */
export async function closeDialog(page) {
  const dialog = page.getByRole("dialog");
  await dialog.first().waitFor({ timeout: 5000 }).catch(() => {});
  if (await dialog.count()) await page.keyboard.press("Escape");
  await page.waitForTimeout(500);
}

/** Bring the whole graph into view. */
export async function fit(page) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1500); // the view glides there
}
