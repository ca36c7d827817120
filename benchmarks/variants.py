"""Does bf16 cost learning?  Curves of PPO on the built-in task in fp32 and in bf16, over the demo's seeds.

    python benchmarks/demo.py --seeds 1 2 3    # the SFT and reward models: runs/seed-1 ...
    python benchmarks/variants.py              # 40 iterations each, about 6 minutes; writes results/variants.json
    python benchmarks/variants.py --tables     # runs nothing: prints the table

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
from minirlhf.support import cli  # noqa: E402

RESULTS = ROOT / "benchmarks/results/variants.json"
VARIANTS = {
    "four models, fp32": ["--precision", "fp32"],
    "four models, bf16": ["--precision", "bf16"],
}
MEASURES = {
    "score": "objective/scores",
    "judge": "objective/judge",
    "KL, nats": "objective/kl",
    "length": "val/response_length",
}
LAST = 10


def learn(variant: str, seed: int, iterations: int) -> dict[str, list[float]]:
    """{measure: its value in every iteration}."""
    run = Path(f"runs/seed-{seed}")
    out = run / ("variant-" + variant.replace(",", "").replace(" ", "-"))
    command("train_ppo.py", "--init", run / "sft", "--reward-model", run / "rm-a", "--monitor", run / "judge", "--out", out,
            "--seed", seed, "--iterations", iterations, "--kl-coef", 0.1, "--lr", 2e-4, "--resume",
            *VARIANTS[variant])  # fmt: skip
    lines = [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[key] for line in lines] for name, key in MEASURES.items()}


def rows_of(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """The table of found[variant][seed][measure].  Variants that exist no more stay in the file and out of the table."""
    rows = []
    for variant, seeds in ((name, found[name]) for name in VARIANTS if name in found):
        ends = [[mean(one[name][-LAST:]) for one in seeds.values()] for name in MEASURES]
        rows.append([variant, *(f"{mean(end):.2f} ({min(end):.2f} to {max(end):.2f})" for end in ends)])
    return table([f"{name}, mean (seeds)" for name in MEASURES], rows)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=cli.number(cli.Seed), nargs="+", default=[1, 2, 3], help="Seeds of the demo's runs."
    )
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=40, help="PPO iterations per run."
    )
    parser.add_argument(
        "--tables", action="store_true", help="Train nothing, and print the table of the committed results."
    )
    args = parser.parse_args()
    if not args.tables:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = known | {
            variant: {str(seed): learn(variant, seed, args.iterations) for seed in args.seeds}
            for variant in VARIANTS
        }
        RESULTS.write_text(json.dumps(found, indent=1))
    elif not RESULTS.exists():
        parser.error(f"{RESULTS}: no results yet: run without --tables first")
    print(rows_of(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    cli.run_script(main)
