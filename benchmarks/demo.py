"""The demo over several seeds, and PPO in variants: the figures of the README with their spread.

    python benchmarks/demo.py --seeds 1 2 3               # runs/seed-1 ... ; finished stages are not run again
    python benchmarks/demo.py --seeds 1 --variants        # also: free to stop or not, and a KL coefficient near 0
    python benchmarks/demo.py --tables                    # trains nothing: the tables of the results that are there

Writes benchmarks/results/demo.json (every results.json, whole) and prints the README's tables from it.  One process at a
time: two processes of two threads on two cores run many times slower.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/demo.json"
VARIANTS = {"no-stop": ["--no-stop", "--missing-eos", "none"], "kl-0.01": ["--kl-coef", "0.01"]}
SEEDS = {  # a row of the table over seeds: where its numbers stand, decimals, what we set out to reach
    "SFT, validation bits per byte": ("sft.val_bits_per_byte", 3, "<= 1.90"),
    "reward model, test r": ("rm.test.pearson", 3, ">= .70, above TF-IDF"),
    "... TF-IDF + ridge on the same items": ("rm.baselines.TF-IDF + ridge.pearson", 3, ""),
    "... pairs a point or more apart": ("rm.test.pair_accuracy_1", 3, ">= .84"),
    "PPO, judge's win rate": ("ppo.judge_win_rate", 3, ">= .93"),
    "... lexicon's win rate": ("ppo.lexicon_win_rate", 3, ">= .85"),
    "... KL, nats a sequence": ("ppo.kl", 2, "<= 10"),
    "... distinct-2": ("ppo.distinct_2", 3, ">= .60"),
    "... distinct-2 of SFT samples": ("sft_samples.distinct_2", 3, ""),
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


def number(value: float | None, decimals: int = 3) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown. `head` names the columns behind the first, which has no name unless there is one for each."""
    head = [""] * (len(rows[0]) - len(head)) + head
    body = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([body[0], "|---" * len(head) + "|", *body[1:]])


def policies(found: dict[str, dict]) -> str:
    """What each policy's samples are like. `found`: the demo's results, and those of variants, of one seed."""
    best = {f"best of {n}": row for n, row in found["demo"]["best_of_n"].items()}
    rows = {"SFT": found["demo"]["sft_samples"]} | best | {"**PPO**": found["demo"]["ppo"]}
    if "no-stop" in found:
        rows["SFT, never stops"] = found["no-stop"]["sft_samples"]
        rows["PPO, never stops (`--no-stop`)"] = found["no-stop"]["ppo"]
    if "kl-0.01" in found:
        rows["PPO, `--kl-coef 0.01`"] = found["kl-0.01"]["ppo"]
    head = ["score", "judge's wins", "lexicon's wins", "KL, nats", "entropy", "distinct-1 / 2 / 3", "length", "EOS rate"]
    return table(head, [
        [name, f"{row['score']:+.2f}", number(row.get("judge_win_rate")), number(row["lexicon_win_rate"]),
         number(row["kl"], 2), number(row["entropy"], 2), " / ".join(number(row[f"distinct_{n}"], 2) for n in (1, 2, 3)),
         number(row["mean_length"], 1), number(row["eos_rate"], 2)]
        for name, row in rows.items()
    ])  # fmt: skip


def samples(results: dict) -> str:
    quote = lambda text: text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ").strip()
    return table(["prompt", "SFT (score)", "PPO (score, KL)"], [
        [quote(s["prompt"]), f"{quote(s['sft'])} ({s['score_sft']:+.1f})",
         f"{quote(s['ppo'])} ({s['score_ppo']:+.1f}, {s['kl']:.1f})"]
        for s in results["samples"]
    ])  # fmt: skip


def reward_model(found: dict) -> str:
    """On the test split, beside its baselines and people; `found`: results["rm"]."""
    measures = ("pearson", "spearman", "pair_accuracy", "pair_accuracy_1")
    people = lambda who: {m: found["humans"].get(f"{who}_{m}") for m in measures}
    rows = {"**reward model**": found["test"]} | found["baselines"]
    rows["one human, against the mean of the others"] = people("one")
    rows["half the humans, against the other half"] = people("half")
    cells = [[name, *(number((row or {}).get(m)) for m in measures)] for name, row in rows.items()]  # None: not installed
    return table(["Pearson r", "Spearman", "pairs right", "pairs a point or more apart"], cells)


def over_seeds(found: dict[str, dict]) -> str:
    rows = []
    for name, (path, decimals, goal) in SEEDS.items():
        values = [look_up(found[seed]["demo"], path) for seed in found]
        known = [v for v in values if v is not None]
        rows.append([name, *(number(v, decimals) for v in [*values, mean(known) if known else None]), goal])
    return table([*(f"seed {seed}" for seed in found), "mean", "set out to reach"], rows)


def tables(found: dict[str, dict]) -> str:
    """The README's, in its order; all but the last are of the first seed."""
    first = next(iter(found.values()))
    results = first["demo"]
    return "\n\n".join([policies(first), samples(results), reward_model(results["rm"]), over_seeds(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", action="store_true", help="PPO's variants as well, with the first seed")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the results that are there")
    args = parser.parse_args()
    if not args.tables:
        found = {seed: demo(seed, args.variants and seed == args.seeds[0]) for seed in args.seeds}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1))
        print(f"\nraw results in {RESULTS.relative_to(ROOT)}\n")
    elif not RESULTS.exists():
        parser.error(f"{RESULTS.relative_to(ROOT)}: no results yet: run without --tables first")
    print(tables(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
