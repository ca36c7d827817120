"""Rewards that check an answer: `--reward minirlhf.rewards:NAME`; exact, numeric, choice, chrf and format.

Each takes the data's own rows and reads what is right from them.  An answer that cannot be read is wrong (0);
a row from which nothing can be read is refused, with its line, before the run begins.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

from minirlhf import UserError
from minirlhf.measure import final_answer

Row = dict[str, Any]
SECONDS = 1.0  # for one match of a row's regular expression


def _reads(**fields: Any):
    """A decorator: what the reward reads of a row (see support/rows.py)."""

    def mark(function):
        function.fields = fields or ()
        return function

    return mark


# ---------------------------------------------------------------- texts


def _texts(answer: Any) -> list[str]:
    """The right answers of a row: a text or a number, or a list of them.  Raises ValueError for others."""
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(a, str | int | float) for a in answers):
        raise ValueError(f"expected a text, or a list of texts, got {answer!r:.40}")
    if not all(map(_normal, map(str, answers))):
        raise ValueError("is empty: no response could be told from silence")
    return [str(a) for a in answers]


def _normal(text: str) -> str:
    """Without what makes no other answer: case, spaces, quotation marks and a full stop around it."""
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return words.strip(" .!\"'`\u2018\u2019\u201c\u201d*")


@_reads(answer=_texts)
def exact(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """1 where the response is the row's `answer`, or one of a list of answers, else 0.

    Case, spaces, quotation marks and a full stop around the text do not count; inside everything does.  A
    marked answer ("The answer is Paris.", "#### Paris") counts, if all that are marked are the same.
    """
    found = []
    for response, row in zip(responses, rows, strict=True):
        said = {_normal(part) for part in final_answer.stated(response)}
        found.append(float(len(said) == 1 and said <= set(map(_normal, _texts(row["answer"])))))
    return found


# ---------------------------------------------------------------- numbers


def _number(answer: Any) -> Any:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"expected a number, or a text with one number, got {answer!r:.40}")
    value = final_answer.number(str(answer))
    if value is None:
        raise ValueError(f"{answer!r:.40} is no number, or more than one")
    return value


@_reads(answer=_number)
def numeric(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """1 where the number that the response states is that of the row's `answer`, else 0.

    The response marks its answer ("#### 12", "the answer is 12 apples"), or holds one number only; of
    "7 + 5 = 12" that is 12.  Numbers are compared exactly: 3.50 is 3.5 and 1/2 is .5, but .33 is not 1/3.
    See final_answer.number for units, commas, percent and the rest.
    """
    stated = map(final_answer.number, responses)
    return [float(value == _number(row["answer"])) for value, row in zip(stated, rows, strict=True)]


# ---------------------------------------------------------------- choices


def _choices(choices: Any) -> dict[str, str]:
    """{label: text} of a row's choices, in any of the three forms that choice() names.  Or ValueError."""
    if isinstance(choices, dict) and isinstance(choices.get("label"), list | tuple):
        labels, texts = choices["label"], choices.get("text", ())
        choices = dict(zip(labels, texts, strict=False)) if len(labels) == len(texts) else None
    elif isinstance(choices, list):
        choices = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False))
    good = isinstance(choices, dict) and len(choices) > 1
    good = good and all(isinstance(x, str) and x.strip() for pair in choices.items() for x in pair)
    if not good:
        raise ValueError("expected a list of two texts or more, or {label: text}")
    return choices


def _spellings(choices: dict[str, str]) -> dict[str, str]:
    """{how an option may be stated: its label}: by label, by both, or by a text that is its alone."""
    texts = [_normal(text) for text in choices.values()]
    found = {text: label for label, text in zip(choices, texts, strict=True) if texts.count(text) == 1}
    for (label, _), text in zip(choices.items(), texts, strict=True):
        found |= dict.fromkeys(_both(_normal(label), text), label)
    return found


def _both(label: str, text: str) -> Iterator[str]:
    for written in (label, f"({label})", f"[{label}]"):
        yield written
        for between in ("", ".", ")", ":", " -"):
            yield f"{written}{between} {text}"
    yield f"{label})"
    yield f"{label}:"


@_reads(choices=_choices, answer=lambda answer: None)
def choice(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """1 where the response states the right one of the row's `choices`, by label, by text or by both, else 0.

    choices: a list of texts (their labels are A, B, ...), {label: text}, or {"label": [...], "text": [...]}.
    answer: a label, a text, or a place in the list, from 0.  The response says nothing else, or it marks its
    answer and nothing else follows in the line; to name two options is wrong, whichever they are.
    """
    return [_chosen(response, row) for response, row in zip(responses, rows, strict=True)]


def _chosen(response: str, row: Row) -> float:
    choices = _choices(row["choices"])
    spellings, answer = _spellings(choices), row["answer"]
    if type(answer) is int and 0 <= answer < len(choices) and str(answer) not in choices:
        right = [*choices][answer]
    else:
        right = answer if answer in choices else spellings.get(_normal(str(answer)))
    if right is None:
        where = getattr(row, "where", "") or "a row"
        raise UserError(f"{where}: answer: {answer!r:.40} is none of the choices {[*choices]!r:.80}")
    said = {spellings.get(_normal(part)) for part in final_answer.stated(response)}
    return float(said == {right})


# ---------------------------------------------------------------- translations


@functools.cache
def _sentence_chrf():
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise UserError("chrf needs the sacrebleu package: pip install 'minirlhf[translation]'") from None
    return CHRF()


def chrf(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """chrF of each response against the row's `reference`, or else its `answer`, 0 to 1 (Popovic 2015).

    The F-score of character 6-grams, recall weighing twice, as sacrebleu computes it for one sentence.  Of a
    list of references the best one counts.
    """
    references = [row["reference"] if "reference" in row else row["answer"] for row in rows]
    pairs = zip(responses, map(_texts, references), strict=True)
    return [_sentence_chrf().sentence_score(response, known).score / 100 for response, known in pairs]


chrf.fields = {("reference", "answer"): _texts}

# ---------------------------------------------------------------- formats


def _pattern(text: Any) -> re.Pattern[str]:
    try:
        return re.compile(text, re.S)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r:.40} is no regular expression: {error!s:.60}") from None


@_reads()
def format(prompts: list[str], responses: list[str], rows: list[Row]) -> list[float]:
    """1 where the whole response matches the row's regular expression `format`, else 0.

    `.` matches line breaks, too.  A match that takes more than a second is none.  For rows without `format`:
    the last line that is not blank, and no other, states an answer after a mark such as "#### 12" or "The
    answer is 12", once.
    """
    found = []
    for response, row in zip(responses, rows, strict=True):
        if "format" in row:
            found.append(float(_matches(_pattern(row["format"]), response)))
        else:
            last = (response.strip().splitlines() or [""])[-1]
            marks = final_answer.MARKER.findall(response), final_answer.MARKER.findall(last)
            stated = "".join(final_answer.stated(last)) if [*map(len, marks)] == [1, 1] else ""
            found.append(float(any(c.isalnum() for c in stated)))
    return found


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the whole text matches, within SECONDS: some patterns take for ever on some texts."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        return pattern.fullmatch(text) is not None

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return pattern.fullmatch(text) is not None
    except (TimeoutError, RecursionError):
        return False
    finally:
        with contextlib.suppress(TimeoutError):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
