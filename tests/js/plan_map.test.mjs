// The parts of the plan's map that need no page: node --test tests/js/
import assert from "node:assert/strict";
import { test } from "node:test";
import { arrange } from "../../js/heatmap/grid.js";
import { amountFor, baseOf } from "../../js/plan_map/budget.js";
import { bits, counts, damage, planned, read, sensitivity, size } from "../../js/plan_map/document.js";
import { format, locked, overlay, parse, withOption, without } from "../../js/plan_map/edits.js";
import { axes } from "../../js/plan_map/plot.js";
import { Selection } from "../../js/plan_map/selection.js";
import { VIEWS, colours, ink, look } from "../../js/plan_map/views.js";
import { makeWalk } from "../../js/plan_map/walk.js";

// Three layers of 1e8 weights: 50 MB, 100 MB or 200 MB; the last cannot be small.
const M = 1e6;
const costs = (damage) => [[50 * M, 5, 0.01, damage], [100 * M, 6, 0.001, damage / 8], [200 * M, 4, 0, 0]];
const RAW = {
  size: 1000 + 250 * M + 17, fixed: 1000, weights: 300 * M, kind: "bits", amount: 6.5, weighting: "uniform",
  options: [["nvfp4", "NVFP4", true], ["mxfp8", "MXFP8", true], ["bf16", "BF16", true]],
  types: ["a"],
  fields: ["name", "type", "block", "shape", "protected", "chosen", "costs"],
  layers: [
    ["b.0.a", "a", 0, [10, 10], "", 0, costs(0.1)],
    ["b.1.a", "a", 1, [10, 10], "", 1, costs(0.8)],
    ["b.2.a", "a", 2, [10, 10], "", 1, [0, ...costs(0.4).slice(1)]],
    ["out", "out", null, [10, 10], "final layer", 2, []],
  ],
  edits: {}, before: {}, points: [],
  curve: [{ chosen: "001" }, { chosen: "111" }, { chosen: "222" }],
};
const data = read(RAW);
const walk = makeWalk(data);

test("size, bits and error are sums over the layers that may be quantized", () => {
  assert.equal(size(data, [0, 1, 1]), RAW.size);
  assert.equal(bits(data, [0, 1, 1]), (8 * 250) / 300);
  assert.ok(Math.abs(damage(data, [0, 1, 2]) - 0.2) < 1e-12);
  assert.deepEqual(counts(data, [0, 1, 1]), [1, 2, 0]);
  assert.ok(Math.abs(sensitivity(data.byName.get("b.1.a")) - 80) < 1e-9);
});

test("edits are text, sorted, and nothing else is taken for them", () => {
  const edits = new Map([["b", "nvfp4"], ["a", "bf16"]]);
  assert.equal(format(edits), '{"a":"bf16","b":"nvfp4"}');
  assert.deepEqual(parse(format(edits)), new Map([["a", "bf16"], ["b", "nvfp4"]]));
  assert.equal(format(new Map()), "");
  assert.equal(parse(" ").size, 0);
  for (const bad of ["{", "[]", '["a"]', "null", "4", '{"a": 4}']) assert.equal(parse(bad), null, bad);
});

test("an edit overlays the plan where the layer can have it", () => {
  const edits = new Map([["b.0.a", "bf16"], ["b.2.a", "nvfp4"], ["elsewhere", "bf16"], ["b.1.a", "fp4"]]);
  assert.deepEqual(overlay(data, [0, 1, 1], edits), [2, 1, 1]);
  const all = [...data.layers];
  assert.deepEqual([...withOption(new Map(), all, data.options[0]).keys()], ["b.0.a", "b.1.a"]); // not protected, not impossible
  assert.deepEqual([...locked(data, new Map(), all, [0, 1, 1])], [["b.0.a", "nvfp4"], ["b.1.a", "mxfp8"], ["b.2.a", "mxfp8"]]);
  assert.deepEqual([...without(edits, [data.layers[0]]).keys()], ["b.2.a", "elsewhere", "b.1.a"]);
});

test("the walk goes through the curve's points, larger and better at each step", () => {
  assert.deepEqual(walk.stops.map((stop) => stop.chosen.join("")), ["001", "011", "111", "121", "122", "222"]);
  walk.stops.forEach((stop, i) => {
    assert.equal(stop.size, size(data, stop.chosen));
    if (i) assert.ok(stop.size > walk.stops[i - 1].size && stop.damage < walk.stops[i - 1].damage);
  });
  assert.deepEqual(walk.within((chosen) => size(data, chosen) <= 260 * M), [0, 1, 1]);
  assert.deepEqual(walk.within(() => false), [0, 0, 1]); // nothing is allowed: the smallest
  assert.equal(makeWalk(read({ ...RAW, curve: undefined })), null);
});

