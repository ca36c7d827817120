"""The repairs of Triton's interpreter, each on a kernel that goes wrong without it."""

import pytest
import torch

from kernels.tools.testing import INTERPRETED

triton = pytest.importorskip("triton")
tl = triton.language
if not INTERPRETED:
    pytest.skip("of the interpreter: set TRITON_INTERPRET=1", allow_module_level=True)


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_dot_of_bf16():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float())


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def test_bf16_is_rounded_to_nearest_even():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), float("nan"), 3.4e38])
    out = torch.empty(4096, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, 4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def affine(c1, b1, c2, b2):
    return c1 * c2, b1 * c2 + b2


@triton.jit
def decay_forgotten(c1, b1, c2, b2):
    return c2, b1 * c2 + b2


@triton.jit
def scan_kernel(c, b, out, N: tl.constexpr, RIGHT: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :]
    if RIGHT:
        _, y = tl.associative_scan((tl.load(c + at), tl.load(b + at)), 1, affine, reverse=REVERSE)
    else:
        _, y = tl.associative_scan((tl.load(c + at), tl.load(b + at)), 1, decay_forgotten, reverse=REVERSE)
    tl.store(out + at, y)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_notices_a_combine_that_is_not_associative(reverse):
    c, b = torch.rand(2, 2, 64, generator=torch.Generator().manual_seed(0)).unbind()
    want, state = torch.empty(2, 64), torch.zeros(2)
    for t in reversed(range(64)) if reverse else range(64):
        want[:, t] = state = c[:, t] * state + b[:, t]
    right, wrong = torch.empty(2, 64), torch.empty(2, 64)
    scan_kernel[(1,)](c, b, right, 64, True, reverse)
    scan_kernel[(1,)](c, b, wrong, 64, False, reverse)
    torch.testing.assert_close(right, want)
    assert (wrong - want).abs().max() > 0.1
