"""Statistics of optimiser steps, added up over microbatches and ranks and averaged over tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from minirlhf.support.hardware import Machine


class Sums:
    """Named scalars, added up over microbatches on the device, then over ranks."""

    def __init__(self, names: Iterable[str] = (), device: torch.device | None = None) -> None:
        """names: sums that are there, and 0 on the device, also on a rank that adds nothing."""
        self.values: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in names}

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
        self.left = 0

    def new_step(self, tokens: Tensor) -> Sums:
        """Where the statistics of the next step go; tokens: how many its minibatch has, over all ranks."""
        self.steps.append((Sums(), tokens))
        return self.steps[-1][0]

    def leave_step(self) -> None:
        """The newest step is not taken; its statistics still count."""
        self.left += 1

    def means(self, machine: Machine) -> dict[str, float]:
        """Means over all tokens of all steps and ranks [D22]; val/ratio_var, the variance of the steps' mean
        ratios; and optimizer_steps, how many steps were taken.

        Only the last step may lack statistics: those of the value model, where it was left early.
        """
        if not self.steps:
            return {"optimizer_steps": 0}
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
        found["optimizer_steps"] = len(self.steps) - self.left
        return found
