"""Seeds, precision and devices (minirlhf/support/hardware.py)."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.support import hardware
from tests.ranks import in_ranks

ALONE = hardware.Machine(torch.device("cpu"))


def draws() -> tuple:
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()


@given(
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_D21_seeds_are_a_function_of_their_parts(a, b):
    hardware.seed_everything(*a)
    first = draws()
    draws()
    hardware.seed_everything(*b)
    other = draws()
    hardware.seed_everything(*a)
    assert draws() == first
    # SeedSequence reads (1, 0) as (1,): only zeros at the end are lost.
    if (a + [0, 0])[:3] != (b + [0, 0])[:3]:
        assert all(x != y for x, y in zip(first, other, strict=True))


def test_pick_precision(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(hardware, "has_fast_bf16", lambda fast=fast: fast)
        assert hardware.pick_precision("auto") == ("bf16" if fast else "fp32")
        assert [hardware.pick_precision(wish) for wish in ("fp32", "bf16")] == ["fp32", "bf16"]
    x = torch.randn(4, 4)
    with ALONE.autocast("bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with ALONE.autocast("fp32"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "fast"), [("avx2 fma", False), ("avx512_bf16", True), ("amx_bf16 amx_tile", True)]
)
def test_R3_bf16_is_fast_where_the_hardware_multiplies_it(monkeypatch, flags, fast):
    """On a CPU by its flags; on a GPU without emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.Path, "read_text", lambda self: f"flags : fpu {flags}")
    assert hardware.has_fast_bf16() is fast
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or fast)
    assert hardware.has_fast_bf16() is fast and asked == [{"including_emulation": False}]


def test_frozen_weights_are_kept_in_the_precision_that_they_are_read_in():
    assert hardware.frozen_dtype("bf16") == torch.bfloat16 and hardware.frozen_dtype("fp32") == torch.float32


@pytest.mark.parametrize(
    "flags", [(False, False, False), (False, True, False), (True, False, True), (True, True, True)]
)
def test_ranks_decide_alike(monkeypatch, flags):
    """any: whether it holds on one rank at least; alone, nothing is summed."""
    assert [ALONE.any(flag) for flag in flags] == [*flags]

    def ask(rank, sum_):
        return DividedMachine(ALONE.device, rank, len(flags), sum_).any(flags[rank])

    assert in_ranks(len(flags), ask) == [any(flags)] * len(flags)


class DividedMachine(hardware.Machine):
    """A rank that is a thread."""

    def __init__(self, device, rank, world, sum_):
        super().__init__(device, rank, world)
        object.__setattr__(self, "sum_", sum_)


def test_D17_a_rank_without_a_gradient_takes_part_with_zeros():
    def share(rank, sum_):
        parameters = [
            torch.nn.Parameter(torch.zeros(2)),
            torch.nn.Parameter(torch.zeros(1), requires_grad=False),
        ]
        if rank:
            parameters[0].grad = torch.tensor([1.0, rank])
        DividedMachine(ALONE.device, rank, 3, sum_).sum_gradients(parameters)
        assert parameters[1].grad is None
        return parameters[0].grad.tolist()

    assert in_ranks(3, share) == [[2.0, 3.0]] * 3
    alone = torch.nn.Parameter(torch.zeros(2))
    ALONE.sum_gradients([alone])
    assert alone.grad is None
