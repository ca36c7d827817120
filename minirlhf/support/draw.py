"""Two ways to draw tokens from probabilities: one for the CPU, one for GPUs."""

import torch
from torch import Tensor


def draw_by_cdf(p: Tensor, u: Tensor) -> Tensor:
    """One token [B] per row of p [B, V]: where the cumulative sum passes u [B, 1], uniform in [0, 1).

    For the CPU, where it is far faster than torch.multinomial. It needs a cumsum that never decreases, which
    a GPU's parallel sum does not promise (pytorch issue 21780).
    """
    cdf = p.cumsum(-1)
    # u <= 1 - 2^-24 in fp32, so the product rounds to less than the total: some entry lies above it, and the
    # first one that does has a positive probability.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1)


def draw_by_race(p: Tensor, noise: Tensor) -> Tensor:
    """One token [B] per row of p [B, V]: the argmax of p / noise, where noise [B, V] is Exponential(1).

    Token j arrives at the time noise_j / p_j, which is exponential with rate p_j, so j comes first with
    probability p_j. For a GPU: the host does not wait, and a token of probability 0 cannot win.
    """
    smallest = torch.finfo(noise.dtype).tiny  # 0 / 0 is NaN, which argmax would choose
    return (p / noise.clamp(min=smallest)).argmax(-1)
