"""The functions that can be asked: their signatures, and which properties each must have."""

from __future__ import annotations

from typing import Any

import torch

from minirlhf.tools.conformance import losses, signals
from minirlhf.tools.conformance.signals import double, real
from minirlhf.tools.conformance.subject import Kind, Property

POLICY = ("new_logprobs", "logprobs", "advantages", "response_mask")


def zeros(*names: str, **more: Any) -> dict[str, Any]:
    """Arguments of a first call: zeros [1, 2] by these names."""
    return {name: torch.zeros(1, 2, dtype=torch.float64) for name in names} | more


def policy(clip_range: Any) -> Kind:
    """A loss of the policy, whose clip range it may lack, or take."""
    return Kind(
        "(new_logprobs, logprobs, advantages, response_mask, clip_range, denominator, weights) -> loss",
        POLICY,
        {"clip_range": clip_range, "denominator": None, "weights": None},
        "loss",
        lambda: zeros(*POLICY[:3], response_mask=real(2, R=2), clip_range=clip_range),
    )


KINDS = {
    "kl": Kind(
        "(logprobs, ref_logprobs) -> k1, k2, k3 per token",
        ("logprobs", "ref_logprobs"),
        returns="estimates",
        first=lambda: zeros("logprobs", "ref_logprobs"),
    ),
    "kl_loss": Kind(
        "(new_logprobs, logprobs, ref_logprobs, response_mask, denominator) -> loss",
        ("new_logprobs", "ref_logprobs", "response_mask"),
        {"logprobs": ..., "denominator": None},
        "loss",
        lambda: zeros("new_logprobs", "logprobs", "ref_logprobs", response_mask=real(2, R=2)),
    ),
    "policy_loss": policy(0.2),
    "cispo_loss": policy((0.2, 4.0)),
    "gspo_loss": policy((3e-4, 4e-4)),
    "value_loss": Kind(
        "(new_values, values, returns, response_mask, clip_range_value, denominator) -> loss",
        ("new_values", "values", "returns", "response_mask"),
        {"clip_range_value": 0.2, "denominator": None},
        "loss",
        lambda: zeros("new_values", "values", "returns", response_mask=real(2, R=2), clip_range_value=0.2),
    ),
    "advantages": Kind(
        "(rewards [B], group) -> advantages [B] of whole responses; groups are consecutive rows",
        ("rewards",),
        {"group": None},
        first=lambda: {"rewards": double(1.0, 0.0), "group": 2},
    ),
    "averaging": Kind(
        "(response_mask, longest) -> weight [B, 1], share [B]; loss = sum(weight * losses) / sum(share)",
        ("response_mask",),
        {"longest": None},
        "pair",
        lambda: {"response_mask": real(1, 2, R=2), "longest": 4},
    ),
    "gae": Kind(
        "(rewards, values, mask, gamma, lam) -> advantages, returns",
        ("rewards", "values", "mask"),
        {"gamma": 1.0, "lam": 0.95},
        "pair",
        lambda: zeros("rewards", "values", mask=real(2, R=2), gamma=1.0, lam=0.95),
    ),
    "shape_rewards": Kind(
        "(scores [B], logprobs, ref_logprobs, response_mask, kl_coef) -> rewards",
        ("scores", "logprobs", "ref_logprobs", "response_mask", "kl_coef"),
        first=lambda: zeros(
            "logprobs", "ref_logprobs", response_mask=real(2, R=2), kl_coef=0.1, scores=double([1.0])
        ),
    ),
    "whiten": Kind(
        "(x, mask, shift_mean) -> x with mean 0 and variance 1",
        ("x", "mask"),
        {"shift_mean": True},
        first=lambda: {"x": double([[1.0, 2.0]]), "mask": real(2, R=2)},
    ),
    "masked_mean": Kind(
        "(x, mask) -> the mean of x where mask is True",
        ("x", "mask"),
        first=lambda: zeros("x", mask=real(2, R=2)),
    ),
    "sampling_weights": Kind(
        "(logprobs, sampler_logprobs, response_mask, cap) -> weights of tokens that another engine sampled",
        ("logprobs", "sampler_logprobs", "response_mask"),
        {"cap": 2.0},
        first=lambda: zeros("logprobs", "sampler_logprobs", response_mask=real(2, R=2), cap=2.0),
    ),
    "response_mask": Kind(
        "(responses, eos, pad) -> bool, True = counts",
        ("responses",),
        {"eos": None, "pad": ...},
        first=lambda: {"responses": torch.tensor([[5, 9]]), "eos": 9, "pad": 0},
    ),
    "dpo_loss": Kind(
        "(chosen [B], rejected [B], beta) -> loss; both are log-ratios to the reference, summed over tokens",
        ("chosen", "rejected"),
        {"beta": 0.1},
        "scalar",
        lambda: {"chosen": double([0.0]), "rejected": double([0.0]), "beta": 0.1},
    ),
    "ipo_loss": Kind(
        "(chosen [B], rejected [B], beta) -> loss; both are log-ratios to the reference, means over tokens",
        ("chosen", "rejected"),
        {"beta": 0.1},
        "scalar",
        lambda: {"chosen": double([0.0]), "rejected": double([0.0]), "beta": 0.1},
    ),
    "sequence_logprobs": Kind(
        "(logprobs, mask) -> [B], a response's log-probability in DPO",
        ("logprobs", "mask"),
        first=lambda: zeros("logprobs", mask=real(2, R=2)),
    ),
    "pairwise_loss": Kind(
        "(scores_a [B], scores_b [B], share) -> loss of a reward model; share of the votes for a",
        ("scores_a", "scores_b"),
        {"share": None},
        "scalar",
        lambda: {"scores_a": double([1.0]), "scores_b": double([0.0])},
    ),
    "kl_controller": Kind(
        "(kl_coef, kl, target, n, horizon) -> the next kl_coef",
        ("kl_coef", "kl", "target", "n", "horizon"),
        returns="number",
        first=lambda: {"kl_coef": 0.1, "kl": 6.0, "target": 6.0, "n": 1, "horizon": 10},
    ),
}

PROPERTIES: dict[str, tuple[Property, ...]] = {
    "kl": signals.KL,
    "kl_loss": losses.KL_LOSS,
    "policy_loss": losses.POLICY_LOSS,
    "cispo_loss": losses.CISPO_LOSS,
    "gspo_loss": losses.GSPO_LOSS,
    "value_loss": losses.VALUE_LOSS,
    "advantages": signals.ADVANTAGES,
    "averaging": signals.AVERAGING,
    "gae": signals.GAE,
    "shape_rewards": signals.SHAPE_REWARDS,
    "whiten": signals.WHITEN,
    "masked_mean": signals.MASKED_MEAN,
    "sampling_weights": signals.SAMPLING_WEIGHTS,
    "response_mask": signals.RESPONSE_MASK,
    "dpo_loss": losses.DPO_LOSS,
    "ipo_loss": losses.IPO_LOSS,
    "sequence_logprobs": losses.SEQUENCE_LOGPROBS,
    "pairwise_loss": losses.PAIRWISE_LOSS,
    "kl_controller": signals.KL_CONTROLLER,
}
