"""What PPO does to a reward model when the KL penalty is cut: its reward, and that of independent judges, as KL grows.

    python benchmarks/gaming.py --run runs/demo --fluency runs/smollm2/base --seeds 1 2 3

Policies start from RUN/sft and are tuned against an ensemble of three reward models (OUT/ensemble, trained here on half of
the built-in ratings). The KL coefficient is .1, .01 or 0; with .01 and 0 also with defences: the members' disagreement is
taken off the score, and responses that repeat themselves or share phrases with the rest of the batch are penalised. The
texts of every sixth iteration are scored by
- proxy: the ensemble's mean, which PPO maximises;
- judge: a reward model of the same kind, trained on the other half of the ratings (RUN/judge);
- strong: a reward model on pretrained weights, other half, other seed (--strong; trained here from --fluency unless given);
- fluency: the perplexity of the responses under a language model that took no part (--fluency);
- distinct-2: the share of different word pairs among all of a rollout's.

Writes benchmarks/results/gaming.json after each policy, and gaming.png. Finished stages are not run again.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import demo  # noqa: E402
from benchmarks.demo import command  # noqa: E402
from benchmarks.readers import Fluency, Judge, looks, rows_of  # noqa: E402
from minirlhf.support import cli  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks/results/gaming.json"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#707070", "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7")
EVERY = 6  # PPO iterations between the rollouts that are scored
POINT = 2  # the table and the plot average so many scored rollouts: 128 texts alone are noisy
DEFENCES = ["--disagreement-coef", 2, "--reward", "rm", "--reward", "minirlhf.rewards:repetition:-2",
            "--reward", "minirlhf.rewards:sameness:-20"]  # fmt: skip
ARMS = {
    "SFT": [],  # the first iteration's texts, which the SFT model writes
    "kl_coef .1": ["--kl-coef", 0.1],
    "kl_coef .01": ["--kl-coef", 0.01],
    "kl_coef 0": ["--kl-coef", 0.0],
    "kl_coef .01, defences": ["--kl-coef", 0.01, *DEFENCES],
    "kl_coef 0, defences": ["--kl-coef", 0.0, *DEFENCES],
}


def curve(samples: Path, readers: dict) -> list[dict]:
    found = []
    for step, rows in rows_of(samples).items():
        own = {
            "kl": mean(r["kl"] for r in rows),
            "proxy": mean(r["rm"] for r in rows),
            "judge": mean(r["judge"] for r in rows),
        }
        found.append(
            {"step": step} | own | {name: read(rows) for name, read in readers.items()} | looks(rows)
        )
    return found


def points(curves: list[list[dict]]) -> list[dict]:
    """One curve: the mean over seeds and over each POINT rollouts."""
    rollouts = [*zip(*curves, strict=True)]  # [read, seeds]
    pools = [sum(rollouts[i : i + POINT], ()) for i in range(0, len(rollouts), POINT)]
    return [{name: mean(p[name] for p in pool) for name in pool[0]} for pool in pools]


def below_peak(line: list[dict]) -> float:
    return max(p["strong"] for p in line) - line[-1]["strong"]


def table(arms: dict[str, dict]) -> str:
    """In Markdown: every arm at its end, as the mean over seeds, and by how much the strong judge's score is below its peak there,
    for the mean curve and for each seed's."""
    rows = []
    for arm, seeds in arms.items():
        line, drops = points([*seeds.values()]), [f"{below_peak(points([c])):.2f}" for c in seeds.values()]
        at = line[-1]
        signed = [f"{at[name]:+.2f}" for name in ("proxy", "judge", "strong")]
        below = f"{below_peak(line):.2f} ({', '.join(drops)})" if len(line) > 1 else ""
        rows.append(
            [arm, f"{at['kl']:.1f}", *signed, below, f"{at['fluency']:.0f}", f"{at['distinct_2']:.2f}"]
        )
    head = [
        "KL, nats",
        "proxy",
        "judge",
        "strong judge",
        "... below its peak (seeds)",
        "perplexity",
        "distinct-2",
    ]
    return demo.table(head, rows)


def plot(arms: dict[str, dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"proxy": "proxy: what PPO maximises", "judge": "judge of the same kind", "strong": "strong judge",
             "fluency": "perplexity of the responses", "distinct_2": "distinct-2"}  # fmt: skip
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.1), constrained_layout=True)
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        for colour, (arm, seeds) in zip(COLOURS, arms.items(), strict=False):
            for k, line in enumerate(map(points, ([c] for c in seeds.values()))):
                style = {"color": colour, "marker": ".", "lw": 1, "label": None if k else arm}
                axis.plot([p["kl"] for p in line], [p[name] for p in line], **style)
        axis.set(title=title, xlabel="KL, nats")
        if name == "fluency":
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(target, dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="Folder with the checkpoints sft and judge."
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/gaming", help="Folder for the ensemble and the policies."
    )
    parser.add_argument("--preset", default="demo", help="Preset of the stage scripts.")
    parser.add_argument(
        "--strong",
        type=Path,
        help="Reward model on pretrained weights. Default: OUT/strong, trained from --fluency.",
    )
    parser.add_argument(
        "--fluency",
        type=Path,
        default=Path("runs/smollm2/base"),
        help="Language model that took no part in training.",
    )
    parser.add_argument(
        "--arms", choices=ARMS, nargs="+", default=[*ARMS], help="Rows of the table to train."
    )
    parser.add_argument("--seeds", type=cli.number(cli.Seed), nargs="+", default=[1], help="Seeds of PPO.")
    parser.add_argument(
        "--iterations", type=cli.number(cli.Count), default=96, help="PPO iterations per policy."
    )
    parser.add_argument(
        "--tables", action="store_true", help="Train nothing, and print the table of the committed results."
    )
    parser.add_argument(
        "--plot", action="store_true", help="Train nothing, and draw the plot of the committed results."
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not (args.tables or args.plot):
        sft, ensemble, common = args.run / "sft", args.out / "ensemble", ("--preset", args.preset, "--resume")
        command("train_rm.py", "--init", sft, "--part", "a", "--members", 3, "--out", ensemble, *common)
        if args.strong is None:
            how = ("--init", args.fluency, "--reference", sft, "--part", "b", "--seed", 101)
            command("train_rm.py", "--preset", "smollm2", *how, "--out", args.out / "strong", "--resume")
        strong, fluency = Judge(args.strong or args.out / "strong"), Fluency(args.fluency)
        readers = {"strong": lambda rows: mean(strong(rows)), "fluency": fluency}
        for seed, arm in product(args.seeds, args.arms):
            out = args.out / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
            models = ("--init", sft, "--reward-model", ensemble, "--monitor", args.run / "judge")
            length = (1, 1) if arm == "SFT" else (args.iterations, EVERY)
            how = ("--iterations", length[0], "--save-samples", length[1], "--seed", seed, "--lr", 2e-4)
            command("train_ppo.py", *models, *how, *ARMS[arm], "--out", out, *common)
            known.setdefault(arm, {})[str(seed)] = curve(out / "samples.jsonl", readers)
            write_atomically(RESULTS, json.dumps(known, indent=1).encode())
    known = {arm: known[arm] for arm in ARMS if arm in known}
    print(table(known))
    if not args.tables:
        plot(known, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    cli.run_script(main)
