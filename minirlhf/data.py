"""Data: records, their splits, and batches of token ids.  Every row that is left out is counted.

    python -m minirlhf.data inspect vader|toy|PATH [--tokenizer CHECKPOINT] [--skip-bad]

PATH is a .jsonl, .json, .parquet or .txt file, a folder of them or hub:org/name; a row's keys tell what it
is.  See docs/data.md, and minirlhf/support/formats.py, which reads the rows.
"""

from __future__ import annotations

import importlib
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minirlhf.support import ledger as ledgers
from minirlhf.support import sources
from minirlhf.support.context import TooLong, fit
from minirlhf.support.conversation import transcript
from minirlhf.support.dataset import Dataset, part_of, split_of
from minirlhf.support.formats import Scale
from minirlhf.support.layout import Learn, teaches
from minirlhf.support.ledger import account
from minirlhf.support.prompts import encode_prompts, prompts_and_records
from minirlhf.support.records import Preference, Response
from minirlhf.support.rows import Reads, with_rows

__all__ = ["Dataset", "Preference", "Response", "account", "part_of", "split_of", "transcript"]
__all__ += ["encode_prompts", "prompts_and_records"]
BUILT_IN = {"toy": "minirlhf.interop.toy:load", "vader": "minirlhf.interop.vader:load"}


Record = Response | Preference
Records = Sequence[Record]
Ledger = Counter[str] | None


def as_example(record: Record) -> tuple[str, str]:
    """(prompt, completion) as SFT sees any record: of two responses, the chosen one."""
    return record.prompt, record.texts[0]


def load(
    source: str | Path,
    skip_bad=False,
    scale: Scale | None = None,
    data_dir=None,
    fields=(),
    reads: Reads = (),
) -> Dataset:
    """Read 'vader', 'toy', a file, a folder or a pipe.

    `skip_bad` counts bad rows and goes on; `scale` is that of ratings that record none; `data_dir` is the
    folder that keeps 'vader'; `fields` are names of columns; `reads` is what reward functions read of the
    rows, which are kept for them.  Raises UserError('file:line: field: reason').
    """
    if source in BUILT_IN:
        module, function = BUILT_IN[source].split(":")
        return with_rows(getattr(importlib.import_module(module), function)(data_dir), reads)
    rows, about = sources.read(source, skip_bad, scale, fields, reads)
    kind_of_record = Preference if about["kind"] == "preference" else Response
    return Dataset(records=[kind_of_record(**row) for row in rows], **about)


# ---------------------------------------------------------------- token ids


@dataclass(frozen=True)
class Judged:
    """A rated text, or (ids_b given) a pair, as the reward model reads it."""

    record: Record
    ids: list[int]
    ids_b: list[int] | None = None
    cuts: Sequence[str] = ()  # what the context cut off
    n_prompt: int = 0  # how many of ids, and of ids_b, are `<bos> prompt`


def encode_examples(
    tok,
    records: Records,
    context: int,
    too_long: TooLong = "drop",
    ledger: Ledger = None,
    learn: Learn = "last",
) -> list[tuple[list[int], list[bool]]]:
    """(ids, loss_mask) of each record that SFT learns; the ledger counts all records.

    Of a conversation the last or all of the assistant's turns are learnt (layout.py).  Thumbs down, bare
    prompts and empty answers drop out [D19].  Raises UserError where nothing is left.
    """
    found, counts = [], Counter()
    for record in records:
        prompt, text = as_example(record)
        if getattr(record, "label", None) is False:
            counts["dropped: thumbs down"] += 1
        elif not teaches(tok, prompt, text, learn):
            counts["dropped: nothing to learn"] += 1
        elif not (fitted := fit(tok, prompt, [text], context, too_long, record.where, learn=learn)):
            counts["dropped: prompt longer than the context"] += 1
        else:
            found.append((fitted.sequences[0], fitted.loss_mask))
            counts.update(["used", *fitted.cuts])
    ledgers.enter(counts, ledger, "nothing to learn")
    return found


def encode_pair(tok, record: Record, context: int, too_long: TooLong = "drop") -> Judged | None:
    """A rated text or a pair in the ids that SFT would see; None where the prompt leaves no room for them."""
    fitted = fit(tok, record.prompt, record.texts, context, too_long, record.where)
    return fitted and Judged(record, *fitted.sequences, cuts=fitted.cuts, n_prompt=fitted.n_prompt)


def encode_judged(
    tok, records: Records, context: int, too_long: TooLong = "drop", ledger: Ledger = None
) -> list[Judged]:
    """Each record that a reward model learns; the ledger counts all records.

    Pairs whose ids are equal teach nothing and drop out [D15].  Raises UserError where nothing is left.
    """
    found, counts = [], Counter()
    for record in records:
        if (item := encode_pair(tok, record, context, too_long)) is None:
            counts["dropped: prompt longer than the context"] += 1
        elif item.ids == item.ids_b:
            counts[f"dropped: pairs that the {'cut' if item.cuts else 'tokenizer'} makes equal"] += 1
        else:
            found.append(item)
            counts.update(["used", *item.cuts])
    ledgers.enter(counts, ledger, "no judgement to learn")
    return found


def practice_prompts(config, run, source: Dataset, tok, context: int) -> tuple[list, list[Record]]:
    """(prompts in ids, their records) of the split to practise on; each leaves room for a response."""
    split = config.split if config.split != "auto" else "val" if config.data in BUILT_IN else "all"
    part = source.select(None if split == "all" else split, source.genres_among([config.genre]))
    room, length = context - config.response_tokens, config.prompt_tokens
    found = prompts_and_records(tok, part.records, length, room, config.too_long, part.ledger)
    run.account(f"prompts, {split} split", part.ledger)
    return found


# ---------------------------------------------------------------- batches


def collate(rows: Sequence[Sequence[int]], pad: int, side: str = "right", width: int = 1) -> tuple:
    """(tokens [B, T] int64, mask [B, T] bool, True = real); T is the longest row, or `width` if that is more.

    The mask comes from the lengths: a real token may equal `pad` [D6].
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = max([width, *lengths.tolist()])
    mask = torch.arange(width) < lengths[:, None]
    mask = mask.flip(1) if side == "left" else mask
    tokens = torch.full(mask.shape, pad)
    tokens[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return tokens, mask


def batches(
    n: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None, stream: int = 0
) -> list[list[int]]:
    """The indices below n, each once, in batches; the last one may be short.  With `lengths`: of like length.

    The order depends on (seed, epoch, stream) alone, so that a run resumes from a step number [D21].
    """
    rng = np.random.default_rng([seed, epoch, stream])
    order = rng.permutation(n)
    if lengths is not None:  # sorted only within windows of 16 batches: chance still decides who meets whom
        order = order[np.lexsort([np.asarray(lengths)[order], np.arange(n) // (16 * batch_size)])]
    cuts = [order[i : i + batch_size].tolist() for i in range(0, n, batch_size)]
    return cuts if lengths is None else [cuts[i] for i in rng.permutation(len(cuts))]


def cursor(n: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """The indices of batch number `iteration` in an endless walk through reshuffled epochs.

    They depend on the arguments alone, so that a resumed run meets the same prompts [D21].
    """
    places = range(iteration * batch_size, (iteration + 1) * batch_size)
    epochs = {place // n for place in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs}
    return [int(orders[place // n][place % n]) for place in places]


if __name__ == "__main__":
    runpy.run_module("minirlhf.tools.inspect", run_name="__main__", alter_sys=True)
