// The size-error curve, what one format everywhere and the recipes would be, and the plan as it is now.
import { gigabytes, short } from "../heatmap/numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const FREE = 3; // percent kept free at each edge

function draw(tag, attributes, children = []) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Where sizes and errors lie in the picture, in percent; errors on a logarithmic scale, none of 0. */
export function axes(points) {
  const shown = points.filter((p) => p.error > 0);
  const x = axis(points.map((p) => p.size), FREE, 100 - FREE);
  const y = axis(shown.map((p) => Math.log10(p.error)), 92, 8);
  return { x: (p) => x(p.size), y: (p) => (p.error > 0 ? y(Math.log10(p.error)) : 92) };
}

function axis(values, start, end) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return (value) => start + (end - start) * (high > low ? (value - low) / (high - low) : 0.5);
}

/** The picture; move(now) sets the mark of {size, error}. Points bear {name, size, error} for the tooltip. */
export function drawPlot(curve, points) {
  const known = [...curve, ...points];
  const { x, y } = axes(known);
  const line = draw("polyline", {
    points: curve.map((p) => `${x(p)},${y(p)}`).join(" "), fill: "none", "vector-effect": "non-scaling-stroke", class: "cq-curve",
  });
  const marks = points.map((p) => {
    const mark = draw("circle", { cx: `${x(p)}%`, cy: `${y(p)}%`, r: 4, class: "cq-point" });
    mark.about = p;
    return mark;
  });
  const now = draw("circle", { r: 5.5, class: "cq-now" });
  const stretched = draw("svg", { width: "100%", height: "100%", viewBox: "0 0 100 100", preserveAspectRatio: "none" }, [line]);
  const svg = draw("svg", { class: "cq-plot", role: "img", "aria-label": spoken(curve) }, [stretched, ...marks, now]);
  return {
    svg,
    move(point) {
      const inside = { size: Math.min(Math.max(point.size, curve[0].size), Math.max(...known.map((p) => p.size))), error: point.error };
      now.setAttribute("cx", `${x(inside)}%`);
      now.setAttribute("cy", `${Math.min(Math.max(y(inside), 4), 96)}%`);
      now.about = { name: "this plan", ...point };
    },
  };
}

function spoken(curve) {
  return `least error by file size: ${curve.map((p) => `${gigabytes(p.size)} ${short(p.error)}`).join(", ")}`;
}
