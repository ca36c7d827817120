"""One-line functions judged by their tests, from scratch: a sentence in, Python out.

A prompt is "# the sum of a and the larger of b and 3", then "def f(a, b):" and "return"; the response is the
expression.  A tiny GPT learns from 6,000 examples by somebody who often slips and mostly writes differences the
wrong way round, as code that people wrote has faults.  GRPO then practises on 3,000 other sentences, of which it
gets five tests each and no program, through `minirlhf.rewards:tests`, which runs programs in a sandbox.  Both
are measured on 300 more, and what became of each program is counted.
"""

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from benchmarks.demo import table
from benchmarks.recipes.common import (
    Asked,
    Row,
    ask,
    before_and_after,
    means_of,
    side_by_side,
    stage,
    write_rows,
)
from minirlhf.measure.program import verdicts

REWARD, TOKENS = "minirlhf.rewards:tests", 32
TEST, TAUGHT, PRACTISED = 300, 6000, 3000
SLIP, TURNED = 0.3, 0.6  # of the examples with a wrong operand; of the differences the wrong way round
SAMPLES, K = 4, 4
PREFIX = "def f(a, b):\n    return"
DIFFERENCE = "the difference of {} and {}"
PHRASES = {
    "the sum of {} and {}": "({} + {})",
    "the product of {} and {}": "{} * {}",
    DIFFERENCE: "({} - {})",
    "the larger of {} and {}": "max({}, {})",
    "the smaller of {} and {}": "min({}, {})",
}
LEAVES = ["a", "b", *map(str, range(2, 8))]
VERDICTS = ("passed", "wrong", "error", "exit", "time", "refused")
SFT = ("--vocab", 320, "--context", 80, "--n-layer", 3, "--n-head", 4, "--n-embd", 96, "--dropout", 0,
       "--epochs", 12, "--final-epochs", 0, "--batch", 32, "--lr", 3e-3, "--warmup", 30, "--patience", 12,
       "--samples", 0)  # fmt: skip
RL = ("--algorithm", "grpo", "--kl", "none", "--iterations", 80, "--batch", 256, "--minibatch", 128, "--lr", 5e-4,
      "--missing-eos", "none", "--response-tokens", TOKENS, "--save-every", 20)  # fmt: skip


@dataclass(frozen=True)
class Function:
    """Two phrases, one inside the other: "the sum of a and the larger of b and 3"."""

    outer: str
    inner: str
    leaves: tuple[str, str, str]  # the last is the outer phrase's
    inner_first: bool

    def written(self, phrases: dict[str, str], turned: tuple[bool, bool] = (False, False)) -> str:
        """With these phrases for the two; `turned`: whether the outer's or the inner's operands change places."""
        x, y, z = self.leaves
        pair = [phrases[self.inner].format(*((y, x) if turned[1] else (x, y))), z]
        return phrases[self.outer].format(*(pair if self.inner_first != turned[0] else reversed(pair)))

    def with_faults(self, rng: random.Random) -> str:
        """The expression as it is in an example, which may be wrong."""
        leaves = [*self.leaves]
        if rng.random() < SLIP:
            i = rng.randrange(3)
            leaves[i] = rng.choice([leaf for leaf in LEAVES if leaf != leaves[i]])
        turned = tuple(p == DIFFERENCE and rng.random() < TURNED for p in (self.outer, self.inner))
        return dataclasses.replace(self, leaves=tuple(leaves)).written(PHRASES, turned)


def functions(seed: int) -> list[Row]:
    """Different sentences with their tests and examples, in an order of their own for each seed."""
    rng = random.Random(seed)
    found = [
        Function(outer, inner, leaves, inner_first)
        for outer, inner, inner_first in product(PHRASES, PHRASES, (True, False))
        for leaves in product(LEAVES, LEAVES, LEAVES)
        if leaves[0] != leaves[1] and {*leaves} & {"a", "b"}
    ]
    rng.shuffle(found)
    return [row_of(function, rng) for function in found[: TEST + TAUGHT + PRACTISED]]


