"""Measures of scores, comparisons and text (minirlhf/measure/stats.py)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError
from minirlhf.measure import stats

few = settings(max_examples=60, deadline=None)
numbers = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=0, max_size=30)  # many ties
seeds = st.integers(0, 2**32 - 1)


def test_D24_wilson_fixture():
    assert stats.wilson(60, 100) == pytest.approx((0.502003, 0.690599), abs=1e-6)
    assert stats.wilson(10, 10) == pytest.approx((0.722467, 1), abs=1e-6)
    assert stats.wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)  # the mirror image
    assert stats.wilson(10, 10)[1] <= 1 and stats.wilson(0, 10)[0] >= 0
    assert stats.wilson(0, 0) == (0.0, 1.0)


@few
@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_D24_wilson_solves_its_equation(n, share):
    """The ends are the rates p that wins / n is z deviations from: (rate - p)^2 = z^2 p (1 - p) / n."""
    rate = round(share * n) / n
    for p in stats.wilson(rate * n, n):
        assert (rate - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)


def test_D24_ties_count_a_half():
    assert stats.win_rate([1, 2, 3, 0], [0, 2, 3, 1])[0] == 0.5
    rate, low, high = stats.win_rate([1.0] * 120 + [0.0] * 80, [0.0] * 120 + [1.0] * 80)
    assert (rate, low, high) == (0.6, *stats.wilson(120, 200))
    assert stats.win_rate([2.0], [2.0])[1:] == stats.wilson(0.5, 1)
    assert stats.win_rate([], []) == (0.5, 0.0, 1.0)


@few
@given(a=numbers, seed=seeds)
def test_D24_win_rate_of_the_other_side_is_the_complement(a, seed):
    b = np.random.default_rng(seed).permutation(a)
    rate, low, high = stats.win_rate(a, b)
    assert stats.win_rate(b, a) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-12)


def test_D24_bootstrap_resamples_prompts_not_samples():
    rng = np.random.default_rng(0)
    by_prompt = rng.normal(3.0, 1.0, size=200)
    low, high = stats.bootstrap_interval(by_prompt, np.random.default_rng(1), n=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * by_prompt.std() / math.sqrt(200), rel=0.08)
    assert (high + low) / 2 == pytest.approx(by_prompt.mean(), abs=0.02)
    # 50 equal samples of each prompt hold no more information: the interval must not shrink.
    repeated = np.repeat(by_prompt[:, None], 50, axis=1)
    assert stats.bootstrap_interval(repeated, np.random.default_rng(1), n=4000) == pytest.approx((low, high))
    assert stats.bootstrap_interval([], rng) == (0.0, 0.0)
    assert stats.bootstrap_interval([2.5], rng) == (2.5, 2.5)


def test_pearson_and_spearman_known_values():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert stats.pearson(x, y) == pytest.approx(0.8)
    assert stats.spearman(x, [math.exp(v) for v in y]) == pytest.approx(0.8)  # ranks alone matter
    # Ranks of [1, 2, 2, 3] are [1, 2.5, 2.5, 4]; against 1..4: r = 4.5 / sqrt(4.5 * 5)
    assert stats.ranks([10, 20, 20, 30]).tolist() == [1, 2.5, 2.5, 4]
    assert stats.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@few
@given(seed=seeds, n=st.integers(3, 40), levels=st.integers(2, 9))
def test_pearson_agrees_with_numpy_and_ignores_scale(seed, n, levels):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, levels, n).astype(float), rng.normal(size=n)
    if np.ptp(x) > 0:
        assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert stats.pearson(3e-100 * x + 1e-100, -1e90 * y) == pytest.approx(-stats.pearson(x, y), abs=1e-9)


@pytest.mark.parametrize("flat", [[], [1.0], [0.1] * 7, [0.0] * 7, [-1e100] * 7])
def test_constant_input_gives_zero_not_nan(flat):
    other = list(range(len(flat)))
    for r in (stats.pearson, stats.spearman):
        assert r(flat, other) == 0.0 and r(other, flat) == 0.0
    assert stats.pair_accuracy(other, flat) is None  # no pair differs
    assert stats.pair_accuracy(flat, other) == (0.5 if len(flat) > 1 else None)  # a constant guesses
    assert stats.calibration(flat, other)["slope"] == 0.0


def slow_pair_accuracy(pred, truth, min_gap):
    hits = pairs = 0
    for i in range(len(pred)):
        for j in range(i):
            gap, guess = truth[i] - truth[j], pred[i] - pred[j]
            if gap != 0 and abs(gap) >= min_gap:
                pairs += 1
                hits += 0.5 if guess == 0 else float((gap > 0) == (guess > 0))
    return hits / pairs if pairs else None


@few
@given(truth=numbers, seed=seeds, min_gap=st.sampled_from([0.0, 0.25, 1.0, 3.5]))
def test_pair_accuracy_equals_the_double_loop(truth, seed, min_gap):
    pred = np.random.default_rng(seed).integers(0, 5, len(truth)).astype(float)
    wanted = slow_pair_accuracy(pred, truth, min_gap)
    assert stats.pair_accuracy(pred, truth, min_gap) == (wanted if wanted is None else pytest.approx(wanted))


def test_pair_accuracy_counts_a_gap_that_floats_fall_short_of():
    # Means of ten raters, one point apart to a person, 0.9999999999999998 to a float.
    assert 1.1 - 0.1 == 1.0 and 2.3 - 1.3 < 1.0
    assert stats.pair_accuracy([0, 1], [1.3, 2.3], min_gap=1.0) == 1.0
    assert stats.pair_accuracy([0, 1], [1.3, 2.2], min_gap=1.0) is None  # no pair


def test_calibration_recovers_a_line():
    pred = np.linspace(-2, 2, 1000)
    report = stats.calibration(pred, 0.5 * pred + 1, bins=10)
    assert (report["slope"], report["intercept"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert report["rmse"] == pytest.approx(np.sqrt(((1 - 0.5 * pred) ** 2).mean()))
    assert [n for _, _, n in report["bins"]] == [100] * 10
    for mean_pred, mean_truth, _ in report["bins"]:
        assert mean_truth == pytest.approx(0.5 * mean_pred + 1)
    assert report["bins"] == sorted(report["bins"])
    assert stats.calibration([3.0, 3.0], [1.0, 2.0]) == {
        "bins": [(3.0, 1.0, 1), (3.0, 2.0, 1)],
        "slope": 0.0,
        "intercept": 1.5,
        "rmse": pytest.approx(math.sqrt(2.5)),
    }
    assert stats.calibration([], [])["bins"] == []


def test_distinct_n_counts_over_all_responses():
    # Bigrams: (1,2) (2,1) (1,2) | (1,2) | none: 2 unique of 4, counted across the responses.
    assert stats.distinct_n([[1, 2, 1, 2], [1, 2], [7]], 2) == 0.5
    assert stats.distinct_n([[1, 2, 3]], 1) == 1.0
    assert stats.distinct_n([[1], []], 2) == 0.0 and stats.distinct_n([], 1) == 0.0
    assert stats.distinct_n([["a", "b"], ["a", "b"]], 2) == 0.5


def test_distinct_n_compares_tensors_by_value():
    """Elements of a tensor hash by identity: counted as they are, every n-gram would look unique."""
    rows = torch.tensor([[5, 5, 5, 5], [5, 5, 5, 5]])
    assert stats.distinct_n(rows, 2) == stats.distinct_n(rows.numpy(), 2) == 1 / 6


def test_misuse_is_told():
    with pytest.raises(UserError, match="^scores: 1 of 2 are not finite; check the model or data"):
        stats.pearson([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(UserError, match="^bootstrap values: 1 of 1 are not finite"):
        stats.bootstrap_interval([math.inf], np.random.default_rng(0))
    with pytest.raises(ValueError, match="3 numbers against 1"):
        stats.win_rate([1, 2, 3], [1])
