"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11 to 16).

    delta_t     = rewards_t + gamma alive_t V_{t+1} - V_t            alive_t = 0 where dones_t, else 1
    advantage_t = delta_t + gamma lam alive_t advantage_{t+1}
                = sum_{l >= t} (prod_{t <= k < l} gamma lam alive_k) delta_l
    return_t    = advantage_t + V_t

Shapes: rewards, values, mask, dones [B, T], last_values [B]. `values[:, t]` is the value BEFORE step t [D8].
The mask marks a left-aligned run of real steps; after the last of them V is `last_values` (default 0).
Nothing is saved for backward: advantages and returns are targets, and carry no gradient. Bytes per step in
fp32: 4 for each of rewards, values and both results, 1 for each of dones and mask, where given.

A step maps what follows it, a, to delta + decay a. Composed maps have the same form, in any grouping, so a
block of steps is scanned at once, and one number is carried from block to block. Sums are in float64: with
gamma = lam = 1 a thousand terms of either sign may cancel, and memory traffic hides the arithmetic anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dispatch import check, jit, launch, result_dtype, tl, use_triton

BLOCK = 512  # steps that the Triton kernel scans at once
STRIDE = 32  # steps per block on CPU, where the loops below take 2 STRIDE + T / STRIDE iterations


def gae_reference(
    rewards, values, mask=None, dones=None, last_values=None, gamma=1.0, lam=0.95
) -> tuple[Tensor, Tensor]:
    """The oracle: the double sum over t and l, term by term in float64."""
    B, T = rewards.shape
    advantages, returns = torch.zeros(2, B, T, dtype=torch.float64)
    for b in range(B):
        length = T if mask is None else int(mask[b].sum())
        r, v = rewards[b, :length].double().tolist(), values[b, :length].double().tolist()
        v.append(0.0 if last_values is None else float(last_values[b]))
        for t in range(length):
            weight = 1.0
            for step in range(t, length):
                done = dones is not None and bool(dones[b, step])
                advantages[b, t] += weight * (r[step] + (0.0 if done else gamma * v[step + 1]) - v[step])
                weight *= gamma * lam
                if done or weight == 0:  # later steps are not read: they may be NaN
                    break
            returns[b, t] = advantages[b, t] + v[t]
    return advantages, returns


@jit
def compose(decay_1, delta_1, decay_2, delta_2):
    """The map of step 1, then that of the earlier step 2. A decay of 0 cuts off, where 0 * NaN would not."""
    return decay_1 * decay_2, tl.where(decay_2 == 0, delta_2, delta_1 * decay_2 + delta_2)


@jit
def to_float64(x):
    return x.to(tl.float32).to(tl.float64)


