"""The optimiser's step, learning-rate schedules, and sums over microbatches and ranks [D17]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from minirlhf import UserError
from minirlhf.support.hardware import Machine


def adamw(
    models: Iterable[nn.Module],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    embedding_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: gains, biases and other vectors are left alone.

    `embedding_scale` multiplies the learning rate of token embeddings, each of which occurs in few batches.
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


def take_step(
    machine: Machine, optimizer: torch.optim.Optimizer, max_norm: float, name: str = "model"
) -> float:
    """Sum gradients over the ranks, scale them down to `max_norm` (0: no clipping), step, and drop them ->
    their norm.

    A norm that is not finite raises UserError before anything moves.  It is the norm of the sum, so all ranks
    agree."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    machine.sum_gradients(trained)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf).item()
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise UserError(
            f"the {name}'s gradient norm is {norm}: lower its learning rate, or train in --precision fp32"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then a cosine that would reach 0 at step
    `total`."""
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
        raise UserError(f"{what}: {a} does not divide by {b}")
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


class Sums:
    """Named scalars, added up over microbatches on the device, then over ranks."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach().float()

    def sum(self, run, name: str) -> float:
        """One of the sums, over all ranks."""
        return run.sum_(self.values[name].clone()).item()

    def over_ranks(self, machine: Machine) -> dict[str, float]:
        """All sums over all ranks, as numbers: one collective and one wait for the device."""
        total = torch.stack(list(self.values.values()))
        machine.sum_([total])
        return dict(zip(self.values, total.tolist(), strict=True))


class History:
    """Statistics of an update's optimiser steps, each a mean over the tokens of its minibatch."""

    def __init__(self) -> None:
        self.steps: list[tuple[Sums, Tensor]] = []

    def new_step(self, tokens: Tensor) -> Sums:
        """Where the statistics of the next step go; tokens: how many its minibatch has, over all ranks."""
        self.steps.append((Sums(), tokens))
        return self.steps[-1][0]

    def means(self, machine: Machine) -> dict[str, float]:
        """Means over all tokens of all steps and ranks [D22]; val/ratio_var, the variance of the steps' mean
        ratios; and optimizer_steps, how many steps were taken.

        Only the last step may lack statistics: those of the value model, where it was left early.
        """
        names = list(self.steps[0][0].values)
        nan = torch.full((), math.nan, device=machine.device)
        means = torch.stack(
            [torch.stack([sums.values.get(name, nan) for name in names]) for sums, _ in self.steps]
        )
        machine.sum_([means])  # [steps, names]: ranks add up to the minibatch's means
        tokens = torch.stack([tokens for _, tokens in self.steps])
        rows = torch.cat([means, tokens[:, None]], 1).double().cpu().numpy()
        found = {}
        for name, column in zip(names, rows.T, strict=False):
            known = ~np.isnan(column)
            found[name] = float(np.average(column[known], weights=rows[known, -1]))
        found["val/ratio_var"] = float(rows[:, names.index("val/ratio")].var())
        found["optimizer_steps"] = int((~np.isnan(rows[:, -2])).sum())
        return found
