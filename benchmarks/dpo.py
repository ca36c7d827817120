"""Seconds and memory per DPO step, of minirlhf and of TRL, on the same work.

    python -m venv .peer116 && .peer116/bin/pip install -r benchmarks/peers/requirements-1.16.txt   # once
    python benchmarks/dpo.py --peer-python .peer116/bin/python       # the table, and results/dpo.json
    python benchmarks/dpo.py --tables                                # runs nothing: prints the table

TRL 1.16.0, which has no PPO trainer any more: that one is measured in an environment of its own (ppo.py).  Ours is
train_dpo.py itself, run as a user runs it, on random weights of the same shape and random texts of fixed lengths.  Each
measurement is a process of its own, whose first steps warm up.  Processes take turns, --rounds times.  The work is
asserted: steps, and the tokens of each.

`small`: 16 pairs per step, prompts of 16 and responses of 32 tokens, 6 layers of width 192, a vocabulary of 4,096.  The
reference's log-probabilities are computed before the first step; their time is divided by the steps of one epoch and
counts.  TRL's default reads the reference in every step: a row of its own.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside, ppo  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from minirlhf import data  # noqa: E402
from minirlhf.support import cli, hardware  # noqa: E402

RESULTS = ROOT / "benchmarks/results/dpo.json"
KEYS = ("n_layer", "n_head", "n_embd", "vocab", "prompt", "response", "end")
WORK = {"small": {key: ppo.SMALL[key] for key in KEYS} | {"pairs": 16}}
OURS = {"fp32": ["--precision", "fp32"], "bf16": ["--precision", "bf16"]}
TRL = {"TRL": True, "TRL, reference in every step": False}  # name: whether it is computed before
WARM_UP = 3  # steps in which memory is still new


def prepare(work: dict, folder: Path, steps: int) -> None:
    """The checkpoint sft with random weights, and pairs: `steps` batches to train on, one to validate on, one to test on."""
    import numpy as np

    ppo.prepare(work, folder)
    rng, wanted = (
        np.random.default_rng(0),
        {"train": steps * work["pairs"], "val": work["pairs"], "test": work["pairs"]},
    )
    digits = lambda n: "".join(map(str, rng.integers(0, 10, n)))  # in this vocabulary each digit is a token
    rows: list[dict] = []
    while any(wanted.values()):
        prompt = digits(work["prompt"] - 1)
        if wanted[split := data.split_of(prompt)]:
            wanted[split] -= 1
            chosen, rejected = digits(work["response"] - 1), digits(work["response"] - 1)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(job: dict) -> None:
    """Run train_dpo.py on the work, in a process of its own, and print what was measured as JSON."""
    import torch

    import train_dpo
    from minirlhf.support.pairs import JudgedPairs

    work, folder = job["work"], Path(job["folder"])
    torch.set_num_threads(job["threads"])
    remember, measure_part, times, tokens = JudgedPairs.remember, train_dpo.measure, [], []

    def timed(self, *args):
        start = time.perf_counter()
        remember(self, *args)
        times.append(time.perf_counter() - start)

    def counted(config, run, policy, pairs, sampling):
        if torch.is_grad_enabled():
            tokens.append(int(pairs.texts.host_mask.sum()))
        return measure_part(config, run, policy, pairs, sampling)

    JudgedPairs.remember, train_dpo.measure = timed, counted
    options = {
        "init": folder / "sft",
        "data": folder / "pairs.jsonl",
        "out": job["out"],
        "batch": work["pairs"],
        "lr": 1e-5,
    }
    sys.argv = [
        "train_dpo.py",
        *(str(x) for name, value in options.items() for x in (f"--{name}", value)),
        *job["options"],
    ]
    cpu = time.process_time()
    cli.run_script(train_dpo.main)
    cpu = time.process_time() - cpu
    lines = [json.loads(line) for line in (Path(job["out"]) / "metrics.jsonl").read_text().splitlines()]
    reference = times[0] / len(lines)  # of the training pairs; those of validation are not work of TRL's
    found = [
        {"reference": reference, "update": line["time/pairs"] + line["time/update"], "tokens": count}
        for line, count in zip(lines, tokens, strict=True)
    ]
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"steps": found, "peak_mb": peak, "cpu_seconds": cpu}))


def measure(python: str, script: str, job: dict) -> dict:
    """What a process measured, without its first steps.  The work that it did is asserted."""
    found, work = beside.child(python, script, job), job["work"]
    texts = 2 * work["pairs"]
    assert len(found["steps"]) == job["steps"], found
    assert all(step["tokens"] == texts * (work["prompt"] + work["response"]) for step in found["steps"]), (
        found
    )
    return found | {"steps": found["steps"][WARM_UP:]}


def run(args: argparse.Namespace, name: str) -> dict[str, list[dict]]:
    """{a variant of TRL's or of ours: its measurements}; processes take turns."""
    found: dict[str, list[dict]] = {}
    steps = WARM_UP + args.steps
    with tempfile.TemporaryDirectory() as folder:
        prepare(WORK[name], Path(folder), steps)
        job = {"work": WORK[name], "threads": args.threads, "steps": steps, "folder": folder}
        for k in range(args.rounds):
            for variant, precompute in TRL.items() if args.peer_python else []:
                peer = job | {"out": f"{folder}/trl-{precompute}-{k}", "precompute": precompute}
                found.setdefault(variant, []).append(
                    measure(args.peer_python, "benchmarks/peers/trl_dpo.py", peer)
                )
            for variant in args.variants:
                mine = job | {"out": f"{folder}/{variant}-{k}", "options": OURS[variant]}
                found.setdefault(variant, []).append(measure(sys.executable, "benchmarks/dpo.py", mine))
            print(f"{name}: round {k + 1} of {args.rounds}", flush=True)
    return found


def summary(runs: list[dict]) -> dict[str, float]:
    """Medians over all steps that count (seconds) and over processes."""
    steps = [step for run in runs for step in run["steps"]]
    found = {key: median(step[key] for step in steps) for key in ("reference", "update", "tokens")}
    seconds = sorted(step["reference"] + step["update"] for step in steps)
    found |= {"seconds": median(seconds), "fastest": seconds[0], "slowest": seconds[-1]}
    found |= {"peak_mb": median(r["peak_mb"] for r in runs)}
    return found | {"cpu": median(r["cpu_seconds"] / (len(r["steps"]) + WARM_UP) for r in runs)}


def report(known: dict[str, dict]) -> tuple[str, list[str]]:
    """(the table, what is below its bound: nothing, since no bound is set)."""
    rows = []
    for name in [name for name in WORK if name in known]:
        found = {v: summary(runs) for v, runs in known[name].items() if v in (*TRL, *OURS)}
        for variant, row in found.items():
            ratio = lambda key, row=row, found=found: f"{found['TRL'][key] / row[key]:.2f}"
            beside_trl = variant != "TRL" and "TRL" in found
            rows.append(
                [
                    f"{name}: {variant}",
                    f"{row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f})",
                    f"{row['reference']:.3f} + {row['update']:.3f}",
                    ratio("seconds") if beside_trl else "",
                    f"{row['tokens'] / row['seconds']:.0f}",
                    f"{row['cpu']:.2f}",
                    f"{row['peak_mb']:.0f}",
                    ratio("peak_mb") if beside_trl else "",
                ]
            )
    head = ["s per step (range)", "reference + update", "TRL's time / this", "tokens/s", "CPU s", "peak MB"]
    return table([*head, "TRL's peak / this"], rows), []


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=3, peer=beside.PEER_116)
    parser.add_argument("--work", choices=WORK, nargs="+", default=[*WORK])
    parser.add_argument(
        "--variants", choices=OURS, nargs="+", help="Default: fp32, and bf16 where it is native."
    )
    parser.add_argument(
        "--steps", type=cli.number(cli.Count), default=20, help="Steps per process that count."
    )
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    args.variants = args.variants or ([*OURS] if hardware.has_fast_bf16() else ["fp32"])
    beside.conclude(*report(beside.collect(parser, args, args.work, run)), args.check)


if __name__ == "__main__":
    cli.run_script(main)
