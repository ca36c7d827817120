"""Reward models on a language model that is not trained: its first layers, and a linear head fitted to pairs.

shallow     a checkpoint of a model's first layers
logistic    the weights of the head, by ridge-penalised Bradley-Terry regression
fit         a head; heads can be added, and save makes one a reward model's checkpoint
compare     such a model beside the longer text and TF-IDF
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.recipes import judged
from benchmarks.recipes.judged import Pair, Read, Text, features, mean_state, minus, shares_of, texts_of
from minirlhf import checkpoint
from minirlhf.model import RewardEnsemble
from minirlhf.support.about import describe
from minirlhf.support.weights import fingerprint


@dataclass(frozen=True)
class Settings:
    """What config.json records of such a model."""

    base: str  # the language model: the whole one, or for a reward model its first layers
    layers: int  # of the whole one, how many of the first are kept
    strength: float | None = None  # of the ridge penalty; None: there is no head


@dataclass(frozen=True)
class Head:
    """A linear head: score = vector @ weight + bias, of vectors [..., C]."""

    weight: np.ndarray  # [C]
    bias: float
    spread: float  # standard deviation of its scores of the texts that it was fitted to

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return vectors @ self.weight + self.bias

    def plus(self, other: "Head", factor: float) -> "Head":
        """This head plus `factor` times the other, each over its spread."""
        weight = self.weight / self.spread + factor * other.weight / other.spread
        return Head(weight, self.bias / self.spread + factor * other.bias / other.spread, float("nan"))


def shallow(base: Path, layers: int) -> Path:
    """A checkpoint beside `base` with the first layers of its model; what follows the layers stays.

    Its name has the checksum of the weights in it: those of another import are another folder.
    """
    out = base.parent / f"first-{layers}-{fingerprint(base)[:8]}"
    if (out / "latest").exists():
        return out
    model, tokenizer = checkpoint.load_gpt(base), checkpoint.tokenizer_of(base)
    later = tuple(f"blocks.{i}." for i in range(layers, model.config.n_layer))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(later)}
    shape = replace(model.config, n_layer=layers)
    settings = Settings(str(base), layers)
    checkpoint.save(out, 0, state, describe("import", shape, settings, 0, True, tokenizer), tokenizer)
    return out


def logistic(x: np.ndarray, shares: np.ndarray, strength: float, steps: int = 50) -> np.ndarray:
    """The weights w [C] with the least mean(log(1 + exp(m)) - share m) + strength / 2 |w|^2, m = x w [N].

    x [N, C]: features of a pair's first text minus those of its second.  By Newton's method: convex, and
    without an intercept, so that a pair turned round has minus its margin.
    """
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - shares) / len(x) + strength * w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + strength * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    return w


def states_of(
    base: Path, texts: Sequence[Text], cache: Path, read: Read = mean_state
) -> Callable[[Sequence[Text]], np.ndarray]:
    """A function that has the mean hidden states of texts, or what else `read` finds in them, [texts, C].

    They are computed for all `texts` at once, and kept in the folder `cache`.
    """
    once = sorted(set(texts))
    vectors = dict(zip(once, features(base, once, cache, read), strict=True))
    return lambda some: np.stack([vectors[text] for text in some]).astype(float)


def compare(
    home: Path, learnt: list[Pair], test: list[Pair], whole: Path, layers: int, strength: float
) -> dict:
    """judged.compare of a reward model in `home`/rm, on the first layers of the model in `whole`.

    The states of all texts are kept beside `home`, since all seeds read the same texts.  Test pairs are
    scored from them, as the checkpoint would score the texts.
    """
    began = time.perf_counter()
    base = shallow(whole, layers)
    states = states_of(base, texts_of([*learnt, *test]), home.parent)
    head = fit(shares_of(learnt), states(texts_of(learnt)), strength)
    save(home / "rm", base, head, strength)
    return judged.compare(minus(head(states(texts_of(test)))), learnt, test, time.perf_counter() - began)


def fit(shares: Sequence[float], vectors: np.ndarray, strength: float, unscaled: int = 0) -> Head:
    """The head of a reward model of pairs, whose mean score of their texts is 0.

    shares [N]: of the votes for the first of each pair.  vectors [2 N, C]: what is known of (first, second,
    first, second ...).  They are standardised and divided by sqrt(C), so that a `strength` suits models of any
    width; the last `unscaled` columns are not divided: the penalty leaves each as much room as all the others.
    """
    width = np.full(vectors.shape[1], vectors.shape[1] - unscaled)
    width[len(width) - unscaled :] = 1
    middle, spread = vectors.mean(0), (vectors.std(0) + 1e-6) * np.sqrt(width)
    weight = logistic(minus(vectors) / spread, np.array(shares), strength) / spread
    return Head(weight, float(-middle @ weight), float((vectors @ weight).std()))


def save(folder: Path, base: Path, head: Head, strength: float) -> None:
    """Make `folder` a reward model: `base`, unchanged, the mean over the text, and a head."""
    backbone, tokenizer = checkpoint.load_gpt(base), checkpoint.tokenizer_of(base)
    shape = {"pooling": "mean", "members": 1, "mlp": False}
    model = RewardEnsemble(backbone.config, **shape)
    (member,) = model.members
    member.backbone.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        member.out.weight.copy_(torch.from_numpy(head.weight)[None])
        member.out.bias.fill_(head.bias)
    settings = Settings(str(base), backbone.config.n_layer, strength)
    about = describe("rm", backbone.config, settings, 0, True, tokenizer, head=shape)
    checkpoint.save(folder, 0, model.state_dict(), about, tokenizer)
