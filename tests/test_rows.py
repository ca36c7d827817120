"""The data's own rows, on their way from a file to a reward function."""

import json
import sys

import pytest

from minirlhf import UserError, data, rewards
from minirlhf.rewards import Scorer, fields_read
from minirlhf.support import functions
from minirlhf.support.rows import OwnRow
from minirlhf.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([b]): b for b in range(256)})
SUMS = [{"prompt": f"{i}+{i + 1}=", "answer": 2 * i + 1, "id": f"n{i}"} for i in range(20)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of(*specs):
    return rewards.load_rewards(list(specs))


def reward(function, *fields):
    """Rewards as load_rewards returns them, of one function; `fields` is its attribute, if given."""
    for said in fields:
        function.fields = said
    return [("mine:f", function, 1.0)]


def answers(prompts, responses, rows):
    return [float(row["answer"]) for row in rows]


# ---------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    "function, takes",
    [
        (lambda prompts, responses: [], False),
        (lambda prompts, responses, rows: [], True),
        (lambda prompts, responses, rows=(): [], True),
        (lambda prompts, responses, data: [], True),  # whatever its name: it requires a third
        (lambda prompts, responses, scale=2.0: [], False),
        (lambda *texts: [], False),
        (lambda prompts, responses, *, rows=None: [], False),
        (lambda prompts, responses, **more: [], False),
        (max, False),  # built in, without a signature
    ],
)
def test_functions_are_told_apart_by_their_signature(function, takes):
    assert functions.takes_rows(function) is takes
    if function is not max:
        call = functions.call(lambda *a: [], [], [], "mine:f")
        assert call == []


def test_a_function_of_four_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "four_rules.py").write_text("def f(a, b, c, d): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"missing a required argument: 'd': want a function of .*rows\)$"):
        rewards.load_rewards(["four_rules:f"])


def test_a_method_and_a_callable_object_take_rows():
    class Rule:
        def __call__(self, prompts, responses, rows):
            return [row["answer"] for row in rows]

    records = [data.Response("p", "", row=OwnRow({"answer": 3}))]
    assert functions.takes_rows(Rule()) and functions.takes_rows(Rule().__call__)
    assert functions.call(Rule(), ["p"], ["r"], "mine:f", records) == [3.0]


# ---------------------------------------------------------------- from a file


def test_a_row_is_the_files_own(tmp_path):
    rows = [*SUMS, {"prompt": "x", "answer": None, "tests": ["a"], "deep": {"a": [1]}, "7": True}]
    found = data.load(lines(tmp_path / "d.jsonl", rows), reads=fields_read(reward(lambda a, b, rows: [])))
    assert [dict(r.row) for r in found.records[:20]] == SUMS
    assert found.records[3].row.where == found.records[3].where == f"{tmp_path}/d.jsonl:4"
    last = found.records[-1].row
    assert last == {"prompt": "x", "tests": ["a"], "deep": {"a": [1]}, "7": True}  # null counts as absent
    assert all(r.row is None for r in data.load(tmp_path / "d.jsonl").records)  # nobody reads them


def test_names_of_columns_hold_for_rows_too(tmp_path):
    file = lines(tmp_path / "d.jsonl", [{"question": "a", "gold": {"text": "b"}, "answer": "no"}])
    names = ("prompt=question", "answer=gold.text")
    [record] = data.load(file, fields=names, reads=fields_read(of("minirlhf.rewards:exact"))).records
    assert record.row == {"question": "a", "gold": {"text": "b"}, "answer": "b", "prompt": "a"}
    assert record.prompt == "a"


@pytest.mark.parametrize("kind", ["txt", "json", "parquet", "pairs", "completions"])
def test_every_kind_of_file_has_rows(tmp_path, kind):
    row = {"prompt": "p", "completion": "c", "answer": "x", "when": 3}
    if kind == "txt":
        (tmp_path / "d.txt").write_text("a line\n")
        wanted, file = {"text": "a line"}, tmp_path / "d.txt"
    elif kind == "json":
        (tmp_path / "d.json").write_text(json.dumps([row]))
        wanted, file = row, tmp_path / "d.json"
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        wanted, file = row, tmp_path / "d.parquet"
        parquet.write_table(pyarrow.table({name: [value] for name, value in row.items()}), file)
    elif kind == "pairs":
        wanted = {"prompt": "p", "chosen": "a", "rejected": "b", "answer": "x"}
        file = lines(tmp_path / "d.jsonl", [wanted])
    else:
        wanted = {"instruction": "p", "completions": [{"response": "a", "overall_score": 3.0}] * 2}
        file = lines(tmp_path / "d.jsonl", [wanted])
    found = data.load(file, reads=fields_read(reward(lambda a, b, rows: [])))
    assert {json.dumps(r.row) for r in found.records} == {json.dumps(wanted)}


