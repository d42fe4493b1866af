// The federated round as a ring: a segment for each device, filled as far as the device has come.

import { change, make, makeSvg, setText } from "./dom.js";

const FILL = { invited: 0, fetched: 0.35, training: 0.7, submitted: 1, declined: 1, late: 1 };
const NAMED_AT_MOST = 8;
const RADIUS = 96;
const CENTRE = 120;

export class Ring {
  constructor() {
    this.segments = makeSvg("g");
    this.count = makeSvg("text", { x: CENTRE, y: 126, class: "wf-ring-count" });
    this.over = makeSvg("text", { x: CENTRE, y: 82, class: "wf-ring-label" }, "round");
    this.state = makeSvg("text", { x: CENTRE, y: 152, class: "wf-ring-state" });
    this.left = makeSvg("text", { x: CENTRE, y: 173, class: "wf-ring-label" });
    this.svg = makeSvg(
      "svg",
      { viewBox: "0 0 240 240", class: "wf-ring", role: "img" },
      this.segments,
      this.over,
      this.count,
      this.state,
      this.left,
    );
    this.list = make("ul", "wf-stages");
    this.run = null;
  }

  update(run) {
    this.run = run;
    setText(this.count, run.rounds_total ? `${run.number} / ${run.rounds_total}` : `${run.number}`);
    setText(this.state, run.state);
    this.svg.setAttribute("aria-label", `Round ${run.number} of ${run.rounds_total}: ${run.state}`);
    this.segments.replaceChildren(...arcs(run.participants));
    const few = run.participants.length <= NAMED_AT_MOST;
    this.list.replaceChildren(...(few ? run.participants.map(namedStage) : countedStages(run.participants)));
  }

  tick(nowMs) {
    if (!this.run) return;
    const seconds = this.run.deadline_ms === null ? 0 : Math.ceil((this.run.deadline_ms - nowMs) / 1000);
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} left`;
    setText(this.left, seconds > 0 ? clock : "");
  }
}

function arcs(participants) {
  const share = 1 / Math.max(1, participants.length);
  const gap = participants.length > 1 ? Math.min(0.012, 0.2 * share) : 0;
  return participants.flatMap((who, i) => {
    const from = i * share + gap / 2;
    const length = share - gap;
    const fill = FILL[who.stage];
    const title = makeSvg("title");
    title.textContent = `${who.name}: ${who.stage}`;
    const track = makeSvg("path", { d: arc(from, length), class: "wf-arc wf-track" }, title);
    if (!fill) return [track];
    return [track, makeSvg("path", { d: arc(from, length * fill), class: `wf-arc wf-${who.stage}` })];
  });
}

// A circular arc; start and length are shares of the full circle, clockwise from the top.
function arc(start, length) {
  const safe = Math.min(length, 0.9999);
  const [a, b] = [start, start + safe].map((turn) => 2 * Math.PI * (turn - 0.25));
  const at = (angle) => `${CENTRE + RADIUS * Math.cos(angle)} ${CENTRE + RADIUS * Math.sin(angle)}`;
  return `M ${at(a)} A ${RADIUS} ${RADIUS} 0 ${safe > 0.5 ? 1 : 0} 1 ${at(b)}`;
}

function namedStage(who) {
  const known = who.accuracy_before !== null || who.accuracy_after !== null;
  const accuracy = known ? change(who.accuracy_before, who.accuracy_after) : "";
  return stageItem(who.stage, who.name, who.stage, accuracy);
}

function countedStages(participants) {
  const counts = new Map();
  for (const { stage } of participants) counts.set(stage, (counts.get(stage) ?? 0) + 1);
  return [...counts].map(([stage, count]) => stageItem(stage, stage, "", String(count)));
}

function stageItem(stage, name, word, value) {
  return make(
    "li",
    `wf-stage wf-is-${stage}`,
    make("span", "wf-stage-mark"),
    make("span", "wf-stage-name", name),
    make("span", "wf-stage-word", word),
    make("span", "wf-stage-value", value),
  );
}
