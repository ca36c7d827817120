"""The demo over several seeds, and PPO in variants: the figures of the README with their spread.

    python benchmarks/demo.py --seeds 1 2 3               # runs/seed-1 ... ; finished stages are not run again
    python benchmarks/demo.py --seeds 1 --variants        # also: free to stop or not, and a KL coefficient near 0

Writes benchmarks/results/demo.json (every results.json, whole) and prints the tables.  One process at a time: two
processes of two threads on two cores run many times slower.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"no-stop": ["--no-stop", "--missing-eos", "none"], "kl-0.01": ["--kl-coef", "0.01"]}
ROWS = {
    "SFT, bits per byte": "sft.val_bits_per_byte",
    "reward model, r": "rm.test.pearson",
    "  pairs": "rm.test.pair_accuracy",
    "  pairs a point or more apart": "rm.test.pair_accuracy_1",
    "  TF-IDF + ridge, r": "rm.baselines.TF-IDF + ridge.pearson",
    "  TF-IDF + ridge with characters, r": "rm.baselines.TF-IDF + ridge, with characters.pearson",
    "  one human, r": "rm.humans.one_pearson",
    "reward model PPO used (half a), r": "rm_optimised.test.pearson",
    "judge (half b), r": "judge.test.pearson",
    "PPO, judge's win rate": "ppo.judge_win_rate",
    "  lexicon's win rate": "ppo.lexicon_win_rate",
    "  KL, nats a sequence": "ppo.kl",
    "  distinct-2": "ppo.distinct_2",
    "  distinct-2 of SFT samples": "sft_samples.distinct_2",
    "  length, tokens": "ppo.mean_length",
    "  EOS rate": "ppo.eos_rate",
    "best of 4, judge's win rate": "best_of_n.4.judge_win_rate",
    "best of 16, judge's win rate": "best_of_n.16.judge_win_rate",
    "seconds: SFT": "sft.seconds",
    "  reward model (all items)": "rm.seconds",
    "  PPO": "ppo.seconds",
}


def look_up(results: dict, path: str):
    """results['rm']['baselines']['TF-IDF + ridge'] of 'rm.baselines.TF-IDF + ridge'; None where it was not measured."""
    for key in path.split("."):
        results = (results or {}).get(key)
    return results


def command(*arguments) -> None:
    print("\n$", " ".join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def demo(seed: int, variants: bool) -> dict[str, dict]:
    """Run everything of one seed; {'demo' or a variant's name: results.json}."""
    run = Path(f"runs/seed-{seed}")
    command("train_sft.py", "--out", run / "sft", "--seed", seed, "--resume")
    command("train_rm.py", "--out", run / "rm", "--seed", seed, "--resume")
    command("train_rm.py", "--out", run / "rm-a", "--part", "a", "--seed", seed, "--resume")
    command("train_rm.py", "--out", run / "judge", "--part", "b", "--seed", seed + 100, "--resume")
    found = {}
    for name, options in ({"demo": []} | (VARIANTS if variants else {})).items():
        out = run / ("ppo" if name == "demo" else f"ppo-{name}")
        command("train_ppo.py", "--out", out, "--reward-model", run / "rm-a", "--monitor",
                run / "judge", "--seed", seed, "--resume", *options)  # fmt: skip
        command("-m", "minirlhf.evaluate", "--run", run, "--policy", out, "--results", run / f"results-{name}.json")
        found[name] = json.loads((ROOT / run / f"results-{name}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", action="store_true", help="PPO's variants as well, with the first seed")
    args = parser.parse_args()
    found = {seed: demo(seed, args.variants and seed == args.seeds[0]) for seed in args.seeds}
    target = ROOT / "benchmarks/results/demo.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1))
    columns = [found[seed]["demo"] for seed in args.seeds]
    print(f"\n{'':38s}" + "".join(f"{f'seed {s}':>10s}" for s in args.seeds) + f"{'mean':>10s}")
    for name, path in ROWS.items():
        values = [look_up(c, path) for c in columns]
        known = [v for v in values if v is not None]
        cells = [f"{v:10.3f}" if v is not None else f"{'-':>10s}" for v in [*values, mean(known) if known else None]]
        print(f"{name:38s}" + "".join(cells))
    print(f"raw results in {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
