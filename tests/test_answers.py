"""Rewards that check an answer: what they take for right.  What they do not: tests/test_gaming.py."""

import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf import UserError, rewards
from minirlhf.measure import answers, final_answer
from minirlhf.support.rows import OwnRow


def score(name, response, **row):
    [found] = getattr(rewards, name)(["the prompt"], [response], [OwnRow(row, "d.jsonl:1")])
    return found


# ---------------------------------------------------------------- numbers

NUMBERS = {
    "12": 12,
    "-12": -12,
    "\u221212": -12,  # a minus sign
    "\u201312": -12,  # an en dash
    "- 12": -12,
    "It is -12": -12,
    "-0": 0,
    "0.00": 0,
    "007": 7,
    "9 apples": 9,
    "9kg": 9,
    "9 cm\u00b2": 9,
    "He has 9 apples left.": 9,
    "9.": 9,
    "**9**": 9,
    "$1,234.50": Fraction("1234.5"),
    "-$5": -5,
    "$-5": -5,
    "\u20ac9": 9,
    "9 USD": 9,
    "1,234,567": 1234567,
    "50%": 50,
    "12.5 %": Fraction(25, 2),
    "1/2": Fraction(1, 2),
    "-3/4 of it": Fraction(-3, 4),
    "3 1/2": Fraction(7, 2),
    ".5": Fraction(1, 2),
    "1e3": 1000,
    "2.5E-3": Fraction("0.0025"),
    "2.5 x 10^3": 2500,
    "2.5 \u00d7 10^{-3}": Fraction("0.0025"),
    "7 + 5 = 12": 12,
    "7+5=12": 12,
    "7 + 5 = 12 apples": 12,
    "5 - 8 = -3": -3,
    "(3 + 4) * 2 = 14": 14,
    "2 * 3 = 6 + 4 = 10": 10,
    "x = 5": 5,
    "First 7 + 5 = 12. Then 12 - 3 = 9.\n#### 9": 9,
    "#### 1,234": 1234,
    "There are 3 boxes of 4. The answer is 12.": 12,
    "The answer is: 12 apples": 12,
    "the final answer is \\boxed{12}": 12,
    "\\boxed{\\frac{1}{2}}": Fraction(1, 2),
    "$\\boxed{1{,}234}$": 1234,
    "Answer: 12": 12,
    "ANSWER = 12": 12,
    "The answer is 12 because 3 * 4 = 12": 12,
    "#### 12\n#### 12.0": 12,
    "\uff11\uff12": 12,  # full width
    "12\n": 12,
    "(12)": 12,
}
NO_NUMBERS = [
    "", " ", "nine", "####", "the answer is", "9 or 10", "9, 10", "9 10", "9-10", "9/10/11", "12,34", "1,23,456",
    "1 000", "9:30", "1.2.3", "0x10", "1e3x", "10\u00b3", "3\u00bd", "4/2", "1/0", "12?", "What is 7/2?", "17+25=",
    "17 + 25", "x = 5 or x = 6", "#### 9\n#### 10", "#### 9\nor 10", "The answer is 9. Or 10.", "not 9", "more than 9",
    "It isn't 9", "between 8 and 10", "The answer is 9. Q: What is 3 + 4? The answer is 7.", "1e99999", "9" * 200,
    "3 apples and 2 more", "3 + 4 = 7 or 3 + 4 = 8", "inf", "nan", "\\boxed{}", "-", "%", "CO2",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=repr)
def test_numbers_that_are_stated(text):
    assert final_answer.number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=repr)
def test_texts_that_state_no_number_or_several(text):
    assert final_answer.number(text) is None


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["", "#### ", "The answer is ", "Answer: ", "$", "= "])
)
def test_a_number_is_read_as_it_is_written(value, before):
    for text in (str(value), f"{value:,}", f"{value}.", f"{value}.00", f"{value} apples"):
        assert final_answer.number(before + text) == value


@given(st.fractions(max_denominator=999))
def test_a_fraction_in_lowest_terms_is_a_number(value):
    assert final_answer.number(f"{value}") == value
    if value.denominator > 1:
        assert final_answer.number(f"{2 * value.numerator}/{2 * value.denominator}") is None


@given(st.integers(), st.integers())
def test_two_numbers_are_an_answer_only_if_they_are_equal(a, b):
    expected = a if a == b and abs(a) < 10**50 else None
    for between in (" ", ", ", "\n", " and "):
        assert final_answer.number(f"I say {a}{between}{b}") == expected


@given(st.text(max_size=300))
def test_any_text_is_read_without_a_crash(text):
    final_answer.number(text)
    final_answer.stated(text)
    row = OwnRow({"answer": "x", "choices": ["a", "b"]})
    answers.exact([""], [text], [row])
    answers.choice([""], [text], [row | {"answer": "A"}])
    answers.format([""], [text], [OwnRow({})])


