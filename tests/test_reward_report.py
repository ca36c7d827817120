"""The reward model's report on test texts (minirlhf/measure/reward_report.py)."""

from dataclasses import dataclass

import numpy as np
import pytest

from minirlhf.measure import stats
from minirlhf.measure.reward_report import (
    label_measures,
    print_report,
    reward_report,
    sign_accuracy,
    validation_measure,
)


@dataclass
class Rated:
    response: str
    ratings: tuple[float, ...]

    @property
    def rating(self):
        return float(np.mean(self.ratings))


@dataclass
class Pair:
    chosen: str
    rejected: str
    share: float


@dataclass
class Thumb:
    response: str
    label: bool


def rated(raters, n=40, scale=4.0, seed=0):
    """{split: records}: texts of 1 to 9 words with `raters` ratings each."""
    rng = np.random.default_rng(seed)
    words = ["dull", "fine", "great", "odd", "long"]

    def record():
        truth = rng.uniform(-scale, scale)
        text = " ".join(rng.choice(words, rng.integers(1, 10)))
        return Rated(text, tuple(truth + rng.normal(0, scale / 8, raters)))

    return {split: [record() for _ in range(n)] for split in ("train", "val", "test")}


def test_of_ratings(capsys):
    records = rated(raters=5)
    truth = [r.rating for r in records["test"]]
    scores = np.random.default_rng(1).normal(truth, 1.0).tolist()
    found = reward_report("rated", scores, records, "all", 1)
    assert {*found} == {"test", "baselines", "humans"} and found["test"]["n"] == 40
    assert found["test"]["pearson"] == stats.pearson(scores, truth)
    assert found["test"]["pair_accuracy_1"] == stats.pair_accuracy(scores, truth, min_gap=1.0)
    assert found["test"]["calibration"] == stats.calibration(scores, truth)
    lengths = [len(r.response) for r in records["test"]]
    assert found["baselines"]["longer text"]["spearman"] == stats.spearman(lengths, truth)
    learners = {"TF-IDF + ridge", "TF-IDF + ridge, with characters"}
    assert learners <= {*found["baselines"]}
    assert not learners & {
        *reward_report("rated", scores, records, "a", 1)["baselines"]
    }  # it learnt from half
    assert found == reward_report("rated", scores, records, "all", 1)
    print_report(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "test",
        "split,",
        "40",
        "items",
        "pearson",
        "spearman",
        "pair_accuracy",
        "pair_accuracy_1",
    ]
    assert lines[2].split()[-4:] == [
        f"{stats.pearson(scores, truth):.3f}",
        f"{stats.spearman(scores, truth):.3f}",
        f"{stats.pair_accuracy(scores, truth):.3f}",
        f"{stats.pair_accuracy(scores, truth, 1.0):.3f}",
    ]
    assert lines[-3].startswith("one human") and f"{found['humans']['one_pearson']:.3f}" in lines[-3]
    assert lines[-2].split()[-1] == f"{found['humans']['half_pearson']:.3f}"
    assert lines[-1].startswith("calibration: people = ")


def test_H11_one_rating_per_item_is_no_ceiling(capsys):
    records = rated(raters=1)
    found = reward_report("rated", [r.rating for r in records["test"]], records, "a", 1)
    assert found["humans"] is None
    print_report(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["one", "human", "(against", "the", "others)", "-", "-", "-"]
    assert lines[-2].split() == ["half", "the", "humans", "(against", "the", "rest)", "-"]
    assert "0.000" not in lines[-3] + lines[-2]


def test_H11_ratings_of_which_none_are_a_point_apart(capsys):
    records = rated(raters=3, scale=0.4)
    found = reward_report("rated", [r.rating for r in records["test"]], records, "a", 1)
    assert found["test"]["pair_accuracy_1"] is None is found["humans"]["one_pair_accuracy_1"]
    print_report(found)
    assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["1.000", "-"]


def test_of_pairs(capsys):
    test = [Pair("long text", "text", 1.0), Pair("a", "bc", 0.9), Pair("a", "b", 0.2), Pair("abc", "b", 0.5)]
    found = reward_report("preference", [1.0, 2.0, 3.0, -1.0], {"test": test}, "all", 1)
    assert found == {
        "test": {"n": 4, "accuracy": 2 / 3},  # right, right, wrong; the tied vote does not count
        "baselines": {"longer text": {"accuracy": 0.5}},  # right, wrong, and a tie of lengths is a half
    }
    print_report(found)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "accuracy",
        "0.667",
        "0.500",
    ]


def test_H11_pairs_all_of_whose_votes_are_tied(capsys):
    tied = [Pair("a", "b", 0.5), Pair("c", "d", 0.5)]
    found = reward_report("preference", [1.0, 2.0], {"test": tied}, "all", 1)
    assert found["test"]["accuracy"] is None
    print_report(found)
    assert capsys.readouterr().out.splitlines()[2].split() == ["reward", "model", "-"]
    assert validation_measure("preference", [1.0, 2.0], tied) == {}


@pytest.mark.parametrize(
    "margins, shares, accuracy",
    [
        ([1.0, -1.0], [1.0, 0.0], 1.0),
        ([1.0, -1.0], [0.0, 1.0], 0.0),
        ([0.0, 2.0], [1.0, 0.7], 0.75),
        ([], [], None),
    ],
)
def test_sign_accuracy(margins, shares, accuracy):
    assert sign_accuracy(margins, shares) == accuracy


def test_measures_on_the_way():
    records = rated(raters=2)["val"]
    scores = [r.rating + 1 for r in records]
    assert validation_measure("rated", scores, records) == {"val/pearson": pytest.approx(1.0)}
    pairs = [Pair("a", "b", 1.0), Pair("a", "b", 0.5), Pair("a", "b", 0.0)]
    assert validation_measure("preference", [1.0, 1.0, 1.0], pairs) == {"val/accuracy": 0.5}


def test_of_thumbs(capsys):
    test = [Thumb("long text", True), Thumb("text", False), Thumb("a", True), Thumb("bc", True)]
    found = reward_report("labelled", [2.0, -1.0, 0.0, -3.0], {"test": test}, "all", 1)
    assert found == {
        "test": {"n": 4, "accuracy": 2.5 / 4, "auc": 2 / 3},  # right, right, undecided, wrong
        "baselines": {
            "always the more frequent thumb": {"accuracy": 0.75, "auc": 0.5},
            "longer text": {"auc": 1 / 3},
        },
    }
    print_report(found)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split()[-2:] == ["accuracy", "auc"] and lines[1].split()[-2:] == ["0.625", "0.667"]
    assert lines[3].split() == ["longer", "text", "0.333"]
    assert validation_measure("labelled", [1.0, -1.0], test[:2]) == {"val/accuracy": 1.0, "val/auc": 1.0}


def test_thumbs_that_all_point_up_have_no_auc():
    assert label_measures([1.0, -1.0], [True, True]) == {"accuracy": 0.5, "auc": None}
    assert validation_measure("labelled", [1.0], [Thumb("a", True)]) == {"val/accuracy": 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_is_the_odds_of_the_right_order(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(-2, 3, 30), rng.integers(0, 2, 30).astype(bool)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert label_measures(scores, labels)["auc"] == pytest.approx(np.mean(pairs))
