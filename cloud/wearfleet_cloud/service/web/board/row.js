// One device: name, what it does now, its ribbon, its accuracy. Elements are made once, then only their text changes.

import { ago, capital, hundredths, make, percent, setText } from "./dom.js";
import { Ribbon } from "./ribbon.js";
import { FLAGGED } from "./store.js";

const QUIET_S = 30;
const GLOW_WINDOWS = 8;

export class Row {
  constructor(context) {
    this.context = context;
    this.device = null;
    this.cursor = null;
    this.#build();
    this.ribbon = new Ribbon(this.canvas, context.theme);
    this.#listen();
  }

  update(device) {
    this.device = device;
    setText(this.name, device.name);
    this.name.title = device.id;
    this.#showActivity(device);
    setText(this.model, device.model_version ? `v${device.model_version}` : "no model");
    this.model.title = device.model_id;
    this.personal.hidden = !device.personalised;
    setText(this.before, hundredths(device.accuracy_before));
    setText(this.after, percent(device.accuracy_after));
    this.accuracy.classList.toggle("wf-known", device.accuracy_before !== null || device.accuracy_after !== null);
    this.#showGain(device);
    const lost = device.lost ? ` · ${device.lost} lost` : "";
    setText(this.counts, device.received ? `${percent(device.ood_rate)} unfamiliar${lost}` : "");
    this.canvas.setAttribute("aria-label", `Activities of ${device.name}: ${device.received} windows`);
    this.#glow(device);
    this.tick();
    this.draw();
  }

  draw() {
    if (!this.device) return;
    const index = this.cursor === null ? null : Math.min(this.cursor, this.ribbon.columns.length - 1);
    this.ribbon.draw(this.device.cells, this.context.store.legend, index === null ? null : this.ribbon.columns[index]);
  }

  tick() {
    const { online, last_seen_ms: seen } = this.device;
    const seconds = (this.context.store.nowMs() - seen) / 1000;
    const state = !online ? "offline" : seconds > QUIET_S ? "quiet" : "online";
    this.root.dataset.state = state;
    const age = seen ? ago(seconds) : "never seen";
    setText(this.seen, state === "online" ? age : `${state} · ${age}`);
  }

  #build() {
    this.name = make("h2", "wf-name");
    this.seen = make("span", "wf-seen");
    this.model = make("span", "wf-chip");
    this.personal = make("span", "wf-chip wf-personal", "personal");
    this.activity = make("p", "wf-activity");
    this.unsure = make("span", "wf-unsure", "unfamiliar");
    this.confidence = make("span", "wf-confidence");
    this.canvas = make("canvas", "wf-ribbon");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.before = make("span", "wf-before");
    this.after = make("span", "wf-after");
    this.gain = make("span", "wf-gain");
    this.accuracy = make("div", "wf-accuracy", this.before, make("span", "wf-arrow", "→"), this.after, this.gain);
    this.counts = make("span", "wf-counts");
    const status = make("p", "wf-status", make("span", "wf-dot"), this.seen);
    this.root = make(
      "li",
      "wf-row",
      make("div", "wf-who", this.name, status, make("p", "wf-chips", this.model, this.personal)),
      make("div", "wf-now", this.activity, this.unsure, this.confidence),
      make("div", "wf-track-line", this.canvas),
      make("div", "wf-result", make("span", "wf-caption", "accuracy"), this.accuracy, this.counts),
    );
  }

  #showActivity(device) {
    const text = device.activity === null ? "waiting" : capital(device.activity);
    setText(this.activity, text);
    this.activity.dataset.length = text.length > 24 ? "long" : text.length > 15 ? "medium" : "short";
    const place = this.context.store.legend.indexOf(device.activity);
    this.root.style.setProperty("--wf-activity", place < 0 ? "" : this.context.theme.colour(place).fill);
    setText(this.confidence, device.confidence === null ? "" : percent(device.confidence));
  }

  #showGain({ accuracy_before: before, accuracy_after: after }) {
    const known = before !== null && after !== null;
    const points = known ? Math.round(100 * after) - Math.round(100 * before) : 0;
    setText(this.gain, known ? `${points < 0 ? "−" : "+"}${Math.abs(points)}` : "");
    this.gain.classList.toggle("wf-worse", points < 0);
  }

  #glow(device) {
    const recent = device.cells.slice(-GLOW_WINDOWS);
    const share = recent.length ? recent.filter((cell) => cell[FLAGGED]).length / recent.length : 0;
    this.root.classList.toggle("wf-ood", device.out_of_distribution);
    this.root.style.setProperty("--wf-glow", device.out_of_distribution ? 0.45 + 0.55 * share : 0);
    this.unsure.hidden = !device.out_of_distribution;
  }

  #listen() {
    this.canvas.addEventListener("pointermove", (event) => {
      const at = event.clientX - this.canvas.getBoundingClientRect().left;
      this.#point(this.ribbon.columns.indexOf(this.ribbon.cellAt(at)));
    });
    this.canvas.addEventListener("pointerleave", () => this.#point(-1));
    this.canvas.addEventListener("blur", () => this.#point(-1));
    this.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
      if (event.key === "Escape") this.#point(-1);
      if (!step) return;
      event.preventDefault();
      const from = this.cursor ?? -step;
      this.#point(Math.max(0, Math.min(this.ribbon.columns.length - 1, from + step)));
    });
  }

  #point(index) {
    this.cursor = index < 0 ? null : index;
    this.draw();
    const column = this.cursor === null ? null : this.ribbon.columns[this.cursor];
    if (column) this.context.tooltip.show(this.canvas, column, this.context.store.legend);
    else this.context.tooltip.hide();
  }
}
