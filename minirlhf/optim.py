"""The optimiser, learning-rate schedules, and sums over microbatches and ranks [D17]."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minirlhf import UserError
from minirlhf.support.hardware import Machine


def exact_div(a: int, b: int, what: str) -> int:
    """a / b, refused where it would have to be rounded."""
    if a % b:
        raise UserError(f"{what}: {a} does not divide by {b}")
    return a // b


def split_rows(lengths: Tensor, rows: int, tokens: int | None, picks: Tensor) -> list[Tensor]:
    """picks [n], in order, in groups of at most `rows`, and of at most `tokens` tokens where more than one row; lengths [B]."""
    if tokens is None:
        return list(picks.split(rows))
    groups, total = [0], 0
    for i, n in enumerate(lengths[picks].tolist()):
        if i - groups[-1] == rows or (i > groups[-1] and total + n > tokens):
            groups.append(i)
            total = 0
        total += n
    return list(picks.tensor_split(groups[1:]))


def fuse_head(asked: str, tokens: int, vocab: int) -> bool:
    """Whether to make logits a tile at a time and twice (once again in backward): where asked to, or where those of a
    forward pass, held at once, would take more than 128 MiB in fp32."""
    return asked == "on" or asked == "auto" and 4 * tokens * vocab > 2**27


def adamw(
    models: Iterable[nn.Module],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    embedding_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: gains, biases and other vectors are left alone.

    `embedding_scale` multiplies the learning rate of token embeddings, each of which few batches touch.
    """
    named = [(name, p) for m in models for name, p in m.named_parameters() if p.requires_grad]
    kind = lambda name, p: (
        "embedding" if name.endswith("wte.weight") else "matrix" if p.dim() >= 2 else "vector"
    )
    settings = {
        "matrix": {"weight_decay": weight_decay, "scale": 1.0},
        "embedding": {"weight_decay": weight_decay, "scale": embedding_scale},
        "vector": {"weight_decay": 0.0, "scale": 1.0},
    }
    groups = [
        {"params": [p for name, p in named if kind(name, p) == k]} | setting
        for k, setting in settings.items()
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def take_step(machine: Machine, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Sum gradients over the ranks, scale them down to `max_norm`, step, let them go -> their norm."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    machine.sum_gradients(trained)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then a cosine that would reach 0 at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


class Sums:
    """Named scalars added up over microbatches, then over ranks."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach().float()

    def over_ranks(self, machine: Machine) -> dict[str, float]:
        total = torch.stack(list(self.values.values()))
        machine.sum_([total])
        return dict(zip(self.values, total.tolist(), strict=True))
