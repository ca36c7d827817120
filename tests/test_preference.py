"""Reward-model losses, pairs from ratings, normalisation and rater agreement (minirlhf/preference.py)."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, preference
from minirlhf.measure import stats

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
@given(a=scores, b=scores, share=st.floats(0, 1, width=32))
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


def test_regression_losses():
    s, r = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.5, -1.0, -1.0])
    assert preference.regression_loss(s, r).item() == pytest.approx((0.25 + 9 + 0) / 3)
    assert preference.regression_loss(s, r, "huber").item() == pytest.approx((0.125 + 2.5 + 0) / 3)
    with pytest.raises(UserError, match="^regression loss 'l1': unknown; use mse or huber$"):
        preference.regression_loss(s, r, "l1")


def test_weights_count_items():
    a, b = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([1.0, 0.0, 0.0])
    weight = torch.tensor(
        [1, 3, 0]
    )  # as if the first were there once, the second three times, the third never
    index = torch.tensor([0, 1, 1, 1])
    for loss in (preference.pairwise_loss, preference.regression_loss):
        assert loss(a, b, weight=weight).item() == pytest.approx(loss(a[index], b[index]).item())
        assert loss(a, b, weight=torch.zeros(3)).item() == 0.0


# Pairs from ratings


def brute_share(x, y):
    return np.mean([(p > q) + 0.5 * (p == q) for p in x for q in y])


@few
@given(seed=seeds, gap=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_D15_shares_are_what_independent_raters_would_vote(seed, gap):
    rng = np.random.default_rng(seed)
    ratings = [rng.integers(-4, 5, rng.integers(1, 7)).tolist() for _ in range(12)]
    means = [np.mean(r) for r in ratings]
    wanted = {(i, j) for i in range(12) for j in range(i) if abs(means[i] - means[j]) >= gap - 1e-9}
    a, b, share = preference.pairs_from_ratings(ratings, rng, n=1000, min_gap=gap)
    assert {(max(i, j), min(i, j)) for i, j in zip(a, b, strict=True)} == wanted  # n > all: every pair ...
    assert len(a) == len(b) == len(share) == len(wanted)  # ... once, and none too close
    assert share == pytest.approx([brute_share(ratings[i], ratings[j]) for i, j in zip(a, b, strict=True)])


def test_pairs_of_means_and_of_ties():
    rng = np.random.default_rng(0)
    means = [0.0, 1.0, 1.0, 3.0]
    a, b, share = preference.pairs_from_ratings(means, rng, n=6)
    assert len(share) == 6
    for i, j, s in zip(a, b, share, strict=True):
        assert s == (0.5 if means[i] == means[j] else float(means[i] > means[j]))
    a, b, share = preference.pairs_from_ratings(
        [1.3, 2.3], rng, n=6, min_gap=1.0
    )  # apart by .9999999999999998
    assert sorted([*a, *b]) == [0, 1]


def test_pairs_are_drawn_evenly():
    rng = np.random.default_rng(0)
    means = [2.0, -1.0, 0.5, 0.0, 3.0, 0.4]
    ordered = [(i, j) for i in range(6) for j in range(6) if abs(means[i] - means[j]) >= 1]
    drawn = [preference.pairs_from_ratings(means, rng, n=1, min_gap=1.0)[:2] for _ in range(4000)]
    seen = [sum((a[0], b[0]) == pair for a, b in drawn) for pair in ordered]
    assert sum(seen) == 4000
    assert np.abs(np.array(seen) - 4000 / len(ordered)).max() < 5 * math.sqrt(4000 / len(ordered))


def test_pairs_of_many_items_are_fast():
    rng = np.random.default_rng(0)
    means = rng.normal(size=20_000)  # 200 million pairs: listing them would take gigabytes
    start = time.process_time()
    a, b, _ = preference.pairs_from_ratings(means, rng, n=50_000, min_gap=0.5)
    assert time.process_time() - start < 2
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 50_000
    assert np.abs(means[a] - means[b]).min() >= 0.5 - 1e-9


def test_pairs_refuse_what_cannot_be_paired():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="^ratings: no two of 3 items are 2 apart; lower the gap$"):
        preference.pairs_from_ratings([0.0, 1.0, 1.5], rng, n=5, min_gap=2.0)
    for few_items in ([], [1.0], [[1, 2]]):
        with pytest.raises(UserError, match="no two of"):
            preference.pairs_from_ratings(few_items, rng, n=5)
    with pytest.raises(UserError, match="^ratings: item 1 has no score; leave it out$"):
        preference.pairs_from_ratings([[1.0], [], [2.0]], rng, n=5)
    with pytest.raises(UserError, match="^ratings: 1 of 3 are not finite"):
        preference.pairs_from_ratings([[1.0], [math.nan, 2.0]], rng, n=5)
    with pytest.raises(UserError, match="^ratings: 300 different scores; round them to 256 at most$"):
        preference.pairs_from_ratings([[i / 7] for i in range(300)], rng, n=5)


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


# Agreement

RATERS = [". . . . . 3 4 1 2 1 1 3 3 . 3", "1 . 2 1 3 3 4 3 . . . . . . .", ". . 2 1 3 4 4 . 2 1 1 3 3 . 4"]
UNITS = [[float(s) for s in unit if s != "."] for unit in zip(*(r.split() for r in RATERS), strict=True)]


@pytest.mark.parametrize(
    "level, alpha", [("nominal", 0.691358), ("ordinal", 0.806721), ("interval", 0.810845)]
)
def test_D23_krippendorff_alpha_fixture(level, alpha):
    assert preference.krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=1e-6)
    lone = [[7.0], [], [-3.0]]  # units of fewer than two scores do not count
    assert preference.krippendorff_alpha(lone + UNITS, level) == pytest.approx(alpha, abs=1e-6)


@few
@given(seed=seeds)
def test_D23_alpha_equals_its_definition_over_pairs(seed):
    """Interval alpha, summed pair by pair: 1 - mean square within units / mean square over all scores."""
    rng = np.random.default_rng(seed)
    units = [rng.integers(0, 5, rng.integers(2, 6)).astype(float) for _ in range(6)]
    everyone = np.concatenate(units)
    n = everyone.size
    within = sum(((u[:, None] - u) ** 2).sum() / (u.size - 1) for u in units) / n
    overall = ((everyone[:, None] - everyone) ** 2).sum() / (n * (n - 1))
    alpha = preference.krippendorff_alpha([u.tolist() for u in units])
    assert alpha == pytest.approx(1 - within / overall if overall else 0.0)


def test_D23_alpha_of_extremes():
    for level in ("nominal", "ordinal", "interval"):
        assert preference.krippendorff_alpha([[1, 1, 1], [4, 4], [2, 2]], level) == 1.0
        assert (
            preference.krippendorff_alpha([[2, 2], [2, 2, 2]], level) == 0.0
        )  # no variation: undefined, so 0
        assert (
            preference.krippendorff_alpha([[1], []], level) == preference.krippendorff_alpha([], level) == 0.0
        )
        assert preference.krippendorff_alpha([[1, 2], [2, 1], [1, 2]], level) < 0  # worse than chance
    with pytest.raises(UserError, match="^level of measurement 'ratio': unknown"):
        preference.krippendorff_alpha(UNITS, "ratio")


def test_D23_alpha_is_fast_on_the_whole_dataset():
    rng = np.random.default_rng(0)
    units = rng.integers(-4, 5, (23_000, 20)).tolist()
    start = time.process_time()
    assert abs(preference.krippendorff_alpha(units)) < 0.01  # raters at random: chance
    assert time.process_time() - start < 3


def test_human_ceiling_of_a_known_population():
    """Truth has variance 4; the noise has 1 in one rater, 1/9 in the mean of nine, 1/5 in that of five."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 2000)
    ratings = (truth[:, None] + rng.normal(0, 1, (2000, 10))).tolist()
    people = preference.human_ceiling([*ratings, [1.0], []], rng)
    assert people["items"] == 2000  # the lone rater has nobody to predict
    assert people["one_pearson"] == pytest.approx(4 / math.sqrt(5 * (4 + 1 / 9)), abs=0.015)
    assert people["half_pearson"] == pytest.approx(4 / (4 + 1 / 5), abs=0.006)
    assert 0.75 < people["one_pair_accuracy"] < people["one_pair_accuracy_1"] < 1