def test_of_a_parquet_file_only_what_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "d.parquet"
    table = {"prompt": ["p"], "answer": ["4"], "tests": ["t"], "image": [b"\xff\xfe"]}
    parquet.write_table(pyarrow.table(table), file)
    [record] = data.load(file, reads=fields_read(of("minirlhf.rewards:numeric"))).records
    assert record.row == {"prompt": "p", "answer": "4"}
    [record] = data.load(file, reads=fields_read(reward(lambda a, b, rows: []))).records
    assert record.row == {"prompt": "p", "answer": "4", "tests": "t", "image": b"\xff\xfe"}


@pytest.mark.parametrize("name", ["toy"])
def test_built_in_data_have_rows(name):
    found = data.load(name, reads=fields_read(reward(lambda a, b, rows: [])))
    first = found.records[0]
    assert first.row["response"] == first.response and first.row["ratings"] == first.ratings
    assert first.row["prompt"] == "" and "label" not in first.row and found.sha256 == data.load(name).sha256


# ---------------------------------------------------------------- what is not used


def test_the_log_does_not_complain_of_columns_that_a_reward_reads(tmp_path):
    file = lines(tmp_path / "d.jsonl", [row | {"question": "?"} for row in SUMS])
    remark = lambda *specs: data.load(file, reads=fields_read(of(*specs))).remarks
    assert remark() == ["column `answer` is not used (20 rows)", "column `question` is not used (20 rows)"]
    assert remark("minirlhf.rewards:numeric") == ["column `question` is not used (20 rows)"]
    assert remark("minirlhf.rewards:length", "rm") == remark()
    anything = reward(lambda a, b, rows: [])
    assert data.load(file, reads=fields_read(anything)).remarks == []


# ---------------------------------------------------------------- what is missing


def test_a_row_without_the_field_is_one_line_with_its_place(tmp_path):
    file = lines(tmp_path / "d.jsonl", [*SUMS, {"prompt": "x"}])
    numeric = fields_read(of("minirlhf.rewards:numeric"))
    with pytest.raises(UserError) as error:
        data.load(file, reads=numeric)
    place = f"{file}:21: answer: missing, which --reward minirlhf.rewards:numeric reads"
    assert str(error.value) == place
    found = data.load(file, skip_bad=True, reads=numeric)
    assert len(found.records) == 20 and found.skipped == [place]
    with pytest.raises(UserError, match=r"^toy:1: answer: missing, which --reward minirlhf.rewards:exact"):
        data.load("toy", reads=fields_read(of("minirlhf.rewards:exact")))


@pytest.mark.parametrize(
    "reward_name, row, reason",
    [
        ("numeric", {"answer": "nine"}, "answer: 'nine' is no number, or more than one"),
        ("numeric", {"answer": "9 or 10"}, "answer: '9 or 10' is no number, or more than one"),
        ("numeric", {"answer": True}, "answer: expected a number, or a text with one number, got True"),
        ("numeric", {"answer": [9]}, "answer: expected a number, or a text with one number, got [9]"),
        ("exact", {"answer": " . "}, "answer: is empty: no response could be told from silence"),
        ("exact", {"answer": []}, "answer: expected a text, or a list of texts, got []"),
        ("exact", {"answer": {"a": 1}}, "answer: expected a text, or a list of texts, got {'a': 1}"),
        ("choice", {"choices": "AB", "answer": "A"}, "choices: expected a list of two texts or more"),
        ("choice", {"choices": ["one"], "answer": "A"}, "choices: expected a list of two texts or more"),
        ("choice", {"choices": ["a", "b"]}, "answer: missing, which --reward minirlhf.rewards:choice reads"),
        ("chrf", {"text": "a"}, "reference or answer: missing, which --reward minirlhf.rewards:chrf reads"),
        ("tests", {"tests": "assert f(1"}, "tests: not Python: "),
        ("tests", {"tests": []}, "tests: expected Python statements, or a list of them, got []"),
        ("tests", {"tests": "assert sorted([2, 1]) == [1, 2]"}, "tests: call no function of the program"),
        ("tests", {"tests": "f = len\nassert f([]) == 0"}, "tests: call no function of the program"),
    ],
)
def test_a_row_that_judges_nothing_is_refused_before_the_run(tmp_path, reward_name, row, reason):
    file = lines(tmp_path / "d.jsonl", [{"prompt": "x"} | row])
    with pytest.raises(UserError) as error:
        data.load(file, reads=fields_read(of(f"minirlhf.rewards:{reward_name}")))
    assert str(error.value).startswith(f"{file}:1: {reason}") and str(error.value).isprintable()


