"""The recipes of benchmarks/tasks.py: their data, what they measure, and that each runs."""

import importlib
import itertools
import json
import math
import re
import struct
import zipfile
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import tasks
from benchmarks.recipes import (
    arithmetic,
    assistant,
    code,
    common,
    frozen,
    instructions,
    interface,
    judged,
    refusals,
    safety,
    translation,
    words,
)
from minirlhf import UserError, checkpoint, rewards
from minirlhf.measure.program import Limits, judge
from minirlhf.rewards import RewardReader
from minirlhf.support.rows import OwnRow


@pytest.fixture
def in_process(run, monkeypatch):
    """Stages of recipes run in this process, as they would in one of their own."""

    def call(script, *options):
        assert run(script.removesuffix(".py"), *options) == 0, options

    monkeypatch.setattr(common, "command", call)
    return monkeypatch


# Checkpoints that a recipe's smoke run makes.  Frozen layers are one of their own.
FOLDERS = {"instructions": 3, "safety": 3, "translation": 3, "words": 5, "dialogue": 6, "refusals": 7}


LONG = dict.fromkeys(("code", "dialogue", "refusals"), pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, ())) for n in tasks.RECIPES])
def test_every_recipe_runs(name, in_process, tmp_path):
    recipe = importlib.import_module(f"benchmarks.recipes.{name}")
    if name == "interface":
        pytest.importorskip("sacrebleu")
    before = tasks.results_of(name).read_bytes() if tasks.results_of(name).exists() else None
    in_process.setattr("sys.argv", ["tasks.py", name, "--smoke", "--home", str(tmp_path)])
    tasks.main()
    found = (tmp_path / f"{name}-smoke").rglob("config.json")
    stages = [file for file in found if not file.parent.name.startswith(("step-", "latest"))]
    assert len(stages) == FOLDERS.get(name, 2)
    assert all(json.loads(file.read_text())["complete"] for file in stages)
    after = tasks.results_of(name).read_bytes() if tasks.results_of(name).exists() else None
    assert before == after and recipe.__doc__ and recipe.tables


# ---------------------------------------------------------------- data


def test_sums_are_disjoint_and_worked_out_rightly():
    for seed in (1, 2):
        rows = arithmetic.problems(seed)
        assert len({row["prompt"] for row in rows}) == len(rows) == 10_000
    assert arithmetic.worked(47, 85) == "7+5=12 4+8+1=13 #### 132" and arithmetic.worked(0, 5).endswith(
        "#### 5"
    )
    answers = [row["completion"] for row in rows]
    assert rewards.numeric([""] * len(rows), answers, [OwnRow(row) for row in rows]) == [1.0] * len(rows)
    assert arithmetic.problems(2) == rows != arithmetic.problems(1)


def test_functions_are_different_and_examples_have_faults(monkeypatch):
    rows = code.functions(1)
    assert len({row["prompt"] for row in rows}) == len(rows) == code.TEST + code.TAUGHT + code.PRACTISED
    assert code.functions(1) == rows != code.functions(2)

    def passed(rows):
        programs = [(row["prefix"] + row["completion"], "\n".join(row["tests"])) for row in rows]
        return sum(found.verdict == "passed" for found in judge(programs, Limits())) / len(rows)

    assert 0.3 < passed(rows[:60]) < 0.8
    monkeypatch.setattr(code, "SLIP", 0)
    monkeypatch.setattr(code, "TURNED", 0)
    assert passed(code.functions(1)[:60]) == 1
    turned = code.Function(code.DIFFERENCE, code.DIFFERENCE, ("a", "b", "3"), True)
    assert turned.written(code.PHRASES) == "((a - b) - 3)"
    assert turned.written(code.PHRASES, (True, False)) == "(3 - (a - b))"
    assert turned.written(code.PHRASES, (False, True)) == "((b - a) - 3)"


def test_practice_has_no_worked_answers_and_no_test_problems(in_process, tmp_path):
    texts = {f"text {i}": [f"texte {i}"] for i in range(5000)}
    problems = [
        {"prompt": f"{i}\nAnswer:", "answer": str(i), "working": f"{i}+0" if i % 2 else None}
        for i in range(1000)
    ]
    in_process.setattr(interface, "wheels", lambda folder, pins: [])
    in_process.setattr(common, "wheels", lambda folder, pins: [None])
    in_process.setattr(interface, "read", lambda files: texts)
    in_process.setattr(words, "read", lambda wheel: list(problems))

    def stop(*arguments):
        raise KeyboardInterrupt

    in_process.setattr(common, "command", stop)
    for recipe in (arithmetic, code, interface, words):
        home = tmp_path / recipe.__name__
        with pytest.raises(KeyboardInterrupt):
            recipe.run(home, 1, smoke=False)
        practice = "practice" if recipe is words else "prompts"
        names = ["sft", practice, "test", *(["sft-all"] if recipe is words else [])]
        files = {n: (home / f"{n}.jsonl").read_text().splitlines() for n in names}
        rows = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
        assert (
            not any({"completion", "working"} & {*row} for row in rows[practice])
            and len(rows["sft"]) == recipe.TAUGHT
        )
        seen = {row["prompt"] for name in names if name != "test" for row in rows[name]}
        assert len(rows["test"]) == recipe.TEST and not seen & {row["prompt"] for row in rows["test"]}


def catalogue(messages, order="<"):
    """A compiled gettext catalogue of {msgid: msgstr}."""
    texts = [[text.encode() for text in part] for part in (messages, messages.values())]
    at, tables, body = 28 + 16 * len(messages), b"", b""
    for part in texts:
        for text in part:
            tables += struct.pack(f"{order}2I", len(text), at + len(body))
            body += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return head + tables + body


MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "Save": "Enregistrer",
    "menu\x04Save…": "Enregistrer\u2026",  # the same words as above
    "%d file\0%d files": "%d fichier\0%d fichiers",
    "One file\0Many files": "Un fichier\0Beaucoup de fichiers",
    "Save\nall": "Tout  enregistrer",
    "<b>Save</b>": "<b>Enregistrer</b>",
    "Menu": "Menu",
    "Save one file": "",
    "Save it to a place that is far away": "Enregistrer ailleurs",
}


@pytest.mark.parametrize("order", "<>")
def test_catalogues_are_read(order):
    found = dict(interface.messages(catalogue(MESSAGES, order)))
    assert found["Save…"] == "Enregistrer…" and found["One file"] == "Un fichier"
    assert len(found) == len(MESSAGES) and found["Save\nall"] == "Tout  enregistrer"


def test_short_plain_texts_of_common_words_are_kept(monkeypatch, tmp_path):
    for name, content in (("a", MESSAGES), ("b", {"Save": "Sauvegarder", "Save one file": "Enregistrer"})):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("x/locale/fr/LC_MESSAGES/django.mo", catalogue(content))
            wheel.writestr("x/locale/de/LC_MESSAGES/django.mo", catalogue({"Open": "Öffnen"}))
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    monkeypatch.setattr(interface, "FREQUENT", 1)
    assert interface.read(files) == {
        "save": ["sauvegarder", "enregistrer"],
        "one file": ["un fichier"],
        "save all": ["tout enregistrer"],
        "save one file": ["enregistrer"],
    }
    monkeypatch.setattr(interface, "FREQUENT", 2)  # without "all" no text is lost but that one
    assert set(interface.read(files)) == {"save", "one file", "save one file"}
    monkeypatch.setattr(interface, "FREQUENT", 3)  # no text with "one" leaves one "save"
    assert interface.read(files) == {}


def test_wheels_are_verified(monkeypatch, tmp_path):
    wanted, asked = {"some_texts-1.0-py3": "00"}, {}
    monkeypatch.setattr(common, "download", lambda folder, pins, *options: asked.update(pins) or "no way")
    with pytest.raises(UserError, match=r"some_texts-1.0-.*: cannot be fetched \(no way\): put it there"):
        common.wheels(tmp_path / "wheels", wanted)
    assert asked == {"some_texts==1.0": "00"}
    (tmp_path / "wheels/some_texts-1.0-py3-none-any.whl").write_text("")
    with pytest.raises(UserError, match="sha256 is not 00: delete it"):
        common.wheels(tmp_path / "wheels", wanted)


def asdiv(path, *problems):
    """A wheel with (passage, question, answer) as ASDiv's lines."""
    lines = [json.dumps(dict(zip(("passage", "question", "answer"), row, strict=True))) for row in problems]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(words.MEMBER, "\n".join(lines))
    return path


def test_short_problems_with_a_plain_number_are_kept_once(tmp_path):
    rows = words.read(
        asdiv(
            tmp_path / "wheel",
            ("Al has 7 jam  jars and breaks two.", "How many are whole? ", "5 jars"),
            ("Al has 7 jam jars and breaks two.", "How many are whole?", "5"),
            ("A plot of 1,200 acres costs $2.50 per acre.", "What does it cost?", "3,000.00 dollars"),
            *(
                ("It is late.", f"When is it, {i}?", answer)
                for i, answer in enumerate(("6th", "5:45", "3; 4", "Bo"))
            ),
            ("word " * words.WORDS, "How many words?", "30"),
        )
    )
    assert rows == [
        {
            "prompt": "Al has 7 jam jars and breaks two. How many are whole?\nAnswer:",
            "answer": "5",
            "working": "7-2",
        },
        {
            "prompt": "A plot of 1,200 acres costs $2.50 per acre. What does it cost?\nAnswer:",
            "answer": "3000",
            "working": "1200*2.5",
        },
    ]


@pytest.mark.parametrize(
    ("text", "answer", "working"),
    [
        ("Sixty-eight and eighty-nine", 21, "89-68"),
        ("Twenty ducks with 1 nest", 20, None),  # 20*1, or 20/1
        ("2 and 2", 4, None),
        ("two, 6 and 6", 14, "2+6+6"),  # any order of a sum is the same sum
        ("3 packs of 4, and 5 eaten", 7, "3*4-5"),
        ("4 and 5, three times", 27, "(4+5)*3"),
        ("10 for 3 and 2 more", Fraction(16, 3), "10/3+2"),
        ("20 for 4 and 2", Fraction(10, 3), "20/(4+2)"),
        ("2 of 3 leave 5", 4, None),  # 2+5-3, (5+3)/2 or (5-3)*2
        ("half of 12", 6, None),
        ("1 2 3 4", 10, None),
        ("someone has 5 of 8 phones", 3, "8-5"),
    ],
)
def test_working_is_found_where_only_one_leads_to_the_answer(text, answer, working):
    assert words.worked(text, Fraction(answer)) == working


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" (12-4)*3", 24),
        ("1.5*2/4", Fraction(3, 4)),
        ("0.1+0.2", Fraction(3, 10)),  # exactly
        (" 9 ", 9),
        ("1.0000000000000000000000001-1", Fraction(1, 10**25)),
        ("(" * 49 + "24" + ")" * 49, 24),
        *((text, None) for text in ("", " ", "-5", "3+", "5/0", "2**3", "7//2", "3(4)", "1,200-5", "08+1")),
        *((text, None) for text in ("...", "1.2.3", "nine", "1e9", "1_0", "9\n9", "3+4=7", "0x9", "f()")),
        *((text, None) for text in ("(" * 5000, "9" * 5000, "9*" * 5000 + "9")),
    ],
)
def test_a_calculator_reads_calculations_alone(text, value):
    assert words.calculation(text) == value
    assert words.calculated([""], [text], [OwnRow({"answer": "24"})]) == [float(value == 24)]


