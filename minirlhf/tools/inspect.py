"""What a source of data holds: counts, splits, ratings, agreement, and the first rows as a model sees them.

    python -m minirlhf.data inspect vader
    python -m minirlhf.data inspect rows.jsonl --tokenizer runs/demo/sft --context 128 -n 5

With --context it also counts what SFT would learn, cut and drop.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import typing
from collections import Counter
from pathlib import Path

import numpy as np

from minirlhf import UserError, checkpoint
from minirlhf.data import (
    Record,
    Response,
    account,
    as_example,
    encode_examples,
    load,
    split_of,
)
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.support import formats
from minirlhf.support.cli import Count, CountOr0, Parser, number, run_script
from minirlhf.support.context import fit
from minirlhf.support.conversation import Conversation
from minirlhf.support.layout import TEMPLATE, Learn, layout_of
from minirlhf.support.sources import shown
from minirlhf.tokenizer import Tokenizer

LEVELS = range(3, 26)  # a scale of so many whole numbers is shown number by number, another one in bins
BINS = 20
BAR = 50  # characters


def histogram(records: list[Response]) -> list[str]:
    """How many items have which mean rating: a line per whole number on the scale, or per bin."""
    low, high = records[0].scale
    if round(high) - round(low) in LEVELS:
        names = {level: f"{level:4d}" for level in range(round(low), round(high) + 1)}
        counts = Counter(round(r.rating) for r in records)
    else:
        width = (high - low) / BINS
        names = {i: f"{low + i * width:g} to {low + (i + 1) * width:g}" for i in range(BINS)}
        counts = Counter(min(BINS - 1, int((r.rating - low) / width)) for r in records)
    column, most = max(map(len, names.values())), max(counts.values())
    bars = {level: "#" * math.ceil(BAR * counts[level] / most) for level in names}
    return [f"{name:>{column}} {counts[level]:7,} {bars[level]}" for level, name in names.items()]


def rating_lines(records: list[Response], genre: str) -> list[str]:
    """How many items and raters, how much the raters agree, and a histogram."""
    per_item = sum(len(r.ratings) for r in records) / len(records)
    alpha = krippendorff_alpha([r.ratings for r in records], level="interval")
    agreement = "-" if alpha is None else f"{alpha:.3f}"  # None: one rating per item
    about = f"{len(records):,} items, {per_item:.1f} raters each"
    head = f"\n{genre or 'ratings'}: {about}, agreement (Krippendorff's alpha) {agreement}"
    return [head, *histogram(records)]


def length_lines(records: list[Record], tokenizer: Tokenizer) -> list[str]:
    """How many tokens the texts have as SFT sees them, with <bos> and <eot>, and their prompts alone."""
    wholes, prompts = [], []
    for record in records:
        prompt, completion = as_example(record)
        fitted = fit(tokenizer, prompt, [completion], sys.maxsize, "error", record.where)
        wholes.append(len(fitted.sequences[0]))
        prompts += [fitted.n_prompt] if prompt else []
    lines = []
    for name, lengths in {"texts": wholes, "their prompts": prompts}.items():
        if lengths:
            median, most = np.quantile(lengths, [0.5, 0.95])
            lines.append(
                f"tokens of {name}: median {median:.0f}, 95 % at most {most:.0f}, longest {max(lengths):,}"
            )
    return lines


def example(record: Record, tokenizer: Tokenizer | None, learn: Learn) -> str:
    """A record as SFT sees it: its split, and what is learnt between [[ and ]]."""
    prompt, completion = as_example(record)
    split = f"{split_of(prompt, completion):6s}"
    if tokenizer is None:
        return split + "".join(map(shown, [prompt, "[[", completion, "<eot>]]"]))
    fitted = fit(tokenizer, prompt, [completion], sys.maxsize, "error", record.where, learn=learn)
    ids, mask = fitted.sequences[0], fitted.loss_mask
    if layout_of(tokenizer).name == TEMPLATE and isinstance(prompt, Conversation):
        names = {i: name for name, i in tokenizer.specials.items()}
    else:
        names = {tokenizer.bos: "<bos>", tokenizer.eot: "<eot>"}
    pieces = [shown(names.get(i) or tokenizer.decode([i])) for i in ids]
    for i, learnt in enumerate(mask):
        if learnt and mask[i - 1 : i] != [True]:
            pieces[i] = "[[|" + pieces[i]
        if learnt and mask[i + 1 : i + 2] != [True]:
            pieces[i] += "]]"
    return split + "|".join(pieces)


def load_tokenizer(source: str) -> Tokenizer:
    """That of a checkpoint, with its layout, or any other."""
    here = Path(source, "config.json").is_file() or Path(source, "latest").is_dir()
    return checkpoint.tokenizer_of(source) if here else Tokenizer.load(source)


def main() -> None:
    table = formats.__doc__.partition("\n\n")[2]
    parser = Parser(
        "python -m minirlhf.data",
        description=f"{__doc__}\nThe keys of a row tell its kind:\n\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the table of formats
    )
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument(
        "source", help="vader, toy, a .jsonl, .jsonl.gz or .txt file, or a folder of such files"
    )
    parser.add_argument(
        "--tokenizer", help="show examples in the tokens of a checkpoint, of gpt2 or of a .tiktoken file"
    )
    parser.add_argument(
        "--context",
        type=number(Count),
        help="count what SFT would cut or drop in a context of so many tokens",
    )
    parser.add_argument(
        "--learn",
        choices=typing.get_args(Learn),
        default="auto",
        help="which of the assistant's turns count as learnt, as in train_sft.py (default: auto)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count malformed rows and go on")
    parser.add_argument(
        "--data-dir", help="folder that keeps the built-in dataset (default: the user's cache)"
    )
    parser.add_argument("-n", type=number(CountOr0), default=3, help="how many examples to show (default: 3)")
    args = parser.parse_args()
    if args.context and not args.tokenizer:
        raise UserError("--context counts tokens: name a --tokenizer")

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    data = load(args.source, args.skip_bad, data_dir=args.data_dir)
    print(data.describe())
    print("account:", account(data.ledger))
    splits = Counter(split_of(*as_example(r)) for r in data.records)
    print("splits:", ", ".join(f"{splits[name]:,} {name}" for name in ("train", "val", "test")))
    if tokenizer:
        print("\n".join(length_lines(data.records, tokenizer)))
    if args.context:
        ledger = data.ledger.copy()
        with contextlib.suppress(UserError):  # nothing to learn: the ledger says why
            encode_examples(tokenizer, data.records, args.context, ledger=ledger, learn=args.learn)
        print(f"SFT at {args.context} tokens:", account(ledger))
    for genre in sorted({r.genre for r in data.records}) if data.kind == "rated" else []:
        print("\n".join(rating_lines(data.select(genres=[genre]).records, genre)))
    print("\nexamples, what is learnt between [[ and ]]:")
    for record in data.records[: args.n]:
        print(example(record, tokenizer, args.learn))


if __name__ == "__main__":
    run_script(main)