def test_what_a_function_says_of_itself_may_be_anything(tmp_path):
    file = lines(tmp_path / "d.jsonl", SUMS)
    for said in ("answer", ("answer", ("no", "id")), {"answer": None}, []):
        assert len(data.load(file, reads=fields_read(reward(answers, said))).records) == 20
    with pytest.raises(UserError, match="--reward mine:f: its attribute `fields` must hold names of fields"):
        fields_read(reward(answers, 3))
    with pytest.raises(
        UserError, match=r"d.jsonl:1: answer: object of type 'int' has no len\(\), for --reward mine:f"
    ):
        data.load(file, reads=fields_read(reward(answers, {"answer": len})))
    del answers.fields


def test_a_function_that_does_not_say_what_it_reads_is_told_at_the_call(tmp_path):
    file = lines(tmp_path / "d.jsonl", [*SUMS[:2], {"prompt": "x"}])
    found = data.load(file, reads=fields_read(reward(answers)))
    with pytest.raises(UserError) as error:
        functions.call(answers, ["p"] * 3, ["r"] * 3, "mine:f", found.records)
    assert str(error.value) == f"{file}:3: answer: missing, which --reward mine:f reads"
    assert functions.call(answers, ["p"] * 2, ["r"] * 2, "mine:f", found.records[:2]) == [1.0, 3.0]


def test_a_bad_choice_is_told_with_its_place(tmp_path):
    file = lines(tmp_path / "d.jsonl", [{"prompt": "x", "choices": ["a", "b"], "answer": "c"}])
    specs = of("minirlhf.rewards:choice")
    found = data.load(file, reads=fields_read(specs))
    with pytest.raises(
        UserError, match=r"^--reward minirlhf.rewards:choice: .*d.jsonl:1: answer: 'c' is none of"
    ):
        functions.call(specs[0][1], ["p"], ["a"], specs[0][0], found.records)


def test_texts_without_rows_are_refused():
    for records in (None, [data.Response("p", "")]):
        with pytest.raises(UserError, match="--reward mine:f: reads rows, and none came with the texts"):
            functions.call(answers, ["p"], ["r"], "mine:f", records)


# ---------------------------------------------------------------- the scorer, and copies


def test_functions_get_copies_of_rows(tmp_path):
    def greedy(prompts, responses, rows):
        for row in rows:
            row["list"].append("more")
            row.clear()
        rows.clear()
        return [1.0, 1.0]

    file = lines(tmp_path / "d.jsonl", [{"prompt": "p", "list": ["a", {"b": []}]}] * 2)
    records = data.load(file, reads=fields_read(reward(greedy))).records
    for _ in range(2):
        functions.call(greedy, ["p"] * 2, ["r"] * 2, "mine:f", records)
    assert [r.row for r in records] == [{"prompt": "p", "list": ["a", {"b": []}]}] * 2


def test_prompts_that_drop_out_take_their_rows_along(tmp_path):
    rows = [{"prompt": "long " * 20, "answer": 1}, *SUMS, {"text": "ab", "answer": 5}]
    file = lines(tmp_path / "d.jsonl", rows[:-1])
    records = data.load(file, reads=fields_read(reward(answers))).records
    prompts, used = data.prompts_and_records(BYTES, records, 4, 20)
    assert (
        [BYTES.decode(ids) for ids in prompts]
        == [r.row["prompt"] for r in used]
        == [row["prompt"] for row in SUMS]
    )
    assert data.encode_prompts(BYTES, records, 4, 20) == prompts


