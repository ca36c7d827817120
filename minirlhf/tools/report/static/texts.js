// All texts that were recorded in the training: sorted, searched, filtered.

const FIELDS = {
  step: 0,
  prompt: 1,
  response: 2,
  score: 3,
  judge: 4,
  kl: 5,
  length: 6,
  disagreement: 7,
  rm: 8,
};
const COLUMNS = [
  ["step", "iteration", 0],
  ["score", "score", 2],
  ["judge", "judge", 2],
  ["kl", "KL", 1],
  ["length", "length", 0],
  ["disagreement", "disagreement", 2],
];
const PAGE = 40;
const view = { sort: "step", down: true, find: "", step: "", shown: PAGE };

const samplesOf = () => DATA.runs.flatMap((run, r) => run.samples.map((row) => ({ row, run: r })));

function chosen() {
  const words = view.find.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  const [at, sign] = [FIELDS[view.sort], view.down ? -1 : 1];
  return samplesOf()
    .filter(
      ({ row }) =>
        (view.step === "" || String(row[0]) === view.step) &&
        words.every((word) => (row[1] + row[2]).toLocaleLowerCase().includes(word)),
    )
    .sort((a, b) => known(b.row[at]) - known(a.row[at]) || sign * (a.row[at] - b.row[at]) || 0);
}

function marked(text, words) {
  // the text, with what was searched for marked
  const lowered = text.toLocaleLowerCase(),
    parts = [];
  if (!words.length || lowered.length !== text.length) return [text];
  let at = 0;
  while (at < text.length) {
    const hits = words
      .map((w) => [lowered.indexOf(w, at), w])
      .filter(([i]) => i >= 0)
      .sort((a, b) => a[0] - b[0] || b[1].length - a[1].length);
    if (!hits.length) break;
    const [i, word] = hits[0];
    parts.push(text.slice(at, i), node("mark", {}, text.slice(i, i + word.length)));
    at = i + word.length;
  }
  return [...parts, text.slice(at)];
}

function list() {
  const found = chosen(),
    words = view.find.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  const columns = COLUMNS.filter(([name]) => samplesOf().some(({ row }) => known(row[FIELDS[name]])));
  $("rows").replaceChildren(
    ...found.slice(0, view.shown).map(({ row, run }) =>
      node(
        "tr",
        {},
        node(
          "td",
          { class: "words", dir: "auto" },
          node("i", {}, ...marked(row[1], words)),
          ...marked(row[2], words),
        ),
        ...columns.map(([name, label, digits]) => {
          const x = row[FIELDS[name]];
          const text = !known(x)
            ? ""
            : name === "step"
              ? String(x)
              : name === "score" || name === "judge"
                ? signed(x, digits)
                : plain(x, digits);
          return node(
            "td",
            { "data-name": label },
            name === "step" && DATA.runs.length > 1 ? `${DATA.runs[run].name} ${text}` : text,
          );
        }),
      ),
    ),
  );
  $("heads").replaceChildren(
    node(
      "th",
      { class: "words", scope: "col" },
      node("button", { type: "button", tabindex: -1, disabled: true }, "text"),
    ),
    ...columns.map(([name, label]) =>
      node(
        "th",
        { scope: "col", "aria-sort": view.sort === name ? (view.down ? "descending" : "ascending") : "none" },
        node(
          "button",
          { type: "button", "data-sort": name, onclick: () => sortBy(name) },
          label,
          view.sort === name ? (view.down ? " \u2193" : " \u2191") : "",
        ),
      ),
    ),
  );
  const total = samplesOf().length,
    left = DATA.runs.reduce((sum, run) => sum + run.left, 0);
  const all = total + left;
  $("found").textContent =
    `${found.length.toLocaleString("en")} of ${total.toLocaleString("en")} texts` +
    (left
      ? `; ${left.toLocaleString("en")} of ${all.toLocaleString("en")} recorded ones are left out, ` +
        "evenly, to keep the page small"
      : "");
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
  $("step").replaceChildren(
    node("option", { value: "" }, "all"),
    ...steps.map((step) => node("option", { value: step }, String(step))),
  );
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
    node(
      "div",
      { class: "bar" },
      node("input", {
        type: "search",
        id: "find",
        placeholder: "Search prompts and texts",
        "aria-label": "Search prompts and texts",
        oninput: change("find", (e) => e.value),
      }),
      node(
        "label",
        {},
        "iteration",
        node("select", { id: "step", onchange: change("step", (e) => e.value) }),
      ),
      node(
        "label",
        {},
        "sort by",
        node(
          "select",
          {
            id: "sort",
            onchange: (e) => {
              view.down = true;
              change("sort", (f) => f.value)(e);
            },
          },
          ...COLUMNS.map(([name, label]) => node("option", { value: name }, label)),
        ),
      ),
      node("button", {
        type: "button",
        id: "direction",
        onclick: () => {
          view.down = !view.down;
          list();
        },
      }),
    ),
    node("p", { class: "soft", id: "found", role: "status" }),
    node("button", {
      type: "button",
      id: "fresh",
      hidden: true,
      onclick: () => {
        $("fresh").hidden = true;
        fillSteps();
        list();
      },
    }),
    node("table", {}, node("thead", {}, node("tr", { id: "heads" })), node("tbody", { id: "rows" })),
    node(
      "p",
      {},
      node(
        "button",
        {
          type: "button",
          id: "more",
          onclick: () => {
            view.shown += PAGE;
            list();
          },
        },
        "Show more",
      ),
    ),
  );
  fillSteps();
  list();
}
