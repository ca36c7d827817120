"""Do rounds of feedback help? Simulated raters judge texts of each round's policy. The control is the same number of
judgements, all of the first policy's texts.

    python benchmarks/rounds.py --init runs/demo/sft --gold runs/minilm-1/rm --seeds 1 2 3

The raters are SIMULATED: each prefers the text that the gold reward model (--gold, used for nothing else) scores higher after
noise of .5, 1 or 2 rating points is added to the difference, and all three judge every pair. A round is the sequence of
commands in docs/feedback.md: sample pairs from the last policy where the reward model's members disagree or scores are high,
judge them, export all judgements so far, train a reward model (three members) on them, and run PPO from the SFT model. Round
0 samples from the SFT model. `control` is a reward model on as many judgements as the last round's, all of round 0's kind.

The gold model scores the texts of every sixth PPO iteration. A policy's gold score at a KL is interpolated between the two
points around it. Writes benchmarks/results/rounds.json after each policy. Finished stages are not run again.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import demo  # noqa: E402
from benchmarks.demo import command  # noqa: E402
from benchmarks.readers import Judge, looks, rows_of  # noqa: E402
from minirlhf.feedback.store import Policy, Store  # noqa: E402
from minirlhf.support import cli  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks/results/rounds.json"
NOISE = {"ann": 0.5, "bob": 1.0, "cid": 2.0}  # points
EVERY = 6  # PPO iterations between the rollouts that are scored


def judge(path: Path, gold: Judge, seed: int) -> int:
    """Let every simulated rater judge what is open in the store, and return the number of votes."""
    store, votes = Store(path, Policy(raters=len(NOISE), gold_every=0, repeat_every=0)), 0
    said: dict[tuple[str, str], float] = {}

    def worth(item: dict) -> list[float]:
        new = [
            {"prompt": item["prompt"], "response": t}
            for t in item["texts"]
            if (item["prompt"], t) not in said
        ]
        if new:
            said.update(zip(((r["prompt"], r["response"]) for r in new), gold(new), strict=True))
        return [said[item["prompt"], t] for t in item["texts"]]

    for name, noise in NOISE.items():
        rng, item = random.Random(f"{seed} {name} {path.stem}"), store.next(name)
        while item:
            left, right = worth(item)
            choice = "left" if left - right + rng.gauss(0, noise) > 0 else "right"
            item, votes = store.vote(name, item["item"], item["lease"], {"choice": choice}), votes + 1
    return votes


def at_kl(curve: list[dict], nats: float) -> float | None:
    """The gold score where the curve first reaches this KL, interpolated; None where it does not reach it."""
    for before, after in zip(curve, curve[1:], strict=False):
        if before["kl"] <= nats <= after["kl"]:
            share = (nats - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


def judged(
    args: argparse.Namespace, out: Path, store: Path, samples: list[tuple], gold: Judge, seed: int
) -> Path:
    """OUT/feedback/preferences.jsonl: all judgements in the store, once new items (by each of `samples`) have been judged."""
    pairs = out / "feedback/preferences.jsonl"
    if not pairs.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        for writer, draw, *options in samples:
            asked = ("--prompts", args.prompts, "--limit", args.pairs, "--seed", draw, *options)
            command("-m", "minirlhf.feedback", "sample", writer, "--store", store, *asked)
        judge(store, gold, seed)
        command("-m", "minirlhf.feedback", "export", pairs.parent, "--store", store)
    return pairs


def policy(args: argparse.Namespace, out: Path, pairs: Path, seed: int, gold: Judge) -> dict:
    """Train OUT/rm and OUT/ppo; the gold model's scores along the way."""
    common = ("--preset", args.preset, "--init", args.init, "--seed", seed, "--resume")
    few = (
        "--members",
        3,
        "--epochs",
        args.epochs,
        "--batch",
        16,
        "--warmup",
        10,
    )  # for hundreds of pairs, not thousands
    command("train_rm.py", "--data", pairs, "--out", out / "rm", *few, *common)
    command(
        "train_ppo.py",
        "--out",
        out / "ppo",
        "--save-samples",
        EVERY,
        "--iterations",
        args.iterations,
        "--kl-coef",
        0.1,
        "--lr",
        2e-4,
        *common,
    )
    curve = []
    for step, rows in rows_of(out / "ppo/samples.jsonl").items():
        read = {
            "kl": mean(r["kl"] for r in rows),
            "proxy": mean(r["rm"] for r in rows),
            "gold": mean(gold(rows)),
        }
        curve.append({"step": step} | read | looks(rows))
    about = json.loads((out / "rm/config.json").read_text())["results"]
    return {"pairs": len(pairs.read_text().splitlines()), "rm": about["test"], "curve": curve}


