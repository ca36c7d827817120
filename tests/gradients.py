"""The gradients that a stage steps on, caught before they are clipped."""

import contextlib

import pytest
import torch

from minirlhf.support.hardware import Machine


@contextlib.contextmanager
def gradients():
    """A list that fills with the gradient of each optimiser step, flat and whole, in the order of the parameters."""
    found, clip = [], Machine.clip_gradients

    def clip_and_keep(self, parameters, max_norm):
        parameters = list(parameters)
        zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
        whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
        found.append(torch.cat([whole(zero(p)).flatten().clone() for p in parameters]))
        return clip(self, parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "clip_gradients", clip_and_keep)
        yield found


def agree(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """At every step, to this share of the gradient's norm, which is at least `1e-3` or there is nothing to compare [D17]."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.norm() > 1e-3
        assert (x - y).norm() <= tolerance * x.norm()
