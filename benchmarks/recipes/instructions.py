"""Instructions: a reward model of which of two answers three people preferred.

The data are PandaLM's 999 pairs of answers by five models of 7 billion parameters (Wang et al. 2023,
Apache-2.0), each judged by three people.  Pairs of one instruction are all for training or all for the test.
"""

import hashlib
from pathlib import Path
from statistics import mean

from benchmarks.recipes import frozen, judged
from benchmarks.recipes.common import write_rows
from benchmarks.recipes.judged import SHARES, Pair
from minirlhf import UserError
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.measure.reward_report import sign_accuracy
from minirlhf.support.conversation import conversation
from minirlhf.support.shapes import columns_of
from minirlhf.support.sources import raw_rows

DATA = ("data/testset-v1.json of WeOpenML/PandaLM",)
FOLDS = 5  # a fifth of the instructions is for the test
LAYERS, STRENGTH = 12, 3e-3  # of SmolLM2's 30, and the ridge penalty: chosen on seed 1's training pairs
PEOPLE = ("annotator1", "annotator2", "annotator3")
VOTES = {1: "a", 2: "b", 0: "tie"}


def read(file: Path) -> list[Pair]:
    """The pairs of the file; raises UserError('file:number: field: reason')."""
    pairs = []
    for number, raw in raw_rows(file, hashlib.sha256(), {}):
        try:
            pairs.append(pair_of(columns_of(raw, False)))
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from None
    if not pairs:
        raise UserError(f"{file}: no pair in it")
    return pairs


def pair_of(row: dict) -> Pair:
    texts = {}
    for name in ("instruction", "input", "response1", "response2"):
        value = row.get(name)
        if not isinstance(value, str | bool):  # an answer "True" is a boolean in the file
            raise UserError(f"{name}: want a text, found {value!r:.40}")
        texts[name] = str(value).strip()
    for name in PEOPLE:
        if row.get(name) not in VOTES:
            raise UserError(f"{name}: want 1, 2 or 0 for a tie, found {row.get(name)!r:.40}")
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    prompt = conversation([{"role": "user", "content": asked}], "instruction", {}, answer=True)
    votes = tuple(VOTES[row[name]] for name in PEOPLE)
    return Pair(texts["instruction"], prompt, texts["response1"], texts["response2"], votes)


def agreement(pairs: list[Pair]) -> dict[str, float | None]:
    """Krippendorff's alpha of the votes, and how often one person takes the side of the two others."""
    votes = [[SHARES[vote] for vote in pair.votes] for pair in pairs]
    alone = [
        sign_accuracy([v[i] - 0.5 for v in votes], [mean(v[:i] + v[i + 1 :]) for v in votes])
        for i in range(len(PEOPLE))
    ]
    return {"alpha": krippendorff_alpha(votes, "nominal"), "one person": mean(alone)}


def run(home: Path, seed: int, smoke: bool, file: Path) -> dict:
    learnt, test = judged.divide(read(file), lambda pair: pair.key, FOLDS, seed)
    whole = judged.backbone(home, smoke)
    found = frozen.compare(home, learnt, test, whole, 1 if smoke else LAYERS, STRENGTH)
    return found | {"people": agreement(test)}


def made_up(home: Path) -> list[Path]:
    """A file of its form, for the smoke run."""
    rows = []
    for i in range(150):
        texts = {
            "instruction": f"Add one to {i // 2}.",
            "input": "",
            "response1": f"{i + 1}",
            "response2": f"{i}",
        }
        rows.append(texts | dict.fromkeys(PEOPLE, (1, 2, 1, 0)[i % 4]) | {"annotator3": 1})
    return [write_rows(home / "pairs.jsonl", rows)]


def tables(results: dict) -> list[str]:
    people = {"one person, against the other two": lambda found: found["people"]["one person"]}
    return judged.tables_of(results, "% of unseen pairs", people)
