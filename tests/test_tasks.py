"""The recipes of benchmarks/tasks.py: their data, what they measure, and that each runs."""

import importlib
import json
import math
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import tasks
from benchmarks.recipes import arithmetic, code, common, judged, safety
from minirlhf import UserError, rewards
from minirlhf.measure.program import Limits, judge
from minirlhf.support.rows import OwnRow


@pytest.fixture
def in_process(run, monkeypatch):
    """Stages of recipes run in this process, as they would in one of their own."""

    def call(script, *options):
        assert run(script.removesuffix(".py"), *options) == 0, options

    monkeypatch.setattr(common, "command", call)
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.RECIPES)
def test_every_recipe_runs(name, in_process, tmp_path):
    recipe = importlib.import_module(f"benchmarks.recipes.{name}")
    before = tasks.results_of(name).read_bytes() if tasks.results_of(name).exists() else None
    in_process.setattr("sys.argv", ["tasks.py", name, "--smoke", "--home", str(tmp_path)])
    tasks.main()
    stages = list((tmp_path / f"{name}-smoke").glob("*/config.json"))
    assert len(stages) == 2 and all(json.loads(file.read_text())["complete"] for file in stages)
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


def test_functions_are_disjoint_and_their_programs_pass():
    rows = code.functions(1)
    assert len({row["prompt"] for row in rows}) == len(rows) == code.TEST + code.PRACTISED
    some = rows[:60]
    programs = [(row["prefix"] + row["completion"], "\n".join(row["tests"])) for row in some]
    assert {found.verdict for found in judge(programs, Limits())} == {"passed"}
    assert code.functions(1) == rows


def test_practice_has_no_worked_answers_and_no_test_problems(in_process, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    in_process.setattr(common, "command", stop)
    for recipe in (arithmetic, code):
        home = tmp_path / recipe.__name__
        with pytest.raises(KeyboardInterrupt):
            recipe.run(home, 1, smoke=False)
        files = {n: (home / f"{n}.jsonl").read_text().splitlines() for n in ("sft", "prompts", "test")}
        rows = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
        assert not any("completion" in row for row in rows["prompts"]) and len(rows["sft"]) == recipe.TAUGHT
        seen = {row["prompt"] for name in ("sft", "prompts") for row in rows[name]}
        assert len(rows["test"]) == recipe.TEST and not seen & {row["prompt"] for row in rows["test"]}


FORMS = (safety,)  # the recipes that read files of other people


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


def test_beginnings_of_texts():
    assert judged.begin("one two three", 2) == "one two ..." and judged.begin("one  two", 2) == "one  two"


# ---------------------------------------------------------------- measures


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
    for name, words, message in (
        (
            "safety",
            [],
            "--data: safety needs harmless-base/test.jsonl.gz of Anthropic's HH-RLHF: see docs/tasks.md",
        ),
        ("arithmetic", ["--data", "one"], "--data: arithmetic needs no file here"),
    ):
        monkeypatch.setattr("sys.argv", ["tasks.py", name, *words])
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


def test_tables_need_results():
    missing = [name for name in tasks.RECIPES if not tasks.results_of(name).exists()]
    for name in missing[:1]:
        done = subprocess.run(
            [common.sys.executable, "benchmarks/tasks.py", name, "--tables"],
            cwd=common.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no results yet" in done.stderr
