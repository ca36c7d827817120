"""What PPO maximises: a reward model, functions of your own, or a weighted sum of them.

`--reward rm` is the reward model.  `--reward package.module:function` calls

    function(prompts: list[str], responses: list[str]) -> list[float]

which returns one finite number per response; higher is better.  Each may carry a weight: `--reward rm --reward
minirlhf.rewards:repetition:-0.5`.  Four rules are shipped below.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from minirlhf import UserError, data
from minirlhf.measure.stats import distinct_n
from minirlhf.model import RewardEnsemble
from minirlhf.rollout import Texts, by_microbatch
from minirlhf.tokenizer import Tokenizer

Reward = Callable[[list[str], list[str]], list[float]]
SPEC = re.compile(r"(rm|(?!rm:)[\w.]+:\w+)(?::([-+]?(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?))?")
BLOCKED_WORDS = {"bastard", "bitch", "damn", "fuck", "fucking", "idiot", "moron", "shit"}  # lower case


@dataclass
class RewardReader:
    """A reward model and its tokenizer, which need not be the policy's."""

    model: RewardEnsemble
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        return self.model.members[0].backbone.config.context

    def scores(
        self, texts: Texts, tokenizer: Tokenizer, microbatch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and disagreement [B] of texts that `tokenizer` encoded."""
        read = lambda model, rows: score_texts(model, self.tokenizer, rows, tokenizer)
        return by_microbatch(read, self.model, texts, microbatch)


def score_texts(
    model: RewardEnsemble, model_tokenizer: Tokenizer, texts: Texts, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor]:
    """Scores and disagreement [B] of texts that `tokenizer` encoded, by a model that may have another tokenizer.

    Texts are then decoded and encoded again, and cut at the end where they exceed the model's context, as in training.
    """
    tokens, mask = texts.tokens, texts.mask
    if model_tokenizer.hash != tokenizer.hash:
        context = model.members[0].backbone.config.context
        rows = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]
        rows = [data.translate(row, tokenizer, model_tokenizer)[:context] for row in rows]
        tokens, mask = (x.to(tokens.device) for x in data.collate(rows, model_tokenizer.pad))
    return model(tokens, mask)


class Scorer:
    """Scores texts as PPO's objective does, and reports what each part of it contributed."""

    def __init__(
        self,
        rewards: list[tuple[str, Reward | None, float]],
        tokenizer: Tokenizer,
        reward_model: RewardReader | None = None,
        judge: RewardReader | None = None,
        disagreement_coef: float = 0.0,
        microbatch: int | None = None,
    ):
        """rewards: what load_rewards returns.  The judge's scores are reported and never optimised."""
        self.rewards, self.tokenizer, self.microbatch = rewards, tokenizer, microbatch
        self.reward_model, self.judge, self.disagreement_coef = reward_model, judge, disagreement_coef

    @torch.no_grad()
    def __call__(self, texts: Texts) -> tuple[Tensor, dict[str, Tensor]]:
        """texts -> scores [B], and by metric name what the reward model and the judge said [B].

        Raises UserError where a reward function fails.
        """
        parts: dict[str, Tensor] = {}
        if self.reward_model is not None:
            rm_scores, disagreement = self.reward_model.scores(texts, self.tokenizer, self.microbatch)
            parts |= {"objective/rm_scores": rm_scores, "objective/rm_disagreement": disagreement}
            cautious = rm_scores - self.disagreement_coef * disagreement
        prompts, responses = texts.decode(self.tokenizer)
        scores = torch.zeros(len(texts), device=texts.tokens.device)
        for name, function, weight in self.rewards:
            values = cautious if function is None else call(function, prompts, responses, name)
            scores = scores + weight * torch.as_tensor(values, dtype=scores.dtype, device=scores.device)
        if self.judge is not None:
            parts["objective/judge"] = self.judge.scores(texts, self.tokenizer, self.microbatch)[0]
        return scores, parts


def load_rewards(specs: list[str]) -> list[tuple[str, Reward | None, float]]:
    """[(name, function, weight)] of `rm`, `rm:0.5`, `package.module:function`, `package.module:function:-0.5`.

    The weight is 1 unless given.  The function of `rm` is None: Scorer has the model.
    """
    rewards: list[tuple[str, Reward | None, float]] = []
    for spec in specs:
        if not (match := SPEC.fullmatch(spec)):
            form = "rm[:WEIGHT] or package.module:function[:WEIGHT], WEIGHT a number such as -0.5"
            raise UserError(f"--reward {_one_line(spec)}: want {form}")
        name, weight = match.groups(default="1")
        rewards.append((name, None if name == "rm" else _find(name), float(weight)))
    return rewards


def _find(name: str) -> Reward:
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it loads
        raise UserError(f"--reward {name}: {_reason(error)}; is {module} on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"--reward {name}: no such function in {module}; check the spelling")
    try:
        inspect.signature(found).bind([], [])
    except TypeError as error:
        raise UserError(f"--reward {name}: {error}: want a function of (prompts, responses)") from None
    except ValueError:  # some built-in functions have no signature to check
        pass
    return found


def call(function: Reward, prompts: list[str], responses: list[str], name: str = "") -> list[float]:
    """The function's rewards, checked: one finite number per response, else a UserError that names function and row.

    The function gets copies: what it does to its arguments, now or later, changes nothing here.
    """
    name = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        result = function(list(prompts), list(responses))
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name} failed: {_reason(error)}") from error
    if isinstance(result, str | bytes | dict):
        raise UserError(
            f"--reward {name}: returned {type(result).__name__}, not a list of {len(responses)} numbers"
        )
    try:
        values = list(result)
    except (Exception, SystemExit):
        raise UserError(f"--reward {name}: returned {type(result).__name__}, not a list of numbers") from None
    if len(values) != len(responses):
        raise UserError(f"--reward {name}: returned {len(values)} numbers for {len(responses)} responses")
    return [_finite(value, name, row, responses[row]) for row, value in enumerate(values)]


def _finite(value: object, name: str, row: int, response: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        got, text = _one_line(f"{value!r:.40}"), _one_line(f"{response!r:.40}")
        raise UserError(f"--reward {name}: row {row}: {got} is not a finite number (response {text})")
    return number


def _reason(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:300]


def repetition(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of a response's word 3-grams that repeat one of its own, 0 to 1; 0 below three words."""
    words = [response.lower().split() for response in responses]
    return [1 - distinct_n([w], 3) if len(w) > 2 else 0.0 for w in words]


def sameness(prompts: list[str], responses: list[str]) -> list[float]:
    """How much a response resembles the rest of the batch, 0 to 1.

    For each different word 2-gram of a response: the share of the OTHER responses that contain it; then the mean.
    Policies that drift from their start fall back on a few phrases, whatever the prompt.
    """
    rows = [{*pairwise(response.lower().split())} for response in responses]
    held_by = Counter(chain.from_iterable(rows))
    others = max(1, len(rows) - 1)
    return [sum(held_by[pair] - 1 for pair in row) / (others * max(1, len(row))) for row in rows]


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Hundreds of words: 25 words give 0.25."""
    return [len(response.split()) / 100 for response in responses]


def blocked_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Number of words that are in BLOCKED_WORDS, whatever their case; give it a negative weight."""
    return [float(sum(w in BLOCKED_WORDS for w in re.findall(r"\w+", r.lower()))) for r in responses]
