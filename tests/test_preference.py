"""Reward-model losses, pairs from ratings and normalised scores (minirlhf/preference.py)."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, preference

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
scores = st.floats(-1e4, 1e4, width=32)


def pair(d, share=1.0):
    return preference.pairwise_loss(torch.tensor([float(d)]), torch.zeros(1), share).item()


# Losses


@pytest.mark.parametrize("d, loss", [(0, 0.693147), (1, 0.313262), (2, 0.126928), (-1, 1.313262)])
def test_D15_pairwise_loss_fixture(d, loss):
    assert pair(d) == pytest.approx(loss, abs=1e-6)


def test_D15_pairwise_loss_is_stable_at_the_extremes():
    assert pair(1e4) == 0.0 and pair(-1e4) == 1e4
    assert pair(1e4, 0.5) == 5e3 and pair(-1e4, 0.25) == 2.5e3
    assert pair(20) == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)  # not rounded to 0
    for share in (0.0, 0.5, 1.0):
        a = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
        preference.pairwise_loss(a, torch.zeros(3), share).backward()
        sigmoid = torch.tensor([1.0, 0.0, 0.5])
        assert torch.allclose(a.grad, (sigmoid - share) / 3, atol=1e-7)  # (sigmoid(d) - share) / B


@few
@given(a=scores, b=scores, share=st.integers(0, 1024).map(lambda n: n / 1024))  # 1 - share is exact
def test_D15_swapping_a_pair_with_its_label_changes_nothing(a, b, share):
    a, b, share = (torch.tensor([x]) for x in (a, b, share))
    there = preference.pairwise_loss(a, b, share)
    assert torch.allclose(there, preference.pairwise_loss(b, a, 1 - share), rtol=1e-5, atol=1e-5)
    assert there >= 0


def test_D15_a_share_is_the_mean_over_its_voters():
    """Seven votes of ten for a = seven pairs that say a and three that say b; a tie = one of each."""
    a, b = torch.tensor([0.8]), torch.tensor([-0.3])
    votes = [preference.pairwise_loss(a, b)] * 7 + [preference.pairwise_loss(b, a)] * 3
    assert pair(1.1, 0.7) == pytest.approx(torch.stack(votes).mean().item(), abs=1e-6)
    best = min(np.linspace(-3, 3, 601), key=lambda d: pair(d, 0.7))
    assert best == pytest.approx(math.log(0.7 / 0.3), abs=0.01)  # the optimum says exactly that share
    tie = torch.zeros(1, requires_grad=True)
    preference.pairwise_loss(tie, torch.zeros(1), 0.5).backward()
    assert tie.grad.item() == 0.0


def test_pairwise_loss_computes_in_fp32():
    a = torch.tensor([100.0, 3.0], dtype=torch.bfloat16)
    loss = preference.pairwise_loss(a, a - 1)
    assert loss.dtype == torch.float32


def test_regression_loss():
    scores, ratings = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.5, -1.0, -1.0])
    loss = preference.regression_loss(scores.bfloat16(), ratings)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((0.25 + 9 + 0) / 3)


@few
@given(seed=seeds)
def test_D15_binary_loss_is_the_cross_entropy_of_thumbs(seed):
    rng = np.random.default_rng(seed)
    x, up = rng.normal(0, 3, 9), rng.integers(0, 2, 9)
    p = 1 / (1 + np.exp(-x))
    loss = preference.binary_loss(torch.tensor(x), torch.tensor(up))
    assert loss.item() == pytest.approx(-np.log(np.where(up, p, 1 - p)).mean(), rel=1e-5)
    assert preference.binary_loss(torch.tensor(-x), torch.tensor(1 - up)).item() == pytest.approx(loss.item())


def test_D15_binary_loss_is_stable_and_least_at_the_log_odds():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = preference.binary_loss(far, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 0.0 and far.grad.tolist() == [0.0, 0.0]
    assert preference.binary_loss(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 1.0])).item() == 1e4
    x, labels = torch.zeros(4, requires_grad=True), torch.tensor([1.0, 1.0, 1.0, 0.0])
    preference.binary_loss(x, labels).backward()
    assert torch.equal(x.grad, (0.5 - labels) / 4)  # (sigmoid(score) - label) / B
    at = lambda score: preference.binary_loss(torch.full((4,), score), labels).item()
    assert min(np.linspace(-3, 3, 601), key=at) == pytest.approx(math.log(3), abs=0.01)
    assert at(0.0) == pytest.approx(math.log(2))


# Pairs from ratings


def brute_share(x, y):
    return np.mean([(p > q) + 0.5 * (p == q) for p in x for q in y])


@few
@given(seed=seeds)
def test_D15_shares_are_what_independent_raters_would_vote(seed):
    rng = np.random.default_rng(seed)
    ratings = [rng.integers(-4, 5, rng.integers(1, 7)).tolist() for _ in range(12)]
    a, b, share = preference.pairs_from_ratings(ratings, rng, n=1000)
    drawn = [(i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    assert {frozenset(pair) for pair in drawn} == {frozenset((i, j)) for i in range(12) for j in range(i)}
    assert len(drawn) == 66 == len(share)  # n > all: every pair, and each once
    assert share == pytest.approx([brute_share(ratings[i], ratings[j]) for i, j in drawn])


def test_H19_shares_of_sliders_need_no_common_levels():
    rng = np.random.default_rng(0)
    ratings = rng.uniform(0, 100, (60, 7)).round(3).tolist()
    assert len({score for scores in ratings for score in scores}) > 400
    a, b, share = preference.pairs_from_ratings(ratings, rng, n=500)
    wanted = [brute_share(ratings[i], ratings[j]) for i, j in zip(a, b, strict=True)]
    assert share == pytest.approx(wanted) and 0 < share.min() < share.max() < 1


def test_pairs_of_single_numbers_and_of_ties():
    means = [0.0, 1.0, 1.0, 3.0]
    a, b, share = preference.pairs_from_ratings(means, np.random.default_rng(0), n=6)
    assert len(share) == 6
    for i, j, s in zip(a, b, share, strict=True):
        assert s == (0.5 if means[i] == means[j] else float(means[i] > means[j]))


def test_pairs_are_drawn_evenly_and_in_random_order():
    rng = np.random.default_rng(0)
    means = [2.0, -1.0, 0.5, 0.0, 3.0, 0.4]
    every = [frozenset((i, j)) for i in range(6) for j in range(i)]
    pair = lambda n: frozenset(x[0] for x in preference.pairs_from_ratings(means, rng, n)[:2])
    drawn, first = ([pair(n) for _ in range(4000)] for n in (1, 15))  # the only one, and the first of all
    for pairs in (drawn, first):
        seen = np.array([pairs.count(pair) for pair in every])
        assert seen.sum() == 4000
        assert np.abs(seen - 4000 / 15).max() < 5 * math.sqrt(4000 / 15)


def test_pairs_of_many_items_are_fast():
    rng = np.random.default_rng(0)
    means = rng.normal(size=20_000)  # 200 million pairs: listing them would take gigabytes
    start = time.process_time()
    a, b, _ = preference.pairs_from_ratings(means, rng, n=50_000)
    assert time.process_time() - start < 3
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 50_000
    assert (a != b).all() and a.max() < 20_000 and b.min() >= 0


def test_pairs_refuse_what_cannot_be_paired():
    rng = np.random.default_rng(0)
    for few_items in ([], [1.0], [[1, 2]]):
        with pytest.raises(UserError, match=r"^ratings: [01] item makes no pair: two are needed$"):
            preference.pairs_from_ratings(few_items, rng, n=5)
    with pytest.raises(UserError, match="^ratings: item 1 has no score: leave it out$"):
        preference.pairs_from_ratings([[1.0], [], [2.0]], rng, n=5)
    with pytest.raises(UserError, match="^ratings: 1 of 2 are not finite"):
        preference.pairs_from_ratings([[1.0], [math.nan, 2.0]], rng, n=5)


# Normalisation


def test_D14_fit_affine_fixture():
    sample = [1.0, 2.0, 3.0, 6.0]
    assert preference.fit_affine(sample) == pytest.approx((0.534522, -1.603567), abs=1e-6)
    assert preference.fit_affine(sample, "bias") == (1.0, -3.0)
    assert preference.fit_affine(sample, "none") == (1.0, 0.0)
    tensor = torch.tensor(sample, requires_grad=True)
    assert preference.fit_affine(tensor) == preference.fit_affine(sample)


@few
@given(seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_D14_fitted_scores_have_mean_0_and_population_std_1(seed, scale, shift):
    x = np.random.default_rng(seed).normal(size=20) * scale + shift
    gain, bias = preference.fit_affine(x)
    assert (gain * x + bias).mean() == pytest.approx(0, abs=1e-6)
    assert (gain * x + bias).std(ddof=0) == pytest.approx(1, abs=1e-6)
    gain, bias = preference.fit_affine(x, "bias")
    assert gain == 1 and (x + bias).mean() == pytest.approx(0, abs=1e-9 * (scale + abs(shift)))


@pytest.mark.parametrize("mode", ["scale", "bias"])
def test_D14_missing_statistics_are_an_error(mode):
    noise = [0.1 + 1e-9 * i for i in range(9)]  # what padding may leave of a constant
    for values in ([], [2.0], [0.1] * 9, [0.0] * 9, noise):
        with pytest.raises(
            UserError, match=f"^scores to normalise: {len(values)} without spread; sample more"
        ):
            preference.fit_affine(values, mode)
    with pytest.raises(UserError, match="^scores to normalise: 1 of 3 are not finite"):
        preference.fit_affine([1.0, 2.0, math.inf], mode)
    with pytest.raises(UserError, match="^score normalisation 'std': unknown; use scale, bias or none$"):
        preference.fit_affine([1.0, 2.0], "std")
