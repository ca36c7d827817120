"""A stage's process and its folder: where it computes, what it started from, how it logs, saves, resumes and
stops.

`Run` serves all three scripts alike.  It knows the folder and the process, and nothing of the algorithm's
step:

    run = Run("ppo", config)                          # device, ranks, precision; OUT is free, unfinished or complete
    if not run.begin(source, init=sft_dir): return    # complete, from the same data and checkpoints: nothing to do
    run.resume(tokenizer, model, optimizer=optimizer) # the state of the last checkpoint, if there is one
    for step in run.loop(total): ...                  # progress bar, seeds, Ctrl-C
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minirlhf import Stopped, UserError, checkpoint, data, optim
from minirlhf.rollout import Texts
from minirlhf.support import claims, ledger, logs, steps
from minirlhf.support.cli import Count, Seed, check_ranges
from minirlhf.support.files import Lock
from minirlhf.support.hardware import (
    frozen_dtype,
    pick_precision,
    seed_everything,
    setup_machine,
    trim_freed_memory,
)
from minirlhf.support.logs import MetricLogger

STREAMS = {"sft": 1, "rm": 2, "ppo": 3}  # a stage's own random numbers


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options that all three stages share."""

    out: Path = Path("runs/demo/stage")
    """Folder for checkpoints and metrics.  Earlier stages are looked for beside it (sft, rm)."""
    data: str = "vader"
    """Source of the texts: vader (built in), toy (generated), or a file or folder (.jsonl, .jsonl.gz,
    .txt)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset.  Default: the user's cache."""
    skip_bad: bool = False
    """Skip and count malformed rows instead of stopping at the first."""
    too_long: Literal["error", "drop", "cut"] = "drop"
    """What happens to a prompt that does not fit the context: stop, drop and count the row, or cut its
    beginning."""
    resume: bool = False
    """Continue from the newest checkpoint in OUT, bit for bit [D21]; start where there is none."""
    overwrite: bool = False
    """Start again even if OUT holds a run, which is lost."""
    tensorboard: bool = False
    """Write TensorBoard events, too."""
    seed: Seed = 1
    """Random seed, 0 or larger."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products.  auto: bf16 where the hardware multiplies it natively."""
    train_layers: Count | None = None
    """Train only this many last blocks and what follows them.  Default: everything.  What is frozen is kept
    in --precision and has no dropout."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: far less memory, a third more
    time."""
    compile: bool = False
    """Compile the blocks with torch.compile; worth it in long runs only."""

    def __post_init__(self) -> None:
        check_ranges(self)  # first: the checks of a script divide by its numbers
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite replaces it: give one of them")