@pytest.mark.parametrize("options", [(), ("--algorithm", "grpo", "--group", "4"), ("--microbatch", "2")])
def test_rows_line_up_with_prompts_in_training(smoke, run, tmp_path, monkeypatch, options):
    """Each text of each rollout, in groups or not, comes with the row of its own prompt; a resumed run is the same."""
    file = lines(tmp_path / "d.jsonl", SUMS)
    code = (
        "import json, os\n"
        "def f(prompts, responses, rows):\n"
        "    assert [row['prompt'] for row in rows] == prompts and len({*prompts}) > 2\n"
        "    with open(os.environ['SEEN'], 'a') as file:\n"
        "        file.write(json.dumps([row['id'] for row in rows]) + '\\n')\n"
        "    return [row['answer'] / 10 for row in rows]\n"
    )
    (tmp_path / "row_rules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "row_rules", raising=False)
    common = [
        "--preset",
        "smoke",
        "--data",
        file,
        "--init",
        smoke / "sft",
        "--reward",
        "row_rules:f",
        *options,
    ]
    common += ["--iterations", 3, "--save-every", 1]
    seen = {}
    for name, stop in (("whole", None), ("resumed", 2)):
        monkeypatch.setenv("SEEN", str(tmp_path / name))
        out = ["--out", tmp_path / "runs" / name / "ppo"]
        if stop:
            assert run("train_ppo", *common, *out, stop_at=stop) == 130
        assert run("train_ppo", *common, *out, "--resume") == 0
        seen[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert seen["whole"] == seen["resumed"] and len(seen["whole"]) == 3
    if "--group" in options:
        assert all(len({*ids[i : i + 4]}) == 1 for ids in seen["whole"] for i in range(0, 16, 4))
        assert all(len({*ids}) == 4 for ids in seen["whole"])


def test_evaluation_and_best_of_n_give_the_row_too(smoke, run, tmp_path):
    """The policy's reward is read from its checkpoint, and scores of all writers are those of the row's answer."""
    rows = [{"prompt": f"The plot {i}", "answer": "great"} for i in range(120)]
    file = lines(tmp_path / "d.jsonl", rows)
    out = tmp_path / "ppo"
    common = ["--preset", "smoke", "--data", file, "--init", smoke / "sft", "--iterations", 1]
    assert run("train_ppo", *common, "--reward", "minirlhf.rewards:exact", "--out", out) == 0
    target = tmp_path / "results.json"
    words = ["--policy", out, "--sft", smoke / "sft", "--run", tmp_path, "--results", target]
    assert run("minirlhf.evaluate", *words, "--best-of", 2, "--prompts", 8) == 0
    found = json.loads(target.read_text())
    assert found["ppo"]["score"] in [i / 8 for i in range(9)] and "2" in found["best_of_n"]


def test_a_run_is_refused_before_it_begins(smoke, run, tmp_path, capsys):
    file = lines(tmp_path / "d.jsonl", [*SUMS, {"prompt": "x"}])
    words = ["--preset", "smoke", "--data", file, "--init", smoke / "sft", "--out", tmp_path / "ppo"]
    assert run("train_ppo", *words, "--reward", "minirlhf.rewards:numeric") == 2
    error = f"error: {file}:21: answer: missing, which --reward minirlhf.rewards:numeric reads"
    assert capsys.readouterr().err.splitlines()[-1] == error and not (tmp_path / "ppo").exists()


def test_the_scorer_hands_records_on():
    from minirlhf.rollout import Texts

    prompts, responses = [[BYTES.bos, 65]] * 2, [[66], [67]]
    texts = Texts(*data.collate(prompts, BYTES.pad, side="left"), *data.collate(responses, BYTES.pad))
    records = [data.Response("A", "", row=OwnRow({"answer": a})) for a in (3, 4)]
    scores, parts = Scorer(reward(answers), BYTES)(texts, records)
    assert scores.tolist() == [3.0, 4.0] and parts == {}
    with pytest.raises(ValueError, match="1 rows for 2 texts"):
        Scorer(reward(answers), BYTES)(texts, records[:1])
