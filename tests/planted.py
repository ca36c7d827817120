"""Functions with one bug each, most of them bugs that a public project has had, and the property that must fail.

A suite that cannot fail proves nothing. test_conformance.py asks each of these functions its properties and
expects that the one named beside it fails, and expects that none fails for the healthy ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from kernels import gae
from minirlhf import masked, ppo, preference


@dataclass(frozen=True)
class Planted:
    number: str
    kind: str
    title: str  # a part of the property's title
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)  # of Subject


BUGS: list[Planted] = []


def bug(number: str, kind: str, title: str, **options: Any) -> Callable:
    def register(function: Callable) -> Callable:
        BUGS.append(Planted(number, kind, title, function, options))
        return function

    return register


def where(mask, x):
    return torch.where(mask, x, 0.0)


def total(mask, denominator):
    return (mask.sum() if denominator is None else torch.as_tensor(denominator)).clamp(min=1)


# ------------------------------------------------------------------------------ functions that hold


def response_mask(responses, eos, pad):
    """Of a sampler that knows no lengths: up to the first EOS, which counts."""
    ended = (responses == eos).cumsum(1) - (responses == eos).long()
    return ended == 0


def sequence_logprobs(logprobs, mask):
    return where(mask, logprobs).sum(1)


HEALTHY: list[tuple[str, Callable, dict[str, Any]]] = [
    ("kl", ppo.kl_estimates, {}),
    ("kl_loss", ppo.kl_loss, {"fixed": {"kind": "k2"}}),
    ("kl_loss", ppo.kl_loss, {"fixed": {"kind": "k3-ratio"}}),
    ("policy_loss", ppo.policy_loss, {}),
    ("cispo_loss", ppo.policy_loss, {"fixed": {"objective": "cispo"}}),
    ("gspo_loss", ppo.policy_loss, {"fixed": {"objective": "sequence"}}),
    ("value_loss", ppo.value_loss, {}),
    *(
        ("advantages", ppo.group_advantages, {"fixed": {"baseline": baseline, "scale": scale}})
        for baseline in ("mean", "leave-one-out")
        for scale in ("std", "none")
        if (baseline, scale) != ("leave-one-out", "std")
    ),
    *(("averaging", ppo.averaging, {"fixed": {"how": how}}) for how in ("tokens", "responses", "constant")),
    ("gae", gae, {}),
    ("shape_rewards", ppo.shape_rewards, {}),
    ("whiten", masked.whiten, {}),
    ("masked_mean", masked.masked_mean, {}),
    ("sampling_weights", ppo.importance_weights, {"rename": {"engine_logprobs": "sampler_logprobs"}}),
    ("response_mask", response_mask, {}),
    ("sequence_logprobs", sequence_logprobs, {}),
    ("dpo_loss", preference.dpo_loss, {}),
    ("ipo_loss", preference.ipo_loss, {}),
    ("pairwise_loss", preference.pairwise_loss, {}),
    ("kl_controller", ppo.adapt_kl_coef, {}),
]


# ------------------------------------------------------------------------------ kl


@bug("D1", "kl", "k1 = logprobs - ref_logprobs")
@bug("P7", "kl", "the means of k1 and of k3")
def upside_down(logprobs, ref_logprobs):
    d = logprobs - ref_logprobs
    return -d, d.square() / 2, torch.expm1(d) - d


@bug("D1", "kl", "k2 = k1 squared")
def k2_without_half(logprobs, ref_logprobs):
    k1, k2, k3 = ppo.kl_estimates(logprobs, ref_logprobs)
    return k1, 2 * k2, k3


@bug("P7", "kl", "k3 = expm1(ref - new)", output=("k3",))
def k3_upside_down(logprobs, ref_logprobs):
    d = logprobs - ref_logprobs
    return torch.expm1(d) - d


@bug("P10", "kl", "k3 is never negative", output=("k3",))
def k3_that_cancels(logprobs, ref_logprobs):
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


# ------------------------------------------------------------------------------ kl_loss


def kl_loss_of(token_losses):
    """A KL loss whose estimate per token is token_losses(new - ref)."""

    def loss(new_logprobs, ref_logprobs, response_mask, denominator=None):
        d = where(response_mask, new_logprobs - ref_logprobs)
        return where(response_mask, token_losses(d)).sum() / total(response_mask, denominator)

    return loss


bug("P8", "kl_loss", "one step lowers the KL")(kl_loss_of(lambda d: -d.square() / 2))
bug("P9", "kl_loss", "the expected gradient")(kl_loss_of(lambda d: torch.expm1(-d) + d))
bug("P9", "kl_loss", "the expected gradient")(kl_loss_of(lambda d: d))
bug("P11", "kl_loss", "a large difference")(kl_loss_of(lambda d: (torch.expm1(-d) + d).clamp(max=10)))
bug("P1", "kl_loss", "microbatches")(lambda new_logprobs, ref_logprobs, response_mask, denominator=None: (
    where(response_mask, (new_logprobs - ref_logprobs).square() / 2).sum() / response_mask.sum()))  # fmt: skip


@bug("D22", "kl_loss", "what stands in padding")
@bug("P3", "kl_loss", "more padding")
def kl_loss_without_mask(new_logprobs, ref_logprobs, response_mask):
    return (new_logprobs - ref_logprobs).square().mean() / 2


@bug("P11", "kl_loss", "where exp overflows in padding")
@bug("D22", "kl_loss", "no real token gives 0")
def kl_loss_by_multiplying(new_logprobs, logprobs, ref_logprobs, response_mask):
    d = ref_logprobs - new_logprobs
    ratio = (new_logprobs - logprobs).exp()
    return ((torch.expm1(d) - d) * ratio * response_mask).sum() / response_mask.sum()


# ------------------------------------------------------------------------------ policy_loss


def policy_loss_of(objective, average=None):
    """A policy loss of objective(A, ratio, clip), a loss per token."""

    def loss(new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None, weights=None):
        low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
        ratio = where(response_mask, new_logprobs - logprobs).clamp(max=20).exp()
        losses = objective(where(response_mask, advantages), ratio, 1 - low, 1 + high)
        losses = losses if weights is None else losses * weights
        return average(losses, response_mask) if average else losses.sum() / total(response_mask, denominator)

    return loss


def clip(A, ratio, low, high):
    return torch.maximum(-A * ratio, -A * ratio.clamp(low, high))


policy = lambda number, title: bug(number, "policy_loss", title)
policy("D12", "the larger of")(
    policy_loss_of(lambda A, r, low, high: torch.minimum(-A * r, -A * r.clamp(low, high)))
)
policy("D12", "a clipped token")(policy_loss_of(lambda A, r, low, high: -A * r))
policy("P20", "a bad token")(policy_loss_of(lambda A, r, low, high: -A * r.clamp(low, high)))
policy("P20", "a bad token")(
    policy_loss_of(lambda A, r, low, high: torch.minimum(clip(A, r, low, high), 3 * A.abs()))
)
policy("P20", "the bound above")(policy_loss_of(lambda A, r, low, high: clip(A, r, low, 2 - low)))
policy("D4", "with ratio 1")(policy_loss_of(lambda A, r, low, high: A * r))
policy("P2", "a token weighs the same")(
    policy_loss_of(clip, lambda losses, mask: (losses.sum(1) / mask.sum(1).clamp(min=1)).mean())
)


@bug("D12", "policy_loss", "the larger of")
@bug("P20", "policy_loss", "a bad token")
def ratio_upside_down(new_logprobs, logprobs, advantages, response_mask, clip_range):
    return ppo.policy_loss(logprobs, new_logprobs, advantages, response_mask, clip_range)


@bug("P1", "policy_loss", "microbatches")
def mean_of_microbatch_means(new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None):
    return ppo.policy_loss(new_logprobs, logprobs, advantages, response_mask, clip_range)


@bug("P3", "policy_loss", "more padding")
@bug("P2", "policy_loss", "a token weighs the same")
def constant_taken_from_the_padding(new_logprobs, logprobs, advantages, response_mask, clip_range):
    losses, _ = ppo.policy_loss(new_logprobs, logprobs, advantages, response_mask, clip_range, 1)
    return losses / response_mask.numel()


@bug("D22", "policy_loss", "what stands in padding")
def mask_forgotten(new_logprobs, logprobs, advantages, response_mask, clip_range):
    return ppo.policy_loss(new_logprobs, logprobs, advantages, torch.ones_like(response_mask), clip_range)


@bug("P11", "policy_loss", "where exp overflows in padding")
@bug("P11", "policy_loss", "a token far outside")
@bug("D22", "policy_loss", "no real token gives 0")
def masked_after_exp(new_logprobs, logprobs, advantages, response_mask, clip_range):
    losses = clip(advantages, (new_logprobs - logprobs).exp(), 1 - clip_range, 1 + clip_range)
    return (losses * response_mask).sum() / response_mask.sum()


@bug("P15", "policy_loss", "weights multiply")
def weights_normalised(
    new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None, weights=None
):
    weights = None if weights is None else weights / weights.mean()
    return ppo.policy_loss(
        new_logprobs, logprobs, advantages, response_mask, clip_range, denominator, weights
    )


# The same mistakes with the other objectives.
for kind, objective in (("cispo_loss", "cispo"), ("gspo_loss", "sequence")):

    def own_tokens(
        new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None, objective=objective
    ):
        return ppo.policy_loss(
            new_logprobs, logprobs, advantages, response_mask, clip_range, objective=objective
        )

    def no_mask(new_logprobs, logprobs, advantages, response_mask, clip_range, objective=objective):
        real = torch.ones_like(response_mask)
        return ppo.policy_loss(new_logprobs, logprobs, advantages, real, clip_range, objective=objective)

    def divided_by_0(new_logprobs, logprobs, advantages, response_mask, clip_range, objective=objective):
        given = (new_logprobs, logprobs, advantages, response_mask, clip_range)
        ratio = ((new_logprobs - logprobs).exp() * response_mask).sum() * 0
        return ppo.policy_loss(*given, denominator=1, objective=objective)[0] / response_mask.sum() + ratio

    bug("P1", kind, "microbatches")(own_tokens)
    bug("D22", kind, "what stands in padding")(no_mask)
    bug("P3", kind, "more padding")(no_mask)
    bug("P11", kind, "where exp overflows in padding")(divided_by_0)
    bug("D22", kind, "no real token gives 0")(divided_by_0)


@bug("P20", "cispo_loss", "the gradient is -A min(ratio, cap)")
def cispo_through_the_ratio(new_logprobs, logprobs, advantages, response_mask, clip_range):
    ratio = where(response_mask, new_logprobs - logprobs).exp().clamp(max=1 + clip_range[1])
    losses = -where(response_mask, advantages) * ratio * where(response_mask, new_logprobs)
    return losses.sum() / total(response_mask, None)


@bug("P20", "cispo_loss", "the gradient is -A min(ratio, cap)")
def cispo_that_clips_like_ppo(new_logprobs, logprobs, advantages, response_mask, clip_range):
    return ppo.policy_loss(new_logprobs, logprobs, advantages, response_mask, clip_range)


@bug("P21", "gspo_loss", "a response's ratio is the geometric mean")
def product_of_ratios(new_logprobs, logprobs, advantages, response_mask, clip_range):
    log_ratio = where(response_mask, new_logprobs - logprobs).sum(1, keepdim=True)
    ratio = where(response_mask, log_ratio).exp()
    losses = clip(where(response_mask, advantages), ratio, 1 - clip_range[0], 1 + clip_range[1])
    return losses.sum() / total(response_mask, None)


@bug("P20", "gspo_loss", "all tokens of a response are clipped together")
def clipped_token_by_token(new_logprobs, logprobs, advantages, response_mask, clip_range):
    return ppo.policy_loss(new_logprobs, logprobs, advantages, response_mask, 0.2)


# ------------------------------------------------------------------------------ value_loss


def value_loss_of(token_losses):
    def loss(new_values, values, returns, response_mask, clip_range_value, denominator=None):
        new, old, G = (where(response_mask, x) for x in (new_values, values, returns))
        return token_losses(new, old, G, clip_range_value).sum() / total(response_mask, denominator)

    return loss


def near(new, old, c):
    return new if c is None else new.clamp(old - c, old + c)


value = lambda number, title: bug(number, "value_loss", title)
value("D12", "half the squared error")(value_loss_of(lambda new, old, G, c: (new - G).abs()))
value("D12", "the larger of")(
    value_loss_of(lambda new, old, G, c: torch.minimum((new - G) ** 2, (near(new, old, c) - G) ** 2) / 2)
)
value("D12", "the value is clipped around")(
    value_loss_of(lambda new, old, G, c: torch.maximum((new - G) ** 2, (near(new, new * 0, c) - G) ** 2) / 2)
)
value("D12", "clip_range_value None")(
    value_loss_of(
        lambda new, old, G, c: torch.maximum((new - G) ** 2, (near(new, old, c or 0.2) - G) ** 2) / 2
    )
)


@bug("P1", "value_loss", "microbatches")
def value_means(new_values, values, returns, response_mask, clip_range_value, denominator=None):
    return ppo.value_loss(new_values, values, returns, response_mask, clip_range_value)


@bug("D22", "value_loss", "what stands in padding")
@bug("P3", "value_loss", "more padding")
def value_without_mask(new_values, values, returns, response_mask, clip_range_value):
    return ppo.value_loss(new_values, values, returns, torch.ones_like(response_mask), clip_range_value)


@bug("P11", "value_loss", "where exp overflows in padding")
@bug("D22", "value_loss", "no real token gives 0")
def value_divided_by_0(new_values, values, returns, response_mask, clip_range_value):
    loss, _ = ppo.value_loss(new_values, values, returns, response_mask, clip_range_value, 1)
    return loss / response_mask.sum() + 0 * new_values.exp().sum()


# ------------------------------------------------------------------------------ shape_rewards


def last_real(mask):
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def shaped(scores, mask, penalties, place):
    return torch.where(mask, penalties, 0.0) + torch.where(place, scores[:, None], 0.0)


@bug("D7", "shape_rewards", "the score is added once")
def score_in_the_last_column(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    k1 = (logprobs - ref_logprobs).detach()
    last = torch.arange(k1.shape[1]) == k1.shape[1] - 1
    return shaped(scores, response_mask, -kl_coef * k1, last.expand_as(k1))


@bug("D7", "shape_rewards", "the score is added once")
@bug("D7", "shape_rewards", "a row sums to score")
def score_at_every_token(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    return shaped(scores, response_mask, -kl_coef * (logprobs - ref_logprobs).detach(), response_mask)


@bug("D1", "shape_rewards", "each token pays")
def k3_in_the_reward(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    k3 = ppo.kl_estimates(logprobs.detach(), ref_logprobs)[2]
    return shaped(scores, response_mask, -kl_coef * k3, last_real(response_mask))


@bug("D22", "shape_rewards", "padding earns nothing")
def padding_pays_kl(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    k1 = (logprobs - ref_logprobs).detach()
    return shaped(scores, torch.ones_like(response_mask), -kl_coef * k1, last_real(response_mask))


@bug("D1", "shape_rewards", "rewards carry no gradient")
def differentiable_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    return shaped(scores, response_mask, -kl_coef * (logprobs - ref_logprobs), last_real(response_mask))


# ------------------------------------------------------------------------------ gae


def recursion(rewards, values, mask, gamma, lam, after_last=0.0, carry_by=None, shift=False):
    advantages, carry = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else values.new_full((len(values),), after_last)
        carry = rewards[:, t] + gamma * after - values[:, t] + (carry_by or gamma * lam) * carry
        advantages[:, t] = carry
    return advantages, advantages + values


@bug("D8", "gae", "advantages of a response of four tokens")
def last_value_repeats(rewards, values, mask, gamma=1.0, lam=0.95):
    last = values[:, -1:]
    advantages, returns = recursion(
        torch.cat([rewards, last * 0], 1), torch.cat([values, last], 1), mask, gamma, lam
    )
    return advantages[:, :-1], returns[:, :-1]


@bug("D8", "gae", "lam 0 is the TD error")
def lam_ignored(rewards, values, mask, gamma=1.0, lam=0.95):
    return recursion(rewards, values, mask, gamma, 0.95)


@bug("D8", "gae", "the recursion is the double sum")
def carried_by_lam_alone(rewards, values, mask, gamma=1.0, lam=0.95):
    return recursion(rewards, values, mask, gamma, lam, carry_by=lam)


@bug("D8", "gae", "nothing follows the last real token")
def value_of_the_padding(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, returns = recursion(rewards, values, mask, gamma, lam)
    return where(mask, advantages), where(mask, returns)


@bug("P28", "gae", "returns are made from advantages before")
def returns_from_whitened(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    return advantages, masked.whiten(advantages, mask) + values


# ------------------------------------------------------------------------------ advantages


def centred(rewards, group):
    return rewards.view(-1, group) - rewards.view(-1, group).mean(1, keepdim=True)


@bug("P4", "advantages", "a known baseline and scale")
def divided_by_the_variance(rewards, group):
    return (centred(rewards, group) / (rewards.view(-1, group).var(1, keepdim=True) + 1e-4)).view(-1)


@bug("P4", "advantages", "raising all rewards")
@bug("P4", "advantages", "a known baseline and scale")
def no_baseline(rewards, group):
    return (rewards.view(-1, group) / (rewards.view(-1, group).std(1, keepdim=True) + 1e-4)).view(-1)


@bug("P5", "advantages", "equal rewards give 0")
def small_eps(rewards, group):
    return (centred(rewards, group) / (rewards.view(-1, group).std(1, keepdim=True) + 1e-8)).view(-1)


@bug("P6", "advantages", "a group of one")
def std_of_one(rewards, group):
    return (centred(rewards, group) / (rewards.view(-1, group).std(1, keepdim=True) + 1e-4)).view(-1)


@bug("P6", "advantages", "a NaN is refused")
@bug("P25", "advantages", "a group's advantages depend on its own")
def spread_of_the_batch(rewards, group):
    return (centred(rewards, group) / (rewards.std() + 1e-4)).view(-1)


# ------------------------------------------------------------------------------ averaging


@bug("P2", "averaging", "a known average")
def divided_by_the_root(response_mask, longest):
    return response_mask.sum(1, keepdim=True).float().rsqrt(), torch.ones(len(response_mask))


@bug("P3", "averaging", "more padding")
def padded_length(response_mask, longest):
    return torch.full((len(response_mask), 1), 1 / response_mask.shape[1]), torch.ones(len(response_mask))


@bug("P1", "averaging", "microbatches add up")
def microbatch_means(response_mask, longest):
    weight = (1 / response_mask.sum()).expand(len(response_mask), 1)
    return weight, torch.full((len(response_mask),), 1 / len(response_mask))


# ------------------------------------------------------------------------------ whiten, masked_mean


@bug("D10", "whiten", "mean 0 and biased variance 1")
def unbiased_variance(x, mask, shift_mean=True):
    n = mask.sum()
    white = (x - masked.masked_mean(x, mask)) * torch.rsqrt(masked.masked_var(x, mask) * n / (n - 1) + 1e-8)
    return where(mask, white + (0.0 if shift_mean else masked.masked_mean(x, mask)))


@bug("D10", "whiten", "shift_mean=False keeps the mean")
def shift_mean_inverted(x, mask, shift_mean=True):
    return masked.whiten(x, mask, not shift_mean)


@bug("D22", "whiten", "only real tokens count")
def whitened_with_padding(x, mask, shift_mean=True):
    return masked.whiten(x, torch.ones_like(mask), shift_mean)


@bug("D10", "whiten", "one real token gives no NaN")
@bug("D10", "whiten", "equal numbers give 0")
def whitened_by_0(x, mask, shift_mean=True):
    mean, var = masked.masked_mean(x, mask), masked.masked_var(x, mask)
    return where(mask, (x - mean) / var.sqrt() + (0.0 if shift_mean else mean))


@bug("P1", "masked_mean", "all tokens count alike")
def mean_of_means(x, mask):
    return masked.masked_mean(x, mask, dim=1).mean()


@bug("D22", "masked_mean", "padding does not count")
def mean_of_everything(x, mask):
    return x.mean()


@bug("D22", "masked_mean", "padding may hold infinity")
@bug("D22", "masked_mean", "no real token gives a finite")
def mean_by_multiplying(x, mask):
    return (x * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------ weights, masks


@bug("P15", "sampling_weights", "weights of equal engines")
def weights_of_probabilities(logprobs, sampler_logprobs, cap):
    return (2 * logprobs.detach() - sampler_logprobs + 0.5).exp().clamp(max=cap)


@bug("P15", "sampling_weights", "below the cap")
def clamped_on_both_sides(logprobs, sampler_logprobs, cap):
    return (logprobs.detach() - sampler_logprobs).exp().clamp(1 / cap, cap)


@bug("P16", "sampling_weights", "no weight above the cap")
def not_truncated(logprobs, sampler_logprobs, cap):
    return (logprobs.detach() - sampler_logprobs).exp().clamp(min=-cap)


@bug("P15", "sampling_weights", "weights carry no gradient")
def weights_with_gradient(logprobs, sampler_logprobs, cap):
    return (logprobs - sampler_logprobs).exp().clamp(max=cap)


@bug("D22", "sampling_weights", "weights of padding")
def weights_masked_by_multiplying(logprobs, sampler_logprobs, response_mask, cap):
    return (logprobs.detach() - sampler_logprobs).exp().clamp(max=cap) * response_mask


@bug("P22", "response_mask", "the EOS counts, and nothing after")
def without_the_eos(responses, eos, pad):
    return (responses == eos).cumsum(1) == 0


@bug("P22", "response_mask", "the first EOS counts, even")
@bug("P22", "response_mask", "a token that was sampled counts")
def not_the_pad(responses, eos, pad):
    return responses != pad


# ------------------------------------------------------------------------------ pairs


@bug("P26", "dpo_loss", "at policy = reference")
@bug("P26", "dpo_loss", "-log sigmoid(beta margin)")
def without_beta(chosen, rejected, beta):
    return -F.logsigmoid(chosen - rejected).mean()


@bug("D15", "dpo_loss", "margins of any size")
def log_of_sigmoid(chosen, rejected, beta):
    return -(beta * (chosen - rejected)).sigmoid().log().mean()


@bug("P26", "dpo_loss", "only the difference")
def chosen_twice(chosen, rejected, beta):
    return -F.logsigmoid(beta * (2 * chosen - rejected)).mean()


@bug("D17", "dpo_loss", "the loss is the mean over pairs")
def summed_pairs(chosen, rejected, beta):
    return -F.logsigmoid(beta * (chosen - rejected)).sum()


@bug("P26", "ipo_loss", "(margin - 1 / (2 beta)) squared")
def target_of_1_over_beta(chosen, rejected, beta):
    return (chosen - rejected - 1 / beta).square().mean()


@bug("P26", "ipo_loss", "only the difference")
def ipo_chosen_alone(chosen, rejected, beta):
    return (chosen - 1 / (2 * beta)).square().mean()


@bug("D17", "ipo_loss", "the loss is the mean over pairs")
def ipo_summed(chosen, rejected, beta):
    return (chosen - rejected - 1 / (2 * beta)).square().sum()


@bug("P26", "sequence_logprobs", "a response's log-probability is the sum")
def mean_over_tokens(logprobs, mask):
    return where(mask, logprobs).sum(1) / mask.sum(1)


@bug("D22", "sequence_logprobs", "padding does not count")
def padding_counts(logprobs, mask):
    return logprobs.sum(1)


@bug("D15", "pairwise_loss", "log(1 + exp(-d))")
def hinge(scores_a, scores_b, share=1.0):
    return (1 - scores_a + scores_b).clamp(min=0).mean()


@bug("D15", "pairwise_loss", "differences of any size")
def pairwise_log_of_sigmoid(scores_a, scores_b, share=1.0):
    return -(scores_a - scores_b).sigmoid().log().mean()


@bug("D15", "pairwise_loss", "vote shares")
def votes_ignored(scores_a, scores_b, share=1.0):
    return preference.pairwise_loss(scores_a, scores_b)


@bug("D11", "kl_controller", "coefficient *")
def error_not_clipped(kl_coef, kl, target, n, horizon):
    return kl_coef * math.exp((kl / target - 1) * n / horizon)
