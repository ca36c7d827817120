"""The optimiser's step, learning-rate schedules, and sums over microbatches and ranks [D17]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from minirlhf import UserError
from minirlhf.support import shard
from minirlhf.support.hardware import Machine


def adamw(
    models: Sequence[nn.Module],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    embedding_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: gains, biases and other vectors are left alone.

    `embedding_scale` multiplies the learning rate of token embeddings, each of which occurs in few batches.
    """
    shard.drop(models)  # or the optimiser would train what a forward has gathered, not this rank's pieces
    named = [(name, p) for m in models for name, p in m.named_parameters() if p.requires_grad]
    embeddings = [p for name, p in named if name.endswith("wte.weight")]
    matrices = [p for name, p in named if p.dim() >= 2 and not name.endswith("wte.weight")]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": embeddings, "weight_decay": weight_decay, "scale": embedding_scale},
        {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def take_step(machine: Machine, optimizer: torch.optim.Optimizer, max_norm: float, name="model") -> float:
    """Sum gradients over the ranks, clip their norm to `max_norm` (0: do not), step -> the norm before.

    A norm that is not finite raises UserError before anything moves, on all ranks alike.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    machine.sum_gradients(trained)
    norm = machine.clip_gradients(trained, max_norm or math.inf)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise UserError(f"the {name}'s gradient norm is {norm}: lower its learning rate, or use fp32")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then a cosine to 0 at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def warmup_linear(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1/warmup up, times linear from 1 down to 0 at step `total`."""
    return min(1.0, (step + 1) / max(1, warmup)) * (1 - step / total)


def exact_div(a: int, b: int, what: str) -> int:
    """a / b; UserError where it would have to be rounded."""
    if a % b:
        raise UserError(f"{what}: {a} is not divisible by {b}")
    return a // b


def fuse_head(wish: str, tokens: int, vocab: int) -> bool:
    """Whether to compute logits one tile at a time (and again in backward) instead of holding them all.

    'on', 'off', or 'auto': where the logits of a forward pass would take more than 128 MiB in fp32.
    """
    return wish == "on" or wish == "auto" and 4 * tokens * vocab > 2**27


def minibatches(n: int, size: int, epochs: int) -> Iterator[Tensor]:
    """The indices below n in random order, `size` at a time, once per epoch."""
    for _ in range(epochs):
        yield from torch.randperm(n).split(size)
