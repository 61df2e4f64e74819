// What our nodes say: while they work, when they are done, when they fail. Kept for each open tab and drawn on its nodes.
//
// Events of the server carry the id of the prompt, and of the node as the prompt names it: "12:3" is node 3 inside the
// subgraph node 12. A prompt belongs to the tab that queued it, whatever tab is open when it speaks. Tabs are told apart
// by their workflow object, as the frontend itself does it; the graph is rebuilt whenever a tab is opened.
//
// "calibquant.text" {node, prompt_id, text | kept} is ours (nodes/comfyui/feedback.py), all others are ComfyUI's.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PREFIX = "CalibQuant";
const NOTHING_KEPT = "nothing was kept";
const NO_TAB = {}; // before the first workflow is open

const said = new WeakMap(); // tab -> Map(node's id in the prompt -> {text, output, failed, kept}), the latest last
const tabOf = new Map(); // prompt id -> tab, of prompts that are not done
const early = []; // events that came before the answer to the request that queues their prompt
const drawers = []; // of calibquant.js and heatmap.js
let asking = 0; // such requests under way

/** draw(node, words, isNew): words is {text, output, failed} of a node of ours, or {} when nothing is known of it. */
export function onWords(draw) {
  drawers.push(draw);
}

function openTab() {
  return app.extensionManager?.workflow?.activeWorkflow ?? NO_TAB;
}

function findNode(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph;
  for (const step of path.slice(0, -1)) graph = graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(path.at(-1));
}

/** All nodes of a graph and of the subgraphs in it. */
function* nodesOf(graph) {
  for (const node of graph.nodes) {
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

function draw(node, words, isNew) {
  if (node?.comfyClass?.startsWith(PREFIX)) for (const drawer of drawers) drawer(node, words, isNew);
}

/** Remember what a node of a tab says, and show it if the tab is open. */
function say(tab, id, change) {
  if (!said.has(tab)) said.set(tab, new Map());
  const words = said.get(tab);
  const now = { ...words.get(id), ...change };
  words.delete(id);
  words.set(id, now);
  if (tab === openTab()) draw(findNode(id), now, true);
}

/** The nodes of the open tab are new ones: its graph was rebuilt. */
function drawAll() {
  for (const node of nodesOf(app.rootGraph)) draw(node, {}, false);
  for (const [id, words] of said.get(openTab()) ?? []) draw(findNode(id), words, false);
}

const HANDLERS = {
  "calibquant.text": (tab, { node, text, kept }) => say(tab, node, text === undefined ? { kept } : { text, failed: false }),
  execution_start: (tab) => {
    for (const [id, words] of [...(said.get(tab) ?? [])]) {
      if (words.failed || words.kept) say(tab, id, { text: textOf(words.output), failed: false, kept: "" });
    }
  },
  executed: (tab, { node, display_node, output }) => {
    if (output) say(tab, display_node ?? node, { text: textOf(output), output, failed: false, kept: "" });
  },
  execution_error: (tab, { node_id, exception_message }) => {
    const kept = said.get(tab)?.get(node_id)?.kept;
    say(tab, node_id, { text: [(exception_message ?? "failed").trim(), kept].filter(Boolean).join("\n"), failed: true });
  },
  execution_interrupted: (tab, { node_id }) => {
    say(tab, node_id, { text: `cancelled: ${said.get(tab)?.get(node_id)?.kept || NOTHING_KEPT}`, failed: true });
  },
};
const LAST = ["execution_success", "execution_error", "execution_interrupted"];

function textOf(output) {
  return [output?.text ?? []].flat().join("\n");
}

function receive(type, detail) {
  const tab = tabOf.get(detail?.prompt_id);
  if (tab) HANDLERS[type]?.(tab, detail);
  else if (asking) early.push([type, detail]);
  if (tab && LAST.includes(type)) tabOf.delete(detail.prompt_id);
}

/** Learn which tab a prompt belongs to: ComfyUI tells extensions that something was queued, but not as what. */
function watchQueue() {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...request) {
    const tab = openTab();
    asking += 1;
    try {
      const answer = await queue.apply(this, request);
      if (answer?.prompt_id) tabOf.set(answer.prompt_id, tab);
      return answer;
    } finally {
      asking -= 1;
      for (const [type, detail] of early.splice(0)) receive(type, detail);
    }
  };
}

app.registerExtension({
  name: "CalibQuant.Words",
  setup() {
    watchQueue();
    for (const type of new Set([...Object.keys(HANDLERS), ...LAST])) {
      api.addEventListener(type, ({ detail }) => receive(type, detail));
    }
    // The graph is ready before the frontend says whose it is; this is where it does.
    app.extensionManager.workflow.$onAction(({ name, after }) => name === "openWorkflow" && after(drawAll));
  },
});
