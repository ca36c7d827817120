"""How much reward a nat of KL buys: every algorithm of the family at several KL coefficients, beside best-of-n.

    python benchmarks/demo.py --seeds 1 2 3                        # the SFT, reward and judge models: runs/seed-1 ...
    python benchmarks/frontier.py --seeds 1 2 3                    # everything, hours on two cores
    python benchmarks/frontier.py --seeds 1 --algorithms rloo --kl-coefs 0.2
    python benchmarks/frontier.py --costs                          # minutes: seconds and memory per iteration
    python benchmarks/frontier.py --tables                         # trains nothing: prints the tables of the results

All start from the same SFT model, practise on the same prompts with the same number of sampled responses, and maximise
the same reward model (RUN/rm-a). What differs is a row of minirlhf/algorithms.py. The learning rate was chosen among three on
the practice prompts of one seed. The KL stands in the reward for all of them, or coefficients could not be compared.
Each policy then continues 256 test prompts that no stage has seen, SAMPLES times, and is scored by
- score: the reward model that was maximised;
- judge: a reward model of the same kind on the other half of the ratings (RUN/judge);
- strong: with --strong, a reward model on pretrained weights. It reads one sample per prompt, and of best-of-n the picks
  among the first n samples.

Best-of-n picks by `score` among N samples of the SFT model. Its means are expectations over all subsets of n of them, and its
KL is the bound ln n - (n - 1) / n [D20], which holds for each prompt.

Each policy's result is kept in OUT/ALGORITHM-KL-SEED/frontier.json, so that several processes may share the work. The table
and the figure are made of what is there, and written to benchmarks/results/frontier.json and frontier.png.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.beside import quietly  # noqa: E402
from benchmarks.demo import command, table  # noqa: E402
from minirlhf import checkpoint, data, ppo  # noqa: E402
from minirlhf.algorithms import ALGORITHMS  # noqa: E402
from minirlhf.rewards import RewardReader  # noqa: E402
from minirlhf.rollout import Texts  # noqa: E402
from minirlhf.support import cli  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402
from minirlhf.tools import evaluate  # noqa: E402

RESULTS = ROOT / "benchmarks/results/frontier.json"
COSTS = ROOT / "benchmarks/results/frontier_costs.json"
PROMPTS, SAMPLES = 256, 4  # test prompts, and how often each policy continues each
BEST_OF, DRAWS = (2, 4, 8, 16, 32, 64, 128), 128
COST_ITERATIONS, COST_ROUNDS = 4, 3
PARTS = ("rollout", "score", "update")
RATE = 4e-4  # of 1e-4, 2e-4 and 4e-4 the best for PPO, RLOO and GRPO: benchmarks/results/frontier_rates.txt
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")


class Reader:
    """What is fixed for a seed: the test prompts, the SFT model, and those that score."""

    def __init__(self, run: Path, strong: Path | None):
        self.run = run
        sft = checkpoint.resolve(run / "sft")
        self.sft, self.tokenizer = checkpoint.load_gpt(sft).eval(), Tokenizer.load(sft)
        folders = {"score": run / "rm-a", "judge": run / "judge"}
        self.readers = {name: RewardReader.load(folder, "train it first") for name, folder in folders.items()}
        self.strong = RewardReader.load(strong, "train it first")
        settings = {
            "response_tokens": 24,
            "temperature": 1.0,
            "stop": True,
        }  # those of train_ppo.py's demo preset
        self.sampling = evaluate.sampling_of(settings, self.tokenizer)
        source = data.load("vader")
        part = source.select("test", source.genres_among(["movies"]))
        room = self.sft.config.context - self.sampling.max_new
        prompts = data.encode_prompts(self.tokenizer, part.records, 4, room)
        self.prompts = [prompts[i] for i in data.cursor(len(prompts), PROMPTS, 1, 0)]

    @torch.no_grad()
    def scores(self, texts: Texts) -> dict[str, np.ndarray]:
        return {name: r.scores(texts, self.tokenizer, 128)[0].numpy() for name, r in self.readers.items()}

    def of_policy(self, folder: Path) -> dict[str, float]:
        """Means over prompts and samples, each with its standard error over prompts."""
        policy = checkpoint.load_gpt(folder).eval()
        found, distinct, ended = [], [], []
        for k in range(SAMPLES):
            texts = evaluate.write(policy, self.prompts, self.sampling, 1000 + k)
            kl = evaluate.nats(texts, policy, self.sft, self.sampling)[0].numpy()
            found.append(self.scores(texts) | {"kl": kl})
            looks = evaluate.text_measures(texts, self.tokenizer.ends)
            distinct.append(looks["distinct_2"])
            ended.append(looks["eos_rate"])
        row = {"distinct_2": mean(distinct), "eos_rate": mean(ended)}
        for name in found[0]:
            by_prompt = np.mean([part[name] for part in found], 0)
            row |= {
                name: float(by_prompt.mean()),
                f"{name}_se": float(by_prompt.std() / math.sqrt(len(by_prompt))),
            }
        return row

    def best_of_n(self) -> dict[str, dict[str, float]]:
        drawn = [self.scores(evaluate.write(self.sft, self.prompts, self.sampling, k)) for k in range(DRAWS)]
        by_name = {
            name: np.stack([part[name] for part in drawn]) for name in self.readers
        }  # [DRAWS, PROMPTS]
        return {str(n): {"kl": ppo.best_of_n_kl(n)} | best_of(by_name, n) for n in (1, *BEST_OF)}

    @torch.no_grad()
    def strong_score(self, texts: Texts) -> dict[str, float]:
        scores = self.strong.scores(texts, self.tokenizer, 16)[0].numpy()
        return {"strong": float(scores.mean()), "strong_se": float(scores.std() / math.sqrt(len(scores)))}

    def strong_of_policy(self, folder: Path) -> dict[str, float]:
        policy = checkpoint.load_gpt(folder).eval()
        return self.strong_score(evaluate.write(policy, self.prompts, self.sampling, 1000))

    @torch.no_grad()
    def strong_best_of_n(self) -> dict[str, dict[str, float]]:
        write = lambda k: evaluate.write(self.sft, self.prompts, self.sampling, k)
        score_of = lambda texts: self.readers["score"].scores(texts, self.tokenizer, 128)[0]
        best = write(0)
        best_score, row = score_of(best), {"1": self.strong_score(best)}
        for n in range(2, DRAWS + 1):
            texts = write(n - 1)
            score = score_of(texts)
            picked = torch.where(score > best_score, PROMPTS, 0) + torch.arange(PROMPTS)  # of the two halves
            best, best_score = Texts.cat([best, texts])[picked], torch.maximum(score, best_score)
            if n in BEST_OF:
                row[str(n)] = self.strong_score(best)
        return row


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What a file holds; what is made for it, if there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(make(), indent=1).encode())
    return json.loads(file.read_text())


def best_of(scores: dict[str, np.ndarray], n: int) -> dict[str, float]:
    """Expected scores of the sample with the highest `score` among n of the DRAWS, all subsets alike: {name: mean, name_se}.

    The k-th best of N samples is the best of a random subset of n with probability C(N - k, n - 1) / C(N, n)."""
    N = len(scores["score"])
    order = np.argsort(-scores["score"], 0)  # [N, PROMPTS]
    chance = np.array([math.comb(N - 1 - k, n - 1) / math.comb(N, n) for k in range(N)])
    row = {}
    for name, values in scores.items():
        by_prompt = chance @ np.take_along_axis(values, order, 0)
        row |= {
            name: float(by_prompt.mean()),
            f"{name}_se": float(by_prompt.std() / math.sqrt(len(by_prompt))),
        }
    return row


def options(args: argparse.Namespace, algorithm: str, kl_coef: float, seed: int, iterations: int) -> list:
    """What follows train_ppo.py on its command line, but for --out."""
    run = args.runs / f"seed-{seed}"
    models = ["--init", run / "sft", "--reward-model", run / "rm-a", "--monitor", run / "judge"]
    how = ["--algorithm", algorithm, "--kl", "reward", "--kl-coef", kl_coef, "--lr", args.lr or RATE]
    size = ["--iterations", iterations, "--save-every", iterations, "--seed", seed]
    return [*models, *how, *size, *args.options.split()]


def costs(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """{algorithm: what each of its processes took}: seconds per iteration, without the first, and peak memory."""
    found: dict[str, list[dict[str, float]]] = {}
    for _, algorithm in product(range(COST_ROUNDS), args.algorithms):
        with tempfile.TemporaryDirectory() as folder:
            words = options(args, algorithm, 0.2, args.seeds[0], COST_ITERATIONS)
            peak = quietly("train_ppo.py", *words, "--out", f"{folder}/ppo")
            lines = Path(folder, "ppo/metrics.jsonl").read_text().splitlines()[1:]
        parts = {part: median(json.loads(line)[f"time/{part}"] for line in lines) for part in PARTS}
        found.setdefault(algorithm, []).append(parts | {"peak_mb": peak / 2**20})
    return found


def table_of_costs(found: dict[str, list[dict[str, float]]]) -> str:
    """In Markdown: medians over processes."""
    rows = []
    for algorithm, rounds in found.items():
        parts = [median(one[part] for one in rounds) for part in PARTS]
        peak = median(one["peak_mb"] for one in rounds)
        rows.append([algorithm, f"{sum(parts):.2f}", *(f"{part:.2f}" for part in parts), f"{peak:.0f}"])
    return table(["s per iteration", *PARTS, "peak MB"], rows)


def measure(reader: Reader, out: Path) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(line[f"time/{part}"] for part in PARTS) for line in lines]
    about = checkpoint.load_config(out)
    used = {name: about["training"][name] for name in ("lr", "iterations", "batch", "minibatch", "kl_coef")}
    return reader.of_policy(out) | used | {"row": about["algorithm"], "seconds": float(np.median(seconds))}


def at(curve: list[dict], kl: float, name: str) -> float | None:
    """The value of a curve at this KL, on straight lines between its points; None beyond its last one."""
    points = sorted(curve, key=lambda p: p["kl"])
    inside = points[0]["kl"] <= kl <= points[-1]["kl"]
    return float(np.interp(kl, [p["kl"] for p in points], [p[name] for p in points])) if inside else None


def summary(results: dict) -> str:
    """In Markdown: a row per algorithm and KL coefficient, means over seeds, with the standard error over seeds in brackets."""
    rows = []
    for arm, seeds in sorted(results["policies"].items(), key=place):
        ps = list(seeds.values())
        lines = {
            seed: at([*results["best_of_n"][seed].values()], p["kl"], "judge") for seed, p in seeds.items()
        }
        known = [p["judge"] - lines[seed] for seed, p in seeds.items() if lines[seed] is not None]
        beside = f"{mean(known):+.2f}" if len(known) == len(ps) else "-"
        cells = [over_seeds(ps, name) for name in ("kl", "score", "judge")]
        rows.append([arm, str(len(ps)), *cells, beside, over_seeds(ps, "strong"),
                     f"{mean(p['distinct_2'] for p in ps):.2f}"])  # fmt: skip
    for n in BEST_OF:
        ps = [seed[str(n)] for seed in results["best_of_n"].values()]
        cells = [over_seeds(ps, name, error=False) for name in ("kl", "score", "judge", "strong")]
        rows.append([f"best of {n}", str(len(ps)), *cells[:3], "", cells[3], ""])
    head = ["seeds", "KL, nats", "score", "judge", "judge - best-of-n's", "strong judge", "distinct-2"]
    return table(head, rows)


def place(arm: tuple[str, dict]) -> tuple:
    """Where a row of the table stands: by algorithm, training and KL coefficient."""
    algorithm, coefficient, *label = arm[0].split(" ")
    return [*ALGORITHMS].index(algorithm), label, float(coefficient)


def over_seeds(rows: list[dict], name: str, error: bool = True) -> str:
    """ "1.43 (0.01)": mean and standard error over the seeds that have it."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    spread = f" ({stdev(values) / math.sqrt(len(values)):.2f})" if error and len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def fit(kls: list[float], gains: list[float], best_of_n: bool) -> tuple[float, float, float]:
    """(alpha, beta, root mean square residual) of what Gao et al. 2023 (arXiv 2210.10760) fit, with d = sqrt(KL).

    The judge's gain over the SFT model is d (alpha - beta d) for best-of-n, and d (alpha - beta log d) for RL."""
    d, gain = np.sqrt(kls), np.array(gains)
    features = np.stack([d, -(d**2) if best_of_n else -d * np.log(d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(features, gain, rcond=None)
    return float(alpha), float(beta), float(np.sqrt(np.mean((features @ [alpha, beta] - gain) ** 2)))


def fits(results: dict) -> str:
    """In Markdown: Gao's two forms on all seeds' points, for best-of-n and for each algorithm with enough points."""
    points: dict[str, list[tuple[float, float]]] = {}
    for seed, line in results["best_of_n"].items():
        start = line["1"]["judge"]
        points.setdefault("best of n", []).extend(
            (line[str(n)]["kl"], line[str(n)]["judge"] - start) for n in BEST_OF
        )
        for arm, seeds in results["policies"].items():
            if seed in seeds:
                row = seeds[seed]
                points.setdefault(arm.split(" ")[0], []).append((row["kl"], row["judge"] - start))
    rows = []
    for name, pairs in points.items():
        if len(pairs) > 4:  # two are fitted
            alpha, beta, residual = fit(*map(list, zip(*pairs, strict=True)), name == "best of n")
            rows.append([name, str(len(pairs)), f"{alpha:.2f}", f"{beta:.2f}", f"{residual:.2f}"])
    return table(["", "points", "alpha", "beta", "residual"], rows)


def plot(results: dict, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    pool = lambda rows, name: mean(row[name] for row in rows)
    for axis, (name, title) in zip(axes, (("score", "reward model"), ("judge", "judge")), strict=True):
        ns = [str(n) for n in (1, *BEST_OF)]
        line = [[seed[n] for seed in results["best_of_n"].values()] for n in ns]
        axis.plot(
            [pool(p, "kl") for p in line],
            [pool(p, name) for p in line],
            color="#707070",
            ls="--",
            label="best of n",
        )
        curves: dict[str, list] = {}  # {"ppo" or "ppo long": its points, one per KL coefficient}
        for arm, seeds in results["policies"].items():
            algorithm, _, *label = arm.split(" ")
            ps = [*seeds.values()]
            curves.setdefault(" ".join([algorithm, *label]), []).append((pool(ps, "kl"), pool(ps, name)))
        for colour, (label, points) in zip(COLOURS, sorted(curves.items()), strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, color=colour, marker=".", lw=1, label=label)
        axis.set(xlabel="KL, nats", ylabel=f"{title}'s score")
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="Folder of seed-1, seed-2, ...")
    add("--out", type=Path, default=Path("runs/frontier"), help="Folder for the policies.")
    add("--seeds", type=cli.number(cli.Seed), nargs="+", default=[1], help="Seeds.")
    add(
        "--algorithms",
        choices=ALGORITHMS,
        nargs="+",
        default=[*ALGORITHMS],
        help="Rows of the family's table.",
    )
    add(
        "--kl-coefs",
        type=cli.number(cli.AtLeast0),
        nargs="+",
        default=[0.05, 0.1, 0.2, 0.3, 0.5],
        help="Coefficients.",
    )
    add("--iterations", type=cli.number(cli.Count), default=75, help="Iterations of 128 responses.")
    add("--lr", type=cli.number(cli.Above0), help="Learning rate. Default: RATE.")
    add("--options", default="", help="More options for train_ppo.py, in one string.")
    add("--label", default="", help="Stands behind the name of the row in the table.")
    add("--strong", type=Path, help="A reward model on pretrained weights that scores, too.")
    add("--costs", action="store_true", help="Measure only what an iteration takes. Let nothing else run.")
    add("--tables", action="store_true", help="Train nothing: print the tables of the committed results.")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.costs:
        write_atomically(COSTS, json.dumps(costs(args), indent=1).encode())
        print(table_of_costs(json.loads(COSTS.read_text())))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"best_of_n": {}, "policies": {}}
    for seed in [] if args.tables else args.seeds:
        reader = Reader(args.runs / f"seed-{seed}", args.strong)
        line = kept(args.out / f"best-of-n-{seed}.json", reader.best_of_n)
        if reader.strong:
            strong = kept(args.out / f"best-of-n-{seed}-strong.json", reader.strong_best_of_n)
            line = {n: line[n] | strong[n] for n in line}
        known["best_of_n"].setdefault(str(seed), {})
        known["best_of_n"][str(seed)] = {n: known["best_of_n"][str(seed)].get(n, {}) | line[n] for n in line}
        for algorithm, kl_coef in product(args.algorithms, args.kl_coefs):
            arm = " ".join([algorithm, f"{kl_coef:g}", *[args.label] * bool(args.label)])
            out = args.out / f"{arm.replace(' ', '-')}-{seed}"
            command(
                "train_ppo.py",
                *options(args, algorithm, kl_coef, seed, args.iterations),
                "--out",
                out,
                "--resume",
            )
            found = kept(out / "frontier.json", partial(measure, reader, out))
            if reader.strong:
                found |= kept(out / "strong.json", partial(reader.strong_of_policy, out))
            latest = (
                json.loads(RESULTS.read_text()) if RESULTS.exists() else known
            )  # of another process, perhaps
            known = {"best_of_n": latest["best_of_n"] | known["best_of_n"], "policies": latest["policies"]}
            of_arm = known["policies"].setdefault(arm, {})
            of_arm[str(seed)] = of_arm.get(str(seed), {}) | found
            write_atomically(RESULTS, json.dumps(known, indent=1).encode())
    print(summary(known))
    print(
        "\nThe judge's gain is d (alpha - beta d) for best-of-n, d (alpha - beta log d) for RL, d = sqrt(KL):\n"
    )
    print(fits(known))
    if COSTS.exists():
        print("\nAn iteration of 128 responses, on two cores:\n")
        print(table_of_costs(json.loads(COSTS.read_text())))
    if not args.tables:
        plot(known, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    cli.run_script(main)
