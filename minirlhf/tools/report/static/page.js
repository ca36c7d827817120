// The page.  Texts of models enter it through textContent alone; nothing is asked of anybody but of the server that
// serves a live page.
"use strict";

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const WRITERS = { sft: "SFT", ppo: DATA.facts?.policy ?? "PPO" };

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const signed = (x, digits = 2) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits);
const plain = (x, digits = 2) => (x < 0 ? "\u2212" : "") + Math.abs(x).toFixed(digits);
const known = (x) => typeof x === "number";

// ---------------------------------------------------------------------------------------------------- tokens

// What a colour can tell, and what it cannot.  `both`: the scale has two ends around 0.
const MEASURES = {
  replaced: { label: "Score share", unit: "points", both: true,
    can: () => `By how much the ${DATA.reward}'s score falls when the reference writes another token here (mean of ${DATA.facts.replacements} tries). Orange holds the score up, blue holds it down.`,
    cannot: "One token changes at a time: of two words that say the same, neither seems to matter. The words behind it stay as they are, though they were written after this one." },
  added: { label: "Score so far", unit: "points", both: true,
    can: () => `By how much this token raised the ${DATA.reward}'s score of the text that ends with it. All tokens together add up to the score, less that of the prompt alone.`,
    cannot: "Half a sentence is not what the score was made for: it is a guess there, which jumps at commas and full stops and moves credit to whatever comes next." },
  judge_replaced: { label: "Judge's share", unit: "points", both: true,
    can: () => "The score share by the judge, a second reward model that training never saw.",
    cannot: "The judge is no person. Where both agree they may share a mistake; where they differ, the policy may have found what only its own reward model likes." },
  nats: { label: "Nats", unit: "nats", both: true,
    can: () => `log p(${WRITERS.ppo}) \u2212 log p(SFT): tokens that training made likelier are orange, those that it made rarer are blue.` +
      (known(DATA.facts.beta) ? ` Times ${DATA.facts.beta} it is the reward that this policy implies.` : ""),
    cannot: "It tells what changed, not what was rewarded: a token may be likelier because another one, which it leads to, was paid for." },
  advantage: { label: "Advantage", unit: "points", both: true,
    can: () => "By how much the rest of the text went better than the critic had expected before this token (GAE, before whitening). This is the push that the token would get in training.",
    cannot: "It is one text's luck, and the critic's mistakes are in it. Of SFT's text it is hypothetical: the policy did not write it." },
  value: { label: "Value", unit: "points", both: true,
    can: () => "What the critic expects before this token: the score at the end, less the KL penalty still to come.",
    cannot: "It is an average over what the policy would write from here, and not a judgement of the words before." },
  entropy: { label: "Entropy", unit: "nats", both: false,
    can: () => "How open the choice was: the entropy of the distribution that the writer drew this token from.",
    cannot: "A dark token is a fork in the road, not a mistake." },
};
const ROWS = [...Object.keys(MEASURES), "probability"];
let measure = "";
let scales = {};

function scaleOf(name) { // the 95th percentile of the sizes: a few large ones must not pale the rest
  const sizes = DATA.facts.samples.flatMap((s) => [s.sft, s.ppo]).flatMap((t) => t.columns[name] ?? []).filter(known).map(Math.abs);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
}

const inWords = (name, x) => name === "probability" ? `${(100 * x).toFixed(x < 0.01 ? 2 : 0)} %`
  : `${MEASURES[name].both ? signed(x) : plain(x)} ${MEASURES[name].unit}`;

function tokenSpan(text, i) {
  const word = text.tokens[i].replace(/^\s+/, "");
  const end = text.ended && i === text.tokens.length - 1;
  const span = node("span", { class: "t", role: "option", tabindex: i ? -1 : 0 }, end ? "end" : word || "\u00b7");
  span.classList.toggle("end", end);
  span.classList.toggle("part", !word && !end);
  span.classList.toggle("key", text.decisive.includes(i));
  Object.assign(span, { text, i });
  return span;
}

