// From a value to a colour: a scale that fits the values, and viridis.

const LOG_FROM = 8; // the colour scale is logarithmic when the largest value is so many times the smallest

// viridis (CC0): equal steps look equal, its brightness only rises, and colour-blind readers see the order too.
const COLOURS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

/** Whether as many alike layers would differ as much, by the chance of which weights were sampled. */
export function isFlat(values, noise) {
  const widest = 2 * Math.sqrt(2 * Math.log(Math.max(values.length, 2))) * noise; // of so many normal deviates
  return Math.max(...values) <= Math.min(...values) * (1 + widest);
}

export function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  const mix = COLOURS[low].map((c, i) => Math.round(c + (COLOURS[low + 1][i] - c) * (at - low)));
  return `rgb(${mix.join(",")})`;
}

/** From a value to its place on the colour scale, 0 to 1, and back. noise: relative standard error of the values. */
export function scale(values, noise = 0) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const kind = low > 0 && high / low >= LOG_FROM ? LOG : low <= 0 && high - low >= LOG_FROM ? SIGNED_LOG : LINEAR;
  const [from, to] = [kind.to(low), kind.to(high)];
  const flat = noise > 0 && isFlat(values, noise);
  return {
    low, high, name: kind.name, count: values.length, flat,
    place: (value) => (to > from && !flat ? (kind.to(value) - from) / (to - from) : 0.5),
    value: (place) => kind.from(from + place * (to - from)),
  };
}

const LINEAR = { name: "", to: (x) => x, from: (x) => x };
const LOG = { name: "log scale", to: Math.log, from: Math.exp };
const SIGNED_LOG = { name: "log scale", to: Math.asinh, from: Math.sinh }; // kurtosis: below 0, and far above

/** The whole scale, as a CSS background. */
export function gradient() {
  return `linear-gradient(90deg, ${COLOURS.map((_, i) => colour(i / (COLOURS.length - 1))).join(",")})`;
}
