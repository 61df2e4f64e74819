// What the colours of the plan's map mean: the format, or a number of the layer in it.
import { colour, scale } from "../heatmap/colours.js";
import { error, short } from "../heatmap/numbers.js";
import { costOf, sensitivity } from "./document.js";

// Two letters carry what the colour says. Hues after Okabe and Ito, told apart by colour-blind readers: blues and greens
// for 4 to 6 bits, warm ones for 8, light grey for 16.
const RANK = "+r"; // as costs.py names options
const LOOKS = {
  nvfp4: ["N4", "#3d74b8"],
  "nvfp4-w4a16": ["NW", "#8cb8e0"],
  w4a8: ["W4", "#12907a"],
  w6a8: ["W6", "#79c9a8"],
  fp8: ["F8", "#f0d465"],
  int8: ["I8", "#e8a33d"],
  "int8-convrot": ["IR", "#c4682a"],
  mxfp8: ["M8", "#bd7fb4"],
  bf16: ["16", "#dcdcdc"],
};

export function look(option) {
  const [name, rank] = option.name.split(RANK);
  const [known, background] = LOOKS[name] ?? [option.title.slice(0, 2).toUpperCase(), "#a0a8b0"];
  const letters = rank ? `${known[0]}+` : known; // with a branch, whose rank the tooltip and the legend say
  return { letters, background, ink: ink(background) };
}

/** Black or white, whichever reads better on it. */
export function ink(background) {
  const parts = background.startsWith("#") ? background.slice(1).match(/../g).map((h) => parseInt(h, 16)) : background.match(/\d+/g).map(Number);
  const [r, g, b] = parts.map((c) => (c / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#111" : "#fff";
}

/** key, title, note; of(layer, option): a number, undefined for formats. */
export const VIEWS = [
  { key: "format", title: "Format", note: "" },
  { key: "error", title: "Error", note: "of the layer in its format", show: error, of: (layer, option) => costOf(layer, option).error },
  { key: "sensitivity", title: "Sensitivity", note: "damage by error", show: short, of: (layer) => sensitivity(layer) },
  { key: "damage", title: "Damage", note: "the layer's share of the predicted error", show: short, of: (layer, option) => costOf(layer, option).damage },
];

/** The colours of a choice: {of(layer): CSS colour, range}. Zeros (16 bit has no error) are below the scale. */
export function colours(data, chosen, view) {
  if (!view.of) return { of: (layer) => look(data.options[chosen[layer.index]]).background, range: null };
  const value = (layer) => view.of(layer, chosen[layer.index]);
  const above = data.free.map(value).filter((v) => v > 0);
  const range = above.length ? scale(above) : null;
  return { of: (layer) => (value(layer) > 0 ? colour(range.place(value(layer))) : colour(0)), range };
}
