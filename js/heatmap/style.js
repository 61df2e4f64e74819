// How both maps look: the probe's and the plan's.
import { make } from "./elements.js";

export const CELL = { min: 10, max: 34, height: 15 }; // pixels

const STYLE = `
.calibquant-heatmap { box-sizing: border-box; width: 100%; height: 100%; overflow: auto; padding: 8px; border-radius: 4px;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); font: 11px/15px sans-serif; text-align: left; }
.calibquant-heatmap select { font: inherit; color: inherit; background: var(--comfy-menu-bg, #333); padding: 2px 4px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; }
.calibquant-heatmap .cq-head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; }
.calibquant-heatmap .cq-legend { display: flex; flex-wrap: wrap; align-items: center; gap: 0 6px; }
.calibquant-heatmap .cq-bar { width: 120px; height: 11px; border-radius: 2px; }
.calibquant-heatmap .cq-swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; }
.calibquant-heatmap .cq-note { margin: 5px 0; color: var(--descrip-text, #999); }
.calibquant-heatmap .cq-scroll { overflow: auto; max-height: 640px; }
.calibquant-heatmap .cq-map { display: grid; gap: 1px; width: 100%; min-width: min-content; }
.calibquant-heatmap .cq-label { position: sticky; left: 0; z-index: 1; padding-right: 8px; white-space: nowrap;
  background: var(--comfy-input-bg, #222); box-shadow: 0 1px var(--comfy-input-bg, #222); }
.calibquant-heatmap .cq-number { color: var(--descrip-text, #999); text-align: center; width: 0; justify-self: center;
  display: flex; justify-content: center; }
.calibquant-heatmap .cq-cell { display: flex; height: ${CELL.height}px; border-radius: 1px; overflow: hidden; }
.calibquant-heatmap .cq-layer { flex: 1; }
.calibquant-heatmap .cq-layer:hover { outline: 2px solid var(--input-text, #ddd); outline-offset: -2px; }
.calibquant-heatmap .cq-kept { background: repeating-linear-gradient(135deg, #8a8a8a 0 2px, #a8a8a8 2px 4px); }
.calibquant-heatmap .cq-outside { display: flex; gap: 1px; grid-column: 2 / -1; }
.calibquant-heatmap .cq-outside .cq-cell { flex: none; width: 15px; }
.calibquant-heatmap .cq-row { display: contents; }
.calibquant-heatmap .cq-table { overflow: auto; max-height: 240px; margin-top: 8px; }
.calibquant-heatmap table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.calibquant-heatmap th { position: sticky; top: 0; cursor: pointer; font-weight: 600; background: var(--comfy-menu-bg, #333); }
.calibquant-heatmap th, .calibquant-heatmap td { padding: 1px 7px; text-align: right; }
.calibquant-heatmap td { white-space: nowrap; }
.calibquant-heatmap th:first-child, .calibquant-heatmap td:first-child { text-align: left; }
.calibquant-heatmap tbody tr:hover { background: var(--comfy-menu-bg, #333); }
.calibquant-tooltip { position: fixed; z-index: 10000; pointer-events: none; max-width: 420px; padding: 7px 9px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; color: var(--input-text, #ddd);
  background: var(--comfy-menu-bg, #333); font: 12px/16px sans-serif; box-shadow: 0 2px 8px #0008; }
.calibquant-tooltip table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 4px; }
.calibquant-tooltip td { padding: 0 14px 0 0; }
`;

export function addStyle(id = "calibquant-heatmap-style", text = STYLE) {
  if (document.getElementById(id)) return;
  const style = make("style", "", text);
  style.id = id;
  document.head.append(style);
}
