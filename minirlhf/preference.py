"""Preferences and ratings: the reward model's losses, pairs out of ratings, normalised scores, agreement.

Pure functions: no model, tokenizer or config. B items or pairs, L levels of a rating scale. Sources: losses,
Stiennon et al. 2020 (arXiv 2009.01325); gain and bias, Ziegler et al. 2019 (arXiv 1909.08593) and
openai/lm-human-preferences; alpha, Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011).
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf import UserError
from minirlhf.stats import GAP_SLACK, finite, pair_accuracy, pearson

Ratings = Sequence[Sequence[float]]  # each item's individual scores, in any order, missing ones left out
MAX_LEVELS = 256  # different scores on one scale; a slider of 0..100 has 101


def _mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over (B,), weighted; weights that are all zero give 0, not nan."""
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.float().sum().clamp(min=torch.finfo(torch.float32).tiny)


def pairwise_loss(scores_a: Tensor, scores_b: Tensor, share: Tensor | float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Bradley-Terry cross-entropy in nats, a mean over pairs; all (B,) -> scalar.

    The model says P(a preferred) = sigmoid(d), d = score_a - score_b. `share` is the share of votes for a: 1
    where a was chosen, .5 for a tie. loss = -share log sigmoid(d) - (1 - share) log sigmoid(-d).
    """
    d = scores_a.float() - scores_b.float()
    # [D15] logsigmoid holds at d = +-1e4; with two terms, swapping a pair and its label changes nothing.
    return _mean(-share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d), weight)


def regression_loss(scores: Tensor, ratings: Tensor, kind: str = "mse", weight: Tensor | None = None) -> Tensor:
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
