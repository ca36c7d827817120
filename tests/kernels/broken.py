"""Functions with a bug each, most of them bugs that a public library has had, and the properties that must notice.

A suite that cannot fail proves nothing: test_broken.py asks each of these the properties named beside it and expects FAIL. It
asks the healthy functions, float64 at heart, everything, and expects none. Every property is named here at least once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.kl import token_kl_reference
from kernels.linear_logprobs import linear_token_logprobs_reference
from kernels.logprobs import token_logprobs_reference

INF = math.inf


def in_float64(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle, with the dtypes of the public functions: fp32 results, gradients in the dtype of the input."""

    def call(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        exact = [x.double() if x.is_floating_point() else x for x in tensors]
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        return tuple(x.to(dtype) for x in reference(*exact, **options))

    return call


def healthy_logprobs(logits, tokens, temperature=1.0, mask=None):
    return in_float64(token_logprobs_reference)(logits, tokens, temperature=temperature, mask=mask)


def healthy_kl(logits, ref_logits, tokens, temperature=1.0, mask=None):
    return in_float64(token_kl_reference)(logits, ref_logits, tokens, temperature=temperature, mask=mask)


def healthy_linear(hidden, weight, tokens, temperature=1.0, mask=None):
    return in_float64(linear_token_logprobs_reference)(
        hidden, weight, tokens, temperature=temperature, mask=mask
    )


@torch.no_grad()
def healthy_gae(rewards, values, mask=None, dones=None, last_values=None, gamma=1.0, lam=0.95):
    """The recursion; the double sum of the reference would take minutes on long rows."""
    T, dtype = rewards.shape[1], torch.float64 if rewards.dtype == torch.float64 else torch.float32
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    r, v = (x.double().masked_fill(~real, 0.0) for x in (rewards, values))
    advantages, carry = torch.zeros_like(r), r.new_zeros(len(r))
    after = r.new_zeros(len(r)) if last_values is None else last_values.double()
    for t in reversed(range(T)):
        alive = real[:, t] if dones is None else real[:, t] & ~dones[:, t]
        delta = r[:, t] + gamma * torch.where(alive, after, 0.0) - v[:, t]
        advantages[:, t] = carry = torch.where(
            real[:, t], delta + gamma * lam * torch.where(alive, carry, 0.0), 0.0
        )
        after = torch.where(real[:, t], v[:, t], after)
    return advantages.to(dtype), (advantages + v).to(dtype)


HEALTHY = {
    "token_logprobs": healthy_logprobs,
    "token_kl": healthy_kl,
    "linear_token_logprobs": healthy_linear,
    "gae": healthy_gae,
}


@dataclass(frozen=True)
class Bug:
    function: Callable[..., Any]
    op: str
    properties: tuple[str, ...]


BUGS: list[Bug] = []


def breaks(op: str, *properties: str) -> Callable:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(Bug(function, op, properties))
        return function

    return register


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.change(g), None


def through(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x, whose gradient is changed on its way back."""
    return _Through.apply(x, change)


# What public kernels got wrong


@breaks(
    "linear_token_logprobs",
    "shifting_all_logits_changes_nothing",
    "agrees_with_float64",
    "probabilities_are_at_most_1_and_sum_to_1",
)
def phantom_columns(hidden, weight, tokens, temperature=1.0, mask=None):
    """The vocabulary is padded to whole blocks, and each padded column adds exp(0).  verl #2656, #2899"""
    return healthy_linear(hidden, pad(weight, (0, 0, 0, -len(weight) % 128)), tokens, temperature, mask)


@breaks("token_logprobs", "shifting_all_logits_changes_nothing", "probabilities_are_at_most_1_and_sum_to_1")
def running_maximum_from_0(logits, tokens):
    """Logits that all lie far below 0 underflow together.  verl PR 7439"""
    peak = logits.amax(-1, keepdim=True).clamp(min=0.0)
    d = logits.float() - peak
    return d.gather(-1, tokens[..., None])[..., 0] - d.exp().sum(-1).log()


def online(logits, tokens, first=-INF, carry=True, block=256):
    """log-softmax by blocks of columns, as a kernel would."""
    x = logits.float()
    m, s = torch.full_like(x[..., 0], first), torch.zeros_like(x[..., 0])
    for part in x.split(block, -1):
        m_new = torch.maximum(m, part.amax(-1))
        s = s * (m - m_new).exp() * carry + (part - m_new[..., None]).exp().sum(-1)
        m = m_new
    return x.gather(-1, tokens[..., None])[..., 0] - m - s.log()


@breaks("token_logprobs", "impossible_columns_equal_deleted_ones")
def leading_block_of_minus_infinity(logits, tokens):
    """exp(-inf - -inf) is NaN.  flash-attention #1930; TRL's and Liger's kernels too"""
    return online(logits, tokens)


BLOCK = 256


@breaks("token_logprobs", "block_sizes_do_not_matter", "permuting_the_vocabulary_changes_nothing")
def sum_not_carried_from_block_to_block(logits, tokens):
    return online(logits, tokens, torch.finfo(torch.float32).min, carry=False, block=BLOCK)


@breaks("token_logprobs", "impossible_columns_equal_deleted_ones")
def zero_times_minus_infinity_in_entropy(logits, tokens):
    """p log p of an impossible token."""
    logp = logits.double().log_softmax(-1)
    return healthy_logprobs(logits, tokens)[0], -(logp.exp() * logp).sum(-1).float()


@breaks("token_logprobs", "a_token_outside_the_vocabulary_gives_no_number")
def target_at_a_padded_column(logits, tokens):
    """In the last block there is a column for a token that does not exist.  ml-cross-entropy PR 59"""
    return healthy_logprobs(pad(logits, (0, 128 - logits.shape[-1] % 128), value=-INF), tokens)


@breaks("linear_token_logprobs", "each_row_has_its_own_upstream_gradient", "gradients_agree_with_float64")
def every_row_scaled_by_the_first_upstream_gradient(hidden, weight, tokens):
    """Right wherever the loss is a plain mean.  Liger #968, #678"""
    first = lambda g: g.reshape(-1)[0].expand_as(g)
    return tuple(through(x, first) for x in healthy_linear(hidden, weight, tokens))


@breaks("token_logprobs", "offsets_may_exceed_2_31")
def offsets_of_32_bits(logits, tokens):
    """Liger #803, #1296"""
    if logits.ndim == 2:
        offsets = [(i * logits.stride(0) + 2**31) % 2**32 - 2**31 for i in range(len(logits))]
        at = lambda offset: logits.detach().as_strided(
            logits.shape[1:], (1,), logits.storage_offset() + offset
        )
        logits = torch.stack([at(offset) for offset in offsets])
    return healthy_logprobs(logits.detach(), tokens)


@breaks("token_kl", "large_vocabularies_work")
def at_most_65536_columns(logits, ref_logits, tokens):
    """One block holds the row, and a block has its limits.  unsloth #91"""
    if logits.shape[-1] > 65536:
        raise RuntimeError("a row is longer than the largest block")
    return healthy_kl(logits, ref_logits, tokens)


@breaks("token_logprobs", "nothing_but_masked_rows_gives_0")
def division_by_the_number_of_real_rows(logits, tokens, mask=None):
    """trl PR 5345"""
    results = healthy_logprobs(logits, tokens, mask=mask)
    return results if mask is None else tuple(x / mask.sum() * mask.sum() for x in results)


@breaks("gae", "long_rows_work")
def prefix_products_underflow(rewards, values, gamma=1.0, lam=0.95):
    """Sums of decay^t delta_t, divided by decay^t again.  trl #6626"""
    delta = rewards + gamma * pad(values[:, 1:], (0, 1)) - values
    power = (gamma * lam) ** torch.arange(rewards.shape[1], dtype=torch.float32)
    advantages = (delta * power).flip(1).cumsum(1).flip(1) / power
    return advantages, advantages + values


def recursion(rewards, values, last, gamma, lam, alive=None, bootstrap=None):
    """GAE step by step; `alive` stops the carry, `bootstrap` the next value."""
    after = torch.cat([values[:, 1:], last[:, None]], 1)
    alive = torch.ones_like(rewards) if alive is None else alive
    delta = rewards + gamma * after * (alive if bootstrap is None else bootstrap) - values
    advantages, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carry = delta[:, t] + gamma * lam * alive[:, t] * carry
        advantages[:, t] = carry
    return advantages, advantages + values


def none(x: Tensor) -> Tensor:
    return torch.zeros_like(x[:, 0])


@breaks("gae", "a_done_splits_a_row_into_two_calls", "equals_the_double_sum")
def value_bootstrapped_across_a_done(rewards, values, dones=None, gamma=1.0, lam=0.95):
    """tianshou #869"""
    alive = torch.ones_like(rewards) if dones is None else 1.0 - dones.float()
    return recursion(rewards, values, none(rewards), gamma, lam, alive, torch.ones_like(rewards))


@breaks("gae", "a_done_splits_a_row_into_two_calls", "equals_the_double_sum")
def advantage_carried_across_a_done(rewards, values, dones=None, gamma=1.0, lam=0.95):
    alive = torch.ones_like(rewards) if dones is None else 1.0 - dones.float()
    return recursion(rewards, values, none(rewards), gamma, lam, None, alive)


@breaks("gae", "a_done_splits_a_row_into_two_calls")
def done_shifted_by_one_step(rewards, values, dones=None, gamma=1.0, lam=0.95):
    """`done` taken for "this step starts an episode"."""
    alive = torch.ones_like(rewards) if dones is None else 1.0 - pad(dones[:, :-1], (1, 0)).float()
    return recursion(rewards, values, none(rewards), gamma, lam, alive)


# What else may go wrong: log-probs


@breaks(
    "token_logprobs",
    "temperature_equals_prescaled_logits",
    "gradients_agree_with_float64",
    "gradients_agree_with_differences",
)
def temperature_forgotten_in_backward(logits, tokens, temperature=1.0):
    return healthy_logprobs(through(logits, lambda g: g * temperature), tokens, temperature)


@breaks("token_logprobs", "gradients_agree_with_float64", "gradients_agree_with_differences")
def entropy_without_a_gradient(logits, tokens):
    logprobs, entropy = healthy_logprobs(logits, tokens)
    return logprobs, through(entropy, torch.zeros_like)


@breaks("token_logprobs", "gradient_rows_sum_to_0")
def one_hot_term_forgotten(logits, tokens):
    x = logits.double()
    return (x.gather(-1, tokens[..., None])[..., 0].detach() - x.logsumexp(-1)).float()


@breaks("token_logprobs", "masked_rows_give_0_and_are_never_looked_at", "agrees_with_float64")
def mask_inverted(logits, tokens, mask=None):
    return healthy_logprobs(logits, tokens, mask=None if mask is None else ~mask)


@breaks("linear_token_logprobs", "masked_rows_give_0_and_are_never_looked_at")
def nan_of_masked_rows_leaks(hidden, weight, tokens, mask=None):
    """0 * NaN is NaN: the results are 0, but the weight's gradient is not saved by them."""
    results = healthy_linear(hidden, weight, tokens if mask is None else tokens * mask)
    return results if mask is None else tuple(torch.where(mask, x, 0.0) for x in results)


@breaks("token_logprobs", "entropy_lies_between_0_and_log_V", "agrees_with_float64")
def entropy_from_unshifted_logits(logits, tokens):
    """log sum exp - sum p x: the difference of two large numbers."""
    x = logits.float()
    return healthy_logprobs(logits, tokens)[0], x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1)


@breaks("token_logprobs", "agrees_with_float64", "probabilities_are_at_most_1_and_sum_to_1")
def log_sum_subtracted_before_the_maximum(logits, tokens):
    """x - logsumexp(x): what the size of the logits costs is never got back."""
    x = logits.float()
    return x.gather(-1, tokens[..., None])[..., 0] - x.logsumexp(-1)


@breaks("token_logprobs", "agrees_with_float64", "permuting_the_vocabulary_changes_nothing")
def columns_after_the_last_whole_vector_dropped(logits, tokens):
    whole = logits.shape[-1] // 4 * 4 or 1
    picked = logits.double().gather(-1, tokens[..., None])[..., 0]
    return (picked - logits.double()[..., :whole].logsumexp(-1)).float()


@breaks("token_logprobs", "rows_may_start_at_any_address")
def first_vector_taken_for_aligned(logits, tokens):
    x, step = logits.detach(), 16 // logits.element_size()
    if x.ndim == 2 and len(x):
        at = lambda i: (x.storage_offset() + i * x.stride(0)) // step * step
        x = torch.stack([x.as_strided(x.shape[1:], (1,), at(i)) for i in range(len(x))])
    return healthy_logprobs(x, tokens)


@breaks("token_logprobs", "inputs_may_have_any_layout", "rows_may_start_at_any_address")
def strides_ignored(logits, tokens):
    x = logits.detach()
    return healthy_logprobs(x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()), tokens)