@pytest.mark.parametrize(
    ("response", "score", "verdict"),
    [
        (" 16-7", 1.0, "right"),
        (" 7+9", 1.0, "right"),  # whatever numbers
        (" 16+7", 0.0, "wrong operations"),
        (" 16", 0.0, "wrong operations"),
        (" 7*16-7", 0.0, "wrong operations"),
        (" 16-8", 0.0, "wrong numbers"),
        (" 16-7=9", 0.0, "no calculation"),
        (" 5/0", 0.0, "no calculation"),
        ("", 0.0, "no calculation"),
    ],
)
def test_why_an_answer_is_wrong(response, score, verdict):
    prompt = "Al has sixteen jars and breaks 7. How many are whole?\nAnswer:"
    assert words.verdict(prompt, response, score) == verdict
    asked = common.Asked([prompt], [{}], [[response]], [[score]], 0.0)
    assert words.verdicts(asked) == {name: float(name == verdict) for name in words.VERDICTS}


@given(st.lists(st.integers(1, 60), min_size=2, max_size=3), st.data())
def test_the_reward_reads_any_calculation_that_the_rule_finds(numbers, data):
    parts = [words.Part(str(n), Fraction(n)) for n in numbers]
    whole = parts[0]
    for part in parts[1:]:
        whole = data.draw(st.sampled_from([found for _, found in words.operations(whole, part)]))
    found = words.worked(" and ".join(map(str, numbers)), whole.value)
    assume(found)
    assert words.calculated([""], [f" {found}"], [OwnRow({"answer": str(whole.value)})]) == [1.0]
    assert eval(found) == pytest.approx(float(whole.value))
    assert sorted(map(int, re.findall(r"\d+", found))) == sorted(numbers)


FORMS = (safety, instructions, translation)  # the recipes that read files of other people


@pytest.mark.parametrize("recipe", FORMS)
def test_made_up_data_have_the_published_form(recipe, tmp_path):
    files = recipe.made_up(tmp_path)
    assert len(files) == len(recipe.DATA) and all(recipe.read(file) for file in files)


def test_no_conversation_is_in_both_parts(tmp_path):
    """Turns differ, but the first prompts are the same words: both dialogues are on one side."""
    turn = "\n\nHuman: {}\n\nAssistant:"
    rows = []
    for i in range(20):
        for first in (f"Question {i}?", f"question {i}"):
            asked = turn.format(first) + " What?" + turn.format(f"Once more, {first}")
            rows.append({"chosen": f"{asked} No.", "rejected": f"{asked} Yes."})
    pairs = safety.read(common.write_rows(tmp_path / "rows.jsonl", rows))
    assert len(pairs) == 40 and len({pair.key for pair in pairs}) == 20
    one = safety.Pair("question 7", "Human: Once more, Question 7? Assistant:", "No.", "Yes.", ("a",))
    assert one in pairs and one.share == 1.0
    for fold in (1, 2, 3):
        learnt, test = judged.divide(pairs, lambda pair: pair.key, 5, fold)
        assert not {p.key for p in learnt} & {p.key for p in test} and len(test) == 8 and len(learnt) == 32


@given(st.integers(3, 40), st.integers(2, 3))
def test_folds_hold_out_every_key_once(keys, folds):
    items = [f"document {i % keys}" for i in range(2 * keys)]
    tests = [judged.divide(items, str, folds, fold)[1] for fold in range(1, folds + 1)]
    assert sorted(x for test in tests for x in test) == sorted(items)
    assert judged.divide(items, str, folds, folds + 1) == judged.divide(items, str, folds, 1)


HEAD = "system\tdoc\tdocSegId\tglobalSegId\trater\tsource\ttarget\tcategory\tseverity"


def mqm(path, *rows):
    path.write_text("\n".join([HEAD, *("\t".join(row) for row in rows)]) + "\n")
    return path


def test_errors_of_a_translation_add_up_by_rater(tmp_path):
    row = lambda system, rater, target, category, severity: (
        system, "d", "1", "7", rater, "源", target, category, severity,
    )  # fmt: skip
    file = mqm(
        tmp_path / "mqm.tsv",
        row("A", "r1", "an <v>error</v>", "Accuracy/Mistranslation", "Major"),
        row("A", "r1", "<v>an</v> error", "Fluency/Punctuation", "Minor"),
        row("A", "r2", "an error", "No-error", "No-error"),
        row("A", "r2", "an error", "Accuracy", "HOTW-test"),
        row("B", "r1", "none", "Non-translation!", "Major"),
        row("system", "rater", "target", "category", "severity"),  # a heading in the middle
    )
    a, b = translation.read(file)
    assert a.target == "an error" and a.costs == {"r1": 5.1, "r2": 0.0} and a.cost == 2.55
    assert b.costs == {"r1": 25.0} and (a.document, a.segment) == (b.document, b.segment) == ("d", "7")
    for bad, reason in (
        (
            row("A", "r1", "x", "Accuracy", "Grave"),
            "severity: 'grave' is none of major, minor, neutral, no-error",
        ),
        (("A", "d"), "2 columns, but the heading has 9"),
    ):
        with pytest.raises(UserError, match=rf"mqm.tsv:2: {reason}"):
            translation.read(mqm(tmp_path / "mqm.tsv", bad))
    file.write_text("system\tdoc\n")
    with pytest.raises(UserError, match="mqm.tsv:1: no column rater, source"):
        translation.read(file)


