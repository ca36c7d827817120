"""A stage's folder and process: what it claims, logs, and how it is interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint
from minirlhf.support.hardware import Machine, versions


def describe(stage: str, shape: Any, config: Any, step: int, complete: bool, tokenizer, **more: Any) -> dict:
    """A checkpoint's config.json: everything that is needed to load the model and to know where it came from."""
    return {
        "stage": stage,
        "model": dataclasses.asdict(shape),
        "training": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "step": step,
        "complete": complete,
        "versions": versions(),
    } | more


class MetricLogger:
    """One JSON object a line in OUT/metrics.jsonl, and TensorBoard if asked; texts, if asked, in OUT/samples.jsonl.
    Ranks above 0 are silent."""

    def __init__(self, out: Path, machine: Machine, tensorboard: bool, keep_until: int):
        """keep_until: lines of later steps belong to work that a resumed run does again, and are dropped [D21]."""
        self.out, self.board = None if machine.rank else out, None
        if machine.rank:
            return
        out.mkdir(parents=True, exist_ok=True)
        if not keep_until:  # a run that starts again: from here on nothing of the old one can be taken for it
            for link in ("latest", "best"):
                (out / link).unlink(missing_ok=True)
        for path in (out / "metrics.jsonl", out / "samples.jsonl"):
            old = (
                path.read_text().split("\n") if path.exists() else []
            )  # splitlines also splits inside a text
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= keep_until]
            path.write_text("".join(line + "\n" for line in kept)) if kept else path.unlink(missing_ok=True)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package: pip install 'minirlhf[track]'") from None
            self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, name: str, step: int, rows: list[dict]) -> None:
        """Append rows to OUT/NAME.jsonl, all with this step."""
        if self.out is not None:
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.write(
                    "".join(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows)
                )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.write("metrics", step, [plain])
        if self.board is not None:
            for name, value in plain.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)


def claim(out: Path, config: Any, resume: bool, overwrite: bool) -> str:
    """What to do with OUT: 'start', 'resume' or 'skip' (finished with the same settings); anything else is refused.

    Settings that do not change the result (where it goes, how it is shown) may differ.
    """
    if not (out / "latest").exists() or overwrite:
        return "start"
    saved = checkpoint.load_config(out)
    ignored = {"out", "resume", "overwrite", "tensorboard", "data_dir", "save_samples", "dry_run", "profile"}
    wanted = {
        k: v
        for k, v in json.loads(json.dumps(dataclasses.asdict(config), default=str)).items()
        if k not in ignored
    }
    other = sorted(k for k, v in wanted.items() if saved["training"].get(k, v) != v)
    if other:
        raise UserError(
            f"{out} holds a run with another {', '.join(other)}: choose a new --out, or --overwrite"
        )
    if saved["complete"]:
        return "skip"
    if not resume:
        raise UserError(
            f"{out} holds an unfinished run (step {saved['step']}): --resume goes on, --overwrite starts again"
        )
    return "resume"


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to stop at its next safe point; a second one stops at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, signum, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    def agreed(self, machine: Machine) -> bool:
        """Whether any rank was asked: all leave at the same step, or some would wait for the others for ever."""
        asked = torch.tensor(float(self.asked), device=machine.device)
        machine.sum_([asked])
        self.asked = bool(asked)
        return self.asked

    def __exit__(self, *exc) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def tracer(out: Path, wanted: bool) -> torch.profiler.profile:
    """To be told of every iteration's end by step(): traces the second, if wanted, to OUT/trace.json."""
    times = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    never = lambda step: torch.profiler.ProfilerAction.NONE
    write = lambda found: found.export_chrome_trace(str(out / "trace.json"))
    return torch.profiler.profile(schedule=times if wanted else never, on_trace_ready=write)


@contextlib.contextmanager
def stopwatch(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to times[name]."""
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start
