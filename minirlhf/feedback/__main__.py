"""Collect human feedback and export it for training.

    python -m minirlhf.feedback sample runs/demo/ppo --prompts vader --per-prompt 2   # two continuations each
    python -m minirlhf.feedback add texts.jsonl            # ready-made items
    python -m minirlhf.feedback serve                      # judge in the browser
    python -m minirlhf.feedback rate --rater ann           # ... or in the terminal
    python -m minirlhf.feedback stats                      # agreement, reliability, bias
    python -m minirlhf.feedback export runs/feedback       # JSONL for train_rm.py
    python -m minirlhf.feedback backup copy.db             # a copy of the store, also while raters work

Each command has --help.  Items are kept in one SQLite file, --store (feedback.db).
"""

import argparse
import json
import sqlite3
from pathlib import Path
from typing import Annotated

from minirlhf import UserError
from minirlhf.feedback.store import Policy, Store
from minirlhf.support import cli, files
from minirlhf.support.cli import Above0, Count, CountOr0, Seed, number
from minirlhf.support.text import one_line

Port = Annotated[int, cli.Range(0, 65535)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m minirlhf.feedback", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        store = "SQLite file of items and judgements (%(default)s)."
        found.add_argument("--store", type=Path, default=Path("feedback.db"), help=store)
        return found

    add_sample(command("sample", "Continue prompts with a checkpoint, and store the texts as items."))

    rows = "{prompt?, response_a, response_b, gold?} or {prompt?, response, gold?}"
    add = command("add", f"Store ready-made items: {rows}.")
    add.add_argument(
        "file",
        type=Path,
        help=".jsonl, .json or .parquet file.  gold is the known answer: a, b, tie or bad, or 1 to 5.",
    )
    cli.add_fields(add)

    serve = command("serve", "Serve the page on which raters judge.")
    add_work(serve)
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen on; beyond loopback a token is needed (%(default)s).",
    )
    serve.add_argument(
        "--port", type=number(Port), default=8000, help="Port, 0 to 65535; 0 takes a free one (%(default)s)."
    )
    serve.add_argument(
        "--token",
        help="Secret that raters must know.  It is part of the link that is printed.  Other users of this "
        "machine can see it among its processes: --token-file keeps it from them.",
    )
    serve.add_argument(
        "--token-file",
        type=Path,
        help="File whose first line is the secret.  Default: the variable MINIRLHF_FEEDBACK_TOKEN, if it is "
        "set.",
    )

    rate = command("rate", "Judge in the terminal.")
    add_work(rate)
    rate.add_argument("--rater", required=True, help="Your name.")

    stats = command("stats", "Show agreement, reliability, position bias and throughput.")
    stats.add_argument("--json", type=Path, help="Write the same numbers to this file.")

    export = command("export", "Write OUT/preferences.jsonl, ratings.jsonl, pairs.jsonl and events.jsonl.")
    export.add_argument("out", type=Path, metavar="OUT", help="Folder to write to.")

    backup = command("backup", "Write a copy of the store, also while raters work on it.")
    backup.add_argument("out", type=Path, metavar="FILE", help="The copy, which must not exist.")
    return parser.parse_args(argv)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    add = parser.add_argument
    add("checkpoint", help="Folder made by train_sft.py, train_ppo.py or train_dpo.py.")
    add(
        "--prompts",
        required=True,
        help="vader or toy (their val split, as in PPO), or a file or folder (all of it).",
    )
    add(
        "--prompt-tokens",
        type=number(Count),
        default=4,
        help="Tokens of a text without a prompt that become its prompt (%(default)s).",
    )
    add("--limit", type=number(Count), default=100, help="Most prompts that are continued (%(default)s).")
    add(
        "--per-prompt",
        type=number(Count),
        default=2,
        metavar="K",
        help="Responses per prompt; every two different ones make a pair (%(default)s).",
    )
    add(
        "--mode",
        choices=["pair", "rating"],
        default="pair",
        help="Whether raters compare two texts or rate one (%(default)s).",
    )
    add("--reward-model", help="Reward model that chooses which items are kept.")
    add("--keep", type=number(Count), metavar="N", help="Number of items that the reward model chooses.")
    add(
        "--by",
        choices=["disagreement", "score"],
        nargs="+",
        default=["disagreement", "score"],
        help="Choose where its members disagree most, where a text scores highest, or both in turn (both).",
    )
    add(
        "--temperature",
        type=number(Above0),
        help="Sampling temperature.  Default: the checkpoint's own, or 1.",
    )
    add(
        "--response-tokens",
        type=number(Count),
        help="Longest response, in tokens.  Default: the checkpoint's own, or 24.",
    )
    cli.add_fields(parser)
    add("--data-dir", help="Cache folder of the built-in dataset.  Default: the user's cache.")
    add(
        "--seed",
        type=number(Seed),
        default=1,
        help="Random seed of prompts, samples and a new store (%(default)s).",
    )


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options of `serve` and `rate`: who gets which item."""
    add = parser.add_argument
    add(
        "--raters",
        type=number(Count),
        default=Policy.raters,
        help="Votes that each item is to have (%(default)s).",
    )
    add(
        "--lease",
        type=number(Above0),
        default=Policy.lease,
        help="Minutes that an item is kept for a rater while others wait for it (%(default)s).",
    )
    add(
        "--gold-every",
        type=number(CountOr0),
        default=Policy.gold_every,
        metavar="N",
        help="One item of N has a known answer; 0 for none (%(default)s).",
    )
    add(
        "--repeat-every",
        type=number(CountOr0),
        default=Policy.repeat_every,
        metavar="N",
        help="One item of N is one that the rater judged before; 0 for none (%(default)s).",
    )
    add("--guidelines", type=Path, help="Text file that raters see.  It is kept in the store.")


def work(args: argparse.Namespace) -> None:
    """serve or rate."""
    store = Store(args.store, Policy(args.raters, args.lease, args.gold_every, args.repeat_every))
    if args.guidelines:
        try:
            store.set_guidelines(args.guidelines.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"--guidelines {args.guidelines}: cannot be read: {e}") from None
    if args.command == "serve":
        from minirlhf.feedback.server import serve, token_from

        serve(store, args.host, args.port, token_from(args.token, args.token_file))
    else:
        from minirlhf.feedback.rate import rate

        rate(store, args.rater)


def run(args: argparse.Namespace) -> None:
    """The command.  Each imports what it needs: the page does not wait for torch."""
    if args.command == "sample":
        from minirlhf.feedback.sample import sample

        sample(args)
    elif args.command == "add":
        from minirlhf.feedback.add import add

        add(args.file, args.store, args.fields)
    elif args.command in ("serve", "rate"):
        work(args)
    elif args.command == "stats":
        from minirlhf.feedback.stats import print_stats, summarise

        found = summarise(Store(args.store))
        print_stats(found)
        if args.json:
            files.write_output(args.json, json.dumps(found, indent=1))
    elif args.command == "backup":
        Store(args.store).backup(args.out)
        print(f"{args.out}: a copy of {args.store}")
    else:
        from minirlhf.feedback.export import export

        export(Store(args.store), args.out)


def guarded(args: argparse.Namespace) -> None:
    """The command; what SQLite refuses is a UserError."""
    try:
        run(args)
    except (sqlite3.Error, UnicodeError) as error:  # SQLite's message may quote bytes that are no text
        remedy = "the file is damaged, locked, or its disk is full: free it, or take a copy"
        raise UserError(f"{args.store}: {one_line(error)}: {remedy}") from None


def main() -> None:
    guarded(parse())


if __name__ == "__main__":
    cli.run_script(main)
