"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11 to 16).

    delta_t     = rewards_t + gamma alive_t V_{t+1} - V_t            alive_t = 0 where dones_t, else 1
    advantage_t = delta_t + gamma lam alive_t advantage_{t+1}
                = sum_{l >= t} (prod_{t <= k < l} gamma lam alive_k) delta_l
    return_t    = advantage_t + V_t

Shapes: rewards, values, mask, dones [B, T], last_values [B]. `values[:, t]` is the value BEFORE step t [D8].
The mask marks a left-aligned run of real steps; after the last of them V is `last_values` (default 0).
Nothing is saved: advantages and returns are targets, and carry no gradient.
"""

import torch
from torch import Tensor


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    last_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """The oracle: the double sum over t and l, term by term in float64."""
    B, T = rewards.shape
    advantages = torch.zeros(B, T, dtype=torch.float64)
    returns = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        length = T if mask is None else int(mask[b].sum())
        r, v = rewards[b, :length].double().tolist(), values[b, :length].double().tolist()
        v.append(0.0 if last_values is None else float(last_values[b]))
        for t in range(length):
            weight = 1.0
            for step in range(t, length):
                done = dones is not None and bool(dones[b, step])
                advantages[b, t] += weight * (r[step] + (0.0 if done else gamma * v[step + 1]) - v[step])
                if done:
                    break
                weight *= gamma * lam
            returns[b, t] = advantages[b, t] + v[t]
    return advantages, returns


def _check(rewards: Tensor, values: Tensor, mask: Tensor, dones: Tensor, last: Tensor, *factors: float) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [B, T], not {tuple(rewards.shape)}")
    shapes = {"values": values.shape, "mask": mask.shape, "dones": dones.shape}
    for name, shape in shapes.items():
        if shape != rewards.shape:
            raise ValueError(f"{name} must have rewards' shape {tuple(rewards.shape)}, not {tuple(shape)}")
    if last.shape != rewards.shape[:1]:
        raise ValueError(f"last_values must have shape [{len(rewards)}], not {tuple(last.shape)}")
    if mask.dtype != torch.bool or dones.dtype != torch.bool:
        raise ValueError(f"mask and dones must be bool, not {mask.dtype} and {dones.dtype}")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask must be a left-aligned run of True in each row")
    if not all(0 <= f <= 1 for f in factors):
        raise ValueError(f"gamma and lam must lie in 0..1, not {factors}")


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

    `dones[b, t]` cuts everything after step t: no bootstrap, no carry. Steps where the mask is False give 0
    and may hold anything. Raises ValueError for arguments that do not fit together.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    dones = torch.zeros_like(mask) if dones is None else dones
    last_values = rewards.new_zeros(len(rewards)) if last_values is None else last_values
    _check(rewards, values, mask, dones, last_values, gamma, lam)
    # [T, B], so that a step of the recursion reads contiguous memory; padding becomes 0 before arithmetic.
    real = mask.T.contiguous()
    r, v = (torch.where(real, x.T.float(), 0.0) for x in (rewards, values))
    following = torch.cat([real[1:], torch.zeros_like(real[:1])])
    v_next = torch.cat([v[1:], torch.zeros_like(v[:1])])
    v_next = torch.where(real & ~following, last_values.float(), v_next)
    alive = ~dones.T  # a done step must not even read what follows: it may be NaN
    advantages = r - v + torch.where(alive, gamma * v_next, 0.0)
    decay = gamma * lam * alive
    for t in range(len(advantages) - 2, -1, -1):
        advantages[t].addcmul_(decay[t], advantages[t + 1])
    return advantages.T.contiguous(), (advantages + v).T.contiguous()
