// How the plan's map looks, beside what it shares with the probe's (heatmap/style.js).
export const STYLE = `
.calibquant-plan .cq-title { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; font-size: 12px; }
.calibquant-plan .cq-title b { font-size: 13px; font-variant-numeric: tabular-nums; }
.calibquant-plan .cq-sums { flex: 1; font-variant-numeric: tabular-nums; }
.calibquant-plan .cq-was { color: var(--descrip-text, #999); }
.calibquant-plan button { display: inline-flex; align-items: center; gap: 5px; font: inherit; color: inherit; cursor: pointer;
  background: var(--comfy-menu-bg, #333); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; padding: 2px 7px; }
.calibquant-plan button:disabled { cursor: default; }
.calibquant-plan button:disabled .cq-do, .calibquant-plan button.cq-do:disabled { opacity: .5; }
.calibquant-plan button:not(:disabled):hover { border-color: var(--input-text, #ddd); }
.calibquant-plan :focus-visible { outline: 2px solid var(--cq-focus); outline-offset: 1px; }
.calibquant-plan { --cq-focus: #4aa3ff; }
.calibquant-plan .cq-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 5px; margin-top: 7px; min-height: 22px; }
.calibquant-plan .cq-scroll { position: relative; margin-top: 7px; }
.calibquant-plan .cq-tools .cq-gap { flex: 1; }
.calibquant-plan .cq-key { min-width: 18px; padding: 0 2px; border-radius: 2px; font: 600 9px/14px sans-serif; text-align: center; }
.calibquant-plan .cq-count { color: var(--descrip-text, #999); font-variant-numeric: tabular-nums; }
.calibquant-plan .cq-map { user-select: none; touch-action: none; cursor: cell; }
.calibquant-plan .cq-map:focus { outline: none; }
.calibquant-plan .cq-cell { position: relative; height: 16px; overflow: visible; }
.calibquant-plan .cq-layer { position: relative; font: 600 9px/16px sans-serif; text-align: center; overflow: hidden; border-radius: 2px; }
.calibquant-plan .cq-outside .cq-cell { width: 20px; }
.calibquant-plan .cq-layer:hover { outline: 1px solid var(--input-text, #ddd); outline-offset: -1px; }
.calibquant-plan .cq-kept { cursor: not-allowed; }
.calibquant-plan .cq-edited::after { content: ""; position: absolute; top: 0; right: 0; border: 3.5px solid;
  border-color: currentColor currentColor transparent transparent; }
.calibquant-plan .cq-chosen::before { content: ""; position: absolute; inset: -1px; z-index: 1; border-radius: 3px; pointer-events: none;
  box-shadow: 0 0 0 1.5px var(--input-text, #fff), inset 0 0 0 1px var(--comfy-input-bg, #222); }
.calibquant-plan .cq-map:focus .cq-cursor::before { content: ""; position: absolute; inset: -1px; z-index: 2; border-radius: 3px;
  pointer-events: none; box-shadow: 0 0 0 2.5px var(--cq-focus), inset 0 0 0 1px var(--comfy-input-bg, #222); }
.calibquant-plan .cq-label, .calibquant-plan .cq-number { cursor: pointer; }
.calibquant-plan .cq-number { width: auto; min-width: 0; height: 15px; justify-self: stretch; }
.calibquant-plan .cq-label:hover, .calibquant-plan .cq-number:hover { color: var(--input-text, #ddd); text-decoration: underline; }
.calibquant-plan .cq-hint { margin-top: 6px; color: var(--descrip-text, #999); }
.calibquant-plan .cq-budget { margin-top: 8px; padding-top: 6px; border-top: 1px solid var(--border-color, #4e4e4e); }
.calibquant-plan .cq-plot { display: block; width: 100%; height: 96px; overflow: visible; }
.calibquant-plan .cq-curve { stroke: var(--input-text, #ddd); stroke-width: 1.5px; opacity: .7; }
.calibquant-plan .cq-point { fill: var(--comfy-input-bg, #222); stroke: var(--descrip-text, #999); stroke-width: 1.5px; }
.calibquant-plan .cq-point:hover { stroke: var(--input-text, #ddd); }
.calibquant-plan .cq-now { fill: var(--cq-focus); stroke: var(--comfy-input-bg, #222); stroke-width: 1.5px; }
.calibquant-plan .cq-ends { display: flex; justify-content: space-between; padding: 0 3%; color: var(--descrip-text, #999); }
.calibquant-plan .cq-slide { display: block; box-sizing: border-box; width: calc(94% + 16px); margin: 2px 0 0 calc(3% - 8px); accent-color: var(--cq-focus); }
`;
