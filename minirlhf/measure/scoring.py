"""Scores of many texts, and the reference policy's own samples, on which scores are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import checkpoint, data
from minirlhf.model import RewardModel
from minirlhf.rollout import Sampling, generate
from minirlhf.run import Run
from minirlhf.support import retokenize
from minirlhf.support.ragged import send
from minirlhf.tokenizer import Tokenizer

CHUNK = 64  # texts per forward pass


@torch.no_grad()
def score_items(run: Run, members: list[RewardModel], items: list[data.Judged], pad: int) -> list[float]:
    """The members' mean score of each item: of a text, or the margin between a pair's two texts."""
    scores = score_sequences(run, members, [item.ids for item in items], pad)
    if items[0].ids_b is not None:
        scores = scores - score_sequences(run, members, [item.ids_b for item in items], pad)
    return scores.tolist()


@torch.no_grad()
def score_sequences(run: Run, members: list[RewardModel], sequences: list[list[int]], pad: int) -> Tensor:
    """The members' mean scores [len(sequences)] on the CPU; each rank reads a share, and all get all."""
    found = torch.zeros(len(sequences), device=run.device)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for member in members:
        member.eval()
    for rows in run.machine.parts(order, CHUNK):
        tokens, mask = data.collate([sequences[j] for j in rows], pad)
        tokens = send(tokens, run.device)
        with run.autocast():
            scores = torch.stack([member(tokens, mask) for member in members]).mean(0)
        found[send(torch.tensor(rows, dtype=torch.long), run.device)] = scores.float()
    for member in members:
        member.train()
    run.sum_(found)
    run.require_finite(scores=found)
    return found.cpu()


@dataclass
class Reference:
    """The policy on whose samples scores are normalised [D14], and the prompts that it continues."""

    folder: Path
    tokenizer: Tokenizer
    prompts: list[list[int]]

    @classmethod
    def load(cls, folder: Path, records: list, context: int, config) -> Reference:
        """Prompts are cut from the records as train_ppo.py cuts them; prompt and sample fit `context`."""
        tokenizer = checkpoint.writer(folder)[2]
        room = min(context, checkpoint.shape_of(folder).context) - config.response_tokens
        prompts = data.encode_prompts(tokenizer, records, config.prompt_tokens, room, config.too_long)
        return cls(folder, tokenizer, prompts)

    @torch.no_grad()
    def samples(self, config, run: Run, tokenizer: Tokenizer) -> list[list[int]]:
        """Prompts with continuations, drawn as train_ppo.py will draw them, in the ids of `tokenizer`."""
        policy = checkpoint.load_gpt(self.folder).to(run.device).eval()
        eos, pad = self.tokenizer.ends, self.tokenizer.pad
        sampling = Sampling(config.response_tokens, config.temperature, eos, pad)
        picks = data.cursor(len(self.prompts), config.normalise_samples, config.seed, 0)
        found = []
        for i in range(0, len(picks), CHUNK):
            rows = [self.prompts[j] for j in picks[i : i + CHUNK]]
            texts = generate(policy, *data.collate(rows, pad, side="left"), sampling)
            rows = retokenize.rows_of(texts)
            found += [retokenize.translate(*row, self.tokenizer, tokenizer) for row in rows]
        return found
