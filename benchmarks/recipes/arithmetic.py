"""Sums of two numbers, from scratch: the smallest reinforcement learning from verifiable rewards there is.

A problem is "47+85:", the answer "7+5=12 4+8+1=13 #### 132".  A tiny GPT learns the form, and half of the sums,
from 300 worked examples.  GRPO then practises on 9,000 problems of which it gets the number alone, through
`minirlhf.rewards:numeric`: no reward model, no worked examples.  Both are measured on 1,000 other problems.
"""

import random
from pathlib import Path

from benchmarks.demo import table
from benchmarks.recipes.common import ask, before_and_after, means_of, side_by_side, stage, write_rows

REWARD, TOKENS = "minirlhf.rewards:numeric", 32
TEST, TAUGHT = 1000, 300  # problems that no stage sees; worked examples
SAMPLES, K = 8, 8
SFT = ("--vocab", 258, "--context", 40, "--n-layer", 2, "--n-head", 4, "--n-embd", 96, "--dropout", 0,
       "--epochs", 80, "--final-epochs", 0, "--batch", 64, "--lr", 3e-3, "--warmup", 30, "--patience", 80,
       "--samples", 0)  # fmt: skip
RL = ("--algorithm", "grpo", "--kl", "none", "--iterations", 500, "--batch", 256, "--minibatch", 128, "--lr", 5e-4,
      "--missing-eos", "none", "--response-tokens", TOKENS, "--save-every", 20)  # fmt: skip


def worked(a: int, b: int) -> str:
    """ "7+5=12 4+8+1=13 #### 132": units first, then tens with what was carried."""
    units = a % 10 + b % 10
    carried = units // 10
    return (
        f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}+{carried}={a // 10 + b // 10 + carried} #### {a + b}"
    )


def problems(seed: int) -> list[dict]:
    """All 10,000 sums of two numbers below 100, in an order of their own for each seed."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    return [{"prompt": f"{a:02d}+{b:02d}:", "answer": a + b, "completion": worked(a, b)} for a, b in pairs]


def run(home: Path, seed: int, smoke: bool) -> dict:
    rows = problems(seed)
    test, others = rows[:TEST], rows[TEST:]
    asked = {"samples": SAMPLES, "tokens": TOKENS}
    sft_options, rl_options = SFT, RL
    if smoke:  # a smaller model, fewer steps
        test, asked["samples"] = test[:16], K
        sft_options = (*SFT, "--n-layer", 1, "--n-embd", 32, "--epochs", 2)
        rl_options = (*RL, "--iterations", 2, "--batch", 32, "--minibatch", 32)
    files = {
        "sft": write_rows(home / "sft.jsonl", others[:TAUGHT]),
        "prompts": write_rows(
            home / "prompts.jsonl", [{k: r[k] for k in ("prompt", "answer")} for r in others]
        ),
        "test": write_rows(home / "test.jsonl", test),
    }
    seconds = {"sft": stage("train_sft.py", home / "sft", seed, "--data", files["sft"], *sft_options)}
    before = ask(home / "sft", files["test"], REWARD, **asked)
    rl = ("--data", files["prompts"], "--init", home / "sft", "--reward", REWARD, *rl_options)
    seconds["rl"] = stage("train_ppo.py", home / "ppo", seed, *rl)
    after = ask(home / "ppo", files["test"], REWARD, **asked)
    found = {"seconds": seconds, "test": len(test)}
    for name, policy, answers in (("before", "sft", before), ("after", "ppo", after)):
        likeliest = ask(home / policy, files["test"], REWARD, 1, TOKENS, temperature=0.0)
        found[name] = {
            "pass@1": answers.pass_at(1),
            f"pass@{K}": answers.pass_at(K),
            "likeliest": likeliest.pass_at(1),
            "examples": answers.examples(4),
        }
    return found


def tables(results: dict) -> list[str]:
    head = ["right, % of unseen problems", "pass@1", f"pass@{K}", "likeliest answer"]
    rows = before_and_after(results, means_of("pass@1", f"pass@{K}", "likeliest"))[:2]
    samples = side_by_side(results, lambda prompt: prompt)
    return [table(head, rows), table(["prompt", "SFT", "GRPO"], samples)]
