// Which cells of the map are chosen: a set of "row:column", a cursor, and boxes drawn from an anchor.
//
// rows: as heatmap/grid.js arranges them, each with its own number of cells (the last row may be longer or shorter).

export class Selection {
  constructor(rows) {
    this.rows = rows;
    this.clear();
  }

  clear() {
    this.cells = new Set();
    this.cursor = null; // [row, column]
    this.anchor = null;
    this.kept = new Set(); // what was chosen before the box that is being drawn
  }

  has(row, column) {
    return this.cells.has(`${row}:${column}`);
  }

  /** Layers of the chosen cells. */
  layers() {
    return [...this.cells].flatMap((key) => {
      const [row, column] = key.split(":").map(Number);
      return this.rows[row].cells[column];
    });
  }

  /** Begin a box at a cell; add: beside what is chosen. */
  start(row, column, add = false) {
    this.kept = add ? new Set(this.cells) : new Set();
    this.anchor = [row, column];
    this.extend(row, column);
  }

  /** Draw the box from its anchor to a cell. */
  extend(row, column) {
    this.anchor ??= [row, column];
    this.cursor = [row, column];
    const [top, bottom] = [this.anchor[0], row].sort((a, b) => a - b);
    const [left, right] = [this.anchor[1], column].sort((a, b) => a - b);
    this.cells = new Set(this.kept);
    for (let r = top; r <= bottom; r += 1) for (let c = left; c <= right; c += 1) this.#add(r, c);
  }

  row(row, add = false) {
    this.start(row, 0, add);
    this.extend(row, this.rows[row].cells.length - 1);
  }

  /** A block: that column of all rows but the one outside the blocks. */
  column(column, add = false) {
    this.start(0, column, add);
    this.extend(this.rows.findLastIndex((row) => !row.outside), column);
  }

  /** One step of the cursor, over empty cells; extend: the box grows. */
  move(down, right, extend = false) {
    if (!this.cursor) return this.start(...this.#first());
    let [row, column] = this.cursor;
    do {
      row += down;
      column += right;
      if (!this.rows[row] || column < 0 || column >= Math.max(...this.rows.map((r) => r.cells.length))) return undefined;
    } while (!this.rows[row].cells[column]?.length && !extend);
    return extend ? this.extend(row, column) : this.start(row, column);
  }

  #first() {
    const row = this.rows.findIndex((r) => r.cells.some((cell) => cell.length));
    return [row, this.rows[row].cells.findIndex((cell) => cell.length)];
  }

  #add(row, column) {
    if (this.rows[row]?.cells[column]?.length) this.cells.add(`${row}:${column}`);
  }
}
