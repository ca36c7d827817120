"""What raters come to: the mean, the majority, and the fits by EM (minirlhf/feedback/raters.py)."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError
from minirlhf.feedback.raters import combine_raters, fit_ratings, fit_votes, rater_table
from minirlhf.measure import stats

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)

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
        found.append(fit_votes(votes).reliability[: len(reliability)])
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
    there, back = fit_votes(votes), fit_votes(1 - votes)
    assert never_falls(there.trace) and max(there.trace) <= 0
    assert ((there.share >= 0) & (there.share <= 1) & np.isfinite(there.share)).all()
    assert ((there.reliability > 0) & (there.reliability < 1)).all()
    assert back.share == pytest.approx(1 - there.share, abs=1e-6)
    assert back.reliability == pytest.approx(there.reliability, abs=1e-6)
    order = rng.permutation(j)
    assert fit_votes(votes[:, order]).reliability == pytest.approx(there.reliability[order], abs=1e-6)


@pytest.mark.parametrize("reliability", [(0.9, 0.8, 0.1), (0.9, 0.85, 0.8, 0.75, 0.05)])
def test_one_adversary_is_turned_round(reliability):
    for seed in range(10):
        votes, better = draw_votes(np.random.default_rng(seed), np.array(reliability), n=500)
        fit = fit_votes(votes)
        majority, _ = combine_raters(votes, [()] * 500, "majority", votes=True)
        without, _ = combine_raters(votes[:, :-1], [()] * 500, "majority", votes=True)
        assert fit.reliability[-1] < 0.2 < 0.5 < fit.reliability[:-1].min()
        assert np.mean((fit.share > 0.5) == better) > np.mean(majority == better) + 0.02
        assert np.mean(np.abs(fit.share - better) ** 2) < np.mean(
            np.abs(without - better) ** 2
        )  # better than deaf to them


def test_a_tie_is_half_a_vote_each_way():
    fit = fit_votes(np.array([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [1.0, 0.5]]))
    assert fit.share[0] == pytest.approx(0.5) and fit.share[1] == pytest.approx(1 - fit.share[2])
    assert 0.5 < fit.share[3] < fit.share[1]
    assert fit.reliability[1] < fit.reliability[0]  # who ties says less


def test_votes_of_one_rater_and_of_raters_who_agree():
    lone = fit_votes(np.array([[1.0], [0.0]] * 50))
    assert lone.share[:2] == pytest.approx([0.8, 0.2])  # nobody to compare with: what is believed of anyone
    for j in (2, 5):
        fit = fit_votes(np.repeat(draw_votes(np.random.default_rng(0), np.array([1.0]))[0], j, axis=1))
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
        fit = fit_ratings(ratings)
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
    fit, other = fit_ratings(ratings), fit_ratings(10 * ratings + 3)
    for found in (fit.truth, fit.sd, fit.bias, fit.slope, fit.noise, fit.trace):
        assert np.isfinite(found).all()
    assert never_falls(fit.trace)
    assert other.truth == pytest.approx(10 * fit.truth + 3, abs=1e-4)
    assert other.slope == pytest.approx(fit.slope, abs=1e-4)
    assert constant or other.noise == pytest.approx(10 * fit.noise, abs=1e-3)


def test_ratings_of_one_rater_of_agreement_and_of_a_constant_rater():
    truth = np.random.default_rng(0).integers(1, 6, 300).astype(float)
    assert stats.pearson(fit_ratings(truth[:, None]).truth, truth) == pytest.approx(1)
    assert fit_ratings(np.repeat(truth[:, None], 4, axis=1)).truth == pytest.approx(truth, abs=0.02)
    fit = fit_ratings(np.column_stack([truth, truth, np.full(300, 3.0)]))
    assert fit.truth == pytest.approx(truth, abs=0.05) and fit.slope[2] == pytest.approx(0, abs=0.05)
    assert fit_ratings(np.full((5, 3), 2.0)).truth == pytest.approx(np.full(5, 2.0))
    assert fit_ratings(np.full((5, 3), 0.1)).noise.min() > 0.1  # 0.1's own rounding is no variation


def test_fits_of_many_items_are_fast():
    rng = np.random.default_rng(0)
    slope, noise = np.linspace(-1, 1.5, 20), np.linspace(0.3, 1.5, 20)
    ratings, _ = draw_ratings(rng, np.zeros(20), slope, noise, n=10_000)
    votes, _ = draw_votes(rng, np.linspace(0.3, 0.95, 20), n=10_000)
    start = time.process_time()
    fit_ratings(with_holes(rng, ratings, 0.5)), fit_votes(with_holes(rng, votes, 0.5))
    assert time.process_time() - start < 5


def test_combining_takes_names_and_places():
    units, raters = [[1, 3], [2, 4, 9], [5]], [("ann", "bob"), ("bob", "ann", "cy"), ("cy",)]
    who, table = rater_table(units, raters)
    assert who == ["ann", "bob", "cy"] and np.nan_to_num(table, nan=-1).tolist() == [
        [1, 3, -1],
        [4, 2, 9],
        [-1, -1, 5],
    ]
    assert rater_table(units, [()] * 3)[0] == [1, 2, 3]
    for method, wanted in [("mean", [2, 5, 5]), ("majority", [2, 4, 5])]:
        assert combine_raters(units, raters, method)[0].tolist() == wanted
    votes = [[1, 1, 0, 0.5], [0, 1], [0.5, 0]]
    assert combine_raters(votes, [()] * 3, "mean", votes=True)[0].tolist() == [0.625, 0.5, 0.25]
    assert combine_raters(votes, [()] * 3, "majority", votes=True)[0].tolist() == [1, 0.5, 0]
    targets, found = combine_raters(units, raters, "model")
    assert (
        targets.shape == (3,)
        and found.keys() == {"ann", "bob", "cy"}
        and found["cy"].keys() == {"slope", "bias", "noise"}
    )
    assert combine_raters(votes, [()] * 3, "model", votes=True)[1].keys() == {"1", "2", "3", "4"}


def test_fits_refuse_what_is_no_table():
    fits = (fit_votes, "votes"), (fit_ratings, "ratings")
    for fit, what in fits:
        with pytest.raises(UserError, match=f"^{what}: item 1 has none; leave it out$"):
            fit(np.array([[1.0, 0], [np.nan, np.nan]]))
        with pytest.raises(UserError, match=f"^{what}: 1 of 2 are not finite"):
            fit(np.array([[np.inf, 0]]))
        for empty in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
            with pytest.raises(UserError, match=f"^{what}: none; want a table of items x raters$"):
                fit(empty)
    with pytest.raises(UserError, match="^votes: want 1 for the first, 0 for the second, .5 for a tie$"):
        fit_votes(np.array([[1.0, 2.0]]))
    with pytest.raises(UserError, match="^raters 'median': unknown; use mean, majority or model$"):
        combine_raters([[1.0]], [()], "median")
