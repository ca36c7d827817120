"""A stage's process: where it computes, its seeds, its logs, and how it stops.

`Run` serves all scripts alike.  It knows the process and its folder, and nothing of the algorithm:

    run = Run("ppo", config)                           # device, ranks, precision; is OUT free or unfinished?
    if not run.begin(source, init=sft): return         # complete, from the same data and checkpoints
    run.resume(tokenizer, model, optimizer=optimizer)  # the state of the last checkpoint, if there is one
    for step in run.loop(total): ...                   # progress bar, seeds, Ctrl-C
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import Stopped, UserError, optim
from minirlhf.support import logs, shard
from minirlhf.support.folder import LOWER_LR, Folder
from minirlhf.support.hardware import (
    frozen_dtype,
    pick_precision,
    seed_everything,
    setup_machine,
    trim_freed_memory,
)
from minirlhf.support.history import Sums
from minirlhf.support.run_config import RunConfig, all_warmup, refuse_unread_options

STREAMS = {"sft": 1, "rm": 2, "ppo": 3, "dpo": 4}  # a stage's own random numbers


class Run(Folder):
    """One stage's process.  Its folder (what it starts from, saves and resumes) is support/folder.py."""

    def __init__(self, stage: str, config: RunConfig):
        """Raises UserError where OUT holds another run, cannot be resumed, or is in use."""
        refuse_unread_options(config)
        super().__init__(stage, config, shard.on(setup_machine(), config))
        self.device = self.machine.device
        self.precision = pick_precision(config.precision)
        self.times: dict[str, float] = {}  # of the running step, by metric name
        self.current_phase, self.phase_began = None, 0.0
        self.stop_signal = 0
        self.seed(0)

    def autocast(self, whole: torch.nn.Module | None = None):
        """The context in which models compute, at this run's precision; `whole` is one to hold unsharded."""
        context = self.machine.autocast(self.precision)
        return shard.whole(whole, context) if self.machine.sharded and whole else context

    def sum_(self, x: Tensor) -> Tensor:
        """x, summed over the ranks in place."""
        self.machine.sum_([x])
        return x

    def means(self, per_text: dict[str, Tensor], count: int) -> dict[str, float]:
        """The mean of each tensor [B] over all ranks, `count` numbers in all."""
        sums = Sums()
        sums.add({name: values.sum() / count for name, values in per_text.items()})
        return sums.over_ranks(self.machine)

    @property
    def where(self) -> str:
        return f"{self.precision} on {self.device}" + (f", {self.world} processes" if self.world > 1 else "")

    @property
    def frozen_dtype(self) -> torch.dtype:
        return frozen_dtype(self.precision)

    def loop(self, total: int) -> Iterator[int]:
        """The steps to do, from 0, each with its own seeds; Ctrl-C and SIGTERM wait for a step's end."""
        self.started, self.total = time.perf_counter(), total
        if remark := all_warmup(self.config, total):
            self.print(remark)
        before = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(range(self.step, total), initial=self.step, total=total, disable=self.rank > 0)
        try:
            for step in self.bar:
                self.times = {}
                self.seed(step + 1, self.rank)
                yield step
                trim_freed_memory(step + 1)
        finally:
            self.bar.close()
            self.seconds, self.started = self.elapsed, None
            for s, handler in before.items():
                signal.signal(s, handler)

    def seed(self, *parts: int) -> None:
        """Seed all generators from (seed, stage, parts) [D21], so that no two stages draw the same numbers.

        parts: 0 before the first step, (step + 1, rank) in a step.
        """
        seed_everything(self.config.seed, STREAMS[self.stage], *parts)

    def same_on_all_ranks(self, draw: Callable, step: int, *args: Any) -> Any:
        """draw(*args), a random choice that must not depend on the rank."""
        if self.rank:
            self.seed(step + 1, 0)
        drawn = draw(*args)
        if self.rank:
            self.seed(step + 1, self.rank)
        return drawn

    def phase(self, name: str | None) -> None:
        """From here on, seconds count for the metric time/NAME (None: for none)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.current_phase:
            key = f"time/{self.current_phase}"
            self.times[key] = self.times.get(key, 0.0) + now - self.phase_began
        self.current_phase, self.phase_began = name, now

    def take_step(self, optimizer: torch.optim.Optimizer, max_norm: float, name: str) -> float:
        """optim.take_step -> the gradient's norm; one that is not finite ends the run in one line."""
        try:
            return optim.take_step(self.machine, optimizer, max_norm, name)
        except UserError as error:
            raise UserError(f"{error} ({self._progress()})") from None

    def require_finite(self, **quantities: Tensor | None) -> None:
        """End the run in one line, on all ranks, where one of these tensors holds nan or inf on any rank."""
        quantities = {name: x for name, x in quantities.items() if x is not None}
        bad = torch.stack([(~torch.isfinite(x.detach())).any().float() for x in quantities.values()])
        names = [name for name, count in zip(quantities, self.sum_(bad).tolist(), strict=True) if count]
        if names:
            raise UserError(f"{' and '.join(names)}: not finite any more: {LOWER_LR} ({self._progress()})")

    def together(self, function: Callable, *args: Any) -> Any:
        """function(*args), after which all ranks go on, or none.

        Where it raises UserError on any rank, finished steps are saved and all ranks stop.  The models must
        not have changed since the last finished step."""
        error = result = None
        try:
            result = function(*args)
        except UserError as failure:
            error = failure
        if self.machine.any(error is not None):
            if self.step > self.saved_step:
                self.save(self.step)
            reason = error or "another process failed"
            raise UserError(f"{reason} ({self._progress()}; --resume does this step again)") from error
        return result

    def log(self, step: int, metrics: dict[str, Any], note: str = "") -> None:
        """Write the metrics of a finished step; `note` formats some of them for the progress bar."""
        self.phase(None)
        self.step = step
        self.logger.log(step, metrics | self.times | {"time/seconds": self.elapsed})
        if step == 1 and metrics.get("val/eos_rate") == 0 and getattr(self.config, "stop", True):
            self.print(logs.NONE_ENDED)
        self.bar.set_postfix_str(note.format(**metrics), refresh=False)

    def checkpoint(self, step: int, due: bool, best: bool = False) -> None:
        """Save if it is due or if the run was asked to stop; then stop, unless this step was the last.

        All ranks leave at the same step, or some would wait for the others for ever.
        """
        stop = self.machine.any(bool(self.stop_signal))
        if due or stop:
            self.save(step, best=best)
        if stop and step < self.total:
            message = f"stopped at step {step} of {self.total}"
            remedy = f"the same command with --resume goes on from {self.out}"
            raise Stopped(f"{message}; {remedy}", self.stop_signal or signal.SIGTERM)

    def _ask_to_stop(self, signum: int, frame: Any) -> None:
        if self.stop_signal and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop_signal:
            raise Stopped("stopped at once; --resume goes on from the last checkpoint", signum)
        self.stop_signal = signum
        with contextlib.suppress(RuntimeError):  # raised where the signal came while the bar was written
            print("\nstopping after this step (again to stop at once)", file=sys.stderr)
