"""RUN/results.json, checked, and its numbers as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support.text import for_html
from minirlhf.tools.report.checked import list_of, number_of, object_of, parse, read, refuse, text_of

Row = dict[str, Any]  # measured numbers by name; the interval of NAME is NAME_interval

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


def _row(value: Any, where: str) -> Row:
    """Measured numbers: each may be null, where it could not be measured, and may have an interval."""
    given, row = object_of(value, where), {}
    for name in ("seconds", *NUMBERS):
        if given.get(name) is not None:
            row[name] = number_of(given[name], f"{where}.{name}")
        elif name in given:
            row[name] = None
        if (interval := given.get(f"{name}_interval")) is not None:
            ends = list_of(interval, f"{where}.{name}_interval")
            if len(ends) != 2:
                refuse(f"{where}.{name}_interval", "two numbers", ends)
            row[f"{name}_interval"] = [number_of(end, f"{where}.{name}_interval") for end in ends]
    return row


def _stage(value: Any, where: str) -> dict[str, Any]:
    """A stage's results: its row, and for a reward model `peers`, what it is compared with, and `bins`."""
    given = object_of(value, where)
    stage = {"row": _row(given, where), "peers": {}, "bins": []}
    if "test" in given:
        test = object_of(given["test"], f"{where}.test")
        stage["row"] |= _row(test, f"{where}.test")
        calibration = object_of(test.get("calibration", {}), f"{where}.test.calibration")
        for values in list_of(calibration.get("bins", []), f"{where}.test.calibration.bins"):
            at = f"{where}.test.calibration.bins"
            numbers = [number_of(x, at) for x in list_of(values, at)]
            stage["bins"].append(numbers if len(numbers) == 3 else refuse(at, "three numbers", values))
        for name, row in object_of(given.get("baselines", {}), f"{where}.baselines").items():
            stage["peers"][name] = None if row is None else _row(row, f"{where}.baselines {name!r:.60}")
        people = object_of(given.get("humans") or {}, f"{where}.humans")
        for name, prefix in ("one human", "one_"), ("half the humans", "half_"):
            own = {k.removeprefix(prefix): v for k, v in people.items() if k.startswith(prefix)}
            stage["peers"][name] = _row(own, f"{where}.humans")
    return stage


def _sample(value: Any, where: str) -> dict[str, Any]:
    given, found = object_of(value, where), {}
    for name in ("prompt", "sft", "ppo"):
        found[name] = text_of(given.get(name), f"{where}.{name}")
    for name in ("kl", "score_sft", "score_ppo"):
        found[name] = number_of(given.get(name), f"{where}.{name}")
    return found


def load_results(file: Path) -> dict[str, Any]:
    """results.json, of which every value that the report shows has been checked.

    {writers, stages: rows by name; samples; policy: its name among the writers, the last one; prompts, seed,
    split, versions: text; reward: the score's label}
    """
    missing = f"{file}: missing or incomplete: run python -m minirlhf.evaluate --run {file.parent} first"
    if not (text := read(file)).strip():
        raise UserError(missing)
    given = parse(text, str(file))
    if not {"sft_samples", "best_of_n", "ppo", "samples", "sft", "rm", "versions"} <= given.keys():
        raise UserError(missing)
    at = lambda name: f"{file}: {name}"
    best_of_n = object_of(given["best_of_n"], at("best_of_n")).items()
    for n, _ in best_of_n:
        if not (n.isascii() and n.isdigit() and len(n) < 9):
            refuse(at("best_of_n"), "numbers of samples as names", n)
    sft = _row(given["sft_samples"], at("sft_samples"))
    for name in list(sft):
        if "win_rate" in name:  # against itself: ties
            del sft[name]
    policy = given.get("policy", "PPO")
    if policy not in ("PPO", "DPO"):
        refuse(at("policy"), "PPO or DPO", policy)
    versions = object_of(given["versions"], at("versions")).items()
    reward = [text_of(spec, at("reward")) for spec in list_of(given.get("reward", ["rm"]), at("reward"))]
    return {
        "writers": {
            "SFT": sft,
            **{f"best of {n}": _row(row, at(f"best_of_n.{n}")) for n, row in best_of_n},
            policy: _row(given["ppo"], at("ppo")),
        },
        "policy": policy,
        "stages": {name: _stage(given[name], at(name)) for name in STAGES if given.get(name)},
        "samples": [
            _sample(sample, at(f"samples[{i}]"))
            for i, sample in enumerate(list_of(given["samples"], at("samples")))
        ],
        "prompts": f"{number_of(given.get('prompts', 0), at('prompts')):g}",
        "seed": f"{number_of(given.get('seed', 0), at('seed'))}",
        "split": text_of(given.get("split", "test"), at("split")),
        "versions": ", ".join(f"{name} {text_of(version, at('versions'))}" for name, version in versions),
        "reward": "reward model" if any(spec.startswith("rm") for spec in reward) else "reward",
    }


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
        title = results["policy"] if name == "ppo" else STAGES[name]
        row = stage["row"] | (results["writers"][title] if name == "ppo" else {})
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
        lines.append((title, number, what, "–" if seconds is None else clock(seconds)))
        total += seconds or 0.0
    return [*lines, ("all stages", clock(total), "of training", "")]


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of texts, which are escaped here."""
    line = lambda tag, texts: (
        f"<tr><th>{for_html(texts[0])}" + "".join(f"<{tag}>{for_html(text)}" for text in texts[1:])
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


def sample_cards(sample: dict[str, Any], policy: str) -> list[str]:
    """The SFT model's continuation and the policy's, of one prompt; policy: its name."""
    notes = {
        "sft": f"SFT, score {sample['score_sft']:+.2f}",
        "ppo": f"{policy}, score {sample['score_ppo']:+.2f}, KL {sample['kl']:.1f} nats",
    }
    text = lambda who: f'<div class="text"><i>{for_html(sample["prompt"])}</i>{for_html(sample[who])}</div>'
    return [f"<small>{for_html(note)}</small>{text(who)}" for who, note in notes.items()]
