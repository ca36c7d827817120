"""Preferences and ratings: the reward model's losses, pairs out of ratings, normalised scores, agreement, raters.

Pure functions: no model, tokenizer or config. B items or pairs, L levels of a rating scale, J raters. Sources: losses,
Stiennon et al. 2020 (arXiv 2009.01325); gain and bias, Ziegler et al. 2019 (arXiv 1909.08593) and
openai/lm-human-preferences; alpha, Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011); reliabilities
by EM, Dawid & Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm" (1979).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf import UserError
from minirlhf.measure.stats import GAP_SLACK, finite, pair_accuracy, pearson

Ratings = Sequence[Sequence[float]]  # each item's individual scores, in any order, missing ones left out
MAX_LEVELS = 256  # different scores on one scale; a slider of 0..100 has 101
# What is believed of a rater unseen, in imagined votes and ratings: a handful, which thirty real ones outweigh.
RIGHT, WRONG = (
    4.0,
    1.0,
)  # votes: four in five name the better text; researchers agree about as often (Stiennon et al.)
ORDINARY, NOISE = 4.0, 0.5  # ratings without bias, of slope 1, half of whose variance is noise
TOLERANCE, MAX_STEPS = 1e-7, 5000  # EM ends when a step gains less, in nats an item


def _mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over (B,), weighted; weights that are all zero give 0, not nan."""
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.float().sum().clamp(min=torch.finfo(torch.float32).tiny)


