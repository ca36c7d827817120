"""The demo over several seeds, and PPO in variants: the figures of docs/results.md with their spread.

    python benchmarks/demo.py --seeds 1 2 3               # runs/seed-1 ... ; finished stages are not run again
    python benchmarks/demo.py --seeds 1 --variants        # also: free to stop or not, and a KL coefficient near 0
    python benchmarks/demo.py --preset smollm2 --seeds 1  # the same with a real language model, runs/smollm2-1
    python benchmarks/demo.py --preset minilm             # a reward model on a real encoder, runs/minilm-1 ...
    python benchmarks/demo.py --tables                    # trains nothing: prints the tables of the committed results

Writes benchmarks/results/PRESET.json (every results.json, whole) and prints the tables of docs/results.md from it.  It
runs one process at a time: two processes of two threads each on two cores are many times slower.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.support import cli  # noqa: E402

PRESETS = ("demo", "minilm", "smollm2")
VARIANTS = {"no-stop": ["--no-stop", "--missing-eos", "none"], "kl-0.01": ["--kl-coef", "0.01"]}
SEEDS = {  # a row of the table over seeds: the path of its number in results.json, and its decimals
    "SFT, validation bits per byte": ("sft.val_bits_per_byte", 3),
    "reward model, test r": ("rm.test.pearson", 3),
    "... TF-IDF + ridge on the same items": ("rm.baselines.TF-IDF + ridge.pearson", 3),
    "... pairs at least 1 point apart": ("rm.test.pair_accuracy_1", 3),
    "PPO, judge's win rate": ("ppo.judge_win_rate", 3),
    "... lexicon's win rate": ("ppo.lexicon_win_rate", 3),
    "... KL, nats per sequence": ("ppo.kl", 2),
    "... distinct-2": ("ppo.distinct_2", 3),
    "... distinct-2 of SFT samples": ("sft_samples.distinct_2", 3),
}
SMOLLM2 = {
    "reward model, test r": ("rm.test.pearson", 3),
    "... pairs at least 1 point apart": ("rm.test.pair_accuracy_1", 3),
    "PPO, judge's win rate": ("ppo.judge_win_rate", 3),
    "... lexicon's win rate": ("ppo.lexicon_win_rate", 3),
    "... KL, nats per sequence": ("ppo.kl", 2),
    "... distinct-2": ("ppo.distinct_2", 3),
    "... distinct-2 of SFT samples": ("sft_samples.distinct_2", 3),
    "... perplexity to the SFT model": ("ppo.sft_perplexity", 1),
    "... perplexity of SFT samples": ("sft_samples.sft_perplexity", 1),
}


def look_up(results: dict, path: str):
    """results['rm']['baselines']['TF-IDF + ridge'] of 'rm.baselines.TF-IDF + ridge'; None where it was not measured."""
    for key in path.split("."):
        results = (results or {}).get(key)
    return results


def command(*arguments) -> None:
    print("\n$", " ".join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def results_of(preset: str) -> Path:
    return ROOT / f"benchmarks/results/{preset}.json"


def demo(preset: str, seed: int, variants: bool) -> dict[str, dict]:
    """Run everything of one seed; {'demo' or a variant's name: results.json}."""
    run, base = Path(f"runs/{'seed' if preset == 'demo' else preset}-{seed}"), Path(f"runs/{preset}/base")
    stage = lambda script, out, *options: command(
        script, "--preset", preset, "--out", run / out, "--seed", seed, "--resume", *options
    )
    if preset != "demo" and not (ROOT / base).exists():
        command("-m", "minirlhf.checkpoint", "import", preset, base)
    if preset == "minilm":
        stage("train_rm.py", "rm")
        return {"demo": {"rm": json.loads((ROOT / run / "rm/config.json").read_text())["results"]}}
    stage("train_sft.py", "sft")
    stage("train_rm.py", "rm")
    # The report's model may read in both directions and train longer: PPO's critic starts from rm-a.
    halves = ("--bidirectional", 0, "--epochs", 2)
    stage("train_rm.py", "rm-a", "--part", "a", *halves)
    stage("train_rm.py", "judge", "--part", "b", "--seed", seed + 100, *halves)
    found = {}
    for name, options in ({"demo": []} | (VARIANTS if variants else {})).items():
        out = "ppo" if name == "demo" else f"ppo-{name}"
        stage("train_ppo.py", out, "--reward-model", run / "rm-a", "--monitor", run / "judge", *options)
        target = run / f"results-{name}.json"
        trained = [
            (ROOT / run / folder / "latest").lstat().st_mtime
            for folder in ("sft", "rm", "rm-a", "judge", out)
        ]
        if not (ROOT / target).exists() or (ROOT / target).stat().st_mtime < max(trained):
            command("-m", "minirlhf.evaluate", "--run", run, "--policy", run / out, "--results", target,
                    *(["--best-of", 4] if preset == "smollm2" else []))  # fmt: skip
        found[name] = json.loads((ROOT / target).read_text())
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
    head = [
        "score",
        "judge's wins",
        "lexicon's wins",
        "KL, nats",
        "entropy",
        "distinct-1 / 2 / 3",
        "length",
        "EOS rate",
    ]
    fluency = ["perplexity to SFT"] * ("sft_perplexity" in found["demo"]["ppo"])
    return table(head + fluency, [
        [name, f"{row['score']:+.2f}", number(row.get("judge_win_rate")), number(row["lexicon_win_rate"]),
         number(row["kl"], 2), number(row["entropy"], 2), " / ".join(number(row[f"distinct_{n}"], 2) for n in (1, 2, 3)),
         number(row["mean_length"], 1), number(row["eos_rate"], 2), *(number(row["sft_perplexity"], 1) for _ in fluency)]
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
    cells = [
        [name, *(number((row or {}).get(m)) for m in measures)] for name, row in rows.items()
    ]  # None: not installed
    return table(["Pearson r", "Spearman", "pairs right", "pairs at least 1 point apart"], cells)


def over_seeds(found: dict[str, dict], measures: dict[str, tuple]) -> str:
    rows = []
    for name, (path, decimals) in measures.items():
        values = [look_up(found[seed]["demo"], path) for seed in found]
        known = [v for v in values if v is not None]
        rows.append([name, *(number(v, decimals) for v in [*values, mean(known) if known else None])])
    return table([*(f"seed {seed}" for seed in found), "mean"], rows)


def backbones(known: dict[str, dict]) -> str:
    """Test r of reward models on every backbone that was measured, all seeds, beside the baselines and people."""
    names = {
        "demo": "from scratch, 4 layers",
        "minilm": "MiniLM, 6 layers, an encoder",
        "smollm2": "SmolLM2-135M, 30 layers",
    }
    rows = []
    for preset, found in known.items():
        tests = [f["demo"]["rm"]["test"] for f in found.values()]
        cells = [[t[m] for t in tests] for m in ("pearson", "pair_accuracy_1")]
        rows.append([names[preset], *(f"{mean(c):.3f}" + f" ({min(c):.3f} to {max(c):.3f})" * (len(c) > 1) for c in cells),
                     str(len(tests))])  # fmt: skip
    rm = next(iter(known["demo"].values()))["demo"]["rm"]
    measures = ("pearson", "pair_accuracy_1")
    rows.append(["TF-IDF + ridge", *(number(rm["baselines"]["TF-IDF + ridge"][m]) for m in measures), ""])
    rows.append(
        [
            "one human, against the mean of the others",
            *(number(rm["humans"][f"one_{m}"]) for m in measures),
            "",
        ]
    )
    return table(["Pearson r", "pairs at least 1 point apart", "seeds"], rows)


def tables(known: dict[str, dict]) -> str:
    """The tables of docs/results.md in its order. `known`: {preset: what `demo` found, by seed}; samples are of the first seed."""
    found = known["demo"]
    first = next(iter(found.values()))
    shown = [
        policies(first),
        samples(first["demo"]),
        reward_model(first["demo"]["rm"]),
        over_seeds(found, SEEDS),
    ]
    if len(known) > 1:
        shown.append(backbones(known))
    if "smollm2" in known:
        first = next(iter(known["smollm2"].values()))
        shown += [over_seeds(known["smollm2"], SMOLLM2), policies(first), samples(first["demo"])]
    return "\n\n".join(shown)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="demo",
        help="demo trains from scratch, the others start from pretrained weights.",
    )
    parser.add_argument(
        "--seeds", type=cli.number(cli.Seed), nargs="+", default=[1, 2, 3], help="Seeds, one whole run each."
    )
    parser.add_argument(
        "--variants", action="store_true", help="Also run PPO's variants, with the first seed."
    )
    parser.add_argument(
        "--tables", action="store_true", help="Train nothing, and print the tables of the committed results."
    )
    args = parser.parse_args()
    if not args.tables:
        found = {
            seed: demo(args.preset, seed, args.variants and seed == args.seeds[0]) for seed in args.seeds
        }
        results_of(args.preset).write_text(json.dumps(found, indent=1))
        print(f"\nraw results in {results_of(args.preset).relative_to(ROOT)}\n")
    known = {
        preset: json.loads(results_of(preset).read_text())
        for preset in PRESETS
        if results_of(preset).exists()
    }
    if "demo" not in known:
        parser.error(f"{results_of('demo').relative_to(ROOT)}: no results yet: run the demo first")
    print(tables(known))


if __name__ == "__main__":
    cli.run_script(main)