function paint(span) {
  const x = span.text.columns[measure]?.[span.i];
  const share = known(x) ? Math.min(1, Math.abs(x) / scales[measure]) : 0;
  span.classList.toggle("pos", known(x) && x >= 0);
  span.classList.toggle("neg", known(x) && x < 0);
  span.style.setProperty("--a", share.toFixed(3));
  const shown = known(x) ? inWords(measure, x) : "no number";
  span.setAttribute("aria-label", `${span.textContent}: ${MEASURES[measure].label} ${shown}`);
}

function textColumn(sample, who) {
  const text = sample[who];
  const parts = [["score", DATA.reward === "reward model" ? "score" : "reward"], ["judge", "judge"], ["kl", "KL"]]
    .filter(([name]) => known(text[name]) && !(who === "sft" && name === "kl"));
  const meta = node("div", { class: "meta" }, node("b", {}, WRITERS[who]),
    ...parts.map(([name, label]) => node("span", {}, `${label} ${name === "kl" ? plain(text.kl, 1) + " nats" : signed(text[name])}`)));
  const list = node("p", { class: "tokens", role: "listbox", dir: "auto", "aria-label": `${WRITERS[who]}'s text, token by token` });
  list.append(node("span", { class: "prompt" }, sample.prompt));
  text.tokens.forEach((token, i) => {
    const space = /^\s+/.exec(token);
    if (space) list.append(space[0]);
    list.append(tokenSpan(text, i));
  });
  return node("div", {}, meta, list);
}

function choose(name) {
  measure = name;
  const { both, unit, can, cannot } = MEASURES[name];
  $("can").replaceChildren(node("b", {}, "It tells "), lower(can()));
  $("cannot").replaceChildren(node("b", {}, "It cannot tell: "), lower(cannot));
  const steps = both ? [-1, -0.66, -0.33, 0, 0.33, 0.66, 1] : [0, 0.25, 0.5, 0.75, 1];
  const ramp = node("span", { class: "ramp", "aria-hidden": "true" }, ...steps.map((a) => {
    const box = node("i", { class: a < 0 ? "neg t" : "pos t" });
    box.style.setProperty("--a", Math.abs(a));
    return box;
  }));
  const far = scales[name];
  $("scale").replaceChildren(both ? signed(-far) : "0", ramp, `${both ? signed(far) : plain(far)} ${unit}`,
    node("span", {}, node("span", { class: "key" }, "underlined"), ": the fifth of the tokens with the largest score share"));
  for (const span of document.querySelectorAll(".tokens .t")) paint(span);
  for (const span of document.querySelectorAll(".t.on")) showTip(span);
}
const lower = (sentence) => /^[A-Z][a-z]/.test(sentence) ? sentence[0].toLowerCase() + sentence.slice(1) : sentence;

function whyView(facts) {
  const there = Object.keys(MEASURES).filter((name) => facts.samples.some((s) => s.ppo.columns[name] || s.sft.columns[name]));
  if (!there.length) return;
  scales = Object.fromEntries(there.map((name) => [name, scaleOf(name)]));
  const chips = node("fieldset", {}, node("legend", {}, "Colour by"), ...there.map((name, i) => node("label", { class: "chip" },
    node("input", { type: "radio", name: "measure", value: name, checked: i === 0, onchange: () => choose(name) }),
    node("span", {}, MEASURES[name].label))));
  const count = facts.samples.length;
  const notes = [`The first ${count} of ${facts.prompts} ${facts.split} prompts, in the order in which they were drawn: none was chosen. Point at a token, tap it, or move with the arrow keys.`];
  if (facts.left_out) notes.push(`No advantage and no value: ${facts.left_out}.`);
  if (facts.left) notes.push(`${facts.left} more are in why.json; the page would grow too large.`);
  $("why-view").append(
    node("p", { class: "soft" }, notes.join(" ")), chips,
    node("div", { class: "about", "aria-live": "polite" }, node("p", { id: "can" }), node("p", { id: "cannot", class: "soft" })),
    node("div", { class: "scale", id: "scale" }),
    ...facts.samples.map((sample, i) => node("article", { class: "pair" },
      node("h3", {}, `${i + 1}`), textColumn(sample, "sft"), textColumn(sample, "ppo"))));
  choose(there[0]);
}

