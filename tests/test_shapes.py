"""Other people's files and rows: .json and .parquet, shapes, names of columns, docs/data.md, and a fuzz of them all.

FUZZ=10000 python -m pytest tests/test_shapes.py -k fuzz        tries ten thousand rows of each kind.
"""

import contextlib
import datetime
import decimal
import gzip
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirlhf import UserError, data
from minirlhf.data import Preference, Response, encode_examples, encode_judged, encode_prompts, load
from minirlhf.feedback.add import add
from minirlhf.feedback.store import Store
from minirlhf.support import cli, shapes, sources, tables
from minirlhf.support.run_config import RunConfig
from minirlhf.tools import inspect as inspect_tool

ROOT = Path(__file__).resolve().parents[1]
FUZZ = int(os.environ.get("FUZZ", 150))


class ByteTokenizer:
    pad, eot, bos, vocab_size = 0, 1, 2, 259

    def encode(self, text):
        return [b + 3 for b in text.encode(errors="replace")]

    def decode(self, ids):
        return bytes(i - 3 for i in ids if i > 2).decode(errors="replace")


TOK = ByteTokenizer()
user = lambda text: {"role": "user", "content": text}
bot = lambda text: {"role": "assistant", "content": text}
human = lambda text: {"from": "human", "value": text}
gpt = lambda text: {"from": "gpt", "value": text}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(source, **options) -> str:
    """The one line that loading it ends in."""
    with pytest.raises(UserError) as error:
        load(source, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


# ---------------------------------------------------------------- shapes

HI = "\n\nHuman: Hi\n\nAssistant:"
RATED = {"response": "r", "overall_score": 8.5, "fine-grained_score": 4.5}
SHAPES = [
    ({"conversations": [human("Hi"), gpt("Yes")]}, "completion", [Response(HI, " Yes")]),
    ({"conversations": [{"from": "system", "value": "Be"}, human("Hi"), gpt("Yes")]}, "completion",
     [Response("\n\nSystem: Be" + HI, " Yes")]),
    ({"conversation": [user("Hi"), bot("Yes")], "system": "Be"}, "completion",
     [Response("\n\nSystem: Be" + HI, " Yes")]),
    ({"messages": [human("Hi"), {"from": "chatgpt", "value": "Yes"}]}, "completion", [Response(HI, " Yes")]),
    ({"messages": [{"role": "system", "content": "Own"}, user("Hi"), bot("a")], "system": "Be"}, "completion",
     [Response("\n\nSystem: Own" + HI, " a")]),
    ({"conversations": [human("Hi")], "chosen": gpt("a"), "rejected": gpt("b")}, "preference",
     [Preference(HI, " a", " b")]),
    ({"conversations": [human("Hi"), gpt("a")], "label": False}, "labelled", [Response(HI, " a", label=False)]),
    ({"messages": [user("Hi"), bot("a")], "rating": 3, "scale": [1, 5]}, "rated",
     [Response(HI, " a", 3.0, (3,), (1, 5))]),
    ({"messages": [bot("a")], "rating": 3, "scale": [1, 5]}, "rated", [Response("", " a", 3.0, (3,), (1, 5))]),
    ({"instruction": "Hi", "output": "Yes"}, "completion", [Response(HI, " Yes")]),
    ({"instruction": "Hi", "input": "", "output": "Yes", "text": "Below ..."}, "completion", [Response(HI, " Yes")]),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, "completion",
     [Response("\n\nHuman: Add\n1 2\n\nAssistant:", " 3")]),
    ({"instruction": "", "input": "Hi", "output": "Yes"}, "completion", [Response(HI, " Yes")]),
    ({"instruction": "Hi", "chosen": "a", "rejected": "b"}, "preference", [Preference(HI, " a", " b")]),
    ({"instruction": "Hi", "response": "a", "rating": 3, "scale": [1, 5]}, "rated",
     [Response(HI, " a", 3.0, (3,), (1, 5))]),
    ({"instruction": "Hi", "system": "Be"}, "prompt", [Response("\n\nSystem: Be" + HI, "")]),
    ({"instruction": "Hi", "completions": [RATED, RATED | {"response": "s", "overall_score": 2}]}, "rated",
     [Response(HI, " r", 8.5, (8.5,), (1, 10)), Response(HI, " s", 2.0, (2,), (1, 10))]),
    ({"prompt": "Hi", "chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")], "messages": [user("Hi")],
      "score_chosen": 8.5, "score_rejected": 3.0}, "preference", [Preference(HI, " a", " b")]),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5.0}, "preference",
     [Preference("p", "a", "b", 0.5)]),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "5", "score_rejected": "5"}, "preference",
     [Preference("p", "a", "b")]),
]  # fmt: skip


