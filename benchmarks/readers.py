"""What judges that took no part in training say of texts: rows with a prompt and a response, as in samples.jsonl."""

import json
import math
from pathlib import Path

import torch

from kernels import token_logprobs
from minirlhf import checkpoint, data
from minirlhf.measure import stats
from minirlhf.support import hardware
from minirlhf.support.context import fit
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
    """A reward model that scores texts and is never optimised."""

    def __init__(self, folder: Path):
        self.machine, self.precision = hardware.setup_machine(), hardware.pick_precision("auto")
        self.model, self.tokenizer = checkpoint.load_reward(checkpoint.resolve(folder))
        self.model.to(self.machine.device).eval()
        self.context = self.model.members[0].backbone.config.context

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> list[float]:
        """Scores of whole texts, on the scale of the model's raters up to a constant."""
        fitted = [fit(self.tokenizer, r["prompt"], [r["response"]], self.context, "error") for r in rows]
        ids = [one.sequences[0] for one in fitted]
        scores = torch.empty(len(ids))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            tokens, mask = data.collate([ids[i] for i in group], self.tokenizer.pad)
            with self.machine.autocast(self.precision):
                found, _ = self.model(tokens.to(self.machine.device), mask.to(self.machine.device))
            scores[group] = found.float().cpu()
        return scores.tolist()


class Fluency:
    """A language model that says how much the responses surprise it."""

    def __init__(self, folder: Path):
        self.machine, self.precision = hardware.setup_machine(), hardware.pick_precision("auto")
        folder = checkpoint.resolve(folder)
        self.model = checkpoint.load_gpt(folder).to(self.machine.device).eval()
        self.tokenizer = Tokenizer.load(folder)

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> float:
        """Perplexity per token of its own, over the tokens of all responses, without their end."""
        nats = tokens = 0
        context = self.model.config.context
        fitted = [
            fit(self.tokenizer, r["prompt"], [r["response"]], context, "error", eos=False)
            for r in rows
            if r["response"].strip()
        ]
        encoded = [(one.sequences[0], one.loss_mask) for one in fitted]
        encoded.sort(key=lambda pair: len(pair[0]))
        for start in range(0, len(encoded), BATCH):
            ids, mask = data.collate([e[0] for e in encoded[start : start + BATCH]], self.tokenizer.pad)
            learnt, _ = data.collate([e[1] for e in encoded[start : start + BATCH]], 0)
            keep = learnt[:, 1:].bool() & mask[:, 1:]
            ids, keep = ids.to(self.machine.device), keep.to(self.machine.device)
            with self.machine.autocast(self.precision):
                logits = self.model.logits(self.model(ids, None)[:, :-1][keep])
            logprobs, _ = token_logprobs(logits, ids[:, 1:][keep])
            nats, tokens = nats - logprobs.sum().item(), tokens + int(keep.sum())
        return math.exp(nats / tokens)


def looks(rows: list[dict]) -> dict[str, float]:
    """Variety, and length in words."""
    words = [r["response"].lower().split() for r in rows]
    return {"distinct_2": stats.distinct_n(words, 2), "words": sum(map(len, words)) / len(words)}