def test_human_ceiling_of_agreement_and_of_ties():
    same = preference.human_ceiling([[s] * 5 for s in (-2.0, 0.0, 1.0)], np.random.default_rng(0))
    assert same == {
        "items": 3,
        "one_pearson": pytest.approx(1),
        "one_pair_accuracy": 1.0,
        "one_pair_accuracy_1": 1.0,
        "half_pearson": pytest.approx(1),
    }
    assert preference.human_ceiling([], np.random.default_rng(0)) == dict.fromkeys(same, 0)


# Raters: who is right, and who can be relied on

TABLES = st.tuples(seeds, st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.8]))


def draw_votes(rng, reliability, n=300):
    """(votes (n, J), the better side (n,)): each pair is better on either side by chance."""
    better = rng.random(n) < 0.5
    right = rng.random((n, len(reliability))) < reliability
    return np.where(right, better[:, None], ~better[:, None]).astype(float), better


def with_holes(rng, table, missing):
    """Some entries become nan, but each row keeps one."""
    holes = rng.random(table.shape) < missing
    holes[np.arange(len(table)), rng.integers(table.shape[1], size=len(table))] = False
    return np.where(holes, np.nan, table)


def never_falls(trace):
    return np.diff(trace).min(initial=0) >= -1e-9 * (1 + abs(trace[0]))


