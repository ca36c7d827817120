"""Seconds and memory per iteration of PPO or GRPO, of minirlhf and of TRL, on the same work.

    python -m venv .peer && .peer/bin/pip install -r benchmarks/peers/requirements.txt   # the peers' environment, once
    python benchmarks/ppo.py --peer-python .peer/bin/python                              # the table, and results/ppo.json
    python benchmarks/ppo.py --tables                                                    # runs nothing: prints the table
    python benchmarks/ppo.py --tried --work small                                        # what did not make it faster

    python -m venv .peer116 && .peer116/bin/pip install -r benchmarks/peers/requirements-1.16.txt
    python benchmarks/ppo.py --algorithm grpo --peer-python .peer116/bin/python          # the table, and results/grpo.json

TRL 1.12.0 is the last release with a PPO trainer, 1.16.0 a recent one with GRPO. Ours is train_ppo.py itself, run as a user
runs it, on random weights of the same shapes and random texts. Each measurement is a process of its own, which runs two
iterations to warm up and then those that count. Processes take turns, --rounds times. The work is asserted: responses, their
tokens, optimiser steps, and how many responses the models read with and without gradients.

Workloads: `small` (6 layers, 192 wide), `gpt2` (GPT-2's shape and vocabulary), `lengths` (small, responses of up to 64 tokens
that end by themselves after 24 on average: an end of text is as likely at every step). GRPO draws 8 responses for each prompt,
makes one pass over them, and has k3 in the loss. Its reward is the number of characters on both sides, which costs nothing: no
reward model is measured. TRL runs in its fastest configuration (benchmarks/peers/trl_grpo.py says which). Ours in fp32 stands
beside TRL in fp32; ours in bf16 beside the better of TRL in fp32 and in bf16. Where the CPU does not multiply bf16 natively,
it is slow in both libraries, and left out unless --variants names it.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from minirlhf.support import cli, hardware  # noqa: E402

RESULTS = ROOT / "benchmarks/results/ppo.json"
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab": 4096, "prompt": 16, "response": 32, "batch": 64, "minibatch": 16,
         "epochs": 4, "end": 0.0}  # fmt: skip
WORK = {
    "small": SMALL,
    "gpt2": SMALL
    | {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab": 50257, "batch": 8, "minibatch": 8, "epochs": 1},
    "lengths": SMALL | {"response": 64, "end": 0.038},  # min(geometric, 64) has mean 24
}
GRPO = {"group": 8, "kl_coef": 0.05, "epochs": 1}  # what GRPO changes in each of them
PEERS = {  # by algorithm: the peer's script, and by the name of its row what the row adds to the job
    "ppo": ("benchmarks/peers/trl_ppo.py", {"TRL": {}}),
    "grpo": ("benchmarks/peers/trl_grpo.py", {"TRL, fp32": {"bf16": False}, "TRL, bf16": {"bf16": True}}),
}
OURS = {"fp32": ["--precision", "fp32"], "bf16": ["--precision", "bf16"]}
TRIED = {  # 8 responses are half a minibatch of the small work
    "fp32, compiled": [*OURS["fp32"], "--compile"],
    "fp32, 8 responses per microbatch": [*OURS["fp32"], "--microbatch", "8"],
    "bf16, compiled": [*OURS["bf16"], "--compile"],
    "bf16, 8 responses per microbatch": [*OURS["bf16"], "--microbatch", "8"],
}
WARM_UP = 2  # iterations in which memory is still new
BOUNDS = {  # for --check: TRL's seconds per iteration over ours, and its peak memory over ours, at least
    "small": {"fp32": {"seconds": 1.5, "peak_mb": 1.7}, "bf16": {"seconds": 2.4}},
    "gpt2": {"fp32": {"seconds": 1.4, "peak_mb": 1.3}, "bf16": {"seconds": 2.4}},
    "lengths": {"fp32": {"seconds": 3.0}, "bf16": {"seconds": 4.0}},
}
GRPO_BOUNDS = {"small": {"fp32": {"seconds": 2.0, "peak_mb": 1.5}, "bf16": {"seconds": 2.8, "peak_mb": 1.5}}}


def work_of(algorithm: str, name: str) -> dict:
    return WORK[name] | (GRPO if algorithm == "grpo" else {})


def characters(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of GRPO's work, which costs nothing; the peer's is the same."""
    return [float(len(response)) for response in responses]


def end_everywhere(gpt, eot: int, probability: float) -> None:
    """Give the end of text this probability at every step, through a constant of the last norm that only its embedding sees."""
    import torch

    logit = math.log(probability * gpt.config.vocab_size / (1 - probability)) if probability else -30.0
    with torch.no_grad():
        gpt.ln_f.bias.fill_(1 / math.sqrt(gpt.config.n_embd))
        gpt.wte.weight[eot] = logit * gpt.ln_f.bias