@jit
def gae_kernel(
    rewards, values, mask, dones, last_values, advantages, returns,
    T, gamma_high, gamma_low, decay_high, decay_low, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, which it walks block by block from the end of time.

    With T = 7 and BLOCK = 4, lanes 0 to 3 hold steps 6 5 4 3 of the first block, then 2 1 0 and none.
    """
    zero = tl.full((), 0.0, tl.float64)
    gamma, decay = zero + gamma_high + gamma_low, zero + decay_high + decay_low
    carry, last = zero, zero  # the advantage of the step after the block; the value after the last step
    row = tl.program_id(0).to(tl.int64)
    if last_values is not None:
        last = to_float64(tl.load(last_values + row))
    i = tl.arange(0, BLOCK)
    for start in range(0, T, BLOCK):
        # Time is reversed here, in the addresses, and the scan runs forwards: reverse scans have had bugs.
        t = T - 1 - start - i
        at = row * T + t
        inside = t >= 0
        real, followed = inside, inside & (t < T - 1)
        if mask is not None:
            real = real & tl.load(mask + at, mask=inside, other=0)
            followed = followed & tl.load(mask + at + 1, mask=followed, other=0)
        alive = real
        if dones is not None:
            alive = alive & (tl.load(dones + at, mask=real, other=0) == 0)
        # Padding and what follows a done step may be NaN, so neither is read.
        reward = to_float64(tl.load(rewards + at, mask=real, other=0.0))
        value = to_float64(tl.load(values + at, mask=real, other=0.0))
        next_value = to_float64(tl.load(values + at + 1, mask=alive & followed, other=0.0))
        next_value = tl.where(alive & (followed == 0), last, next_value)
        delta = reward + gamma * next_value - value
        weight, delta = tl.associative_scan((tl.where(alive, decay, 0.0), delta), 0, compose)
        advantage = tl.where(weight == 0, delta, delta + weight * carry)
        tl.store(advantages + at, advantage, mask=inside)
        tl.store(returns + at, advantage + value, mask=inside)
        carry = tl.sum(tl.where(i == BLOCK - 1, advantage, 0.0), 0)


def zero_where(condition: Tensor | None, x: Tensor) -> Tensor:
    return x if condition is None else torch.where(condition, 0.0, x)


def gae_plain(rewards, values, mask, dones, last, gamma, decay) -> tuple[Tensor, Tensor]:
    """The same in blocks of STRIDE steps, all blocks of all rows at once -> float64 [B, T rounded up]."""
    B, T = rewards.shape
    blocks = max(1, -(-T // STRIDE))
    end = torch.full_like(rewards[:, :1], T, dtype=torch.int64)
    if mask is not None:
        rewards, values = zero_where(~mask, rewards), zero_where(~mask, values)
        end = mask.sum(1, keepdim=True)
    v = pad(values, (0, blocks * STRIDE + 1 - T)).double()
    delta = pad(rewards, (0, blocks * STRIDE - T)).double().sub_(v[:, :-1])
    if last is not None:
        v.scatter_(1, end, last[:, None].double())
    next_v, done_at, done_in = v[:, 1:], [None] * STRIDE, [None] * blocks
    if dones is not None:
        dones = pad(dones, (0, blocks * STRIDE - T))
        next_v, dones = zero_where(dones, next_v), dones.T.contiguous().view(blocks, STRIDE, B)
        done_at, done_in = dones.unbind(1), dones.amax(1).unbind()  # amax is faster than any
    delta = delta.add_(next_v, alpha=gamma).T.contiguous()  # [T, B]: an iteration works on whole rows of it
    v = v.scatter_(1, end, 0.0)[:, :-1]  # `last` is the value of no step
    if decay:
        x = delta.view(blocks, STRIDE, B).unbind(1)
        a = torch.zeros_like(x[0])
        for k in range(STRIDE)[::-1]:  # each block's first advantage, as if nothing followed the block
            a = torch.add(x[k], zero_where(done_at[k], a), alpha=decay)
        first = a.unbind()
        for n in range(blocks - 1)[::-1]:  # add what follows the block
            first[n].add_(zero_where(done_in[n], first[n + 1]), alpha=decay**STRIDE)
        a = pad(a[1:], (0, 0, 0, 1))
        for k in range(STRIDE)[::-1]:  # the first loop again, now with what follows each block
            a = x[k].add_(zero_where(done_at[k], a), alpha=decay)
    delta = delta.T.contiguous()
    return delta, v.add_(delta)


INPUTS = "Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? last, float gamma, float lam"


@torch.library.custom_op("minirlhf::gae", mutates_args=(), schema=f"({INPUTS}) -> (Tensor, Tensor)")
def gae_op(rewards, values, mask, dones, last, gamma, lam) -> tuple[Tensor, Tensor]:
    B, T = rewards.shape
    if mask is not None and mask.device.type == "cpu" and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask must be a left-aligned run of True in each row")
    inputs, results = (rewards, values, mask, dones, last), empty_results(rewards, values)
    if use_triton(rewards, values):
        factors = []  # a kernel gets a Python float in fp32: the rest of it goes along as a second number
        for x in (gamma, gamma * lam):
            high = torch.tensor(x, dtype=torch.float32).item()
            factors += [high, x - high]
        inputs = [None if x is None else x.contiguous() for x in inputs]
        launch(gae_kernel, (B,), *inputs, *results, T, *factors, BLOCK=BLOCK)
    else:
        for result, x in zip(results, gae_plain(*inputs, gamma, gamma * lam), strict=True):
            result.copy_(x[:, :T])
    return results


@gae_op.register_fake
def empty_results(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(rewards.new_empty(rewards.shape, dtype=result_dtype(rewards, values)) for _ in range(2))


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    last_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """rewards, values [B, T], mask, dones [B, T] bool, last_values [B] -> advantages, returns [B, T], fp32.

    `dones[b, t]` cuts off everything after step t: no bootstrap, no carry, and nothing is read there. Steps
    where the mask is False give 0 and may hold anything. float64 inputs give float64. Raises ValueError for
    arguments that do not fit together; on a GPU it does not notice a mask that is not left-aligned.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [B, T], not {tuple(rewards.shape)}")
    check("values", values, rewards, rewards.shape)
    check("mask", mask, rewards, rewards.shape, torch.bool)
    check("dones", dones, rewards, rewards.shape, torch.bool)
    check("last_values", last_values, rewards, rewards.shape[:1])
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in 0..1, not {gamma} and {lam}")
    return gae_op(rewards, values, mask, dones, last_values, gamma, lam)
