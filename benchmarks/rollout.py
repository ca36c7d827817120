"""Response tokens per second of minirlhf's sampler and of transformers', on the same work.

    python -m venv .peer && .peer/bin/pip install -r benchmarks/peers/requirements.txt   # the peers' environment, once
    python benchmarks/rollout.py --peer-python .peer/bin/python                          # the table, and results/rollout.json
    python benchmarks/rollout.py --tables                                                # runs nothing: prints the table

`minirlhf.rollout.generate`, called as train_ppo.py calls it, beside `GPT2LMHeadModel.generate` with its key-value cache: the
same shapes, random weights, random prompts of equal length, the whole distribution sampled at temperature 1. All responses
have full length: the end of text is out of the distribution at every step, by our `forbidden` and by their `min_new_tokens`,
which both set one logit per row to -inf. Each measurement is a process of its own, with one call to warm up and --calls
that count. Processes take turns, --rounds times. The work is asserted in each: tokens, lengths, no end of text.

bf16 is what the users of each library have: torch.autocast around fp32 weights here (attention, sampling and the residual
stream stay fp32), a model stored in bf16 in transformers. Ours also has train_ppo.py's setup_machine, which tells glibc to
keep freed memory. One row gives transformers the same setting, which its users do not have, to show what that is worth.
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
VARIANTS = {  # a row of the table: (whose, options of its process)
    "transformers, fp32": ("transformers", {"precision": "fp32", "keep_freed": False}),
    "transformers, fp32, keeps freed memory": ("transformers", {"precision": "fp32", "keep_freed": True}),
    "transformers, bf16": ("transformers", {"precision": "bf16", "keep_freed": False}),
    "ours, fp32": ("ours", {"precision": "fp32"}),
    "ours, bf16": ("ours", {"precision": "bf16"}),
}
BASE = "transformers, fp32"
BOUNDS = {  # for --check: times BASE's speed, at least
    "small": {"ours, fp32": 1.8, "ours, bf16": 2.3},
    "gpt2": {"ours, fp32": 1.4, "ours, bf16": 2.0},
}


def ours(job: dict) -> None:
    """Sample in a process of its own, and print what was measured as JSON."""
    import torch

    from minirlhf.model import GPT, GPTConfig
    from minirlhf.rollout import Sampling, generate
    from minirlhf.support import hardware

    work = job["work"]
    torch.set_num_threads(job["threads"])
    machine = hardware.setup_machine()
    hardware.seed_everything(0)
    model = GPT(GPTConfig(work["vocab"], 1024, work["n_layer"], work["n_head"], work["n_embd"])).eval()
    eos, pad = work["vocab"] - 1, work["vocab"] - 2
    prompts = torch.randint(pad, (work["batch"], work["prompt"]))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    sampling = Sampling(work["response"], 1.0, eos, pad, forbidden=eos)
    seconds = []
    for _ in range(1 + job["calls"]):
        start = time.perf_counter()
        with machine.autocast(job["precision"]):
            texts = generate(model, prompts, mask, sampling)
        seconds.append(time.perf_counter() - start)
        assert texts.responses.shape == (work["batch"], work["response"])
        assert texts.response_mask.all() and not (texts.responses == eos).any()
    tokens = texts.responses.numel()
    print(json.dumps({"seconds": seconds[1:], "tokens": tokens, "versions": hardware.versions()}))


def run(args: argparse.Namespace, name: str) -> dict[str, list[dict]]:
    """{variant: its measurements}; processes take turns."""
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
    """(the table, what is below its bound).  Speeds are over all calls of all rounds that count."""
    rows, missed = [], []
    for name in [name for name in WORK if name in known]:
        speeds = {
            variant: sorted(one["tokens"] / s for one in known[name][variant] for s in one["seconds"])
            for variant in VARIANTS if variant in known[name]
        }  # fmt: skip
        for variant, speed in speeds.items():
            times = ""
            if BASE in speeds and variant != BASE:
                ratio, bound = median(speed) / median(speeds[BASE]), BOUNDS[name].get(variant, 0.0)
                times = f"{ratio:.2f}"
                if ratio < bound:
                    missed.append(f"{name}, {variant}: {ratio:.2f} x, bound {bound:g} x")
            rows.append(
                [f"{name}: {variant}", f"{median(speed):.0f}", f"{speed[0]:.0f} to {speed[-1]:.0f}", times]
            )
    return table(["response tokens/s", "slowest to fastest call", "times transformers, fp32"], rows), missed


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=3)
    parser.add_argument("--work", choices=WORK, nargs="+", default=[*WORK])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=[*VARIANTS])
    parser.add_argument("--calls", type=int, default=5, help="Calls per process that count.")
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    beside.conclude(*report(beside.collect(parser, args, args.work, run)), args.check)


if __name__ == "__main__":
    main()