def run(args: argparse.Namespace, seed: int, gold: Judge, save: Callable[[dict], None]) -> None:
    home, found = args.out / f"seed-{seed}", {}
    draws = [100 * k + seed for k in range(args.rounds + 1)]  # of prompts and texts
    for k, draw in enumerate(draws):
        out, last = home / f"round-{k}", home / f"round-{k - 1}"
        chosen = ("--reward-model", last / "rm", "--keep", args.pairs, "--per-prompt", 3)
        samples = [(last / "ppo", draw, *chosen)] if k else [(args.init, draw)]
        pairs = judged(
            args, out, home / "rounds.db", samples, gold, seed
        )  # one store: a round learns from all before it
        found[f"round {k}"] = policy(args, out, pairs, seed, gold)
        save(found)
    out = home / "control"
    pairs = judged(args, out, home / "control.db", [(args.init, draw) for draw in draws], gold, seed)
    found["control"] = policy(args, out, pairs, seed, gold)
    save(found)


def table(seeds: dict[str, dict], nats: list[float]) -> str:
    """In Markdown: each policy's mean gold score at each KL, and by how much it is above round 0's of the same seed, with the
    standard error over seeds; - where some seed's policy did not reach that KL."""
    heads = [f"gold score at {n:g} nats, above round 0 (standard error)" for n in nats]
    rows, whole = [], [found for found in seeds.values() if "control" in found]
    for name in whole[0]:
        cells = []
        for n in nats:
            values, base = (
                [at_kl(found[policy]["curve"], n) for found in whole] for policy in (name, "round 0")
            )
            if None in values + base:
                cells.append("-")
                continue
            gains = [v - b for v, b in zip(values, base, strict=True)]
            error = f" ({stdev(gains) / math.sqrt(len(gains)):.2f})" if len(gains) > 1 else ""
            cells.append(
                f"{mean(values):+.2f}" + (f", {mean(gains):+.2f}{error}" if name != "round 0" else "")
            )
        rows.append([name, str(whole[0][name]["pairs"]), *cells])
    return demo.table(["pairs", *heads], rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--init", type=Path, default=Path("runs/demo/sft"), help="SFT model, which PPO starts from."
    )
    parser.add_argument(
        "--gold", type=Path, default=Path("runs/minilm-1/rm"), help="Reward model that simulates the raters."
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/rounds", help="Folder for stores and checkpoints."
    )
    parser.add_argument("--preset", default="demo", help="Preset of the stage scripts.")
    parser.add_argument("--prompts", default="vader", help="Prompts, as `feedback sample` takes them.")
    parser.add_argument(
        "--seeds", type=cli.number(cli.Seed), nargs="+", default=[1, 2, 3], help="Seeds, one whole run each."
    )
    parser.add_argument("--rounds", type=cli.number(cli.CountOr0), default=2, help="Rounds after the first.")
    parser.add_argument("--pairs", type=cli.number(cli.Count), default=600, help="New pairs per round.")
    parser.add_argument(
        "--epochs",
        type=cli.number(cli.Count),
        default=4,
        help="Epochs of each reward model over all pairs so far.",
    )
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=48, help="PPO iterations per policy."
    )
    parser.add_argument(
        "--nats",
        type=cli.number(cli.Above0),
        nargs="+",
        default=[3.0, 4.0, 5.0],
        help="KLs, in nats per sequence, at which policies are compared.",
    )
    parser.add_argument(
        "--tables", action="store_true", help="Train nothing, and print the table of the committed results."
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.tables:
        gold = Judge(args.gold)
        for seed in args.seeds:

            def save(found: dict, seed: int = seed) -> None:
                known[str(seed)] = found
                write_atomically(RESULTS, json.dumps(known, indent=1).encode())

            run(args, seed, gold, save)
    print(table(known, args.nats))


if __name__ == "__main__":
    cli.run_script(main)
