"""A run on one page, RUN/report.html, with its plot, RUN/reward_kl.png, out of what the stages measured.

    python -m minirlhf.report runs/demo

The plot shows what a reward cannot: whether a judge that PPO never saw still follows as the policy moves away
from SFT.  The page is one file without scripts or links.  A run may come from somebody else: every file is
checked before it is used, and all text is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minirlhf import UserError
from minirlhf.support import cli, files, track

Row = dict[str, Any]  # measured numbers by name; the interval of NAME is NAME_interval

BLUE, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#707070",
)  # of Okabe and Ito, whom colour-blind readers can tell apart
JUDGE_METRIC = "objective/judge"
REWARD_METRICS = ("objective/rm_scores", "objective/scores")  # the second where no reward model was used
SCORERS = {"score": ("reward model", BLUE), "judge": ("judge", ORANGE)}
STRIPS = {
    "kl": ("objective/kl", "KL, nats per sequence"),
    "entropy": ("policy/entropy_avg", "entropy, nats per token"),
    "mean_length": ("val/response_length", "length, tokens"),
}
STAGES = {
    "sft": "SFT",
    "rm": "reward model",
    "rm_optimised": "reward model for PPO",
    "judge": "judge",
    "ppo": "PPO",
}
NUMBERS = {  # name: (label, format); the first that a stage has is its key number
    "val_bits_per_byte": ("bits per byte, validation", ".3f"),
    "pearson": ("Pearson r", ".3f"),
    "spearman": ("Spearman r", ".3f"),
    "pair_accuracy": ("pairs right", ".1%"),
    "pair_accuracy_1": ("pairs a point apart", ".1%"),
    "accuracy": ("choices right", ".1%"),
    "auc": ("area under the ROC curve", ".3f"),
    "judge_win_rate": ("judge: wins over SFT", ".1%"),
    "score_win_rate": ("reward model: wins over SFT", ".1%"),
    "lexicon_win_rate": ("lexicon: wins over SFT", ".1%"),
    "judge": ("judge: mean score", "+.2f"),
    "score": ("reward model: mean score", "+.2f"),
    "lexicon": ("lexicon: mean score", "+.2f"),
    "kl": ("KL to SFT, nats per sequence", ".2f"),
    "entropy": ("entropy, nats per token", ".2f"),
    "mean_length": ("length, tokens", ".1f"),
    "eos_rate": ("ended by itself", ".1%"),
    "distinct_1": ("distinct 1-grams", ".1%"),
    "distinct_2": ("distinct 2-grams", ".1%"),
    "distinct_3": ("distinct 3-grams", ".1%"),
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """:root { color-scheme: light dark }
small, i { opacity: .7 } small { display: block } b { font-size: 1.7rem } h2 { margin: 2em 0 .5em }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem }
.grid { display: grid; gap: 0 .8rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)) }
.card { background: #8882; border-radius: .5rem; padding: .7rem 1rem; margin-bottom: .8rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
tr :first-child { min-width: 7rem } th:first-child { text-align: left }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; border-bottom: 1px solid #8886; text-align: right; font-weight: 400 }"""


# ------------------------------------------------------------------------------------------------- what is
# read


def read(file: Path) -> str:
    """A file's text; "" where there is no such file."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def parse(text: str, where: str) -> dict[str, Any]:
    """The object in a JSON text; UserError, with `where`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): run the command that wrote it again") from None
    return _object(found, where)


def refuse(where: str, wanted: str, value: Any) -> NoReturn:
    found = {dict: "an object", list: "a list"}.get(type(value)) or f"{value!r:.60}"
    raise UserError(f"{where}: expected {wanted}, found {found}: run the command that wrote it again")


