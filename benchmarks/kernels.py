"""Time and memory of the kernels beside what people use instead, all in one run.

    python benchmarks/kernels.py                             # on a GPU where there is one, else on CPU
    python benchmarks/kernels.py --op gae linear --check     # some operations; exit 1 where a bound is missed
    python benchmarks/kernels.py --small --out /tmp/x.json   # tiny shapes, no memory: does everything run?
    python -m kernels.audit benchmarks.kernels:public_cases  # audit the public kernels installed here

All contenders do the same work: they get the same inputs, and their results and gradients are compared with
ours before anything is timed. They take turns, round by round, so that a slow minute hits all of them; a
ratio is the median of the rounds' ratios.

On a GPU, time is measured by CUDA events, with the L2 cache flushed before each measurement, and memory by
PyTorch's allocator. Each time stands beside the time that a plain copy, measured in the same run, takes for
the bytes that cannot be avoided; for linear_token_logprobs also beside the time of the matrix products that
cannot be avoided, at the rate that a large product reaches in the same run.

On a CPU, time is wall time in this process (--clock process: seconds of all its threads). Peak memory is
measured in a child process per contender: the high-water mark of resident memory (VmHWM, reset just before
the call) less what was resident before. That counts every page touched, by any allocator, with gradients and
workspaces.
"""

import argparse
import ctypes
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# Before this folder, which Python puts there for a script, and in which `kernels` would be this very file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gae, linear_token_logprobs, token_kl, token_logprobs
from kernels.tools.audit import Case, nbytes

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "ours"
TRL_CHUNK = 32768  # columns of its tiles, as its trainers set it
BOUNDS = [  # for --check: operation, contender, measure, our share of the contender's at most
    ("linear_token_logprobs", "log_softmax + gather", "seconds", 1.15),
    ("linear_token_logprobs", "log_softmax + gather", "memory", 1 / 4),
    ("gae", "loop over T", "seconds", 1 / 3),
    ("gae", "torchrl", "seconds", 1.0),
    ("gae with dones", "loop over T", "seconds", 1 / 3),
    ("gae with dones", "torchrl", "seconds", 1.0),
]


# What people use instead. Each takes what our function takes, and returns the first or all of its results.


def plain(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    return (logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1),)


