"""The tokens that end a response: a model may have several."""

from __future__ import annotations

import torch
from torch import Tensor

Ends = int | tuple[int, ...]  # one id, or several


def ids_of(ends: Ends) -> tuple[int, ...]:
    return (ends,) if isinstance(ends, int) else ends


def are_ends(tokens: Tensor, ends: Ends) -> Tensor:
    """Which of the tokens end a response: bool, in their shape.

    Compared with numbers one by one: a tensor of ids would have to be copied to a GPU.
    """
    first, *others = (tokens == token for token in ids_of(ends))
    for found in others:
        first = first | found
    return first


def index_of(ends: Ends, device: torch.device) -> Tensor:
    """The ids [n] as a tensor on the device, made there."""
    return torch.cat([torch.full((1,), token, device=device) for token in ids_of(ends)])