class Run:
    """One stage's process and folder."""

    def __init__(self, stage: str, config: RunConfig):
        """Finds device and ranks, locks OUT, and decides whether to start, to resume or that there is nothing
        to do.

        Raises UserError where OUT holds another run, cannot be resumed, or is in use.
        """
        self.stage, self.config, self.out = stage, config, config.out
        self.machine = setup_machine()
        self.device, self.rank, self.world = self.machine.device, self.machine.rank, self.machine.world
        self.precision = pick_precision(config.precision)
        self.lock: Lock | None = None
        if self.rank == 0 and self.out.exists():
            self.lock = Lock(self.out)
        self.state = self._claim()
        self.step, self.saved_step, self.seconds = 0, 0, 0.0
        self.inputs: dict[str, Any] = {}
        self.about: dict[str, Any] = {}  # what config.json says beside the usual
        self.times: dict[str, float] = {}  # of the running step, by metric name
        self.current_phase, self.phase_began = None, 0.0
        self.stop_signal = 0
        self.seed(0)

    # --------------------------------------------------------------------------------------------- the folder

    def _claim(self) -> str:
        """'start', 'resume' or 'complete'."""
        if self.config.overwrite:
            return "start"
        whole = (self.out / "latest" / "config.json").is_file()
        self.saved = checkpoint.load_config(self.out) if whole else None
        settings = checkpoint.settings_of(self.config)
        state = claims.claim(self.out, self.saved, self.stage, settings, self.config.resume)
        if state == "resume" and self.saved.get("world", self.world) != self.world:
            self.print(
                f"{self.out}: begun with {self.saved['world']} processes, now {self.world}: other random draws"
            )
        return state

    def begin(self, source: data.Dataset, **checkpoints: Path | None) -> bool:
        """Whether there is work to do.  Records the data and the checkpoints that this run starts from.

        Raises UserError where the run in OUT was made from others.
        """
        self.inputs = {"data": source.sha256}
        for name, path in checkpoints.items():
            if path is not None:
                checkpoint.refuse_stale(path, "init", checkpoints["init"])
                self.inputs |= {name: checkpoint.fingerprint(path), f"{name}_path": str(path)}
        self.about["data"] = {"name": source.name, "sha256": source.sha256}
        self.print(source.describe())
        if self.state != "start":
            claims.compare_inputs(self.out, self.saved, self.inputs)
        if self.state == "complete":
            if self.rank == 0:
                steps.sweep(self.out)
            self.print(f"{self.out} is complete: nothing to do (--overwrite to run it again)")
        return self.state != "complete"

    def account(self, what: str, counts: Counter[str]) -> None:
        """Print what became of every row, and record it in config.json."""
        self.about.setdefault("rows", {})[what] = dict(counts)
        self.print(f"{what}: {ledger.account(counts)}")

    def resume(self, tokenizer, model: nn.Module, counters: dict | None = None, **parts: Any) -> dict:
        """Load the last checkpoint, if the run goes on, and open the logs -> the counters.

        `model` is what the next stage will read; `parts` are the other modules and optimizers that training
        changes."""
        if self.rank == 0 and self.lock is None:
            self.lock = Lock(self.out)
            if self._claim() != self.state:
                raise UserError(f"{self.out}: another process has begun a run here: choose another --out")
        self.tokenizer, self.model, self.parts, self.counters = tokenizer, model, parts, counters or {}
        if self.state == "resume":
            tensors, state = checkpoint.load_trainer(self.out)
            model.load_state_dict(checkpoint.load_state(self.out))
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    prefix = f"{name}."
                    part.load_state_dict(
                        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                    )
                else:
                    checkpoint.unpack_optimizer(part, tensors, state["optimizers"][name], f"{name}.")
            self.counters |= state["counters"]
            self.step = self.saved_step = state["step"]
            self.seconds = state["seconds"]
        elif self.rank == 0:
            steps.forget(self.out)
        self.logger = MetricLogger(self.out, self.rank, self.config.tensorboard, self.step)
        return self.counters

    def save(self, step: int, complete: bool = False, best: bool = False, **about: Any) -> None:
        """Write the checkpoint of `step`, the best so far or not; `about` goes into its config.json."""
        tensors: dict[str, Tensor] = {}
        optimizers: dict[str, dict] = {}
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                tensors |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
            else:
                packed, optimizers[name] = checkpoint.pack_optimizer(part, f"{name}.")
                tensors |= packed
        state = {"step": step, "seconds": self.elapsed, "counters": self.counters, "optimizers": optimizers}
        shape = self.model.config if hasattr(self.model, "config") else self.model.members[0].backbone.config
        more = {"inputs": self.inputs, "world": self.world} | self.about | about
        described = checkpoint.describe(
            self.stage, shape, self.config, step, complete, self.tokenizer, **more
        )
        if self.rank == 0:
            trainer = {"tensors": tensors, "state": state}
            checkpoint.save(self.out, step, self.model.state_dict(), described, self.tokenizer, trainer, best)
        self.saved_step = step

    # --------------------------------------------------------------------------------------------- the process

    def autocast(self):
        """The context in which models compute, at this run's precision."""
        return self.machine.autocast(self.precision)

    def sum_(self, x: Tensor) -> Tensor:
        """x, summed over the ranks in place."""
        self.machine.sum_([x])
        return x

    def means(self, per_text: dict[str, Tensor], count: int) -> dict[str, float]:
        """The mean of each tensor [B] over all ranks, `count` numbers in all."""
        sums = optim.Sums()
        sums.add({name: values.sum() / count for name, values in per_text.items()})
        return sums.over_ranks(self.machine)

    def print(self, text: str) -> None:
        """Print on rank 0 alone."""
        if self.rank == 0:
            tqdm.write(text)

    @property
    def frozen_dtype(self) -> torch.dtype:
        return frozen_dtype(self.precision)

    @property
    def elapsed(self) -> float:
        """Seconds spent in the loop, those before a resume included."""
        running = time.perf_counter() - self.started if getattr(self, "started", None) else 0.0
        return self.seconds + running

    def loop(self, total: int, first: int | None = None) -> Iterator[int]:
        """The steps still to do, 0-based, each with its own seeds and with Ctrl-C and SIGTERM held back until
        its end."""
        self.started, self.total = time.perf_counter(), total
        before = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        first = self.step if first is None else first
        self.bar = tqdm(range(first, total), initial=first, total=total, disable=self.rank > 0)
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
        """Seed all generators from (seed, stage, parts): 0 before the first step, (step + 1, rank) in a step [D21].

        The stage is among them, so that no two stages draw the same numbers.
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
        """optim.take_step -> the gradient's norm; where it is not finite, nothing moves and the run ends in
        one line."""
        try:
            return optim.take_step(self.machine, optimizer, max_norm, name)
        except UserError as error:
            raise UserError(f"{error} ({self._where()})") from None

    def require_finite(self, **quantities: Tensor) -> None:
        """End the run in one line, on all ranks, where one of these tensors holds nan or inf on any rank."""
        bad = torch.stack([(~torch.isfinite(x.detach())).any().float() for x in quantities.values()])
        names = [name for name, count in zip(quantities, self.sum_(bad).tolist(), strict=True) if count]
        if names:
            remedy = "lower the learning rate, or train in --precision fp32"
            raise UserError(f"{' and '.join(names)}: not finite any more: {remedy} ({self._where()})")

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
            raise UserError(f"{reason} ({self._where()}; --resume does this step again)") from error
        return result

    def _where(self) -> str:
        last = (
            f"the last good checkpoint is that of step {self.saved_step}"
            if self.saved_step
            else "no checkpoint yet"
        )
        return f"{self.stage}, step {self.step + 1}; {last}"

    # --------------------------------------------------------------------------------------------- the end of a step

    def log(self, step: int, metrics: dict[str, Any], note: str = "") -> None:
        """Write the metrics of a finished step.  `note`, a format string over them, is shown in the progress
        bar."""
        self.phase(None)
        self.step = step
        self.logger.log(step, metrics | self.times | {"time/seconds": self.elapsed})
        self.bar.set_postfix_str(note.format(**metrics), refresh=False)

    def record_texts(
        self,
        step: int,
        texts: Texts,
        per_text: dict[str, Tensor],
        kl_coef: float,
        show: bool,
        every: int | None,
    ) -> None:
        """Append the texts to OUT/samples.jsonl at every `every`-th step, and print three of them if asked
        to."""
        write = bool(every) and step % every == 0
        if self.rank == 0 and (show or write):
            rows = logs.sample_rows(*texts.decode(self.tokenizer), per_text)
            if write:
                self.logger.write("samples", step, rows)
            if show:
                self.print(logs.show_rows(rows[:3], kl_coef))

    def checkpoint(self, step: int, due: bool, best: bool = False) -> None:
        """Save if it is due or if the run was asked to stop; then stop, unless this step was the last.

        All ranks leave at the same step, or some would wait for the others for ever.
        """
        stop = self.machine.any(bool(self.stop_signal))
        if due or stop:
            self.save(step, best=best)
        if stop and step < self.total:
            message = f"stopped at step {step} of {self.total}; the same command with --resume goes on from {self.out}"
            raise Stopped(message, self.stop_signal or signal.SIGTERM)

    def _ask_to_stop(self, signum: int, frame: Any) -> None:
        if self.stop_signal:
            raise KeyboardInterrupt
        self.stop_signal = signum
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)
