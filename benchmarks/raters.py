"""What bad raters cost: a third of the raters of the built-in movie ratings corrupted, in the TRAINING items alone.

    python benchmarks/raters.py                                      # the targets, and TF-IDF + ridge on them: minutes
    python benchmarks/raters.py --train --init runs/demo/sft --seeds 1 2 3     # and the reward models trained on them
    python benchmarks/raters.py --train --init runs/demo/sft -- --epochs 1     # what follows -- goes to train_rm.py

A rater is a place in an item's list of ratings: every third is corrupted.  `random` ones answer anything on the scale,
`inverted` ones turn it round, `both`: one random, the next inverted.  `--keep` takes the first so many raters of a training
item, since few data sets have the 15 to 26 of this one; 0 is all.  The rows stand in runs/raters/*.jsonl with the raters
named, as train_rm.py reads them.  Which of them train is a hash of the text: the val and test rows are as people wrote
them, so every model is measured against the same clean means.

Writes benchmarks/results/raters.json after each part; a trained model that is there is not trained again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf import data  # noqa: E402
from minirlhf.feedback.raters import combine_raters  # noqa: E402
from minirlhf.measure import baselines, stats  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks/results/raters.json"
KINDS = {
    "clean": [],
    "random": ["random"],
    "inverted": ["inverted"],
    "both": ["random", "inverted"],
}  # taken in turn
WAYS = ("mean", "majority", "model")


def corrupt(ratings: list[int], kinds: list[str], rng: np.random.Generator) -> list[int]:
    """An item's scores in -4..4, those of every third rater replaced."""
    found = list(ratings)
    for i, place in enumerate(range(0, len(ratings), 3) if kinds else []):
        found[place] = int(rng.integers(-4, 5)) if kinds[i % len(kinds)] == "random" else -ratings[place]
    return found


def write(condition: str, keep: int, clean: list[data.Response]) -> Path:
    """All reviews as train_rm.py takes them, the ratings of training items cut to `keep` raters and corrupted."""
    rng, lines = np.random.default_rng(0), []
    for r in clean:
        ratings = r.ratings
        if data.split_of(*data.as_example(r)) == "train":
            ratings = corrupt(ratings[: keep or None], KINDS[condition], rng)
        row = {"text": r.response, "genre": r.genre, "scale": r.scale}
        lines.append(
            json.dumps(row | {"ratings": {f"rater {j}": score for j, score in enumerate(ratings, 1)}}) + "\n"
        )
    path = ROOT / f"runs/raters/{condition}-{keep}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines).encode())
    return path


def compare(path: Path, clean: list[data.Response]) -> dict:
    """Each way's training targets against the mean of ALL clean raters; and test r of TF-IDF + ridge trained on them."""
    means = {r.response: r.rating for r in clean}
    train, val, test = (data.load(path).select(split).records for split in ("train", "val", "test"))
    truth, found = [means[r.response] for r in train], {}
    held = [r.response for r in val], [r.rating for r in val], [r.response for r in test]
    for how in WAYS:
        said, raters = combine_raters([r.ratings for r in train], [r.raters for r in train], how)
        predicted = baselines.tfidf_ridge([r.response for r in train], said, *held)
        rmse = float(np.sqrt(np.mean((said - truth) ** 2)))
        found[how] = {"pearson": stats.pearson(said, truth), "rmse": rmse, "raters": raters,
                      "tfidf_test_pearson": predicted and stats.pearson(predicted, [r.rating for r in test])}  # fmt: skip
    return found


def train(path: Path, how: str, seed: int, init: Path, options: list[str]) -> dict:
    """The reward model's results on the clean test split."""
    out = ROOT / f"runs/raters/{path.stem}-{how}-{seed}"
    command = [
        "train_rm.py",
        "--data",
        path,
        "--raters",
        how,
        "--seed",
        seed,
        "--init",
        init.resolve(),
        "--out",
        out,
        "--resume",
    ]
    command = [*map(str, command), "--genres", "movies", "--normalise", "none", *options]
    print("\n$", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return json.loads((out / "config.json").read_text())["results"]


def table(found: dict) -> str:
    """In Markdown, a column for each way: r of the targets, of TF-IDF + ridge and of the reward models (mean over seeds)."""
    number = lambda x: "-" if x is None else f"{x:.3f}"
    lines = ["| raters an item | corrupted | " + " | ".join(WAYS) + " |", "|---" * (2 + len(WAYS)) + "|"]
    for name, ways in found.items():
        condition, keep = name.split("-")
        cells = []
        for how in WAYS:
            tests = [run["test"]["pearson"] for run in ways[how].get("train", {}).values()]
            numbers = [
                ways[how]["pearson"],
                ways[how]["tfidf_test_pearson"],
                *([mean(tests)] if tests else []),
            ]
            cells.append(" / ".join(map(number, numbers)))
        lines.append(f"| {int(keep) or 'all'} | {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[0, 6], help="raters of a training item; 0: all"
    )
    parser.add_argument("--conditions", choices=KINDS, nargs="+", default=[*KINDS])
    parser.add_argument("--train", action="store_true", help="train reward models as well")
    parser.add_argument(
        "--init", type=Path, default=Path("runs/demo/sft"), help="checkpoint that they start from"
    )
    parser.add_argument(
        "--ways", choices=WAYS, nargs="+", default=["mean", "model"], help="--raters of those trained"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("options", nargs="*", help="more options of train_rm.py, behind --")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    save = lambda: write_atomically(RESULTS, json.dumps(known, indent=1).encode())
    clean = data.load("vader").select(genres=["movies"]).records
    paths = {f"{c}-{keep}": write(c, keep, clean) for keep in args.keep for c in args.conditions}
    for name, path in paths.items():
        before = known.get(name, {})
        known[name] = {how: before.get(how, {}) | found for how, found in compare(path, clean).items()}
        save()
    for seed in args.seeds if args.train else []:
        for name, path in paths.items():
            for how in args.ways:
                known[name][how].setdefault("train", {})[str(seed)] = train(
                    path, how, seed, args.init, args.options
                )
                save()
    print(
        "r of the targets with the clean means / test r of TF-IDF + ridge / of the reward models, where trained\n"
    )
    print(table(known))


if __name__ == "__main__":
    main()
