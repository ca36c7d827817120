"""What a response states as its answer, and as which number.

A response states an answer in one of two ways:
- it marks it, by "#### 12", "the answer is 12", "answer: 12" or \\boxed{12}: what stands before the first
  mark does not count, and all that follows does;
- it consists of nothing else.
What hedges states nothing: several marked answers that differ, or two numbers where one is wanted.  So a
response that lists everything it can think of never wins, and neither does one that repeats the question.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST = 60  # characters of a number, and of its exponent's digits 3: longer ones are no answers
MARKER = re.compile(r"####|\\boxed\b|\banswers?\b(?:\s+is\b|\s*[:=])+", re.I)
DASHES = str.maketrans("\u2212\u2013\u2010\u2011\uff0d", "-----")  # minus, en dash and hyphens
HEDGES = re.compile(r"\b(?:not|never|or|nor|neither|either|than|between)\b|n['\u2019]t\b|\?", re.I)
RAISED = re.compile(r"[0-9]\s?[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215e]")  # 10³, 3½
LATEX = ((re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"), (re.compile(r"\{,\}"), ","))
# "12 + 30 =" of "12 + 30 = 42": the working before a result, as a whole run of such characters.
WORKING = re.compile(r"(?<![-+*/\u00d7\u00f7x^0-9.,$%() \t])[-+*/\u00d7\u00f7x^0-9.,$%() \t]++=")
OPERATOR = re.compile(r"[0-9)]\s*[-+*/\u00d7\u00f7x^]")
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
NUMBER = re.compile(
    rf"""(?<![\w.])                                       # no part of a word or of another number
    (?P<sign>(?<![0-9)\]])(?<![0-9)\]]\s)[-+]\s?)?        # 7-5 are two numbers, -5 and - 5 are one
    [$\u20ac\u00a3\u00a5]?(?P<inner>-)?
    (?: (?:(?P<units>{WHOLE})[ ])?(?P<over>[0-9]+)/(?P<under>[0-9]+)(?![0-9/])
      | (?P<plain>{WHOLE}(?:\.[0-9]++)?|\.[0-9]++)
        (?: [eE](?P<e>[-+]?[0-9]+)(?!\w) | \s?[x*\u00d7]\s?10(?:\^|\*\*)\{{?(?P<ten>[-+]?[0-9]+)\}}? )?
    )
    (?! \.[0-9] | [xXeE][-+]?[0-9] | _ )                 # 1.2.3, 0x10, 1e3x and 1_000 are none""",
    re.X,
)


def stated(text: str) -> list[str]:
    """The parts of a response that state its answer: what follows each mark up to the next, else all."""
    before, *marked = MARKER.split(text)
    parts = [part.strip() for part in marked or [before]]
    # Two marks may stand side by side: "the answer is \boxed{12}".
    return [part for part in parts if part.strip("$*: ")]


def number(text: str) -> Fraction | None:
    """The one number that a response states, exactly; None where it states none, or more than one.

    Units, currencies and a percent sign do not count (50% is 50); 1,234.50 is one number, 12,34 are two; 1/2
    in lowest terms is a number, 4/2 is a task; 2.5e3 and 2.5 x 10^3 are numbers.  Of "7 + 5 = 12" the answer
    is 12.  What holds "or", "not", "than" or a question mark states nothing.
    """
    found = set()
    for part in stated(text):
        value = _only_number(part)
        if value is None:
            return None
        found.add(value)
    return found.pop() if len(found) == 1 else None


def _only_number(text: str) -> Fraction | None:
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(DASHES))
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    if HEDGES.search(text) or RAISED.search(text):
        return None
    text = WORKING.sub(lambda m: " " if OPERATOR.search(m[0]) else m[0], text)
    found = {_value(match) for match in NUMBER.finditer(text)}
    return found.pop() if len(found) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    exponent = part["e"] or part["ten"] or "0"
    if len(match[0]) > LONGEST or len(exponent) > 4:
        return None
    if part["over"]:
        over, under = int(part["over"]), int(part["under"])
        if under < 2 or Fraction(over, under).denominator != under:
            return None
        size = Fraction(over, under) + int((part["units"] or "0").replace(",", ""))
    else:
        size = Fraction(part["plain"].replace(",", "")) * Fraction(10) ** int(exponent)
    negative = ((part["sign"] or "").strip() == "-") != bool(part["inner"])
    return -size if negative else size
