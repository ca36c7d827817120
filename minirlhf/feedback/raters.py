"""One target per item out of several raters: the mean, the majority, or a fit that also weighs the raters.

    targets, raters = combine_raters(ratings, names, method="model")

Pure numpy.  B items, J raters.  The fits are by EM, after Dawid & Skene, "Maximum Likelihood Estimation of
Observer Error-Rates Using the EM Algorithm" (1979): they estimate each item's truth and each rater's
reliability together, from the answers alone.  A few imagined answers per rater (below) keep raters with few
answers near the ordinary.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from minirlhf import UserError
from minirlhf.measure.stats import finite

# Imagined votes per rater: four of five name the better text.  Researchers agree with each other about as
# often (Stiennon et al. 2020).  Thirty real votes outweigh them.
RIGHT, WRONG = 4.0, 1.0
# Imagined ratings per rater: without bias, of slope 1, half of their variance noise.
ORDINARY, NOISE = 4.0, 0.5
TOLERANCE, MAX_STEPS = 1e-7, 5000  # EM ends when a step gains less than this, in nats per item


@dataclass(frozen=True)
class VoteFit:
    """What `fit_votes` found."""

    share: np.ndarray  # [B] P(the first text is the better one | all votes)
    reliability: np.ndarray  # [J] P(a vote names the better text): 0.5 is chance, below it an adversary
    trace: list[float]  # log-posterior after each step


@dataclass(frozen=True)
class RatingFit:
    """What `fit_ratings` found: rating = bias + slope * truth + noise, on the raters' own scale."""

    truth: np.ndarray  # [B] posterior mean: the fewer and noisier an item's raters, the nearer to the average
    sd: np.ndarray  # [B] standard deviation of the truth, if the raters were known exactly
    bias: np.ndarray  # [J]
    slope: np.ndarray  # [J] 1 like the others, 0 without regard to the text, below 0 with the scale inverted
    noise: np.ndarray  # [J] standard deviation
    trace: list[float]  # log-posterior after each step


def with_targets(records: list, method: str) -> tuple[list, dict[str, dict[str, float]]]:
    """(the records with `method`'s target as their rating or share, what it found of each rater).

    'mean' returns the records as they are: all ratings stay, and pairs made of them are soft targets.
    Raises UserError where the method needs to know who voted and the data does not say.
    """
    if method == "mean":
        return records, {}
    votes = hasattr(records[0], "share")
    if votes and method == "model" and not all(record.votes for record in records):
        bare = next(record for record in records if not record.votes)
        raise UserError(
            f"--raters model needs votes by rater ({{rater: a, b or tie}}), and the pair "
            f"{bare.chosen[:30]!r} has none: use --raters mean or majority"
        )
    units = [record.votes or (record.share,) if votes else record.ratings for record in records]
    targets, found = combine_raters(units, [record.raters for record in records], method, votes)
    field = "share" if votes else "rating"
    return [replace(record, **{field: t}) for record, t in zip(records, targets.tolist(), strict=True)], found


def describe_weakest(found: dict[str, dict[str, float]], count: int = 5) -> str:
    """One line on the raters whose reliability (or slope) is lowest."""
    weakest = sorted(found.items(), key=lambda rater: next(iter(rater[1].values())))[:count]
    lines = [f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in what.items()) for name, what in weakest]
    return f"weakest of {len(found)} raters: " + "; ".join(lines)


