"""Means, variances and whitening over the real positions of a padded tensor.

`mask` is bool, True = counts, of x's shape (or broadcastable to it). What stands where it is False may be NaN
or infinite and reaches neither a value nor a gradient: it is replaced before any arithmetic, since 0 * NaN is
NaN [D22].
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Mean of x over `dim` (None: over everything) where mask holds; 0 where no position does."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    count = mask.expand_as(x).sum(dims, keepdim=keepdim).clamp(min=1)
    return torch.where(mask, x, 0.0).sum(dims, keepdim=keepdim) / count


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None, unbiased: bool = False) -> Tensor:
    """Variance, divided by n (unbiased: by n - 1); 0 where there are too few positions for one."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    centred = torch.where(mask, x, 0.0) - masked_mean(x, mask, dim, keepdim=True)
    count = mask.expand_as(x).sum(dims) - int(unbiased)
    return torch.where(mask, centred, 0.0).square().sum(dims) / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), biased variance; 0 off the mask [D10] (as in lm-human-preferences).

    shift_mean=True centres (advantages); False puts the mean back (rewards). Fewer than two real positions
    have no spread to divide by: x comes back unchanged.
    """
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8) + (0.0 if shift_mean else mean)
    return torch.where(mask & (mask.expand_as(x).sum() >= 2), white, x)
