"""A run on one page: RUN/reward_kl.png and RUN/report.html, from what the stages and evaluate.py measured.

    python -m minirlhf.report runs/demo

The plot shows what a reward cannot: whether the judge, which PPO never saw, still follows as the policy leaves the SFT model.
The page is one file without scripts or links; all text is escaped, for samples are whatever a model wrote.
"""

import argparse
import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np

from minirlhf import UserError, checkpoint, training

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#707070"  # Okabe and Ito: told apart by everyone
READERS = {"score": ("objective/rm_scores", "reward model", BLUE), "judge": ("objective/judge", "judge", ORANGE)}
STRIPS = {"objective/kl": ("KL to SFT, nats a sequence", "kl"), "policy/entropy_avg": ("entropy, nats a token", "entropy"),
          "val/response_length": ("length, tokens", "mean_length")}  # fmt: skip
WINS = "{}_win_rate"
MEASURES = [m for key in ("score", "judge", "lexicon") for name in (READERS.get(key, (0, key))[1],)
            for m in ((WINS.format(key), f"{name}: wins over SFT", ".1%"), (key, f"{name}: mean score", "+.2f"))] + [
    ("kl", "KL to SFT, nats a sequence", ".2f"), ("entropy", "entropy, nats a token", ".2f"),
    *((f"distinct_{n}", f"distinct {n}-grams", ".1%") for n in (1, 2, 3)),
    ("mean_length", "length, tokens", ".1f"), ("eos_rate", "ended by themselves", ".1%")]  # fmt: skip
AGREEMENT = [("pearson", "Pearson r", ".3f"), ("spearman", "Spearman r", ".3f"), ("pair_accuracy", "pairs right", ".1%"),
             ("pair_accuracy_1", "pairs a point apart", ".1%"), ("accuracy", "choices right", ".1%")]  # fmt: skip
STAGES = {"sft": "language model (SFT)", "rm": "reward model", "rm_optimised": "reward model PPO optimised",
          "judge": "judge", "ppo": "policy (PPO)"}  # fmt: skip
STYLE = """:root { color-scheme: light dark; --soft: #62625f; --line: #dcdcd8; --card: #f3f3f0 }
@media (prefers-color-scheme: dark) { :root { --soft: #a6a6a2; --line: #3f4043; --card: #26282b } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem } p { max-width: 46rem }
h1, h2 { line-height: 1.2; margin: 1.8em 0 .6em } h1 { margin-top: .5em } p, small, i { color: var(--soft) } small { display: block }
.grid { display: grid; gap: .8rem; margin: .8rem 0; grid-template-columns: repeat(auto-fit, minmax(min(var(--w), 100%), 1fr)) }
.card { background: var(--card); border-radius: .5rem; padding: .7rem 1rem } .card b { display: block; font-size: 1.7rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate } .wide { overflow-x: auto }
img { width: 100%; background: #fff; border-radius: .5rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom }
th { font-weight: 500 } th:first-child { text-align: left; min-width: 9rem } td { white-space: nowrap }"""