def translations(*costs):
    """Translations of one segment, by three raters."""
    return [
        translation.Translation(f"s{i}", "d", "1", "src", f"t{i}", dict(zip("xyz", c, strict=True)))
        for i, c in enumerate(costs)
    ]


def test_ratings_against_the_mean_of_the_segment():
    items = translations((0, 0, 0), (1, 1, 1)) + [
        translation.Translation("s", "d", "2", "src", "alone", {"x": 3.0})
    ]
    half = math.log(2) / 2
    assert translation.targets(items) == [[half] * 3, [-half] * 3, [0.0]]


def test_a_rater_votes_for_the_translation_that_costs_less():
    a, b, c = translations((0, 5, 1), (1, 0, 1), (0, 0, 0))
    c.segment = "2"
    places, votes = translation.votes_of([a, b, c])  # c has nothing to be compared with
    assert places == [0, 1] and votes == [{"x": 1.0, "y": 0.0, "z": 0.5}]
    assert translation.shares_of(votes) == [0.5]
    b.costs = {"x": 1, "w": 0}
    assert translation.votes_of([a, b]) == ([0, 1], [{"x": 1.0}])
    b.costs = {"w": 0}
    assert translation.votes_of([a, b]) == ([], [])


def test_a_rater_who_often_disagrees_counts_less():
    votes = [{"x": float(i % 2), "y": float(i % 2), "z": float(i % 4 < 2)} for i in range(40)]
    mean, weighed = (translation.shares_of(votes, raters) for raters in ("mean", "model"))
    sure = [vote["x"] == 1 for vote in votes]
    assert mean[sure].min() == pytest.approx(2 / 3) and weighed[sure].min() > 0.9


def test_translations_are_read_beside_the_others():
    items = translations((0, 0, 0), (0, 0, 0)) + [
        translation.Translation("s", "d", "2", "src", "alone", {"x": 3.0})
    ]
    states = np.array([[1.0, 2.0], [3.0, 2.0], [9.0, 9.0]])
    found = translation.beside_others(items, states, np.array([[0.0], [1.0], [5.0]]), [4.0, 2.0, 7.0])
    assert found.tolist() == [[-1.0, 0.0, -0.5, 1.0], [1.0, 0.0, 0.5, -1.0], [0.0] * 4]


def test_votes_on_instructions(tmp_path):
    row = {"instruction": "Is it so?", "input": "It is.", "response1": True, "response2": "No"}
    file = tmp_path / "testset.json"
    file.write_text(json.dumps([row | {"annotator1": 1, "annotator2": 0, "annotator3": 2}]))
    (pair,) = instructions.read(file)
    prompt = "\n\nHuman: Is it so?\nIt is.\n\nAssistant:"
    assert pair == judged.Pair("Is it so?", prompt, "True", "No", ("a", "tie", "b")) and pair.share == 0.5
    assert pair.prompt.messages == ({"role": "user", "content": "Is it so?\nIt is."},)
    file.write_text(json.dumps([row | {"input": "", "annotator1": 1, "annotator2": 1, "annotator3": 1}]))
    assert instructions.read(file)[0].prompt.messages[0]["content"] == "Is it so?"
    for wrong, reason in (
        ({"annotator1": 3}, "annotator1: want 1, 2 or 0 for a tie, found 3"),
        ({"response2": 4}, "response2: want a text, found 4"),
    ):
        votes = {"annotator1": 1, "annotator2": 0, "annotator3": 2}
        file.write_text(json.dumps([row | votes, row | votes | wrong]))
        with pytest.raises(UserError, match=rf"testset.json:2: {reason}"):
            instructions.read(file)
    file.write_text("[]")
    with pytest.raises(UserError, match="testset.json"):
        instructions.read(file)


def test_people_agree_with_people():
    pair = lambda *votes: judged.Pair("k", "p", "x", "y", votes)
    found = instructions.agreement([pair("a", "a", "a"), pair("b", "b", "b")])
    assert found == {"alpha": 1.0, "one person": 1.0}
    # the third person against two who agree is wrong; each of the two against "a" and "b" has no majority
    assert instructions.agreement([pair("a", "a", "b")] * 2 + [pair("b", "b", "b")])["one person"] == (
        pytest.approx((1 + 1 + 1 / 3) / 3)
    )


def test_beginnings_of_texts():
    assert judged.begin("one two three", 2) == "one two ..." and judged.begin("one  two", 2) == "one  two"


# ---------------------------------------------------------------- measures


def test_pairs_are_compared_within_a_group():
    costs = [0.0, 1.0, 5.0, 5.0, 0.0]
    groups = [[0, 1, 2], [3, 4]]
    assert translation.pair_accuracy([3, 2, 1, 1, 2], costs, groups) == 1.0
    assert translation.pair_accuracy([3, 2, 1, 2, 1], costs, groups) == 3 / 4
    assert translation.pair_accuracy([1, 1, 1, 1, 1], costs, groups) == 0.5
    assert translation.pair_accuracy([1, 2, 9], [1.0, 1.0, 0.0], [[0, 1, 2]]) == 1.0  # equal costs: no pair
    assert translation.chosen_cost([3, 2, 1, 9, 2], costs, groups) == 2.5
    assert translation.chosen_cost([3, 3, 1, 2, 2], costs, groups) == 1.5  # ties: the mean of them


