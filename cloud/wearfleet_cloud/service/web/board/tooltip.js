// What one window of a ribbon was: shown under the pointer, or at the cursor that the arrow keys move.

import { make } from "./dom.js";
import { ACTIVITY, CONFIDENCE, FLAGGED, SCORE, SEQUENCE, TIME } from "./store.js";

export class Tooltip {
  constructor(parent) {
    this.box = make("div", "wf-tip");
    this.box.setAttribute("role", "status");
    this.box.hidden = true;
    parent.append(this.box);
  }

  show(canvas, column, legend) {
    const { cell } = column;
    const title = make("strong", "", legend[cell[ACTIVITY]]);
    const clock = new Date(cell[TIME]).toLocaleTimeString();
    const lines = [
      `${Math.round(100 * cell[CONFIDENCE])} % confident`,
      `${clock} · window ${cell[SEQUENCE]}`,
      `OOD score ${cell[SCORE]}${cell[FLAGGED] ? " · unfamiliar" : ""}`,
    ];
    this.box.replaceChildren(title, ...lines.map((line) => make("span", "", line)));
    this.box.hidden = false;
    const at = canvas.getBoundingClientRect();
    const middle = at.left + column.x + column.width / 2 - this.box.offsetWidth / 2;
    const left = Math.max(8, Math.min(middle, document.documentElement.clientWidth - this.box.offsetWidth - 8));
    const above = at.top - this.box.offsetHeight - 8;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}