function showTip(span) {
  for (const other of document.querySelectorAll(".t.on")) other.classList.remove("on");
  span.classList.add("on");
  const { text, i } = span;
  const rows = ROWS.filter((name) => text.columns[name]).flatMap((name) => {
    const x = text.columns[name][i];
    const label = name === "probability" ? "Probability" : MEASURES[name].label;
    const now = name === measure ? "now" : "";
    return [node("dt", { class: now }, label), node("dd", { class: now }, known(x) ? inWords(name, x) : "\u2013")];
  });
  const others = text.others[i].map(([other, p]) => `${other} ${(100 * p).toFixed(p < 0.01 ? 1 : 0)} %`);
  $("tip").replaceChildren(node("p", { class: "word", dir: "auto" }, span.classList.contains("end") ? "end of the text" : text.tokens[i].trim() || "\u00b7"),
    node("dl", {}, ...rows), others.length ? node("p", {}, `Instead: ${others.join(", ")}`) : null);
  $("tip").hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const width = $("tip").offsetWidth, height = $("tip").offsetHeight;
  const below = box.bottom + height + 12 < innerHeight || box.top < height + 12;
  $("tip").style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 16)) + scrollX}px`;
  $("tip").style.top = `${(below ? box.bottom + 8 : box.top - height - 8) + scrollY}px`;
}

function hideTip() {
  for (const other of document.querySelectorAll(".t.on")) other.classList.remove("on");
  $("tip").hidden = true;
}

document.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "touch") {
    const span = event.target.closest?.(".tokens .t");
    if (span) showTip(span);
    else if (!document.activeElement?.matches(".tokens .t")) hideTip();
  }
});
document.addEventListener("click", (event) => {
  const span = event.target.closest(".tokens .t");
  if (span) span.focus();
  else hideTip();
});
document.addEventListener("focusin", (event) => {
  if (event.target.matches(".tokens .t")) {
    for (const other of event.target.parentNode.querySelectorAll(".t")) other.tabIndex = other === event.target ? 0 : -1;
    showTip(event.target);
  } else hideTip();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hideTip();
  if (!event.target.matches?.(".tokens .t")) return;
  const all = [...event.target.parentNode.querySelectorAll(".t")];
  const at = all.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  all[to].focus();
});

// ---------------------------------------------------------------------------------------------------- curves

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 4", "10 3 2 3", "14 5", "1 5"];
const NAMES = { score: DATA.reward, judge: "judge", kl: "KL, nats per sequence", mean_length: "length, tokens",
  entropy: "entropy, nats per token" };
let cursor = null; // the iteration that the reader points at
const charts = [];

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The moving average of a list; near its ends it is that of the values there are.
function smooth(values, window) {
  const half = window >> 1;
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5, 10].find((m) => m * unit >= rough) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step && found.length < 50; k++) found.push(k * step);
  return found;
}
const tickText = (x) => (x < 0 ? "\u2212" : "") + Number(Math.abs(x).toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 6, notation: Math.abs(x) >= 1e6 ? "scientific" : "standard" });

// series: () => [{ label, colour, dash, rows: [{ x, y, step }] }]; marks: () => [{ x, y, label, colour }]
class Chart {
  constructor(title, unit, wide, series, { marks = () => [], bases = () => [], gap = false, scatter = false, xlabel = "iteration", stage = "ppo" } = {}) {
    Object.assign(this, { title, unit, series, marks, bases, gap, scatter, xlabel, stage });
    this.svg = shape("svg", { role: "img", tabindex: 0 });
    this.figure = node("figure", { class: wide ? "wide" : "" }, node("figcaption", {}, `${title} `, node("small", {}, unit)), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by || this.stage !== "ppo") return;
      event.preventDefault();
      const steps = stepsOf();
      const at = steps.indexOf(cursor);
      pointAt(steps[Math.max(0, Math.min(steps.length - 1, at < 0 ? steps.length - 1 : at + by))]);
    });
  }

  draw() {
    const all = this.series().filter((s) => s.rows.length);
    this.figure.hidden = !all.length;
    if (!all.length) return;
    const marks = this.marks(), bases = this.bases();
    const width = Math.max(200, this.figure.clientWidth || 300), height = this.figure.classList.contains("wide") ? 270 : 180;
    const left = 40, right = 12, top = 8, bottom = this.xlabel ? 34 : 20;
    const xs = [...all.flatMap((s) => s.rows.map((r) => r.x)), ...marks.map((m) => m.x)];
    const ys = [...all.flatMap((s) => s.rows.map((r) => r.y)), ...marks.map((m) => m.y), ...bases];
    let [x0, x1, y0, y1] = [least(xs), most(xs), least(ys), most(ys)];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const pad = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 1;
    [y0, y1] = [y0 - pad, y1 + pad];
    const X = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
    const Y = (y) => top + (y1 - y) / (y1 - y0) * (height - top - bottom);
    this.x = X;
    const parts = [];
    for (const y of ticks(y0, y1, height / 55)) {
      parts.push(shape("line", { class: "gridline", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
      parts.push(shape("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, tickText(y)));
    }
    for (const x of ticks(x0, x1, width / 80)) parts.push(shape("text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, tickText(x)));
    parts.push(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    if (this.xlabel) parts.push(shape("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, this.xlabel));
    for (const y of bases) parts.push(shape("line", { class: "base", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    const smoothed = all.map((s) => {
      const window = Math.floor(s.rows.length / 10) | 1;
      const y = smooth(s.rows.map((r) => r.y), window);
      const x = this.scatter ? smooth(s.rows.map((r) => r.x), window) : s.rows.map((r) => r.x);
      return x.map((value, i) => [value, y[i]]);
    });
    if (this.gap && all.length === 2 && smoothed[0].length === smoothed[1].length) {
      const above = smoothed[0].map(([x, y], i) => [x, Math.max(y, smoothed[1][i][1])]);
      parts.push(shape("path", { class: "gap", d: path([...above, ...smoothed[1].toReversed()]) + "Z" }));
    }
    all.forEach((s, i) => {
      if (this.scatter) {
        const d = s.rows.map((r) => `M${X(r.x).toFixed(1)} ${Y(r.y).toFixed(1)}m-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0`).join("");
        parts.push(shape("path", { class: `dots f c${s.colour}`, d }));
      } else if (s.rows.length > 20) parts.push(shape("path", { class: `raw s c${s.colour}`, d: path(s.rows.map((r) => [r.x, r.y])) }));
      parts.push(shape("path", { class: `line s c${s.colour}`, d: path(smoothed[i]), "stroke-dasharray": DASHES[s.dash ?? 0] }));
      if (s.rows.length === 1) parts.push(shape("circle", { class: `f c${s.colour}`, cx: X(s.rows[0].x), cy: Y(s.rows[0].y), r: 3 }));
    });
    for (const m of marks) {
      parts.push(shape("path", { class: `f c${m.colour}`, stroke: "var(--paper)", d: `M${X(m.x)} ${Y(m.y)}m0 -6l6 6l-6 6l-6 -6z` }));
      if (m.label) {
        const side = X(m.x) > width - 70 ? "end" : X(m.x) < left + 40 ? "start" : "middle";
        parts.push(shape("text", { class: "mark", x: X(m.x), y: Math.max(12, Y(m.y) - 10), "text-anchor": side }, m.label));
      }
    }
    this.at = shape("g", {});
    this.svg.replaceChildren(...parts, this.at);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("aria-label", `${this.title}, ${this.unit}. ` + all.map((s) => `${s.label}: ${plain(s.rows[0].y)} at first, ${plain(s.rows.at(-1).y)} at last`).join("; "));
    Object.assign(this, { all, X, Y, top, foot: height - bottom });
    this.mark();
  }

  mark() { // the iteration that the reader points at
    if (!this.at) return;
    const parts = [];
    if (cursor !== null && this.stage === "ppo" && this.all) {
      for (const s of this.all) {
        const row = s.rows.find((r) => r.step === cursor);
        if (!row) continue;
        if (!this.scatter && !parts.length) parts.push(shape("line", { class: "at", x1: this.X(row.x), x2: this.X(row.x), y1: this.top, y2: this.foot }));
        parts.push(shape("circle", { class: `f c${s.colour}`, cx: this.X(row.x), cy: this.Y(row.y), r: 4.5, stroke: "var(--paper)", "stroke-width": 1.5 }));
      }
    }
    this.at.replaceChildren(...parts);
  }

  point(event) {
    if (this.stage !== "ppo" || !this.all) return;
    const box = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, far = Infinity;
    for (const s of this.all) {
      for (const row of s.rows) {
        const d = (this.X(row.x) - x) ** 2 + (this.scatter ? (this.Y(row.y) - y) ** 2 : 0);
        if (d < far) [best, far] = [row.step, d];
      }
    }
    if (best !== null) pointAt(best);
  }
}
const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const stepsOf = () => [...new Set(DATA.runs.flatMap((run) => run.metrics.ppo.map((row) => row.step)))].sort((a, b) => a - b);

function pointAt(step) {
  cursor = step;
  for (const chart of charts) chart.mark();
  const said = DATA.runs.map((run) => {
    const row = run.metrics.ppo.find((r) => r.step === step);
    if (!row) return null;
    const parts = ["score", "judge", "kl", "mean_length", "entropy"].filter((name) => known(row[name]))
      .map((name) => `${{ mean_length: "length", kl: "KL" }[name] ?? name} ${plain(row[name])}`);
    return (DATA.runs.length > 1 ? `${run.name}: ` : "") + parts.join(" \u00b7 ");
  }).filter(Boolean);
  $("readout").textContent = `Iteration ${step}: ${said.join("  |  ")}`;
}

const rowsOf = (run, x, y, stage = "ppo") => run.metrics[stage].filter((row) => known(row[y]) && known(row[x]))
  .map((row) => ({ x: row[x], y: row[y], step: row.step }));

function curves() {
  const several = DATA.runs.length > 1, run = DATA.runs[0];
  const overRuns = (x, y) => () => DATA.runs.map((run, i) => ({ label: run.name, colour: i % 6, dash: i % 6, rows: rowsOf(run, x, y) }));
  const twoScores = (x) => () => [["score", 0, 0], ["judge", 1, 1]].map(([name, colour, dash]) => ({ label: NAMES[name], colour, dash, rows: rowsOf(run, x, name) }));
  const one = (y) => () => [{ label: NAMES[y], colour: 5, rows: rowsOf(run, "step", y) }];
  const base = (y) => () => known(run.writers.SFT?.[y]) ? [run.writers.SFT[y]] : [];
  const atWriters = (run, y, colour, named) => Object.entries(run.writers).filter(([, row]) => known(row.kl) && known(row[y]))
    .map(([name, row]) => ({ x: row.kl, y: row[y], colour, label: named ? name : "" }));
  if (several) {
    charts.push(new Chart("Reward against distance", DATA.reward, true, overRuns("kl", "score"), { scatter: true, xlabel: NAMES.kl }),
      new Chart("Judge against distance", "never optimised", true, overRuns("kl", "judge"), { scatter: true, xlabel: NAMES.kl }),
      new Chart("Score", "mean per iteration", true, overRuns("step", "score")),
      new Chart("Judge", "mean per iteration", true, overRuns("step", "judge")),
      new Chart("KL", "nats per sequence", true, overRuns("step", "kl")),
      new Chart("Length", "tokens", true, overRuns("step", "mean_length")));
  } else {
    charts.push(new Chart("Reward against distance", "mean score, by KL to SFT; grey: what only the " + DATA.reward + " sees", true, twoScores("kl"),
        { scatter: true, gap: true, xlabel: NAMES.kl, marks: () => [...atWriters(run, "score", 0, true), ...atWriters(run, "judge", 1, false)] }),
      new Chart("Reward over training", "mean score per iteration", true, twoScores("step"), { gap: true }),
      new Chart("KL", "nats per sequence", false, one("kl")),
      new Chart("Entropy", "nats per token", false, one("entropy"), { bases: base("entropy") }),
      new Chart("Length", "tokens", false, one("mean_length"), { bases: base("mean_length") }),
      new Chart("SFT", "loss per token, nats", true, () => [{ label: "loss", colour: 5, rows: rowsOf(run, "step", "loss", "sft") }], { stage: "sft", xlabel: "optimiser step" }),
      new Chart("Reward model", "training loss", true, () => [{ label: "loss", colour: 5, rows: rowsOf(run, "step", "loss", "rm") }], { stage: "rm", xlabel: "optimiser step" }));
  }
  const sample = (colour, dash) => {
    const svg = shape("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" });
    svg.append(shape("path", { class: `line s c${colour}`, d: "M1 6H27", "stroke-dasharray": DASHES[dash] }));
    return svg;
  };
  const legend = several ? DATA.runs.map((run, i) => [run.name, i % 6, i % 6]) : [[NAMES.score, 0, 0], ["judge (never optimised)", 1, 1]];
  const said = several ? "Faint: each iteration; lines: moving averages."
    : "Faint: each iteration; lines: moving averages; diamonds: on test prompts; dashed and level: SFT.";
  $("curves").append(node("div", { class: "chips" }, ...legend.map(([name, c, d]) => node("span", {}, sample(c, d), name)), node("small", {}, said)),
    node("p", { class: "readout", id: "readout", "aria-live": "polite" }), node("div", { class: "plots" }, ...charts.map((c) => c.figure)));
  redraw();
  addEventListener("resize", () => { clearTimeout(curves.later); curves.later = setTimeout(redraw, 100); });
}

function redraw() {
  for (const chart of charts) chart.draw();
  if (cursor !== null) pointAt(cursor);
  else $("readout").textContent = stepsOf().length ? "Point at a curve, or move along it with the arrow keys." : "No iteration is finished yet.";
}

// ---------------------------------------------------------------------------------------------------- texts of the training

const FIELDS = { step: 0, prompt: 1, response: 2, score: 3, judge: 4, kl: 5, length: 6, disagreement: 7, rm: 8 };
const COLUMNS = [["step", "iteration", 0], ["score", "score", 2], ["judge", "judge", 2], ["kl", "KL", 1], ["length", "length", 0], ["disagreement", "disagreement", 2]];
const PAGE = 40;
const view = { sort: "step", down: true, find: "", step: "", shown: PAGE };

const samplesOf = () => DATA.runs.flatMap((run, r) => run.samples.map((row) => ({ row, run: r })));

function chosen() {
  const words = view.find.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  const [at, sign] = [FIELDS[view.sort], view.down ? -1 : 1];
  return samplesOf().filter(({ row }) => (view.step === "" || String(row[0]) === view.step) &&
      words.every((word) => (row[1] + row[2]).toLocaleLowerCase().includes(word)))
    .sort((a, b) => (known(b.row[at]) - known(a.row[at])) || sign * (a.row[at] - b.row[at]) || 0);
}

function marked(text, words) { // the text, with what was searched for marked
  const lowered = text.toLocaleLowerCase(), parts = [];
  if (!words.length || lowered.length !== text.length) return [text];
  let at = 0;
  while (at < text.length) {
    const hits = words.map((w) => [lowered.indexOf(w, at), w]).filter(([i]) => i >= 0).sort((a, b) => a[0] - b[0] || b[1].length - a[1].length);
    if (!hits.length) break;
    const [i, word] = hits[0];
    parts.push(text.slice(at, i), node("mark", {}, text.slice(i, i + word.length)));
    at = i + word.length;
  }
  return [...parts, text.slice(at)];
}

function list() {
  const found = chosen(), words = view.find.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  const columns = COLUMNS.filter(([name]) => samplesOf().some(({ row }) => known(row[FIELDS[name]])));
  $("rows").replaceChildren(...found.slice(0, view.shown).map(({ row, run }) => node("tr", {},
    node("td", { class: "words", dir: "auto" }, node("i", {}, ...marked(row[1], words)), ...marked(row[2], words)),
    ...columns.map(([name, label, digits]) => {
      const x = row[FIELDS[name]];
      const text = !known(x) ? "" : name === "step" ? String(x) : name === "score" || name === "judge" ? signed(x, digits) : plain(x, digits);
      return node("td", { "data-name": label }, name === "step" && DATA.runs.length > 1 ? `${DATA.runs[run].name} ${text}` : text);
    }))));
  $("heads").replaceChildren(node("th", { class: "words", scope: "col" }, node("button", { type: "button", tabindex: -1, disabled: true }, "text")),
    ...columns.map(([name, label]) => node("th", { scope: "col", "aria-sort": view.sort === name ? view.down ? "descending" : "ascending" : "none" },
      node("button", { type: "button", "data-sort": name, onclick: () => sortBy(name) }, label, view.sort === name ? view.down ? " \u2193" : " \u2191" : ""))));
  const total = samplesOf().length, left = DATA.runs.reduce((sum, run) => sum + run.left, 0);
  const all = total + left;
  $("found").textContent = `${found.length.toLocaleString("en")} of ${total.toLocaleString("en")} texts` +
    (left ? `; ${left.toLocaleString("en")} of ${all.toLocaleString("en")} recorded ones are left out, evenly, to keep the page small` : "");
  $("more").hidden = found.length <= view.shown;
  $("sort").value = view.sort;
  $("direction").textContent = view.down ? "largest first" : "smallest first";
}

function sortBy(name) {
  view.down = view.sort === name ? !view.down : true;
  view.sort = name;
  view.shown = PAGE;
  const focused = document.activeElement?.dataset?.sort;
  list();
  if (focused) document.querySelector(`#heads [data-sort="${focused}"]`)?.focus();
}