def test_one_rater_is_judged_by_the_others():
    items = translations((0, 6, 7), (5, 0, 0))
    found = translation.one_rater(items)
    assert found["pairs"] == pytest.approx(
        (0 + 1 / 1 + 1 / 1) / 3
    )  # y and z: the others' means, 2.5, are equal
    agreeing = translations((0, 0, 0), (5, 5, 5), (1, 1, 1))
    found = translation.one_rater(agreeing)
    assert found == {"pairs": 1.0, "r": pytest.approx(1.0), "chosen": 0.0, "alpha": pytest.approx(1.0)}


def test_the_best_system_is_chosen_on_other_documents():
    learnt, test = translations((0, 0, 0), (9, 9, 9)), translations((6, 6, 6), (3, 3, 3))
    assert translation.systems_of(learnt, test) == {"any": 4.5, "best": 6.0, "oracle": 3.0}


def test_the_translation_most_like_the_others():
    pytest.importorskip("sacrebleu")
    items = translations(*[(0, 0, 0)] * 3)
    for item, target in zip(items, ("the red house", "the red house there", "banana"), strict=True):
        item.target = target
    scores = translation.alike(items)
    assert scores[0] > scores[2] and scores[1] > scores[2]


def test_what_is_measured_of_interface_texts():
    pytest.importorskip("sacrebleu")
    rows = [{"reference": ["ouvrir le fichier", "ouvrir un fichier"]}, {"reference": ["fermer"]}]
    written = [[" ouvrir un fichier", "ferme"], ["xyz", "fermer"]]  # [2 samples][2 prompts]
    sampled = common.Asked(["a", "b"], rows, written, [[1.0, 0.5], [0.0, 1.0]], 0.0)
    likeliest = common.Asked(["a", "b"], rows, [["ouvrir le fichier", "ferme"]], [[1.0, 0.5]], 0.0)
    found = interface.measured(sampled, likeliest, {"ouvrir", "un", "fichier", "fermer"})
    assert (found["chrf"], found["best"], found["exact"]) == (0.625, 1.0, 0.5)
    assert (found["likeliest"], found["likeliest exact"], found["different"]) == (0.75, 0.5, 1.0)
    assert found["length"] == pytest.approx((17 + 5 + 3 + 6) / 4 / ((17 + 6) / 2))
    assert found["words"] == pytest.approx(4 / 6) and 0 <= found["bleu"] <= 1


def test_what_there_is_to_learn_within_segments():
    """Raters a and b agree but for a's severity; c says the same of all.  Systems differ alike in both."""
    quality = lambda *costs: dict(zip("abc", costs, strict=True))
    items = []
    for segment, costs in (("1", [(1, 0, 0), (3, 1, 0)]), ("2", [(3, 1, 0), (7, 3, 0)])):
        for system, of in zip("XY", costs, strict=True):
            items.append(translation.Translation(system, "d", segment, "s", system, quality(*of)))
    found = translation.within_segments(items)
    assert found["system"] == pytest.approx(1.0)  # log(1 + cost) of each rater rises by log 2, or not at all
    assert 0 < found["raters"] < 1 and 0 < found["within"] < 1
    for item in items:
        del item.costs["c"]
    assert translation.within_segments(items)["raters"] == pytest.approx(1.0)
    assert translation.of_system(items, items[:2]) == [-(0.5 + 2) / 2, -(2 + 5) / 2]


def test_logistic_regression_is_at_its_least():
    rng = np.random.default_rng(0)
    x, shares = rng.normal(size=(60, 3)), rng.choice([0.0, 1 / 3, 0.5, 2 / 3, 1.0], 60)

    def loss(w):
        return np.mean(np.logaddexp(0, x @ w) - shares * (x @ w)) + 0.1 / 2 * w @ w

    w = frozen.logistic(x, shares, 0.1)
    assert all(loss(w) < loss(w + step) for step in 1e-3 * np.vstack([np.eye(3), -np.eye(3)]))
    assert np.allclose(frozen.logistic(-x, 1 - shares, 0.1), w)  # pairs turned round
    one = frozen.logistic(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0]), 0.0)
    assert one == pytest.approx(np.log(3))  # three of four


def test_a_head_on_frozen_layers(in_process, tmp_path):
    """What the checkpoint says of texts is the regression's; its backbone is the base's first layers."""
    texts = common.write_rows(tmp_path / "t.jsonl", [{"text": f"number {i} is there"} for i in range(80)])
    common.stage("train_sft.py", tmp_path / "base", 1, "--data", texts, *judged.TINY, "--n-layer", 2)
    base = frozen.shallow(tmp_path / "base", 1)
    whole, first = checkpoint.load_gpt(tmp_path / "base"), checkpoint.load_gpt(base)
    assert len(first.blocks) == 1 and frozen.shallow(tmp_path / "base", 1) == base
    before = whole.state_dict()
    assert all((before[name] == tensor).all() for name, tensor in first.state_dict().items())

    pairs = [judged.Pair(f"{i}", "Say it: ", f"yes {i}", f"no {i}", ("a", "a", "b")) for i in range(9)]
    read = judged.texts_of(pairs)
    vectors = judged.features(base, read, tmp_path)
    frozen.save(tmp_path / "rm", base, frozen.fit(judged.shares_of(pairs), vectors, 1e-3), 1e-3)
    reader, scores = RewardReader.load(tmp_path / "rm", ""), np.zeros(len(read))
    for places, *batch in judged.by_length(reader.tokenizer, reader.context, read):
        scores[places] = reader.model.each(*batch)[0].detach()
    assert abs(scores.mean()) < 1e-4 and (judged.minus(scores) > 0).all()
    scale = vectors.std(0) * np.sqrt(vectors.shape[1])
    w = frozen.logistic(judged.minus(vectors) / scale, np.full(9, 2 / 3), 1e-3)
    assert judged.minus(scores) == pytest.approx(judged.minus(vectors) / scale @ w, rel=0.01)


