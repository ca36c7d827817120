"""What trainer.json must hold before a run goes on from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support.text import one_line

ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def damage_is_one_line(out: Path) -> Iterator[None]:
    """Whatever a trainer's state of another shape leads to in the block becomes a UserError."""
    try:
        yield
    except (*ODD, RuntimeError) as error:
        if type(error) is RuntimeError and "loading state_dict" not in str(error):
            raise  # the device's, not the file's
        reason = one_line(" ".join(str(error).split()), 120)
        raise UserError(
            f"{out}/latest: its trainer's state is damaged, or another run's ({reason}): "
            f"give the folder as --init of a new run, or --overwrite"
        ) from error


def check_state(state: dict[str, Any], counters: dict[str, Any], step: object) -> None:
    """Raise ValueError unless the state has config.json's step, and counters as this stage keeps them."""
    if type(state["step"]) is not int or state["step"] != step or step < 0:
        raise ValueError(f"step {state['step']!r:.40}, but {step!r:.40} in config.json")
    numbers = {"seconds": state["seconds"]} | state["counters"]
    if {*state["counters"]} != {*counters}:
        raise ValueError(f"counters {sorted(state['counters'])!r:.80}, not {sorted(counters)}")
    for name, value in numbers.items():
        if type(value) not in (int, float) or math.isnan(value):
            raise ValueError(f"{name} is {value!r:.40}")
