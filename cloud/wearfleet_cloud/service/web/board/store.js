// The page's copy of the fleet: merges the server's messages, keeps each ribbon ordered and bounded.

// A cell as the server sends it: [start, sequence, milliseconds, activity, confidence, score, out of distribution].
export const START = 0;
export const SEQUENCE = 1;
export const TIME = 2;
export const ACTIVITY = 3;
export const CONFIDENCE = 4;
export const SCORE = 5;
export const FLAGGED = 6;

export class Store {
  constructor() {
    this.version = -1;
    this.devices = new Map();
    this.legend = [];
    this.fleet = null;
    this.round = null;
    this.skewMs = 0;
  }

  // Takes one message; gives what changed, or null when messages before it are missing.
  apply(message) {
    const full = message.since < 0;
    if (!full && message.since !== this.version) return null;
    if (full) this.devices.clear();
    this.version = message.version;
    this.skewMs = message.time_ms - Date.now();
    this.fleet = message.fleet;
    this.legend = message.legend;
    const roundChanged = "round" in message;
    if (roundChanged) this.round = message.round;
    for (const row of message.devices) this.#merge(row);
    return { full, roundChanged, devices: message.devices.map((row) => row.id) };
  }

  nowMs() {
    return Date.now() + this.skewMs;
  }

  #merge(row) {
    const cells = this.devices.get(row.id)?.cells ?? [];
    for (const cell of row.ribbon) insert(cells, cell);
    const extra = cells.length - this.fleet.ribbon_length;
    if (extra > 0) cells.splice(0, extra);
    this.devices.set(row.id, { ...row, ribbon: null, cells });
  }
}

function insert(cells, cell) {
  let place = cells.length;
  while (place > 0 && isAfter(cells[place - 1], cell)) place -= 1;
  cells.splice(place, 0, cell);
}

function isAfter(a, b) {
  return a[START] > b[START] || (a[START] === b[START] && a[SEQUENCE] > b[SEQUENCE]);
}