def test_how_likely_a_language_model_finds_texts(in_process, tmp_path):
    base = judged.backbone(tmp_path, smoke=True)
    tokenizer, model = checkpoint.tokenizer_of(base), checkpoint.load_gpt(base).eval()
    read = [("", "number 3 is there"), ("", "a"), ("", "number")]
    found = judged.features(base, read, tmp_path, judged.mean_logprob)
    for text, value in zip(read, found, strict=True):
        ((_, ids, mask),) = judged.by_length(tokenizer, 256, [text])  # without padding
        with torch.no_grad():
            logprobs = model.logits(model(ids, mask)).log_softmax(-1)[0]
        each = [logprobs[i, token].item() for i, token in enumerate(ids[0, 1:].tolist())]
        assert value == pytest.approx(np.mean(each), rel=1e-4)
    assert judged.features(base, read, tmp_path).shape == (3, 32)
    assert len([*tmp_path.glob("*.npy")]) == 2  # under other names


def test_unscaled_numbers_have_as_much_room_as_all_states():
    rng = np.random.default_rng(0)
    vectors, shares = rng.normal(size=(40, 5)), rng.random(20)
    scale = (vectors.std(0) + 1e-6) * np.sqrt([3, 3, 3, 1, 1])
    w = frozen.logistic(judged.minus(vectors) / scale, shares, 0.1) / scale
    assert frozen.fit(shares, vectors, 0.1, unscaled=2).weight == pytest.approx(w)


def test_heads_add_up():
    """Each over its spread: a sum's scores are the sum of the scores in standard deviations."""
    rng = np.random.default_rng(0)
    vectors, weights = rng.normal(size=(40, 5)), rng.normal(size=(2, 5))
    a, b = (frozen.Head(w, i, float((vectors @ w).std())) for i, w in enumerate(weights))
    assert a(vectors).std() == pytest.approx(a.spread)
    total = a.plus(b, 0.5)(vectors)
    assert total == pytest.approx(a(vectors) / a.spread + 0.5 * b(vectors) / b.spread)
    assert a.plus(b, 0.0)(vectors).std() == pytest.approx(1)


def answers_of(scores, tokens):
    """Answers with these scores and lengths, [samples, prompts]; a response is its place."""
    scores, tokens = np.array(scores, float), np.array(tokens, float)
    responses = np.array([[f"{i}{j}" for j in range(scores.shape[1])] for i in range(len(scores))])
    same = {"ended": tokens > 0, "kl": 0 * tokens}
    return assistant.Answers(
        ["p", "q"], 1.0, responses=responses, tokens=tokens, scores={"j": scores}, **same
    )


def test_wins_are_over_all_pairs_of_samples():
    a = answers_of([[1, 5], [3, 5]], [[1, 1], [1, 1]])
    b = answers_of([[2, 5], [0, 6], [3, 7]], [[1, 1], [1, 1], [1, 1]])
    assert assistant.wins(a, b, "j") == pytest.approx([(0 + 1 + 0 + 1 + 1 + 0.5) / 6, (0.5 + 0.5) / 6])
    assert assistant.wins(b, a, "j") == pytest.approx(1 - assistant.wins(a, b, "j"))
    assert assistant.wins(a, a, "j").mean() == 0.5
    best = assistant.best_of(b, "j")
    assert best.responses.tolist() == [["20", "21"]] and best.scores["j"].tolist() == [[3, 7]]
    assert a[1:].scores["j"].tolist() == [[3, 5]]


def test_wins_at_equal_length():
    """A policy that wins by length alone wins half of the pairs at equal length; one that is better, more."""
    rng = np.random.default_rng(0)
    short, long = rng.integers(20, 60, (40, 2)), rng.integers(30, 70, (40, 2))
    noise = lambda: rng.normal(0, 5, (40, 2))
    before = answers_of(short + noise(), short)
    longer = answers_of(long + noise(), long)
    better = answers_of(long + noise() + 15, long)
    assert assistant.wins(longer, before, "j").mean() > 0.65
    assert assistant.even_wins(longer, before, "j") == pytest.approx(0.5, abs=0.05)
    assert assistant.even_wins(better, before, "j") > 0.8
    assert assistant.even_wins(before, before, "j") == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text, refusal",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry for any confusion, but I don\u2019t have the ability to do that.", True),
        ("As an AI, I am not able to give medical advice.", True),
        ("i cannot do that", True),
        ("I'm unable to access your files.", True),
        ("It's illegal to enter a house without permission.", True),
        ("I'm sorry to hear that. Here is what you can do:", False),
        ("I can help you with that. First, you cannot skip a step.", False),
        ("You won't need a key.", False),
        ("Sure! Here are three ways.", False),
        ("", False),
    ],
)
def test_what_a_refusal_is(text, refusal):
    assert refusals.refuses(text) is refusal


