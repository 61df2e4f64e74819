// The node's `calibquant_plan` output (quant_core/reports/plan_map.py: document()) and what a choice of options adds up to.
//
// A choice is an array: for each layer that may be quantized (`free`), in their order, the number of its option.

const [BYTES, HEADER, ERROR, DAMAGE] = [0, 1, 2, 3]; // of a layer's costs in one option

export function read(raw) {
  const layers = raw.layers.map((row) => Object.fromEntries(raw.fields.map((name, i) => [name, row[i]])));
  const free = layers.filter((layer) => !layer.protected);
  free.forEach((layer, i) => (layer.index = i));
  const options = raw.options.map(([name, title, settable], i) => ({ name, title, settable, index: i }));
  const curve = (raw.curve ?? []).map((point) => ({ ...point, chosen: [...point.chosen].map((digit) => parseInt(digit, 36)) }));
  return { ...raw, layers, free, options, curve, priced: Boolean(raw.kind), byName: new Map(free.map((l) => [l.name, l])) };
}

function total(data, chosen, column) {
  return data.free.reduce((sum, layer, i) => sum + layer.costs[chosen[i]][column], 0);
}

/** Bytes of the file. */
export function size(data, chosen) {
  return data.fixed + total(data, chosen, BYTES) + total(data, chosen, HEADER);
}

/** Bits a weight of the layers that may be quantized. */
export function bits(data, chosen) {
  return (8 * total(data, chosen, BYTES)) / data.weights;
}

/** The predicted error; NaN without a table. */
export function damage(data, chosen) {
  return data.priced ? total(data, chosen, DAMAGE) : NaN;
}

/** Of one layer in one option: {bytes, error, damage}; null where it cannot have it. */
export function costOf(layer, option) {
  const costs = layer.costs[option];
  return costs ? { bytes: costs[BYTES] + costs[HEADER], error: costs[ERROR], damage: costs[DAMAGE] } : null;
}

/** What a layer's error is worth: damage by error, in the smallest format that has an error. */
export function sensitivity(layer) {
  const known = layer.costs.filter((costs) => costs && costs[ERROR] > 0);
  return known.length ? known[0][DAMAGE] / known[0][ERROR] : 0;
}

/** How many layers have each option. */
export function counts(data, chosen) {
  const found = data.options.map(() => 0);
  for (const option of chosen) found[option] += 1;
  return found;
}

/** The planned options; where one was set by hand, what the plan would have without that. */
export function planned(data, walk) {
  const chosen = data.free.map((layer) => layer.chosen);
  const without = walk ? walk.within((choice) => size(data, choice) <= data.size) : null;
  for (const name of Object.keys(data.edits)) {
    const layer = data.byName.get(name);
    if (!layer) continue;
    const before = data.options.findIndex((option) => option.name === data.before?.[name]);
    chosen[layer.index] = without ? without[layer.index] : before >= 0 ? before : chosen[layer.index];
  }
  return chosen;
}
