"""What the recipes that tune SmolLM2-Instruct share: its answers to instructions, and how often they win.

user       an instruction as a prompt: a conversation of one turn, which the chat template lays out
answer     what a policy answers to the prompts of a file, each several times; Answers has every number of them
best_of    of each prompt's answers the one that a reward model prefers
wins       how often one policy's answers are preferred to another's; even_wins: at equal length
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.recipes import frozen
from benchmarks.recipes.common import Row, measured, opened, over_seeds
from minirlhf import checkpoint
from minirlhf.rewards import RewardReader
from minirlhf.support.conversation import Conversation, conversation
from minirlhf.tools import evaluate

TEMPERATURE = 0.5  # at 1, a model of this size writes nonsense
ADAPTERS = ("--lora", 16, "--train-layers", 14)


def user(text: str) -> Conversation:
    """A text as what a user says to the assistant, who is to answer."""
    return conversation([{"role": "user", "content": text}], "prompt", {}, answer=True)


def prompt_row(prompt: Conversation) -> Row:
    """As the stages read it: messages, since a string would not be laid out."""
    return {"prompt": prompt.messages}


@dataclass(frozen=True)
class Answers:
    """A policy's answers, and their numbers: arrays of [samples, prompts]."""

    prompts: list[str]
    seconds: float
    responses: np.ndarray  # of str
    tokens: np.ndarray
    ended: np.ndarray  # of bool: the others were cut at the longest response
    kl: np.ndarray  # nats to the model that the policy started from; nan: not measured
    scores: dict[str, np.ndarray]  # by reward model

    def select(self, choose: Callable[[np.ndarray], np.ndarray]) -> "Answers":
        """Those of the samples that `choose` takes from each array."""
        arrays = {name: choose(getattr(self, name)) for name in ("responses", "tokens", "ended", "kl")}
        return replace(self, **arrays, scores={name: choose(rows) for name, rows in self.scores.items()})

    def __getitem__(self, samples: slice) -> "Answers":
        return self.select(lambda rows: rows[samples])


@torch.no_grad()
def answer(
    policy: Path,
    file: Path,
    samples: int,
    tokens: int,
    readers: Mapping[str, RewardReader],
    start: Path | None = None,
) -> Answers:
    """Let a checkpoint answer each prompt of a file `samples` times; reward models score the answers.

    start: the checkpoint that the KL is measured to; None: it is not.
    """
    began = time.perf_counter()
    model, tokenizer, prompts, _, sampling = opened(policy, file, tokens, TEMPERATURE)
    reference = checkpoint.load_gpt(start).eval() if start else None
    found: dict[str, list] = {name: [] for name in ("responses", "tokens", "ended", "kl")}
    scores: dict[str, list] = {name: [] for name in readers}
    for k in range(samples):
        texts = evaluate.write(model, prompts, sampling, 1000 + k)
        shown, written = texts.decode(tokenizer)
        found["responses"].append(written)
        found["tokens"].append(texts.response_mask.sum(1).tolist())
        found["ended"].append(texts.ended(sampling.eos).tolist())
        kl = (
            evaluate.nats(texts, model, reference, sampling)[0]
            if reference
            else torch.full([len(prompts)], math.nan)
        )
        found["kl"].append(kl.tolist())
        for name, reader in readers.items():
            scores[name].append(reader.scores(texts, tokenizer, 32)[0].tolist())
    arrays = {name: np.array(rows) for name, rows in found.items()}
    by_reader = {name: np.array(rows) for name, rows in scores.items()}
    return Answers(shown, time.perf_counter() - began, **arrays, scores=by_reader)


def best_of(answers: Answers, name: str) -> Answers:
    """Of each prompt's answers the one that the reward model of this name prefers: one sample."""
    chosen = answers.scores[name].argmax(0)[None]
    return answers.select(lambda rows: np.take_along_axis(rows, chosen, 0))


def preferred(answers: Answers, others: Answers, name: str) -> np.ndarray:
    """1 where a reward model prefers an answer to one of the others, a tie is a half.

    [samples, samples of the others, prompts].
    """
    a, b = answers.scores[name][:, None], others.scores[name][None]
    return 0.5 * (np.sign(a - b) + 1)


def wins(answers: Answers, others: Answers, name: str) -> np.ndarray:
    """By prompt, how often an answer is preferred to one of the others, over all pairs."""
    return preferred(answers, others, name).mean((0, 1))


def even_wins(answers: Answers, others: Answers, name: str) -> float:
    """How often the answers win where both are equally long, by logistic regression over all pairs.

    After Dubois et al. 2024: the log-odds of a win are a constant plus a multiple of the difference in
    length, in tokens; this is the win rate of the constant.
    """
    longer = (answers.tokens[:, None] - others.tokens[None]).reshape(-1).astype(float)
    x = np.stack([np.ones_like(longer), longer / (longer.std() + 1e-6)], 1)
    weights = frozen.logistic(x, preferred(answers, others, name).reshape(-1), 1e-6)
    return float(1 / (1 + np.exp(-weights[0])))


def numbers(answers: Answers, start: Answers, judge: str) -> dict[str, float | None]:
    """The numbers of a policy's row in a table, beside the answers of the model that it started from."""
    kl = float(answers.kl.mean())
    return {name: float(rows.mean()) for name, rows in answers.scores.items()} | {
        "wins": float(wins(answers, start, judge).mean()),
        "even wins": even_wins(answers, start, judge),
        "tokens": float(answers.tokens.mean()),
        "ended": float(answers.ended.mean()),
        "kl": None if math.isnan(kl) else kl,
    }


def cell(results: dict, read: Callable[[dict], float | None], digits: int, scale: float) -> str:
    """A number over seeds, as over_seeds writes it; nothing where it was not measured."""
    return over_seeds(results, read, digits, scale) if measured(results, read) else ""


def examples(answers: Answers, count: int) -> list[Row]:
    """The first prompts, each with its first response."""
    rows = zip(answers.prompts, answers.responses[0], strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in list(rows)[:count]]
