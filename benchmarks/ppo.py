"""One PPO iteration, ours and TRL's, on the same work, interleaved.

    python -m venv .trl && .trl/bin/pip install -r benchmarks/peers/trl.txt       # its environment, once
    python benchmarks/ppo.py --trl .trl/bin/python --check                        # prints a table, writes results/ppo.json

TRL 1.12.0 is the last release with a PPO trainer. Ours is train_ppo.py itself, run as a user runs it, on random weights of
the same shapes and random texts; each measurement is a process of its own, which does one iteration to warm up and then some
that count. All take turns, --rounds times. The work is asserted: responses, their tokens, optimiser steps.

Workloads: `small` (6 layers, 192 wide), `gpt2` (GPT-2's shape and vocabulary), `lengths` (small, responses of up to 64 tokens
that end by themselves after 24 on average: an end of text is as likely at every step).
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks/results/ppo.json"
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab": 4096, "prompt": 16, "response": 32, "batch": 64, "minibatch": 16,
         "epochs": 4, "end": 0.0}  # fmt: skip
WORK = {
    "small": SMALL,
    "gpt2": SMALL | {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab": 50257, "batch": 8, "minibatch": 8, "epochs": 1},
    "lengths": SMALL | {"response": 64, "end": 0.038},  # min(geometric, 64) has mean 24
}
OURS = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "shared trunk, bf16": ["--precision", "bf16", "--shared-trunk"],
}
GOALS = {  # TRL's seconds an iteration over ours; its peak memory over ours
    "small": {"seconds": (1.5, 2.4, 4.0), "peak_mb": (1.7, None, 2.1)},
    "gpt2": {"seconds": (1.4, 2.4, 3.8), "peak_mb": (1.3, None, 1.6)},
    "lengths": {"seconds": (3.0, 4.0, 6.0), "peak_mb": (None, None, None)},
}


def end_everywhere(gpt, eot: int, probability: float) -> None:
    """Give the end of text this probability at every step: a constant of the last norm that its embedding alone sees."""
    import torch

    logit = math.log(probability * gpt.config.vocab_size / (1 - probability)) if probability else -30.0
    with torch.no_grad():
        gpt.ln_f.bias.fill_(1 / math.sqrt(gpt.config.n_embd))
        gpt.wte.weight[eot] = logit * gpt.ln_f.bias


def prepare(work: dict, folder: Path) -> None:
    """Checkpoints sft and rm of random weights, and texts whose first tokens are prompts."""
    import numpy as np
    import torch

    import train_rm
    import train_sft
    from minirlhf import checkpoint, training
    from minirlhf.model import GPT, GPTConfig, RewardEnsemble
    from minirlhf.tokenizer import BYTES, Tokenizer

    torch.manual_seed(0)
    letters = [bytes([b]) for b in range(256) if chr(b).isalpha()]
    pieces = BYTES + [a + b for a in letters for b in letters]
    pieces += [p + c for p in pieces[256:] for c in letters]
    tokenizer = Tokenizer({piece: i for i, piece in enumerate(pieces[: work["vocab"] - 2])})
    shape = GPTConfig(work["vocab"], 1024, work["n_layer"], work["n_head"], work["n_embd"])
    policy, reward = GPT(shape), RewardEnsemble(shape)
    end_everywhere(policy, tokenizer.eot, work["end"])
    head = {"pooling": "last", "members": 1, "mlp": True}
    for stage, model, config, more in (
        ("sft", policy, train_sft.Config(), {}),
        ("rm", reward, train_rm.Config(), {"head": head}),
    ):
        about = training.describe(stage, shape, config, 0, True, tokenizer, **more)
        checkpoint.save(folder / stage, 0, model.state_dict(), about, tokenizer)
    rng = np.random.default_rng(0)
    ascii_letters = [p.decode() for p in letters if p.isascii()]
    words = ["".join(rng.choice(ascii_letters, 4)) for _ in range(4000)]
    rows = [{"text": " ".join(rng.choice(words, 40))} for _ in range(4000)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(job: dict) -> None:
    """In a process of its own: train_ppo.py on the work; prints what was measured."""
    import torch

    import train_ppo
    from minirlhf import training

    work, folder = job["work"], Path(job["folder"])
    torch.set_num_threads(job["threads"])
    options = {"init": folder / "sft", "reward-model": folder / "rm", "data": folder / "texts.jsonl", "out": job["out"],
               "prompt-tokens": work["prompt"] - 1, "response-tokens": work["response"], "batch": work["batch"],
               "minibatch": work["minibatch"], "epochs": work["epochs"], "iterations": job["iterations"], "lr": 1e-5,
               "value-lr": 1e-5, "save-every": 10**6, "missing-eos": "none"}  # fmt: skip
    sys.argv = ["train_ppo.py", *(str(x) for name, value in options.items() for x in (f"--{name}", value)), *job["options"]]
    cpu = time.process_time()
    training.run_script(train_ppo.main)
    cpu = time.process_time() - cpu
    lines = [json.loads(line) for line in (Path(job["out"]) / "metrics.jsonl").read_text().splitlines()]
    ends = [0.0] + [line["time/seconds"] for line in lines]
    found = [{part: line[f"time/{part}"] for part in ("rollout", "score", "update")}
             | {"seconds": end - start, "tokens": line["val/response_length"] * work["batch"]}
             for line, start, end in zip(lines, ends, ends[1:], strict=False)]  # fmt: skip
    steps = sum(line["optimizer_steps"] for line in lines)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"iterations": found, "optimizer_steps": steps, "peak_mb": peak, "cpu_seconds": cpu}))


def measure(python: str, script: str, job: dict) -> dict:
    """One process's last line of JSON; its first iteration does not count."""
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(ROOT / script), "--job", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    work = job["work"]
    assert found["optimizer_steps"] == job["iterations"] * work["epochs"] * work["batch"] // work["minibatch"], found
    for iteration in found["iterations"]:  # fixed lengths are exact; drawn ones have the same mean
        full = work["batch"] * work["response"]
        assert iteration["tokens"] == full if not work["end"] else 0.2 * full < iteration["tokens"] < 0.6 * full, iteration
    return found | {"iterations": found["iterations"][1:]}


