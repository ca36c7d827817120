"""How far people agree with each other: Krippendorff's alpha, and how well people predict people.

Pure numpy.  `ratings` holds the scores of each item, one per rater, in any order, missing ones left out.
Where no item has two scores there is nothing to compare: the answer is then None, never 0.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from minirlhf import UserError
from minirlhf.measure.stats import finite, pair_accuracy, pearson, ranks

Ratings = Sequence[Sequence[float]]


def krippendorff_alpha(ratings: Ratings, level: str = "interval") -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 is chance, below 0 is worse than chance [D23].

    alpha = 1 - observed / expected disagreement (Krippendorff, "Computing Krippendorff's Alpha-Reliability",
    2011).  Disagreement is the mean distance of two scores: of the same item for the observed one, of any two
    items for the expected one.  `level` says what the distance is: nominal, 1 between different scores;
    ordinal, the squared difference of their ranks; interval, the squared difference.

    Items with fewer than two scores do not count; None where there is no other.  Scores that never vary show
    no reliability: alpha is then 0.
    """
    if level not in ("nominal", "ordinal", "interval"):
        raise UserError(f"level of measurement '{level}': unknown; use nominal, ordinal or interval")
    items = [scores for scores in ratings if len(scores) > 1]
    if not items:
        return None
    sizes = np.array([len(scores) for scores in items])
    scores = finite(np.fromiter(chain.from_iterable(items), dtype=np.float64), "ratings")
    if scores.min() == scores.max():
        return 0.0
    if level == "ordinal":
        scores = ranks(scores)

    item = np.repeat(np.arange(len(items)), sizes)
    observed = _distances(scores, item, level) / (sizes - 1)  # an item of m scores counts m times
    expected = _distances(scores, np.zeros_like(item), level) / (scores.size - 1)
    return float(1 - observed.sum() / expected.sum())


def _distances(scores: np.ndarray, group: np.ndarray, level: str) -> np.ndarray:
    """Distances summed over all ordered pairs of scores of each group 0 .. G - 1: [N], [N] -> [G]."""
    sizes = np.bincount(group)
    if level == "nominal":
        values, kind = np.unique(scores, return_inverse=True)
        cells, counts = np.unique(group * values.size + kind, return_counts=True)
        equal = np.bincount(cells // values.size, weights=counts**2)
        return sizes**2 - equal
    # Over all ordered pairs, (x - y)^2 adds up to 2 m times the sum of squares around the mean.
    means = np.bincount(group, weights=scores) / sizes
    return 2 * sizes * np.bincount(group, weights=(scores - means[group]) ** 2)


def human_ceiling(ratings: Ratings, rng: np.random.Generator) -> dict[str, float | None] | None:
    """How well people predict people; None where fewer than two items have two scores or more.

    `one_*`: ONE rater, drawn at random from each item, against the mean of the others: Pearson's r and pair
    accuracy (over all pairs; `_1`: pairs whose means are a point or more apart, None without any; a rater's
    tie counts a half).  `half_pearson`: half of the raters against the rest.
    """
    one, others, half, rest = [], [], [], []
    for unit in ratings:
        if (k := len(unit)) > 1:
            scores = rng.permutation(np.asarray(unit, dtype=np.float64))
            one.append(scores[0])
            others.append(scores[1:].mean())
            half.append(scores[: k // 2].mean())
            rest.append(scores[k // 2 :].mean())
    if len(one) < 2:
        return None
    return {
        "items": len(one),
        "one_pearson": pearson(one, others),
        "one_pair_accuracy": pair_accuracy(one, others),
        "one_pair_accuracy_1": pair_accuracy(one, others, min_gap=1.0),
        "half_pearson": pearson(half, rest),
    }