test("the strategy's number says what is chosen, and the other way round", () => {
  assert.deepEqual(baseOf(data, walk, 6.5, new Map()), [0, 1, 1]); // as it ran
  assert.deepEqual(baseOf(data, walk, 8, new Map()), [1, 1, 1]);
  assert.deepEqual(baseOf(data, walk, 8, new Map([["b.0.a", "bf16"]])), [0, 0, 1]); // edits take their bytes first
  for (const kind of ["size", "bits", "max_error"]) {
    const other = read({ ...RAW, kind, amount: 1e-9 });
    for (const { chosen } of walk.stops.slice(0, -1)) assert.deepEqual(baseOf(other, walk, amountFor(other, chosen), new Map()), chosen, kind);
  }
});

test("a layer that is reset gets what the plan would have without the edit", () => {
  const ran = { ...RAW, layers: RAW.layers.map((row, i) => (i ? row : row.with?.(5, 2) ?? [...row.slice(0, 5), 2, row[6]])), edits: { "b.0.a": "bf16" } };
  const edited = read({ ...ran, size: 1000 + 400 * M + 16 });
  assert.deepEqual(planned(edited, makeWalk(edited)), [1, 1, 1]); // from the curve, at that size
  const recipe = read({ ...ran, kind: undefined, curve: undefined, before: { "b.0.a": "nvfp4" } });
  assert.deepEqual(planned(recipe, null), [0, 1, 1]);
});

test("boxes, rows, columns and the cursor select cells that have layers", () => {
  const { rows, blocks } = arrange(data.layers, ["a"]);
  assert.deepEqual(blocks, [0, 1, 2]);
  const selection = new Selection(rows);
  const names = () => selection.layers().map((layer) => layer.name);
  selection.start(0, 0);
  selection.extend(0, 1);
  assert.deepEqual(names(), ["b.0.a", "b.1.a"]);
  selection.start(1, 0, true); // the row outside the blocks
  assert.deepEqual(names(), ["b.0.a", "b.1.a", "out"]);
  selection.column(2);
  assert.deepEqual(names(), ["b.2.a"]);
  selection.row(0);
  assert.equal(names().length, 3);
  selection.clear();
  selection.move(0, 1); // the first step sets the cursor
  selection.move(0, 1);
  selection.move(0, 1, true);
  assert.deepEqual(names(), ["b.1.a", "b.2.a"]);
  selection.move(0, 1);
  assert.deepEqual(selection.cursor, [0, 2]); // no further
});

test("formats are told apart without colour, and text can be read on all of them", () => {
  const names = ["nvfp4", "nvfp4-w4a16", "w4a8", "w6a8", "fp8", "int8", "int8-convrot", "mxfp8", "bf16"];
  const looks = names.map((name) => look({ name, title: name }));
  assert.equal(new Set(looks.map((l) => l.letters)).size, names.length);
  const light = (hex) => hex.slice(1).match(/../g).map((h) => (parseInt(h, 16) / 255) ** 2.2).reduce((s, c, i) => s + c * [0.2126, 0.7152, 0.0722][i], 0);
  for (const { background, ink: text } of looks) {
    const [a, b] = [background, text === "#fff" ? "#ffffff" : "#111111"].map(light).sort((x, y) => y - x);
    assert.ok((a + 0.05) / (b + 0.05) >= 4.5, `${background} ${text}`); // WCAG AA
  }
  assert.equal(look({ name: "new", title: "Newest" }).letters, "NE");
  assert.equal(ink("rgb(253,231,37)"), "#111");
});

test("a view colours the larger value brighter, 16 bit below all", () => {
  const view = VIEWS.find((v) => v.key === "damage");
  const paint = colours(data, [0, 1, 2], view);
  assert.equal(paint.of(data.free[2]), "rgb(68,1,84)"); // viridis' darkest
  assert.deepEqual([paint.range.low, paint.range.high], [0.1, 0.1]);
});

test("the plot keeps all points inside, an error of 0 at its foot", () => {
  const points = [{ size: 10, error: 0.1 }, { size: 20, error: 0.001 }, { size: 30, error: 0 }];
  const { x, y } = axes(points);
  const all = points.flatMap((p) => [x(p), y(p)]);
  assert.ok(all.every((v) => v >= 0 && v <= 100) && y(points[0]) < y(points[1]) && y(points[2]) === y(points[1]));
});