@pytest.mark.parametrize("row, kind, records", SHAPES)
def test_other_peoples_rows_become_ours(tmp_path, row, kind, records):
    as_lines, as_array = write(tmp_path / "x.jsonl", row, row), tmp_path / "x.json"
    as_array.write_text(json.dumps([row, row]))
    for path in (as_lines, as_array):
        found = load(path)
        assert (found.kind, found.records) == (kind, records * 2)
        assert found.ledger == {"rows": 2 * len(records)}
        assert [r.where for r in found.records] == [f"{path}:{n}" for n in (1, 2) for _ in records]


@pytest.mark.parametrize("row, kind, records", SHAPES)
def test_parquet_holds_the_same_rows(tmp_path, row, kind, records):
    """With columns beside them that nothing needs, whatever they hold, and other rows' columns as nulls."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    beside = {
        "image": [{"bytes": b"\0\xff", "path": None}] * 2,
        "when": [datetime.datetime(2026, 1, 1)] * 2,
        "price": [decimal.Decimal("1.50")] * 2,
        "embedding": [[0.5, math.nan]] * 2,
        "nothing": [None] * 2,
    }
    columns = pa.Table.from_pylist([row, row]).to_pydict() | beside
    absent = {"chosen", "rejected", "votes", "rating", "label", "text", "messages"} - row.keys()
    table = pa.table(columns)
    for name in sorted(absent):
        table = table.append_column(name, pa.nulls(2, pa.float64() if name == "rating" else pa.string()))
    parquet.write_table(table, tmp_path / "x.parquet")
    found = load(tmp_path / "x.parquet")
    assert (found.kind, found.records) == (kind, records * 2)


def test_a_record_knows_its_columns(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "output": "3", "text": "t", "id": 1}
    found = load(write(tmp_path / "x.jsonl", row, row))
    assert found.records[0].columns == ("output as completion", "instruction + input as prompt")
    assert found.records[0].columns is found.records[1].columns  # one tuple, however many rows
    assert found.remarks == ["column `text` is not used (2 rows)"]
    [r, s] = load(write(tmp_path / "y.jsonl", {"instruction": "Hi", "completions": [RATED, RATED]})).records
    assert s.columns == ("instruction as prompt", "completions[1].overall_score as rating",
                         "completions[1].response as response")  # fmt: skip


def test_a_chosen_text_with_the_lower_score_is_named(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 5}
    found = load(write(tmp_path / "x.jsonl", pair))
    assert found.records == [Preference("p", "a", "b")]
    assert found.remarks == [
        "the chosen text has the lower score, and counts as chosen all the same (1 rows)"
    ]


REFUSED = [
    ({"conversations": [human("Hi"), {"from": "alien", "value": "x"}]}, "conversations as messages: expected messages"),
    ({"conversations": [human("Hi")]}, "conversations as messages: the last turn must be the assistant's"),
    ({"conversations": [human("Hi"), gpt(3)]}, "conversations as messages: expected messages"),
    ({"conversations": "Hi"}, "conversations as messages: expected a list, got 'Hi'"),
    ({"conversations": [human("Hi")], "rating": 3}, "messages: the last turn, which was judged, must be the"),
    ({"instruction": 3, "output": "x"}, "instruction: expected text, got 3"),
    ({"instruction": "a", "input": ["b"], "output": "x"}, "input: expected text, got ['b']"),
    ({"instruction": "a", "output": 4}, "output as completion: expected text, got 4"),
    ({"instruction": "a", "completions": ["b"]}, "completions[0]: expected {response, overall_score}, got 'b'"),
    ({"instruction": "a", "completions": [{"response": "b"}]}, "overall_score: missing, which --fields reads as rating"),
    ({"instruction": "a", "completions": [RATED | {"overall_score": 11}]},
     "completions[0].overall_score as rating: 11 is outside the scale (1, 10)"),
    ({"instruction": "a", "completions": [RATED | {"response": 7}]}, "completions[0].response as response: expected"),
]  # fmt: skip


@pytest.mark.parametrize("row, message", REFUSED)
def test_errors_name_the_columns_of_the_file(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", "", row)
    assert refusal(path).startswith(f"{path}:2: {message}"), refusal(path)


def test_each_completion_is_accounted_for(tmp_path):
    entries = [
        RATED,
        RATED | {"overall_score": None},
        {"response": 3, "overall_score": 2},
        RATED | {"response": " "},
    ]
    path = write(tmp_path / "x.jsonl", {"instruction": "", "completions": entries},
                 {"instruction": "b", "completions": []})  # fmt: skip
    found = load(path, skip_bad=True)
    assert found.ledger == {
        "rows": 5,
        "dropped: not rated": 1,
        "dropped: no response": 1,
        "skipped: malformed": 1,
    }
    assert "each entry of `completions` is a row of its own (2 rows)" in found.remarks


# ---------------------------------------------------------------- names of columns


def test_columns_under_other_names(tmp_path):
    row = {"q": "p", "good": "a", "bad": "b", "text": "t", "rating": 3}
    found = load(write(tmp_path / "x.jsonl", row), fields=["prompt=q", "chosen=good", "rejected=bad"])
    assert (found.kind, found.records) == ("preference", [Preference("p", "a", "b")])
    row = {"prompt": "p", "response": "r", "helpfulness": 4, "verbosity": 0, "chosen": "x"}
    path = write(tmp_path / "y.jsonl", row)
    found = load(path, fields=["rating=helpfulness"], scale=(0, 4))
    assert found.records == [Response("p", "r", 4.0, (4,), (0, 4))]
    assert found.records[0].columns == ("prompt", "helpfulness as rating", "response")
    assert found.remarks == ["column `chosen` is not used (1 rows)"]
    both = load(
        path, fields=["response=chosen", "chosen=response", "rejected=prompt", "prompt=verbosity"][:1]
    )
    assert both.records == [Response("p", "x")]


def test_names_may_be_swapped_and_nested(tmp_path):
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "meta": {"score": {"Rating": "4"}},
        "a.b": 2,
        "response": "r",
    }
    path = write(tmp_path / "x.jsonl", row)
    swapped = load(path, fields=["chosen=rejected", "rejected=chosen"])
    assert swapped.records == [Preference("p", "b", "a")]
    assert swapped.records[0].columns == ("rejected as chosen", "prompt", "chosen as rejected")
    assert load(path, fields=["rating=meta.score.Rating"]).records[0].rating == 4
    assert load(path, fields=["rating=a.b"]).records[0].rating == 2


def test_strings_become_a_conversation_by_name(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "Hi", "response": "Yes", "help": 3})
    found = load(path, fields=["instruction=prompt", "rating=help"])
    assert found.records == [Response(HI, " Yes", 3.0, (3,), (1, 5))]


@pytest.mark.parametrize("value", [None, "N/A", "", "nan", "NaN"])
def test_what_nobody_rated_is_dropped_and_counted(tmp_path, value):
    rows = [{"text": "a", "score": value}, {"text": "b", "score": "3.5"}]
    path = write(tmp_path / "x.jsonl", *rows, '{"text": "c", "score": NaN}')
    found = load(path, fields=["rating=score"])
    assert [r.rating for r in found.records] == [3.5]
    assert found.ledger == {"rows": 3, "dropped: not rated": 2}
    assert refusal(write(path, rows[0]), fields=["rating=score"]).endswith(
        "no usable row: 1 row: 1 dropped (not rated)"
    )
    assert ":1: score as rating: expected finite numbers, got 'good'" in refusal(
        write(path, {"text": "a", "score": "good"}), fields=["rating=score"]
    )


def test_a_null_rating_among_others_says_how_to_drop_such_rows(tmp_path):
    path = write(tmp_path / "x.jsonl", {"text": "a", "rating": 3}, {"text": "b", "rating": None})
    assert refusal(path) == (
        f"{path}:2: keys: a text row after rated rows: keep one kind in a source "
        "(rating is null here: --fields rating=rating drops such rows)"
    )
    assert load(path, fields=["rating=rating"]).ledger == {"rows": 2, "dropped: not rated": 1}


@pytest.mark.parametrize("fields, message", [
    (["rating"], "--fields rating: expected OURS=THEIRS, such as rating=helpfulness"),
    (["rating="], "--fields rating=: expected OURS=THEIRS"),
    (["score=x"], "--fields score=x: 'score' is no column of ours: prompt, instruction"),
    (["rating=x", "rating=y"], "--fields rating=y: rating is x already: drop one of them"),
    (["rating=x"], "x.jsonl:1: x: missing, which --fields reads as rating: the columns are ['text']"),
])  # fmt: skip
def test_names_that_cannot_be_read(tmp_path, fields, message):
    assert message in refusal(write(tmp_path / "x.jsonl", {"text": "a"}), fields=fields)


def test_options_spell_the_names():
    spell = cli.spell_fields
    assert spell(["--rating-field", "a", "--lr", "1"]) == ["--fields", "rating=a", "--lr", "1"]
    assert spell(["--response_a-field=b"]) == ["--fields", "response_a=b"]
    for argv in (["--rating-field"], ["--rating-field", "--lr"]):
        with pytest.raises(UserError, match="^--rating-field needs a value: the name of a column$"):
            spell(argv)
    argv = ["--data", "x.jsonl", "--chosen-field", "a", "--fields", "rejected=b", "--prompt-field=c"]
    config = cli.parse_config({"demo": RunConfig()}, "", argv)
    assert config.fields == ("chosen=a", "rejected=b", "prompt=c")
    parser = cli.Parser()
    parser.add_argument("--fields", nargs="+", action="extend", default=[])
    assert parser.parse_args(["--text-field", "a", "--fields", "genre=b"]).fields == ["text=a", "genre=b"]


@pytest.mark.parametrize("options, message", [
    ({"fields": ("x",)}, "--fields x: expected OURS=THEIRS"), ({"rating_scale": (1.0,)}, "--rating-scale takes"),
    ({"rating_scale": (4.0, 0.0)}, "--rating-scale takes the lowest and the highest rating, such as 0 4"),
    ({"rating_scale": (4.0, 4.0)}, "--rating-scale takes"), ({"rating_scale": (1.0, 2.0, 3.0)}, "--rating-scale takes"),
    ({"fields": ("rating=x",), "data": "vader"}, "--fields and --rating-scale are for files: vader needs neither"),
])  # fmt: skip
def test_options_of_all_stages_are_checked_first(options, message):
    with pytest.raises(UserError) as error:
        RunConfig(**({"data": "x.jsonl"} | options))
    assert str(error.value).startswith(message)


# ---------------------------------------------------------------- .json


@pytest.mark.parametrize("text", [
    '[{"text": "a"}, {"text": "b"}]', '{"data": [{"text": "a"}, {"text": "b"}]}', '{"text": "a"}\n\n{"text": "b"}\n',
    '{"version": "1.0", "tags": ["x"], "rows": [{"text": "a"}, {"text": "b"}], "empty": []}', '\ufeff[{"text": "a"},\n\n{"text": "b"}]',
])  # fmt: skip
def test_json_files(tmp_path, text):
    for name, content in {"x.json": text.encode(), "x.json.gz": gzip.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(content)
        found = load(tmp_path / name)
        assert [r.response for r in found.records] == ["a", "b"]
        assert found.sha256 == load(tmp_path / name).sha256
        (tmp_path / name).unlink()


def test_an_object_with_our_keys_is_a_row(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"messages": [user("Hi"), bot("Yes")], "tags": [{"a": 1}]}))
    assert load(tmp_path / "x.json").records == [Response(HI, " Yes")]


@pytest.mark.parametrize("text, message", [
    ("", ": the file is empty"), ("  \n ", ": the file is empty"), ("3", ": expected an array of objects, or an object"),
    ("[1, 2]", ":1: row: expected an object, got 1"), ("[]", ": no usable row: 0 rows: none"), ('"a"', ": expected an array"),
    ('[{"text": "a"}, {"text": 3}]', ":2: text: expected text, got 3"), ('[{"text": "a"', ": not JSON: Expecting ',' delim"),
    ("[" * 100_000, ": not JSON: maximum recursion"), ('{"a": 1}', "such as {data: [...]}; found the keys ['a']"),
    ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "found 2 such lists: train, test"),
    ('{"data": ["a"]}', "found the keys ['data']"), ('{"text": "a"}\n{', ":2: row: not JSON: "),
    ('["a", "b"]', ":1: row: expected an object, got 'a'"),
])  # fmt: skip
def test_json_files_that_hold_no_rows(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert refusal(path).startswith(str(path)) and message in refusal(path), refusal(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"text": "\xff"}]')
    assert "x.json: not UTF-8: " in refusal(tmp_path / "x.json")


def test_folders_hold_files_of_all_kinds(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.json").write_text('[{"text": "b"}]')
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    if (pa := pytest.importorskip("pyarrow")) and (parquet := pytest.importorskip("pyarrow.parquet")):
        parquet.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    found = load(tmp_path)
    assert [r.response for r in found.records] == ["a", "b", "c"]
    assert found.remarks == ["passed over 1 other files: dataset_info.json"]


# ---------------------------------------------------------------- .parquet


@pytest.fixture
def save(tmp_path):
    """save(**columns) -> a Parquet file."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def call(name="x.parquet", **columns) -> Path:
        arrays = {
            key: value if isinstance(value, pa.Array) else pa.array(value) for key, value in columns.items()
        }
        parquet.write_table(pa.table(arrays), tmp_path / name)
        return tmp_path / name

    return call


