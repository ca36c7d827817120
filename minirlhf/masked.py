"""Means, variances and whitening over the real positions of a padded tensor.

`mask` is bool, True = counts, of x's shape (or broadcastable to it).  What stands where it is False may be
NaN or infinite and reaches neither a value nor a gradient: it is replaced before any arithmetic, since 0 *
NaN is NaN [D22].

With several ranks, each holding a share of the batch, pass `sum_`: it sums a list of tensors over the ranks,
in place (Machine.sum_).  The statistics are then those of the whole batch, whatever the number of ranks
[D17]."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SumOverRanks = Callable[[Iterable[Tensor]], None]


def masked_mean(
    x: Tensor, mask: Tensor, dim: int | None = None, keepdim: bool = False, sum_: SumOverRanks | None = None
) -> Tensor:
    """Mean of x over `dim` (None: over everything) where mask holds; 0 where no position does."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    count = mask.expand_as(x).sum(dims, keepdim=keepdim)
    total = torch.where(mask, x, 0.0).sum(dims, keepdim=keepdim)
    if sum_ is not None:
        sum_([count, total])
    return total / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None, sum_: SumOverRanks | None = None) -> Tensor:
    """Variance of x over `dim`, divided by n; 0 where no position is real."""
    centred = torch.where(mask, x, 0.0) - masked_mean(x, mask, dim, keepdim=True, sum_=sum_)
    return masked_mean(centred.square(), mask, dim, sum_=sum_)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, sum_: SumOverRanks | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), biased variance; 0 off the mask [D10] (as in lm-human-preferences).

    shift_mean=True centres (advantages); False puts the mean back (rewards).  Fewer than two real positions
    have no spread to divide by: x comes back unchanged."""
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask, sum_=sum_)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask, sum_=sum_) + 1e-8) + (0.0 if shift_mean else mean)
    count = mask.expand_as(x).sum()
    if sum_ is not None:
        sum_([count])
    return torch.where(mask & (count >= 2), white, x)
