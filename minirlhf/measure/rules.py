"""Four rules that reward or punish a text.  `--reward minirlhf.rewards:NAME` finds them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, pairwise

from minirlhf.measure.stats import distinct_n

BLOCKED_WORDS = {"bastard", "bitch", "damn", "fuck", "fucking", "idiot", "moron", "shit"}  # lower case


def repetition(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of a response's word 3-grams that repeat one of its own, 0 to 1; 0 below three words."""
    words = [response.lower().split() for response in responses]
    return [1 - distinct_n([w], 3) if len(w) > 2 else 0.0 for w in words]


def sameness(prompts: list[str], responses: list[str]) -> list[float]:
    """How much a response resembles the rest of the batch, 0 to 1.

    For each different word 2-gram of a response: the share of the OTHER responses that contain it; then the
    mean. Policies that drift from their start fall back on a few phrases, whatever the prompt."""
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