function fillSteps() {
  const steps = [...new Set(samplesOf().map(({ row }) => row[0]))].sort((a, b) => a - b);
  $("step").replaceChildren(node("option", { value: "" }, "all"), ...steps.map((step) => node("option", { value: step }, String(step))));
  $("step").value = view.step;
}

function browser() {
  if (!$("browser")) return;
  const change = (name, read) => (event) => {
    view[name] = read(event.target);
    view.shown = PAGE;
    list();
  };
  $("browser").replaceChildren(
    node("div", { class: "bar" },
      node("input", { type: "search", id: "find", placeholder: "Search prompts and texts", "aria-label": "Search prompts and texts", oninput: change("find", (e) => e.value) }),
      node("label", {}, "iteration", node("select", { id: "step", onchange: change("step", (e) => e.value) })),
      node("label", {}, "sort by", node("select", { id: "sort", onchange: (e) => { view.down = true; change("sort", (f) => f.value)(e); } },
        ...COLUMNS.map(([name, label]) => node("option", { value: name }, label)))),
      node("button", { type: "button", id: "direction", onclick: () => { view.down = !view.down; list(); } })),
    node("p", { class: "soft", id: "found", role: "status" }),
    node("button", { type: "button", id: "fresh", hidden: true, onclick: () => { $("fresh").hidden = true; fillSteps(); list(); } }),
    node("table", {}, node("thead", {}, node("tr", { id: "heads" })), node("tbody", { id: "rows" })),
    node("p", {}, node("button", { type: "button", id: "more", onclick: () => { view.shown += PAGE; list(); } }, "Show more")));
  fillSteps();
  list();
}

