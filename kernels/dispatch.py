"""Which path a call takes, Triton or plain PyTorch, and the checks that come first.

Triton is imported only where it has something to run on. Elsewhere `jit` returns its argument.
"""

import contextlib
import math
import os
from typing import Any

import torch
from torch import Tensor

triton = tl = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:  # importing it takes 70 MB and a second
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl

jit = triton.jit if triton else lambda kernel: kernel
constexpr = tl.constexpr if triton else lambda value: value
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """fp32, or float64 if an input is float64, so that gradients can be checked by finite differences."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def use_triton(*inputs: Tensor) -> bool:
    """True if a call with these tensors goes to the Triton kernels, False if it goes to plain PyTorch.

    Tensors on a GPU go to Triton; so do tensors on CPU under TRITON_INTERPRET=1. float64 tensors never do,
    and no tensor does under MINIRLHF_PLAIN=1.
    """
    plain = os.environ.get("MINIRLHF_PLAIN", "0") not in ("", "0")
    if triton is None or plain or result_dtype(*inputs) == torch.float64:
        return False
    return all(x.is_cuda or (INTERPRETED and x.device.type == "cpu") for x in inputs)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument. An empty grid runs nothing."""
    device = args[0].device
    if 0 not in grid:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **options)


def check(name: str, x: Tensor | None, like: Tensor, shape: tuple, dtype=None) -> None:
    """Raise ValueError if x does not have this shape, this dtype, and the device of `like`. None passes."""
    if x is None:
        return
    if x.shape != shape or (dtype and x.dtype != dtype):
        wanted = f"{dtype} {tuple(shape)}" if dtype else f"of shape {tuple(shape)}"
        raise ValueError(f"{name} must be {wanted}, not {x.dtype} {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not on {x.device}")


def check_rows(name: str, x: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> None:
    """Raise ValueError if the arguments do not fit the rows of x [..., V or C]. Contents are not read."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if x.ndim == 0 or x.shape[-1] == 0 or x.dtype not in floats:
        raise ValueError(f"{name} must be rows of 16, 32 or 64 bit floats, not {x.dtype} {tuple(x.shape)}")
    check("tokens", tokens, x, x.shape[:-1], torch.int64)
    check("mask", mask, x, x.shape[:-1], torch.bool)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, not {temperature}")


def real_rows(tokens: Tensor, mask: Tensor | None, V: int) -> Tensor:
    """The indices [n] of the rows that count. Raises ValueError if one of their tokens is outside 0..V-1."""
    every = torch.arange(tokens.numel(), device=tokens.device)
    rows = every if mask is None else mask.flatten().nonzero().squeeze(1)
    used = tokens.flatten()[rows]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < V:
        raise ValueError(f"tokens must lie in 0..{V - 1}, found {int(used.min())}..{int(used.max())}")
    return rows
