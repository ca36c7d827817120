// Curves, drawn as SVG; they share the iteration that the reader points at.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 4", "10 3 2 3", "14 5", "1 5"];
const NAMES = {
  score: DATA.reward,
  judge: "judge",
  kl: "KL, nats per sequence",
  mean_length: "length, tokens",
  entropy: "entropy, nats per token",
};
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
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step && found.length < 50; k++)
    found.push(k * step);
  return found;
}
const tickText = (x) =>
  (x < 0 ? "\u2212" : "") +
  Number(Math.abs(x).toPrecision(6)).toLocaleString("en", {
    maximumFractionDigits: 6,
    notation: Math.abs(x) >= 1e6 ? "scientific" : "standard",
  });

// series: () => [{ label, colour, dash, rows: [{ x, y, step }] }]; marks: () => [{ x, y, label, colour }]
class Chart {
  constructor(
    title,
    unit,
    wide,
    series,
    {
      marks = () => [],
      bases = () => [],
      gap = false,
      scatter = false,
      xlabel = "iteration",
      stage = "ppo",
    } = {},
  ) {
    Object.assign(this, { title, unit, series, marks, bases, gap, scatter, xlabel, stage });
    this.svg = shape("svg", { role: "img", tabindex: 0 });
    this.figure = node(
      "figure",
      { class: wide ? "wide" : "" },
      node("figcaption", {}, `${title} `, node("small", {}, unit)),
      this.svg,
    );
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
    const marks = this.marks(),
      bases = this.bases();
    const width = Math.max(200, this.figure.clientWidth || 300),
      height = this.figure.classList.contains("wide") ? 270 : 180;
    const left = 40,
      right = 12,
      top = 8,
      bottom = this.xlabel ? 34 : 20;
    const xs = [...all.flatMap((s) => s.rows.map((r) => r.x)), ...marks.map((m) => m.x)];
    const ys = [...all.flatMap((s) => s.rows.map((r) => r.y)), ...marks.map((m) => m.y), ...bases];
    let [x0, x1, y0, y1] = [least(xs), most(xs), least(ys), most(ys)];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const pad = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 1;
    [y0, y1] = [y0 - pad, y1 + pad];
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const Y = (y) => top + ((y1 - y) / (y1 - y0)) * (height - top - bottom);
    this.x = X;
    const parts = [];
    for (const y of ticks(y0, y1, height / 55)) {
      parts.push(shape("line", { class: "gridline", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
      parts.push(shape("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, tickText(y)));
    }
    for (const x of ticks(x0, x1, width / 80))
      parts.push(shape("text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, tickText(x)));
    parts.push(
      shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    );
    if (this.xlabel)
      parts.push(
        shape("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, this.xlabel),
      );
    for (const y of bases)
      parts.push(shape("line", { class: "base", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
    const path = (points) =>
      points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    const smoothed = all.map((s) => {
      const window = Math.floor(s.rows.length / 10) | 1;
      const y = smooth(
        s.rows.map((r) => r.y),
        window,
      );
      const x = this.scatter
        ? smooth(
            s.rows.map((r) => r.x),
            window,
          )
        : s.rows.map((r) => r.x);
      return x.map((value, i) => [value, y[i]]);
    });
    if (this.gap && all.length === 2 && smoothed[0].length === smoothed[1].length) {
      const above = smoothed[0].map(([x, y], i) => [x, Math.max(y, smoothed[1][i][1])]);
      parts.push(shape("path", { class: "gap", d: path([...above, ...smoothed[1].toReversed()]) + "Z" }));
    }
    all.forEach((s, i) => {
      if (this.scatter) {
        const d = s.rows
          .map((r) => `M${X(r.x).toFixed(1)} ${Y(r.y).toFixed(1)}m-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0`)
          .join("");
        parts.push(shape("path", { class: `dots f c${s.colour}`, d }));
      } else if (s.rows.length > 20)
        parts.push(
          shape("path", {
            class: `raw${s.rows.length > 300 ? " many" : ""} s c${s.colour}`,
            d: path(s.rows.map((r) => [r.x, r.y])),
          }),
        );
      parts.push(
        shape("path", {
          class: `line s c${s.colour}`,
          d: path(smoothed[i]),
          "stroke-dasharray": DASHES[s.dash ?? 0],
        }),
      );
      if (s.rows.length === 1)
        parts.push(
          shape("circle", { class: `f c${s.colour}`, cx: X(s.rows[0].x), cy: Y(s.rows[0].y), r: 3 }),
        );
    });
    for (const m of marks) {
      parts.push(
        shape("path", {
          class: `f c${m.colour}`,
          stroke: "var(--paper)",
          d: `M${X(m.x)} ${Y(m.y)}m0 -6l6 6l-6 6l-6 -6z`,
        }),
      );
      if (m.label) {
        const side = X(m.x) > width - 70 ? "end" : X(m.x) < left + 40 ? "start" : "middle";
        parts.push(
          shape(
            "text",
            { class: "mark", x: X(m.x), y: Math.max(12, Y(m.y) - 10), "text-anchor": side },
            m.label,
          ),
        );
      }
    }
    this.at = shape("g", {});
    this.svg.replaceChildren(...parts, this.at);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute(
      "aria-label",
      `${this.title}, ${this.unit}. ` +
        all
          .map((s) => `${s.label}: ${plain(s.rows[0].y)} at first, ${plain(s.rows.at(-1).y)} at last`)
          .join("; "),
    );
    Object.assign(this, { all, X, Y, top, foot: height - bottom });
    this.mark();
  }

  mark() {
    // the iteration that the reader points at
    if (!this.at) return;
    const parts = [];
    if (cursor !== null && this.stage === "ppo" && this.all) {
      for (const s of this.all) {
        const row = s.rows.find((r) => r.step === cursor);
        if (!row) continue;
        if (!this.scatter && !parts.length)
          parts.push(
            shape("line", { class: "at", x1: this.X(row.x), x2: this.X(row.x), y1: this.top, y2: this.foot }),
          );
        parts.push(
          shape("circle", {
            class: `f c${s.colour}`,
            cx: this.X(row.x),
            cy: this.Y(row.y),
            r: 4.5,
            stroke: "var(--paper)",
            "stroke-width": 1.5,
          }),
        );
      }
    }
    this.at.replaceChildren(...parts);
  }

  point(event) {
    if (this.stage !== "ppo" || !this.all) return;
    const box = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null,
      far = Infinity;
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
const stepsOf = () =>
  [...new Set(DATA.runs.flatMap((run) => run.metrics.ppo.map((row) => row.step)))].sort((a, b) => a - b);

function pointAt(step) {
  cursor = step;
  for (const chart of charts) chart.mark();
  const said = DATA.runs
    .map((run) => {
      const row = run.metrics.ppo.find((r) => r.step === step);
      if (!row) return null;
      const parts = ["score", "judge", "kl", "mean_length", "entropy"]
        .filter((name) => known(row[name]))
        .map((name) => `${{ mean_length: "length", kl: "KL" }[name] ?? name} ${plain(row[name])}`);
      return (DATA.runs.length > 1 ? `${run.name}: ` : "") + parts.join(" \u00b7 ");
    })
    .filter(Boolean);
  $("readout").textContent = `Iteration ${step}: ${said.join("  |  ")}`;
}

const rowsOf = (run, x, y, stage = "ppo") =>
  run.metrics[stage]
    .filter((row) => known(row[y]) && known(row[x]))
    .map((row) => ({ x: row[x], y: row[y], step: row.step }));

function curves() {
  const several = DATA.runs.length > 1,
    run = DATA.runs[0];
  const overRuns = (x, y) => () =>
    DATA.runs.map((run, i) => ({ label: run.name, colour: i % 6, dash: i % 6, rows: rowsOf(run, x, y) }));
  const twoScores = (x) => () =>
    [
      ["score", 0, 0],
      ["judge", 1, 1],
    ].map(([name, colour, dash]) => ({ label: NAMES[name], colour, dash, rows: rowsOf(run, x, name) }));
  const one = (y) => () => [{ label: NAMES[y], colour: 5, rows: rowsOf(run, "step", y) }];
  const base = (y) => () => (known(run.writers.SFT?.[y]) ? [run.writers.SFT[y]] : []);
  const atWriters = (run, y, colour, named) =>
    Object.entries(run.writers)
      .filter(([, row]) => known(row.kl) && known(row[y]))
      .map(([name, row]) => ({ x: row.kl, y: row[y], colour, label: named ? name : "" }));
  if (several) {
    charts.push(
      new Chart("Reward against distance", DATA.reward, true, overRuns("kl", "score"), {
        scatter: true,
        xlabel: NAMES.kl,
      }),
      new Chart("Judge against distance", "never optimised", true, overRuns("kl", "judge"), {
        scatter: true,
        xlabel: NAMES.kl,
      }),
      new Chart("Score", "mean per iteration", true, overRuns("step", "score")),
      new Chart("Judge", "mean per iteration", true, overRuns("step", "judge")),
      new Chart("KL", "nats per sequence", true, overRuns("step", "kl")),
      new Chart("Length", "tokens", true, overRuns("step", "mean_length")),
    );
  } else {
    charts.push(
      new Chart("Reward against distance", "mean score", true, twoScores("kl"), {
        scatter: true,
        gap: true,
        xlabel: NAMES.kl,
        marks: () => [...atWriters(run, "score", 0, true), ...atWriters(run, "judge", 1, false)],
      }),
      new Chart("Reward over training", "mean score per iteration", true, twoScores("step"), { gap: true }),
      new Chart("KL", "nats per sequence", false, one("kl")),
      new Chart("Entropy", "nats per token", false, one("entropy"), { bases: base("entropy") }),
      new Chart("Length", "tokens", false, one("mean_length"), { bases: base("mean_length") }),
      new Chart(
        "SFT",
        "loss per token, nats",
        true,
        () => [{ label: "loss", colour: 5, rows: rowsOf(run, "step", "loss", "sft") }],
        { stage: "sft", xlabel: "optimiser step" },
      ),
      new Chart(
        "Reward model",
        "training loss",
        true,
        () => [{ label: "loss", colour: 5, rows: rowsOf(run, "step", "loss", "rm") }],
        { stage: "rm", xlabel: "optimiser step" },
      ),
    );
  }
  const sample = (colour, dash) => {
    const svg = shape("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" });
    svg.append(shape("path", { class: `line s c${colour}`, d: "M1 6H27", "stroke-dasharray": DASHES[dash] }));
    return svg;
  };
  const legend = several
    ? DATA.runs.map((run, i) => [run.name, i % 6, i % 6])
    : [
        [NAMES.score, 0, 0],
        ["judge (never optimised)", 1, 1],
      ];
  const said = several
    ? "Faint: each iteration; lines: moving averages."
    : "Faint: each iteration; lines: moving averages; diamonds: on test prompts; dashed and level: SFT; " +
      `grey: what only the ${DATA.reward} sees.`;
  $("curves").append(
    node(
      "div",
      { class: "chips" },
      ...legend.map(([name, c, d]) => node("span", {}, sample(c, d), name)),
      node("small", {}, said),
    ),
    node("p", { class: "readout", id: "readout", "aria-live": "polite" }),
    node("div", { class: "plots" }, ...charts.map((c) => c.figure)),
  );
  redraw();
  addEventListener("resize", () => {
    clearTimeout(curves.later);
    curves.later = setTimeout(redraw, 100);
  });
}

function redraw() {
  for (const chart of charts) chart.draw();
  if (cursor !== null) pointAt(cursor);
  else
    $("readout").textContent = stepsOf().length
      ? "Point at a curve, or move along it with the arrow keys."
      : "No iteration is finished yet.";
}