// ---------------------------------------------------------------------------------------------------- live

// What was added since, once in a while.  Curves are redrawn in place; new texts wait for a click, so that nothing
// moves under the reader's eyes.
async function poll() {
  const run = DATA.runs[0], live = DATA.live;
  try {
    const asked = Object.entries(live.have).map(([name, [generation, n]]) => `${name}=${generation}.${n}`).join("&");
    const response = await fetch(`data?${asked}`, { signal: AbortSignal.timeout(20000), cache: "no-store" });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const found = await response.json();
    let moved = false, fresh = 0;
    for (const [name, part] of Object.entries(found.parts)) {
      const old = name === "samples" ? run.samples : run.metrics[name];
      const rows = part.again ? part.rows : [...old, ...part.rows];
      if (name === "samples") [run.samples, fresh] = [rows, rows.length - old.length || Number(part.again)];
      else {
        run.metrics[name] = rows;
        moved ||= part.again || part.rows.length > 0;
      }
      live.have[name] = [part.generation, part.total];
    }
    run.left = found.left;
    if (moved) redraw();
    if (fresh && $("rows").childElementCount) {
      $("fresh").textContent = "New texts were recorded: show them";
      $("fresh").hidden = false;
    } else if (fresh) {
      fillSteps();
      list();
    }
    say(found.said + (found.stamp !== live.stamp ? " New results are there: reload the page to see them." : ""), false);
  } catch (error) {
    say(`The server does not answer (${error.message}); this is what it last sent. Asking again.`, true);
  }
  setTimeout(poll, live.every * 1000);
}

function say(sentence, lost) {
  $("live").hidden = false;
  $("live").classList.toggle("lost", lost);
  if ($("live").textContent !== sentence) $("live").textContent = sentence;
}

if (DATA.facts) whyView(DATA.facts);
curves();
browser();
if (DATA.live) {
  say(DATA.live.said, false);
  setTimeout(poll, DATA.live.every * 1000);
}
