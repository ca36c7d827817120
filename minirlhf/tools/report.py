"""A run on one page, RUN/report.html, and its plot, RUN/reward_kl.png, from what the stages and evaluate.py measured.

    python -m minirlhf.report runs/demo

The plot shows what a reward cannot: whether a judge that PPO never saw still follows as the policy leaves SFT behind.
The page is one file without scripts or links; all text is escaped, for samples are whatever a model wrote."""

import argparse
import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np

from minirlhf import UserError
from minirlhf.support import cli, files

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#707070"  # Okabe and Ito: told apart by everyone
READERS = {
    "score": ("objective/rm_scores", "reward model", BLUE),
    "judge": ("objective/judge", "judge", ORANGE),
}
STRIPS = {"kl": ("objective/kl", "KL, nats a sequence"), "entropy": ("policy/entropy_avg", "entropy, nats a token"),
          "mean_length": ("val/response_length", "length, tokens")}  # fmt: skip
STAGES = {
    "sft": "SFT",
    "rm": "reward model",
    "rm_optimised": "reward model for PPO",
    "judge": "judge",
    "ppo": "PPO",
}
NUMBERS = [  # key, label, format; the first that a stage has is its key number
    ("val_bits_per_byte", "bits per byte, validation", ".3f"), ("pearson", "Pearson r", ".3f"),
    ("spearman", "Spearman r", ".3f"), ("pair_accuracy", "pairs right", ".1%"),
    ("pair_accuracy_1", "pairs a point apart", ".1%"), ("accuracy", "choices right", ".1%"),
    ("judge_win_rate", "judge: wins over SFT", ".1%"), ("score_win_rate", "reward model: wins over SFT", ".1%"),
    ("lexicon_win_rate", "lexicon: wins over SFT", ".1%"), ("judge", "judge: mean score", "+.2f"),
    ("score", "reward model: mean score", "+.2f"), ("lexicon", "lexicon: mean score", "+.2f"),
    ("kl", "KL to SFT, nats a sequence", ".2f"), ("entropy", "entropy, nats a token", ".2f"),
    ("mean_length", "length, tokens", ".1f"), ("eos_rate", "ended by itself", ".1%"),
    *((f"distinct_{n}", f"distinct {n}-grams", ".1%") for n in (1, 2, 3))]  # fmt: skip
STYLE = """:root { color-scheme: light dark } small, i { opacity: .7 } small { display: block } b { font-size: 1.7rem }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem } h2 { margin: 2em 0 .5em }
.grid { display: grid; gap: 0 .8rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)) }
.card { background: #8882; border-radius: .5rem; padding: .7rem 1rem; margin-bottom: .8rem } tr :first-child { min-width: 7rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate } th:first-child { text-align: left }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; border-bottom: 1px solid #8886; text-align: right; font-weight: 400 }"""


def load(file: Path) -> list[dict]:
    """The one object of a .json file, or one for each line of a .jsonl; none where there is no such file."""
    text, found = file.read_text(encoding="utf-8") if file.is_file() else "", []
    for number, part in enumerate(text.splitlines() if file.suffix == ".jsonl" else [text.strip()], 1):
        try:  # what does not end in a brace is being written, or was when its stage was killed
            found += [json.loads(part)] if part.endswith("}") else []
        except ValueError as error:
            raise UserError(
                f"{file}:{number}: not JSON ({error}): run the command that wrote it again"
            ) from error
    return found


