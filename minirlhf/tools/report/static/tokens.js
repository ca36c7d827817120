// Tokens, coloured by what pushed them, with all numbers of the one that the reader points at.

// What a colour can tell, and what it cannot.  `both`: the scale has two ends around 0.
const MEASURES = {
  replaced: {
    label: "Score share",
    unit: "points",
    both: true,
    can:
      `By how much the ${DATA.reward}'s score falls when the reference writes another token here (mean of ` +
      `${DATA.facts?.replacements} tries). Orange holds the score up, blue holds it down.`,
    cannot:
      "One token changes at a time: of two words that say the same, neither seems to matter. " +
      "The words behind it stay as they are, though they were written after this one.",
  },
  added: {
    label: "Score so far",
    unit: "points",
    both: true,
    can:
      `By how much this token raised the ${DATA.reward}'s score of the text that ends with it. ` +
      "All tokens together add up to the score, less that of the prompt alone.",
    cannot:
      "Half a sentence is not what the score was made for: it is a guess there, which jumps at commas " +
      "and full stops and moves credit to whatever comes next.",
  },
  judge_replaced: {
    label: "Judge's share",
    unit: "points",
    both: true,
    can: "The score share by the judge, a second reward model that training never saw.",
    cannot:
      "The judge is no person. Where both agree they may share a mistake; where they differ, " +
      "the policy may have found what only its own reward model likes.",
  },
  nats: {
    label: "Nats",
    unit: "nats",
    both: true,
    can:
      `log p(${WRITERS.ppo}) \u2212 log p(SFT): tokens that training made likelier are orange, ` +
      "those that it made rarer are blue." +
      (known(DATA.facts?.beta) ? ` Times ${DATA.facts.beta} it is the reward that this policy implies.` : ""),
    cannot:
      "It tells what changed, not what was rewarded: a token may be likelier because another one, " +
      "which it leads to, was paid for.",
  },
  advantage: {
    label: "Advantage",
    unit: "points",
    both: true,
    can:
      "By how much the rest of the text went better than the critic had expected before this token " +
      "(GAE, before whitening). This is the push that the token would get in training.",
    cannot:
      "It is one text's luck, and the critic's mistakes are in it. " +
      "Of SFT's text it is hypothetical: the policy did not write it.",
  },
  value: {
    label: "Value",
    unit: "points",
    both: true,
    can: "What the critic expects before this token: the score at the end, less the KL penalty still to come.",
    cannot:
      "It is an average over what the policy would write from here, and not a judgement of the words before.",
  },
  entropy: {
    label: "Entropy",
    unit: "nats",
    both: false,
    can: "How open the choice was: the entropy of the distribution that the writer drew this token from.",
    cannot: "A dark token is a fork in the road, not a mistake.",
  },
};
const ROWS = [...Object.keys(MEASURES), "probability"];
const PAIRS = 12; // prompts shown at a time
let measure = "";
let scales = {};

function scaleOf(name) {
  // the 95th percentile of the sizes: a few large ones must not pale the rest
  const sizes = DATA.facts.samples
    .flatMap((s) => [s.sft, s.ppo])
    .flatMap((t) => t.columns[name] ?? [])
    .filter(known)
    .map(Math.abs);
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
}

const inWords = (name, x) =>
  name === "probability"
    ? `${(100 * x).toFixed(x < 0.01 ? 2 : 0)}%`
    : `${MEASURES[name].both ? signed(x) : plain(x)} ${MEASURES[name].unit}`;

function tokenSpan(text, i) {
  const word = text.tokens[i].replace(/^\s+/, "");
  const end = text.ended && i === text.tokens.length - 1;
  const span = node(
    "span",
    { class: "t", role: "option", tabindex: i ? -1 : 0 },
    end ? "end" : word || "\u00b7",
  );
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
  const parts = [
    ["score", DATA.reward === "reward model" ? "score" : "reward"],
    ["judge", "judge"],
    ["kl", "KL"],
  ].filter(([name]) => known(text[name]) && !(who === "sft" && name === "kl"));
  const meta = node(
    "div",
    { class: "meta" },
    node("b", {}, WRITERS[who]),
    ...parts.map(([name, label]) =>
      node("span", {}, `${label} ${name === "kl" ? plain(text.kl, 1) + " nats" : signed(text[name])}`),
    ),
  );
  const list = node("p", {
    class: "tokens",
    role: "listbox",
    dir: "auto",
    "aria-label": `${WRITERS[who]}'s text, token by token`,
  });
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
  $("can").replaceChildren(node("b", {}, "It tells "), lower(can));
  $("cannot").replaceChildren(node("b", {}, "It cannot tell: "), lower(cannot));
  const steps = both ? [-1, -0.66, -0.33, 0, 0.33, 0.66, 1] : [0, 0.25, 0.5, 0.75, 1];
  const ramp = node(
    "span",
    { class: "ramp", "aria-hidden": "true" },
    ...steps.map((a) => {
      const box = node("i", { class: a < 0 ? "neg t" : "pos t" });
      box.style.setProperty("--a", Math.abs(a));
      return box;
    }),
  );
  const far = scales[name];
  $("scale").replaceChildren(
    both ? signed(-far) : "0",
    ramp,
    `${both ? signed(far) : plain(far)} ${unit}`,
    node(
      "span",
      {},
      node("span", { class: "key" }, "underlined"),
      ": the fifth of the tokens with the largest score share",
    ),
  );
  for (const span of document.querySelectorAll(".tokens .t")) paint(span);
  for (const span of document.querySelectorAll(".t.on")) showTip(span);
}
const lower = (sentence) =>
  /^[A-Z][a-z]/.test(sentence) ? sentence[0].toLowerCase() + sentence.slice(1) : sentence;

