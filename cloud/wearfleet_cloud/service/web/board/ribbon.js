// One device's recent activities on a canvas: a column a window, its solid part as high as the confidence.

import { ACTIVITY, CONFIDENCE, FLAGGED, SEQUENCE, START } from "./store.js";

const COLUMN_PX = 7;
const COLUMNS_ON_WIDE = 96;
const GAP_AT_START_PX = 5;

// Columns from the newest (right) to the oldest that fits, each {x, width, cell}; a missing window leaves room.
export function layOut(cells, width) {
  const columns = [];
  const column = Math.max(COLUMN_PX, Math.round(width / COLUMNS_ON_WIDE));
  let x = width;
  for (let i = cells.length - 1; i >= 0 && x > 0; i -= 1) {
    const newer = cells[i + 1];
    if (newer) {
      const same = newer[START] === cells[i][START];
      x -= same ? column * Math.min(40, newer[SEQUENCE] - cells[i][SEQUENCE] - 1) : GAP_AT_START_PX;
    }
    x -= column;
    columns.push({ x, width: column, cell: cells[i] });
  }
  return columns;
}

export class Ribbon {
  constructor(canvas, theme) {
    this.canvas = canvas;
    this.theme = theme;
    this.columns = [];
  }

  draw(cells, legend, cursor) {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const pixels = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== pixels[0] || this.canvas.height !== pixels[1]) [this.canvas.width, this.canvas.height] = pixels;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.columns = layOut(cells, width);
    const style = getComputedStyle(this.canvas);
    for (const column of this.columns) this.#column(pen, column, height);
    this.#hatch(pen, height, style.getPropertyValue("--wf-amber"));
    this.#labels(pen, legend, height);
    if (cursor) this.#cursor(pen, cursor, height, style.color);
  }

  cellAt(x) {
    return this.columns.find((column) => x >= column.x && x < column.x + column.width) ?? null;
  }

  #column(pen, { x, width, cell }, height) {
    const { fill, striped } = this.theme.colour(cell[ACTIVITY]);
    const solid = height * (0.25 + 0.75 * cell[CONFIDENCE]);
    pen.fillStyle = fill;
    pen.globalAlpha = 0.18;
    pen.fillRect(x, 0, width + 0.5, height);
    pen.globalAlpha = cell[FLAGGED] ? 0.4 : 1;
    pen.fillRect(x, height - solid, width + 0.5, solid);
    pen.globalAlpha = 1;
    if (striped) this.#stripe(pen, x, width, height - solid, solid);
  }

  #stripe(pen, x, width, top, tall) {
    pen.fillStyle = "rgba(255, 255, 255, 0.5)";
    for (let y = top + 4; y < top + tall; y += 9) pen.fillRect(x, y, width + 0.5, 3);
  }

  // Windows out of distribution: amber diagonal lines over the column and a bar on top of it.
  #hatch(pen, height, amber) {
    const flagged = this.columns.filter(({ cell }) => cell[FLAGGED]);
    if (!flagged.length) return;
    pen.save();
    pen.beginPath();
    for (const { x, width } of flagged) pen.rect(x, 0, width + 0.5, height);
    pen.clip();
    pen.strokeStyle = amber;
    pen.lineWidth = 3;
    pen.beginPath();
    const left = flagged.at(-1).x;
    const right = flagged[0].x + flagged[0].width;
    for (let x = left - height - ((left - height) % 8); x < right; x += 8) {
      pen.moveTo(x, height);
      pen.lineTo(x + height, 0);
    }
    pen.stroke();
    pen.fillStyle = amber;
    pen.fillRect(left, 0, right - left, 6);
    pen.restore();
  }

  #labels(pen, legend, height) {
    const size = Math.max(12, Math.min(20, 0.2 * height));
    pen.font = `600 ${size}px Roboto, system-ui, sans-serif`;
    pen.textBaseline = "alphabetic";
    for (const run of runs(this.columns)) {
      const name = legend[run.activity];
      if (pen.measureText(name).width + 14 > run.right - run.left) continue;
      pen.fillStyle = onColour(this.theme.colour(run.activity).fill);
      pen.fillText(name, Math.max(run.left, 0) + 7, height - 8);
    }
  }

  #cursor(pen, { x, width }, height, ink) {
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(x - 0.5, 1, width + 1, height - 2);
  }
}

// Neighbouring columns of one activity, without a gap and without a flagged window (its hatch would cross a name).
function runs(columns) {
  const found = [];
  for (const { x, width, cell } of columns) {
    const run = found.at(-1);
    const usable = !cell[FLAGGED] && cell[CONFIDENCE] > 0.3;
    if (run && usable && run.activity === cell[ACTIVITY] && Math.abs(run.left - x - width) < 0.5) run.left = x;
    else if (usable) found.push({ activity: cell[ACTIVITY], left: x, right: x + width });
  }
  return found;
}

function onColour(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
  return 0.2126 * r ** 2.2 + 0.7152 * g ** 2.2 + 0.0722 * b ** 2.2 > 0.2 ? "#10151f" : "#ffffff";
}
