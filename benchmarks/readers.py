"""What readers that took no part say of texts: rows with a prompt and a response, as in the samples.jsonl of train_ppo.py."""

import json
import math
from pathlib import Path

import torch

from kernels import token_logprobs
from minirlhf import checkpoint, data
from minirlhf.measure import stats
from minirlhf.support import hardware
from minirlhf.tokenizer import Tokenizer

BATCH = 64


def rows_of(samples: Path) -> dict[int, list[dict]]:
    """{step: its rows} of a samples.jsonl."""
    found = {}
    for line in samples.read_text().split("\n")[:-1]:
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row)
    return found


class Judge:
    """A reward model, read for its opinion."""

    def __init__(self, folder: Path):
        self.machine, self.precision = hardware.setup_machine(), hardware.pick_precision("auto")
        self.model, self.tokenizer = checkpoint.load_reward(checkpoint.resolve(folder))
        self.model.to(self.machine.device).eval()
        self.context = self.model.members[0].backbone.config.context

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> list[float]:
        """Scores of whole texts, on the scale of its raters up to a constant."""
        ids = [data.encode_example(self.tokenizer, r["prompt"], r["response"], self.context)[0] for r in rows]
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = [0.0] * len(ids)
        for start in range(0, len(ids), BATCH):
            places = by_length[start : start + BATCH]
            tokens, mask = data.collate([ids[i] for i in places], self.tokenizer.pad)
            with self.machine.autocast(self.precision):
                scores, _ = self.model(tokens.to(self.machine.device), mask.to(self.machine.device))
            for i, score in zip(places, scores.tolist(), strict=True):
                found[i] = score
        return found


class Fluency:
    """A language model, read for how much the responses surprise it."""

    def __init__(self, folder: Path):
        self.machine, self.precision = hardware.setup_machine(), hardware.pick_precision("auto")
        folder = checkpoint.resolve(folder)
        self.model, self.tokenizer = (
            checkpoint.load_gpt(folder).to(self.machine.device).eval(),
            Tokenizer.load(folder),
        )

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> float:
        """Perplexity per token of its own, over the tokens of all responses, their end left out."""
        nats = tokens = 0
        encoded = [data.encode_example(self.tokenizer, r["prompt"], r["response"], self.model.config.context, eos=False)
                   for r in rows if r["response"].strip()]  # fmt: skip
        encoded.sort(key=lambda pair: len(pair[0]))
        for start in range(0, len(encoded), BATCH):
            ids, mask = data.collate([e[0] for e in encoded[start : start + BATCH]], self.tokenizer.pad)
            learnt, _ = data.collate([e[1] for e in encoded[start : start + BATCH]], 0)
            with self.machine.autocast(self.precision):
                hidden = self.model(ids.to(self.machine.device), None)[:, :-1]
                keep = learnt[:, 1:].bool() & mask[:, 1:]
                logits = self.model.logits(hidden[keep])
            logprobs, _ = token_logprobs(logits, ids[:, 1:][keep].to(self.machine.device))
            nats, tokens = nats - logprobs.sum().item(), tokens + int(keep.sum())
        return math.exp(nats / tokens)


def looks(rows: list[dict]) -> dict[str, float]:
    """What needs no reader: variety, and length in words."""
    words = [r["response"].lower().split() for r in rows]
    return {"distinct_2": stats.distinct_n(words, 2), "words": sum(map(len, words)) / len(words)}
