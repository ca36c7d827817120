"""What a reward model learns from and is measured on: judgements, encoded, split and accounted for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf import UserError, data, preference
from minirlhf.feedback import raters
from minirlhf.support.ragged import send
from minirlhf.tokenizer import Tokenizer

LOSSES = {  # by the kind of a dataset's rows: what they hold, and how it may be learnt; the first is auto
    "rated": ("ratings", ("regression", "pairwise", "both")),
    "preference": ("choices", ("pairwise",)),
    "labelled": ("thumbs", ("binary",)),
}


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Training items, in their own spelling and in lower case; held-out items; and the raters' fit."""

    train: list[data.Judged]
    train_lower: list[data.Judged]
    val: list[data.Judged]
    test: list[data.Judged]
    raters: dict[str, dict[str, float]]
    home: list  # training records of the genre that is tested, for the baselines

    @property
    def records(self) -> dict[str, list]:
        """The records of each split, as the report reads them."""
        held_out = {"val": self.val, "test": self.test}
        return {"train": self.home} | {
            name: [item.record for item in items] for name, items in held_out.items()
        }


def load_judgements(
    config: Any, run: Any, source: data.Dataset, tokenizer: Tokenizer, context: int
) -> Judgements:
    """The splits as train_rm.py's options say: genres, part, raters, too_long.  What is left out is counted.

    Training targets are what --raters makes of several judgements; validation and test keep the mean.
    """
    home = source.genres_among([config.genre])
    chosen = source.select("train", source.genres_among(config.genres), config.part)
    records, found = raters.with_targets(chosen.records, config.raters)
    train = data.encode_judged(tokenizer, records, context, config.too_long, chosen.ledger)
    run.account(f"train, part {config.part}", chosen.ledger)
    lowered = [
        data.encode_pair(tokenizer, lower(item.record), context, config.too_long) or item for item in train
    ]
    held_out = []
    for split in ("val", "test"):
        part = source.select(split, home)
        held_out.append(data.encode_judged(tokenizer, part.records, context, config.too_long, part.ledger))
        run.account(split, part.ledger)
    at_home, _ = raters.with_targets(source.select("train", home).records, config.raters)
    return Judgements(train, lowered, *held_out, found, at_home)


def choose_loss(config: Any, source: data.Dataset) -> tuple[str, str]:
    """(loss, normalisation of the scores) for this kind of judgements, 'auto' resolved."""
    if source.kind not in LOSSES:
        want = (
            "want ratings, choices or thumbs; --rating-field and --label-field name a column of another name"
        )
        raise UserError(f"{source.name}: {source.kind} rows hold no judgement to learn: {want}")
    (judgements, losses), rated = LOSSES[source.kind], source.kind == "rated"
    loss = config.loss if config.loss != "auto" else losses[0]
    if loss not in losses:
        needs = " or ".join(what for what, of_them in LOSSES.values() if loss in of_them)
        remedy = f"use --loss {losses[0]}"
        raise UserError(f"--loss {loss} needs {needs}, but {source.name} holds {judgements}: {remedy}")
    if source.kind == "labelled" and config.raters != "mean":
        raise UserError(f"--raters {config.raters} weighs several raters, and a text has one thumb: drop it")
    if rated and loss != "regression" and config.microbatch:
        raise UserError(
            "--microbatch splits a batch, of which --loss pairwise and both make pairs: drop one of them"
        )
    return loss, config.normalise if config.normalise != "auto" else "bias" if rated else "scale"


def lower(record: data.Response | data.Preference) -> data.Response | data.Preference:
    """The record with its texts in lower case; the prompt stays as it is."""
    names = ("chosen", "rejected") if isinstance(record, data.Preference) else ("response",)
    return dataclasses.replace(record, **{name: getattr(record, name).lower() for name in names})


def target_of(item: data.Judged) -> float:
    """What the model learns of an item: the mean rating, the share of the votes for the first text, or 1 for
    thumbs up and 0 for thumbs down."""
    record = item.record
    if isinstance(record, data.Preference):
        return record.share
    return record.rating if record.label is None else float(record.label)


def first_score(kind: str, items: list[data.Judged]) -> float | None:
    """The score that says the average of all ratings or thumbs, where a model starts; None for choices."""
    if kind == "preference":
        return None
    mean = float(np.mean([target_of(item) for item in items]))
    return mean if kind == "rated" else float(np.log((mean * len(items) + 1) / ((1 - mean) * len(items) + 1)))


def rating_pairs_loss(
    run: Any, config: Any, step: int, batch: list, rows: list[int], scores: Tensor
) -> Tensor:
    """Pairwise loss on pairs drawn from the ratings of the whole batch, of which this rank has scored `rows`.

    Other ranks' scores are constants here: such gradients add up over ranks to that of one process [D17].
    The value is divided by the number of ranks, since each has all pairs.
    """
    everyone = torch.zeros(len(batch), device=run.device)
    places = send(torch.tensor(rows, dtype=torch.long), run.device)
    everyone[places] = scores.detach().float()
    everyone = run.sum_(everyone).index_put((places,), scores.float())
    ratings = [item.record.ratings if config.raters == "mean" else target_of(item) for item in batch]
    rng = np.random.default_rng([config.seed, step])
    a, b, share = preference.pairs_from_ratings(ratings, rng, 4 * len(batch))
    a, b = (send(torch.from_numpy(x), run.device) for x in (a, b))
    share = send(torch.tensor(share, dtype=torch.float32), run.device)
    loss = preference.pairwise_loss(everyone[a], everyone[b], share)
    return loss - (1 - 1 / run.world) * loss.detach()
