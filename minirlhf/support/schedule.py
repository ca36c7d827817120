"""The optimiser steps of a run, without a list of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Schedule:
    """The batches of several passes over the data, in order.

    They are made one pass at a time: a list of all steps of many passes would take minutes and gigabytes.
    """

    def __init__(self, sizes: Sequence[int], batch: int, batches: Callable[[int], list]):
        """sizes: how many items each pass has; batches(i): those of pass i, at most `batch` items in each."""
        self.ends, self.batches = np.cumsum([math.ceil(size / batch) for size in sizes]), batches
        self.current: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, step: int) -> tuple[int, Any, bool]:
        """(the pass that a step is in, its batch, whether it is the last batch of the pass)."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        i = int(np.searchsorted(self.ends, step, side="right"))
        if self.current[0] != i:
            self.current = i, self.batches(i)
        left = int(self.ends[i]) - step
        return i, self.current[1][-left], left == 1


def ends_a_quarter(step: int, total: int) -> bool:
    """Whether to validate after this step, from 0: at each quarter, but not just before the last step."""
    quarter = max(1, total // 4)
    return step + 1 == total or (step + 1) % quarter == 0 and total - step > quarter
