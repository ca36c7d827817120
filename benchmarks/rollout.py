"""Sampling, ours and transformers', on the same work, in turn.

    python -m venv .peer && .peer/bin/pip install -r benchmarks/peers/requirements.txt   # the peers' environment, once
    python benchmarks/rollout.py --peer-python .peer/bin/python --check                  # a table, and results/rollout.json
    python benchmarks/rollout.py --tables                                                # runs nothing: the table alone

`minirlhf.rollout.generate`, called as train_ppo.py calls it, beside `GPT2LMHeadModel.generate` with its key-value cache: the
same shapes, random weights, random prompts of equal length, the whole distribution sampled at temperature 1. All responses
have full length: the end of text is out of the distribution at every step, by our `forbidden` and by their `min_new_tokens`,
which both set one logit a row to -inf. Each measurement is a process of its own, with a call to warm up and --calls that
count; processes take turns, --rounds times. The work is asserted in each: tokens, lengths, no end of text.

bf16 is what each side's users have: ours torch.autocast around fp32 weights (attention, sampling and residual stream stay
fp32), transformers' a model stored in bf16. Ours has train_ppo.py's setup_machine as well, by which glibc keeps freed memory;
a row of transformers with the same setting, which its users do not have, shows what that is worth.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside  # noqa: E402
from benchmarks.demo import table  # noqa: E402

RESULTS = ROOT / "benchmarks/results/rollout.json"
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab": 4096, "prompt": 16, "response": 32, "batch": 64}
WORK = {
    "small": SMALL,
    "gpt2": SMALL | {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab": 50257, "batch": 8},
}
SCRIPTS = {"ours": "benchmarks/rollout.py", "transformers": "benchmarks/peers/transformers_generate.py"}
VARIANTS = {  # a row of the table: (whose, what its process is told)
    "transformers, fp32": ("transformers", {"precision": "fp32", "keep_freed": False}),
    "transformers, fp32, keeps freed memory": ("transformers", {"precision": "fp32", "keep_freed": True}),
    "transformers, bf16": ("transformers", {"precision": "bf16", "keep_freed": False}),
    "ours, fp32": ("ours", {"precision": "fp32"}),
    "ours, bf16": ("ours", {"precision": "bf16"}),
}
BASE = "transformers, fp32"
GOALS = {
    "small": {"ours, fp32": 1.8, "ours, bf16": 2.3},
    "gpt2": {"ours, fp32": 1.4, "ours, bf16": 2.0},
}  # times BASE's speed


def ours(job: dict) -> None:
    """In a process of its own; prints what was measured."""
    import torch

    from minirlhf.model import GPT, GPTConfig
    from minirlhf.rollout import generate
    from minirlhf.support import hardware

    work = job["work"]
    torch.set_num_threads(job["threads"])
    machine = hardware.setup_machine(seed=0)
    model = GPT(GPTConfig(work["vocab"], 1024, work["n_layer"], work["n_head"], work["n_embd"])).eval()
    eos, pad = work["vocab"] - 1, work["vocab"] - 2
    prompts = torch.randint(pad, (work["batch"], work["prompt"]))
    seconds = []
    for _ in range(1 + job["calls"]):
        start = time.perf_counter()
        with machine.autocast(job["precision"]):
            responses, mask = generate(
                model,
                prompts,
                torch.ones_like(prompts, dtype=torch.bool),
                work["response"],
                1.0,
                eos,
                pad,
                forbidden=eos,
            )
        seconds.append(time.perf_counter() - start)
        assert (
            responses.shape == (work["batch"], work["response"])
            and mask.all()
            and not (responses == eos).any()
        )
    print(json.dumps({"seconds": seconds[1:], "tokens": responses.numel(), "versions": hardware.versions()}))


def run(args: argparse.Namespace, name: str) -> dict[str, list[dict]]:
    """{variant: its measurements}, taken in turn."""
    pythons = {"ours": sys.executable, "transformers": args.peer_python}
    found: dict[str, list[dict]] = {}
    for k in range(args.rounds):
        for variant in args.variants:
            whose, told = VARIANTS[variant]
            if pythons[whose]:
                job = {"work": WORK[name], "threads": args.threads, "calls": args.calls} | told
                found.setdefault(variant, []).append(one := beside.child(pythons[whose], SCRIPTS[whose], job))
                assert (
                    one["tokens"] == WORK[name]["batch"] * WORK[name]["response"]
                    and len(one["seconds"]) == args.calls
                )
        print(f"{name}: round {k + 1} of {args.rounds}", flush=True)
    return found


def report(known: dict[str, dict]) -> tuple[str, list[str]]:
    """(the table, what missed its goal). Speeds are over all calls of all rounds that count."""
    rows, missed = [], []
    for name in [name for name in WORK if name in known]:
        speeds = {
            variant: sorted(one["tokens"] / s for one in known[name][variant] for s in one["seconds"])
            for variant in VARIANTS if variant in known[name]
        }  # fmt: skip
        for variant, speed in speeds.items():
            times, goal = "", GOALS[name].get(variant)
            if BASE in speeds and variant != BASE:
                ratio = median(speed) / median(speeds[BASE])
                times = f"{ratio:.2f}"
                if goal and ratio < goal:
                    missed.append(f"{name}, {variant}: {ratio:.2f} x, goal {goal:g} x")
            rows.append([f"{name}: {variant}", f"{median(speed):.0f}", f"{speed[0]:.0f} to {speed[-1]:.0f}", times,
                         f">= {goal:g}" if goal else ""])  # fmt: skip
    return table(
        ["response tokens/s", "slowest to fastest call", "times transformers, fp32", "set out to reach"], rows
    ), missed


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=3)
    parser.add_argument("--work", choices=WORK, nargs="+", default=[*WORK])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=[*VARIANTS])
    parser.add_argument("--calls", type=int, default=5, help="that count, of each process")
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    beside.conclude(*report(beside.collect(parser, args, args.work, run)), args.check)


if __name__ == "__main__":
    main()
