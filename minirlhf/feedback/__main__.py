"""Collect human feedback and export it for training.

    python -m minirlhf.feedback sample runs/demo/ppo --prompts vader --per-prompt 2   # continuations by a checkpoint, as pairs
    python -m minirlhf.feedback add texts.jsonl                                       # ready-made items
    python -m minirlhf.feedback serve                                                 # judge in the browser
    python -m minirlhf.feedback rate --rater ann                                      # ... or in the terminal
    python -m minirlhf.feedback stats                                                 # agreement, reliability, position bias
    python -m minirlhf.feedback export runs/feedback                                  # JSONL for train_rm.py and others

Each command has --help. Items are kept in one SQLite file, --store (feedback.db).
"""

import argparse
import json
import sys
from pathlib import Path

from minirlhf import UserError
from minirlhf.feedback.store import Policy, Store


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m minirlhf.feedback", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        found.add_argument(
            "--store", type=Path, default=Path("feedback.db"), help="the SQLite file (%(default)s)"
        )
        return found

    sample = command("sample", "continue prompts with a checkpoint and store the texts as items")
    sample.add_argument("checkpoint", help="a folder made by train_sft.py or train_ppo.py")
    sample.add_argument(
        "--prompts",
        required=True,
        help="vader, toy (their val split, as in PPO), or a file or folder, all of it",
    )
    sample.add_argument(
        "--prompt-tokens",
        type=int,
        default=4,
        help="a text without a prompt is cut after so many (%(default)s)",
    )
    sample.add_argument("--limit", type=int, default=100, help="prompts at most (%(default)s)")
    sample.add_argument(
        "--per-prompt", type=int, default=2, metavar="K", help="responses to each; every two make a pair (2)"
    )
    sample.add_argument(
        "--mode",
        choices=["pair", "rating"],
        default="pair",
        help="compare two texts, or rate one (%(default)s)",
    )
    sample.add_argument(
        "--reward-model", help="choose the items by what this model says of them: with --keep"
    )
    sample.add_argument("--keep", type=int, metavar="N", help="how many of them")
    sample.add_argument(
        "--by", choices=["disagreement", "score"], nargs="+", default=["disagreement", "score"],
        help="where its members disagree most (of a pair: on the difference), where a text scores highest, or by turns",
    )  # fmt: skip
    sample.add_argument("--temperature", type=float, help="(left out: the checkpoint's own, or 1)")
    sample.add_argument(
        "--response-tokens", type=int, help="longest response (left out: the checkpoint's own, or 24)"
    )
    sample.add_argument("--data-dir", help="folder of the built-in dataset (left out: the user's cache)")
    sample.add_argument(
        "--seed", type=int, default=1, help="of prompts and samples, and of a new store (%(default)s)"
    )

    add = command(
        "add",
        "store ready-made items: {prompt?, response_a, response_b, gold?} or {prompt?, response, gold?}",
    )
    add.add_argument("file", type=Path, help="JSONL; gold is the known answer: a, b, tie or bad, or 1 to 5")

    for name, about in ("serve", "serve the page for raters"), ("rate", "rate in the terminal"):
        work = command(name, about)
        work.add_argument(
            "--raters", type=int, default=Policy.raters, help="votes an item is to have (%(default)s)"
        )
        work.add_argument(
            "--lease",
            type=float,
            default=Policy.lease,
            help="minutes an item is kept for a rater (%(default)s)",
        )
        work.add_argument(
            "--gold-every",
            type=int,
            default=Policy.gold_every,
            help="a gold item every so many (%(default)s; 0: off)",
        )
        work.add_argument(
            "--repeat-every",
            type=int,
            default=Policy.repeat_every,
            help="an own item again (%(default)s; 0: off)",
        )
        work.add_argument("--guidelines", type=Path, help="text file that raters see; kept in the store")
        if name == "serve":
            work.add_argument(
                "--host", default="127.0.0.1", help="address to listen on; beyond loopback it needs --token"
            )
            work.add_argument("--port", type=int, default=8000, help="(%(default)s; 0: any that is free)")
            work.add_argument("--token", help="what raters must know: it is part of the link that is printed")
        else:
            work.add_argument("--rater", required=True, help="your name")

    command("stats", "agreement, reliability, position bias, throughput").add_argument(
        "--json", type=Path, help="also write here"
    )
    export = command("export", "write OUT/preferences.jsonl, ratings.jsonl, pairs.jsonl and events.jsonl")
    export.add_argument("out", type=Path, help="folder")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.command == "sample":
        from minirlhf.feedback.sample import sample

        sample(args)
    elif args.command == "add":
        from minirlhf.feedback.add import add

        add(args.file, args.store)
    elif args.command in ("serve", "rate"):
        policy = Policy(args.raters, args.lease, args.gold_every, args.repeat_every)
        store = Store(args.store, policy)
        if args.guidelines:
            try:
                store.set_guidelines(args.guidelines.read_text())
            except (OSError, ValueError) as e:
                raise UserError(f"--guidelines {args.guidelines}: {e}") from None
        if args.command == "serve":
            from minirlhf.feedback.server import serve

            serve(store, args.host, args.port, args.token)
        else:
            from minirlhf.feedback.rate import rate

            rate(store, args.rater)
    elif args.command == "stats":
        from minirlhf.feedback.stats import print_stats, summarise

        found = summarise(Store(args.store))
        print_stats(found)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    else:
        from minirlhf.feedback.export import export

        export(Store(args.store), args.out)


if __name__ == "__main__":
    try:  # not cli.run_script, which imports torch: the page is to be up at once
        main()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
