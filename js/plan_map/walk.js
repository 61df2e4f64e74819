// The size-error curve as a path: from each of its points to the next, one layer after the other.
//
// Points are optimal; between them the layers that differ change one at a time, those first that gain most for their
// bytes. The node's next run finds the best plan of the size that was chosen; this is what the slider shows meanwhile.
import { damage, size } from "./document.js";

/** Stops, from the smallest file to the least error; null where there is no curve. */
export function makeWalk(data) {
  if (!data.curve.length) return null;
  const stops = [];
  for (const [k, { chosen }] of data.curve.entries()) {
    if (k) stops.push(...between(data, data.curve[k - 1].chosen, chosen));
    stops.push({ chosen, size: size(data, chosen), damage: damage(data, chosen) });
  }
  const rising = stops.filter((stop, i) => !i || stop.size > stops[i - 1].size);
  return { stops: rising, within: (allowed) => within(rising, allowed) };
}

/** What lies between two choices: larger than the first, better than all before, smaller than the second. */
function between(data, from, to) {
  const last = { size: size(data, to), damage: damage(data, to) };
  let [chosen, best] = [from, damage(data, from)];
  const found = [];
  for (const change of changes(data, from, to)) {
    chosen = chosen.with ? chosen.with(change.index, change.to) : chosen.map((o, i) => (i === change.index ? change.to : o));
    const now = { chosen, size: size(data, chosen), damage: damage(data, chosen) };
    const previous = found.at(-1)?.size ?? size(data, from);
    if (now.size > previous && now.size < last.size && now.damage < best && now.damage >= last.damage) {
      found.push(now);
      best = now.damage;
    }
  }
  return found;
}

function changes(data, from, to) {
  const found = [];
  for (const layer of data.free) {
    const [a, b] = [from, to].map((chosen) => layer.costs[chosen[layer.index]]);
    if (a === b) continue;
    const [bytes, gain] = [b[0] + b[1] - a[0] - a[1], a[3] - b[3]];
    found.push({ index: layer.index, to: to[layer.index], rank: bytes > 0 ? gain / bytes : Infinity });
  }
  return found.sort((x, y) => y.rank - x.rank);
}

/** The last stop that is allowed, else the first. */
function within(stops, allowed) {
  const found = stops.findLast((stop) => allowed(stop.chosen));
  return (found ?? stops[0]).chosen;
}