def test_values_of_parquet_are_plain(save):
    pa = pytest.importorskip("pyarrow")
    votes = pa.array([[("a", 2), ("b", None)]] * 2, pa.map_(pa.string(), pa.int8()))
    texts = {name: pa.array(["x", "y"]).dictionary_encode() for name in ("response_a", "prompt")}
    found = load(save(**texts, response_b=pa.array(["z", "z"], pa.large_string()), votes=votes))
    assert found.records == [Preference("x", "x", "z"), Preference("y", "y", "z")]
    cents = pa.array([decimal.Decimal("1.50"), decimal.Decimal("3.00")], pa.decimal128(5, 2))
    assert [r.ratings for r in load(save(text=["a", "b"], rating=cents)).records] == [(1.5,), (3,)]
    small = pa.array([1.5, 3.0], pa.float32())
    assert [r.ratings for r in load(save(text=["a", "b"], rating=small)).records] == [(1.5,), (3,)]
    labels = load(save(prompt=["p", "q"], completion=["c", "d"], label=pa.array([1, 0], pa.int8())))
    assert [r.label for r in labels.records] == [True, False]
    found = load(save(text=["a", "b", "c"], rating=[1.0, math.nan, None]), fields=["rating=rating"])
    assert found.ledger == {"rows": 3, "dropped: not rated": 2}