def errors(reliability, seeds_of=40, key=0):
    """(estimate - truth (seeds, J), share of seeds in the right order) from 300 pairs; the first `key` pairs have a known
    answer, entered as one more rater."""
    found = []
    for seed in range(seeds_of):
        votes, better = draw_votes(np.random.default_rng(seed), reliability)
        known = np.where(np.arange(300) < key, better, np.nan)
        votes = np.column_stack([votes, known]) if key else votes
        found.append(preference.fit_choices(votes).reliability[: len(reliability)])
    found = np.array(found)
    return found - reliability, np.mean([found[:, i] > found[:, i + 1] for i in range(2)], axis=1).min()


@pytest.mark.parametrize("others, key", [([0.95, 0.8, 0.5], 0), ([0.95], 0), ([], 60)])
def test_reliabilities_are_recovered_from_300_pairs(others, key):
    """Mean error below .05 for each rater, at the floor: with every answer known, the standard error is sqrt(p q / 300),
    .013, .023 and .029, so that 8 % of estimates of the last are further off than .05."""
    error, in_order = errors(np.array([0.95, 0.8, 0.5, *others]), key=key)
    assert np.abs(error).mean(axis=0).max() < 0.03 and np.abs(error.mean(axis=0)).max() < 0.015
    assert (np.abs(error[:, :3]) <= 0.05).mean() > 0.85 and in_order >= 0.95
    spread = error.std(axis=0)[:3] / np.sqrt(np.array([0.95 * 0.05, 0.8 * 0.2, 0.25]) / 300)
    assert spread.max() < (1.4 if others else 2.0)  # of what knowing every answer would give


def test_three_raters_one_of_them_at_chance_leave_two_reliabilities_undetermined():
    """Agreements are all there is: of r and s they give (2 p_r - 1)(2 p_s - 1). With (.95, .8, .5) two of the three are 0
    and any p_1, p_2 with the product .54 fit as well: no method can tell the two apart."""
    chance = lambda p: (
        lambda w: np.log(
            (w * p + (1 - w) * (1 - p)).prod(axis=1) / 2 + (w * (1 - p) + (1 - w) * p).prod(axis=1) / 2
        )
    )
    votes = np.array([[i >> j & 1 for j in range(3)] for i in range(8)], dtype=float)
    same = [chance(np.array([(1 + a) / 2, (1 + 0.54 / a) / 2, 0.5]))(votes) for a in (0.9, 0.735, 0.6)]
    assert same[1] == pytest.approx(same[0]) and same[2] == pytest.approx(same[0])
    error, in_order = errors(np.array([0.95, 0.8, 0.5]))
    p = error + [0.95, 0.8, 0.5]
    assert np.mean((2 * p[:, 0] - 1) * (2 * p[:, 1] - 1)) == pytest.approx(0.54, abs=0.03)
    assert np.abs(error[:, 2]).mean() < 0.05 and 0.2 < in_order < 0.8  # a coin toss, as it has to be


