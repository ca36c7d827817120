"""Seconds and memory per PPO iteration as the batch, the responses, the width and the vocabulary grow: one table each.

    python benchmarks/scaling.py                     # about 5 minutes; writes results/scaling.json
    python benchmarks/scaling.py --tables            # runs nothing: prints the tables
    python benchmarks/scaling.py --ranks             # about 10 minutes; one process or two: results/ranks.json
    python benchmarks/scaling.py --ranks --tables

train_ppo.py runs the small work of benchmarks/ppo.py in bf16. One number of the work changes at a time and takes four
values. Each measurement is a process of its own: two iterations to warm up and --iterations that count.

--ranks runs the same work on two cores in three ways, in turn, --rounds times: one process with two threads, two processes
with one thread each, and two that share the models (--shard). It is in fp32: where a CPU has no bf16 products, bf16 would
measure their emulation alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from benchmarks.ppo import OURS, SMALL, WARM_UP, command, measure, prepare, summary  # noqa: E402
from minirlhf.support import cli  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scaling.json"
AXES = {
    "batch": (16, 32, 64, 128),
    "response": (16, 32, 64, 128),
    "n_embd": (96, 192, 384, 768),
    "vocab": (1024, 4096, 16384, 50257),
}
RANKS = {  # processes, and options
    "1 process, 2 threads": (1, []),
    "2 processes, 1 thread each": (2, []),
    "2 processes, sharded": (2, ["--shard"]),
}
NAMES = {
    "batch": "responses per batch",
    "response": "tokens per response",
    "n_embd": "width",
    "vocab": "vocabulary",
}


def run(args: argparse.Namespace, axis: str) -> dict[str, dict]:
    """{value: what one process measured}."""
    found = {}
    for value in AXES[axis]:
        work = SMALL | {axis: value}
        with tempfile.TemporaryDirectory() as folder:
            prepare(work, Path(folder))
            job = {"work": work, "threads": args.threads, "iterations": WARM_UP + args.iterations, "folder": folder,
                   "out": f"{folder}/out", "options": OURS["bf16"]}  # fmt: skip
            found[str(value)] = measure(sys.executable, "benchmarks/ppo.py", job)
        print(f"{axis} {value}", flush=True)
    return found


def rows_of(axis: str, found: dict[str, dict]) -> str:
    rows, measured = [], {value: summary([one]) for value, one in found.items()}
    for value, row in measured.items():
        parts = [f"{row[part]:.2f}" for part in ("seconds", "rollout", "score", "update")]
        rows.append(
            [
                value,
                *parts,
                f"{row['tokens'] / row['seconds']:.0f}",
                f"{row['peak_mb']:.0f}",
            ]
        )
    head = f"{NAMES[axis]}, s per iteration, rollout, scoring, update, tokens/s, peak MB"
    return table(head.split(", "), rows)


def on_ranks(args: argparse.Namespace, _: str) -> dict[str, list[list[float]]]:
    """{way: seconds of each iteration that counts, one list per round}; the ways take turns."""
    found: dict[str, list[list[float]]] = {way: [] for way in RANKS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(SMALL, Path(folder))
        for k in range(args.rounds):
            for way, (processes, options) in RANKS.items():
                out = Path(folder, f"{k}-{len(found[way])}-{processes}{len(options)}")
                job = {"work": SMALL, "iterations": WARM_UP + args.iterations, "folder": folder, "out": str(out),
                       "options": [*OURS["fp32"], *options]}  # fmt: skip
                launch = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(processes),
                ]
                environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
                subprocess.run(
                    [*launch, *command(job)], cwd=ROOT, env=environment, check=True, capture_output=True
                )
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                ends = [line["time/seconds"] for line in lines]
                seconds = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
                found[way].append(seconds[WARM_UP:])
            print(f"ranks: round {k + 1} of {args.rounds}", flush=True)
    return found


def table_of_ranks(found: dict[str, list[list[float]]]) -> str:
    seconds = {way: median(s for each in rounds for s in each) for way, rounds in found.items()}
    first, tokens = next(iter(seconds.values())), SMALL["batch"] * SMALL["response"]
    rows = [[way, f"{s:.2f}", f"{tokens / s:.0f}", f"{first / s:.2f}"] for way, s in seconds.items()]
    return table(["two cores", "s per iteration", "response tokens/s", "throughput / one process"], rows)


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=1)
    parser.add_argument("--ranks", action="store_true", help="Compare one process with two, instead.")
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=3, help="Iterations per process that count."
    )
    args = parser.parse_args()
    if args.ranks:
        args.out = args.out if args.out != RESULTS else RESULTS.with_name("ranks.json")
        print(table_of_ranks(beside.collect(parser, args, ["ranks"], on_ranks)["ranks"]))
        return
    known = beside.collect(parser, args, AXES, run)
    print("\n\n".join(rows_of(axis, known[axis]) for axis in AXES))


if __name__ == "__main__":
    cli.run_script(main)