def test_a_parquet_file_is_read_in_batches_and_its_rows_are_numbered(save):
    pa = pytest.importorskip("pyarrow")
    n, before = 40_000, pa.total_allocated_bytes()
    path = save(text=[f"{i} " + "word " * 200 for i in range(n)])  # one row group, 40 MB unpacked
    peak = 0
    for number, row in tables.parquet_rows(path, "x", set(), 1 << 40):
        peak = max(peak, pa.total_allocated_bytes() - before) if number % 1000 == 0 else peak
        assert row["text"].startswith(f"{number - 1} ")
    assert number == n and peak < 8 << 20
    assert load(path).records[-1].where == f"{path}:{n}"
    assert load(path).sha256 == load(path).sha256


@pytest.mark.parametrize("columns, message", [
    ({"text": [b"a", b"b"]}, ":1: text: expected text, got b'a'"),
    ({"text": ["a", None], "rating": [3, 4]}, ":2: text: missing"),
    ({"image": [b"a"], "id": [1]}, ": columns: ['id', 'image'] match no format: see --fields"),
    ({"messages": [[{"role": "user"}]]}, ":1: messages: expected messages [{role, content}]"),
    ({"messages": [[[1]]]}, ":1: messages: expected messages [{role, content}]"),
    ({"text": [datetime.date(2026, 1, 1)]}, ":1: text: expected text, got datetime.date"),
    ({"prompt": [{"a": 1}], "completion": ["c"]}, ":1: prompt: expected text, got {'a': 1}"),
    ({"text": ["a"], "rating": [[1]]}, ":1: rating: expected finite numbers, got [1]"),
])  # fmt: skip
def test_columns_of_parquet_that_are_no_text(save, columns, message):
    path = save(**columns)
    assert refusal(path).startswith(f"{path}{message}"), refusal(path)