def draw(writers: dict[str, dict], history: list[dict]) -> bytes:
    """PNG: left, the readers' scores against KL, a dot an iteration; right, what becomes of the text meanwhile."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'minirlhf[report]'") from None
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    strips = figure.subplot_mosaic([["left", key] for key in STRIPS], width_ratios=(1.6, 1))
    left, window = strips["left"], np.ones(len(history) // 10 | 1)
    share = lambda y: np.convolve(
        np.ones(len(y)), window, "same"
    )  # near the ends, of what there is of the window
    smooth = lambda y: (
        np.convolve(y, window, "same") / share(y) if len(y) else y
    )  # moving average, a tenth of the run
    column = lambda name: np.array(
        [m[name] for m in history if name in m]
    )  # empty if the judge did not watch
    kl, curves = column("objective/kl"), []
    for key, (metric, label, colour) in READERS.items():
        curves.append(smooth(y := column(metric)))
        left.scatter(kl[: len(y)], y, s=12, color=colour, alpha=0.3, linewidths=0)
        left.plot(
            smooth(kl)[: len(y)],
            smooth(y),
            c=colour,
            lw=2.2,
            label=label if len(y) or key in writers["PPO"] else None,
        )
    for name, row in writers.items():
        marker, s = {"SFT": ("o", 46), "PPO": ("*", 190)}.get(name, ("D", 46))
        y = [row.get(key, np.nan) for key in READERS]
        left.scatter([row["kl"]] * 2, y, s, [BLUE, ORANGE], marker=marker, edgecolors="white", zorder=3)
        left.annotate(
            name, (row["kl"], np.nanmax(y)), (0, 8), textcoords="offset points", ha="center", fontsize=8.5
        )
    if len(curves[1]):
        gap = {"where": curves[0] > curves[1], "label": "gap: what only the reward model sees"}
        left.fill_between(smooth(kl), *curves, color=GREY, alpha=0.18, lw=0, **gap)
    left.plot([], [], "D", color=GREY, ms=5, label="on test prompts (dots: in training)")
    left.set(
        xlabel="KL to the SFT model, nats a sequence", ylabel="mean score", title="Reward against distance"
    )
    left.legend(fontsize=8.5, frameon=False)
    for key, (metric, label) in STRIPS.items():
        strips[key].axhline(writers["SFT"][key], color=GREY, lw=1, ls="--")
        strips[key].plot(column("step"), column(metric), color=GREY, lw=0.8, alpha=0.6)
        strips[key].plot(column("step"), smooth(column(metric)), color="black", lw=1.6)
        strips[key].set_title(label, fontsize=10, loc="left")
        strips[key].tick_params(labelbottom=key == "mean_length")
    strips["mean_length"].set_xlabel("PPO iteration (dashed: SFT)")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.04, 0.12)
        axes.grid(alpha=0.2)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=150)
    return buffer.getvalue()


def cell(row: dict, key: str, form: str) -> str:
    """A measured number as text, with its interval if it has one; a dash for what was not measured."""
    between = (
        " ({:{f}} to {:{f}})".format(*row[f"{key}_interval"], f=form) if f"{key}_interval" in row else ""
    )
    return "–" if row.get(key) is None else f"{row[key]:{form}}{between}"


def peers(report: dict) -> dict[str, dict | None]:
    """What a reward model is measured beside, on the same texts: baselines (None: not installed) and people."""
    people = lambda prefix: {
        key.removeprefix(prefix): value for key, value in (report.get("humans") or {}).items()
    }
    return report.get("baselines", {}) | {"one human": people("one_"), "half the humans": people("half_")}


def stages(results: dict) -> list[tuple[str, str, str, str]]:
    """(stage, its key number, what that is, its time) of all that was trained."""
    rows, total, clock = [], 0.0, lambda seconds: "{} min {:02d} s".format(*divmod(round(seconds), 60))
    for stage, label in STAGES.items():
        if found := results.get(stage):
            row = found | found.get("test", {})
            key, what, form = next((m for m in NUMBERS if m[0] in row), ("", "not finished", ""))
            number, _, interval = cell(row, key, form).partition(" ")
            what += f" {interval}, at KL {row['kl']:.1f} nats a sequence" if "kl" in row else ""
            beside = {who: peers(found).get(who) for who in ("TF-IDF + ridge", "one human")}
            what += "".join(f", {who} {cell(other, key, form)}" for who, other in beside.items() if other)
            rows.append((label, number, what, clock(found["seconds"]) if "seconds" in found else "–"))
            total += found.get("seconds", 0.0)
    return [*rows, ("all stages", clock(total), "of training", "")]


def page(
    name: str, results: dict, writers: dict[str, dict], metrics: dict[str, list[dict]], png: bytes
) -> str:
    """The report as one HTML file."""
    tr = lambda tag, row: f"<tr><th>{escape(row[0])}" + "".join(f"<{tag}>{escape(text)}" for text in row[1:])
    table = lambda head, rows: f"<table>{tr('th', head)}{''.join(tr('td', row) for row in rows)}</table>"
    compare = lambda rows, known: table(["", *rows], [
        [what, *(cell(row or {}, k, f) for row in rows.values())] for k, what, f in NUMBERS if k in known])  # fmt: skip
    grid = lambda *cards: (
        '<div class="grid">' + "".join(f'<div class="card">{card}</div>' for card in cards) + "</div>"
    )
    said = lambda s, who, about: (f"<small>{who.upper()}, score {s['score_' + who]:+.2f}{about}</small>"
                                  f'<div class="text"><i>{escape(s["prompt"])}</i>{escape(s[who])}</div>')  # fmt: skip
    pairs = [grid(said(s, "sft", ""), said(s, "ppo", f", KL {s['kl']:.1f} nats")) for s in results["samples"]]
    keys = [
        f"<small>{who}</small><b>{key}</b> {escape(what)}<small>{time}</small>"
        for who, key, what, time in stages(results)
    ]
    rm, test = results["rm"], results["rm"].get("test", {})
    readers = {
        STAGES[k]: results[k].get("test") for k in ("rm", "rm_optimised", "judge") if k in results
    } | peers(rm)
    bins = [(f"{a:+.2f}", f"{b:+.2f}", str(n)) for a, b, n in test.get("calibration", {}).get("bins", [])]
    way = lambda stage: ", ".join(
        f"{v:.3f}" for m in metrics[stage] for k, v in m.items() if k.startswith("val/")
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>
<meta name="viewport" content="width=device-width, initial-scale=1"><h1>{escape(name)}</h1>{grid(*keys)}
<h2>Against SFT, on {results["prompts"]} test prompts</h2>{compare(writers, results["ppo"])}<h2>Reward against KL</h2>
<img width="100%" alt="reward and judge against KL" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Reward model and people, on test texts</h2>{compare(readers, test)}
<p>Validation on the way: SFT {way("sft") or "–"} bits per byte; reward model {way("rm") or "–"}.</p>
{table(["calibration: mean score", "mean of people", "texts"], bins) if bins else ""}
<h2>Samples</h2>{"".join(pairs)}
<p>Seed {results["seed"]}; {escape(", ".join(map(" ".join, results["versions"].items())))}</p>"""


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m minirlhf.report", description="Write report.html and reward_kl.png."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    run = parser.parse_args().run
    results = next(iter(load(run / "results.json")), {})
    if not {"sft_samples", "best_of_n", "ppo", "samples", "sft", "rm", "versions"} <= set(results):
        raise UserError(
            f"{run}/results.json: missing or incomplete: run python -m minirlhf.evaluate --run {run} first"
        )
    metrics = {stage: load(run / stage / "metrics.jsonl") for stage in ("sft", "rm", "ppo")}
    sft = {
        key: value for key, value in results["sft_samples"].items() if "win_rate" not in key
    }  # ties with itself
    writers = {
        "SFT": sft,
        **{f"best of {n}": row for n, row in results["best_of_n"].items()},
        "PPO": results["ppo"],
    }
    png = draw(writers, metrics["ppo"])
    files.write_atomically(run / "report.html", page(run.resolve().name, results, writers, metrics, png))
    files.write_atomically(run / "reward_kl.png", png)
    for stage, number, what, time in stages(results):
        print(f"{stage:22s}{number:>12s}{time:>14s}  {what}")
    print(f"written to {run}/report.html and {run}/reward_kl.png")


if __name__ == "__main__":
    cli.run_script(main)
