// The map of a plan on its node: drawn from the node's output, edited by pointer and keys, written to the node's inputs.
//
// All that is shown follows from three things: the document of the last run, the text of the `edits` input, and the
// strategy's number. So undo, redo and loading a workflow need nothing but refresh().
import { gradient } from "../heatmap/colours.js";
import { make, plainTable, swatch } from "../heatmap/elements.js";
import { arrange, drawGrid } from "../heatmap/grid.js";
import { gigabytes, short } from "../heatmap/numbers.js";
import { tooltip } from "../heatmap/tooltip.js";
import { amountFor, baseOf } from "./budget.js";
import { bits, costOf, counts, damage, read, size } from "./document.js";
import { format, locked, overlay, parse, withOption, without } from "./edits.js";
import { drawPlot } from "./plot.js";
import { Selection } from "./selection.js";
import { VIEWS, colours, ink, look } from "./views.js";
import { makeWalk } from "./walk.js";

export const CELL = 17; // pixels, the least width
const HINT = "Click or drag to select, Shift adds · 1–9 set a format · L locks · Delete resets · Esc deselects";
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let maps = 0;

export class PlanMap {
  /** inputs: {edits(), setEdits(text), amount(kind), setAmount(kind, value), open(), setOpen(on), view(), setView(key)}. */
  constructor(inputs) {
    this.inputs = inputs;
    this.data = null;
    this.id = `calibquant-plan-${(maps += 1)}`;
    this.least = 20;
    this.content = make("div");
    this.element = make("div", "calibquant-heatmap calibquant-plan", "", [this.content]);
    this.element.addEventListener("pointermove", (event) => this.#hover(event));
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** A new document, or null: what the node ran is not known. */
  show(raw) {
    tooltip.hide();
    this.data = raw ? read(raw) : null;
    if (this.data) {
      this.walk = makeWalk(this.data);
      this.grid = arrange(this.data.layers, this.data.types);
      this.selection = new Selection(this.grid.rows);
    }
    this.#draw();
  }

  /** The inputs have changed. */
  refresh() {
    if (this.data && this.inputs.open(this.data) === this.drawn) this.#paint();
    else this.#draw();
  }

  // --- what is shown

  get edits() {
    return parse(this.inputs.edits()) ?? new Map();
  }

  #choice(amount = this.inputs.amount(this.data.kind)) {
    return overlay(this.data, baseOf(this.data, this.walk, amount, this.edits), this.edits);
  }

  #draw() {
    this.drawn = Boolean(this.data) && this.inputs.open(this.data);
    this.title = make("div", "cq-title");
    if (!this.data) {
      this.content.replaceChildren(this.title);
      this.#paintWithoutRun();
      return;
    }
    this.content.replaceChildren(this.title, ...(this.drawn ? this.#body() : []));
    this.#paint();
  }

  #body() {
    const scroll = make("div", "cq-scroll", "", [this.#grid()]);
    this.tools = make("div", "cq-tools");
    this.legend = make("div", "cq-tools");
    const parts = [this.tools, this.legend, scroll, make("div", "cq-hint", HINT)];
    return this.walk ? [...parts, this.#budget()] : parts;
  }

  #grid() {
    const map = drawGrid(this.grid, (layer) => this.#box(layer), CELL);
    map.tabIndex = 0;
    map.setAttribute("role", "grid");
    map.setAttribute("aria-multiselectable", "true");
    map.setAttribute("aria-label", "Formats by layer type and block");
    const [head, ...rows] = map.querySelectorAll(".cq-row");
    head.setAttribute("role", "row");
    for (const [column, number] of [...head.querySelectorAll(".cq-number")].entries()) {
      Object.assign(number, { column, role: "columnheader", title: `block ${this.grid.blocks[column]}` });
    }
    for (const [row, element] of rows.entries()) {
      element.setAttribute("role", "row");
      Object.assign(element.querySelector(".cq-label"), { row, role: "rowheader" });
      for (const [column, cell] of [...element.querySelectorAll(".cq-cell")].entries()) {
        Object.assign(cell, { at: [row, column], id: `${this.id}-${row}-${column}`, role: "gridcell" });
      }
    }
    map.addEventListener("pointerdown", (event) => this.#press(event));
    this.map = map;
    return map;
  }

  #box(layer) {
    const element = make("div", layer.protected ? "cq-layer cq-kept" : "cq-layer");
    element.layer = layer;
    return element;
  }

  #paint() {
    const { data } = this;
    const chosen = this.#choice();
    this.chosen = chosen;
    this.#paintTitle(chosen);
    if (!this.drawn) return;
    this.#paintTools(chosen);
    this.#paintCells(chosen);
    this.#paintSelection();
    if (this.plot) this.plot.move({ size: size(data, chosen), error: damage(data, chosen) });
    if (this.walk && document.activeElement !== this.slider) this.slider.value = size(data, chosen);
  }

  #paintWithoutRun() {
    const count = this.edits.size;
    const text = count ? `${layers(count)} set by hand. Run to see the map.` : "Run to see the map.";
    this.title.replaceChildren(make("span", "cq-sums", text), ...(count ? [this.#resetAll()] : []));
  }

  #paintTitle(chosen) {
    const { data, edits } = this;
    const now = sums(data, chosen);
    const changed = chosen.some((option, i) => option !== data.free[i].chosen);
    const told = make("span", "cq-sums", "", [make("b", "", `${changed ? "≈ " : ""}${now[0]}`), ` · ${now.slice(1).join(" · ")}`]);
    const was = sums(data, data.free.map((layer) => layer.chosen));
    const asPlanned = this.drawn ? `as planned for ${data.source}` : "";
    told.append(make("div", "cq-was", changed ? `planned: ${was.join(" · ")} – run to plan it anew` : asPlanned));
    told.setAttribute("role", "status");
    const strange = [...edits.keys()].filter((name) => !data.byName.has(name)).length;
    const hand = edits.size ? [`${edits.size} set by hand${strange ? `, ${strange} of them not in this model` : ""}`, this.#resetAll()] : [];
    const toggle = button(this.drawn ? "Hide map" : "Show map", () => this.inputs.setOpen(!this.drawn));
    toggle.setAttribute("aria-expanded", String(this.drawn));
    this.title.replaceChildren(told, ...hand, toggle);
  }

  #resetAll() {
    return button("Reset all", () => this.inputs.setEdits(""), "Let the plan decide for all layers again");
  }

  #paintTools(chosen) {
    const { data, selection } = this;
    const picked = selection.layers().filter((layer) => !layer.protected);
    const found = counts(data, chosen);
    const focused = [...this.tools.children].indexOf(document.activeElement);
    const settable = data.options.filter((option) => option.settable);
    const palette = data.options.filter((o) => o.settable || found[o.index]).map((option) => {
      const number = settable.indexOf(option) + 1;
      return this.#format(option, found[option.index], number, picked);
    });
    const some = picked.length > 0;
    const lock = button("Lock", () => this.#lock(), "Keep what the selected layers have, whatever the size (L)", !some);
    const reset = button("Reset", () => this.#reset(), "Let the plan decide for the selected layers again (Delete)", !some);
    for (const each of [lock, reset]) each.classList.add("cq-do");
    this.tools.replaceChildren(...palette, make("span", "cq-gap"), lock, reset);
    if (focused >= 0) this.tools.children[focused]?.focus?.();
    const selected = make("span", "cq-selected", some ? `${layers(picked.length)} selected` : "");
    this.legend.replaceChildren(...this.#legend(chosen), make("span", "cq-gap"), selected);
  }

  #format(option, count, number, picked) {
    const { letters, background, ink: text } = look(option);
    const key = make("span", "cq-key", letters);
    key.style.cssText = `background:${background};color:${text}`;
    const possible = option.settable && picked.some((layer) => layer.costs[option.index]);
    const words = option.settable ? `Set the selected layers to ${option.title} (key ${number})` : "A recipe's format, not to be set by hand";
    const set = button("", () => this.#set(option), words, !possible);
    set.append(key, make("span", "cq-do", option.title), make("span", "cq-count", String(count)));
    return set;
  }

  #legend(chosen) {
    const views = VIEWS.filter((view) => !view.of || this.data.priced);
    const select = make("select");
    select.title = "What the colours mean";
    select.setAttribute("aria-label", "What the colours mean");
    select.replaceChildren(...views.map((view) => new Option(view.title, view.key)));
    select.value = this.#view().key;
    select.onchange = () => this.inputs.setView(select.value);
    const { range } = colours(this.data, chosen, this.#view());
    const kept = make("span", "cq-legend", "", [swatch("cq-kept"), "protected"]);
    const choice = views.length > 1 ? [select] : [];
    if (!range) return [...choice, kept];
    const bar = make("span", "cq-bar");
    bar.style.background = gradient();
    const { show, note } = this.#view();
    const scale = make("span", "cq-legend", "", [make("span", "cq-least", show(range.low)), bar, make("span", "cq-most", show(range.high))]);
    scale.title = `${note}${range.name ? `, ${range.name}` : ""}`;
    return [...choice, scale, kept];
  }

  #view() {
    const view = VIEWS.find((v) => v.key === this.inputs.view());
    return view?.of && this.data.priced ? view : VIEWS[0];
  }

  #paintCells(chosen) {
    const { data, edits } = this;
    const paint = colours(data, chosen, this.#view());
    for (const element of this.map.querySelectorAll(".cq-layer:not(.cq-kept)")) {
      const { layer } = element;
      const option = data.options[chosen[layer.index]];
      const background = paint.of(layer);
      const byHand = edits.has(layer.name);
      element.style.background = background;
      element.style.color = ink(background);
      element.textContent = look(option).letters;
      element.classList.toggle("cq-edited", byHand);
    }
    for (const cell of this.map.querySelectorAll(".cq-cell")) {
      const [row, column] = cell.at;
      cell.setAttribute("aria-label", this.grid.rows[row].cells[column].map((layer) => this.#spoken(layer, chosen)).join("; "));
    }
  }

  #spoken(layer, chosen) {
    if (layer.protected) return `${layer.name}: protected`;
    return `${layer.name}: ${this.data.options[chosen[layer.index]].title}${this.edits.has(layer.name) ? ", set by hand" : ""}`;
  }

  #paintSelection() {
    const { selection, map } = this;
    for (const cell of map.querySelectorAll(".cq-cell")) {
      const on = selection.has(...cell.at);
      const cursor = selection.cursor?.join() === cell.at.join();
      cell.classList.toggle("cq-chosen", on);
      cell.classList.toggle("cq-cursor", cursor);
      cell.setAttribute("aria-selected", String(on));
      if (cursor) map.setAttribute("aria-activedescendant", cell.id);
    }
    if (!selection.cursor) map.removeAttribute("aria-activedescendant");
  }

  // --- the budget

  #budget() {
    const { data, walk } = this;
    const curve = walk.stops.map((stop) => ({ size: stop.size, error: stop.damage }));
    this.plot = drawPlot(curve, data.points);
    const [low, high] = [curve[0].size, curve.at(-1).size];
    const slider = make("input", "cq-slide");
    Object.assign(slider, { type: "range", min: low, max: high, step: Math.max(1, (high - low) / 500) });
    slider.setAttribute("aria-label", "Size of the file");
    slider.title = `Walks the curve and sets ${data.kind} of the strategy; layers set by hand stay`;
    slider.oninput = () => this.#slide();
    slider.onchange = () => this.#slid();
    this.slider = slider;
    const ends = [curve[0], curve.at(-1)].map((p) => make("span", "", `${gigabytes(p.size)} · error ${short(p.error)}`));
    return make("div", "cq-budget", "", [this.plot.svg, slider, make("div", "cq-ends", "", ends)]);
  }

  #at(bytes) {
    return overlay(this.data, this.walk.within((chosen) => size(this.data, chosen) <= bytes), this.edits);
  }

  #slide() {
    const chosen = this.#at(Number(this.slider.value));
    this.slider.setAttribute("aria-valuetext", sums(this.data, chosen).join(", "));
    this.chosen = chosen;
    this.#paintTitle(chosen);
    this.#paintCells(chosen);
    this.plot.move({ size: size(this.data, chosen), error: damage(this.data, chosen) });
  }

  #slid() {
    const chosen = this.#at(Number(this.slider.value));
    this.inputs.setAmount(this.data.kind, amountFor(this.data, chosen));
  }

  // --- what a person does

  #set(option) {
    this.inputs.setEdits(format(withOption(this.edits, this.selection.layers(), option)));
  }