def test_values_that_python_cannot_hold_are_bad_rows(save):
    pa = pytest.importorskip("pyarrow")
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"], pa.binary()).buffers())
    path = save(text=broken)
    assert refusal(path).startswith(f"{path}:1: text: cannot be read: ")
    assert load(path, skip_bad=True).ledger == {"rows": 2, "skipped: malformed": 1}
    path = save(text=["a"], rating=pa.array([1 << 62], pa.timestamp("us")))
    assert refusal(path).startswith(f"{path}:1: rating: cannot be read: ")


def test_damaged_parquet_files_are_one_line(save, tmp_path):
    whole = save(text=["a", "b"] * 50).read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[9:], whole[:200] + b"\0" * 50 + whole[250:]):
        path = tmp_path / "bad.parquet"
        path.write_bytes(content)
        try:
            assert len(load(path).records) <= 100
        except UserError as error:
            assert str(error).startswith(f"{path}: cannot be read: ") and "\n" not in str(error)
    os.mkfifo(tmp_path / "pipe.parquet")
    assert "a Parquet file cannot be read from a pipe" in refusal(tmp_path / "pipe.parquet")


def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(save, monkeypatch):
    path = save(text=["a" * 100_000] * 1000)  # a dictionary of one entry: some kilobytes
    assert path.stat().st_size < 400_000
    assert "x.parquet: holds more than 67,108,864 bytes: split it first" in refusal(path)
    monkeypatch.setattr(sources, "FREE_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_RATIO", 0)
    assert "holds more than 100 bytes" in refusal(save(text=["b" * 300]))


def test_without_pyarrow_the_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    remedy = "reading Parquet needs the pyarrow package: pip install 'minirlhf[hub]'"
    assert refusal(tmp_path / "x.parquet") == f"{tmp_path / 'x.parquet'}: {remedy}"


def test_feedback_reads_the_same_files(save, tmp_path):
    path = save("items.parquet", question=["p", "q"], a=["x", "y"], b=["z", "w"], gold=["a", None], id=[1, 2])
    add(path, tmp_path / "f.db", ["prompt=question", "response_a=a", "response_b=b"])
    rows = Store(tmp_path / "f.db").rows("SELECT prompt, a, b, gold FROM items ORDER BY prompt")
    assert [tuple(row) for row in rows] == [("p", "x", "z", "a"), ("q", "y", "w", None)]
    with pytest.raises(UserError, match=r"items.parquet:1: x: missing, which --fields reads as response"):
        add(path, tmp_path / "g.db", ["response=x"])


# ---------------------------------------------------------------- inspect


def inspect(monkeypatch, capsys, *args) -> str:
    monkeypatch.setattr(sys, "argv", ["data", "inspect", *map(str, args)])
    inspect_tool.main()
    return capsys.readouterr().out


def table_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.match(r"  [\w ]{11}\|", line)]


