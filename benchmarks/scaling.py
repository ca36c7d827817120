"""Seconds and memory per PPO iteration as the batch, the responses, the width and the vocabulary grow: one table each.

    python benchmarks/scaling.py            # about 5 minutes; writes results/scaling.json
    python benchmarks/scaling.py --tables   # runs nothing: prints the tables

train_ppo.py runs the small work of benchmarks/ppo.py in bf16. One number of the work changes at a time and takes four
values. Each measurement is a process of its own: two iterations to warm up and --iterations that count.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from benchmarks.ppo import OURS, SMALL, WARM_UP, measure, prepare, summary  # noqa: E402
from minirlhf.support import cli  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scaling.json"
AXES = {
    "batch": (16, 32, 64, 128),
    "response": (16, 32, 64, 128),
    "n_embd": (96, 192, 384, 768),
    "vocab": (1024, 4096, 16384, 50257),
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


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=1)
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=3, help="Iterations per process that count."
    )
    args = parser.parse_args()
    known = beside.collect(parser, args, AXES, run)
    print("\n\n".join(rows_of(axis, known[axis]) for axis in AXES))


if __name__ == "__main__":
    cli.run_script(main)