def pairwise_loss(
    scores_a: Tensor, scores_b: Tensor, share: Tensor | float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Bradley-Terry cross-entropy in nats, a mean over pairs; all (B,) -> scalar.

    The model says P(a preferred) = sigmoid(d), d = score_a - score_b. `share` is the share of votes for a: 1
    where a was chosen, .5 for a tie. loss = -share log sigmoid(d) - (1 - share) log sigmoid(-d).
    """
    d = scores_a.float() - scores_b.float()
    # [D15] logsigmoid holds at d = +-1e4; with two terms, swapping a pair and its label changes nothing.
    return _mean(-share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d), weight)


def regression_loss(
    scores: Tensor, ratings: Tensor, kind: str = "mse", weight: Tensor | None = None
) -> Tensor:
    """Mean over (B,) of d^2 ('mse') or of Huber's d^2/2 up to 1 point and |d| - 1/2 beyond ('huber')."""
    losses = {"mse": F.mse_loss, "huber": F.huber_loss}
    if kind not in losses:
        raise UserError(f"regression loss '{kind}': unknown; use mse or huber")
    return _mean(losses[kind](scores.float(), ratings.float(), reduction="none"), weight)


def _counts(units: Ratings) -> tuple[np.ndarray, np.ndarray]:
    """(levels (L,) rising, counts (B, L)): how many raters gave each item each score."""
    flat = finite(np.fromiter(chain.from_iterable(units), dtype=np.float64), "ratings")
    levels, index = np.unique(flat, return_inverse=True)
    if levels.size > MAX_LEVELS:
        raise UserError(f"ratings: {levels.size} different scores; round them to {MAX_LEVELS} at most")
    row = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    counts = np.bincount(row * levels.size + index, minlength=len(units) * levels.size)
    return levels, counts.reshape(len(units), levels.size).astype(np.float64)


def pairs_from_ratings(
    ratings: Ratings | Sequence[float], rng: np.random.Generator, n: int, min_gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n different pairs (all there are, if fewer) as (index a, index b, share), each (n,), in random order.

    Drawn evenly from the pairs whose means are at least `min_gap` apart, without listing them all. [D15]
    share = P(a rater of a scores higher than a rater of b) + P(equal) / 2, the two independent: a soft target
    for pairwise_loss. `ratings` holds each item's scores, or its mean alone (then share is 0, .5 or 1).
    """
    if lists := bool(len(ratings) and np.ndim(ratings[0])):
        levels, counts = _counts(ratings)
        raters = counts.sum(axis=1, keepdims=True)
        if not raters.all():
            raise UserError(f"ratings: item {int(raters.argmin())} has no score; leave it out")
        votes = counts / raters
        means = votes @ levels
    else:
        means = finite(ratings, "ratings")
    order = np.argsort(means)
    ranked = means[order]
    # In this order item i may be paired with the first partners[i] items: number these pairs, draw, look up.
    partners = np.searchsorted(ranked, ranked - min_gap + GAP_SLACK, side="right")
    partners = np.minimum(partners, np.arange(ranked.size))
    ends = np.cumsum(partners)
    total = int(partners.sum())
    if total == 0:
        raise UserError(f"ratings: no two of {means.size} items are {min_gap:g} apart; lower the gap")
    drawn = rng.choice(total, size=min(n, total), replace=False)
    high = np.searchsorted(ends, drawn, side="right")
    low = drawn - (ends[high] - partners[high])
    swap = rng.random(drawn.size) < 0.5  # else a would always be the better one
    a, b = order[np.where(swap, low, high)], order[np.where(swap, high, low)]
    if not lists:
        return a, b, (1 + np.sign(means[a] - means[b])) / 2
    below = np.cumsum(votes, axis=1) - votes / 2  # P(score < level) + P(score = level) / 2
    return a, b, np.einsum("nl,nl->n", votes[a], below[b])


def fit_affine(scores: Tensor | Sequence[float], mode: str = "scale") -> tuple[float, float]:
    """(gain, bias): over samples of the REFERENCE policy, gain * score + bias has mean 0, population std 1.

    'scale' is for models of choices, whose scale is arbitrary; 'bias' (gain 1) is for models of ratings,
    where a point stays a point; 'none' gives (1, 0). Fewer than two scores, or scores that do not vary, are a
    UserError: a silent no-op would hand PPO rewards of unknown scale.
    """
    if mode not in ("scale", "bias", "none"):
        raise UserError(f"score normalisation '{mode}': unknown; use scale, bias or none")
    if mode == "none":
        return 1.0, 0.0
    values = scores.detach().double().cpu() if isinstance(scores, Tensor) else scores
    values = finite(values, "scores to normalise")
    if values.size < 2 or values.std() <= 1e-6 * np.abs(values).max():
        raise UserError(f"scores to normalise: {values.size} without spread; sample more, or choose 'none'")
    gain = 1 / float(values.std()) if mode == "scale" else 1.0
    return gain, -float(values.mean()) * gain  # [D14]


def krippendorff_alpha(units: Ratings, level: str = "interval") -> float:
    """Krippendorff's alpha of units, each the scores of one item: 1 full agreement, 0 chance, below 0 worse.

    alpha = 1 - observed / expected disagreement; `level` (nominal, ordinal, interval) says how far apart two
    scores are. Units with fewer than two scores do not count. Without variation alpha is undefined and given
    as 0.0: scores that never differ show no reliability.
    """
    if level not in ("nominal", "ordinal", "interval"):
        raise UserError(f"level of measurement '{level}': unknown; use nominal, ordinal or interval")
    levels, counts = _counts([unit for unit in units if len(unit) > 1])
    # [D23] Coincidences: ordered pairs of scores within a unit of m, weighted 1 / (m - 1).
    shares = counts / (counts.sum(axis=1, keepdims=True) - 1)
    observed = counts.T @ shares - np.diag(shares.sum(axis=0))  # (L, L)
    totals = observed.sum(axis=1)  # (L,) how many scores of each level
    # Ordinal: two levels are as far apart as there are scores between their middles.
    place = np.cumsum(totals) - totals / 2 if level == "ordinal" else levels
    distance = np.subtract.outer(place, place) ** 2
    if level == "nominal":
        distance = 1 - np.eye(levels.size)
    expected = (np.outer(totals, totals) * distance).sum() / max(totals.sum() - 1, 1)
    return float(1 - (observed * distance).sum() / expected) if expected > 0 else 0.0


def human_ceiling(ratings: Ratings, rng: np.random.Generator) -> dict[str, float]:
    """How well people predict people, raters drawn at random from each item with two scores or more.

    `one_*`: ONE rater against the mean of the others, Pearson's r and pair accuracy (all pairs; `_1`: pairs
    whose means are a point or more apart; the rater's ties count a half). `half_pearson`: half the raters
    against the rest.
    """
    one, others, half, rest = [], [], [], []
    for unit in ratings:
        if (k := len(unit)) > 1:
            scores = rng.permutation(np.asarray(unit, dtype=np.float64))
            one.append(scores[0])
            others.append(scores[1:].mean())
            half.append(scores[: k // 2].mean())
            rest.append(scores[k // 2 :].mean())
    return {
        "items": len(one),
        "one_pearson": pearson(one, others),
        "one_pair_accuracy": pair_accuracy(one, others),
        "one_pair_accuracy_1": pair_accuracy(one, others, min_gap=1.0),
        "half_pearson": pearson(half, rest),
    }


@dataclass(frozen=True)
class Choices:
    """What `fit_choices` found."""

    share: np.ndarray  # (B,) P(the first is the better one | all votes)
    reliability: np.ndarray  # (J,) P(a vote names the better one): .5 chance, below it an adversary
    trace: list[float]  # log-posterior, a step


@dataclass(frozen=True)
class Scores:
    """What `fit_scores` found: rating = bias + slope * truth + noise, on the raters' own scale."""

    truth: (
        np.ndarray
    )  # (B,) posterior mean: the fewer and the noisier an item's raters, the nearer to the average
    sd: np.ndarray  # (B,) of the truth, were the raters known exactly
    bias: np.ndarray  # (J,)
    slope: np.ndarray  # (J,) 1 like the others, 0 without regard to the text, below 0 upside down
    noise: np.ndarray  # (J,) standard deviation
    trace: list[float]


def rater_table(units: Ratings, raters: Sequence[Sequence[Hashable]]) -> tuple[list[Hashable], np.ndarray]:
    """(who (J,), table (B, J), nan where a rater was not asked). raters[i] names those of units[i]; empty: the
    places in the list are people, 1, 2, ..."""
    names = [who or range(1, len(unit) + 1) for unit, who in zip(units, raters, strict=True)]
    column = {name: j for j, name in enumerate(dict.fromkeys(chain.from_iterable(names)))}
    table = np.full((len(units), len(column)), np.nan)
    rows = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    columns = np.fromiter((column[name] for name in chain.from_iterable(names)), dtype=np.int64)
    table[rows, columns] = np.fromiter(chain.from_iterable(units), dtype=np.float64)
    return list(column), table


def _known(table: np.ndarray, what: str) -> np.ndarray:
    """Where a (B, J) table has numbers; UserError for infinite ones, and for an item or a table without any."""
    if table.ndim != 2 or not table.size:
        raise UserError(f"{what}: none; want a table of items x raters")
    known = ~np.isnan(table)
    finite(table[known], what)
    if not known.any(axis=1).all():
        raise UserError(f"{what}: item {int(known.any(axis=1).argmin())} has none; leave it out")
    return known


def _converged(trace: list[float], items: int) -> bool:
    return len(trace) > MAX_STEPS or len(trace) > 1 and trace[-1] - trace[-2] <= TOLERANCE * items


def fit_choices(votes: np.ndarray) -> Choices:
    """Who is right, and who can be relied on, from votes alone: (B, J), 1 for the first text of a pair, 0 for the
    second, .5 a tie (half a vote each way), nan not asked.

    Each pair has a better text, either with probability 1/2, and rater j names it with probability p_j: the model
    of Dawid & Skene for two classes, one p for both, since which text is the first is chance. EM climbs from equal
    p_j, so the majority settles which way round everyone is. logit(share) = sum of +-logit(p_j): a Bradley-Terry
    margin in which each vote weighs what its rater is worth, and an adversary's counts for the other side.

    Of THREE raters, one of them at chance (p = .5), nothing tells the other two apart: their votes determine only
    (2 p_1 - 1)(2 p_2 - 1). A fourth, or a key of a few known answers entered as one more rater, does.
    """
    known = _known(votes, "votes")
    if ((votes < 0) | (votes > 1)).any():
        raise UserError("votes: want 1 for the first, 0 for the second, .5 for a tie")
    first, second = np.where(known, votes, 0), np.where(known, 1 - votes, 0)  # (B, J) what went to each
    p, trace = np.full(votes.shape[1], RIGHT / (RIGHT + WRONG)), []
    while True:
        right, wrong = np.log(p), np.log1p(-p)
        log_first, log_second = first @ right + second @ wrong, first @ wrong + second @ right  # (B,)
        evidence = np.logaddexp(log_first, log_second)
        share = np.exp(log_first - evidence)
        trace.append(
            float(evidence.sum() - len(votes) * math.log(2) + RIGHT * right.sum() + WRONG * wrong.sum())
        )
        if _converged(trace, len(votes)):
            return Choices(share, p, trace)
        p = (share @ first + (1 - share) @ second + RIGHT) / (known.sum(axis=0) + RIGHT + WRONG)


def fit_scores(ratings: np.ndarray) -> Scores:
    """Each item's truth, and each rater's bias, slope and noise, from ratings alone: (B, J), nan not asked.

    rating_ij = bias_j + slope_j * truth_i + N(0, noise_j^2), truth ~ N: one factor, by EM. It starts from the mean
    of the raters; one who inverts the scale ends with a negative slope and is turned round, one who does not read
    the texts with slope 0 and no weight. The truth is then put on the scale of those who measure it: the mean bias
    and slope, weighted by (slope / noise)^2, become 0 and 1.
    """
    known = _known(ratings, "ratings")
    centre, unit = ratings[known].mean(), ratings[known].std()
    unit = unit if unit > 1e-9 * np.abs(ratings[known]).max() else 1.0  # nobody ever gave another score
    y, w = np.where(known, (ratings - centre) / unit, 0.0), known.astype(np.float64)
    total, squares, n = y.sum(axis=0), y**2, w.sum(axis=0)
    bias, slope, var, trace = np.zeros(len(n)), np.ones(len(n)), np.full(len(n), NOISE), []
    while True:
        # E: the truth of each item given the raters, N(m, v).
        v = 1 / (1 + w @ (slope**2 / var))
        m = v * (y @ (slope / var) - w @ (bias * slope / var))
        misfit = squares @ (1 / var) - y @ (2 * bias / var) + w @ (bias**2 / var + np.log(2 * math.pi * var))
        prior = ORDINARY * (np.log(var) + (bias**2 + (slope - 1) ** 2 + NOISE) / var)
        trace.append(-float((misfit - m**2 / v - np.log(v)).sum() + prior.sum()) / 2)
        if _converged(trace, len(y)):
            break
        # M: least squares of each rater's y on (1, truth), the imagined ratings counted in.
        one, x, xx, xy = n + ORDINARY, m @ w, (m**2 + v) @ w + ORDINARY, m @ y + ORDINARY
        bias, slope = np.stack([xx * total - x * xy, one * xy - x * total]) / (one * xx - x**2)
        var = (squares.sum(axis=0) + ORDINARY * (1 + NOISE) - bias * total - slope * xy) / one
    weight = n * np.maximum(slope, 0) ** 2 / var
    shift, gain = weight @ np.stack([bias, slope], axis=1) / weight.sum()
    slope = slope / gain
    bias = centre + unit * bias - slope * (centre + unit * shift)
    return Scores(
        centre + unit * (shift + gain * m), unit * gain * np.sqrt(v), bias, slope, unit * np.sqrt(var), trace
    )


def settle(
    units: Ratings, raters: Sequence[Sequence[Hashable]], how: str = "mean", choices: bool = False
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """(one target an item (B,), {rater: what was found}) of units, each the ratings, or (`choices`) votes, of an item.

    mean: the mean rating, the share of the votes. majority: the median rating, the side with more votes (.5 if
    equal). model: `fit_scores` or `fit_choices`; only this asks who the `raters` are, as rater_table takes them.
    """
    if how not in ("mean", "majority", "model"):
        raise UserError(f"raters '{how}': unknown; use mean, majority or model")
    if how != "model":
        middles = np.array([np.median(u) if how == "majority" and not choices else np.mean(u) for u in units])
        return (1 + np.sign(middles - 0.5)) / 2 if how == "majority" and choices else middles, {}
    who, table = rater_table(units, raters)
    fit = fit_choices(table) if choices else fit_scores(table)
    names = ["reliability"] if choices else ["slope", "bias", "noise"]
    found = {str(name): {k: float(getattr(fit, k)[j]) for k in names} for j, name in enumerate(who)}
    return fit.share if choices else fit.truth, found
