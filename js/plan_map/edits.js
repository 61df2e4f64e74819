// What a person set by hand, layer -> option's name: the text of the node's `edits` input, and over a choice.

/** null where it is no JSON object of words: the node says what is wrong with it. */
export function parse(text) {
  if (!text?.trim()) return new Map();
  try {
    const found = JSON.parse(text);
    const entries = Object.entries(found);
    const isObject = typeof found === "object" && !Array.isArray(found);
    return isObject && entries.every(([, option]) => typeof option === "string") ? new Map(entries) : null;
  } catch {
    return null;
  }
}

/** Sorted, so that the same edits are the same text; "" for none. */
export function format(edits) {
  const sorted = [...edits].sort(([a], [b]) => (a < b ? -1 : 1));
  return sorted.length ? JSON.stringify(Object.fromEntries(sorted)) : "";
}

/** The choice with the edits in it; those of other models and formats change nothing. */
export function overlay(data, chosen, edits) {
  const result = [...chosen];
  for (const [name, option] of edits) {
    const layer = data.byName.get(name);
    const found = data.options.findIndex((o) => o.name === option);
    if (layer && found >= 0 && layer.costs[found]) result[layer.index] = found;
  }
  return result;
}

/** With these layers set to an option, as far as they can have it. */
export function withOption(edits, layers, option) {
  const result = new Map(edits);
  for (const layer of layers) if (!layer.protected && layer.costs[option.index]) result.set(layer.name, option.name);
  return result;
}

/** With these layers held at what they have. */
export function locked(data, edits, layers, chosen) {
  const result = new Map(edits);
  for (const layer of layers) if (!layer.protected) result.set(layer.name, data.options[chosen[layer.index]].name);
  return result;
}

export function without(edits, layers) {
  const names = new Set(layers.map((layer) => layer.name));
  return new Map([...edits].filter(([name]) => !names.has(name)));
}