def _object(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else refuse(where, "an object", value)


def _list(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else refuse(where, "a list", value)


def _text(value: Any, where: str) -> str:
    return value if isinstance(value, str) else refuse(where, "text", value)


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # nan is refused, too
        refuse(where, "a number", value)
    return value


def _row(value: Any, where: str) -> Row:
    """Measured numbers: each may be null, where it could not be measured, and may have an interval."""
    given, row = _object(value, where), {}
    for name in ("seconds", *NUMBERS):
        if given.get(name) is not None:
            row[name] = _number(given[name], f"{where}.{name}")
        elif name in given:
            row[name] = None
        if (interval := given.get(f"{name}_interval")) is not None:
            ends = _list(interval, f"{where}.{name}_interval")
            if len(ends) != 2:
                refuse(f"{where}.{name}_interval", "two numbers", ends)
            row[f"{name}_interval"] = [_number(end, f"{where}.{name}_interval") for end in ends]
    return row


def _stage(value: Any, where: str) -> dict[str, Any]:
    """A stage's results: its row, and for a reward model `peers`, what it is compared with, and `bins`."""
    given = _object(value, where)
    stage = {"row": _row(given, where), "peers": {}, "bins": []}
    if "test" in given:
        test = _object(given["test"], f"{where}.test")
        stage["row"] |= _row(test, f"{where}.test")
        calibration = _object(test.get("calibration", {}), f"{where}.test.calibration")
        for values in _list(calibration.get("bins", []), f"{where}.test.calibration.bins"):
            at = f"{where}.test.calibration.bins"
            numbers = [_number(x, at) for x in _list(values, at)]
            stage["bins"].append(numbers if len(numbers) == 3 else refuse(at, "three numbers", values))
        for name, row in _object(given.get("baselines", {}), f"{where}.baselines").items():
            stage["peers"][name] = None if row is None else _row(row, f"{where}.baselines {name!r:.60}")
        people = _object(given.get("humans") or {}, f"{where}.humans")
        for name, prefix in ("one human", "one_"), ("half the humans", "half_"):
            own = {k.removeprefix(prefix): v for k, v in people.items() if k.startswith(prefix)}
            stage["peers"][name] = _row(own, f"{where}.humans")
    return stage


def _sample(value: Any, where: str) -> dict[str, Any]:
    given, found = _object(value, where), {}
    for name in ("prompt", "sft", "ppo"):
        found[name] = _text(given.get(name), f"{where}.{name}")
    for name in ("kl", "score_sft", "score_ppo"):
        found[name] = _number(given.get(name), f"{where}.{name}")
    return found


def load_results(file: Path) -> dict[str, Any]:
    """results.json, of which every value that the report shows has been checked.

    {writers, stages: rows by name; samples; prompts, seed, split, versions: text; reward: the score's label}
    """
    missing = f"{file}: missing or incomplete: run python -m minirlhf.evaluate --run {file.parent} first"
    if not (text := read(file)).strip():
        raise UserError(missing)
    given = parse(text, str(file))
    if not {"sft_samples", "best_of_n", "ppo", "samples", "sft", "rm", "versions"} <= given.keys():
        raise UserError(missing)
    at = lambda name: f"{file}: {name}"
    best_of_n = _object(given["best_of_n"], at("best_of_n")).items()
    for n, _ in best_of_n:
        if not (n.isascii() and n.isdigit() and len(n) < 9):
            refuse(at("best_of_n"), "numbers of samples as names", n)
    sft = _row(given["sft_samples"], at("sft_samples"))
    for name in list(sft):
        if "win_rate" in name:  # against itself: ties
            del sft[name]
    versions = _object(given["versions"], at("versions")).items()
    reward = [_text(spec, at("reward")) for spec in _list(given.get("reward", ["rm"]), at("reward"))]
    return {
        "writers": {
            "SFT": sft,
            **{f"best of {n}": _row(row, at(f"best_of_n.{n}")) for n, row in best_of_n},
            "PPO": _row(given["ppo"], at("ppo")),
        },
        "stages": {name: _stage(given[name], at(name)) for name in STAGES if given.get(name)},
        "samples": [
            _sample(sample, at(f"samples[{i}]"))
            for i, sample in enumerate(_list(given["samples"], at("samples")))
        ],
        "prompts": f"{_number(given.get('prompts', 0), at('prompts')):g}",
        "seed": f"{_number(given.get('seed', 0), at('seed'))}",
        "split": _text(given.get("split", "test"), at("split")),
        "versions": ", ".join(f"{name} {_text(version, at('versions'))}" for name, version in versions),
        "reward": "reward model" if any(spec.startswith("rm") for spec in reward) else "reward",
    }


def load_metrics(file: Path) -> list[Row]:
    """The lines of a metrics.jsonl: the numbers that the report shows, without an unfinished last line."""
    wanted = {"step", JUDGE_METRIC, *REWARD_METRICS, *(metric for metric, _ in STRIPS.values())}
    rows = []
    for number, line in enumerate(read(file).split("\n")[:-1], 1):
        where = f"{file}:{number}"
        row = parse(line, where)
        names = [name for name in row if name in wanted or name.startswith("val/")]
        rows.append({name: _number(row[name], f"{where}: {name!r:.60}") for name in names})
    return rows


# ------------------------------------------------------------------------------------------------- the plot


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The moving average of [N]; near the ends it is that of the values there are."""
    if not len(values):
        return values
    ones = np.ones(window)
    count = np.convolve(np.ones(len(values)), ones, "same")
    return np.convolve(values, ones, "same") / count


def draw(writers: dict[str, Row], history: list[Row], reward_label: str) -> bytes:
    """PNG.  Left: scores against KL, a dot per iteration; right: what becomes of the texts meanwhile."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'minirlhf[report]'") from None
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    axes = figure.subplot_mosaic([["left", key] for key in STRIPS], width_ratios=(1.6, 1))
    window = len(history) // 10 | 1
    _draw_scores(axes["left"], writers, history, reward_label, window)
    for key, (metric, label) in STRIPS.items():
        rows = [row for row in history if metric in row and "step" in row]
        steps, values = (np.array([row[name] for row in rows]) for name in ("step", metric))
        if writers["SFT"].get(key) is not None:
            axes[key].axhline(writers["SFT"][key], color=GREY, lw=1, ls="--")
        axes[key].plot(steps, values, color=GREY, lw=0.8, alpha=0.6)
        axes[key].plot(steps, smooth(values, window), color="black", lw=1.6)
        axes[key].set_title(label, fontsize=10, loc="left")
        axes[key].tick_params(labelbottom=key == "mean_length")
    axes["mean_length"].set_xlabel("PPO iteration (dashed: SFT)")
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(0.04, 0.12)
        panel.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_scores(
    left: Any, writers: dict[str, Row], history: list[Row], reward_label: str, window: int
) -> None:
    reward_metric = next((m for m in REWARD_METRICS if any(m in row for row in history)), REWARD_METRICS[0])
    metrics = {"score": reward_metric, "judge": JUDGE_METRIC}
    history = [row for row in history if "objective/kl" in row and reward_metric in row]
    for key, (label, colour) in SCORERS.items():
        rows = [row for row in history if metrics[key] in row]  # none if the judge did not watch
        kl, scores = (np.array([row[name] for row in rows]) for name in ("objective/kl", metrics[key]))
        left.scatter(kl, scores, s=12, color=colour, alpha=0.3, linewidths=0)
        shown = len(rows) or key in writers["PPO"]
        left.plot(
            smooth(kl, window),
            smooth(scores, window),
            color=colour,
            lw=2.2,
            label=(reward_label if key == "score" else label) if shown else None,
        )
    for name, row in writers.items():
        scores = {key: row[key] for key in SCORERS if row.get(key) is not None}
        if row.get("kl") is None or not scores:
            continue
        marker, size = {"SFT": ("o", 46), "PPO": ("*", 190)}.get(name, ("D", 46))
        colours = [SCORERS[key][1] for key in scores]
        places = [row["kl"]] * len(scores), list(scores.values())
        left.scatter(*places, size, colours, marker=marker, edgecolors="white", zorder=3)
        above = (row["kl"], max(scores.values()))
        left.annotate(
            f"{name:.30}",
            above,
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            parse_math=False,
        )
    both = [row for row in history if metrics["judge"] in row]
    if both:
        kl, scores, judge = (
            smooth(np.array([row[name] for row in both]), window)
            for name in ("objective/kl", metrics["score"], metrics["judge"])
        )
        label = f"gap: what only the {reward_label} sees"
        left.fill_between(kl, scores, judge, where=scores > judge, color=GREY, alpha=0.18, lw=0, label=label)
    left.plot([], [], "D", color=GREY, ms=5, label="on test prompts (dots: in training)")
    left.set(
        xlabel="KL to the SFT model, nats per sequence", ylabel="mean score", title="Reward against distance"
    )
    left.legend(fontsize=8.5, frameon=False)


# ------------------------------------------------------------------------------------------------- the page


def cell(row: Row | None, name: str) -> str:
    """A measured number as text, with its interval if it has one; a dash for what was not measured."""
    if row is None or row.get(name) is None:
        return "–"
    form = NUMBERS[name][1]
    if f"{name}_interval" not in row:
        return f"{row[name]:{form}}"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"


def label_of(name: str, reward_label: str) -> str:
    return NUMBERS[name][0].replace("reward model", reward_label)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def stage_lines(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(stage, its key number, what that is, its time) of all that was trained, then their sum."""
    lines, total = [], 0.0
    for name, stage in results["stages"].items():
        row = stage["row"] | (results["writers"]["PPO"] if name == "ppo" else {})
        key = next((key for key in NUMBERS if key in row), None)
        number, interval = "", ""
        what = "not finished"
        if key is not None:
            number, _, interval = cell(row, key).partition(" ")
            what = f"{label_of(key, results['reward'])} {interval}".strip()
        if row.get("kl") is not None:
            what += f", at KL {row['kl']:.1f} nats per sequence"
        for peer in ("TF-IDF + ridge", "one human"):
            if key is not None and stage["peers"].get(peer):
                what += f", {peer} {cell(stage['peers'][peer], key)}"
        seconds = row.get("seconds")
        lines.append((STAGES[name], number, what, "–" if seconds is None else clock(seconds)))
        total += seconds or 0.0
    return [*lines, ("all stages", clock(total), "of training", "")]


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of texts, which are escaped here."""
    line = lambda tag, texts: (
        f"<tr><th>{escape(texts[0])}" + "".join(f"<{tag}>{escape(text)}" for text in texts[1:])
    )
    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def comparison(columns: dict[str, Row | None], names: list[str], reward_label: str) -> str:
    """A table with a line per number and a column per row."""
    lines = [
        [label_of(name, reward_label), *(cell(row, name) for row in columns.values())]
        for name in NUMBERS
        if name in names
    ]
    return table(["", *columns], lines)


def grid(cards: list[str]) -> str:
    return '<div class="grid">' + "".join(f'<div class="card">{card}</div>' for card in cards) + "</div>"


def sample_cards(sample: dict[str, Any]) -> list[str]:
    """The SFT model's continuation and the policy's, of one prompt."""
    notes = {
        "sft": f"SFT, score {sample['score_sft']:+.2f}",
        "ppo": f"PPO, score {sample['score_ppo']:+.2f}, KL {sample['kl']:.1f} nats",
    }
    text = lambda who: f'<div class="text"><i>{escape(sample["prompt"])}</i>{escape(sample[who])}</div>'
    return [f"<small>{escape(note)}</small>{text(who)}" for who, note in notes.items()]


def page(name: str, results: dict[str, Any], metrics: dict[str, list[Row]], png: bytes) -> str:
    """The report as one HTML file."""
    stages, writers, reward = results["stages"], results["writers"], results["reward"]
    keys = [
        f"<small>{escape(stage)}</small><b>{escape(number)}</b> {escape(what)}<small>{escape(time)}</small>"
        for stage, number, what, time in stage_lines(results)
    ]
    rm = stages.get("rm", {"row": {}, "peers": {}, "bins": []})
    models = {STAGES[name]: stages[name]["row"] for name in ("rm", "rm_optimised", "judge") if name in stages}
    bins = [[f"{score:+.2f}", f"{people:+.2f}", f"{n:g}"] for score, people, n in rm["bins"]]
    validation = {
        stage: ", ".join(f"{v:.3f}" for row in metrics[stage] for k, v in row.items() if k.startswith("val/"))
        for stage in ("sft", "rm")
    }
    against_people = comparison(models | rm["peers"], list(rm["row"]), "reward model")
    image = base64.b64encode(png).decode()
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title><style>{STYLE}</style><h1>{escape(name)}</h1>{grid(keys)}
<h2>Against SFT, on {escape(results["prompts"])} {escape(results["split"])} prompts</h2>
{comparison(writers, list(writers["PPO"]), reward)}<h2>Reward against KL</h2>
<img width="100%" alt="{escape(reward)} and judge against KL" src="data:image/png;base64,{image}">
<h2>Reward model and people, on test texts</h2>{against_people}
<p>Validation on the way: SFT {validation["sft"] or "–"} bits per byte;
reward model {validation["rm"] or "–"}.</p>
{table(["calibration: mean score", "mean of people", "texts"], bins) if bins else ""}
<h2>Samples</h2>{"".join(grid(sample_cards(sample)) for sample in results["samples"])}
<p>Seed {escape(results["seed"])}; {escape(results["versions"])}</p>"""


def main() -> None:
    parser = cli.Parser("python -m minirlhf.report", description="Write report.html and reward_kl.png.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    parser.add_argument(
        "--track", choices=track.TRACKERS, help="show it in this program, too, beside the metrics of RUN/ppo"
    )
    args = parser.parse_args()
    run = args.run
    results = load_results(run / "results.json")
    metrics = {stage: load_metrics(run / stage / "metrics.jsonl") for stage in ("sft", "rm", "ppo")}
    png = draw(results["writers"], metrics["ppo"], results["reward"])
    html = page(run.resolve().name, results, metrics, png)
    files.write_output(
        run / "report.html", html.encode("utf-8", "replace")
    )  # half a surrogate pair becomes ?
    files.write_output(run / "reward_kl.png", png)
    if args.track:
        track.start(args.track, run / "ppo", {}, goes_on=True).report(html, png)
    for stage, number, what, time in stage_lines(results):
        print(f"{stage:22s}{number:>12s}{time:>14s}  {what}")
    print(f"written to {run}/report.html and {run}/reward_kl.png")


if __name__ == "__main__":
    cli.run_script(main)