def read(run: Path) -> tuple[dict, dict[str, list[dict]]]:
    """results.json, and each stage's metrics (none of a stage that ran elsewhere)."""
    place = run / "results.json"
    if not place.is_file():
        raise UserError(f"{place}: missing: run python -m minirlhf.evaluate --run {run} first")
    metrics: dict[str, list[dict]] = {stage: [] for stage in ("sft", "rm", "ppo")}
    try:
        results = json.loads(place.read_text(encoding="utf-8"))
        for stage, file in ((stage, run / stage / "metrics.jsonl") for stage in metrics):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], 1):
                place = f"{file}:{number}"
                if line.endswith("}"):  # else half written: the stage is still running, or was killed
                    metrics[stage].append(json.loads(line))
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}): run the command that wrote it again") from error
    return results, metrics


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average [len(values)] over a tenth of the run; near the ends, over what there is of it."""
    window, ones = np.ones(len(values) // 10 | 1), np.ones(len(values))
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same") if len(values) else values


def draw(results: dict, history: list[dict]) -> bytes:
    """PNG: left, the readers' scores against KL, a dot an iteration; right, what becomes of the text meanwhile."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'minirlhf[report]'") from None
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1.6, 1))
    left, strips = figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[i, 1]) for i in range(3)]
    over_time = {key: np.array([m[key] for m in history]) for key in ("step", *STRIPS)}
    kl, curves = over_time["objective/kl"], []
    rows = [("SFT", "o", results["sft_samples"]), *((f"best of {n}", "D", row) for n, row in results["best_of_n"].items()),
            ("PPO", "*", results["ppo"])]  # fmt: skip
    for key, (metric, label, colour) in READERS.items():
        scores = np.array([m[metric] for m in history if metric in m])  # none where the judge did not watch
        if len(scores) or key in results["ppo"]:
            left.scatter(kl[: len(scores)], scores, s=12, color=colour, alpha=0.3, linewidths=0)
            left.plot(smooth(kl)[: len(scores)], smooth(scores), color=colour, lw=2.2, label=label)
            curves += [smooth(scores)] if len(scores) else []
        for _, marker, row in rows:
            left.scatter(row["kl"], row.get(key, np.nan), s=190 if marker == "*" else 46, marker=marker, color=colour,
                         edgecolors="white", linewidths=0.9, zorder=3)  # fmt: skip
    if len(curves) == 2:
        left.fill_between(smooth(kl), *curves, where=curves[0] > curves[1], color=GREY, alpha=0.18, lw=0,
                          label="gap: what only the reward model sees")  # fmt: skip
    for name, _, row in rows:
        left.annotate(name, (row["kl"], row["score"]), (0, 8), textcoords="offset points", ha="center", fontsize=8.5)
    left.plot([], [], "D", color=GREY, ms=5, label="markers: on test prompts; the rest: in training")
    left.set(xlabel="KL to the SFT model, nats a sequence", ylabel="mean score", title="What is optimised and what a judge says")
    left.legend(fontsize=8.5, frameon=False)
    for axes, (metric, (label, key)) in zip(strips, STRIPS.items(), strict=True):
        axes.axhline(results["sft_samples"][key], color=GREY, lw=1, ls="--")
        axes.plot(over_time["step"], over_time[metric], color=GREY, lw=0.8, alpha=0.6)
        axes.plot(over_time["step"], smooth(over_time[metric]), color="black", lw=1.6)
        axes.set_title(label, fontsize=9, loc="left")
        axes.tick_params(labelsize=8, labelbottom=axes is strips[-1])
    strips[0].set_title("dashed: SFT", fontsize=8, color=GREY, loc="right")
    strips[-1].set_xlabel("PPO iteration")
    for axes in (left, *strips):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.04, 0.12)
        axes.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def cell(row: dict | None, key: str, spec: str) -> str:
    """A measured number as text, with its interval if it has one; a dash for what was not measured."""
    if not row or row.get(key) is None:
        return "–"
    low, high = row.get(f"{key}_interval", (None, None))
    return f"{row[key]:{spec}}" + (f" ({low:.1%} to {high:.1%})" if low is not None else "")


def table(head: list[str], rows: list) -> str:
    """Every cell escaped; the first of each row names it."""
    lines = [f"<tr><th>{escape(first)}" + "".join(f"<td>{escape(c)}" for c in rest) for first, *rest in rows]
    top = "".join(f"<th>{escape(c)}" for c in head)
    return f'<div class="wide"><table><thead><tr>{top}<tbody>{"".join(lines)}</table></div>'


def stages(results: dict) -> list[tuple[str, str, str]]:
    """(stage, key number, time) of all that was trained."""
    ppo, rows, total = results["ppo"], [], 0.0
    minutes = lambda seconds: "{} min {:02d} s".format(*divmod(round(seconds), 60))
    for key, label in STAGES.items():
        if found := results.get(key):
            test = found.get("test", {})
            who = "judge" if "judge" in ppo else "score"
            number = {"sft": f"{cell(found, 'val_bits_per_byte', '.3f')} bits per byte, validation",
                      "ppo": f"{cell(ppo, WINS.format(who), '.1%')} wins over SFT ({READERS[who][1]})"}.get(key)  # fmt: skip
            if "accuracy" in test: ...
