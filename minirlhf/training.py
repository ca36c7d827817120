"""What the three stage scripts share and no equation needs: command line, devices, seeds, optimiser, logs, stopping.

Distributed runs (`torchrun`) replicate the model and sum gradients: every loss in this project is a sum over tokens divided
by the number of tokens in the whole batch, over all ranks, so summing is all there is to do [D17].
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import io
import json
import math
import os
import platform
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from minirlhf import UserError, checkpoint

Config = TypeVar("Config")


# ----------------------------------------------------------------------------- command line


def parse_config(presets: dict[str, Config], description: str, argv: list[str] | None = None) -> Config:
    """The preset's dataclass with the command line on top.  An option that does not exist is one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]
    chosen = next((b for a, b in zip(argv, [*argv[1:], ""], strict=False) if a == "--preset"), "demo")
    if chosen not in presets:
        raise UserError(f"--preset {chosen!r} is not one of {', '.join(presets)}")
    default = presets[chosen]
    for field in dataclasses.fields(default):  # tyro would keep the last of --reward a --reward b, and drop a
        if isinstance(getattr(default, field.name), tuple):
            argv = join_repeated(argv, "--" + field.name.replace("_", "-"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                type(default), default=default, args=argv, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[^\x20-\x7e]+", " ", said.getvalue())  # tyro draws a box around what it says
        raise UserError(re.sub(r"\s+", " ", words).strip(" -") + " (--help lists every option)") from None
    if unknown:
        options = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(default)]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        raise UserError(f"unknown option {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help"))
    return config


def check_positive(config: Any, *names: str) -> None:
    """Refuse a config whose named numbers are not above 0 (nan included); None is no number and passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def join_repeated(argv: list[str], option: str) -> list[str]:
    """--reward a --lr 1 --reward b  ->  --lr 1 --reward a b"""
    rest, values, taking = [], [], False
    for word in argv:
        taking = word == option if word.startswith("--") else taking
        (values if taking else rest).append(word)
    return rest + values[:1] + [v for v in values if v != option]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------- machine


@dataclasses.dataclass(frozen=True)
class Machine:
    device: torch.device
    rank: int = 0
    world: int = 1

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the ranks, in place."""
        if self.world > 1:
            for t in tensors:
                dist.all_reduce(t)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the ranks; a rank whose shard had no token takes part with zeros [D17]."""
        if self.world > 1:
            for p in parameters:
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    self.sum_([p.grad])

    def autocast(self, precision: str):
        """precision 'fp32' or 'bf16'.  Master weights stay fp32; log-softmax is fp32 in any case [D18]."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def setup_machine(seed: int) -> Machine:
    """Device, process group (under torchrun) and seeds; ranks get the same weights and different samples."""
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, not {seed}")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    seed_everything(seed)
    return Machine(device, rank, world)


def seed_everything(*parts: int) -> None:
    """Seed all generators from numbers such as (seed, step, rank).  Done at each step, it makes that step's randomness a
    function of them, so that no generator's state needs saving for an exact resume [D21]."""
    state = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


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


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: fresh pages for each logits tensor cost more than the arithmetic on it (1.5 x)."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)


def trim_freed_memory(step: int, every: int = 50) -> None:
    """Now and then, give back what no longer fits anything: batches of many widths leave holes in the kept memory."""
    if step % every == 0 and not torch.cuda.is_available():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def fuse_head(asked: str, tokens: int, vocab: int) -> bool:
    """Whether to make logits a tile at a time and twice (once again in backward): where asked to, or where those of a
    forward pass, held at once, would take more than 128 MiB in fp32."""
    return asked == "on" or asked == "auto" and 4 * tokens * vocab > 2**27


def has_fast_bf16() -> bool:
    """bf16 matrix units: without them bf16 on a CPU is emulated and slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    with contextlib.suppress(OSError):
        return bool(re.search(r"avx512_bf16|amx_bf16|bf16", Path("/proc/cpuinfo").read_text()))
    return False


def pick_precision(wish: str) -> str:
    return ("bf16" if has_fast_bf16() else "fp32") if wish == "auto" else wish


def frozen_dtype(precision: str) -> torch.dtype:
    """What frozen matrices are stored in: autocast to bf16 would round them to it at every use."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "minirlhf": metadata_version("minirlhf")}
    return found | {name: metadata_version(name) for name in ("torch", "triton", "numpy", "tiktoken")}


def metadata_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# ----------------------------------------------------------------------------- optimiser


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
    kind = lambda name, p: "embedding" if name.endswith("wte.weight") else "matrix" if p.dim() >= 2 else "vector"
    settings = {
        "matrix": {"weight_decay": weight_decay, "scale": 1.0},
        "embedding": {"weight_decay": weight_decay, "scale": embedding_scale},
        "vector": {"weight_decay": 0.0, "scale": 1.0},
    }
    groups = [{"params": [p for name, p in named if kind(name, p) == k]} | setting for k, setting in settings.items()]
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


# ----------------------------------------------------------------------------- a stage's folder


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
            old = path.read_text().split("\n") if path.exists() else []  # splitlines also splits inside a text
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
                file.write("".join(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows))

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
    wanted = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(config), default=str)).items() if k not in ignored}
    other = sorted(k for k, v in wanted.items() if saved["training"].get(k, v) != v)
    if other:
        raise UserError(f"{out} holds a run with another {', '.join(other)}: choose a new --out, or --overwrite")
    if saved["complete"]:
        return "skip"
    if not resume:
        raise UserError(f"{out} holds an unfinished run (step {saved['step']}): --resume goes on, --overwrite starts again")
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