def test_inspect_shows_what_a_context_cuts(monkeypatch, capsys, tmp_path):
    from minirlhf.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: TOK))
    path = write(tmp_path / "x.jsonl", {"prompt": "abcd", "completion": "wxyz"})
    ask = lambda *options: table_of(inspect(monkeypatch, capsys, path, "--tokenizer", "any", *options))
    assert ask() == ["  read       |<bos>|a|b|c|d", "  learnt     |w|x|y|z|<eot>"]
    assert ask("--context", 7) == [
        "  read       |<bos>|a|b|c|d",
        "  learnt     |w|x",
        "  cut        |y|z|<eot>",
    ]
    assert ask("--context", 7, "--too-long", "cut") == [
        "  read       |<bos>", "  cut        |a|b|c", "  read       |d", "  learnt     |w|x|y|z|<eot>",
    ]  # fmt: skip
    assert ask("--context", 5) == ["  dropped    |<bos>|a|b|c|d|w|x|y|z|<eot>"]


def test_inspect_shows_both_texts_of_a_pair(monkeypatch, capsys, tmp_path):
    from minirlhf.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: TOK))
    path = write(
        tmp_path / "x.jsonl",
        {"prompt": "p", "response_a": "ab", "response_b": "cde", "votes": {"b": 3, "a": 1}},
    )
    out = inspect(monkeypatch, capsys, path, "--tokenizer", "any", "--context", 5)
    assert table_of(out) == [
        "  read       |<bos>|p", "  learnt     |c|d|e", "  cut        |<eot>", "  rejected   |a|b|<eot>",
    ]  # fmt: skip
    assert re.search(
        r":1: preference, \w+; 75% of the votes for chosen; from prompt, response_a, response_b, votes", out
    )


def test_inspect_says_what_is_not_learnt(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": value} for value in (True, False, False)]
    out = inspect(monkeypatch, capsys, write(tmp_path / "x.jsonl", *rows))
    assert "thumbs: 1 up, 2 down" in out and "thumbs down: SFT does not learn it" in out
    assert table_of(out)[:4] == [
        "  read       |p",
        "  learnt     |c|<eot>",
        "  read       |p",
        "  not learnt |c|<eot>",
    ]
    out = inspect(monkeypatch, capsys, write(tmp_path / "y.jsonl", {"prompt": "p"}))
    assert table_of(out) == ["  read       |p"] and "nothing for SFT to learn" in out


def test_long_examples_are_shortened_and_special_tokens_have_names():
    runs = [("read", ["x"] * 5000), ("learnt", ["y" * 250])]
    lines = inspect_tool.lines_of(runs)
    assert len(lines) < 12 and "|... 4,760 more ...|" in "".join(lines)
    assert max(map(len, lines)) < 120 and sum(line.count("y") for line in lines) == 250
    TOK.specials = {"<|end|>": 1}
    assert inspect_tool.special_names(TOK) == {2: "<bos>", 1: "<|end|>"}
    del TOK.specials


# ---------------------------------------------------------------- the page


def sections() -> list[tuple[str, list[str], str, str]]:
    """[(heading, rows, command, output)] of docs/data.md."""
    page = (ROOT / "docs/data.md").read_text().partition("## One row of each shape")[2].partition("\n## ")[0]
    blocks = r"\n```json\n(.*?)\n```\n\n```\n(.*?)\n```\n\n```text\n(.*?)\n```\n"
    found = re.findall(r"^### ([^\n]+)\n(?:(?!^### |^```).)*" + blocks, page, re.M | re.S)
    assert len(found) == page.count("\n### ") == page.count("```json") >= 14
    return [(title, rows.splitlines(), command, output) for title, rows, command, output in found]


@pytest.mark.parametrize("title, rows, command, output", sections())
def test_rows_of_the_page_become_what_it_says(monkeypatch, capsys, tmp_path, title, rows, command, output):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "minirlhf.data", "inspect"]
    file = Path(words[4])
    write(file, *rows)
    if file.suffix == ".json":
        file.write_text(json.dumps([json.loads(row) for row in rows]))
    out = inspect(monkeypatch, capsys, *words[4:])
    assert f"\n{output}\n" in out, out
    record = load(file, fields=shapes_fields(words)).records[0]
    assert all(
        name in json.dumps([json.loads(row) for row in rows])
        for name in re.findall(r"\w+(?= as )", " ".join(record.columns))
    )


def shapes_fields(words: list[str]) -> list[str]:
    spelt = cli.spell_fields(words)
    return [word for word in spelt if re.fullmatch(r"\w+=\w+", word)]


def test_the_page_names_all_columns_of_ours():
    page = (ROOT / "docs/data.md").read_text()
    assert [name for name in shapes.OURS if f"`{name}`" not in page and f'"{name}"' not in page] == []


# ---------------------------------------------------------------- fuzz

