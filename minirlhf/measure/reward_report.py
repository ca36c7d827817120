"""The reward model on texts it has not seen: beside it the baselines, and how well people predict people.

    found = reward_report(source.kind, predictions, {"train": ..., "val": ..., "test": ...}, part, seed)
    print_report(found)

`kind` is a dataset's: "rated" records have a response, its mean rating and its ratings; "preference" records
have chosen, rejected and `share`, the share of the votes for chosen; "labelled" records have a response and
its label, thumbs up or down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minirlhf.measure import baselines, stats
from minirlhf.measure.agreement import human_ceiling

COLUMNS = ("pearson", "spearman", "pair_accuracy", "pair_accuracy_1", "accuracy", "auc")


def reward_report(
    kind: str, predictions: Sequence[float], records: dict[str, list], part: str, seed: int
) -> dict[str, Any]:
    """{test, baselines, humans} of a reward model on records["test"].

    predictions  one score per test text, on the raters' own scale; for pairs, chosen's minus rejected's; for
                 thumbs the log-odds of thumbs up
    records      {"train", "val", "test"}: the baselines learn from the first two
    part         "all", or the half of the items that the model learnt from: then no baseline learns
    seed         decides which raters human_ceiling draws

    A baseline is None where the library it needs is not installed.  `humans` is None where no item has two
    ratings, and is absent for pairs and thumbs.  A measure that no pair of test items allows is None.
    """
    test = records["test"]
    if kind == "preference":
        shares = [record.share for record in test]
        longer = [len(record.chosen) - len(record.rejected) for record in test]
        return {
            "test": {"n": len(test), "accuracy": sign_accuracy(predictions, shares)},
            "baselines": {"longer text": {"accuracy": sign_accuracy(longer, shares)}},
        }

    if kind == "labelled":
        labels = [record.label for record in test]
        up = sum(labels) / len(labels)
        longer = baselines.longer_text([record.response for record in test])
        return {
            "test": {"n": len(test), **label_measures(predictions, labels)},
            "baselines": {
                "always the more frequent thumb": {"accuracy": max(up, 1 - up), "auc": 0.5},
                "longer text": {"auc": label_measures(longer, labels)["auc"]},
            },
        }

    truth, texts = [record.rating for record in test], [record.response for record in test]
    found = {"longer text": baselines.longer_text(texts), "VADER lexicon": baselines.vader_lexicon(texts)}
    if part == "all":
        learnt = []
        for split in ("train", "val"):
            learnt += [[r.response for r in records[split]], [r.rating for r in records[split]]]
        found["TF-IDF + ridge"] = baselines.tfidf_ridge(*learnt, texts)
        found["TF-IDF + ridge, with characters"] = baselines.tfidf_ridge(*learnt, texts, characters=True)
    return {
        "test": {
            "n": len(test),
            **rating_measures(predictions, truth),
            "calibration": stats.calibration(predictions, truth),
        },
        "baselines": {
            name: None if scores is None else rating_measures(scores, truth) for name, scores in found.items()
        },
        "humans": human_ceiling([record.ratings for record in test], np.random.default_rng(seed)),
    }


def validation_measure(kind: str, predictions: Sequence[float], records: list) -> dict[str, float]:
    """What to follow training by: val/pearson; val/accuracy of pairs ({} if all votes are tied); val/accuracy
    and val/auc of thumbs (no AUC where all are up, or all down)."""
    if kind == "labelled":
        measures = label_measures(predictions, [record.label for record in records])
        return {f"val/{name}": value for name, value in measures.items() if value is not None}
    if kind == "rated":
        return {"val/pearson": stats.pearson(predictions, [record.rating for record in records])}
    accuracy = sign_accuracy(predictions, [record.share for record in records])
    return {} if accuracy is None else {"val/accuracy": accuracy}


def rating_measures(scores: Sequence[float], truth: Sequence[float]) -> dict[str, float | None]:
    """Correlations of scores with mean ratings, and pair accuracy (`_1`: of pairs a point or more apart)."""
    return {
        "pearson": stats.pearson(scores, truth),
        "spearman": stats.spearman(scores, truth),
        "pair_accuracy": stats.pair_accuracy(scores, truth),
        "pair_accuracy_1": stats.pair_accuracy(scores, truth, min_gap=1.0),
    }


def label_measures(scores: Sequence[float], labels: Sequence[bool]) -> dict[str, float | None]:
    """Of log-odds: how often their sign agrees with the thumb, 0 counting a half; and the AUC.

    The AUC is the odds that a text with thumbs up scores higher than one with thumbs down, the accuracy over
    all pairs of different labels; None where there is no such pair.
    """
    signs = np.sign(np.asarray(scores, dtype=float)) * np.where(labels, 1, -1)
    return {"accuracy": float((signs + 1).mean() / 2), "auc": stats.pair_accuracy(scores, labels)}


def sign_accuracy(margins: Sequence[float], shares: Sequence[float]) -> float | None:
    """How often the sign of a margin agrees with the majority of the votes; None where every vote is tied.

    margins are score of a - score of b, shares the share of the votes for a.  A margin of 0 counts a half;
    tied votes do not count.
    """
    margins, shares = np.asarray(margins, dtype=float), np.asarray(shares, dtype=float)
    decided = shares != 0.5
    agreement = np.sign(margins) * np.sign(shares - 0.5)  # 1 agrees, 0 undecided, -1 disagrees
    return float(((agreement[decided] + 1) / 2).mean()) if decided.any() else None


def print_report(found: dict[str, Any]) -> None:
    """Print the table; "-" stands for what could not be measured."""
    rows = {"reward model": found["test"]} | found["baselines"]
    if "humans" in found:
        people = found["humans"] or {}
        shown = ("pearson", "pair_accuracy", "pair_accuracy_1")
        rows["one human (against the others)"] = {key: people.get(f"one_{key}") for key in shown}
        rows["half the humans (against the rest)"] = {"pearson": people.get("half_pearson")}
    columns = [column for column in COLUMNS if column in found["test"]]
    title = f"test split, {found['test']['n']} items"
    print(f"\n{title:36s}" + "".join(f"{column:>17s}" for column in columns))
    for name, row in rows.items():
        print(f"{name:36s}" + "".join(f"{_cell(row, column):>17s}" for column in columns))
    if "calibration" in found["test"]:
        c = found["test"]["calibration"]
        line = f"people = {c['slope']:.2f} x score {c['intercept']:+.2f}, rmse {c['rmse']:.2f} points"
        print(f"calibration: {line}")


def _cell(row: dict[str, float | None] | None, column: str) -> str:
    if row is None:
        return "not installed"
    if column not in row:
        return ""
    return "-" if row[column] is None else f"{row[column]:.3f}"