def run(args: argparse.Namespace, name: str) -> dict[str, list[dict]]:
    """{'TRL' or a variant: its measurements}, taken in turn."""
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(WORK[name], Path(folder))
        job = {"work": WORK[name], "threads": args.threads, "iterations": args.iterations + 1, "folder": folder}
        for k in range(args.rounds):
            if args.trl:
                peer = job | {"out": f"{folder}/trl-{k}"}
                found.setdefault("TRL", []).append(measure(args.trl, "benchmarks/peers/trl_ppo.py", peer))
            for variant in args.variants:
                mine = job | {"out": f"{folder}/{variant}-{k}".replace(" ", "-"), "options": OURS[variant]}
                found.setdefault(variant, []).append(measure(sys.executable, "benchmarks/ppo.py", mine))
            print(f"{name}: round {k + 1} of {args.rounds}", flush=True)
    return found


def summary(runs: list[dict]) -> dict[str, float]:
    """Medians over all iterations that count (seconds) and over processes."""
    iterations = [i for run in runs for i in run["iterations"]]
    found = {key: median(i[key] for i in iterations) for key in ("seconds", "rollout", "score", "update", "tokens")}
    seconds = sorted(i["seconds"] for i in iterations)
    return found | {"fastest": seconds[0], "slowest": seconds[-1], "peak_mb": median(r["peak_mb"] for r in runs),
                    "cpu": median(r["cpu_seconds"] for r in runs)}  # fmt: skip


def table(name: str, found: dict[str, list[dict]]) -> tuple[str, list[str]]:
    """(Markdown, what missed its goal)."""
    rows = {variant: summary(runs) for variant, runs in found.items()}
    head = "| | s an iteration (range) | rollout | scoring | update | response tokens/s | peak MB | TRL / ours: time | memory |"
    lines, missed = [f"| {name}" + head[1:], "|---" * 9 + "|"], []
    for variant, row in rows.items():
        ratios = ["", ""]
        if "TRL" in rows and variant != "TRL":
            for i, key in enumerate(("seconds", "peak_mb")):
                goal, ratio = GOALS[name][key][[*OURS].index(variant)], rows["TRL"][key] / row[key]
                ratios[i] = f"{ratio:.2f}" + (f" (goal {goal:g})" if goal else "")
                if goal and ratio < goal:
                    missed.append(f"{name}, {variant}: {key} {ratio:.2f} x, goal {goal:g} x")
        cells = [f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
                 *(f"{row[key]:.2f}" for key in ("rollout", "score", "update")), f"{row['tokens'] / row['seconds']:.0f}",
                 f"{row['peak_mb']:.0f}", *ratios]  # fmt: skip
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines), missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the python of an environment with TRL 1.12.0; left out: ours alone")
    parser.add_argument("--work", choices=WORK, nargs="+", default=[*WORK])
    parser.add_argument("--variants", choices=OURS, nargs="+", default=[*OURS])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--iterations", type=int, default=3, help="that count, of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    parser.add_argument("--tables", action="store_true", help="only the tables of the results that are there")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if args.tables else args.work:
        known[name] = run(args, name)
        known["machine"] = {"cpu": platform.processor(), "threads": args.threads, "python": platform.python_version()}
        RESULTS.write_text(json.dumps(known, indent=1))
    missed = []
    for name in WORK:
        if name in known:
            text, below = table(name, known[name])
            print(f"\n{text}")
            missed += below
    print(*(f"\nmissed: {m}" for m in missed), sep="")
    if args.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
