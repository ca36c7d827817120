"""What the recipes with people's judgements share: folds, and what models say of texts.

Pair       two responses to a prompt, and each person's vote
divide     the items of some keys (prompts, documents) for the test, all others for training
features   the mean hidden states of texts, or their likelihoods, by a model that is not trained (frozen.py fits a
           head to them)
compare    a reward model of pairs beside the longer text and TF-IDF, on the same unseen pairs
"""

import hashlib
import io
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import ROOT, table
from benchmarks.recipes import common
from kernels import linear_token_logprobs
from minirlhf import UserError, checkpoint, data
from minirlhf.measure import baselines
from minirlhf.measure.reward_report import sign_accuracy
from minirlhf.model import GPT
from minirlhf.support.files import write_atomically
from minirlhf.support.weights import fingerprint
from minirlhf.tokenizer import Tokenizer

Item = TypeVar("Item")
Text = tuple[str, str]  # prompt, response
Read = Callable[[GPT, Tensor, Tensor], Tensor]  # of tokens [B, T] and their mask, [B, columns]
BATCH = 32  # texts per forward pass
SHARES = {"a": 1.0, "tie": 0.5, "b": 0.0}
TINY = ("--vocab", 258, "--context", 256, "--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--epochs", 1,
        "--final-epochs", 0, "--warmup", 1, "--samples", 0)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, and each person's vote: "a" for the first, "b" for the second, or "tie"."""

    key: str  # pairs of one key are all for training, or all for the test
    prompt: str
    first: str
    second: str
    votes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the votes for the first; a tie counts a half."""
        return mean(SHARES[vote] for vote in self.votes)

    @property
    def row(self) -> common.Row:
        """As train_rm.py reads it."""
        texts = {"prompt": self.prompt, "response_a": self.first, "response_b": self.second}
        return texts | {"votes": list(self.votes)}


def begin(text: str, words: int) -> str:
    """The first words of a text, and "..." where some were left out."""
    found = text.split()
    return text if len(found) <= words else " ".join(found[:words]) + " ..."


def divide(
    items: Sequence[Item], key: Callable[[Item], Hashable], folds: int, fold: int
) -> tuple[list[Item], list[Item]]:
    """(train, test): one of `folds` parts of the keys is for the test.

    Folds 1 to `folds` are disjoint, and together they are all keys; fold `folds` + 1 is fold 1 again.
    """
    keys = sorted({key(item) for item in items})
    if len(keys) < folds:
        raise UserError(
            f"the data: {len(keys)} different prompts or documents, but {folds} folds are held out"
        )
    Random(0).shuffle(keys)
    held_out = set(keys[fold % folds :: folds])
    return [x for x in items if key(x) not in held_out], [x for x in items if key(x) in held_out]


def backbone(home: Path, smoke: bool) -> Path:
    """SmolLM2's checkpoint, imported once; for a smoke run a tiny GPT's."""
    if smoke:
        texts = [{"text": f"{word} number {i} is there"} for i in range(80) for word in ("one", "two")]
        common.stage(
            "train_sft.py", home / "base", 1, "--data", common.write_rows(home / "base.jsonl", texts), *TINY
        )
        return home / "base"
    base = ROOT / "runs/smollm2/base"
    if not (base / "latest").exists():
        common.command("-m", "minirlhf.checkpoint", "import", "smollm2", base)
    return base


def by_length(tokenizer: Tokenizer, context: int, texts: Sequence[Text]) -> Iterator[tuple]:
    """Batches of texts of like length: (their places in `texts`, tokens [B, T], mask [B, T])."""
    records = [data.Response(prompt=prompt, response=response) for prompt, response in texts]
    ids = [data.encode_pair(tokenizer, record, context, "cut").ids for record in records]
    for places in data.batches(len(ids), BATCH, 0, 0, [len(row) for row in ids]):
        yield places, *data.collate([ids[i] for i in places], tokenizer.pad)


def mean_state(model: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean hidden state of each text [B, C]."""
    return model(tokens, mask).sum(1) / mask.sum(1, keepdim=True)


