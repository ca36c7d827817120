"""What a source of data holds: counts, splits, ratings, agreement, and the first rows as a model sees them.

    python -m minirlhf.data inspect vader
    python -m minirlhf.data inspect rows.parquet --rating-field helpfulness
    python -m minirlhf.data inspect rows.jsonl --tokenizer runs/demo/sft --context 128 -n 5

Of an example, what is read is context, and what is learnt is what SFT learns; of a pair the second text is
shown as well.  With --context it also counts what SFT would learn, cut and drop.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import typing
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np

from minirlhf import UserError, checkpoint
from minirlhf.data import (
    Preference,
    Record,
    Response,
    account,
    as_example,
    encode_examples,
    encode_pair,
    load,
    split_of,
)
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.support import formats, shapes
from minirlhf.support.cli import Count, CountOr0, Parser, Real, add_fields, number, run_script
from minirlhf.support.context import TooLong, fit
from minirlhf.support.layout import Learn
from minirlhf.support.sources import shown
from minirlhf.tokenizer import Tokenizer

WIDTH = 96  # characters of an example in a line
MOST_PIECES = 240  # tokens shown of what happens in one place
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


def about_example(record: Record, kind: str) -> str:
    """What stands above an example: kind and split, what people said of it, and from which columns."""
    parts = [f"{kind}, {split_of(*as_example(record))}"]
    if isinstance(record, Preference):
        parts += [f"{record.share:.0%} of the votes for chosen"] if record.share < 1 else []
    elif record.rating is not None:
        low, high = record.scale
        parts.append(f"rating {record.rating:.3g} of {low:g} to {high:g}")
    elif record.label is not None:
        parts.append("thumbs up" if record.label else "thumbs down: SFT does not learn it")
    if not record.texts[0].strip():
        parts.append("nothing for SFT to learn")
    columns = f"; from {', '.join(record.columns)}" if record.columns else ""
    return "; ".join(parts) + columns


Runs = list[tuple[str, list[str]]]  # what happens to some pieces of a text, and the pieces


def runs_without_tokens(record: Record) -> Runs:
    """Prompt and texts in one piece each."""
    first, *others = record.texts
    runs = [("read", [record.prompt])] if record.prompt else []
    runs += [(verdict(record), [first, "<eot>"])] if first.strip() else []
    return runs + [("rejected", [text, "<eot>"]) for text in others]


def verdict(record: Record) -> str:
    """What SFT does with the first text of a record."""
    return "not learnt" if getattr(record, "label", None) is False else "learnt"


def runs_in_tokens(
    record: Record, tokenizer: Tokenizer, context: int | None, too_long: TooLong, learn: Learn = "auto"
) -> Runs:
    """The tokens as SFT, and for pairs the reward model, sees them: read, learnt, rejected, or cut."""
    whole = encode_pair(tokenizer, record, sys.maxsize)
    fitted = encode_pair(tokenizer, record, context, too_long) if context else whole
    runs: Runs = []
    for text, ids in zip(record.texts, [whole.ids, whole.ids_b], strict=False):
        laid = fit(tokenizer, record.prompt, [text], sys.maxsize, "error", record.where, learn=learn)
        mask = laid.loss_mask
        name = "rejected" if ids is whole.ids_b else verdict(record)
        marks = [name if learn else "read" for learn in mask]
        if not text.strip():
            ids, marks = ids[: whole.n_prompt], marks[: whole.n_prompt]
        if fitted is None:
            marks = ["dropped"] * len(ids)
        else:  # what was cut off the prompt stood behind <bos>; the rest, at the end
            lost = whole.n_prompt - fitted.n_prompt
            marks[1 : 1 + lost] = ["cut"] * lost
            end = lost + (context or len(ids))
            marks[end:] = ["cut"] * len(marks[end:])
        names = special_names(tokenizer)
        pieces = [names.get(i) or tokenizer.decode([i]) or f"<token {i}>" for i in ids]
        start = whole.n_prompt if ids is whole.ids_b else 0  # both texts follow the same prompt
        for mark, group in groupby(range(start, len(ids)), lambda i, marks=marks: marks[i]):
            runs.append((mark, [pieces[i] for i in group]))
    return runs


def special_names(tokenizer: Tokenizer) -> dict[int, str]:
    """How special tokens are shown: by their own names, where they have any."""
    names = {i: name for name, i in getattr(tokenizer, "specials", {}).items()}
    return {tokenizer.bos: "<bos>", tokenizer.eot: "<eot>"} | names


def lines_of(runs: Runs) -> list[str]:
    """The runs as a table: what happens, and the pieces, each behind a bar, in lines of WIDTH characters."""
    lines = []
    for mark, pieces in runs:
        if len(pieces) > MOST_PIECES:
            half = MOST_PIECES // 2
            pieces = [*pieces[:half], f"... {len(pieces) - 2 * half:,} more ...", *pieces[-half:]]
        rows = [""]
        for piece in map(shown, pieces):
            for at in range(0, len(piece), WIDTH):
                part = piece[at : at + WIDTH]
                rows += [""] if rows[-1] and len(rows[-1]) + len(part) > WIDTH else []
                rows[-1] += f"|{part}"
        lines += [f"  {'' if i else mark:11s}{row}" for i, row in enumerate(rows)]
    return lines


def load_tokenizer(source: str) -> Tokenizer:
    """That of a checkpoint, with its layout, or any other."""
    here = Path(source, "config.json").is_file() or Path(source, "latest").is_dir()
    return checkpoint.tokenizer_of(source) if here else Tokenizer.load(source)


def main() -> None:
    table = "\n\n".join(module.__doc__.partition("\n\n")[2] for module in (formats, shapes))
    parser = Parser(
        "python -m minirlhf.data",
        description=f"{__doc__}\nThe keys of a row tell its kind:\n\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the table of formats
    )
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument(
        "source", help="vader, toy, a .jsonl, .json, .parquet or .txt file, or a folder of such files"
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
        "--too-long",
        choices=["drop", "cut"],
        default="drop",
        help="what happens to a prompt that leaves no room in --context (default: drop)",
    )
    add_fields(parser)
    parser.add_argument(
        "--rating-scale",
        nargs=2,
        type=number(Real),
        metavar=("LOW", "HIGH"),
        help="lowest and highest rating possible, of rows without a `scale`",
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
    data = load(args.source, args.skip_bad, args.rating_scale, args.data_dir, args.fields)
    print(data.describe())
    print("account:", account(data.ledger))
    splits = Counter(split_of(*as_example(r)) for r in data.records)
    print("splits:", ", ".join(f"{splits[name]:,} {name}" for name in ("train", "val", "test")))
    if tokenizer:
        print("\n".join(length_lines(data.records, tokenizer)))
    if args.context:
        ledger = data.ledger.copy()
        with contextlib.suppress(UserError):  # nothing to learn: the ledger says why
            encode_examples(tokenizer, data.records, args.context, args.too_long, ledger, args.learn)
        print(f"SFT at {args.context} tokens:", account(ledger))
    for genre in sorted({r.genre for r in data.records}) if data.kind == "rated" else []:
        print("\n".join(rating_lines(data.select(genres=[genre]).records, genre)))
    if data.kind == "labelled":
        up = sum(record.label for record in data.records)
        print(f"\nthumbs: {up:,} up, {len(data.records) - up:,} down")
    for record in data.records[: args.n]:
        print(f"\n{shown(record.where) or data.name}: {about_example(record, data.kind)}")
        runs = runs_without_tokens(record)
        if tokenizer:
            runs = runs_in_tokens(record, tokenizer, args.context, args.too_long, args.learn)
        print("\n".join(lines_of(runs)))


if __name__ == "__main__":
    run_script(main)