@pytest.mark.parametrize(
    "text", ["1+" * 20_000, "1," * 20_000, "9" * 40_000, "the answer is " * 3_000, "(" * 40_000]
)
def test_long_texts_are_read_in_no_time(text):
    began = time.process_time()
    final_answer.number(text)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "answer, response",
    [
        (12, "12"),
        (12.5, "12.50"),
        ("9 apples", "9"),
        ("1,234", "The answer is 1234."),
        ("So 24 + 48 = 72.\n#### 72", "#### 72"),  # as GSM8K writes them
        ("0.5", "1/2"),
        (-0.0, "0"),
        ("50%", "50"),
        (1e-07, "0.0000001"),
    ],
)
def test_numeric_takes_what_is_right(answer, response):
    assert score("numeric", response, answer=answer) == 1.0
    assert score("numeric", response + "1", answer=answer) == 0.0


# ---------------------------------------------------------------- texts and choices


@pytest.mark.parametrize(
    "answer, response",
    [
        ("Paris", "paris"),
        ("Paris", ' "Paris." '),
        ("Paris", "The answer is Paris."),
        ("Paris", "I think of France.\n#### Paris"),
        (["Paris", "the city of Paris"], "The City of  Paris"),
        (7, "7"),
        ("3.5", "3.5"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_exact_takes_what_is_right(answer, response):
    assert score("exact", response, answer=answer) == 1.0


CITIES = ["Rome", "Paris", "a town", "Rome!"]
AS_ROWS = [
    {"choices": CITIES[:3]},
    {"choices": dict(zip("ABC", CITIES[:3], strict=True))},
    {"choices": {"label": ["A", "B", "C"], "text": CITIES[:3]}},
]


@pytest.mark.parametrize("row", AS_ROWS, ids=["list", "dict", "columns"])
@pytest.mark.parametrize("answer", ["B", "Paris", 1])
@pytest.mark.parametrize(
    "response",
    [
        "B",
        "b.",
        "(B)",
        "B)",
        "Paris",
        "B. Paris",
        "(B) paris",
        "The answer is B.",
        "It is in France.\n#### B",
    ],
)
def test_choice_takes_what_is_right(row, answer, response):
    assert score("choice", response, answer=answer, **row) == 1.0
    assert score("choice", response, answer="A", **row) == 0.0


def test_a_text_that_two_choices_have_is_no_choice():
    row = {"choices": CITIES, "answer": "A"}
    assert score("choice", "A", **row) == 1.0 and score("choice", "Rome", **row) == 0.0


def test_labels_may_be_numbers():
    row = {"choices": {"1": "one", "2": "two"}, "answer": "2"}
    assert score("choice", "2", **row) == 1.0 and score("choice", "1", **row) == 0.0


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "response, right",
    [
        ("Three boxes of four.\n#### 12", 1.0),
        ("#### 12", 1.0),
        ("Work.\nThe answer is 12.\n", 1.0),
        ("12", 0.0),
        ("#### 12\nand more", 0.0),
        ("#### 12\n#### 13", 0.0),
        ("####", 0.0),
        ("", 0.0),
        ("\n\n", 0.0),
    ],
)
def test_the_documented_format(response, right):
    assert score("format", response) == right


def test_a_rows_own_format():
    row = {"format": r"<think>.*</think>\s*<answer>[^<]+</answer>"}
    assert score("format", "<think>a\nb</think>\n<answer>12</answer>", **row) == 1.0
    for wrong in ("", "12", "<think></think><answer></answer>", "<think></think><answer>1</answer> more"):
        assert score("format", wrong, **row) == 0.0
    with pytest.raises(ValueError, match="is no regular expression"):
        score("format", "x", format="(")


def test_a_regular_expression_that_takes_for_ever_is_no_match(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.2)
    began = time.perf_counter()
    assert score("format", "a" * 40 + "!", format="(a+)+") == 0.0
    assert time.perf_counter() - began < 5
    assert score("format", "aaa", format="(a+)+") == 1.0


# ---------------------------------------------------------------- translations


def test_chrf_of_a_translation():
    pytest.importorskip("sacrebleu")
    reference = "The committee will decide on Thursday."
    assert score("chrf", reference, reference=reference) == pytest.approx(1.0)
    assert score("chrf", reference, answer=["Something else.", reference]) == pytest.approx(1.0)
    close = score("chrf", "The committee decides on Thursday.", reference=reference)
    far = score("chrf", "A committee met.", reference=reference)
    assert 0.9 > close > 0.6 > far > score("chrf", "", reference=reference) == 0.0


def test_chrf_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    answers._sentence_chrf.cache_clear()
    with pytest.raises(
        UserError, match=r"^chrf needs the sacrebleu package: pip install 'minirlhf\[translation\]'$"
    ):
        score("chrf", "a", reference="a")
