"""Speed of train_sft.py and of nanoGPT at nanoGPT's published CPU setting, and the loss after the same steps.

    git clone https://github.com/karpathy/nanoGPT && git -C nanoGPT checkout 3adf61e154c3fe3fca428ad6bc3818b27a3b8291
    python -m venv .peer && .peer/bin/pip install -r benchmarks/peers/requirements.txt # the peers' environment, once
    python benchmarks/sft.py --nanogpt nanoGPT --peer-python .peer/bin/python          # the table, and results/sft.json
    python benchmarks/sft.py --tables                                                  # runs nothing: prints the table

nanoGPT runs its README's CPU command: 4 layers, 4 heads, 128 wide, dropout 0, 12 x 64 characters per step, 2000 steps, in fp32
(on a CPU its dtype is not used). Its own prepare.py splits the text and its own train.py trains, both unmodified, in a copy
of its folder. Ours is train_sft.py with options of the same meaning, on rows of 63 characters cut at random places from the
same nine tenths: with an end of text before and after, 64 predictions per row. The text: Python's own standard library.

What differs. Ours learns 63 characters and an end of text where nanoGPT learns 64 characters; has biases (train_sft.py cannot
leave them out), the tanh form of GELU, a position and two tokens more; and its learning rate falls to 0,
not to a tenth. nanoGPT's --max_iters is one less than published, as it makes one step more than that.

Speed: tokens per second of the median step, from the wall clock between steps, without those that evaluate. Loss: nats per
character, fp32, over characters 2 to 63 of the same held-out windows, given those before them; ours reads its end of text
first, as in training. It predicts among its special tokens too, which nanoGPT does not have.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import beside  # noqa: E402
from benchmarks.demo import table  # noqa: E402
from minirlhf.support import cli  # noqa: E402

RESULTS = ROOT / "benchmarks/results/sft.json"
COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
CHARACTERS = 1_100_000  # of the text
WIDTH = 63  # characters per row, and per window
BATCH = 12  # rows per step
WINDOWS = 500  # held out
OURS = ("fp32", "bf16")
SPEED, LOSS = 1.0, 0.01  # for --check: times nanoGPT's speed, at least; nats above its loss, at most


def prepare(folder: Path, nanogpt: Path | None, steps: int) -> None:
    """Write the text (as rows and a tokenizer of characters for ours, in a copy of its folder for nanoGPT) and held-out windows."""
    from minirlhf.data import split_of
    from minirlhf.tokenizer import Tokenizer

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(
        c
        for file in files
        for c in file.read_text(encoding="utf-8")
        if c == "\n" or c.isascii() and c.isprintable()
    )
    text = text[:CHARACTERS]
    assert len(text) == CHARACTERS
    cut = int(0.9 * len(text))  # as nanoGPT's prepare.py
    rng = random.Random(0)

    def windows(part: str, split: str, number: int) -> list[str]:
        """Cut at random; train_sft.py takes the rows whose hash says `train` and validates on those that it puts in `val`."""
        found = []
        while len(found) < number:
            start = rng.randrange(len(part) - WIDTH)
            window = part[start : start + WIDTH]
            if window.strip() and split_of("", window) == split:
                found.append(window)
        return found

    held_out = windows(text[cut:], "val", WINDOWS)
    rows = [{"text": row} for row in windows(text[:cut], "train", BATCH * steps) + held_out]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "windows.json").write_text(json.dumps(held_out))
    Tokenizer({c.encode(): i for i, c in enumerate(sorted(set(text)))}).save(folder / "tokenizer")
    if nanogpt:
        shutil.copytree(
            nanogpt, folder / "nanogpt", ignore=shutil.ignore_patterns(".git", "assets", "*.bin", "*.pkl")
        )
        (folder / "nanogpt/data/shakespeare_char/input.txt").write_text(
            text
        )  # it downloads Shakespeare if there is none


def ours(job: dict) -> None:
    """Run train_sft.py and read the loss on the windows, in a process of its own; print what was measured as JSON."""
    import torch

    import train_sft
    from minirlhf import checkpoint, run
    from minirlhf.support import hardware
    from minirlhf.tokenizer import Tokenizer

    folder, out = Path(job["folder"]), Path(job["out"])
    torch.set_num_threads(job["threads"])
    stamps, tokens = [], set()

    class Logger(run.MetricLogger):
        """Notes when a step is over: the clock of metrics.jsonl does not count writing it and drawing the progress bar."""

        def log(self, step: int, metrics: dict) -> None:
            super().log(step, metrics)
            stamps.append(time.perf_counter())
            tokens.add(metrics["train/tokens"])

    run.MetricLogger = Logger
    options = {"data": folder / "rows.jsonl", "tokenizer": folder / "tokenizer", "out": out, "context": WIDTH + 2, "n-layer": 4,
               "n-head": 4, "n-embd": 128, "dropout": 0, "epochs": 1, "final-epochs": 1, "batch": BATCH, "lr": 1e-3,
               "warmup": 100, "weight-decay": 0.1, "seed": job["seed"], "precision": job["precision"]}  # fmt: skip
    sys.argv = ["train_sft.py", *(str(x) for name, value in options.items() for x in (f"--{name}", value)),
                "--betas", "0.9", "0.99"]  # fmt: skip
    cli.run_script(train_sft.main)
    assert len(stamps) == job["steps"] and tokens == {BATCH * (WIDTH + 1)}, (len(stamps), tokens)

    model, tokenizer = checkpoint.load_gpt(out).eval(), Tokenizer.load(out)
    x = torch.tensor(
        [[tokenizer.bos, *tokenizer.encode(w)] for w in json.loads((folder / "windows.json").read_text())]
    )
    assert x.shape == (WINDOWS, 1 + WIDTH)
    with torch.no_grad():
        logits = model.logits(model(x[:, :-1]))[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 2:].flatten()).item()
    seconds = [
        end - start for start, end in zip(stamps, stamps[1:-1], strict=False)
    ]  # the last step validates
    print(json.dumps({"seconds": seconds, "steps": len(stamps), "tokens": int(tokens.pop()), "loss": loss,
                      "parameters": sum(p.numel() for p in model.parameters()), "versions": hardware.versions()}))  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, list[dict]]:
    """{'nanoGPT' or a variant of ours: its measurements}; processes take turns."""
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.nanogpt, args.steps)
        job = {"threads": args.threads, "folder": folder, "steps": args.steps}
        for k in range(args.rounds):
            jobs = {
                f"ours, {p}": (
                    sys.executable,
                    "benchmarks/sft.py",
                    {"precision": p, "out": f"{folder}/{p}-{k}"},
                )
                for p in OURS
            }
            if args.nanogpt:
                jobs = {
                    "nanoGPT, fp32": (args.peer_python, "benchmarks/peers/nanogpt.py", {"batch": BATCH})
                } | jobs
            for name, (python, script, more) in jobs.items():
                one = beside.child(python, script, job | {"seed": k} | more)
                assert one["steps"] == args.steps and one["tokens"] == BATCH * (WIDTH + 1), one
                deciles = quantiles(one.pop("seconds"), n=10)
                one |= {"p10": deciles[0], "median": deciles[4], "p90": deciles[8]}  # seconds per step
                found.setdefault(name, []).append(one)
            print(f"round {k + 1} of {args.rounds}", flush=True)
    return found


def report(found: dict[str, list[dict]]) -> tuple[str, list[str]]:
    """(the table, what is beyond its bound)."""
    speeds = {name: [one["tokens"] / one["median"] for one in runs] for name, runs in found.items()}
    losses = {name: [one["loss"] for one in runs] for name, runs in found.items()}
    base, rows, missed = "nanoGPT, fp32", [], []
    for name in found:
        times = more = ""
        if base in found and name != base:
            ratio = median(speeds[name]) / median(speeds[base])
            difference = median(losses[name]) - median(losses[base])
            times, more = f"{ratio:.2f}", f"{difference:+.3f}"
            if ratio < SPEED:
                missed.append(f"{name}: {ratio:.2f} x nanoGPT's speed, bound {SPEED:g} x")
            if difference > LOSS:
                missed.append(f"{name}: loss {difference:+.4f} against nanoGPT's, bound {LOSS:+g}")
        rows.append(
            [
                name,
                f"{median(speeds[name]):.0f} ({min(speeds[name]):.0f} to {max(speeds[name]):.0f})",
                times,
                f"{median(losses[name]):.3f} ({min(losses[name]):.3f} to {max(losses[name]):.3f})",
                more,
            ]
        )
    head = [
        "tokens/s (range over runs)",
        "times nanoGPT",
        "held-out nats/character (range)",
        "against nanoGPT",
    ]
    return table(head, rows), missed


def main() -> None:
    parser = beside.parser(__doc__, RESULTS, rounds=3)
    parser.add_argument(
        "--nanogpt", type=Path, help=f"Clone of nanoGPT at {COMMIT[:8]}. Left out, only minirlhf is measured."
    )
    parser.add_argument("--steps", type=cli.number(cli.Count), default=2000, help="Optimiser steps per run.")
    args = parser.parse_args()
    if args.job:
        ours(args.job)
        return
    if bool(args.nanogpt) != bool(args.peer_python):
        parser.error("--nanogpt and --peer-python go together")
    if args.nanogpt:
        commit = subprocess.check_output(["git", "-C", args.nanogpt, "rev-parse", "HEAD"], text=True).strip()
        if commit != COMMIT or subprocess.check_output(
            ["git", "-C", args.nanogpt, "status", "--porcelain", "-uno"]
        ):
            parser.error(f"{args.nanogpt}: not an unchanged checkout of {COMMIT}")
    if not args.tables:
        known = {
            "runs": run(args),
            "steps": args.steps,
            "nanogpt": COMMIT,
            "machine": beside.machine(args.threads),
        }
        args.out.write_text(json.dumps(known, indent=1))
    elif not args.out.exists():
        parser.error(f"{args.out}: no results yet: run without --tables first")
    beside.conclude(*report(json.loads(args.out.read_text())["runs"]), args.check)


if __name__ == "__main__":
    cli.run_script(main)