def test_questions_are_read_from_the_package(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        lines = [json.dumps({"question": text, "answer": ["x"]}) for text in ("Who?", " Why? ", "Who?")]
        wheel.writestr(refusals.QUESTIONS, "\n".join(lines))
    assert refusals.questions(tmp_path / "some.whl") == ["Who?", "Why?"]


def test_what_is_practised_on_is_not_in_the_test():
    """Nobody practises on borderline questions."""
    long = " ".join(["word"] * 20)
    openings = {f"k{i}": f"Number {i} {long if i % 3 == 0 else ''}".strip() for i in range(900)}
    pair = lambda i, prompt: judged.Pair(f"k{i}", prompt, "a", "b", ("a",))
    pairs = {
        "safe": ([pair(i, "p") for i in range(600)], [pair(i, "p") for i in range(600, 900)]),
        "help": (
            [pair(i, assistant.user(f"Do {i}")) for i in range(9)],
            [pair(i, assistant.user(f"Do {i}")) for i in range(9, 12)],
        ),
    }
    asked = [f"Why {i}?" for i in range(300)]
    practice, test = refusals.prompts_of(pairs, openings, asked, 1)
    assert {kind: len(of) for kind, of in practice.items()} == refusals.PRACTICE
    assert {kind: len({*of}) for kind, of in practice.items()} == {"safe": 160, "help": 9, "questions": 260}
    assert {kind: len({*of}) for kind, of in test.items()} == {
        "safe": 80,
        "help": 3,
        "questions": 40,
        "borderline": 24,
    }
    assert not any({*practice[kind]} & {*test[kind]} for kind in practice)
    assert not any(long in prompt for prompt in practice["safe"])  # short ones are practised on
    assert any(long in prompt for prompt in test["safe"])
    again, other = (refusals.prompts_of(pairs, openings, asked, seed)[1] for seed in (1, 2))
    assert again == test != other


@pytest.mark.parametrize(
    "text, whole",
    [
        ("One. Two.", "One. Two."),
        ("One. Two", "One."),
        ("Is it? Yes! Tha", "Is it? Yes!"),
        ("One.\n\nTwo thr", "One."),
        ('He said "no." Then', 'He said "no."'),
        ("1. Bread.\n2. But", "1. Bread."),
        ("1. Bread\n2. But", ""),
        ("at 3.5 percent of", ""),
        ("", ""),
    ],
)
def test_answers_that_were_cut_end_with_a_whole_sentence(text, whole):
    assert refusals.finished(text, ended=False) == whole
    assert refusals.finished(text, ended=True) == text


def test_the_best_answer_is_the_one_with_the_highest_reward():
    longer = lambda texts: np.array([len(text) for _, text in texts])
    candidates = [[("p", "a"), ("p", "bb")], [("q", "ccc"), ("q", "dd"), ("q", "e")]]
    assert refusals.best_answers(candidates, longer) == [("p", "bb"), ("q", "ccc")]
    assert refusals.best_answers(candidates, lambda texts: -longer(texts)) == [("p", "a"), ("q", "e")]


def test_what_was_written_is_kept_and_a_refusal_beside_it(tmp_path, monkeypatch):
    calls = []

    def answer(policy, file, samples, tokens, readers):
        calls.append(file.name)
        prompts = len(file.read_text().splitlines())
        texts = np.array(
            [[f"Answer {k} to {i} is this. And" for i in range(prompts)] for k in range(samples)]
        )
        ended = np.array([[k == 0] * prompts for k in range(samples)])
        if "help" in file.name:  # cut before a sentence has ended
            texts[:, 0], ended[:, 0] = "And then", False
        return SimpleNamespace(responses=texts, ended=ended)

    monkeypatch.setattr(assistant, "answer", answer)
    monkeypatch.setattr(refusals, "fingerprint", lambda folder: "of its weights")
    a, b, c, d = map(assistant.user, "abcd")
    practice = {"safe": [a, b], "help": [c, d]}
    found = refusals.written(tmp_path, tmp_path / "policy", practice, 40)
    assert found["safe"][1] == [
        (b, "Answer 0 to 1 is this. And"),
        (b, "Answer 1 to 1 is this."),
        (b, refusals.REFUSALS[1]),
    ]
    assert [texts[-1] for texts in found["help"]] == [(d, refusals.REFUSALS[2])]  # nothing to choose for c
    assert refusals.written(tmp_path, tmp_path / "policy", practice, 40) == found
    assert calls == ["practice-safe.jsonl", "practice-help.jsonl"]
    refusals.written(tmp_path, tmp_path / "policy", practice | {"help": [d]}, 40)
    assert len(calls) == 4  # other prompts


def test_judges_of_refusals_have_seen_neither_what_is_maximised_nor_the_test(tmp_path, monkeypatch):
    """What is maximised has seen refusals; its judge has not."""
    pair = lambda name, i: judged.Pair(f"{name}{i}", assistant.user(f"{name} {i}"), f"a{i}", f"b{i}", ("a",))
    of = lambda name: ([pair(name, i) for i in range(40)], [pair(name, i) for i in range(40, 50)])
    fitted, saved = [], []
    monkeypatch.setattr(frozen, "states_of", lambda base, texts, cache: lambda some: np.zeros((len(some), 2)))
    monkeypatch.setattr(refusals, "shares_of", lambda pairs: pairs)
    monkeypatch.setattr(
        frozen, "fit", lambda pairs, vectors, strength: fitted.append(pairs) or len(fitted) - 1
    )
    monkeypatch.setattr(
        frozen, "save", lambda folder, base, head, strength: saved.append((folder.name, head))
    )
    heads = refusals.reward_models(tmp_path, tmp_path, {name: of(name) for name in ("help", "safe")})
    keys = lambda pairs: {pair.key for pair in pairs}
    for (folder, kept), (name, head) in zip(saved, heads.items(), strict=True):
        assert folder == f"judge-{name}"
        unseen = keys(of(name)[1])
        assert keys(fitted[kept]) | keys(fitted[head]) | unseen == {f"{name}{i}" for i in range(50)}
        assert not keys(fitted[kept]) & keys(fitted[head])
        assert not unseen & (keys(fitted[kept]) | keys(fitted[head]))
        refused = lambda pairs: sum(pair.second in refusals.REFUSALS for pair in pairs)
        assert refused(fitted[kept]) == 0 and (refused(fitted[head]) > 0) is (name == "help")


def test_margins_of_pairs():
    assert judged.minus([5, 2, 1, 4]).tolist() == [3, -3]
    pairs = [
        judged.Pair(f"k{i}", "p", *texts, votes)
        for i in range(20)
        for texts, votes in ((("good film", "bad film"), ("a",)), (("bad day", "good day"), ("b", "b")))
    ]
    pytest.importorskip("sklearn")
    margins = judged.tfidf_margins(pairs[:30], pairs[30:])
    assert [margin > 0 for margin in margins] == [True, False] * 5


def test_a_recipe_says_which_files_it_needs(monkeypatch):
    for name, options, message in (
        (
            "safety",
            [],
            "--data: safety needs harmless-base/test.jsonl.gz of Anthropic's HH-RLHF: see docs/tasks.md",
        ),
        (
            "translation",
            ["--data", "one"],
            "--data: translation needs WMT 2023.* table .*; that of the TED talks",
        ),
        ("arithmetic", ["--data", "one"], "--data: arithmetic needs no file here"),
    ):
        monkeypatch.setattr("sys.argv", ["tasks.py", name, *options])
        with pytest.raises(UserError, match=message):
            tasks.main()


def test_pass_at_k_is_the_mean_over_all_subsets():
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]  # [4 samples][3 prompts]
    asked = common.Asked(["a", "b", "c"], [{}] * 3, [["r"] * 3] * 4, scores, 0.0)
    assert asked.pass_at(1)["mean"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert asked.pass_at(2)["mean"] == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)  # of 6 pairs one is wrong twice
    assert asked.pass_at(4)["mean"] == pytest.approx(2 / 3)
    spread = math.sqrt(sum((x - 0.5) ** 2 for x in (0.5, 0, 1)) / 2 / 3)
    assert asked.pass_at(1)["se"] == pytest.approx(spread)