@few
@given(TABLES)
def test_fitted_votes_climb_and_do_not_care_which_text_comes_first(drawn):
    seed, n, j, missing = drawn
    rng = np.random.default_rng(seed)
    votes = with_holes(rng, rng.choice([0.0, 0.5, 1.0], size=(n, j)), missing)
    there, back = preference.fit_choices(votes), preference.fit_choices(1 - votes)
    assert never_falls(there.trace) and max(there.trace) <= 0
    assert ((there.share >= 0) & (there.share <= 1) & np.isfinite(there.share)).all()
    assert ((there.reliability > 0) & (there.reliability < 1)).all()
    assert back.share == pytest.approx(1 - there.share, abs=1e-6)
    assert back.reliability == pytest.approx(there.reliability, abs=1e-6)
    order = rng.permutation(j)
    assert preference.fit_choices(votes[:, order]).reliability == pytest.approx(
        there.reliability[order], abs=1e-6
    )


@pytest.mark.parametrize("reliability", [(0.9, 0.8, 0.1), (0.9, 0.85, 0.8, 0.75, 0.05)])
def test_one_adversary_is_turned_round(reliability):
    for seed in range(10):
        votes, better = draw_votes(np.random.default_rng(seed), np.array(reliability), n=500)
        fit = preference.fit_choices(votes)
        majority, _ = preference.settle(votes, [()] * 500, "majority", choices=True)
        without, _ = preference.settle(votes[:, :-1], [()] * 500, "majority", choices=True)
        assert fit.reliability[-1] < 0.2 < 0.5 < fit.reliability[:-1].min()
        assert np.mean((fit.share > 0.5) == better) > np.mean(majority == better) + 0.02
        assert np.mean(np.abs(fit.share - better) ** 2) < np.mean(
            np.abs(without - better) ** 2
        )  # better than deaf to them


def test_a_tie_is_half_a_vote_each_way():
    fit = preference.fit_choices(np.array([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [1.0, 0.5]]))
    assert fit.share[0] == pytest.approx(0.5) and fit.share[1] == pytest.approx(1 - fit.share[2])
    assert 0.5 < fit.share[3] < fit.share[1]
    assert fit.reliability[1] < fit.reliability[0]  # who ties says less


def test_votes_of_one_rater_and_of_raters_who_agree():
    lone = preference.fit_choices(np.array([[1.0], [0.0]] * 50))
    assert lone.share[:2] == pytest.approx([0.8, 0.2])  # nobody to compare with: what is believed of anyone
    for j in (2, 5):
        fit = preference.fit_choices(
            np.repeat(draw_votes(np.random.default_rng(0), np.array([1.0]))[0], j, axis=1)
        )
        assert fit.reliability.min() > 0.97 and np.abs(fit.share - 0.5).min() > 0.49


def draw_ratings(rng, bias, slope, noise, n=300):
    truth = rng.normal(0.5, 1.5, n)
    return bias + slope * truth[:, None] + noise * rng.normal(size=(n, len(bias))), truth


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_bias_slope_noise_and_truth_are_recovered(missing):
    bias, slope = np.array([0.5, -0.5, 0, 0, 0, 0, 0, 0]), np.array([1, 1, 1.3, 0.7, 1, 1, -1, 0])
    noise = np.array([0.6, 0.6, 0.6, 0.6, 0.3, 1.2, 0.6, 1.5])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ratings, truth = draw_ratings(rng, bias, slope, noise, n=1000)
        ratings = with_holes(rng, ratings, missing)
        fit = preference.fit_scores(ratings)
        assert fit.slope == pytest.approx(slope, abs=0.15) and fit.bias == pytest.approx(bias, abs=0.25)
        assert fit.noise == pytest.approx(noise, abs=0.15) and never_falls(fit.trace)
        wrong = (fit.truth - truth)[np.isfinite(ratings).sum(axis=1) > 1]
        assert wrong.std() == pytest.approx(
            np.sqrt(np.mean(fit.sd**2)), rel=0.15
        )  # the sd says how far off the truth is
        assert (
            np.corrcoef(fit.truth, truth)[0, 1] > np.corrcoef(np.nanmean(ratings, axis=1), truth)[0, 1] + 0.02
        )


