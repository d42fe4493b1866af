// Accuracy over the finished rounds: before local training (thin) and after it (bold).

import { change, make, makeSvg, percent, setText } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 96;
const PAD = 8;

export class Spark {
  constructor() {
    this.now = make("strong", "wf-spark-now");
    this.svg = makeSvg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "wf-spark", role: "img" });
    this.root = make("figure", "wf-history", make("figcaption", "", make("span", "", "mean accuracy by round"), this.now), this.svg);
  }

  update(history) {
    const known = history.filter((done) => done.accuracy_before !== null && done.accuracy_after !== null);
    this.root.hidden = known.length === 0;
    if (!known.length) return;
    const last = known.at(-1);
    setText(this.now, change(last.accuracy_before, last.accuracy_after));
    this.svg.setAttribute("aria-label", `Round ${last.number}: ${percent(last.accuracy_before)} before, ${percent(last.accuracy_after)} after`);
    const low = Math.max(0, Math.min(...known.flatMap((done) => [done.accuracy_before, done.accuracy_after])) - 0.05);
    const x = (i) => (known.length === 1 ? WIDTH / 2 : PAD + (i * (WIDTH - 2 * PAD)) / (known.length - 1));
    const y = (share) => HEIGHT - PAD - ((share - low) / (1.02 - low)) * (HEIGHT - 2 * PAD);
    this.svg.replaceChildren(
      makeSvg("line", { x1: 0, x2: WIDTH, y1: y(1), y2: y(1), class: "wf-spark-top" }),
      line(known.map((done, i) => [x(i), y(done.accuracy_before)]), "wf-spark-before"),
      line(known.map((done, i) => [x(i), y(done.accuracy_after)]), "wf-spark-after"),
      ...dots(known, x, y),
    );
  }
}

function line(points, className) {
  return makeSvg("polyline", { points: points.map((at) => at.join(",")).join(" "), class: className });
}

function dots(known, x, y) {
  const shown = known.length <= 30 ? known.map((_, i) => i) : [known.length - 1];
  return shown.flatMap((i) => [
    makeSvg("circle", { cx: x(i), cy: y(known[i].accuracy_before), r: 3, class: "wf-spark-dot-before" }),
    makeSvg("circle", { cx: x(i), cy: y(known[i].accuracy_after), r: 4.5, class: "wf-spark-dot-after" }),
  ]);
}
