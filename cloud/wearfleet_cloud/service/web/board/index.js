// The board: header, rows, round. Takes messages, redraws once a frame, and only what changed.

import { make, makeSvg, setText } from "./dom.js";
import { Ring } from "./ring.js";
import { Row } from "./row.js";
import { Spark } from "./spark.js";
import { Store } from "./store.js";
import { Theme } from "./theme.js";
import { Tooltip } from "./tooltip.js";

const SILENT_MS = 7000;
const DENSE_FROM = 7;

export class Board {
  constructor(host, { title, enrolHint, palette, resync }) {
    this.resync = resync;
    this.store = new Store();
    this.rows = new Map();
    this.dirty = { devices: new Set(), round: false, all: false };
    this.frame = null;
    this.heardMs = Date.now();
    this.#build(title, enrolHint);
    this.tooltip = new Tooltip(this.root);
    this.theme = new Theme(this.root, palette, () => this.#redrawAll());
    this.themeButton.addEventListener("click", () => this.theme.toggle());
    this.clock = setInterval(() => this.#tick(), 1000);
    this.sizes = new ResizeObserver(() => this.#redrawAll());
    this.sizes.observe(this.list);
    loadStyle().then(() => host.append(this.root));
  }

  receive(message) {
    const change = this.store.apply(message);
    if (change === null) {
      this.resync();
      return;
    }
    this.heardMs = Date.now();
    this.root.classList.remove("wf-silent");
    for (const id of change.devices) this.dirty.devices.add(id);
    this.dirty.round ||= change.roundChanged;
    this.dirty.all ||= change.full;
    this.#schedule();
  }

  close() {
    clearInterval(this.clock);
    cancelAnimationFrame(this.frame);
    this.sizes.disconnect();
    this.theme.close();
  }

  #schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#render();
    });
  }

  #redrawAll() {
    if (!this.store.fleet) return;
    for (const id of this.store.devices.keys()) this.dirty.devices.add(id);
    this.dirty.all = true;
    this.#schedule();
  }

  #render() {
    const { devices, round, all } = this.dirty;
    this.dirty = { devices: new Set(), round: false, all: false };
    if (all) this.#dropRows();
    this.list.style.setProperty("--wf-devices", this.store.devices.size);
    this.root.classList.toggle("wf-dense", this.store.devices.size >= DENSE_FROM);
    for (const id of devices) this.#row(id).update(this.store.devices.get(id));
    this.#showHeader();
    this.#showLegend();
    if (round || all) this.#showRound();
    this.root.dataset.version = String(this.store.version);
  }

  #dropRows() {
    for (const [id, row] of this.rows) {
      if (this.store.devices.has(id)) continue;
      row.root.remove();
      this.rows.delete(id);
    }
  }

  #row(id) {
    if (!this.rows.has(id)) {
      const row = new Row(this);
      this.rows.set(id, row);
      this.list.append(row.root);
    }
    return this.rows.get(id);
  }

  #showHeader() {
    const { fleet } = this.store;
    const versions = fleet.model_versions;
    setText(this.online, `${fleet.online} / ${fleet.devices}`);
    setText(this.rate, fleet.windows_per_s.toFixed(fleet.windows_per_s < 100 ? 1 : 0));
    setText(this.model, versions.length ? versions.slice(-2).map((version) => `v${version}`).join(" · ") : "–");
    setText(this.badge, [fleet.simulated ? "simulated" : "", fleet.source_name].filter(Boolean).join(" · "));
    this.badge.hidden = !this.badge.textContent;
    this.badge.classList.toggle("wf-simulated", fleet.simulated);
    this.empty.hidden = fleet.devices > 0;
    this.main.hidden = fleet.devices === 0;
  }

  #showLegend() {
    const { legend } = this.store;
    const key = `${this.theme.name} ${legend.join("\n")}`;
    if (key === this.legendKey) return;
    this.legendKey = key;
    this.legend.replaceChildren(
      ...legend.map((name, place) => {
        const swatch = make("span", "wf-swatch");
        const { fill, striped } = this.theme.colour(place);
        swatch.style.setProperty("--wf-activity", fill);
        swatch.classList.toggle("wf-striped", striped);
        return make("li", "", swatch, name);
      }),
      make("li", "", make("span", "wf-swatch wf-unfamiliar"), "unfamiliar"),
    );
  }

  #showRound() {
    const run = this.store.round;
    this.noRound.hidden = run !== null;
    this.running.hidden = run === null;
    setText(this.strategy, run === null ? "" : run.strategy);
    if (run === null) return;
    this.ring.update(run);
    this.ring.tick(this.store.nowMs());
    this.spark.update(run.history);
  }

  #tick() {
    this.root.classList.toggle("wf-silent", Date.now() - this.heardMs > SILENT_MS);
    for (const row of this.rows.values()) row.tick();
    this.ring.tick(this.store.nowMs());
  }

  #build(title, enrolHint) {
    this.ring = new Ring();
    this.spark = new Spark();
    this.badge = make("span", "wf-badge");
    this.online = make("strong");
    this.rate = make("strong");
    this.model = make("strong");
    this.themeButton = make("button", "wf-theme", halves());
    this.themeButton.setAttribute("aria-label", "Switch between light and dark");
    this.silent = make("span", "wf-lost", "no connection");
    this.silent.setAttribute("role", "alert");
    const stats = [
      ["devices online", this.online],
      ["windows / s", this.rate],
      ["model", this.model],
    ].map(([label, value]) => make("div", "wf-stat", value, make("span", "", label)));
    const brand = make("div", "wf-brand", mark(), make("h1", "", title), this.badge, this.silent);
    const header = make("header", "wf-top", brand, make("div", "wf-stats", ...stats), this.themeButton);
    this.legend = make("ul", "wf-legend");
    this.list = make("ul", "wf-rows");
    this.strategy = make("span", "wf-strategy");
    this.running = make("div", "wf-running", this.ring.svg, this.ring.list, this.spark.root);
    this.noRound = make("p", "wf-no-round", "No federated run yet. Start one with ", make("code", "", "wearfleet-cloud federation start"));
    const panel = make("aside", "wf-round", make("h2", "", "Federated round ", this.strategy), this.running, this.noRound);
    this.main = make("main", "wf-main", make("section", "wf-fleet", this.legend, this.list), panel);
    this.empty = make(
      "main",
      "wf-empty",
      mark(),
      make("h2", "", "No device yet"),
      make("p", "", "Make a one-time code here, then enrol a device with it:"),
      make("code", "", "wearfleet-cloud devices enrol-code"),
      make("code", "", enrolHint),
      make("p", "", "It appears on this page with its first window."),
    );
    this.main.hidden = true;
    this.empty.hidden = true;
    this.root = make("div", "wf", header, this.main, this.empty);
  }
}

function mark() {
  const line = makeSvg("path", { d: "M4 17h5l3-8 5 15 4-11 2 4h5", class: "wf-mark-line" });
  return makeSvg("svg", { viewBox: "0 0 32 32", class: "wf-mark", "aria-hidden": "true" }, makeSvg("rect", { width: 32, height: 32, rx: 9 }), line);
}

function halves() {
  const path = makeSvg("path", { d: "M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20zm0 2.4v15.2a7.6 7.6 0 0 1 0-15.2z" });
  return makeSvg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, path);
}

function loadStyle() {
  const link = make("link");
  link.rel = "stylesheet";
  link.href = new URL("./board.css", import.meta.url);
  return new Promise((resolve, reject) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", reject);
    document.head.append(link);
  });
}
