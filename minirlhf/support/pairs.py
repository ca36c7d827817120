"""Where train_dpo.py's batches of pairs come from: people's judgements, or the policy's own samples.

Both sources have len(), the number of optimiser steps, and batch(step), this rank's share of a step's Pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import UserError, data, optim, ppo, preference
from minirlhf.model import GPT
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling, Texts, by_microbatch, generate, response_logprobs
from minirlhf.support import ledger as ledgers
from minirlhf.support.ragged import send
from minirlhf.support.schedule import Schedule
from minirlhf.tokenizer import Tokenizer


@dataclass
class Pairs:
    """A rank's share, or a part of it, of a batch of pairs of responses to the same prompts."""

    texts: Texts  # [2 B]: the B preferred responses, then the B others
    share: Tensor  # [B] of the votes for the preferred one: .5 (a tie) to 1
    ref_logps: Tensor  # [2 B] log-probability of each response under the reference, summed over its tokens
    total: int  # pairs of the whole batch, over all ranks: what sums over pairs are divided by [D17]
    sampled: bool = False  # the texts are the policy's own samples
    measures: dict[str, Tensor] = field(default_factory=dict)  # by metric name, [B]
    most: int = 0  # with --shard: the pairs of the rank that has most, see Machine.parts

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response [2 B]."""
        return self.texts.response_mask.sum(1)

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, rows: Tensor) -> Pairs:
        """The pairs of some rows: indices on the CPU."""
        both = torch.cat([rows, rows + len(self)])
        rows_here, both_here = (send(index, self.share.device) for index in (rows, both))
        measures = {name: values[rows_here] for name, values in self.measures.items()}
        ref_logps = self.ref_logps[both_here]
        return Pairs(self.texts[both], self.share[rows_here], ref_logps, self.total, self.sampled, measures)

    def split(self, size: int | None) -> Iterator[Pairs]:
        """Parts of at most `size` pairs (None: all at once); of an empty share none, or empty ones for
        `most`."""
        most = max(len(self), self.most)
        for i in range(0, most, size or max(1, most)):
            yield self[torch.arange(len(self))[i : i + (size or most)]]


def response_logps(policy: GPT, texts: Texts, sampling: Sampling, fused_head: str) -> Tensor:
    """Log-probability [B] of each response given its prompt: the sum over its tokens, the EOS included.

    fused_head: 'on', 'off' or 'auto', by the number of response tokens."""
    tokens = int(texts.host_mask[:, texts.prompts.shape[1] :].sum())
    fused = optim.fuse_head(fused_head, tokens, policy.config.vocab_size)
    return response_logprobs(policy, texts, replace(sampling, fused_head=fused))[0].sum(1)


# ---------------------------------------------------------------- pairs that people judged


class JudgedPairs:
    """Judged pairs in batches, and what the reference makes of each of their texts [D26]."""

    def __init__(self, run: Any, items: list[data.Judged], batch: int, epochs: int, pad: int):
        lengths = [max(len(item.ids), len(item.ids_b)) for item in items]

        def batches(epoch: int) -> list[list[int]]:
            return data.batches(len(items), batch, run.config.seed, epoch, lengths)

        self.run, self.items, self.pad = run, items, pad
        self.schedule = Schedule([len(items)] * epochs, batch, batches)
        self.ref_logps = torch.zeros(2, len(items), device=run.device)

    def __len__(self) -> int:
        return len(self.schedule)

    def mine(self, step: int) -> list[int]:
        """The items of a step that this rank reads."""
        return self.schedule[step][1][self.run.rank :: self.run.world]

    def batch(self, step: int) -> Pairs:
        mine, device = self.mine(step), self.run.device
        items = [self.items[i] for i in mine]
        texts = [(item.ids, item.n_prompt) for item in items]
        texts += [(item.ids_b, item.n_prompt) for item in items]
        share = torch.tensor([item.record.share for item in items], dtype=torch.float32)
        here = send(torch.tensor(mine, dtype=torch.long), device)
        ref_logps, total = self.ref_logps[:, here].flatten(), len(self.schedule[step][1])
        most = -(-total // self.run.world) if self.run.machine.sharded else 0
        rows = collate(texts, self.pad, device)
        return Pairs(rows, send(share, device), ref_logps, total, most=most)

    def remember(self, logps: Callable[[Texts], Tensor], microbatch: int | None) -> None:
        """Fill ref_logps: logps(texts) [2 b] of all pairs, in the parts in which the first epoch reads them.

        A matrix product's last bits depend on its number of rows.  In the same parts, and with gradients
        enabled as in training, the log-ratio of a policy that has not moved is 0 bit for bit [D26].
        """
        found = torch.zeros_like(self.ref_logps)
        epoch = range(int(self.schedule.ends[0]))
        for step in tqdm(epoch, "reference", leave=False, disable=self.run.rank > 0):
            parts = self.batch(step).split(microbatch)
            parts = [logps(part.texts).detach().view(2, len(part)) for part in parts]
            if parts:
                here = send(torch.tensor(self.mine(step), dtype=torch.long), self.run.device)
                found[:, here] = torch.cat(parts, 1)
        self.ref_logps = self.run.sum_(found)  # each pair was read on one rank, and is 0 on the others
        self.run.require_finite(ref_logps=self.ref_logps)


def judged_pairs(
    config: Any, run: Any, source: data.Dataset, policy: GPT, tokenizer: Tokenizer, sampling: Sampling
) -> tuple[JudgedPairs, dict[str, JudgedPairs]]:
    """The training pairs, and those of {val, test}.

    The policy must not have moved: it is the reference, and no other one is loaded."""

    def logps(texts: Texts) -> Tensor:
        with run.autocast():
            return response_logps(policy, texts, sampling, config.fused_head)

    found = {}
    for split, items in load_judged(config, run, source, tokenizer, policy.config.context).items():
        epochs = config.epochs if split == "train" else 1
        found[split] = JudgedPairs(run, items, config.batch, epochs, tokenizer.pad)
    for pairs in found.values():
        pairs.remember(logps, config.microbatch)
    return found.pop("train"), found


def collate(texts: Sequence[tuple[list[int], int]], pad: int, device: torch.device) -> Texts:
    """(ids, how many of them are the prompt) of each text -> Texts on the device."""
    prompts = [ids[:n] for ids, n in texts]
    responses = [ids[n:] for ids, n in texts]
    rows = Texts(*data.collate(prompts or [[]], pad, "left"), *data.collate(responses or [[]], pad))
    parts = (rows.prompts, rows.prompt_mask, rows.responses, rows.response_mask)
    found = Texts(*(send(x, device) for x in parts))
    found.host_mask = rows.mask  # so that nobody waits for a copy from a GPU
    return found


def load_judged(
    config: Any, run: Any, source: data.Dataset, tokenizer: Tokenizer, context: int
) -> dict[str, list[data.Judged]]:
    """The pairs of the splits train, val and test.  Every row that is left out is counted.

    Raises UserError where the data hold no judgements, none of two responses to one prompt, or only ties.
    """
    if source.kind not in ("rated", "preference"):
        want = "want preferences, or ratings of several responses to a prompt, or --online"
        raise UserError(f"{source.name}: {source.kind} rows hold no pair to compare: {want}")
    found = {}
    for number, split in enumerate(("train", "val", "test")):
        genres, part = (config.genres, config.part) if split == "train" else ([config.genre], "all")
        chosen = source.select(split, source.genres_among(genres), part)
        records, ledger, what = chosen.records, chosen.ledger, split
        if source.kind == "rated":
            rng = np.random.default_rng([config.seed, number])
            records, counts = pairs_of_ratings(records, config.pairs, rng)
            ledgers.enter(counts, ledger, "no pair to learn")
            run.account(split, ledger)
            ledger, what = Counter(), f"{split}, pairs of these texts"
        found[split] = data.encode_judged(tokenizer, records, context, config.too_long, ledger)
        if split == "train" and all(item.record.share == 0.5 for item in found[split]):
            why = "which the reference has learnt already: give pairs of which one response is preferred"
            raise UserError(f"{source.name}: all {len(found[split])} pairs to train on are ties, {why}")
        run.account(what, ledger)
    return found


def pairs_of_ratings(
    records: Sequence[data.Response], per_text: int, rng: np.random.Generator
) -> tuple[list[data.Preference], Counter[str]]:
    """Pairs of rated responses to the same prompt, the higher rated one first, and what became of each row.

    `per_text` pairs are drawn for each text that has another one to be compared with; where there are fewer,
    each comes once.  Texts without a prompt all follow <bos>, so any two of them make a pair.
    """
    groups: dict[str, list[data.Response]] = {}
    for record in records:
        groups.setdefault(record.prompt, []).append(record)
    found, counts = [], Counter()
    for prompt, group in groups.items():
        if len(group) == 1:
            counts["dropped: no second response to the prompt"] += 1
            continue
        counts["used"] += len(group)
        ratings = [record.ratings for record in group]
        for i, j, share in zip(
            *preference.pairs_from_ratings(ratings, rng, per_text * len(group)), strict=True
        ):
            first, second = (group[i], group[j]) if share >= 0.5 else (group[j], group[i])
            texts = (first.response, second.response)
            found.append(data.Preference(prompt, *texts, share=max(share, 1 - share), where=first.where))
    return found, counts


# ---------------------------------------------------------------- pairs that the policy writes


class SampledPairs:
    """Two samples of the policy per prompt, of which a reward model prefers one (Guo et al. 2024)."""

    def __init__(
        self,
        config: Any,
        run: Any,
        source: data.Dataset,
        models: tuple[GPT, GPT],  # the policy, and its frozen reference
        reader: RewardReader,
        tokenizer: Tokenizer,
        sampling: Sampling,
    ):
        self.config, self.run, self.reader = config, run, reader
        (self.policy, self.ref), self.tokenizer, self.sampling = models, tokenizer, sampling
        self.local_batch = optim.exact_div(config.batch, run.world, f"--batch over {run.world} processes")
        contexts = [self.policy.config.context]
        contexts += [reader.context] if reader.tokenizer.hash == tokenizer.hash else []
        self.prompts, _ = data.practice_prompts(config, run, source, tokenizer, min(contexts))

    def __len__(self) -> int:
        return self.config.iterations

    @torch.no_grad()
    def batch(self, step: int) -> Pairs:
        B, config = self.local_batch, self.config
        order = data.cursor(len(self.prompts), config.batch, config.seed, step)
        mine = order[self.run.rank * B : (self.run.rank + 1) * B]
        queries = data.collate([self.prompts[i] for i in mine * 2], self.sampling.pad, "left")
        with self.run.autocast(whole=self.policy):  # [2 B]: the second half are second samples
            texts = generate(self.policy, *queries, self.sampling)
        with self.run.autocast():
            microbatch = config.microbatch and 2 * config.microbatch  # pairs are two texts
            scores, _, _ = self.reader.scores(texts, self.tokenizer, microbatch)
            ref_logps = by_microbatch(
                response_logps, self.ref, texts, microbatch, self.sampling, config.fused_head
            )
        self.run.require_finite(scores=scores, ref_logps=ref_logps)
        has_eos = texts.ended(self.sampling.eos)
        scores = ppo.apply_missing_eos(scores, has_eos, config.missing_eos_penalty, "subtract")  # [D9]

        # The better sample comes first, as a hard choice (Guo et al.); equal scores are a tie.
        a, b = scores.view(2, B)
        first = torch.where(a >= b, 0, B) + torch.arange(B, device=scores.device)
        both = torch.cat([first, (first + B) % (2 * B)])
        measures = {
            "objective/scores": scores,
            "val/response_length": texts.response_mask.sum(1).float(),
            "val/eos_rate": has_eos.float(),
        }
        measures = {name: values.view(2, B).mean(0) for name, values in measures.items()}
        share = torch.where(a == b, 0.5, 1.0)
        return Pairs(texts[both.cpu()], share, ref_logps[both], config.batch, True, measures)
