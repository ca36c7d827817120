"""Is speed paid for with learning?  PPO on the built-in task in each of its fast variants, over the demo's seeds.

    python benchmarks/demo.py --seeds 1 2 3    # the SFT and reward models: runs/seed-1 ...
    python benchmarks/variants.py              # 40 iterations each, about 12 minutes; writes results/variants.json
    python benchmarks/variants.py --tables     # runs nothing: the table alone

Score, judge's score and KL are means over the last ten iterations.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.demo import command, table  # noqa: E402

RESULTS = ROOT / "benchmarks/results/variants.json"
VARIANTS = {
    "four models, fp32": ["--precision", "fp32"],
    "four models, bf16": ["--precision", "bf16"],
    "shared trunk, bf16": ["--precision", "bf16", "--shared-trunk"],
    "shared trunk, bf16, lr 3.5e-4": ["--precision", "bf16", "--shared-trunk", "--lr", "3.5e-4"],
}
MEASURES = {
    "score": "objective/scores",
    "judge": "objective/judge",
    "KL, nats": "objective/kl",
    "length": "val/response_length",
}
LAST = 10


def learn(variant: str, seed: int, iterations: int) -> dict[str, list[float]]:
    """{measure: its value in every iteration}"""
    run = Path(f"runs/seed-{seed}")
    out = run / ("variant-" + variant.replace(",", "").replace(" ", "-"))
    command("train_ppo.py", "--init", run / "sft", "--reward-model", run / "rm-a", "--monitor", run / "judge", "--out", out,
            "--seed", seed, "--iterations", iterations, "--resume", *VARIANTS[variant])  # fmt: skip
    lines = [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[key] for line in lines] for name, key in MEASURES.items()}


def rows_of(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """found[variant][seed][measure]"""
    rows = []
    for variant, seeds in found.items():
        ends = [[mean(one[name][-LAST:]) for one in seeds.values()] for name in MEASURES]
        rows.append([variant, *(f"{mean(end):.2f} ({min(end):.2f} to {max(end):.2f})" for end in ends)])
    return table([f"{name}, mean (seeds)" for name in MEASURES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument(
        "--tables", action="store_true", help="only print the table of the results that are there"
    )
    args = parser.parse_args()
    if not args.tables:
        found = {
            variant: {str(seed): learn(variant, seed, args.iterations) for seed in args.seeds}
            for variant in VARIANTS
        }
        RESULTS.write_text(json.dumps(found, indent=1))
    elif not RESULTS.exists():
        parser.error(f"{RESULTS}: no results yet: run without --tables first")
    print(rows_of(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
