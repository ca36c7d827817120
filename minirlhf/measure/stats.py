"""Measures of scores, of comparisons and of text.  Pure numpy: no model, tokenizer or config.

A degenerate run still has a full table: a correlation with a constant is 0.0, never nan.  What was not
measured at all, such as the accuracy over no pairs, is None.  Scores that are not finite stop with a
UserError.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from minirlhf import UserError

GAP_SLACK = 1e-9  # ratings are means of integers: 2.3 and 1.3 are a point apart, whatever their floats say


def finite(values, name: str) -> np.ndarray:
    """Any sequence of numbers as a flat float64 array; UserError where one is nan or infinite."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if bad := int((~np.isfinite(array)).sum()):
        raise UserError(f"{name}: {bad} of {array.size} are not finite; check the model or data behind them")
    return array


def _both(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = finite(x, "scores"), finite(y, "scores compared with")
    if x.size != y.size:
        raise ValueError(f"{x.size} numbers against {y.size}: one of each per item is needed")
    return x, y


def wilson(wins: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """(low, high) of the rate wins / n: Wilson's score interval [D24].  Ties are half wins; n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    rate, shrink = wins / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(a, b) -> tuple[float, float, float]:
    """(rate, low, high) of a[i] > b[i], a tie counting a half, and its 95 % interval [D24].

    No pairs give (0.5, 0, 1).
    """
    a, b = _both(a, b)
    wins = float((a > b).sum() + 0.5 * (a == b).sum())
    return (wins / a.size if a.size else 0.5, *wilson(wins, a.size))


def bootstrap_interval(values, rng: np.random.Generator, n: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean, from n resamples by PROMPT [D24].  No values give (0, 0).

    `values` is [prompts] or [prompts, samples]: samples of one prompt are not independent, so whole rows are
    drawn.
    """
    array = np.asarray(values, dtype=np.float64)
    rows = finite(array.mean(axis=1) if array.ndim == 2 else array, "bootstrap values")
    if rows.size == 0:
        return 0.0, 0.0
    means = [rows[rng.integers(rows.size, size=rows.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _constant(x: np.ndarray) -> bool:
    """True where x varies by no more than float noise."""
    return x.size < 2 or float(np.ptp(x)) <= 1e-12 * float(np.abs(x).max())


def pearson(x, y) -> float:
    """Linear correlation in -1..1; 0.0 where either is constant or there are fewer than two items."""
    x, y = _both(x, y)
    if _constant(x) or _constant(y):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny numbers would vanish
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def ranks(x) -> np.ndarray:
    """Ranks 1..n; equal numbers share the average of their ranks."""
    _, inverse, counts = np.unique(finite(x, "ranked numbers"), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(x, y) -> float:
    """Rank correlation in -1..1: Pearson's r of the ranks; 0.0 where either is constant."""
    return pearson(ranks(x), ranks(y))


def pair_accuracy(pred, truth, min_gap: float = 0.0) -> float | None:
    """Share of all pairs of items that `pred` orders as `truth` does; None where there is no pair.

    Pairs whose truth is equal, or less than `min_gap` apart, are skipped.  A tie of `pred` counts a half.
    """
    pred, truth = _both(pred, truth)
    order = np.argsort(truth)
    pred, truth = pred[order], truth[order]
    # The partners above item i are a suffix: one slice per item, so memory stays O(n) and a pair is met once.
    gap = min_gap - GAP_SLACK
    first = np.searchsorted(truth, truth + max(gap, 0.0), "left" if gap > 0 else "right")
    rows = ((pred[j:], p) for p, j in zip(pred, first, strict=True))
    hits = sum(np.count_nonzero(above > p) + np.count_nonzero(above >= p) for above, p in rows) / 2
    pairs = int((truth.size - first).sum())
    return float(hits / pairs) if pairs else None


def calibration(pred, truth, bins: int = 10) -> dict:
    """{bins, slope, intercept, rmse}: does a predicted 1.5 mean that people say 1.5?

    `bins` is [(mean pred, mean truth, n)] of groups of equal size, pred rising.  truth ~ slope * pred +
    intercept is the line of least squares: (1, 0) where calibrated, slope 0 where pred is constant.
    """
    pred, truth = _both(pred, truth)
    if pred.size == 0:
        return {"bins": [], "slope": 0.0, "intercept": 0.0, "rmse": 0.0}
    groups = np.array_split(np.argsort(pred, kind="stable"), min(bins, pred.size))
    centred = pred - pred.mean()
    slope = 0.0 if _constant(pred) else float(centred @ truth / (centred @ centred))
    return {
        "bins": [(float(pred[g].mean()), float(truth[g].mean()), len(g)) for g in groups],
        "slope": slope,
        "intercept": float(truth.mean() - slope * pred.mean()),
        "rmse": float(np.sqrt(((pred - truth) ** 2).mean())),
    }


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Unique n-grams / total n-grams over all responses; 0.0 where no response has n elements.

    It falls as the amount of text grows: compare equal amounts.
    """
    # A tensor's elements hash by identity, each one "unique": tensors become lists.
    lists = [s.tolist() if hasattr(s, "tolist") else s for s in sequences]
    grams = [tuple(s[i : i + n]) for s in lists for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
