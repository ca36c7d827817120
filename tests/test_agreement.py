"""Agreement between people (minirlhf/measure/agreement.py)."""

import math
import time
from bisect import bisect_left, bisect_right

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError
from minirlhf.measure.agreement import human_ceiling, krippendorff_alpha

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)

RATERS = [". . . . . 3 4 1 2 1 1 3 3 . 3", "1 . 2 1 3 3 4 3 . . . . . . .", ". . 2 1 3 4 4 . 2 1 1 3 3 . 4"]
UNITS = [[float(s) for s in unit if s != "."] for unit in zip(*(r.split() for r in RATERS), strict=True)]


@pytest.mark.parametrize(
    "level, alpha", [("nominal", 0.691358), ("ordinal", 0.806721), ("interval", 0.810845)]
)
def test_D23_krippendorff_alpha_fixture(level, alpha):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=1e-6)
    lone = [[7.0], [], [-3.0]]  # units of fewer than two scores do not count
    assert krippendorff_alpha(lone + UNITS, level) == pytest.approx(alpha, abs=1e-6)


def by_definition(units, level):
    """1 - observed / expected disagreement, pair by pair (Krippendorff 2011)."""
    everyone = sorted(score for unit in units for score in unit)
    up_to = lambda low, high: bisect_right(everyone, high) - bisect_left(everyone, low)

    def distance(x, y):
        if level == "nominal":
            return float(x != y)
        if level == "interval":
            return (x - y) ** 2
        # Ordinal: as many as there are scores from the one to the other, half of their own kind left out.
        return (up_to(min(x, y), max(x, y)) - (up_to(x, x) + up_to(y, y)) / 2) ** 2 if x != y else 0.0

    within = sum(distance(x, y) / (len(unit) - 1) for unit in units for x in unit for y in unit)
    overall = sum(distance(x, y) for x in everyone for y in everyone) / (len(everyone) - 1)
    return 1 - within / overall if overall else 0.0


@few
@given(seed=seeds, level=st.sampled_from(["nominal", "ordinal", "interval"]))
def test_D23_alpha_equals_its_definition_over_pairs(seed, level):
    rng = np.random.default_rng(seed)
    units = [rng.integers(0, 5, rng.integers(2, 6)).astype(float).tolist() for _ in range(6)]
    assert krippendorff_alpha(units, level) == pytest.approx(by_definition(units, level), abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_D23_alpha_of_extremes(level):
    assert krippendorff_alpha([[1, 1, 1], [4, 4], [2, 2]], level) == 1.0
    assert krippendorff_alpha([[2, 2], [2, 2, 2]], level) == 0.0  # no variation shows no reliability
    assert krippendorff_alpha([[0.1, 0.1, 0.1], [0.1] * 7], level) == 0.0  # 0.1's own rounding is none
    assert krippendorff_alpha([[1, 2], [2, 1], [1, 2]], level) < 0  # worse than chance


def test_D23_alpha_of_an_unknown_level():
    with pytest.raises(UserError, match="^level of measurement 'ratio': unknown"):
        krippendorff_alpha(UNITS, "ratio")


@pytest.mark.parametrize("units", [[], [[]], [[1.0], [3.0], []]])
def test_H11_one_rating_per_item_shows_no_agreement_and_no_ceiling(units):
    for level in ("nominal", "ordinal", "interval"):
        assert krippendorff_alpha(units, level) is None
    assert human_ceiling(units, np.random.default_rng(0)) is None
    assert (
        human_ceiling([*units, [1.0, 2.0]], np.random.default_rng(0)) is None
    )  # one item correlates with nothing


def test_H11_no_two_means_a_point_apart():
    people = human_ceiling([[0.1, 0.2], [0.4, 0.3]], np.random.default_rng(0))
    assert people["one_pair_accuracy"] == 1.0 and people["one_pair_accuracy_1"] is None


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_H19_sliders_with_hundreds_of_different_scores(level):
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 100, 300)
    units = np.clip(truth[:, None] + rng.normal(0, 10, (300, 2)), 0, 100).round(3).tolist()
    assert len({score for unit in units for score in unit}) > 500
    assert krippendorff_alpha(units, level) == pytest.approx(by_definition(units, level), abs=1e-9)


def test_D23_alpha_is_fast_on_the_whole_dataset():
    rng = np.random.default_rng(0)
    units = rng.integers(-4, 5, (23_000, 20)).tolist()
    start = time.process_time()
    assert abs(krippendorff_alpha(units)) < 0.01  # raters at random: chance
    assert time.process_time() - start < 3


def test_human_ceiling_of_a_known_population():
    """Truth has variance 4; the noise has 1 in one rater, 1/9 in the mean of nine, 1/5 in that of five."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 2000)
    ratings = (truth[:, None] + rng.normal(0, 1, (2000, 10))).tolist()
    people = human_ceiling([*ratings, [1.0], []], rng)
    assert people["items"] == 2000  # the lone rater has nobody to predict
    assert people["one_pearson"] == pytest.approx(4 / math.sqrt(5 * (4 + 1 / 9)), abs=0.015)
    assert people["half_pearson"] == pytest.approx(4 / (4 + 1 / 5), abs=0.006)
    assert 0.75 < people["one_pair_accuracy"] < people["one_pair_accuracy_1"] < 1


def test_human_ceiling_of_agreement_and_of_ties():
    same = human_ceiling([[s] * 5 for s in (-2.0, 0.0, 1.0)], np.random.default_rng(0))
    assert same == {
        "items": 3,
        "one_pearson": pytest.approx(1),
        "one_pair_accuracy": 1.0,
        "one_pair_accuracy_1": 1.0,
        "half_pearson": pytest.approx(1),
    }