TEXT = st.sampled_from(
    ["", " ", "word", "two words ", "\n\nHuman: a\n\nAssistant: b", "N/A", "4", "\ud800", "caf\u00e9"]
)
NUMBERS = st.integers(-9, 12) | st.floats() | st.sampled_from([10**400, -0.0, 1e300])
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "observation", "alien", None, 3)
TURN = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(ROLES), "content": TEXT | st.none() | NUMBERS, "from": st.sampled_from(ROLES),
    "value": TEXT | st.none() | NUMBERS, "weight": st.sampled_from([0, 1, None, 0.5]),
})  # fmt: skip
TALK = st.lists(TURN, max_size=4) | st.lists(
    st.sampled_from([user("a"), bot("b"), human("c"), gpt("d")]), max_size=4
)
ENTRY = st.fixed_dictionaries({}, optional={
    "response": TEXT | TALK | NUMBERS, "overall_score": NUMBERS | st.none() | TEXT, "fine-grained_score": NUMBERS,
    "annotations": st.dictionaries(st.sampled_from(["helpfulness", "honesty"]), st.dictionaries(st.just("Rating"), TEXT | NUMBERS)),
})  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "tie", "role", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = sorted(
    {
        *shapes.OURS,
        "conversations",
        "conversation",
        "completions",
        "score_chosen",
        "score_rejected",
        "id",
        "history",
    }
)
VALUES = {key: TEXT | ANYTHING for key in KEYS}
VALUES |= {
    key: TALK | TEXT | TURN | ANYTHING
    for key in (
        "messages",
        "conversations",
        "conversation",
        "prompt",
        "chosen",
        "rejected",
        "response",
        "completion",
    )
}
VALUES |= {
    "completions": st.lists(ENTRY | ANYTHING, max_size=4) | ANYTHING,
    "label": st.booleans() | ANYTHING,
}
VALUES |= {
    "scale": st.sampled_from([[1, 5], [0, 10], [5, 1]]) | ANYTHING,
    "rating": NUMBERS | TEXT | ANYTHING,
}
GOOD_ROWS = st.sampled_from([row for row, *_ in SHAPES])
ROWS = GOOD_ROWS.flatmap(
    lambda like: st.fixed_dictionaries({}, optional=VALUES).map(
        lambda more: like | dict(list(more.items())[:3])
    )
) | st.fixed_dictionaries({}, optional=VALUES)
FIELDS = st.dictionaries(
    st.sampled_from(sorted(shapes.OURS)),
    st.sampled_from([*KEYS, "annotations.honesty.Rating", "x.y"]),
    max_size=2,
)
OPTIONS = {"max_examples": FUZZ, "deadline": None, "suppress_health_check": list(HealthCheck)}


def accounted(found: data.Dataset) -> None:
    """All rows of a source are kept, dropped or skipped, and encoders account for what is kept."""
    lost = sum(n for key, n in found.ledger.items() if key.startswith(("dropped: ", "skipped: ")))
    assert found.ledger["rows"] == len(found.records) + lost
    found.describe().encode()
    for encode in (
        encode_examples,
        encode_judged,
        lambda tok, r, c, t, ledger: encode_prompts(tok, r, 3, c, t, ledger),
    ):
        ledger = found.ledger.copy()
        try:
            encode(TOK, found.records, 20, "cut", ledger)
        except UserError as error:
            assert "\n" not in str(error)
            if any(record.where and str(error).startswith(record.where) for record in found.records):
                continue  # a row for which a transcript has no place: a tool's turn, say
        kept = ledger["used"] + sum(
            n for key, n in ledger.items() if key.startswith(("dropped: ", "skipped: "))
        )
        assert ledger["rows"] == kept
    for record in found.records:
        inspect_tool.about_example(record, found.kind).encode()
        with contextlib.suppress(UserError):
            inspect_tool.lines_of(inspect_tool.runs_in_tokens(record, TOK, 9, "cut"))


def attempt(path: Path, outcomes: Counter, **options) -> None:
    try:
        load(path, **options)
        outcomes["read"] += 1
    except UserError as error:
        assert "\n" not in str(error)
        outcomes["refused"] += 1
    try:
        accounted(load(path, skip_bad=True, **options))
    except UserError as error:
        assert "\n" not in str(error)


def test_fuzz_rows_of_json(tmp_path):
    outcomes = Counter()

    @settings(**OPTIONS)
    @given(
        GOOD_ROWS.map(lambda row: [row]) | st.lists(ROWS | ANYTHING, min_size=1, max_size=3),
        st.just({}) | FIELDS,
        st.sampled_from([None, (0, 10)]),
        st.booleans(),
    )
    def fuzz(rows, fields, scale, array):
        path = tmp_path / ("x.json" if array else "x.jsonl")
        lines = [json.dumps(row) for row in rows]
        path.write_text(f"[{', '.join(lines)}]" if array else "\n".join(lines))
        attempt(path, outcomes, fields=[f"{k}={v}" for k, v in fields.items()], scale=scale)

    fuzz()
    assert min(outcomes["read"], outcomes["refused"]) > FUZZ // 50, outcomes