  #lock() {
    this.inputs.setEdits(format(locked(this.data, this.edits, this.selection.layers(), this.chosen)));
  }

  #reset() {
    this.inputs.setEdits(format(without(this.edits, this.selection.layers())));
  }

  #press(event) {
    if (event.button !== 0) return;
    const cell = event.target.closest(".cq-cell");
    const { row, column } = event.target;
    if (cell) this.selection.start(...cell.at, event.shiftKey);
    else if (row !== undefined) this.selection.row(row, event.shiftKey);
    else if (column !== undefined) this.selection.column(column, event.shiftKey);
    else this.selection.clear();
    this.map.focus({ preventScroll: true });
    event.preventDefault(); // no selection of text
    this.#selected();
    if (cell) this.#drag();
  }

  #drag() {
    const move = (event) => {
      const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest(".cq-cell");
      if (!cell?.at || !this.map.contains(cell) || this.selection.cursor?.join() === cell.at.join()) return;
      this.selection.extend(...cell.at);
      this.#selected();
    };
    const end = () => {
      window.removeEventListener("pointermove", move, true);
      window.removeEventListener("pointerup", end, true);
    };
    window.addEventListener("pointermove", move, true);
    window.addEventListener("pointerup", end, true);
  }

  #selected() {
    this.#paintSelection();
    this.#paintTools(this.chosen);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey) return; // undo, redo, queue: ComfyUI's
    event.stopPropagation(); // all others would be its shortcuts
    if (event.target !== this.map || event.altKey) return;
    if (this.#act(event)) event.preventDefault();
  }

  #act({ key, shiftKey }) {
    const { selection } = this;
    const option = this.data.options.filter((o) => o.settable)[Number(key) - 1];
    if (ARROWS[key]) selection.move(...ARROWS[key], shiftKey);
    else if (key === "Escape") selection.clear();
    else if (option && selection.cells.size) return this.#set(option) ?? true;
    else if (key.toLowerCase() === "l" && selection.cells.size) return this.#lock() ?? true;
    else if ((key === "Delete" || key === "Backspace") && selection.cells.size) return this.#reset() ?? true;
    else return false;
    this.#selected();
    this.#reveal(this.map.querySelector(".cq-cursor"));
    return true;
  }

  /** Scroll the map, and nothing around it, as far as it takes to see a cell beside its row's label. */
  #reveal(cell) {
    if (!cell) return;
    const box = this.map.parentElement;
    const label = this.map.querySelector(".cq-label").offsetWidth;
    const { offsetLeft: left, offsetTop: top, offsetWidth: width, offsetHeight: height } = cell;
    box.scrollLeft = Math.min(Math.max(box.scrollLeft, left + width - box.clientWidth), left - label);
    box.scrollTop = Math.min(Math.max(box.scrollTop, top + height - box.clientHeight), top);
  }

  #hover(event) {
    const { layer, about } = event.target;
    if (layer && this.data && !event.buttons) tooltip.show(`${layer.name} ${this.chosen[layer.index]}`, () => this.#describe(layer), event);
    else if (about) tooltip.show(about, () => [make("b", "", about.name), make("div", "", `${gigabytes(about.size)} · error ${short(about.error)}`)], event);
    else tooltip.hide();
  }

  #describe(layer) {
    const head = [make("b", "", layer.name), make("div", "", layer.shape.join(" × "))];
    if (layer.protected) return [...head, make("div", "", `protected: ${layer.protected}`)];
    const own = this.chosen[layer.index];
    const rows = this.data.options.filter((option) => layer.costs[option.index]).map((option) => {
      const cost = costOf(layer, option.index);
      const numbers = this.data.priced ? [short(cost.error), short(cost.damage)] : [];
      return [option.index === own ? "▸" : "", option.title, kilobytes(cost.bytes), ...numbers];
    });
    const titles = ["", "", "size", ...(this.data.priced ? ["error", "damage"] : [])];
    const told = this.edits.has(layer.name) ? [make("div", "", "set by hand")] : [];
    return [...head, ...told, plainTable([titles, ...rows])];
  }
}

function button(text, act, title = "", disabled = false) {
  const element = make("button", "", text);
  Object.assign(element, { type: "button", title, disabled, onclick: act });
  return element;
}

/** Of one layer. */
function kilobytes(bytes) {
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(2)} MB`;
}

function layers(count) {
  return `${count} layer${count === 1 ? "" : "s"}`;
}

/** Size, bits, error of a choice, in words. */
function sums(data, chosen) {
  const found = [gigabytes(size(data, chosen)), `${bits(data, chosen).toFixed(2)} bits a weight`];
  return data.priced ? [...found, `predicted error ${short(damage(data, chosen))}`] : found;
}
