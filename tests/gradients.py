"""The gradients that a stage steps on, caught before they are clipped."""

import contextlib

import pytest
import torch


@contextlib.contextmanager
def gradients():
    """A list that fills with the gradient of each optimiser step, flat, in the order of the parameters."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, *rest):
        parameters = list(parameters)
        zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
        found.append(torch.cat([zero(p).flatten().clone() for p in parameters]))
        return clip(parameters, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
        yield found


def agree(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """At every step, to this share of the gradient's norm, which is at least `1e-3` or there is nothing to compare [D17]."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.norm() > 1e-3
        assert (x - y).norm() <= tolerance * x.norm()
