"""What Triton kernels ask of a GPU, read from compiled code without one, and whether ours keep their bounds.

    python -m kernels.audit                                # our kernels, for sm_80, sm_90, sm_100 and gfx942
    python -m kernels.audit --check --json audit.json      # and exit with 1 if a bound is exceeded
    python -m kernels.audit package.module:CASES           # anyone's kernels, by the same meters

The meters are in meters.py. Per kernel and target, the audit prints registers, stack, spills and shared
memory, and for each innermost loop that touches global memory the accesses of one trip, its instructions per
byte, barriers and shuffles. A loop that should wait for memory must not wait for issue slots: an H100 can
issue about ten thread-instructions for each byte that it can read.

Per call, forward and backward, it prints the bytes that the kernels ask for, and the memory that buffers
take. The minimum of bytes is each tensor argument (in backward also each upstream gradient) read once, and
each result written once. Extra memory is the peak of all buffers alive at once, less the results; a library's
own memory (cuBLAS's workspace) is not seen. Bytes are those of Triton kernels alone. They are counted in
Triton's interpreter, in a child process, because Triton chooses between its interpreter and its compiler when
it is imported.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .command import Mistake, Parser, find, run
from .meters import NUMBERS, byte_trace, capture, read


@dataclass(frozen=True)
class Case:
    """A call to audit. inputs("meta") are full-size arguments, inputs("cpu") small ones to interpret."""

    name: str
    call: Callable[..., Any]
    inputs: Callable[[str], Sequence[Any]]


def nbytes(values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def phases(case: Case, device: str, meter: Callable) -> Iterator[tuple[str, Any, int, int]]:
    """Call forward, then backward -> phase, what the meter saw, least bytes to move, bytes of the results."""
    inputs = case.inputs(device)
    with meter() as seen:
        outputs = tree_leaves(case.call(*inputs))
    yield f"{case.name} forward", seen, nbytes(inputs) + nbytes(outputs), nbytes(outputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in outputs if x.requires_grad]
    if leaves and outputs:
        upstream = [torch.ones_like(x) for x in outputs]
        with meter() as seen:
            grads = torch.autograd.grad(outputs, leaves, upstream)
        yield f"{case.name} backward", seen, nbytes(inputs) + nbytes(upstream) + nbytes(grads), nbytes(grads)


def trace(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """The bytes that each call asks for, and the distinct ones (bytes loaded and stored count twice)."""
    import numpy as np

    np.seterr(all="ignore")  # only addresses matter here
    rows = {}
    for call, (asked, touched), minimum, _ in (
        seen for case in cases for seen in phases(case, "cpu", byte_trace)
    ):
        distinct = sum(np.unique(np.concatenate(addresses)).size for addresses in touched.values())
        requested = sum(counted.total() for counted in asked.values())
        rows[call] = {"requested": requested, "distinct": distinct, "minimum": minimum, "by_argument": asked}
    return rows


def our_cases() -> list[Case]:
    import kernels

    def logits(count: int, V: int, dtype: torch.dtype, masked: bool, device: str) -> list[Any]:
        """Logits (the second frozen), tokens; if `masked`: temperature and mask, and nothing is frozen."""
        N = 8192 if device == "meta" else 3
        rows = [
            torch.randn(N, V, device=device).to(dtype).requires_grad_(i == 0 or masked) for i in range(count)
        ]
        rows.append(torch.zeros(N, dtype=torch.int64, device=device))
        return [*rows, 0.7, torch.ones(N, dtype=torch.bool, device=device)] if masked else rows

    def hidden(sizes: tuple[int, int, int], dtype: torch.dtype, masked: bool, device: str) -> list[Any]:
        N, V, C = sizes if device == "meta" else (192, 300, 80)
        rows = [torch.randn(n, C, device=device).to(dtype).requires_grad_() for n in (N, V)]
        rows.append(torch.zeros(N, dtype=torch.int64, device=device))
        return [*rows, 0.7, torch.ones(N, dtype=torch.bool, device=device)] if masked else rows

    def steps(masked: bool, device: str) -> list[Any]:
        B, T = (4096, 2048) if device == "meta" else (5, 300)
        flags = torch.full((B, T), masked, device=device)
        rewards, values = torch.randn(2, B, T, device=device)
        return [
            rewards,
            values,
            flags if masked else None,
            None if masked else flags,
            torch.zeros(B, device=device),
        ]

    cases = []
    rows = [(V, "bfloat16", "") for V in (50257, 151936, 1031)] + [(50257, "float32", " masked")]
    for V, dtype, note in rows:
        for count, call in enumerate((kernels.token_logprobs, kernels.token_kl), 1):
            inputs = partial(logits, count, V, getattr(torch, dtype), bool(note))
            cases.append(Case(f"{call.__name__} {dtype} V={V}{note}", call, inputs))
    qwen, gpt2 = (8192, 151936, 4096), (2048, 50257, 768)  # N, V, C
    for sizes, dtype, note in ((qwen, "bfloat16", ""), (qwen, "bfloat16", " masked"), (gpt2, "float32", "")):
        inputs = partial(hidden, sizes, getattr(torch, dtype), bool(note))
        cases.append(Case(f"linear_token_logprobs {dtype}{note}", kernels.linear_token_logprobs, inputs))
    for note in (" with dones", " masked"):
        cases.append(Case(f"gae float32{note}", kernels.gae, partial(steps, note == " masked")))
    return cases


def worst(*measures: str) -> Callable[[dict[str, Any]], float]:
    """The largest sum of these measures over the inner loops; inf if there is none: nothing was measured."""
    return lambda row: max((sum(loop[m] for m in measures) for loop in row["loops"]), default=math.inf)


ROWS = "^token_(logprobs|kl) "
BOUNDS = [  # the bound; the calls (and, of kernels, targets) that it is about; the measure; its largest value
    (
        "bytes requested, forward and backward, V >= 1031: <= 1.01 x the minimum",
        "calls",
        ROWS,
        lambda row: row["requested"] / row["minimum"],
        1.01,
    ),
    ("load/store width at V=50257: 128-bit, edges aside", "kernels", ROWS + ".*V=50257", worst("narrow"), 0),
    (
        "instructions per byte in the inner loop, log-prob + entropy forward: <= 6",
        "kernels",
        "^token_logprobs bf.*forward cuda",
        worst("instructions_per_byte"),
        6,
    ),
    (
        "instructions per byte in the inner loop, KL forward: <= 8",
        "kernels",
        "^token_kl bf.*forward cuda",
        worst("instructions_per_byte"),
        8,
    ),
    (
        "instructions per byte in the inner loop, backward: <= 6",
        "kernels",
        ROWS + "bf.*backward cuda",
        worst("instructions_per_byte"),
        6,
    ),
    ("barriers + shuffles in the inner loop: 0", "kernels", ROWS, worst("barrier", "shuffle"), 0),
    (
        "stack and spills, sm_80, sm_90, sm_100, gfx942: 0",
        "kernels",
        "",
        lambda row: row["stack"] + row["spills"],
        0,
    ),
    (
        "linear-fused forward, extra memory at N=8192, V=151936: <= 10 MiB",
        "calls",
        "^linear.* forward",
        lambda row: row["extra"] / 2**20,
        10,
    ),
    (
        "linear-fused backward, extra memory besides the gradients: <= 64 MiB",
        "calls",
        "^linear.* backward",
        lambda row: row["extra"] / 2**20,
        64,
    ),
    ("GAE, distinct bytes: 1.0 x", "calls", "^gae", lambda row: row["distinct"] / row["minimum"], 1.0),
]


def missed(report: dict[str, Any]) -> list[str]:
    """One line per measurement above its bound, per kernel that does not compile, per bound not measured."""
    rows = {
        "calls": report["calls"],
        "kernels": {f"{c} {k['target']}": k for k in report["kernels"] for c in k["calls"]},
    }
    lines = [f"{name}: {row['error']}" for name, row in rows["kernels"].items() if "error" in row]
    for bound, table, pattern, measure, limit in BOUNDS:
        found = {
            name: measure(r)
            for name, r in rows[table].items()
            if re.search(pattern, name) and "error" not in r
        }
        lines += [f"{bound}: {value:.4g} in {name}" for name, value in found.items() if value > limit]
        lines += [] if found else [f"{bound}: not measured"]
    return lines


def audit(cases: Sequence[Case], spec: list[str], targets: Sequence[str]) -> dict[str, Any]:
    """All measurements of the cases. `spec` names them to the child process."""
    child = [sys.executable, "-m", "kernels.audit", *spec, "--trace"]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # what went wrong is on standard error
        raise Mistake(
            "the calls above failed in Triton's interpreter: see Case.inputs in kernels/tools/audit.py"
        )
    calls = json.loads(done.stdout)
    kernels: dict[tuple[str, ...], dict[str, Any]] = {}
    for target, case in ((target, case) for target in targets for case in cases):
        for call, (made, buffers), _, results in phases(case, "meta", partial(capture, target)):
            calls[call] |= {"extra": buffers.peak - results, "results": results}
            for name, kernel in made:  # calls may share a compiled kernel
                key = name, target, getattr(kernel, "hash", str(kernel))
                if key not in kernels:
                    kernels[key] = {"kernel": name, "target": target, "calls": [], **read(kernel)}
                if call not in kernels[key]["calls"]:
                    kernels[key]["calls"].append(call)
    versions = {"torch": torch.__version__, "triton": sys.modules["triton"].__version__}
    return {"versions": versions, "kernels": list(kernels.values()), "calls": calls}


def show(report: dict[str, Any]) -> None:
    widths = lambda counts: "+".join(f"{n}x{bits}" for bits, n in counts.items()) or "-"
    print(
        "target       regs  stack spills shared   inner loop: loads stores (count x bits) instructions/byte"
    )
    print(f"{'':41s}(instructions barriers shuffles)")
    calls = None
    for row in sorted(report["kernels"], key=lambda row: (row["calls"], row["kernel"])):
        if calls != (calls := (row["kernel"], row["calls"])):
            print(f"{row['kernel']}: {', '.join(row['calls'])}")
        loops = (
            f"{widths(x['load'])} {widths(x['store'])} {x['instructions_per_byte']:.2f} "
            f"({x['instructions']} {x['barrier']} {x['shuffle']})"
            for x in row.get("loops", [])
        )
        if "error" in row:
            print(f"  {row['target']:10s} {row['error']}")
        else:
            numbers = "".join(f"{row[n]:7d}" for n in NUMBERS)
            found = "; ".join(loops) or f"no loop: {widths(row['load'])} {widths(row['store'])}"
            print(f"  {row['target']:10s}{numbers}   {found}")
    titles = ("bytes", "distinct", "minimum", "ratio", "extra MiB", "results")
    print(f"\n{'':41s}" + "".join(f"{title:>11s}" for title in titles))
    for call, row in report["calls"].items():
        numbers = "".join(f" {row[n]:10d}" for n in ("requested", "distinct", "minimum"))
        memory = "".join(f" {row[n] / 2**20:10.2f}" for n in ("extra", "results"))
        print(f"{call:41s}{numbers} {row['requested'] / row['minimum']:10.4f}{memory}")


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m kernels.audit", description=__doc__, formatter_class=formatter)
    add, targets = parser.add_argument, "cuda:80,cuda:90,cuda:100,hip:gfx942"
    add(
        "cases",
        nargs="*",
        default=["kernels.tools.audit:our_cases"],
        metavar="package.module:CASES",
        help="list of kernels.audit.Case, or function that returns one (default: our kernels)",
    )
    add(
        "--targets",
        default=targets,
        help="targets to compile for, with commas between (default: %(default)s)",
    )
    add("--json", type=Path, help="write all measurements to this file")
    add(
        "--check",
        action="store_true",
        help="compare our kernels with their bounds; exit with 1 if one is exceeded",
    )
    add("--trace", action="store_true", help="print only the bytes, as JSON; this is for the child process")
    args = parser.parse_args()
    for target in args.targets.split(","):
        if not re.fullmatch(r"cuda:\d+|hip:gfx\w+", target):
            raise Mistake(f"--targets: {target!r} is not of the form cuda:90 or hip:gfx942")
    if args.json and not args.json.absolute().parent.is_dir():
        raise Mistake(f"--json {args.json}: there is no such folder")
    return args


def cases_of(spec: str) -> list[Case]:
    """The cases that package.module:NAME names."""
    found = find(spec, "CASES")
    found = found() if callable(found) else found
    if not isinstance(found, list | tuple) or not all(hasattr(case, "inputs") for case in found):
        raise Mistake(f"{spec} is no list of kernels.audit.Case")
    return list(found)


def report_on() -> int:
    """Print the report, and return the exit code. Raises Mistake."""
    args = parse()
    if importlib.util.find_spec("triton") is None:
        raise Mistake("needs triton, which is not installed (pip install triton)")
    os.environ["TRITON_INTERPRET"] = str(int(args.trace))  # before triton is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default changes in triton 3.10
    cases = [case for spec in args.cases for case in cases_of(spec)]
    if args.trace:
        print(json.dumps(trace(cases)))
        return 0
    report = audit(cases, args.cases, args.targets.split(","))
    show(report)
    misses = missed(report) if args.check else []
    print("".join(f"\nMISSED {line}" for line in misses))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(misses))


def main() -> int:
    return run("kernels.audit", report_on)


if __name__ == "__main__":
    sys.exit(main())
