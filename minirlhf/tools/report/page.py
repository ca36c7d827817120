"""The page: one file, with its own style and script, that asks nobody for anything.

Numbers and texts reach the script as JSON in a block that is never executed, and enter the page as text
nodes.  Tables are written here, escaped, so that they are there without a script.  The page's own policy
allows the one script and the one style below, by their hashes; nothing that stands in a text can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from minirlhf.support.text import for_html
from minirlhf.tools.report.follow import JUDGE_METRIC, REWARD_METRICS, STRIPS, Followed, Row, Rows
from minirlhf.tools.report.results import (
    STAGES,
    comparison,
    grid,
    sample_cards,
    stage_lines,
    table,
)

SHORT = {JUDGE_METRIC: "judge", "train/loss": "loss"}  # a metric's name on the page
SHORT |= {metric: name for name, (metric, _) in STRIPS.items()}
VALIDATION = ("val/bits_per_byte", "val/pearson", "val/accuracy", "val/auc")
MARKS = ("kl", "score", "judge", "entropy", "mean_length")  # of a writer, drawn into the curves
SAMPLE_FIELDS = ("step", "prompt", "response", "score", "judge", "kl", "length", "disagreement", "rm")
SCRIPT = ("dom.js", "tokens.js", "curves.js", "texts.js", "live.js")
NO_SAMPLES = "No texts were recorded. train_ppo.py --save-samples 6 records those of every sixth rollout."


@dataclass
class Run:
    """What the page shows of one run."""

    name: str
    followed: Followed
    results: dict[str, Any] | None = None


def short_metrics(rows: Rows, stage: str, start: int = 0) -> list[Row]:
    """Rows of metrics, from the start-th on, under the names that the script knows."""
    names = dict(SHORT)
    if stage == "ppo":
        there = {name for row in rows.rows for name in row}
        names[next((m for m in REWARD_METRICS if m in there), REWARD_METRICS[1])] = "score"
    else:
        names |= dict.fromkeys(VALIDATION, "val")
    return [
        {"step": row["step"]} | {names[name]: value for name, value in row.items() if name in names}
        for row in rows.rows[start:]
        if "step" in row
    ]


def short_samples(rows: Rows, start: int = 0) -> list[list[Any]]:
    return [[row.get(name) for name in SAMPLE_FIELDS] for row in rows.rows[start:]]


def data_of(run: Run) -> dict[str, Any]:
    """One run, for the script."""
    followed = run.followed
    writers = run.results["writers"] if run.results else {}
    return {
        "name": run.name,
        "metrics": {stage: short_metrics(rows, stage) for stage, rows in followed.metrics.items()},
        "samples": short_samples(followed.samples),
        "left": followed.samples.left,
        "writers": {
            name: {key: row[key] for key in MARKS if row.get(key) is not None}
            for name, row in writers.items()
        },
    }


def json_block(data: Any) -> str:
    """JSON that may stand in a <script> block: no text in it can end the block."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def static(*names: str) -> str:
    """Files of static/, one after the other."""
    folder = resources("minirlhf.tools.report").joinpath("static")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(live: bool) -> str:
    """The page's Content-Security-Policy; a live page may ask the server that it came from."""
    rules = ["default-src 'none'", f"script-src {hash_of(static(*SCRIPT))}"]
    rules += [
        f"style-src {hash_of(static('page.css'))}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules + ["connect-src 'self'"] * live)


def headline(results: dict[str, Any]) -> str:
    """A card for each stage: its key number."""
    cards = []
    for stage, number, what, time in stage_lines(results):
        measured = f"<b>{for_html(number)}</b> {for_html(what)}"
        cards.append(f"<small>{for_html(stage)}</small>{measured}<small>{for_html(time)}</small>")
    return grid(cards)


def tables(run: Run, with_samples: bool) -> str:
    """What evaluate measured, and what the reward models' reports say; HTML."""
    results, metrics = run.results, run.followed.metrics
    stages, writers, reward = results["stages"], results["writers"], results["reward"]
    policy = results["policy"]
    rm = stages.get("rm", {"row": {}, "peers": {}, "bins": []})
    models = {STAGES[name]: stages[name]["row"] for name in ("rm", "rm_optimised", "judge") if name in stages}
    bins = [[f"{score:+.2f}", f"{people:+.2f}", f"{n:g}"] for score, people, n in rm["bins"]]
    validation = {
        stage: ", ".join(f"{row[k]:.3f}" for row in metrics[stage].rows for k in VALIDATION if k in row)
        for stage in ("sft", "rm")
    }
    against_people = comparison(models | rm["peers"], list(rm["row"]), "reward model")
    cards = (
        "".join(grid(sample_cards(sample, policy)) for sample in results["samples"]) if with_samples else ""
    )
    return f"""<h3>Against SFT, on {for_html(results["prompts"])} {for_html(results["split"])} prompts</h3>
{comparison(writers, list(writers[policy]), reward)}
<h3>Reward model and people, on test texts</h3>{against_people}
<p>Validation on the way: SFT {validation["sft"] or "–"} bits per byte;
reward model {validation["rm"] or "–"}.</p>
{table(["calibration: mean score", "mean of people", "texts"], bins) if bins else ""}
{"<h3>Samples</h3>" + cards if cards else ""}
<p>Seed {for_html(results["seed"])}; {for_html(results["versions"])}</p>"""


def beside(runs: list[Run]) -> str:
    """The policies of several runs, as minirlhf.evaluate measured them."""
    measured = {run.name: run.results for run in runs if run.results}
    rows = {name: results["writers"][results["policy"]] for name, results in measured.items()}
    names = [name for row in rows.values() for name in row]
    return comparison(rows, names, "reward model") if rows else ""


def section(name: str, title: str, body: str) -> str:
    head = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{body}</section>'


def page(
    title: str, runs: list[Run], facts: dict[str, Any] | None = None, live: dict[str, Any] | None = None
) -> str:
    """The whole page of one run, or of several beside each other.

    facts: what facts.load returns.  live: what the script needs to ask for more, see watch.py.
    """
    first, several = runs[0], len(runs) > 1
    parts: dict[str, tuple[str, str]] = {}
    if facts:
        parts["why"] = "Why it wrote this", '<div id="why-view"></div>'
    parts["training"] = "Training", '<div id="curves"></div>'
    recorded = any(run.followed.samples.rows for run in runs)
    if recorded or not several:
        body = '<div id="browser"></div>' if recorded or live else f'<p class="soft">{NO_SAMPLES}</p>'
        parts["texts"] = "Texts of the training", body
    if several and (numbers := beside(runs)):
        parts["numbers"] = "Numbers", numbers
    elif first.results and not several:
        parts["numbers"] = "Numbers", tables(first, with_samples=not facts)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in parts.items())
    top = headline(first.results) if first.results and not several else ""
    hint = ""
    if first.results and not facts and not several:
        command = f"python -m minirlhf.why {for_html(str(first.followed.run))}"
        sentence = f"To see why each token was written: <code>{command}</code>, then this command again."
        hint = f'<p class="soft">{sentence}</p>'
    data = {
        "runs": [data_of(run) for run in runs],
        "facts": facts,
        "live": live,
        "reward": first.results["reward"] if first.results else "reward model",
    }
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(live is not None)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{for_html(title)}</title>
<link rel="icon" href="data:,">
<style>{static("page.css")}</style>
</head>
<body>
<header><h1>{for_html(title)}</h1><nav aria-label="On this page">{links}</nav></header>
<p id="live" role="status" hidden></p>
<noscript><p>The curves and the texts need JavaScript; the numbers do not.</p></noscript>
<main>
{top}{hint}
{"".join(section(name, title, body) for name, (title, body) in parts.items())}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">{json_block(data)}</script>
<script>{static(*SCRIPT)}</script>
</body>
</html>
"""


def name_of(run: Path) -> str:
    return run.resolve().name