def plain_with_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, tokens[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def cross_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    return (-F.cross_entropy(logits.float(), tokens, reduction="none"),)


def plain_kl(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    picked, ref_picked = (x.gather(-1, tokens[:, None]).squeeze(-1) for x in (logp, ref_logp))
    p = logp.exp()
    return picked, ref_picked, -(p * logp).sum(-1), (p * (logp - ref_logp)).sum(-1)


def gae_loop(
    rewards: Tensor, values: Tensor, mask: None, dones: Tensor | None, last: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    advantages, carry, following = torch.empty_like(rewards), torch.zeros_like(last), last
    for t in reversed(range(rewards.shape[1])):
        alive = 1.0 if dones is None else (~dones[:, t]).float()
        carry = rewards[:, t] + gamma * alive * following - values[:, t] + gamma * lam * alive * carry
        advantages[:, t], following = carry, values[:, t]
    return advantages, advantages + values


def installed(*modules: str) -> bool:
    """Whether these modules import. A package that is there but broken counts as missing, and is reported."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    except Exception as error:
        print(f"{modules[0]} does not import: {type(error).__name__}", file=sys.stderr)
        return False
    return True


def liger_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Liger computes the gradient in forward, in place of the logits; one number scales it for all rows."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, tokens, None, -100, 0.0, 0.0, "none")[0]


def public_logprobs() -> dict[str, Callable]:
    calls = {}
    if installed("trl.trainer.utils"):
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

        calls["TRL selective_log_softmax"] = lambda x, tokens: (selective_log_softmax(x, tokens),)
        calls["TRL selective_log_softmax_and_entropy"] = selective_log_softmax_and_entropy
    if DEVICE == "cuda" and installed("liger_kernel.ops.cross_entropy"):
        calls["Liger cross entropy"] = lambda x, tokens: (-liger_losses(x, tokens),)
    return calls


def public_linear() -> dict[str, Callable]:
    if not installed("trl.kernels.chunked_logprob"):
        return {}
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    call = lambda h, w, tokens: ChunkedLogProbFunction.apply(
        h, w, None, tokens, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return {"TRL chunked_logprob": lambda *inputs: call(*inputs)[:2]}


def public_gae() -> dict[str, Callable]:
    if not installed("torchrl.objectives.value.functional"):
        return {}
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def call(rewards, values, mask, dones, last, gamma, lam):
        following = torch.cat([values[:, 1:], last[:, None]], 1)
        dones = torch.zeros_like(rewards, dtype=torch.bool) if dones is None else dones
        columns = (x[..., None] for x in (values, following, rewards, dones))
        return tuple(x.squeeze(-1) for x in vec_generalized_advantage_estimate(gamma, lam, *columns))

    return {"torchrl": call}


# The operations


@dataclass(frozen=True)
class Operation:
    inputs: Callable[[bool], Sequence[Any]]  # tiny or full-size
    graded: tuple[int, ...]  # the results that backward starts from
    contenders: dict[str, Callable]
    products: tuple[int, int] = (0, 0)  # matrix products that forward and backward cannot avoid


GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32


def of_logits(count: int, V: int) -> Callable[[bool], list[Tensor]]:
    def inputs(tiny: bool) -> list[Tensor]:
        n, v = (2, 7) if tiny else (8192 if GPU else 1024, V)
        rows = [3 * torch.randn(n, v, device=DEVICE).to(DTYPE) for _ in range(count)]
        return [rows[0].requires_grad_(), *rows[1:], torch.randint(v, (n,), device=DEVICE)]

    return inputs


def of_hidden(tiny: bool) -> list[Tensor]:
    n, v, c = (2, 7, 8) if tiny else (8192, 151936, 4096) if GPU else (2048, 50257, 768)
    h, w = torch.randn(n, c, device=DEVICE), torch.randn(v, c, device=DEVICE) / c**0.5
    return [h.to(DTYPE).requires_grad_(), w.to(DTYPE).requires_grad_(), torch.randint(v, (n,), device=DEVICE)]


def of_steps(with_dones: bool) -> Callable[[bool], list[Any]]:
    def inputs(tiny: bool) -> list[Any]:
        b, t = (2, 7) if tiny else (4096, 2048) if GPU else (512, 1024)
        rewards, values = torch.randn(2, b, t, device=DEVICE).unbind()
        dones = torch.rand(b, t, device=DEVICE) < 1 / 256 if with_dones else None
        return [rewards, values, None, dones, torch.randn(b, device=DEVICE), 0.99, 0.95]

    return inputs


def compiled(function: Callable) -> dict[str, Callable]:
    return {"torch.compile": torch.compile(function, dynamic=False)} if GPU else {}


def logprobs(V: int) -> Operation:
    calls = {OURS: token_logprobs, "log_softmax + gather": plain, "the same and entropy": plain_with_entropy}
    calls |= {"F.cross_entropy": cross_entropy, **compiled(plain_with_entropy), **public_logprobs()}
    return Operation(of_logits(1, V), (0,), calls)


def kl(V: int) -> Operation:
    calls = {OURS: token_kl, "log_softmax twice": plain_kl, **compiled(plain_kl)}
    return Operation(of_logits(2, V), (0, 3), calls)


def linear() -> Operation:
    of_product = lambda function: lambda hidden, weight, tokens: function(hidden @ weight.T, tokens)
    calls = {OURS: linear_token_logprobs, "log_softmax + gather": of_product(plain)}
    calls |= {"F.cross_entropy": of_product(cross_entropy), **public_linear()}
    return Operation(of_hidden, (0,), calls, products=(1, 3))  # logits; again for backward, and two gradients


def advantages(with_dones: bool) -> Operation:
    return Operation(of_steps(with_dones), (), {OURS: gae, "loop over T": gae_loop} | public_gae())


OPERATIONS: dict[str, Callable[[], Operation]] = {
    **{f"token_logprobs V={V}": partial(logprobs, V) for V in ((50257, 151936) if GPU else (50257,))},
    **{f"token_kl V={V}": partial(kl, V) for V in ((50257, 151936) if GPU else (50257,))},
    "linear_token_logprobs": linear,
    "gae": partial(advantages, False),
    "gae with dones": partial(advantages, True),
}


# Measuring


def run(
    op: Operation, call: Callable, inputs: Sequence[Any], timed: Callable
) -> tuple[float, float, Any, Any]:
    """Forward and backward on copies of the inputs -> seconds of each, results, gradients."""
    copies = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
    ]
    forward, outputs = timed(lambda: call(*copies))
    leaves = [x for x in copies if isinstance(x, Tensor) and x.requires_grad]
    starts = [outputs[i] for i in op.graded if i < len(outputs)]
    if not starts:
        return forward, 0.0, outputs, ()
    upstream = [torch.ones_like(x) for x in starts]
    backward, grads = timed(lambda: torch.autograd.grad(starts, leaves, upstream))
    return forward, backward, [x.detach() for x in outputs], grads


def stopwatch(clock: str = "") -> Callable[[Callable], tuple[float, Any]]:
    now = {"wall": time.perf_counter, "process": time.process_time}.get(clock)

    def on_cpu(function: Callable) -> tuple[float, Any]:
        start = now()
        result = function()
        return now() - start, result

    if now:
        return on_cpu
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times the L2 cache

    def events(function: Callable) -> tuple[float, Any]:
        flush.zero_()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result

    return events


def same(name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Raise AssertionError unless equal but for rounding (of bf16 logits on a GPU): else the work differs."""
    tolerance = 2e-2 if GPU else 1e-3
    for a, b in zip(got, want, strict=False):  # a contender may return fewer results
        error, size = float((a.float() - b.float()).abs().max()), float(b.abs().max())
        assert a.shape == b.shape and error <= tolerance * size, (name, a.shape, b.shape, error, size)


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def measure_memory(op: Operation, name: str) -> int:
    """Peak bytes that one forward and backward add to what was there, with results and gradients."""
    timed = lambda function: (0.0, function())
    call = op.contenders[name]
    run(op, call, op.inputs(True), timed)  # libraries, threads, code
    inputs = op.inputs(False)
    copied = nbytes(inputs)  # `run` copies them
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(op, call, inputs, timed)
        return torch.cuda.max_memory_allocated() - before - copied
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left behind must not hide what this one takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run(op, call, inputs, timed)
    return resident("VmHWM") - before - copied


def in_child(op: str, name: str) -> int:
    command = [sys.executable, __file__, "--memory", op, name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def measure(name: str, op: Operation, args: argparse.Namespace, clock: str) -> dict[str, Any]:
    timed, inputs = stopwatch(clock), op.inputs(args.small)
    _, _, want, want_grads = run(op, op.contenders[OURS], inputs, timed)
    moved = nbytes(inputs) + nbytes(want)
    moved_back = nbytes(inputs) + nbytes([want[i] for i in op.graded]) + nbytes(want_grads)
    for contender, call in op.contenders.items():
        _, _, got, grads = run(op, call, inputs, timed)
        same(f"{name}, {contender}", got, want)
        same(f"{name}, {contender}, gradients", grads, want_grads)
        del got, grads
    results = nbytes(want) + nbytes(want_grads)
    del want, want_grads
    samples: dict[str, dict[str, list[float]]] = {
        contender: {"forward": [], "backward": []} for contender in op.contenders
    }
    for _ in range(args.rounds):
        for contender, call in op.contenders.items():
            forward, backward, *_ = run(op, call, inputs, timed)
            samples[contender]["forward"].append(forward)
            samples[contender]["backward"].append(backward)
    shapes = [list(x.shape) for x in inputs if isinstance(x, Tensor)]
    del inputs
    for contender, sample in samples.items():
        sample["seconds"] = [f + b for f, b in zip(sample["forward"], sample["backward"], strict=True)]
        if not args.small:
            sample["memory"] = in_child(name, contender) if DEVICE == "cpu" else measure_memory(op, contender)
    found = {"shapes": shapes, "results_bytes": results, "contenders": samples}
    found["bytes_at_least"] = {"forward": moved, "backward": moved_back * bool(op.graded)}
    if any(op.products):
        (n, c), (v, _) = shapes[:2]
        each = 2 * n * v * c
        found["flop_at_least"] = {"forward": op.products[0] * each, "backward": op.products[1] * each}
    return found


def copy_rate() -> float:
    """Bytes per second, read and written, of the plainest copy of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target, timed = torch.empty_like(source), stopwatch()
    return 2 * source.numel() / median(timed(lambda: target.copy_(source))[0] for _ in range(20))


def product_rate() -> float:
    """Operations per second of a large matrix product in the benchmark's dtype."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(DTYPE).unbind()
    timed = stopwatch()
    return 2 * 8192**3 / median(timed(lambda: a @ b)[0] for _ in range(10))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "trl", "liger-kernel", "torchrl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_facts() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    facts = {
        "device": DEVICE,
        "cpu": cpu[1] if cpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if DEVICE == "cuda":
        rates = {"copy_bytes_per_second": copy_rate(), "product_flop_per_second": product_rate()}
        facts |= {"device": torch.cuda.get_device_name(), **rates}
    return facts | {"versions": versions()}


# Reporting


def ratio(result: dict[str, Any], contender: str, measure: str) -> float:
    """Ours over theirs."""
    ours, theirs = (result["contenders"][name][measure] for name in (OURS, contender))
    return median(a / b for a, b in zip(ours, theirs, strict=True)) if measure == "seconds" else ours / theirs


def shares_of_floor(result: dict[str, Any], facts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{contender: {phase: floor / time}}. The floor: the time of the bytes, or of the products if longer."""
    floors = {
        phase: moved / facts["copy_bytes_per_second"] for phase, moved in result["bytes_at_least"].items()
    }
    for phase, work in result.get("flop_at_least", {}).items():
        floors[phase] = max(floors[phase], work / facts["product_flop_per_second"])
    return {
        contender: {phase: floor / median(sample[phase]) for phase, floor in floors.items() if floor}
        for contender, sample in result["contenders"].items()
    }


def show(name: str, result: dict[str, Any], facts: dict[str, Any]) -> None:
    print(f"\n{name}, shapes {result['shapes']}, results {result['results_bytes'] / 2**20:.1f} MiB")
    titles = f"{'forward':>11s}{'backward':>11s}{'both, ms (quartiles)':>31s}{'ours/it':>9s}"
    print(f"{'':38s}{titles}{'peak MiB':>10s}{'ours/it':>8s}")
    for contender, sample in result["contenders"].items():
        low, middle, high = (1e3 * q for q in quantiles(sample["seconds"], n=4))
        forward, backward = (1e3 * median(sample[phase]) for phase in ("forward", "backward"))
        line = f"{contender:38s}{forward:11.2f}{backward:11.2f}{f'{middle:.2f} ({low:.2f}-{high:.2f})':>31s}"
        line += f"{ratio(result, contender, 'seconds'):9.2f}"
        if "memory" in sample:
            line += f"{sample['memory'] / 2**20:10.1f}{ratio(result, contender, 'memory'):8.2f}"
        for phase, share in result.get("share_of_floor", {}).get(contender, {}).items():
            line += f" {phase} {share:.0%} of the floor's rate"
        print(line, flush=True)


def misses(results: dict[str, Any]) -> list[str]:
    """One line for each bound that is missed. Prints the value of each bound."""
    found = []
    for op, contender, measure, limit in BOUNDS:
        bound = f"{op}: at most {limit:.3f} x {contender} in {measure}"
        measured = results.get(op, {}).get("contenders", {})
        if measure not in measured.get(contender, ()):
            print(f"{'not measured':14s} {bound}")
            continue
        value = ratio(results[op], contender, measure)
        print(f"{'met' if value <= limit else 'MISSED':6s} {value:7.3f} {bound}")
        found += [bound] if value > limit else []
    return found


def public_cases() -> list[Case]:
    """The Triton kernels of TRL and Liger, where installed, for `python -m kernels.audit`."""

    def inputs(V: int, large: int, device: str) -> list[Tensor]:
        n = large if device == "meta" else 3
        x = torch.randn(n, V, device=device if large > 3 else "cpu").bfloat16()
        return [x.requires_grad_(), torch.zeros(n, dtype=torch.int64, device=x.device)]

    cases = []
    for V in (50257, 151936):
        if installed("triton", "trl.kernels.logprob_entropy"):
            from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

            cases.append(
                Case(
                    f"TRL logprob_entropy V={V}", selective_log_softmax_and_entropy, partial(inputs, V, 8192)
                )
            )
        if installed("triton", "liger_kernel.ops.cross_entropy"):
            # It looks at the tokens: no meta tensors.
            cases.append(Case(f"Liger cross_entropy V={V}", liger_losses, partial(inputs, V, 3)))
    return cases


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--op", nargs="+", default=[""], help="measure only operations whose names begin with one of these")
    add("--without", nargs="+", default=[], help="leave out contenders whose names begin with one of these")
    add(
        "--rounds",
        type=int,
        default=7,
        help="measurements of each contender, at least 2 (default: %(default)s)",
    )
    add("--clock", choices=("wall", "process"), default="wall",
        help="clock on a CPU; process: seconds of all threads, for a busy machine")  # fmt: skip
    add("--out", type=Path, help="JSON file (default: benchmarks/results/kernels_<device>.json)")
    add("--small", action="store_true", help="use tiny shapes, and do not measure memory")
    add("--check", action="store_true", help="exit with 1 if a bound that was measured is missed")
    add("--memory", nargs=2, help=argparse.SUPPRESS)  # what a child process does
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, not {args.rounds}")
    torch.manual_seed(0)
    if args.memory:
        op, contender = args.memory
        print(measure_memory(OPERATIONS[op](), contender))
        return 0
    clock = "CUDA events" if GPU else args.clock
    facts = device_facts() | {"clock": clock, "rounds": args.rounds}
    slug = re.sub(r"\W+", "-", facts["device"].lower())
    out = args.out or ROOT / f"benchmarks/results/kernels_{slug}.json"
    results, failed = {}, {}
    for name, make in OPERATIONS.items():
        if not name.startswith(tuple(args.op)):
            continue
        op = make()
        for contender in [c for c in op.contenders if c.startswith(tuple(args.without))]:
            del op.contenders[contender]
        try:
            results[name] = measure(name, op, args, clock)
        except Exception as error:  # the other operations are measured all the same
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            if GPU:
                results[name]["share_of_floor"] = shares_of_floor(results[name], facts)
            show(name, results[name], facts)
        if GPU:
            torch.cuda.empty_cache()
        found = facts | {"operations": results} | ({"failed": failed} if failed else {})
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(facts))
    missed = [] if args.small else misses(results)
    return int(bool(failed) or (bool(missed) and args.check))


if __name__ == "__main__":
    sys.exit(main())
