// The strategy's own number (size, bits, max_error) against the map: which choice it means, and what to write for one.
import { bits, damage, planned, size } from "./document.js";
import { overlay } from "./edits.js";

// The file's header is a few bytes longer than the browser knows, and the document's numbers have 4 digits.
const ROOM = { bytesPerLayer: 32, share: 1.001 };

const KINDS = {
  size: {
    of: (amount) => amount * 1e9,
    allows: (data, chosen, most) => size(data, chosen) <= most,
    write: (data, chosen) => Math.ceil((size(data, chosen) + ROOM.bytesPerLayer * data.free.length) / 1000) / 1e6,
  },
  bits: {
    of: (amount) => amount,
    allows: (data, chosen, most) => bits(data, chosen) <= most,
    write: (data, chosen) => Math.ceil(bits(data, chosen) * 1e4) / 1e4,
  },
  max_error: {
    of: (amount) => amount,
    allows: (data, chosen, most) => damage(data, chosen) > most,
    write: (data, chosen) => Number((damage(data, chosen) * ROOM.share).toPrecision(3)),
  },
};

/** What the layers have that nobody set by hand, for the number that the strategy has now (undefined: as it ran). */
export function baseOf(data, walk, amount, edits) {
  const kind = KINDS[data.kind];
  const now = kind && amount !== undefined ? kind.of(amount) : data.amount;
  if (!walk || Math.abs(now - data.amount) <= 1e-9 * Math.abs(now)) return planned(data, walk);
  const allows = (chosen) => kind.allows(data, overlay(data, chosen, edits), now);
  if (data.kind !== "max_error") return walk.within(allows);
  return (walk.stops.find((stop) => !allows(stop.chosen)) ?? walk.stops.at(-1)).chosen; // the smallest file
}

/** The number that the strategy must have for a choice, rounded so that the choice keeps to it. */
export function amountFor(data, chosen) {
  return KINDS[data.kind].write(data, chosen);
}
