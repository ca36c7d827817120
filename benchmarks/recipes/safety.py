"""Harmlessness: a reward model of which of two answers in a dialogue people found less harmful.

The data are pairs of HH-RLHF (Bai et al. 2022, MIT): two dialogues that differ in the last answer.  They are
offensive by design.  This recipe prints numbers alone, and its results hold no text.  Pairs of one first
prompt are all for training or all for the test, so that no conversation is in both.
"""

import re
from pathlib import Path

from benchmarks.recipes import frozen, judged
from benchmarks.recipes.common import write_rows
from benchmarks.recipes.judged import Pair, begin
from minirlhf import UserError, data

DATA = ("harmless-base/test.jsonl.gz of Anthropic's HH-RLHF",)
FOLDS = 5  # a fifth of the first prompts is for the test
TURN, ANSWER = "\n\nHuman:", "\n\nAssistant:"
PROMPT_WORDS, ANSWER_WORDS = 30, 60
LAYERS, STRENGTH = 18, 1e-3  # of SmolLM2's 30, and the ridge penalty: chosen on seed 1's training pairs


def read(file: Path) -> list[Pair]:
    """The pairs of a file of dialogues; raises UserError for other rows."""
    found = data.load(file)
    if found.kind != "preference":
        raise UserError(f"{file}: {found.kind} rows: this recipe reads pairs, chosen and rejected")
    pairs = []
    for record in found.records:
        last = record.prompt.rpartition(TURN)[2].removesuffix(ANSWER)
        prompt = f"Human: {begin(last.strip(), PROMPT_WORDS)} Assistant:"
        texts = [begin(text.strip(), ANSWER_WORDS) for text in (record.chosen, record.rejected)]
        key = key_of(opening(record))
        if all(texts) and texts[0] != texts[1]:
            pairs.append(Pair(key, prompt, *texts, ("a",)))
    return pairs


def opening(record: data.Preference) -> str:
    """What the user says first in a dialogue."""
    return record.prompt.removeprefix(TURN).partition(ANSWER)[0].strip()


def key_of(text: str) -> str:
    """A text's words alone, so that what differs in punctuation is one prompt."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def run(home: Path, seed: int, smoke: bool, file: Path) -> dict:
    learnt, test = judged.divide(read(file), lambda pair: pair.key, FOLDS, seed)
    whole = judged.backbone(home, smoke)
    return frozen.compare(home, learnt, test, whole, 1 if smoke else LAYERS, STRENGTH)


def made_up(home: Path) -> list[Path]:
    """A file of its form, for the smoke run: dialogues about nothing."""
    rows = []
    for i in range(120):
        asked = f"{TURN} How many are {i} of them?{ANSWER}"
        rows.append({"chosen": f"{asked} There are {i}, I think.", "rejected": f"{asked} {i}"})
    return [write_rows(home / "harmless.jsonl", rows)]


def tables(results: dict) -> list[str]:
    shorter = {"shorter text": lambda found: 1 - found["accuracy"]["longer text"]}
    return judged.tables_of(results, "% of unseen pairs", shorter)