def mean_logprob(model: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean log-probability of each text's tokens and of its end [B, 1]; nothing predicts its first token."""
    hidden, mask = model(tokens, mask)[:, :-1], mask[:, 1:]
    logprobs, _ = linear_token_logprobs(hidden, model.head_weight, tokens[:, 1:], mask=mask)
    return logprobs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def features(base: Path, texts: Sequence[Text], cache: Path, read: Read = mean_state) -> np.ndarray:
    """What `read` finds in each text [len(texts), columns], by a model that was not trained further.

    They are kept in the folder `cache`: most recipes read the same texts in all seeds.
    """
    key = repr((fingerprint(base), read.__qualname__, *texts))
    file = cache / f"{read.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if file.exists():
        return np.load(file)
    tokenizer, model = checkpoint.tokenizer_of(base), checkpoint.load_gpt(base).eval()
    batches = [(at, read(model, *batch)) for at, *batch in by_length(tokenizer, model.config.context, texts)]
    found = np.zeros((len(texts), batches[0][1].shape[1]))
    for places, values in batches:
        found[places] = values.numpy()
    cache.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, found)
    write_atomically(file, content.getvalue())
    return found


def texts_of(pairs: Sequence[Pair]) -> list[Text]:
    """The first pair's two texts, the second pair's ..."""
    return [(pair.prompt, text) for pair in pairs for text in (pair.first, pair.second)]


def shares_of(pairs: Sequence[Pair]) -> list[float]:
    return [pair.share for pair in pairs]


def compare(margins: Sequence[float], learnt: list[Pair], test: list[Pair], seconds: float) -> dict:
    """How often the reward model's margins, the longer text and TF-IDF find the side that most prefer.

    Test pairs with as many votes for each side do not count.  The baselines read the same texts.  `seconds`
    are those that the reward model's training took.
    """
    margins = {"reward model": margins}
    margins["TF-IDF + ridge"] = tfidf_margins(learnt, test)
    margins["longer text"] = [len(pair.first) - len(pair.second) for pair in test]
    shares = shares_of(test)
    accuracy = {name: None if m is None else sign_accuracy(m, shares) for name, m in margins.items()}
    decided = sum(share != 0.5 for share in shares)
    return {
        "seconds": seconds,
        "learnt": len(learnt),
        "test": len(test),
        "decided": decided,
        "accuracy": accuracy,
    }


def minus(values: Sequence[float]) -> np.ndarray:
    """Of (first, second, first, second ...) the differences, first minus second."""
    values = np.asarray(values)
    return values[0::2] - values[1::2]


def tfidf_margins(learnt: Sequence[Pair], test: Sequence[Pair]) -> np.ndarray | None:
    """Margins by TF-IDF + ridge of words and characters; a fifth of the keys chooses the ridge's strength."""

    def of(pairs: Sequence[Pair]) -> tuple[list[str], list[float]]:
        texts = [text for pair in pairs for text in (pair.first, pair.second)]
        return texts, [sign * (2 * pair.share - 1) for pair in pairs for sign in (1, -1)]

    fit, choose = divide(learnt, lambda pair: pair.key, 5, 0)
    found = baselines.tfidf_ridge(*of(fit), *of(choose), of(test)[0], characters=True)
    return None if found is None else minus(found)


def tables_of(results: dict, title: str, more: dict[str, Callable[[dict], float]]) -> list[str]:
    """The accuracies over seeds; `more`: what stands between the reward model's and the baselines'.

    What a seed lacks is left out: TF-IDF needs scikit-learn.
    """
    accuracy = lambda name: lambda found: found["accuracy"][name]
    rows = {"**reward model**": accuracy("reward model")} | more
    rows |= {name: accuracy(name) for name in ("TF-IDF + ridge", "longer text")}
    known = {name: read for name, read in rows.items() if common.measured(results, read)}
    return [table([title], [[name, common.over_seeds(results, read)] for name, read in known.items()])]
