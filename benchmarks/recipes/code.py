"""One-line functions judged by their tests, from scratch: a sentence in, Python out.

A prompt is "# the sum of a and the larger of b and 3", then "def f(a, b):" and "return"; the response is the
expression.  A tiny GPT learns from 2,000 examples; GRPO then practises on 3,000 other sentences, of which it gets
five tests each, through `minirlhf.rewards:tests`, which runs the program in a sandbox.  Both are measured on 300
more, and what became of each program is counted.
"""

import random
from collections import Counter
from pathlib import Path

from benchmarks.demo import table
from benchmarks.recipes.common import Asked, ask, over_seeds, shown, stage, write_rows
from minirlhf.measure.program import verdicts

REWARD, TOKENS = "minirlhf.rewards:tests", 32
TEST, TAUGHT, PRACTISED = 300, 2000, 5000
SAMPLES, K = 4, 4
PREFIX = "def f(a, b):\n    return"
PHRASES = {
    "the sum of {} and {}": "({} + {})",
    "the product of {} and {}": "{} * {}",
    "the difference of {} and {}": "({} - {})",
    "the larger of {} and {}": "max({}, {})",
    "the smaller of {} and {}": "min({}, {})",
}
LEAVES = ["a", "b", *map(str, range(2, 8))]
VERDICTS = ("passed", "wrong", "error", "exit", "time", "refused")
SFT = ("--vocab", 320, "--context", 80, "--n-layer", 3, "--n-head", 4, "--n-embd", 96, "--dropout", 0,
       "--epochs", 24, "--final-epochs", 0, "--batch", 64, "--lr", 3e-3, "--warmup", 30, "--patience", 24,
       "--samples", 0)  # fmt: skip
RL = ("--algorithm", "grpo", "--kl", "none", "--iterations", 80, "--batch", 256, "--minibatch", 128, "--lr", 5e-4,
      "--missing-eos", "none", "--response-tokens", TOKENS, "--save-every", 20)  # fmt: skip


def functions(seed: int) -> list[dict]:
    """All sentences of two phrases, one inside the other, in an order of their own for each seed."""
    rng, found = random.Random(seed), {}
    for outer, outer_code in PHRASES.items():
        for inner, inner_code in PHRASES.items():
            for x in LEAVES:
                for y in LEAVES:
                    for z in LEAVES:
                        if x == y or not {x, y, z} & {"a", "b"}:
                            continue
                        nested = inner.format(x, y), inner_code.format(x, y)
                        for first in (True, False):
                            said, code = ((nested[i], z) if first else (z, nested[i]) for i in (0, 1))
                            found[outer.format(*said)] = outer_code.format(*code)
    sentences = sorted(found)
    rng.shuffle(sentences)
    return [row_of(sentence, found[sentence], rng) for sentence in sentences[: TEST + PRACTISED]]


def row_of(sentence: str, code: str, rng: random.Random) -> dict:
    tests = []
    for _ in range(5):
        a, b = rng.randint(-9, 9), rng.randint(-9, 9)
        tests.append(f"assert f({a}, {b}) == {eval(code, {'a': a, 'b': b, 'max': max, 'min': min})}")
    prompt = f"# {sentence}\n{PREFIX}"
    return {"prompt": prompt, "prefix": PREFIX, "tests": tests, "completion": f" {code}"}


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
        test = test[:8]
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
    for name, asked in (("before", before), ("after", after)):
        found[name] = {
            "pass@1": asked.pass_at(1),
            f"pass@{K}": asked.pass_at(K),
            "verdicts": count(asked),
            "examples": asked.examples(4),
        }
    return found


def tables(results: dict) -> list[str]:
    head = ["% of programs for unseen sentences", "pass@1", f"pass@{K}"]
    rows = []
    for name, label in (("before", "SFT"), ("after", "GRPO")):
        cells = [
            over_seeds(results, lambda found, n=name, m=measure: found[n][m]["mean"])
            for measure in ("pass@1", f"pass@{K}")
        ]
        rows.append([label, *cells])

    def share(found: dict, name: str, verdict: str) -> float:
        counts = found[name]["verdicts"]
        return counts.get(verdict, 0) / sum(counts.get(v, 0) for v in VERDICTS)

    became = [
        [label, *(over_seeds(results, lambda f, n=name, v=v: share(f, n, v)) for v in VERDICTS)]
        for name, label in (("before", "SFT"), ("after", "GRPO"))
    ]
    first = next(iter(results["seeds"].values()))
    pairs = zip(first["before"]["examples"], first["after"]["examples"], strict=True)
    cut = lambda s: shown(s["prompt"].partition("\n")[0].removeprefix("# "))
    samples = [[cut(s), shown(s["response"].strip()), shown(p["response"].strip())] for s, p in pairs]
    return [
        table(head, rows),
        table(["%, by what became of them", *VERDICTS], became),
        table(["sentence", "SFT", "GRPO"], samples),
    ]
