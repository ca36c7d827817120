"""The built-in dataset `toy`: 400 sentences of a small grammar, with SIMULATED ratings, for smoke runs."""

import hashlib
import random
from collections import Counter
from itertools import product
from pathlib import Path

from minirlhf.data import Dataset, Response

NOUNS = ("plot", "cast", "script", "music", "ending", "acting", "story", "camera", "pace", "dialogue")
VALENCES = {"great": 2.5, "funny": 1.6, "odd": -0.2, "flat": -1.2, "awful": -2.6}
ADVERBS = {"": 1, "very ": 1.4, "rather ": 0.7, "not ": -0.7}
TAILS = {", I smiled.": 0.8, ", I fell asleep.": -0.8}


def load(data_dir: str | Path | None = None) -> Dataset:
    """The dataset: each sentence has five simulated ratings, from -4 to 4.  `data_dir` is not used."""
    rng, records = random.Random(0), []
    for noun, adverb, word, tail in product(NOUNS, ADVERBS, VALENCES, TAILS):
        scores = [rng.gauss(ADVERBS[adverb] * VALENCES[word] + TAILS[tail], 0.8) for _ in range(5)]
        ratings = tuple(min(4, max(-4, round(score))) for score in scores)
        text = f"The {noun} is {adverb}{word}{tail}"
        records.append(Response("", text, sum(ratings) / 5, ratings, (-4, 4), "movies"))
    sha256 = hashlib.sha256(repr(records).encode()).hexdigest()
    ledger = Counter({"rows": len(records)})
    return Dataset("toy", "rated", records, ["toy"], sha256, ledger, note=" by SIMULATED raters")