def row_of(function: Function, rng: random.Random) -> Row:
    code, tests = function.written(PHRASES), []
    for _ in range(5):
        a, b = rng.randint(-9, 9), rng.randint(-9, 9)
        tests.append(f"assert f({a}, {b}) == {eval(code, {'a': a, 'b': b, 'max': max, 'min': min})}")
    prompt = f"# {function.written({phrase: phrase for phrase in PHRASES})}\n{PREFIX}"
    return {
        "prompt": prompt,
        "prefix": PREFIX,
        "tests": tests,
        "completion": f" {function.with_faults(rng)}",
    }


def count(asked: Asked) -> dict[str, int]:
    """What became of the programs, by verdict; errors also by their exception."""
    found = Counter()
    for responses in asked.responses:
        for verdict, why in verdicts(responses, asked.rows):
            found.update([verdict, *([f"error: {why}"] if verdict == "error" else [])])
    return dict(found)


def run(home: Path, seed: int, smoke: bool) -> dict:
    rows = functions(seed)
    test, others = rows[:TEST], rows[TEST:]
    samples, sft_options, rl_options = SAMPLES, SFT, RL
    if smoke:  # a smaller model, fewer steps
        test = test[:24]  # some of which ask for a difference
        sft_options = (*SFT, "--n-layer", 1, "--n-embd", 32, "--epochs", 2)
        rl_options = (*RL, "--iterations", 2, "--batch", 16, "--minibatch", 16)
    without = [{k: v for k, v in row.items() if k != "completion"} for row in others[TAUGHT:]]
    files = {
        "sft": write_rows(home / "sft.jsonl", others[:TAUGHT]),
        "prompts": write_rows(home / "prompts.jsonl", without),
        "test": write_rows(home / "test.jsonl", test),
    }
    seconds = {"sft": stage("train_sft.py", home / "sft", seed, "--data", files["sft"], *sft_options)}
    before = ask(home / "sft", files["test"], REWARD, samples, TOKENS)
    rl = ("--data", files["prompts"], "--init", home / "sft", "--reward", REWARD, *rl_options)
    seconds["rl"] = stage("train_ppo.py", home / "ppo", seed, *rl)
    after = ask(home / "ppo", files["test"], REWARD, samples, TOKENS)
    found = {"seconds": seconds, "test": len(test)}
    for name, policy, asked in (("before", "sft", before), ("after", "ppo", after)):
        likeliest = ask(home / policy, files["test"], REWARD, 1, TOKENS, temperature=0.0)
        scores = zip(likeliest.prompts, likeliest.scores[0], strict=True)
        differences = [score for prompt, score in scores if "difference" in prompt]
        found[name] = {
            "pass@1": asked.pass_at(1),
            f"pass@{K}": asked.pass_at(K),
            "likeliest": likeliest.pass_at(1),
            "of differences": {"mean": mean(differences)},
            "verdicts": count(asked),
            "examples": asked.examples(4),
        }
    return found


def tables(results: dict) -> list[str]:
    head = [
        "% of programs for unseen sentences",
        "pass@1",
        f"pass@{K}",
        "likeliest program",
        "... where a difference is asked for",
    ]
    rows = before_and_after(results, means_of("pass@1", f"pass@{K}", "likeliest", "of differences"))[:2]

    def share(found: dict, verdict: str) -> float:
        counts = found["verdicts"]
        return counts.get(verdict, 0) / sum(counts.get(v, 0) for v in VERDICTS)

    became = before_and_after(results, [partial(share, verdict=verdict) for verdict in VERDICTS])[:2]
    samples = side_by_side(results, lambda prompt: prompt.partition("\n")[0].removeprefix("# "))
    return [
        table(head, rows),
        table(["%, by what became of them", *VERDICTS], became),
        table(["sentence", "SFT", "GRPO"], samples),
    ]