function whyView(facts) {
  const there = Object.keys(MEASURES).filter((name) =>
    facts.samples.some((s) => s.ppo.columns[name] || s.sft.columns[name]),
  );
  if (!there.length) return;
  scales = Object.fromEntries(there.map((name) => [name, scaleOf(name)]));
  const chips = node(
    "fieldset",
    {},
    node("legend", {}, "Colour by"),
    ...there.map((name, i) =>
      node(
        "label",
        { class: "chip" },
        node("input", {
          type: "radio",
          name: "measure",
          value: name,
          checked: i === 0,
          onchange: () => choose(name),
        }),
        node("span", {}, MEASURES[name].label),
      ),
    ),
  );
  const count = facts.samples.length;
  const notes = [
    `The first ${count} of ${facts.prompts} ${facts.split} prompts, in the order in which they were drawn: ` +
      "none was chosen. Point at a token, tap it, or move with the arrow keys.",
  ];
  if (facts.left_out) notes.push(`No advantage and no value: ${facts.left_out}.`);
  if (facts.left) notes.push(`${facts.left} more are in why.json; the page would grow too large.`);
  $("why-view").append(
    node("p", { class: "soft" }, notes.join(" ")),
    chips,
    node(
      "div",
      { class: "about", "aria-live": "polite" },
      node("p", { id: "can" }),
      node("p", { id: "cannot", class: "soft" }),
    ),
    node("div", { class: "scale", id: "scale" }),
    node("div", { id: "pairs" }),
    node("button", { type: "button", id: "more-pairs", onclick: showPairs }, "Show more prompts"),
  );
  showPairs();
  choose(there[0]);
}

function showPairs() {
  const { samples } = DATA.facts;
  const begun = $("pairs").childElementCount;
  for (let i = begun; i < Math.min(begun + PAIRS, samples.length); i++) {
    const columns = [textColumn(samples[i], "sft"), textColumn(samples[i], "ppo")];
    $("pairs").append(node("article", { class: "pair", "aria-label": `Prompt ${i + 1}` }, ...columns));
  }
  $("more-pairs").hidden = $("pairs").childElementCount === samples.length;
  if (measure) for (const span of document.querySelectorAll(".tokens .t")) paint(span);
}

function showTip(span) {
  for (const other of document.querySelectorAll(".t.on")) other.classList.remove("on");
  span.classList.add("on");
  const { text, i } = span;
  const rows = ROWS.filter((name) => text.columns[name]).flatMap((name) => {
    const x = text.columns[name][i];
    const label = name === "probability" ? "Probability" : MEASURES[name].label;
    const now = name === measure ? "now" : "";
    return [
      node("dt", { class: now }, label),
      node("dd", { class: now }, known(x) ? inWords(name, x) : "\u2013"),
    ];
  });
  const others = text.others[i].map(([other, p]) => `${other} ${(100 * p).toFixed(p < 0.01 ? 1 : 0)}%`);
  $("tip").replaceChildren(
    node(
      "p",
      { class: "word", dir: "auto" },
      span.classList.contains("end") ? "end of the text" : text.tokens[i].trim() || "\u00b7",
    ),
    node("dl", {}, ...rows),
    others.length ? node("p", {}, `Instead: ${others.join(", ")}`) : null,
  );
  $("tip").hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const width = $("tip").offsetWidth,
    height = $("tip").offsetHeight;
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
    for (const other of event.target.parentNode.querySelectorAll(".t"))
      other.tabIndex = other === event.target ? 0 : -1;
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