def test_fuzz_rows_of_each_shape_with_one_column_changed(tmp_path):
    outcomes = Counter()
    one = st.sampled_from(KEYS).flatmap(lambda key: VALUES[key].map(lambda value: {key: value}))

    @settings(**OPTIONS)
    @given(st.sampled_from([row for row, *_ in SHAPES]), one)
    def fuzz(row, change):
        attempt(write(tmp_path / "x.jsonl", row, row | change), outcomes)

    fuzz()
    assert min(outcomes["read"], outcomes["refused"]) > FUZZ // 10, outcomes


def test_fuzz_tables_of_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    outcomes = Counter()
    flat = [pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(),
            pa.bool_(), pa.date32(), pa.timestamp("ns"), pa.decimal128(9, 2), pa.null(), pa.dictionary(pa.int8(), pa.string()),
            pa.duration("s"), pa.time64("us")]  # fmt: skip
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = [*flat, pa.list_(turn), pa.list_(pa.string()), pa.list_(pa.float64()), pa.map_(pa.string(), pa.int64()), turn,
             pa.struct([("a", pa.int64()), ("b", pa.binary())]), pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
             pa.list_(pa.struct([("response", pa.string()), ("overall_score", pa.float64())]))]  # fmt: skip

    def value(kind):
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
            return st.sampled_from(["", "a", "user", "assistant", "human", "gpt", "N/A", "caf\u00e9"])
        if pa.types.is_struct(kind):
            return st.fixed_dictionaries({f.name: value(f.type) | st.none() for f in kind})
        if pa.types.is_map(kind):
            return st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), max_size=2)
        if pa.types.is_list(kind):
            return st.lists(value(kind.value_type), max_size=3)
        if pa.types.is_floating(kind):
            return st.sampled_from([0.0, 1.5, math.nan, math.inf, 4.0])
        if pa.types.is_decimal(kind):
            return st.sampled_from([decimal.Decimal("1.50"), decimal.Decimal("3")])
        if pa.types.is_boolean(kind):
            return st.booleans()
        if pa.types.is_binary(kind):
            return st.binary(max_size=3)
        return st.none() if pa.types.is_null(kind) else st.integers(0, 4)

    @st.composite
    def tables_of_any_kind(draw):
        n, like = draw(st.integers(0, 4)), draw(st.sampled_from([row for row, *_ in SHAPES]))
        columns = {name: pa.array([cell] * n, pa.array([cell]).type) for name, cell in like.items()}
        for name in draw(st.lists(st.sampled_from([*KEYS, *["id"] * 20]), max_size=4, unique=True)):
            usual = [pa.string()] * 9 + [pa.list_(turn)] * 3 + [pa.int8()] * 3
            kind = draw(st.sampled_from([*usual, *kinds]))
            values = draw(st.lists(value(kind) | st.none(), min_size=n, max_size=n))
            if pa.types.is_dictionary(kind):
                columns[name] = pa.array(values, pa.string()).dictionary_encode()
            elif pa.types.is_temporal(kind):
                columns[name] = (
                    pa.array(values, pa.int64())
                    .cast(pa.int32() if kind == pa.date32() else pa.int64())
                    .cast(kind)
                )
            else:
                columns[name] = pa.array(values, kind)
        return pa.table(columns)

    @settings(**OPTIONS)
    @given(tables_of_any_kind(), st.just({}) | FIELDS)
    def fuzz(table, fields):
        parquet.write_table(table, tmp_path / "x.parquet")
        attempt(tmp_path / "x.parquet", outcomes, fields=[f"{k}={v}" for k, v in fields.items()])

    fuzz()
    assert min(outcomes["read"], outcomes["refused"]) > FUZZ // 100, outcomes


def test_fuzz_bytes_of_parquet(tmp_path):
    """In a process of its own: a reader that crashes on damaged bytes would take the suite with it."""
    pytest.importorskip("pyarrow")
    code = f"""
import random, pyarrow as pa, pyarrow.parquet as parquet
from minirlhf import UserError
from minirlhf.data import load
rng, read, refused = random.Random(0), 0, 0
parquet.write_table(pa.table({{"prompt": ["a", "b"] * 40, "rating": [1, 2] * 40, "response": ["x" * 9, "y"] * 40}}), "x.parquet")
whole = open("x.parquet", "rb").read()
for _ in range({2 * FUZZ}):
    damaged = bytearray(whole)
    for _ in range(rng.choice([1, 1, 3])):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    open("x.parquet", "wb").write(damaged)
    try:
        load("x.parquet"); read += 1
    except UserError as error:
        assert "\\n" not in str(error); refused += 1
print(read, refused)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert refused > FUZZ // 10 and read > FUZZ // 10
