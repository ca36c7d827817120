"""What is learnt from people's judgements: losses on choices and ratings, DPO and IPO, normalised scores.

Pure functions: they know no model, tokenizer or config.  B is the number of items or of pairs.  Sources: the
reward model's losses, Stiennon et al. 2020 (arXiv 2009.01325); DPO, Rafailov et al. 2023 (arXiv 2305.18290);
IPO, Azar et al. 2023 (arXiv 2310.12036); gain and bias, Ziegler et al. 2019 (arXiv 1909.08593) and
openai/lm-human-preferences.  What several raters of one item come to is minirlhf/feedback/raters.py.
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from minirlhf import UserError
from minirlhf.measure.stats import finite


def pairwise_loss(scores_a: Tensor, scores_b: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """Bradley-Terry cross-entropy in nats, averaged over pairs: all [B] -> scalar.

    The model says P(a is preferred) = sigmoid(d) with d = score_a - score_b.  `share` is the share of the
    votes for a: 1 where a was chosen, 0.5 for a tie.  The loss is
    -share log sigmoid(d) - (1 - share) log sigmoid(-d).
    """
    d = scores_a.float() - scores_b.float()
    # [D15] logsigmoid holds even at d = +-1e4.  Swapping a pair and its label changes nothing.
    return (-share * F.logsigmoid(d) - (1 - share) * F.logsigmoid(-d)).mean()


def sequence_log_ratios(logps: Tensor, ref_logps: Tensor, lengths: Tensor, loss: str) -> Tensor:
    """log p - log p(reference) of whole responses, in nats: all [B] -> [B].

    logps and ref_logps are SUMS over each response's tokens, of which there are `lengths`.  DPO compares the
    sums, IPO the means over the tokens [D25].  A mean in DPO would be a preference for long responses.
    """
    log_ratios = logps - ref_logps
    return log_ratios if loss == "dpo" else log_ratios / lengths


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, share: Tensor | float = 1.0) -> Tensor:
    """Direct preference optimisation, in nats, averaged over pairs: log-ratios [B] (sums) -> scalar.

    A policy that maximises reward - beta KL has the reward beta log p / p(reference), up to a constant of the
    prompt.  So the reward model's own loss, on these implicit rewards, needs no reward model.  With vote
    shares it is a cross-entropy whose minimum is where sigmoid(beta (chosen - rejected)) = share.
    """
    return pairwise_loss(beta * chosen, beta * rejected, share)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float, share: Tensor | float = 1.0) -> Tensor:
    """Identity preference optimisation, averaged over pairs: log-ratios [B] (means per token) -> scalar.

    (margin - 1 / (2 beta))^2: the margin is pulled to a finite value, where DPO's loss on a pair that all
    raters agree on pulls it to infinity.  With vote shares it is the expectation over a voter,
    share (margin - t)^2 + (1 - share) (-margin - t)^2 with t = 1 / (2 beta): least at (2 share - 1) t.
    """
    margin, t = chosen.float() - rejected.float(), 1 / (2 * beta)
    return (share * (margin - t) ** 2 + (1 - share) * (margin + t) ** 2).mean()


def regression_loss(scores: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared difference of scores and ratings: both [B] -> scalar, in squared rating points."""
    return F.mse_loss(scores.float(), ratings.float())


def binary_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of thumbs in nats, averaged over texts: both [B] -> scalar.

    P(thumbs up) = sigmoid(score): a pair with a text whose score is always 0 [D15].
    """
    return pairwise_loss(scores, scores.new_zeros(scores.shape), labels)


def pairs_from_ratings(
    ratings: Sequence[Sequence[float]] | Sequence[float], rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n different pairs of items [D15]: index of a, index of b and the share of votes for a, each [n].

    `ratings` holds each item's scores, one per rater, or one number per item.  The share is P(a rater of a
    scores higher than a rater of b) + P(equal) / 2, the two raters independent: a soft target for
    pairwise_loss.  Pairs are drawn evenly from all there are, without listing them; where there are fewer
    than n, each comes once.  Raises UserError for fewer than two items, an item without a score, or a score
    that is not finite.
    """
    items = [np.sort(finite(scores, "ratings")) for scores in ratings]
    if empty := [i for i, scores in enumerate(items) if scores.size == 0]:
        raise UserError(f"ratings: item {empty[0]} has no score: leave it out")
    if len(items) < 2:
        raise UserError(f"ratings: {len(items)} item makes no pair: two are needed")

    # Number all pairs (a, b) with b < a: those of item a begin at a (a - 1) / 2, one per earlier item.
    ends = np.cumsum(np.arange(len(items)))
    drawn = rng.choice(int(ends[-1]), size=min(n, int(ends[-1])), replace=False)
    a = np.searchsorted(ends, drawn, side="right")
    b = drawn - ends[a - 1]
    return a, b, np.array([_share(items[i], items[j]) for i, j in zip(a, b, strict=True)])


def _share(a: np.ndarray, b: np.ndarray) -> float:
    """P(a score of a is above one of b) + P(equal) / 2, for two sorted lists of scores."""
    below = np.searchsorted(b, a, side="left")  # for each score of a, how many of b are lower
    not_above = np.searchsorted(b, a, side="right")  # ... and how many are lower or equal
    return float((below + not_above).sum() / (2 * a.size * b.size))


def fit_affine(scores: Tensor | Sequence[float], mode: str = "scale") -> tuple[float, float]:
    """(gain, bias) such that gain * score + bias has mean 0 over samples of the REFERENCE policy [D14].

    'scale' also brings the population standard deviation to 1: for models of choices, whose scale is
    arbitrary.  'bias' keeps gain 1: for models of ratings, where a point stays a point.  'none' returns
    (1, 0).  Raises UserError for fewer than two scores, or scores that do not vary: a silent no-op would
    hand PPO rewards of unknown scale.
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
    return gain, -float(values.mean()) * gain
