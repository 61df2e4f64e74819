// The map itself: a row for each layer type, a column for each block, and one row for what is outside the blocks.
import { make } from "./elements.js";
import { group } from "./numbers.js";
import { CELL } from "./style.js";

const LABELS = 16; // at most so many block numbers above the map
const OUTSIDE = "outside the blocks";

/**
 * Where each layer is: {blocks, rows: [{name, cells: [[layer, …], …]}]}. Cells of a type are in the order of blocks; the
 * last row, of layers outside the blocks, has one for each of them.
 */
export function arrange(layers, types) {
  const inside = layers.filter((layer) => layer.block !== null);
  const blocks = [...new Set(inside.map((layer) => layer.block))].sort((a, b) => a - b);
  const byType = group(inside, (layer) => layer.type);
  const rows = types.map((name) => {
    const byBlock = group(byType.get(name), (layer) => layer.block);
    return { name, cells: blocks.map((block) => byBlock.get(block) ?? []) };
  });
  const outside = layers.filter((layer) => layer.block === null).map((layer) => [layer]);
  return { blocks, rows: outside.length ? [...rows, { name: OUTSIDE, cells: outside, outside: true }] : rows };
}

/** Draws it; box(layer) makes the element of one layer. */
export function drawGrid({ blocks, rows }, box, least = CELL.min) {
  const map = make("div", "cq-map");
  map.style.gridTemplateColumns = `max-content repeat(${blocks.length}, minmax(${least}px, ${CELL.max}px))`;
  map.append(make("div", "cq-row", "", [make("div", "cq-label", "block"), ...numbers(blocks)]));
  for (const { name, cells, outside } of rows) {
    const label = make("div", "cq-label", name);
    if (outside) {
      const boxes = cells.map((layers) => make("div", "cq-cell", "", layers.map(box)));
      map.append(make("div", "cq-row", "", [label, make("div", "cq-outside", "", boxes)]));
    } else {
      map.append(make("div", "cq-row", "", [label, ...cells.map((layers) => make("div", "cq-cell", "", layers.map(box)))]));
    }
  }
  return map;
}

function numbers(blocks) {
  const step = [1, 2, 5, 10, 20, 50].find((n) => blocks.length / n <= LABELS) ?? 100;
  return blocks.map((block, i) => make("div", "cq-number", i % step ? "" : String(block)));
}