@few
@given(TABLES)
def test_fitted_ratings_climb_and_follow_the_scale(drawn):
    """Ratings on another scale (10 r + 3) give the same truth on it; whatever was rated, everything stays finite."""
    seed, n, j, missing = drawn
    rng = np.random.default_rng(seed)
    ratings = with_holes(rng, rng.integers(-2, 3, (n, j)).astype(float), missing)
    constant = np.nanmax(ratings) == np.nanmin(ratings)  # then there is no unit
    fit, other = preference.fit_scores(ratings), preference.fit_scores(10 * ratings + 3)
    for found in (fit.truth, fit.sd, fit.bias, fit.slope, fit.noise, fit.trace):
        assert np.isfinite(found).all()
    assert never_falls(fit.trace)
    assert other.truth == pytest.approx(10 * fit.truth + 3, abs=1e-4)
    assert other.slope == pytest.approx(fit.slope, abs=1e-4)
    assert constant or other.noise == pytest.approx(10 * fit.noise, abs=1e-3)


def test_ratings_of_one_rater_of_agreement_and_of_a_constant_rater():
    truth = np.random.default_rng(0).integers(1, 6, 300).astype(float)
    assert stats.pearson(preference.fit_scores(truth[:, None]).truth, truth) == pytest.approx(1)
    assert preference.fit_scores(np.repeat(truth[:, None], 4, axis=1)).truth == pytest.approx(truth, abs=0.02)
    fit = preference.fit_scores(np.column_stack([truth, truth, np.full(300, 3.0)]))
    assert fit.truth == pytest.approx(truth, abs=0.05) and fit.slope[2] == pytest.approx(0, abs=0.05)
    assert preference.fit_scores(np.full((5, 3), 2.0)).truth == pytest.approx(np.full(5, 2.0))
    assert preference.fit_scores(np.full((5, 3), 0.1)).noise.min() > 0.1  # 0.1's own rounding is no variation


def test_fits_of_many_items_are_fast():
    rng = np.random.default_rng(0)
    slope, noise = np.linspace(-1, 1.5, 20), np.linspace(0.3, 1.5, 20)
    ratings, _ = draw_ratings(rng, np.zeros(20), slope, noise, n=10_000)
    votes, _ = draw_votes(rng, np.linspace(0.3, 0.95, 20), n=10_000)
    start = time.process_time()
    preference.fit_scores(with_holes(rng, ratings, 0.5)), preference.fit_choices(with_holes(rng, votes, 0.5))
    assert time.process_time() - start < 5


def test_settle_takes_names_and_places():
    units, raters = [[1, 3], [2, 4, 9], [5]], [("ann", "bob"), ("bob", "ann", "cy"), ("cy",)]
    who, table = preference.rater_table(units, raters)
    assert who == ["ann", "bob", "cy"] and np.nan_to_num(table, nan=-1).tolist() == [
        [1, 3, -1],
        [4, 2, 9],
        [-1, -1, 5],
    ]
    assert preference.rater_table(units, [()] * 3)[0] == [1, 2, 3]
    for how, choices, wanted in [("mean", False, [2, 5, 5]), ("majority", False, [2, 4, 5])]:
        assert preference.settle(units, raters, how, choices)[0].tolist() == wanted
    votes = [[1, 1, 0, 0.5], [0, 1], [0.5, 0]]
    assert preference.settle(votes, [()] * 3, "mean", choices=True)[0].tolist() == [0.625, 0.5, 0.25]
    assert preference.settle(votes, [()] * 3, "majority", choices=True)[0].tolist() == [1, 0.5, 0]
    targets, found = preference.settle(units, raters, "model")
    assert (
        targets.shape == (3,)
        and found.keys() == {"ann", "bob", "cy"}
        and found["cy"].keys() == {"slope", "bias", "noise"}
    )
    assert preference.settle(votes, [()] * 3, "model", choices=True)[1].keys() == {"1", "2", "3", "4"}


def test_fits_refuse_what_is_no_table():
    fits = (preference.fit_choices, "votes"), (preference.fit_scores, "ratings")
    for fit, what in fits:
        with pytest.raises(UserError, match=f"^{what}: item 1 has none; leave it out$"):
            fit(np.array([[1.0, 0], [np.nan, np.nan]]))
        with pytest.raises(UserError, match=f"^{what}: 1 of 2 are not finite"):
            fit(np.array([[np.inf, 0]]))
        for empty in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
            with pytest.raises(UserError, match=f"^{what}: none; want a table of items x raters$"):
                fit(empty)
    with pytest.raises(UserError, match="^votes: want 1 for the first, 0 for the second, .5 for a tie$"):
        preference.fit_choices(np.array([[1.0, 2.0]]))
    with pytest.raises(UserError, match="^raters 'median': unknown; use mean, majority or model$"):
        preference.settle([[1.0]], [()], "median")