def combine_raters(
    units: Sequence[Sequence[float]],
    raters: Sequence[Sequence[Hashable]],
    method: str = "mean",
    votes: bool = False,
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """One target per item, [B], and {rater: what was found of them}; the second is empty but for 'model'.

    units[i] holds the ratings of item i, or with `votes` its votes: 1 for the first text, 0 for the second,
    0.5 for a tie.  raters[i] names who gave them, as rater_table takes it; only 'model' reads it.

    'mean': the mean rating; the share of the votes.  'majority': the median rating; the side with more votes,
    0.5 if equal.  'model': the truth that fit_ratings or fit_votes finds.
    """
    if method not in ("mean", "majority", "model"):
        raise UserError(f"raters '{method}': unknown; use mean, majority or model")
    if method == "mean" or (method == "majority" and votes):
        means = np.array([np.mean(unit) for unit in units])
        return (means if method == "mean" else (1 + np.sign(means - 0.5)) / 2), {}
    if method == "majority":
        return np.array([np.median(unit) for unit in units]), {}

    names, table = rater_table(units, raters)
    fit = fit_votes(table) if votes else fit_ratings(table)
    fields = ["reliability"] if votes else ["slope", "bias", "noise"]
    found = {}
    for j, name in enumerate(names):
        found[str(name)] = {field: float(getattr(fit, field)[j]) for field in fields}
    return (fit.share if votes else fit.truth), found


def rater_table(
    units: Sequence[Sequence[float]], raters: Sequence[Sequence[Hashable]]
) -> tuple[list[Hashable], np.ndarray]:
    """(names [J], table [B, J] of answers, nan where a rater was not asked).

    raters[i] names those who answered units[i].  Where it is empty, the places in the list are taken for
    people: 1, 2, ...
    """
    names = [given or range(1, len(unit) + 1) for unit, given in zip(units, raters, strict=True)]
    column = {name: j for j, name in enumerate(dict.fromkeys(chain.from_iterable(names)))}
    table = np.full((len(units), len(column)), np.nan)
    rows = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    columns = np.fromiter((column[name] for name in chain.from_iterable(names)), dtype=np.int64)
    table[rows, columns] = np.fromiter(chain.from_iterable(units), dtype=np.float64)
    return list(column), table


def fit_votes(votes: np.ndarray) -> VoteFit:
    """Which text of each pair is better, and how often each rater is right, from votes [B, J].

    A vote is 1 for the first text of a pair, 0 for the second, 0.5 for a tie (half a vote each way), nan
    where a rater was not asked.

    Each pair has a better text, either one with probability 1/2, and rater j names it with probability p_j:
    Dawid & Skene's model for two classes, with one p for both, since chance decides which text is the first.
    EM starts from equal p_j, so the majority decides which way round everyone is.  logit(share) is the sum of
    +-logit(p_j): a Bradley-Terry margin in which each vote weighs what its rater is worth, and an adversary's
    counts for the other side.

    Of THREE raters, one of them at chance (p = 0.5), nothing tells the other two apart: the votes determine
    only (2 p_1 - 1)(2 p_2 - 1).  A fourth rater does, or a few known answers entered as one more rater.
    """
    asked = _asked(votes, "votes")
    if ((votes < 0) | (votes > 1)).any():
        raise UserError("votes: want 1 for the first, 0 for the second, .5 for a tie")
    first, second = np.where(asked, votes, 0), np.where(asked, 1 - votes, 0)  # [B, J] what went to each text
    p = np.full(votes.shape[1], RIGHT / (RIGHT + WRONG))
    trace: list[float] = []
    while True:
        # E: the share of each pair, given the reliabilities.
        right, wrong = np.log(p), np.log1p(-p)
        log_first = first @ right + second @ wrong  # [B]
        log_second = first @ wrong + second @ right
        evidence = np.logaddexp(log_first, log_second)
        share = np.exp(log_first - evidence)
        prior = RIGHT * right.sum() + WRONG * wrong.sum()
        trace.append(float(evidence.sum() - len(votes) * math.log(2) + prior))
        if _converged(trace, len(votes)):
            return VoteFit(share, p, trace)
        # M: how often each rater named the better text, the imagined votes counted in.
        p = (share @ first + (1 - share) @ second + RIGHT) / (asked.sum(axis=0) + RIGHT + WRONG)


def fit_ratings(ratings: np.ndarray) -> RatingFit:
    """Each item's truth, and each rater's bias, slope and noise, from ratings [B, J].

    A rating is nan where a rater was not asked.  The model is
    rating_ij = bias_j + slope_j * truth_i + N(0, noise_j^2) with a normal truth: one factor, fitted by EM.

    EM starts from the mean of the raters.  A rater who inverts the scale ends with a negative slope and so
    counts the right way round; one who does not read the texts ends with slope 0 and no weight.  The truth is
    then put on the scale of those who measure it: the means of bias and slope, weighted by (slope / noise)^2,
    become 0 and 1.
    """
    asked = _asked(ratings, "ratings")
    centre, unit = ratings[asked].mean(), ratings[asked].std()
    unit = unit if unit > 1e-9 * np.abs(ratings[asked]).max() else 1.0  # nobody ever gave another score
    y, w = np.where(asked, (ratings - centre) / unit, 0.0), asked.astype(np.float64)
    total, squares, n = y.sum(axis=0), y**2, w.sum(axis=0)
    bias, slope, var = np.zeros(len(n)), np.ones(len(n)), np.full(len(n), NOISE)
    trace: list[float] = []
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
    return RatingFit(
        truth=centre + unit * (shift + gain * m),
        sd=unit * gain * np.sqrt(v),
        bias=centre + unit * bias - slope * (centre + unit * shift),
        slope=slope,
        noise=unit * np.sqrt(var),
        trace=trace,
    )


def _asked(table: np.ndarray, what: str) -> np.ndarray:
    """[B, J], where the table has numbers; UserError for infinite ones, or an item without any."""
    if table.ndim != 2 or not table.size:
        raise UserError(f"{what}: none; want a table of items x raters")
    asked = ~np.isnan(table)
    finite(table[asked], what)
    if not asked.any(axis=1).all():
        raise UserError(f"{what}: item {int(asked.any(axis=1).argmin())} has none; leave it out")
    return asked


def _converged(trace: list[float], items: int) -> bool:
    return len(trace) > MAX_STEPS or (len(trace) > 1 and trace[-1] - trace[-2] <= TOLERANCE * items)
