"""Reward functions by name (`--reward`): `function(prompts: list[str], responses: list[str])` returns a
finite number for each response, higher is better; `rm` is the reward model. Four rules are shipped."""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise

from minirlhf import UserError
from minirlhf.measure.stats import distinct_n

Reward = Callable[[list[str], list[str]], list[float]]
BLOCKED_WORDS = {"bastard", "bitch", "damn", "fuck", "fucking", "idiot", "moron", "shit"}  # lower case
SPEC = re.compile(r"(rm|(?!rm:)[\w.]+:\w+)(?::([-+]?(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?))?")


def load_rewards(specs: list[str]) -> list[tuple[str, Reward | None, float]]:
    """[(name, function, weight)] of `rm`, `rm:0.5`, `package.module:function`, `package.module:function:-0.5`
    (weight 1 unless given). `rm` has function None: the script supplies the model."""
    rewards: list[tuple[str, Reward | None, float]] = []
    for spec in specs:
        if not (match := SPEC.fullmatch(spec)):
            form = "rm[:WEIGHT] or package.module:function[:WEIGHT], WEIGHT a number such as -0.5"
            raise UserError(f"--reward {spec}: want {form}")
        name, weight = match.groups(default="1")
        rewards.append((name, None if name == "rm" else _find(*name.split(":")), float(weight)))
    return rewards


def _find(module: str, function: str) -> Reward:
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises while it loads
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--reward {module}:{function}: {reason}; is {module} on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"--reward {module}:{function}: no such function in {module}; check the spelling")
    return found


def call(fn: Reward, prompts: list[str], responses: list[str]) -> list[float]:
    """fn's rewards, checked: a finite number for each response, else a UserError that names the function."""
    result = fn(prompts, responses)
    try:
        numbers = [float(reward) for reward in result]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(responses) or not all(map(math.isfinite, numbers)):
        got = next((x for x in numbers if not math.isfinite(x)), " ".join(f"{result!r:.60}".split()))
        name = f"{fn.__module__}:{getattr(fn, '__qualname__', type(fn).__name__)}"
        raise UserError(f"{name}: want {len(responses)} finite numbers, one a response; got {got}")
    return numbers


def repetition(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of a response's word 3-grams that repeat one of its own, 0..1; 0 under three words."""
    return [1 - distinct_n([w], 3) if len(w) > 2 else 0.0 for w in (r.lower().split() for r in responses)]


def sameness(prompts: list[str], responses: list[str]) -> list[float]:
    """How much a response is like the rest of the batch, 0..1: over its different word 2-grams, the mean share of the OTHER
    responses that hold each. Policies that drift from their start fall back on a few phrases, whatever the prompt."""
    rows = [{*pairwise(r.lower().split())} for r in responses]
    held_by = Counter(chain.from_iterable(rows))
    others = max(1, len(rows) - 1)
    return [sum(held_by[pair] - 1 for pair in row) / (others * max(1, len(row))) for row in rows]


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Hundreds of words: 25 words give .25."""
    return [len(response.split()) / 100 for response in responses]


def blocked_words(prompts: list[str], responses: list[str]) -> list[float]:
    """How many of the words, case aside, are in BLOCKED_WORDS; give it a negative weight."""
    return [float(sum(w in BLOCKED_WORDS for w in re.findall(r"\w+", r.lower()))) for r in responses]
