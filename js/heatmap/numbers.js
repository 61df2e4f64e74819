// Numbers as people read them, and layers in groups.

export function short(value) {
  const size = Math.abs(value);
  const text = size === 0 ? "0" : size >= 1e5 || size < 1e-3 ? size.toExponential(1) : size >= 1000 ? size.toFixed(0) : size.toPrecision(3);
  return value < 0 ? `−${text}` : text;
}

export function percent(value) {
  return `${short(100 * value)} %`;
}

export function tenThousandths(value) {
  return short(1e4 * value);
}

export function error(value) {
  return `${tenThousandths(value)} × 10⁻⁴`;
}

export function mean(values) {
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN;
}

/** GB = 1e9 bytes; MB below a tenth of one, as the engine writes them. */
export function gigabytes(bytes) {
  return bytes >= 1e8 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(2)} MB`;
}

/** Map of key -> layers, in the order of the file. */
export function group(layers, key) {
  const groups = new Map();
  for (const layer of layers) groups.set(key(layer), [...(groups.get(key(layer)) ?? []), layer]);
  return groups;
}