def prepare(work: dict, folder: Path) -> None:
    """Write the checkpoints sft and rm with random weights, and texts whose first tokens are prompts."""
    import numpy as np
    import torch

    import train_rm
    import train_sft
    from minirlhf import checkpoint
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
        about = checkpoint.describe(stage, shape, config, 0, True, tokenizer, **more)
        checkpoint.save(folder / stage, 0, model.state_dict(), about, tokenizer)
    rng = np.random.default_rng(0)
    ascii_letters = [p.decode() for p in letters if p.isascii()]
    words = ["".join(rng.choice(ascii_letters, 4)) for _ in range(4000)]
    rows = [{"text": " ".join(rng.choice(words, 40))} for _ in range(4000)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(job: dict) -> list[str]:
    """train_ppo.py and its options for the work."""
    work, folder = job["work"], Path(job["folder"])
    options = {"init": folder / "sft", "data": folder / "texts.jsonl", "out": job["out"],
               "prompt-tokens": work["prompt"] - 1, "response-tokens": work["response"], "batch": work["batch"],
               "minibatch": work["minibatch"], "epochs": work["epochs"], "iterations": job["iterations"], "lr": 1e-5,
               "save-every": 10**6, "missing-eos": "none"}  # fmt: skip
    if "group" in work:
        options |= {"algorithm": "grpo", "group": work["group"], "kl-coef": work["kl_coef"],
                    "reward": "benchmarks.ppo:characters"}  # fmt: skip
    else:
        options |= {"reward-model": folder / "rm", "value-lr": 1e-5}
    words = (str(x) for name, value in options.items() for x in (f"--{name}", value))
    return ["train_ppo.py", *words, *job["options"]]


def ours(job: dict) -> None:
    """Run train_ppo.py on the work, in a process of its own, and print what was measured as JSON."""
    import torch

    import train_ppo

    work = job["work"]
    torch.set_num_threads(job["threads"])
    sys.argv = command(job)
    rows: Counter[str] = Counter()
    response_logprobs = train_ppo.response_logprobs

    def counted(model, texts, sampling):
        rows["trained" if torch.is_grad_enabled() else "read"] += len(texts)
        return response_logprobs(model, texts, sampling)

    train_ppo.response_logprobs = counted
    cpu = time.process_time()
    cli.run_script(train_ppo.main)
    cpu = time.process_time() - cpu
    lines = [json.loads(line) for line in (Path(job["out"]) / "metrics.jsonl").read_text().splitlines()]
    ends = [0.0] + [line["time/seconds"] for line in lines]
    found = [{part: line[f"time/{part}"] for part in ("rollout", "score", "update")}
             | {"seconds": end - start, "tokens": line["val/response_length"] * work["batch"]}
             for line, start, end in zip(lines, ends, ends[1:], strict=False)]  # fmt: skip
    steps = sum(line["optimizer_steps"] for line in lines)
    peak = (
        int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    )  # (ru_maxrss may be the parent's)
    about = {"optimizer_steps": steps, "rows": rows, "peak_mb": peak, "cpu_seconds": cpu}
    print(json.dumps({"iterations": found} | about))


def measure(python: str, script: str, job: dict) -> dict:
    """What a process measured, without its first iterations.  The work that it did is asserted."""
    found, work = beside.child(python, script, job), job["work"]
    assert (
        found["optimizer_steps"] == job["iterations"] * work["epochs"] * work["batch"] // work["minibatch"]
    ), found
    rows = {"read": 2, "trained": work["epochs"]}  # by the policy and its reference, and by the policy
    rows = {what: times * job["iterations"] * work["batch"] for what, times in rows.items()}
    assert found.get("rows", rows) == rows, found  # (TRL's PPO does not count them)
    full = work["batch"] * work["response"]
    for iteration in found["iterations"]:  # fixed lengths are exact; drawn ones have the same mean
        assert (
            iteration["tokens"] == full if not work["end"] else 0.2 * full < iteration["tokens"] < 0.6 * full
        ), iteration
    return found | {"iterations": found["iterations"][WARM_UP:]}


def run(args: argparse.Namespace, name: str) -> dict[str, list[dict]]:
    """{'TRL' or a variant: its measurements}; processes take turns."""
    found: dict[str, list[dict]] = {}
    script, peers = PEERS[args.algorithm]
    precisions = {variant.split(",")[0] for variant in args.variants}
    with tempfile.TemporaryDirectory() as folder:
        work = work_of(args.algorithm, name)
        prepare(work, Path(folder))
        job = {
            "work": work,
            "threads": args.threads,
            "iterations": WARM_UP + args.iterations,
            "folder": folder,
        }
        for k in range(args.rounds):
            for row, more in peers.items() if args.peer_python else ():
                if not more.get("bf16") or "bf16" in precisions:
                    peer = job | more | {"out": f"{folder}/{row}-{k}".replace(" ", "-")}
                    found.setdefault(row, []).append(measure(args.peer_python, script, peer))
            for variant in args.variants:
                mine = job | {
                    "out": f"{folder}/{variant}-{k}".replace(" ", "-"),
                    "options": (OURS | TRIED)[variant],
                }
                found.setdefault(variant, []).append(measure(sys.executable, "benchmarks/ppo.py", mine))
            print(f"{name}: round {k + 1} of {args.rounds}", flush=True)
    return found


def summary(runs: list[dict]) -> dict[str, float]:
    """Medians over all iterations that count (seconds) and over processes."""
    iterations = [i for run in runs for i in run["iterations"]]
    found = {
        key: median(i[key] for i in iterations) for key in ("seconds", "rollout", "score", "update", "tokens")
    }
    seconds = sorted(i["seconds"] for i in iterations)
    found |= {"fastest": seconds[0], "slowest": seconds[-1], "peak_mb": median(r["peak_mb"] for r in runs)}
    return found | {"cpu": median(r["cpu_seconds"] / (len(r["iterations"]) + WARM_UP) for r in runs)}


def report(known: dict[str, dict], algorithm: str = "ppo") -> tuple[str, list[str]]:
    """(the table, what is below its bound).  Results of variants that exist no more stay in the file and out of the table."""
    rows, missed, peers = [], [], PEERS[algorithm][1]
    bounds = GRPO_BOUNDS if algorithm == "grpo" else BOUNDS
    for name in [name for name in WORK if name in known]:
        found = {v: summary(runs) for v, runs in known[name].items() if v in (*peers, *OURS, *TRIED)}
        for variant, row in found.items():
            ratios = {"seconds": "", "peak_mb": ""}
            beside_it = [  # bf16 stands beside all of the peer's rows, fp32 beside those in fp32
                found[p] for p in peers if p in found and (variant.startswith("bf16") or "bf16" not in p)
            ]
            if variant not in peers and beside_it:
                for key in ratios:
                    ratio = min(p[key] for p in beside_it) / row[key]
                    bound = bounds.get(name, {}).get(variant, {}).get(key, 0.0)
                    ratios[key] = f"{ratio:.2f}"
                    if ratio < bound:
                        missed.append(f"{name}, {variant}: {key} {ratio:.2f} x, bound {bound:g} x")
            rows.append(
                [
                    f"{name}: {variant}",
                    f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
                    " + ".join(f"{row[part]:.2f}" for part in ("rollout", "score", "update")),
                    ratios["seconds"],
                    f"{row['tokens'] / row['seconds']:.0f}",
                    f"{row['cpu']:.1f}",
                    f"{row['peak_mb']:.0f}",
                    ratios["peak_mb"],
                ]
            )
    head = [
        "s per iteration (range)",
        "rollout + scoring + update",
        "TRL's time / ours",
        "response tokens/s",
        "CPU s",
        "peak MB",
        "TRL's peak / ours",
    ]
    return table(head, rows), missed


def main() -> None:
    peer = f"{beside.PEER} (GRPO: {beside.PEER_116})"
    parser = beside.parser(__doc__, RESULTS, rounds=3, peer=peer)
    parser.add_argument(
        "--algorithm", choices=PEERS, default="ppo", help="What to measure (default: %(default)s)."
    )
    parser.add_argument("--work", choices=WORK, nargs="+", help="Default: all of PPO's, small of GRPO's.")
    parser.add_argument(
        "--variants", choices=OURS | TRIED, nargs="+", help="Default: fp32, and bf16 where it is native."
    )
    parser.add_argument(
        "--tried", action="store_true", help="Measure fp32, bf16 and what did not make them faster."
    )
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=3, help="Iterations per process that count."
    )
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    args.work = args.work or ([*WORK] if args.algorithm == "ppo" else [*GRPO_BOUNDS])
    native = hardware.has_fast_bf16()
    if args.out == RESULTS:
        tried = "tried.json" if args.algorithm == "ppo" else f"{args.algorithm}_tried.json"
        args.out = RESULTS.with_name(tried if args.tried else f"{args.algorithm}.json")
    if args.tried:
        args.variants = ["fp32", "bf16", *TRIED]
    elif not args.variants:
        args.variants = [*OURS] if native else ["fp32"]
        if not native and not args.tables:
            print("bf16 is left out: this machine does not multiply it natively", file=sys.stderr)
    beside.conclude(*report(beside.collect(parser, args, args.work, run), args.algorithm), args.check)


if __name__ == "__main__":
    cli.run_script(main)
