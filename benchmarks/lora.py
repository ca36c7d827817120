"""What adapters save and cost: PPO on SmolLM2 with all models on one trunk, beside training its last layers.

    python -m minirlhf.checkpoint import smollm2 runs/smollm2/base
    python benchmarks/lora.py                       # memory and seconds of a few iterations each, in turn
    python benchmarks/lora.py --tables              # measures nothing: prints the table of the committed results

Work: the smollm2 preset of train_ppo.py (64 responses of up to 24 tokens, minibatches of 32), from SmolLM2 as it
comes; reward models of the same kind, trained for a few steps on generated sentences, since what they say does not
matter here.  Each arm's reward model is trained as its policy is, so that its trunk is the policy's where it can be.
Every measurement is a process of its own; peak memory is what the system says of it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.beside import machine, quietly  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from minirlhf.support import cli  # noqa: E402

RESULTS = ROOT / "benchmarks/results/lora.json"
LORA = ("--train-layers", "30", "--lora", "16", "--lr", "1e-3")  # all layers
LAST = ("--train-layers", "14")
ARMS = {  # what is trained, of the reward model and by PPO; how PPO computes it
    "last 14 layers": (LAST, ()),
    "LoRA 16 in the last 14 layers": ((*LAST, *LORA[2:]), ()),
    "LoRA 16": (LORA, ()),
    "LoRA 16, microbatches of 8": (LORA, ("--microbatch", "8")),
    "LoRA 16, checkpointing": (LORA, ("--gradient-checkpointing",)),
}


def train(script: str, *options: object) -> int:
    """Run a stage; its peak memory in bytes."""
    return quietly(script, "--preset", "smollm2", *options)


def measure(base: Path, home: Path, arm: str, iterations: int) -> dict:
    trained, how = ARMS[arm]
    reward = home / f"rm{''.join(trained)}"
    if not (reward / "config.json").exists():
        few = ("--data", "toy", "--epochs", 1, "--bidirectional", 0, "--normalise", "none")
        train("train_rm.py", "--init", base, *few, *trained, "--out", reward)
    out = home / "ppo"
    told = ("--data", "toy", "--iterations", iterations, "--init", base, "--reward-model", reward)
    peak = train("train_ppo.py", *told, *trained, *how, "--out", out, "--overwrite")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    times = {name: median(line[f"time/{name}"] for line in lines) for name in ("rollout", "score", "update")}
    size = sum(file.stat().st_size for file in (out / "latest").glob("*.safetensors"))
    return {"peak": peak, "checkpoint": size, "seconds": sum(times.values())} | times


def rows(results: dict) -> str:
    found = []
    for arm, runs in results["arms"].items():
        cell = lambda name, digits=2, runs=runs: f"{median(run[name] for run in runs):.{digits}f}"
        peak, size = (median(run[name] for run in runs) for name in ("peak", "checkpoint"))
        found.append(
            [arm, f"{peak / 1e9:.2f} GB", f"{size / 1e6:,.0f} MB", cell("seconds"), cell("rollout"),
             cell("score"), cell("update")]
        )  # fmt: skip
    head = ["trained", "peak memory", "a checkpoint", "s per iteration", "rollout", "score", "update"]
    return table(head, found)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--base", type=Path, default=Path("runs/smollm2/base"), help="SmolLM2 (%(default)s).")
    add("--home", type=Path, default=Path("runs/lora"), help="Folder of the runs (%(default)s).")
    add("--rounds", type=cli.number(cli.Count), default=2, help="Processes per arm (%(default)s).")
    add("--iterations", type=cli.number(cli.Count), default=4, help="The first is not counted (%(default)s).")
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="Which to measure; others stay as they are.")
    add("--tables", action="store_true", help="Measure nothing: print the table.")
    args = parser.parse_args()
    if not args.tables:
        known = json.loads(RESULTS.read_text())["arms"] if RESULTS.exists() else {}
        arms = {arm: runs for arm, runs in known.items() if arm not in args.arms}
        results = {"machine": machine(int(os.environ.get("OMP_NUM_THREADS", 2))), "arms": arms}
        for _ in range(args.rounds):
            for arm in args.arms:
                found = measure(args.base, args.home, arm, args.iterations)
                results["arms"].setdefault(arm, []).append(found)
                print(arm, found, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1))
    print(rows(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    cli.run_script(main)