@breaks("token_logprobs", "leading_shape_is_kept")
def leading_shape_flattened(logits, tokens):
    return healthy_logprobs(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1))


@breaks("token_logprobs", "no_row_at_all_is_no_error")
def empty_batch_forgotten(logits, tokens):
    assert tokens.min() >= 0 and tokens.max() < logits.shape[-1]
    return healthy_logprobs(logits, tokens)


@breaks("token_logprobs", "an_impossible_token_has_logprob_minus_infinity")
def infinities_replaced_by_large_numbers(logits, tokens):
    return healthy_logprobs(logits.nan_to_num(neginf=-1e4), tokens)


@breaks("token_logprobs", "a_row_without_a_distribution_gives_nan_there_only")
def maximum_that_drops_nan(logits, tokens):
    """As a GPU's does: clamping the exponent turns a NaN into an impossible token."""
    return healthy_logprobs(torch.where(logits.isnan(), -INF, logits), tokens)


@breaks("token_logprobs", "half_precision_inputs_give_fp32_results")
def softmax_in_half_precision(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()


@breaks("token_logprobs", "inputs_are_left_alone")
def gradient_written_over_the_logits(logits, tokens):
    def overwrite(g: Tensor) -> Tensor:
        logits.data.copy_(g)
        return g

    return healthy_logprobs(through(logits, overwrite), tokens)


CALLS = iter(range(10**9))


@breaks("token_logprobs", "repeats_bit_for_bit")
def sums_in_any_order(logits, tokens):
    """What atomic additions do, here every other time."""
    logprobs, entropy = healthy_logprobs(logits, tokens)
    return logprobs.nextafter(torch.zeros(())) if next(CALLS) % 2 else logprobs, entropy


# KL


@breaks("token_kl", "kl_of_equal_inputs_is_exactly_0")
def kl_as_a_difference_of_two_sums(logits, ref_logits, tokens):
    """Cross-entropy less entropy: equal inputs leave their rounding errors."""
    *others, _ = healthy_kl(logits, ref_logits, tokens)
    x, y = logits.float(), ref_logits.float()
    p = x.softmax(-1)
    return *others, (p * x.log_softmax(-1)).sum(-1) + (y.logsumexp(-1) - (p * y).sum(-1))


@breaks("token_kl", "agrees_with_float64")
def kl_the_other_way_round(logits, ref_logits, tokens):
    *others, _ = healthy_kl(logits, ref_logits, tokens)
    return *others, healthy_kl(ref_logits, logits, tokens)[-1]


@breaks("token_kl", "kl_is_not_negative", "agrees_with_float64")
def kl_of_the_sampled_token_alone(logits, ref_logits, tokens):
    logprobs, ref_logprobs, entropy, _ = healthy_kl(logits, ref_logits, tokens)
    return logprobs, ref_logprobs, entropy, logprobs - ref_logprobs


@breaks("token_kl", "an_infinite_kl_passes_no_gradient")
def gradient_of_an_infinite_kl(logits, ref_logits, tokens):
    """0 * inf in backward, also where the loss does not use the KL."""
    *others, _ = healthy_kl(logits, ref_logits, tokens)
    z, y = (x.double().log_softmax(-1) for x in (logits, ref_logits))
    return *others, (z.exp() * (z - y)).sum(-1).float()


# GAE


@breaks("gae", "lam_0_is_the_td_error", "equals_the_double_sum")
def gamma_and_lam_swapped(rewards, values, gamma=1.0, lam=0.95):
    return recursion(rewards, values, none(rewards), lam, gamma)


@breaks("gae", "gamma_1_and_lam_1_is_return_minus_value", "equals_the_double_sum")
def returns_of_whitened_advantages(rewards, values, gamma=1.0, lam=0.95):
    advantages, _ = recursion(rewards, values, none(rewards), gamma, lam)
    white = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    return advantages, white + values


@breaks("gae", "linear_in_rewards_and_values")
def rewards_clipped(rewards, values, gamma=1.0, lam=0.95):
    return recursion(rewards.clamp(-1, 1), values, none(rewards), gamma, lam)


@breaks("gae", "what_follows_the_last_real_step_is_irrelevant", "equals_the_double_sum")
def padding_multiplied_by_the_mask(rewards, values, mask=None, gamma=1.0, lam=0.95):
    """NaN * 0 again, and the padding's values bootstrap the last real step."""
    real = torch.ones_like(rewards) if mask is None else mask.float()
    return tuple(x * real for x in recursion(rewards, values, none(rewards), gamma, lam, real))


@breaks("gae", "rows_are_independent")
def rows_scanned_as_one(rewards, values, gamma=1.0, lam=0.95):
    one = recursion(rewards.reshape(1, -1), values.reshape(1, -1), none(rewards)[:1], gamma, lam)
    return tuple(x.view(rewards.shape) for x in one)


@breaks("gae", "long_rows_work")
def carry_lost_between_blocks(rewards, values, gamma=1.0, lam=0.95):
    after = pad(values[:, 1:], (0, 1))
    parts = zip(*(x.split(256, 1) for x in (rewards, values, after)), strict=True)
    done = [recursion(r, v, a[:, -1], gamma, lam) for r, v, a in parts]
    return tuple(torch.cat(x, 1) for x in zip(*done, strict=True))


@breaks("gae", "equals_the_double_sum")
def combine_that_is_not_associative(rewards, values, gamma=1.0, lam=0.95):
    """The decay of the left half is forgotten: right from left to right, wrong in the tree that a GPU makes."""
    x = (rewards + gamma * pad(values[:, 1:], (0, 1)) - values).flip(1)
    decay, step = torch.full_like(x, gamma * lam), 1
    while step < x.shape[1]:
        x = x + decay * pad(x[:, :-step], (step, 0))
        step *= 2
    return x.flip(1), x.flip(1) + values


@breaks("gae", "an_empty_batch_is_no_error")
def list_of_steps_stacked(rewards, values, gamma=1.0, lam=0.95):
    advantages = [rewards.new_zeros(len(rewards)) for _ in range(rewards.shape[1])]
    return torch.stack(advantages, 1), values


@breaks("gae", "targets_carry_no_gradient")
def targets_that_carry_a_gradient(rewards, values, gamma=1.0, lam=0.95):
    return recursion(rewards, values, none(rewards), gamma, lam)