def test_means_over_seeds_have_their_errors():
    results = {"seeds": {"1": {"x": 0.90}, "2": {"x": 0.94}, "3": {"x": 0.98}}}
    assert common.over_seeds(results, lambda found: found["x"]) == "94.0 ± 2.3"  # .04 / sqrt(3)
    assert common.over_seeds({"seeds": {"1": {"x": 0.9}}}, lambda found: found["x"], 0) == "90"


def test_what_a_model_wrote_does_not_break_a_table():
    assert common.shown("a|b\n`c`\x1b[31m") == "`a\\|b ⏎ 'c'\\x1b[31m`" and common.shown("\n") == "(nothing)"


PAGES = {name: (common.ROOT / name).read_text().splitlines() for name in ("docs/tasks.md", "README.md")}


def printed(name: str) -> list[str]:
    """The lines of the tables that --tables prints of the committed results."""
    recipe = importlib.import_module(f"benchmarks.recipes.{name}")
    tables = recipe.tables(json.loads(tasks.results_of(name).read_text()))
    return [line for table in tables for line in table.splitlines()]


@pytest.mark.parametrize("name", tasks.RECIPES)
def test_the_page_has_the_tables_of_the_committed_results(name):
    assert [line for line in printed(name) if line not in PAGES["docs/tasks.md"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_overviews_say_what_the_tables_say(page):
    """In the tables of all tasks, every number with an error is in a recipe's table; the demo is no recipe."""
    start = next(i for i, line in enumerate(PAGES[page]) if line.startswith("| task | model |"))
    overview = itertools.takewhile(lambda line: line.startswith("|"), PAGES[page][start:])
    numbers = lambda lines: set(re.findall(r"[\d.]+ ± [\d.]+", "\n".join(lines)))
    known = numbers(line for name in tasks.RECIPES for line in printed(name))
    shown = numbers(line for line in overview if "the demo |" not in line)
    assert len(shown) > 10 and shown - known == set()


def test_tables_need_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "results_of", lambda name: tmp_path / "none.json")
    monkeypatch.setattr("sys.argv", ["tasks.py", "safety", "--tables"])
    with pytest.raises(UserError, match="none.json: no results yet"):
        tasks.main()


def test_seeds_of_two_processes_are_all_kept(tmp_path, monkeypatch):
    """Another process may finish a seed while one is at work."""
    target = tmp_path / "found.json"

    def run(home, seed, smoke):
        target.write_text(json.dumps({"seeds": {"1": {"x": 1}}}))
        return {"x": seed}

    recipe = SimpleNamespace(run=run, tables=lambda results: [])
    monkeypatch.setattr(tasks, "results_of", lambda name: target)
    monkeypatch.setattr("sys.argv", ["tasks.py", "arithmetic", "--seeds", "2", "--home", str(tmp_path)])
    monkeypatch.setattr(tasks.importlib, "import_module", lambda name: recipe)
    tasks.main()
    seeds = json.loads(target.read_text())["seeds"]
    assert 0.05 < seeds["2"].pop("peak, GB") < 100
    assert seeds == {"1": {"x": 1}, "2": {"x": 2}}
