"""data.py: what is accepted, what is refused and with which words, the built-in dataset, token batches. No network."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, data
from minirlhf.data import (
    Preference,
    Response,
    account,
    batches,
    collate,
    encode_examples,
    encode_judged,
    encode_pair,
    encode_prompts,
    load,
    split_of,
)
from minirlhf.interop import vader
from minirlhf.support import sources
from minirlhf.support.context import fit
from minirlhf.support.ledger import REMEDIES
from minirlhf.tools import inspect as inspect_tool


def encode_example(tok, prompt, completion, context, eos=True):
    """(ids, loss_mask) of one text."""
    found = fit(tok, prompt, [completion], context, "error", eos=eos)
    return found.sequences[0], found.loss_mask


class ByteTokenizer:
    pad, eot, bos, vocab_size = 0, 1, 2, 259

    def encode(self, text):
        return [b + 3 for b in text.encode()]

    def decode(self, ids):
        return bytes(i - 3 for i in ids if i > 2).decode(errors="replace")


TOK = ByteTokenizer()


def write(path: Path, *rows) -> Path:
    """Rows as JSON lines; bytes and str go in as they are."""
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- formats

HI = "\n\nHuman: Hi\n\nAssistant:"
FORMATS = [
    ({"text": "A plain text."}, "text", Response("", "A plain text.")),
    ({"text": "Typed.", "genre": "tweets"}, "text", Response("", "Typed.", genre="tweets")),
    ({"prompt": "2+2=", "completion": "4"}, "completion", Response("2+2=", "4")),
    ({"prompt": [user("Hi")], "completion": [bot("Yes")]}, "completion", Response(HI, " Yes")),
    ({"messages": [user("Hi"), bot("Yes")]}, "completion", Response(HI, " Yes")),
    ({"messages": [{"role": "system", "content": "Be"}, user("Hi"), bot("Yes")]}, "completion",
     Response("\n\nSystem: Be" + HI, " Yes")),
    ({"messages": [user("Hi"), bot("a"), user("b"), bot("c")]}, "completion",
     Response(HI + " a\n\nHuman: b\n\nAssistant:", " c")),
    ({"messages": [bot("Hello")]}, "completion", Response("", " Hello")),
    ({"prompt": "p", "response": "r"}, "completion", Response("p", "r")),
    ({"prompt": "p", "response": "r", "completion": "c"}, "completion", Response("p", "c")),
    ({"prompt": "p", "response": "r", "label": True}, "labelled", Response("p", "r", label=True)),
    ({"prompt": "p", "completion": "c", "label": True}, "labelled", Response("p", "c", label=True)),
    ({"prompt": "p", "completion": "c", "label": 0}, "labelled", Response("p", "c", label=False)),
    ({"prompt": "p"}, "prompt", Response("p", "")),
    ({"prompt": [user("Hi")]}, "prompt", Response(HI, "")),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference", Preference("p", "a", "b")),
    ({"chosen": HI + " good", "rejected": HI + " bad"}, "preference", Preference(HI, " good", " bad")),
    ({"prompt": [user("Hi")], "chosen": [bot("a")], "rejected": [bot("b")]}, "preference", Preference(HI, " a", " b")),
    ({"chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")]}, "preference", Preference(HI, " a", " b")),
    ({"prompt": "Hi", "chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")]}, "preference",
     Preference(HI, " a", " b")),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"a": 3, "b": 1}}, "preference",
     Preference("p", "a", "b", 0.75)),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"b": 2, "tie": 2}}, "preference",
     Preference("p", "b", "a", 0.75)),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"tie": 1}}, "preference",
     Preference("p", "a", "b", 0.5)),
    ({"text": "t", "rating": 4, "scale": [1, 5]}, "rated", Response("", "t", 4.0, (4,), (1, 5))),
    ({"prompt": "p", "response": "r", "ratings": [-4, 1.5], "scale": [-4, 4], "genre": "g"}, "rated",
     Response("p", "r", -1.25, (-4, 1.5), (-4, 4), "g")),
    ({"text": "t", "ratings": {"ann": 2, "bob": 5}, "scale": [1, 5]}, "rated",
     Response("", "t", 3.5, (2, 5), (1, 5), raters=("ann", "bob"))),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"ann": "a", "b": "a", "cy": "b"}}, "preference",
     Preference("p", "a", "b", 2 / 3, (1, 1, 0), ("ann", "b", "cy"))),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": ["b", "tie"]}, "preference",
     Preference("p", "b", "a", 0.75, (1, 0.5))),
]  # fmt: skip


@pytest.mark.parametrize("row, kind, record", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_format_is_told_by_its_keys(tmp_path, row, kind, record, suffix):
    path = write(tmp_path / f"x{suffix}", row, "", row)
    plain = path.read_bytes()
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(plain))
    found = load(path)
    assert (found.kind, found.records) == (kind, [record, record])
    assert (found.sources, found.sha256) == ([str(path)], hashlib.sha256(plain).hexdigest())
    assert not found.skipped and found.ledger == {"rows": 2}
    assert [r.where for r in found.records] == [f"{path}:1", f"{path}:3"]
    assert f"x{suffix}: 2 {kind} rows" in found.describe()


def test_hh_transcripts_split_at_the_last_shared_assistant_turn(tmp_path):
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {
        "chosen": shared + " same start, then x\n\nHuman: d\n\nAssistant: e",
        "rejected": shared + " same start, y",
    }
    [record] = load(write(tmp_path / "x.jsonl", row)).records
    assert record.prompt == shared and record.chosen.startswith(" same start, then x\n\nHuman: d")


def test_a_text_file_gives_a_text_a_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes('\ufeffFirst line.\r\n\r\n  {"json": is not parsed}\r\nLast'.encode())
    assert [r.response for r in load(path).records] == ["First line.", '  {"json": is not parsed}', "Last"]


def test_byte_order_mark_and_windows_line_ends_are_taken(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [r.response for r in load(path).records] == ["a", "b"]


def test_a_folder_is_the_sum_of_its_files(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "b"})
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    found = load(tmp_path)
    assert [r.response for r in found.records] == ["a", "b", "c"] and len(found.sources) == 3


def test_text_that_looks_like_a_special_token_is_plain_text(tmp_path):
    text = "<|endoftext|> <|pad|> [INST] </s>"
    [record] = load(write(tmp_path / "x.jsonl", {"text": text})).records
    ids, _ = encode_example(TOK, "", record.response, 99)
    assert record.response == text and TOK.decode(ids) == text
    assert ids.count(TOK.bos) == ids.count(TOK.eot) == 1 and TOK.pad not in ids


# ---------------------------------------------------------------- bad rows and bad sources

BAD_ROWS = [
    ("{", "row: not JSON: Expecting property name"),
    ("[1, 2]", "row: expected an object, got [1, 2]"),
    ("[" * 100_000, "row: not JSON: "),
    (b'{"text": "\xff\xfe"}', "row: not UTF-8: 'utf-8' codec can't decode byte 0xff"),
    ({"txt": "a", "id": 1}, "keys: ['id', 'txt'] match no format"),
    ({}, "keys: [] match no format"),
    ({"text": 3}, "text: expected text, got 3"),
    ({"text": None}, "keys: [] match no format"),
    ({f"key {i}": 1 for i in range(1000)}, "keys: ['key 0', 'key 1', 'key 10',"),
    ('{"text": "\\ud800"}', "text: half a surrogate pair"),
    ({"prompt": "p", "completion": {}}, "completion: expected text, got {}"),
    ({"completion": "c"}, "prompt: missing"),
    ({"prompt": "p", "label": True}, "completion: missing"),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "label: expected true or false, got 'yes'"),
    ({"prompt": "p", "chosen": "a"}, "rejected: missing"),
    ({"chosen": "Human: a", "rejected": "Human: b"}, "prompt: missing, and chosen and rejected share no"),
    ({"messages": []}, "messages: expected messages [{role, content}]"),
    ({"messages": "Hi"}, "messages: expected a list, got 'Hi'"),
    ({"messages": ["Hi"]}, "messages: expected messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages: expected messages"),
    ({"messages": [user("a"), {"role": "assistant"}]}, "messages: expected messages"),
    (
        {"messages": [user("a"), {"role": "tool", "tool_calls": [{}]}, bot("b")]},
        "messages: expected messages",
    ),
    (
        {"messages": [user("a") | {"x": json.loads("[" * 80 + "]" * 80)}, bot("b")]},
        "messages: expected messages",
    ),
    (
        {"messages": [user("a"), bot("b")], "tools": [{"x": json.loads("[" * 80 + "]" * 80)}]},
        "tools: expected a list",
    ),
    ({"messages": [user("a"), bot("b")], "tools": "x"}, "tools: expected a list of objects, got 'x'"),
    ({"messages": [user("a"), bot("b")], "documents": ["x"]}, "documents: expected a list of objects"),
    (
        '{"messages": [{"role": "user", "content": "a", "name": "\\udcff"}]}',
        "messages: half a surrogate pair",
    ),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages: expected messages"),
    ({"messages": [user("a"), bot(["part"])]}, "messages: expected messages"),
    ({"messages": [bot("a"), user("b")]}, "messages: the last turn must be the assistant's"),
    ({"messages": [user("a"), bot("b") | {"weight": 0.5}]}, "messages: weight: expected 0 or 1, got 0.5"),
    ('{"text": "t", "ratings": {"\\ud800": 3}}', "ratings: the name of a rater: half a surrogate pair"),
    (
        '{"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"a": 1' + "0" * 400 + "}}",
        "votes: expected counts",
    ),
    ({"prompt": "p", "response_a": "a", "response_b": "b"}, "votes: expected counts"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"a": 0}}, "votes: expected counts"),
    (
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"a": 2, "b": -1}},
        "votes: expected counts",
    ),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"a": "2"}}, "votes: expected counts"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"c": 1}}, "votes: expected counts"),
    (
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"ann": "a", "bob": "c"}},
        "votes: expected counts",
    ),
    (
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": {"ann": "a", "b": 1}},
        "votes: expected counts",
    ),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": ["a", ["b"]]}, "votes: expected counts"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": []}, "votes: expected counts"),
    ({"prompt": "p", "response_a": "a", "votes": {"a": 1}}, "response_b: missing"),
    ('{"text": "t", "rating": NaN}', "rating: expected finite numbers, got nan"),
    ('{"text": "t", "rating": 1e999}', "rating: expected finite numbers, got inf"),
    ('{"text": "t", "rating": 1' + "0" * 400 + "}", "rating: expected finite numbers, got 1000"),
    ({"text": "t", "rating": "4"}, "rating: expected finite numbers, got '4'"),
    ({"text": "t", "rating": True}, "rating: expected finite numbers, got True"),
    ({"text": "t", "ratings": []}, "ratings: expected finite numbers, got []"),
    ({"text": "t", "ratings": [1, None]}, "ratings: expected finite numbers, got [1, None]"),
    ({"text": "t", "ratings": 4}, "ratings: expected finite numbers, got 4"),
    ({"text": "t", "ratings": {}}, "ratings: expected finite numbers, got {}"),
    ({"text": "t", "ratings": {"ann": None}}, "ratings: expected finite numbers, got {'ann': None}"),
    (
        {"text": "t", "ratings": {"ann": 6}, "scale": [1, 5]},
        "ratings: {'ann': 6} is outside the scale (1, 5)",
    ),
    ({"rating": 4}, "text: missing"),
    ({"text": "t", "rating": 6, "scale": [1, 5]}, "rating: 6 is outside the scale (1, 5)"),
    ({"text": "t", "rating": 3, "scale": [5, 1]}, "scale: expected [low, high], got [5, 1]"),
    ({"text": "t", "rating": 3, "scale": "1-5"}, "scale: expected [low, high], got '1-5'"),
]


@pytest.mark.parametrize(
    "row, message", BAD_ROWS, ids=[f"{i}-{m.split(':')[0]}" for i, (_, m) in enumerate(BAD_ROWS)]
)
def test_a_bad_row_names_file_line_field_and_reason(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", "", row)
    with pytest.raises(UserError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}:2: {message}"), str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_skip_bad_counts_and_goes_on(tmp_path):
    path = write(
        tmp_path / "x.jsonl", {"text": "a"}, "{", {"text": 1}, {"prompt": "another kind"}, {"text": "b"}
    )
    found = load(path, skip_bad=True)
    assert [r.response for r in found.records] == ["a", "b"] and len(found.skipped) == 3
    assert account(found.ledger) == "5 rows: 2 kept, 3 skipped (malformed)"
    assert f"the first bad row: {path}:2: row: not JSON" in found.describe()


def test_skip_bad_keeps_the_first_messages_only(tmp_path):
    found = load(write(tmp_path / "x.jsonl", *["{"] * 1000, {"text": "a"}), skip_bad=True)
    assert found.ledger == {"rows": 1001, "skipped: malformed": 1000} and len(found.skipped) == 100


def test_one_kind_and_one_scale_to_a_source(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"})
    b = write(tmp_path / "b.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(UserError) as e:
        load(tmp_path)
    assert str(e.value) == f"{b}:1: keys: a completion row after text rows: keep one kind in a source"
    rows = [{"text": "t", "rating": 3, "scale": [1, 5]}, {"text": "u", "rating": 3, "scale": [0, 4]}]
    with pytest.raises(
        UserError, match=r"c.jsonl:2: scale: \(0, 4\) after rows with \(1, 5\): keep one scale"
    ):
        load(write(tmp_path / "c.jsonl", *rows))


def test_a_source_that_cannot_be_read(tmp_path):
    def refuses(path, message):
        with pytest.raises(UserError) as e:
            load(path)
        assert str(e.value).startswith(f"{path}: {message}") and "\n" not in str(e.value), str(e.value)

    refuses(tmp_path / "none.jsonl", "no such file or folder (built in: vader, toy)")
    refuses(tmp_path, "the folder holds no .jsonl, .jsonl.gz, .json, .json.gz, .parquet or .txt file")
    refuses(write(tmp_path / "x.csv", "a,b"), "expected .jsonl, .jsonl.gz, .json, .json.gz, .parquet or .txt")
    refuses(write(tmp_path / "empty.jsonl", ""), "no usable row: 0 rows: none")
    refuses(write(tmp_path / "blank.jsonl", {"text": " "}), "no usable row: 1 row: 1 dropped (empty texts)")
    whole = gzip.compress(json.dumps({"text": "long enough " * 99}).encode())
    for name, content in {
        "cut": whole[:-9],
        "not": b"plain",
        "bent": whole[:20] + b"\0\0\0\0" + whole[24:],
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        refuses(path, "cannot be read: ")


# ---------------------------------------------------------------- splits, drops, scales


def test_D15_identical_pairs_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "p", "chosen": c, "rejected": r}
        for c, r in [("a", "b"), ("a", "a"), ("a ", "a"), ("", "b")]
    ]
    found = load(write(tmp_path / "x.jsonl", *rows))
    assert [r.chosen for r in found.records] == ["a", ""]
    assert found.ledger == {"rows": 4, "dropped: identical pairs": 2}
    assert account(found.ledger) == "4 rows: 2 kept, 2 dropped (identical pairs)"


def test_empty_texts_are_dropped_and_counted(tmp_path):
    found = load(write(tmp_path / "x.jsonl", {"text": ""}, {"text": "a"}, {"text": " \n"}))
    assert [r.response for r in found.records] == ["a"]
    assert found.ledger == {"rows": 3, "dropped: empty texts": 2}


def test_D15_all_records_of_one_prompt_fall_into_one_split(tmp_path):
    rows = [
        {"prompt": f"Question {i % 50}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(500)
    ]
    found = load(write(tmp_path / "x.jsonl", *rows))
    parts = {split: {r.prompt for r in found.select(split).records} for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 50  # disjoint and complete
    again = found.select("train")
    assert again.records == found.select("train").records and again.kind == "preference"


def test_D15_splits_are_those_of_the_first_release():
    """Pinned: a change of these moves test sentences into somebody's training set."""
    keys = [f"sentence {i}" for i in range(2000)]
    counts = Counter(map(split_of, keys))
    assert counts == {"train": 1612, "val": 194, "test": 194}
    assert [split_of(k)[1] for k in keys[:12]] == list("raarrraerrrr")
    assert split_of("p", "x") == split_of("p", "y") == split_of("p") and split_of("", "x") == split_of("x")
    assert len({split_of(":" + ")" * i) for i in range(1, 30)}) == 3  # emoticons have no words, yet differ


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_D15_case_and_punctuation_do_not_move_a_text(text):
    assert split_of(text) in ("train", "val", "test")
    assert split_of(f"wow {text}") == split_of(f"Wow,  {text}!") == split_of(f"WOW {text}...")


@pytest.mark.parametrize(
    "ratings, scale", [((1, 5), (1, 5)), ((0, 3), (0, 4)), ((-1, 4), (-4, 4)), ((2, 3), (1, 5))]
)
def test_a_scale_not_recorded_is_inferred_and_said(tmp_path, ratings, scale):
    rows = [{"text": f"t{v}", "rating": v} for v in ratings]
    path = write(tmp_path / "x.jsonl", *rows)
    found = load(path)
    assert {r.scale for r in found.records} == {
        scale
    } and f"on the scale {scale} (inferred)" in found.describe()
    given = load(path, scale=(-10, 10))
    assert {r.scale for r in given.records} == {(-10, 10)} and "inferred" not in given.describe()


def test_ratings_on_no_usual_scale_need_one(tmp_path):
    path = write(tmp_path / "x.jsonl", {"text": "t", "rating": 0}, {"text": "u", "rating": 87})
    with pytest.raises(UserError, match="rating: 0 to 87 is no usual scale: record `scale` on the rows"):
        load(path)
    with pytest.raises(UserError, match="x.jsonl:2: rating: 87 is outside the scale"):
        load(path, scale=(0, 10))


def test_select_by_split_and_genre():
    toy = load("toy")
    sizes = [len(toy.select(split, ["movies"]).records) for split in ("train", "val", "test")]
    assert sum(sizes) == len(toy.records) == 400 and min(sizes) >= 20
    with pytest.raises(UserError) as e:
        toy.select("val", ["tweets", "words"])
    message = (
        "no row is in the genre tweets or words: of 400 rows there are 400 in movies: choose another genre"
    )
    assert str(e.value) == f"toy: {message}, or add rows"


def test_genres_are_a_choice_only_where_there_are_genres(tmp_path, monkeypatch):
    assert load("toy").genres_among(["tweets"]) == ["tweets"]
    plain = load(write(tmp_path / "x.jsonl", {"text": "a"}))
    assert plain.genres_among(["tweets"]) is None and plain.select(genres=None).records == plain.records
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--genre", "tweets"])
    assert load("toy").genres_among(["tweets"]) == ["tweets"]
    with pytest.raises(UserError, match="--genre has no effect with .*x.jsonl, whose rows have no genre"):
        plain.genres_among(["tweets"])


def test_D15_parts_cut_each_split_in_halves_by_prompt():
    records = [Preference(f"Question {i % 2000}", f"good {i}", f"bad {i}") for i in range(4000)]
    part = {}
    for r in records:
        assert part.setdefault(r.prompt, data.part_of(r)) == data.part_of(r)  # one prompt, one part
    counts = Counter((data.part_of(r), split_of(r.prompt)) for r in records)
    assert len(counts) == 6
    for split in ("train", "val", "test"):
        assert 0.6 < counts["a", split] / counts["b", split] < 1.7


def test_toy_is_always_the_same_and_says_that_it_is_simulated():
    toy = load("toy")
    assert toy == load("toy") and toy.kind == "rated" and "SIMULATED" in toy.describe()
    assert len({r.response for r in toy.records}) == 400
    for r in toy.records:
        assert len(r.ratings) == 5 and r.rating == sum(r.ratings) / 5 and all(-4 <= v <= 4 for v in r.ratings)
    mean = lambda word: sum(r.rating for r in toy.records if f"is {word}," in r.response) / 20
    assert mean("great") > 2 and mean("awful") < -2


# ---------------------------------------------------------------- every row is accounted for


def texts_of(rows) -> list[str]:
    return [TOK.decode(ids) for ids, *_ in rows]


def test_H1_thumbs_down_are_not_learnt_but_counted(tmp_path):
    rows = [{"prompt": "p", "completion": f" {i}", "label": i % 3 > 0} for i in range(9)]
    found = load(write(tmp_path / "x.jsonl", *rows))
    ledger = found.ledger.copy()
    learnt = encode_examples(TOK, found.records, 99, ledger=ledger)
    assert texts_of(learnt) == [f"p {i}" for i in range(9) if i % 3]
    assert account(ledger) == "9 rows: 6 used, 3 dropped (thumbs down)"
    with pytest.raises(UserError) as e:
        encode_examples(TOK, [r for r in found.records if not r.label], 99)
    assert (
        str(e.value) == "nothing to learn in 3 rows: 3 dropped (thumbs down): SFT learns from thumbs up only"
    )


def test_H1_prompts_of_thumbs_down_are_prompts_like_others():
    assert (
        len(encode_prompts(TOK, [Response("p", "c", label=False), Response("q", "c", label=True)], 4, 9)) == 2
    )


LATE = [Preference(f"Review {i}:", " odd" * 60 + " I smiled", " odd" * 60 + " I slept") for i in range(5)]


@pytest.mark.parametrize("too_long", ["drop", "cut", "error"])
def test_H3_pairs_that_the_context_makes_equal_drop_out(too_long):
    early = [Preference("p", " good" + " odd" * 60, " bad" + " odd" * 60), Preference("p", " a", " b")]
    ledger = Counter()
    found = encode_judged(TOK, LATE + early, 128, too_long, ledger)
    assert [item.record for item in found] == early
    assert all(item.ids != item.ids_b for item in found) and max(len(item.ids) for item in found) == 128
    assert ledger["dropped: pairs that the cut makes equal"] == 5
    assert ledger["used"] == 2 and ledger["cut: the end of the text"] == 1
    with pytest.raises(UserError) as e:
        encode_judged(TOK, LATE, 128, too_long)
    counted = "5 rows: 5 dropped (pairs that the cut makes equal)"
    assert str(e.value) == f"no judgement to learn in {counted}: use a model with a longer --context"


def test_H3_pairs_that_the_tokenizer_makes_equal_drop_out():
    class Uncased(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    ledger = Counter()
    found = encode_judged(
        Uncased(), [Preference("p", "Yes", "yes"), Preference("p", "yes", "no")], 99, ledger=ledger
    )
    assert len(found) == 1 and ledger["dropped: pairs that the tokenizer makes equal"] == 1


def test_rated_texts_are_read_as_sft_sees_them():
    record = Response("p", " text", 3.0, (3,), (1, 5))
    [item] = encode_judged(TOK, [record], 99)
    assert item.record is record and item.ids_b is None
    assert item.ids == encode_example(TOK, "p", " text", 99)[0] == encode_examples(TOK, [record], 99)[0][0]
    assert encode_pair(TOK, record, 99) == item and encode_pair(TOK, record, 2) is None


def test_H7_a_response_after_a_prompt_is_a_completion(tmp_path):
    found = load(write(tmp_path / "x.jsonl", {"prompt": "Question?", "response": " Answer."}))
    assert found.kind == "completion" and found.records == [Response("Question?", " Answer.")]
    assert texts_of(encode_examples(TOK, found.records, 99)) == ["Question? Answer."]


def test_H7_bare_prompts_hold_nothing_to_learn_and_the_message_says_so(tmp_path):
    found = load(
        write(tmp_path / "x.jsonl", *[{"prompt": f"Question {i}?", "answer": "42"} for i in range(80)])
    )
    with pytest.raises(UserError) as e:
        encode_examples(TOK, found.records, 99)
    assert str(e.value) == (
        "nothing to learn in 80 rows: 80 dropped (nothing to learn): "
        "they are bare prompts or have empty answers: give them a `completion`"
    )
    assert "column `answer` is not used (80 rows)" in found.describe()


@pytest.mark.parametrize("row, unused", [
    ({"text": "t", "response": "r"}, ["response"]), ({"prompt": "p", "text": "t"}, ["prompt"]),
    ({"messages": [user("a"), bot("b")], "prompt": "a", "output": "b"}, ["output", "prompt"]),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "rating": 3}, ["rating"]),
    ({"prompt": "p", "completion": "c", "id": 7, "source": "web", "answer": None}, []),
    ({"chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")], "prompt": "Hi"}, []),
])  # fmt: skip
def test_columns_that_look_like_content_and_are_not_used_are_named(tmp_path, row, unused):
    found = load(write(tmp_path / "x.jsonl", row, row))
    assert found.remarks == [f"column `{column}` is not used (2 rows)" for column in unused]


def test_turns_of_weight_0_are_not_learnt_and_earlier_turns_are_context(tmp_path):
    talk = [user("a"), bot("b"), user("c"), bot("d")]
    quiet = [*talk[:-1], talk[-1] | {"weight": 0}]
    weighed = [*talk[:-1], talk[-1] | {"weight": 1, "name": None}]
    rows = [
        {"messages": messages}
        for messages in (talk, quiet, weighed, [user("a"), bot("b") | {"weight": None}])
    ]
    found = load(write(tmp_path / "x.jsonl", *rows))
    assert [r.response for r in found.records] == [" d", "", " d", " b"]
    assert found.records[1].prompt == found.records[0].prompt
    assert found.remarks == [
        "earlier assistant turns: --learn says whether SFT learns them (3 rows)",
        "the last turn has weight 0: it is not learnt (1 rows)",
    ]
    ledger = Counter()
    encode_examples(TOK, found.records, 99, ledger=ledger)
    assert ledger == {"used": 3, "dropped: nothing to learn": 1}


def test_H10_texts_cut_to_prompts_are_counted(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(f"Please write a review of film number {i}\n" for i in range(8)) + "Hi\n")
    found, ledger = load(path), Counter()
    prompts = encode_prompts(TOK, found.records, 4, 99, ledger=ledger)
    assert [TOK.decode(ids) for ids in prompts] == ["Plea"] * 8
    cut, dropped = (
        "8 cut: texts to their first 4 tokens",
        "1 dropped (texts that are too short to cut a prompt from)",
    )
    assert account(ledger) == f"9 rows: 8 used ({cut}), {dropped}"


LONG = [Response("p", " c", where="x.jsonl:1"), Response("long prompt" * 9, " answer", where="x.jsonl:2")]


def test_H14_a_prompt_that_does_not_fit_is_dropped_and_counted_by_default():
    ledger = Counter()
    assert texts_of(encode_examples(TOK, LONG, 32, ledger=ledger)) == ["p c"]
    assert account(ledger) == "2 rows: 1 used, 1 dropped (prompt longer than the context)"
    pairs = [Preference(r.prompt, r.response, " other") for r in LONG]
    ledger = Counter()
    assert [item.record for item in encode_judged(TOK, pairs, 32, ledger=ledger)] == pairs[:1]
    assert account(ledger) == "2 rows: 1 used, 1 dropped (prompt longer than the context)"
    ledger = Counter()
    assert [TOK.decode(ids) for ids in encode_prompts(TOK, LONG, 4, 20, ledger=ledger)] == ["p"]
    assert account(ledger) == "2 rows: 1 used, 1 dropped (prompt leaves no room for the response)"


@pytest.mark.parametrize("encode", [
    lambda: encode_examples(TOK, LONG, 32, "error"), lambda: encode_judged(TOK, LONG, 32, "error"),
    lambda: encode_prompts(TOK, LONG, 4, 31, "error"),
])  # fmt: skip
def test_H14_the_error_names_the_line_the_lengths_and_what_is_possible(encode):
    with pytest.raises(UserError) as e:
        encode()
    assert str(e.value) == (
        "x.jsonl:2: prompt: 100 tokens with <bos>, where the context has room for 31: "
        "shorten it, use --too-long drop or cut, or a model with a longer --context"
    )


def test_H14_cut_drops_the_beginning_of_the_prompt_and_keeps_bos_and_the_answer():
    ledger = Counter()
    rows = encode_examples(TOK, LONG, 32, "cut", ledger)
    answer = [*TOK.encode(" answer"), TOK.eot]
    ids, mask = rows[1]
    assert len(ids) == 32 and ids[0] == TOK.bos and ids[-len(answer) :] == answer
    assert ids[1 : -len(answer)] == TOK.encode(LONG[1].prompt)[-(31 - len(answer)) :]
    assert mask == [False] * (32 - len(answer)) + [True] * len(answer)
    assert account(ledger) == "2 rows: 2 used (1 cut: the beginning of the prompt)"
    ledger = Counter()
    prompt = encode_prompts(TOK, LONG, 4, 20, "cut", ledger)[1]
    assert prompt == [TOK.bos, *TOK.encode(LONG[1].prompt)[-19:]]
    assert account(ledger) == "2 rows: 2 used (1 cut: the beginning of the prompt)"


def test_H14_the_texts_of_a_cut_pair_follow_the_same_prompt():
    pair = Preference("long prompt" * 9, " yes", " a longer answer")
    [item] = encode_judged(TOK, [pair], 32, "cut")
    n = 32 - len(TOK.encode(pair.rejected)) - 1
    assert item.ids[:n] == item.ids_b[:n] and item.ids[0] == TOK.bos
    assert item.ids[n:] == [*TOK.encode(pair.chosen), TOK.eot] and item.ids_b[n:] == [
        *TOK.encode(pair.rejected),
        TOK.eot,
    ]


def test_H14_an_answer_longer_than_the_context_leaves_no_prompt_and_is_cut_itself():
    ledger = Counter()
    [(ids, mask)] = encode_examples(TOK, [Response("prompt", " answer" * 9)], 16, "cut", ledger)
    assert TOK.decode(ids) == " answer answer "[:15] and mask == [False] + [True] * 15
    assert {key for key in ledger if key.startswith("cut")} == {
        "cut: the beginning of the prompt", "cut: the end of the text",
    }  # fmt: skip


def test_H14_no_room_at_all_is_an_error_with_a_remedy():
    for room in (0, -9, 1):
        with pytest.raises(UserError, match=r"no prompt in 2 rows: 2 dropped .*: lower --response-tokens"):
            encode_prompts(TOK, LONG, 4, room)
    assert encode_prompts(TOK, LONG, 4, 1, "cut") == [[TOK.bos]] * 2
    with pytest.raises(UserError, match=r"no prompt in 2 rows: 2 dropped"):
        encode_prompts(TOK, LONG, 4, 0, "cut")
    with pytest.raises(UserError, match="nothing to learn in 2 rows: 2 dropped"):
        encode_examples(TOK, LONG, 1, "cut")  # <bos> alone fills a context of 1


@pytest.mark.parametrize("too_long", ["drop", "cut", "error"])
def test_H14_a_prompt_that_just_fits_stays_whole(too_long):
    record = Response("prompt", "x")
    [(ids, mask)] = encode_examples(TOK, [record], 9, too_long)
    assert ids == [TOK.bos, *TOK.encode("promptx"), TOK.eot] and sum(mask) == 2
    assert encode_prompts(TOK, [record], 4, 7, too_long) == [[TOK.bos, *TOK.encode("prompt")]]
    if too_long != "cut":  # one token of the text is left
        assert encode_examples(TOK, [record], 8, too_long) == [(ids[:-1], mask[:-1])]


def test_a_pair_of_which_one_text_is_cut_counts_as_cut():
    ledger = Counter()
    encode_judged(TOK, [Preference("p", " a", " longer than that")], 9, ledger=ledger)
    assert ledger == {"used": 1, "cut: the end of the text": 1}


def test_H15_few_rows_in_no_split_say_why_and_what_to_do(tmp_path):
    rows = [{"text": f"The plot number {i} is odd"} for i in range(6)]
    found = load(path := write(tmp_path / "few.jsonl", *rows))
    fell = Counter(split_of("", row["text"]) for row in rows)
    assert fell["val"] == 0  # or this test shows nothing
    with pytest.raises(UserError) as e:
        found.select("val", found.genres_among(["movies"]))
    assert str(e.value) == (
        f"{path}: no row is in the split val: of 6 rows there are 5 in train, 1 in test. "
        "A hash of a row's prompt, or of its text without one, puts it into train, val or test, 8 to 1 to 1: "
        "add rows with other prompts (50 different ones nearly always fill each split)"
    )


def test_fifty_different_prompts_nearly_always_fill_each_split():
    """What the message above promises: of 400 files of 50 prompts, a few miss a split (1 % are expected to)."""
    missed = sum(len({split_of(f"file {k} prompt {i}") for i in range(50)}) < 3 for k in range(400))
    assert missed < 12


def test_a_selection_counts_what_it_leaves_out():
    toy = load("toy")
    part = toy.select("val", ["movies"])
    assert part.ledger == {"rows": 400, "left: other splits": 363}
    assert toy.ledger == {"rows": 400}
    everything = toy.select()
    everything.ledger["used"] += 1
    assert everything.records == toy.records and toy.ledger == {
        "rows": 400
    }  # each selection counts for itself
    encode_examples(TOK, part.records, 99, ledger=part.ledger)
    assert account(part.ledger) == "400 rows: 37 used, 363 left (other splits)"


def test_an_account_of_everything():
    ledger = Counter(
        {"rows": 8500, "used": 8386, "cut: the end of the text": 12, "dropped: thumbs down": 100}
    )
    ledger |= Counter({"dropped: empty texts": 2, "skipped: malformed": 12})
    assert account(ledger) == (
        "8,500 rows: 8,386 used (12 cut: the end of the text), 102 dropped (100 thumbs down, 2 empty texts), "
        "12 skipped (malformed)"
    )
    assert account(Counter()) == "0 rows: none"


def test_the_page_explains_every_reason_of_the_ledger():
    root = Path(data.__file__).parents[1]
    code = "".join(file.read_text() for file in sorted((root / "minirlhf").rglob("*.py")))
    reasons = set(re.findall(r'"((?:cut|dropped|skipped): [^"{}]+)"', code)) - {
        "cut: what",
        "dropped: why",
        "skipped: why",
    }
    assert {"dropped: thumbs down", "skipped: malformed", "cut: the end of the text"} <= reasons
    page = (root / "docs/data.md").read_text()
    assert [reason for reason in sorted(reasons) if f"| {reason} |" not in page] == []
    assert set(REMEDIES) <= reasons | {
        f"dropped: pairs that the {x} makes equal" for x in ("cut", "tokenizer")
    }


LOST = ("dropped: ", "skipped: ", "left: ")
GOOD_ROWS = [row for row, *_ in FORMATS]
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(
    ["", " ", "word", "long text " * 9, "\n\nHuman: a\n\nAssistant: b", "a", "\ud800"]
)  # fmt: skip
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(
    st.sampled_from(["a", "b", "tie", "ann"]), VALUES, max_size=3
)
KEYS = sorted({key for row in GOOD_ROWS for key in row} | {"id", "answer"})


@st.composite
def files(draw) -> list[str]:
    """Lines of one file: rows of one format, some of them with other columns, other rows, and nonsense."""
    like = draw(st.sampled_from(GOOD_ROWS))
    lines = []
    for _ in range(draw(st.integers(1, 12))):
        row = dict(draw(st.sampled_from([like] * 6 + GOOD_ROWS)))
        if draw(st.booleans()):
            row[draw(st.sampled_from(KEYS))] = draw(VALUES)
        lines.append(draw(st.sampled_from([json.dumps(row)] * 9 + ["{", "null", "", "  "])))
    return lines


@settings(deadline=None, max_examples=150)
@given(
    files(), st.sampled_from(["error", "drop", "cut"]), st.integers(1, 40), st.sampled_from([None, "train"])
)
def test_used_dropped_skipped_and_left_rows_are_all_rows(tmp_path_factory, lines, too_long, context, split):
    path = write(tmp_path_factory.mktemp("rows") / "x.jsonl", *lines)
    rows = sum(bool(line.strip()) for line in lines)
    try:
        found = load(path, skip_bad=True)
        part = found.select(split)
    except UserError:
        return  # nothing is left to count
    assert part.ledger["rows"] == rows == len(part.records) + lost(part.ledger)
    encoders = [
        lambda ledger: encode_examples(TOK, part.records, context, too_long, ledger),
        lambda ledger: encode_judged(TOK, part.records, context, too_long, ledger),
        lambda ledger: encode_prompts(TOK, part.records, 3, context, too_long, ledger),
    ]
    for encode in encoders:
        ledger = part.ledger.copy()
        try:
            encoded = encode(ledger)
        except UserError as e:
            if too_long == "error" and "prompt: " in str(e):
                continue  # it stopped at the first prompt that does not fit
            encoded = []
        assert ledger["used"] == len(encoded)
        assert ledger["rows"] == rows == ledger["used"] + lost(ledger)
        assert sum(ledger[key] for key in ledger if key.startswith("cut: ")) <= 2 * ledger["used"]
        assert 0 not in ledger.values()
        said = account(ledger)
        assert said.startswith(f"{rows} row") and (f" {ledger['used']} used" in said) == bool(ledger["used"])
        for sequence in encoded:
            ids = getattr(sequence, "ids", None) or (sequence[0] if isinstance(sequence, tuple) else sequence)
            assert ids[0] == TOK.bos and len(ids) <= context


def lost(ledger: Counter) -> int:
    return sum(n for key, n in ledger.items() if key.startswith(LOST))


def test_2000_damaged_rows_are_records_or_one_line(tmp_path):
    rng, read, refused = random.Random(0), 0, 0
    path = tmp_path / "x.jsonl"
    for _ in range(2000):
        row = dict(rng.choice(GOOD_ROWS))
        if rng.random() < 0.5:
            row[rng.choice(KEYS)] = rng.choice(
                [None, 3, -1.5, "x", "", [], [2], {}, {"a": 1}, {"ann": "b"}, [user("Hi")], True]
            )
        line = bytearray(json.dumps(row).encode())
        for _ in range(rng.choice([0, 1, 1, 4])):
            at, what = rng.randrange(len(line)), rng.random()
            if what < 0.4:
                line[at] = rng.randrange(256)
            elif what < 0.6:
                del line[at : at + rng.randint(1, 9)]
            elif what < 0.8:
                line[at:at] = rng.choice([b"null", b"[", b"}", b'"', b"1e999", b"\\ud800", b"-", b"0" * 5000])
            else:
                other = json.dumps(rng.choice(GOOD_ROWS)).encode()
                line[at:] = other[rng.randrange(len(other)) :]
            line = line or bytearray(b"{}")
        path.write_bytes(bytes(line) + b"\n")
        try:
            found = load(path)
            found.describe().encode()
            encode_prompts(TOK, found.records, 1, 30, "cut")
            encode_judged(TOK, found.records, 30, "cut")
            encode_examples(TOK, found.records, 30, "cut")
            read += 1
        except UserError as e:
            assert "\n" not in str(e)
            refused += 1
    assert read > 100 and refused > 500


# ---------------------------------------------------------------- pipes, folders, sizes


def test_H21_files_that_begin_with_a_dot_are_passed_over_and_others_are_named(tmp_path):
    (tmp_path / "._train.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / ".lock").write_text("")
    write(tmp_path / "train.jsonl", {"text": "a"})
    assert not load(tmp_path).remarks and load(tmp_path).ledger == {"rows": 1}
    (tmp_path / "more.jsonl").mkdir()
    for name in ("README.md", "x.csv", "dataset_info.json"):
        (tmp_path / name).write_text("not data")
    found = load(tmp_path)
    assert found.sources == [str(tmp_path / "train.jsonl")]
    assert found.remarks == ["passed over 4 other files: README.md, dataset_info.json, more.jsonl, ..."]


NULLS = {"rating": None, "ratings": None, "chosen": None, "rejected": None, "votes": None, "label": None, "genre": None,
         "scale": None, "messages": None, "completion": None, "response": None, "text": None}  # fmt: skip


@pytest.mark.parametrize("row, kind, record", FORMATS)
def test_H21_a_null_column_is_an_absent_one(tmp_path, row, kind, record):
    found, plain = load(write(tmp_path / "x.jsonl", NULLS | row)), load(write(tmp_path / "y.jsonl", row))
    assert (found.kind, found.records, found.remarks) == (kind, [record], plain.remarks)


def test_H21_a_rater_who_gave_null_was_not_asked(tmp_path):
    rows = [{"text": "t", "ratings": {"ann": 2, "bob": None, "cy": 4}, "scale": [1, 5]}]
    [record] = load(write(tmp_path / "x.jsonl", *rows)).records
    assert record.ratings == (2, 4) and record.raters == ("ann", "cy")
    pair = {"prompt": "p", "response_a": "a", "response_b": "b"}
    rows = [pair | {"votes": {"ann": "a", "bob": None}}, pair | {"votes": {"a": 2, "b": 1, "tie": None}}]
    records = load(write(tmp_path / "y.jsonl", *rows)).records
    assert records == [Preference("p", "a", "b", 1.0, (1,), ("ann",)), Preference("p", "a", "b", 2 / 3)]


def run_inspect(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minirlhf.data", "inspect", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, cwd=Path(data.__file__).parents[1], timeout=60, **kwargs
    )


ROWS = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("content", [ROWS, gzip.compress(ROWS)], ids=["plain", "gzip"])
def test_pipes_are_read(tmp_path, content):
    """A named one, and the one behind /dev/fd/N, which `<(command)` gives."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert [r.response for r in load(pipe).records] == ["one", "two"]
    writer.join()
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    assert len(load(f"/dev/fd/{reading}").records) == 2
    os.close(reading)


@pytest.mark.parametrize("content", [ROWS, gzip.compress(ROWS)], ids=["plain", "gzip"])
def test_standard_input_from_a_file_is_read(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with open(tmp_path / "x", "rb") as file:
        assert len(load(f"/dev/fd/{file.fileno()}").records) == 2


def test_standard_input_is_read():
    assert b"/dev/stdin: 2 text rows" in run_inspect("/dev/stdin", input=ROWS).stdout


def test_sources_that_cannot_be_read_are_one_line(tmp_path):
    def message(source):
        with pytest.raises(UserError) as e:
            load(source)
        assert "\n" not in str(e.value)
        return str(e.value)

    long = "x" * 300 + ".jsonl"
    assert message(long) == f"{long}: cannot be read: File name too long"
    assert (
        message("/dev/null")
        == "/dev/null: a terminal or a device holds no rows: pipe them in, or name a file"
    )
    assert message("") == "the source of the data has an empty name: name a file, a folder, vader or toy"
    assert "cannot be read: " in message("a\0b.jsonl")
    assert message("no\nsuch.jsonl") == "no\\nsuch.jsonl: no such file or folder (built in: vader, toy)"
    write(tmp_path / "x.jsonl", ROWS)
    assert message(tmp_path / "x.jsonl/y.jsonl").endswith("cannot be read: Not a directory")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "cannot be read: " in message(tmp_path / "loop.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "cannot be read: No such device or address" in message(tmp_path / "socket")


def test_a_small_file_that_decompresses_to_gigabytes_is_refused(tmp_path, monkeypatch):
    bomb = tmp_path / "x.jsonl.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(80):
            file.write(b"\n" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"x.jsonl.gz: holds more than 67,108,864 bytes: unpack or split it first"
    ):
        load(bomb)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20  # it was read in blocks
    tracemalloc.stop()
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    reading, writing = os.pipe()
    os.write(writing, ROWS)
    os.close(writing)
    with pytest.raises(UserError, match=f"/dev/fd/{reading}: holds more than 10 bytes"):
        load(f"/dev/fd/{reading}")
    os.close(reading)


def test_lines_longer_than_a_block_and_blocks_that_end_anywhere(tmp_path, monkeypatch):
    texts = ["a" * 50, "  b ", "", "c" * 7, "   ", "", "   d\u00e9" * 9]
    path = tmp_path / "x.txt"
    path.write_text("\n".join(texts))
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(sources, "BLOCK", block)
        found = load(path)
        assert [r.response for r in found.records] == [text for text in texts if text.strip()]
        assert [r.where for r in found.records] == [f"{path}:{n}" for n in (1, 2, 4, 7)]
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_toy_dataset_is_that_of_the_first_release():
    toy = load("toy")
    assert toy.sha256 == "df81063e36b648e9674a60c8c67cb28bccddb95cffbee464ce42ffa93541b482"
    splits = "".join(split_of("", r.response)[1] for r in toy.records)
    assert hashlib.sha256(splits.encode()).hexdigest()[:16] == "2280aec347a844eb"


# ---------------------------------------------------------------- the built-in dataset

TABLES = {
    "movieReviewSnippets": [("1", "A ''fine''  film &amp;amp; more ", [2, 3]), ("2", "Dull.", [-1, -2])],
    "amazonReviewSnippets": [("1_1", "it works", [1, 1]), ("1_2", "it broke", [-3, -3])],
    "nytEditorialSnippets": [("1_1", "He said: ''Read 'A.'''", [0, 0]), ("1_2", "Dull.", [0, -1])],
    "tweets": [("1", "x &lt;3", [4, 4]), ("2", "mixed up", [1, 1])],
}
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
LEXICON = "vaderSentiment/vader_lexicon.txt"


def tarball(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def inner_members() -> dict[str, bytes]:
    members = {}
    for stem, rows in TABLES.items():
        truth = "".join(f"{key}\t{sum(s) / len(s)}\t{text}\n" for key, text, s in rows)
        off = lambda key, stem=stem: 0.5 if (stem, key) == ("tweets", "2") else 0  # one id, two items
        rated = [f"{key}\t{sum(s) / len(s) + off(key)}\t0.5\t{s}\n" for key, _, s in rows]
        if stem == "amazonReviewSnippets":
            rated = ["\ufeff" + rated[1].rstrip() + "\r\n", rated[0]]  # a BOM, another order
        members[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = truth.encode()
        members[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = "".join(rated).encode()
    return members


def sdist(inner: dict | None = None, **changes) -> bytes:
    lexicon = b"good\t1.9\t0.9\t[2, 1]\n:)\t2.0\t1.1\t[2, 2]\ngood\t0\t0\t[0, 0]\n"
    members = {
        LEXICON: lexicon,
        INNER: tarball(inner or inner_members()),
        "setup.py": b"raise SystemExit('executed')",
    }
    return tarball({f"vaderSentiment-3.3.2/{n}": c for n, c in (members | changes).items()})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(content): put a source distribution into the data folder and make its hash the expected one."""

    def no_pip(*args, **kwargs):
        raise AssertionError("pip must not run")

    monkeypatch.setattr(subprocess, "run", no_pip)

    def place(content: bytes) -> Path:
        monkeypatch.setattr(vader, "SHA256", hashlib.sha256(content).hexdigest())
        (tmp_path / vader.SDIST).write_bytes(content)
        return tmp_path

    return place


def test_vader_is_cleaned_joined_and_deduplicated(place):
    found = load("vader", data_dir=place(sdist()))
    rows = {r.response: r for r in found.records}
    assert set(rows) == {
        'A "fine" film & more', "Dull.", "it works", "it broke", "He said: \"Read 'A.'\"", "x <3", " good", " :)",
    }  # fmt: skip
    assert rows["it works"].ratings == (1, 1) and rows["it broke"].ratings == (
        -3,
        -3,
    )  # joined by id, not by line
    assert rows["Dull."] == Response(
        "", "Dull.", -1.5, (-1, -2), (-4, 4), "movies"
    )  # the first of equal texts
    assert rows[" good"].ratings == (2, 1) and rows[" good"].genre == "words"
    assert found.ledger == {"rows": 11, "dropped: two texts under one id": 1, "dropped: duplicate texts": 2}
    assert Counter(r.genre for r in found.records) == {
        "movies": 2,
        "products": 2,
        "editorials": 1,
        "tweets": 1,
        "words": 2,
    }
    assert "vader: 8 rated rows by human raters" in found.describe()


@pytest.mark.parametrize("raw, text", [
    ("''quoted'' word", '"quoted" word'), ("it''s 'so'", "it\"s 'so'"), ("a 'B.'''", "a 'B.'\""),
    ("R&amp;B &amp;amp; &lt;3", "R&B & <3"), (" a \t b\u00a0c ", "a b c"), ("caf\u00e9 \u2013", "caf\u00e9 \u2013"),
])  # fmt: skip
def test_clean(raw, text):
    assert vader.clean(raw) == text


def test_the_cache_answers_without_source_and_without_pip(place):
    folder = place(sdist())
    first = load("vader", data_dir=folder)
    (folder / vader.SDIST).unlink()
    assert sorted(os.listdir(folder)) == ["vader.jsonl"]  # one file, no temporary left
    assert load("vader", data_dir=folder) == first


@pytest.mark.parametrize("damage", [
    lambda b: b[:-20], lambda b: b"", lambda b: b"[]\n" + b.split(b"\n", 1)[1],
    lambda b: b.replace(b"[2, 1]", b"[2, 2]"), lambda b: b.replace(b'"format": 2', b'"format": 0'),
    lambda b: b.replace(b'"source": "', b'"source": "0'),
])  # fmt: skip
def test_a_damaged_or_older_cache_is_rebuilt(place, damage):
    folder = place(sdist())
    first, cache = load("vader", data_dir=folder), folder / "vader.jsonl"
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert cache.read_bytes() != whole
    assert load("vader", data_dir=folder) == first and cache.read_bytes() == whole


def test_a_crash_while_caching_leaves_nothing(place, monkeypatch):
    folder = place(sdist())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        UserError, match="vader.jsonl: cannot be written: No space left on device: see --data-dir"
    ):
        load("vader", data_dir=folder)
    assert os.listdir(folder) == [vader.SDIST]


def test_the_cache_folder_is_the_users(place, monkeypatch):
    folder = place(sdist())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "cache" / "minirlhf").mkdir(parents=True)
    (folder / vader.SDIST).rename(folder / "cache" / "minirlhf" / vader.SDIST)
    assert load("vader").sources == [str(folder / "cache" / "minirlhf" / "vader.jsonl")]


def test_a_source_with_another_hash_is_refused(place):
    folder = place(sdist())
    (folder / vader.SDIST).write_bytes(sdist() + b"x")
    with pytest.raises(UserError) as e:
        load("vader", data_dir=folder)
    assert str(e.value) == f"{folder / vader.SDIST}: sha256 is not {vader.SHA256}: delete it"
    assert os.listdir(folder) == [vader.SDIST]


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"vaderSentiment-3.3.2/{LEXICON}")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("content, message", [
    (lambda: sdist(**{LEXICON: link(tarfile.SYMTYPE, "/etc/passwd")}), "vader_lexicon.txt: a link or too large"),
    (lambda: sdist(**{LEXICON: link(tarfile.LNKTYPE, "vaderSentiment-3.3.2/setup.py")}), "a link or too large"),
    (lambda: sdist(**{LEXICON: link(tarfile.FIFOTYPE, "")}), "a link or too large"),
    (lambda: sdist(**{LEXICON: bytes(2000)}), "vader_lexicon.txt: a link or too large"),
    (lambda: sdist({"hutto_ICWSM_2014/../tweets_GroundTruth.txt": b"x"}), "damaged: .*_GroundTruth.txt.*not found"),
    (lambda: sdist(**{INNER: b"no archive"}), "damaged: "),
    (lambda: sdist()[:600], "damaged: "),
], ids=["symlink", "hardlink", "fifo", "oversize", "missing", "not-tar", "cut"])  # fmt: skip
def test_a_malicious_or_damaged_archive_is_refused(place, monkeypatch, content, message):
    folder = place(content())
    monkeypatch.setattr(vader, "MAX_MEMBER", 1500)
    with pytest.raises(UserError, match=f"{vader.SDIST}: .*{message}"):
        load("vader", data_dir=folder)
    assert os.listdir(folder) == [vader.SDIST]


def test_members_of_other_names_are_ignored_and_nothing_is_unpacked(place):
    evil = {"../evil.txt": b"x", "/tmp/evil.txt": b"x", f"../{LEXICON}": b"x", f"x/{LEXICON}": b"x"}
    folder = place(sdist(inner_members() | evil, **evil))
    load("vader", data_dir=folder)
    assert sorted(os.listdir(folder)) == sorted(["vader.jsonl", vader.SDIST])
    assert not (folder.parent / "evil.txt").exists() and not Path("/tmp/evil.txt").exists()


def test_pip_fetches_the_pinned_version_by_hash(place, monkeypatch, tmp_path):
    content = sdist()
    (place(content) / vader.SDIST).unlink()
    seen = {}

    def pip(command, **kwargs):
        seen.update(kwargs, command=command, pins=Path(command[command.index("-r") + 1]).read_text())
        Path(command[command.index("-d") + 1], vader.SDIST).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert len(load("vader", data_dir=tmp_path).records) == 8
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-binary", "--require-hashes"} <= set(seen["command"])
    assert seen["pins"] == f"vaderSentiment==3.3.2 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"
    assert seen["capture_output"] and seen["timeout"]


NO_MATCH = "WARNING: Retrying\nERROR: Could not find\nERROR: No matching distribution found for vaderSentiment==3.3.2\n"


@pytest.mark.parametrize("outcome, reason", [
    (subprocess.CompletedProcess([], 1, "", NO_MATCH), NO_MATCH.splitlines()[-1]),
    (subprocess.CompletedProcess([], 1, "", "python: No module named pip\n"), "python: No module named pip"),
    (subprocess.CompletedProcess([], 0, "", ""), "pip"),
    (subprocess.TimeoutExpired("pip", 300), "pip: TimeoutExpired"),
    (FileNotFoundError(2, "python"), "pip: FileNotFoundError"),
])  # fmt: skip
def test_offline_tells_the_reason_and_two_ways_out(monkeypatch, tmp_path, outcome, reason):
    def pip(*args, **kwargs):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError) as e:
        load("vader", data_dir=tmp_path)
    way_out = "use --data toy, or put vaderSentiment-3.3.2.tar.gz into --data-dir"
    assert str(e.value) == f"vader: cannot be fetched ({reason}): {way_out}"
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- token batches


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.integers(1, 100), st.booleans())
def test_D19_the_prompts_ids_are_a_prefix_masked_and_the_end_is_trained(prompt, completion, context, eos):
    prompt, completion = (t.encode(errors="replace").decode() for t in (prompt, completion))
    head, body = [TOK.bos, *TOK.encode(prompt)], TOK.encode(completion)
    if len(head) >= context:
        with pytest.raises(
            UserError,
            match=rf"prompt: {len(head)} tokens with <bos>, where the context has room for {context - 1}:",
        ):
            encode_example(TOK, prompt, completion, context, eos)
        return
    ids, mask = encode_example(TOK, prompt, completion, context, eos)
    assert len(ids) == len(mask) <= context
    assert ids[: len(head)] == head and not any(mask[: len(head)]) and all(mask[len(head) :])
    fits = len(head) + len(body) + eos <= context
    assert (ids[-1] == TOK.eot) == (fits and eos)  # what was cut has no end
    assert ids[len(head) :] == (body + [TOK.eot] * eos)[: context - len(head)]


def test_D19_rows_with_nothing_to_train_drop_out():
    records = [
        Response("p", "c"),
        Response("p", ""),
        Response("p", " "),
        Response("", "text"),
        Preference("p", "x", "y"),
    ]
    ledger = Counter(rows=5)
    rows = encode_examples(TOK, records, 16, ledger=ledger)
    assert [TOK.decode(ids) for ids, _ in rows] == ["pc", "text", "px"]
    assert all(any(mask[1:]) for _, mask in rows)
    assert account(ledger) == "5 rows: 3 used, 2 dropped (nothing to learn)"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=5),
    st.integers(0, 5),
    st.sampled_from(["left", "right"]),
    st.integers(1, 15),
)
def test_D6_masks_come_from_lengths_though_real_tokens_equal_pad(rows, pad, side, least):
    tokens, mask = collate(rows, pad, side, least)
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape
    width = tokens.shape[1]
    assert width == max([least, *map(len, rows)])
    for row, t, m in zip(rows, tokens, mask, strict=True):
        assert t[m].tolist() == row and (t[~m] == pad).all()
        real = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        assert m[real].all() and int(m.sum()) == len(row)


def test_collate_by_hand():
    tokens, mask = collate([[5, 0], [6, 7, 0]], pad=0, side="left", width=4)
    assert tokens.tolist() == [[0, 0, 5, 0], [0, 6, 7, 0]]
    assert mask.tolist() == [[False, False, True, True], [False, True, True, True]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_D21_batches_depend_on_seed_and_epoch_alone(n, batch_size, seed, epoch, by_length):
    lengths = [(i * 37) % 11 for i in range(n)] if by_length else None
    torch.manual_seed(seed)
    first = list(batches(n, batch_size, seed, epoch, lengths))
    torch.rand(3)
    assert first == list(batches(n, batch_size, seed, epoch, lengths))
    assert sorted(i for batch in first for i in batch) == list(range(n))
    assert sorted(map(len, first), reverse=True) == [
        len(range(i, min(n, i + batch_size))) for i in range(0, n, batch_size)
    ]


def test_D21_epochs_and_seeds_differ():
    orders = {tuple(map(tuple, batches(64, 8, seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))
def test_D21_the_cursor_walks_through_epochs_whatever_the_start(n, batch_size, seed):
    walk = [i for iteration in range(6) for i in data.cursor(n, batch_size, seed, iteration)]
    assert walk[-batch_size:] == data.cursor(n, batch_size, seed, 5)
    for start in range(0, len(walk) - n + 1, n):
        assert sorted(walk[start : start + n]) == list(range(n))  # an epoch meets each prompt once


def test_prompts_are_a_records_own_or_the_beginning_of_its_text():
    records = [Response("own prompt", "x"), Response("", "abcdef"), Response("", "abc")]
    found = encode_prompts(TOK, records, 3, 99)
    assert found == [[TOK.bos, *TOK.encode("own prompt")], [TOK.bos, *TOK.encode("abc")]]
    with pytest.raises(UserError) as e:
        encode_prompts(TOK, records[1:], 9, 99)
    counted = "2 rows: 2 dropped (texts that are too short to cut a prompt from)"
    assert str(e.value) == f"no prompt in {counted}: lower --prompt-tokens"


def test_batches_by_length_waste_little_padding_and_stay_random():
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    waste = lambda found: sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in found)
    sorted_batches = batches(640, 8, 0, 0, lengths)
    assert waste(sorted_batches) < 0.2 * waste(batches(640, 8, 0, 0))
    longest = [max(lengths[i] for i in b) for b in sorted_batches]
    assert longest != sorted(longest) and {tuple(b) for b in batches(640, 8, 0, 1, lengths)} != set(
        map(tuple, sorted_batches)
    )


# ---------------------------------------------------------------- inspect


def inspect(monkeypatch, capsys, *args) -> str:
    monkeypatch.setattr(sys, "argv", ["data", "inspect", *map(str, args)])
    inspect_tool.main()
    return capsys.readouterr().out


def test_inspect_prints_counts_splits_histogram_agreement_and_examples(monkeypatch, capsys):
    out = inspect(monkeypatch, capsys, "toy", "-n", 2)
    assert "toy: 400 rated rows by SIMULATED raters" in out
    assert "account: 400 rows: 400 kept\nsplits: 312 train, 37 val, 51 test\n" in out
    assert "movies: 400 items, 5.0 raters each, agreement (Krippendorff's alpha) 0." in out
    counts = [int(line.split()[1]) for line in out.splitlines() if line[:4].strip().lstrip("-").isdigit()]
    assert len(counts) == 9 and sum(counts) == 400
    shown = re.findall(
        r"^toy: rated, \w+; rating \S+ of -4 to 4\n  learnt     \|The plot is .*\|<eot>$", out, re.M
    )
    assert len(shown) == 2


def test_inspect_shows_tokens_and_what_is_trained(monkeypatch, capsys, tmp_path):
    from minirlhf.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: TOK))
    path = write(
        tmp_path / "x.jsonl", {"prompt": "a\n", "completion": "bc"}, "{", {"prompt": "d", "completion": "e"}
    )
    out = inspect(monkeypatch, capsys, path, "--skip-bad", "--tokenizer", "any")
    assert re.search(r"\n\S+x.jsonl:1: completion, \w+; from completion, prompt\n", out)
    assert "\n  read       |<bos>|a|\\n\n  learnt     |b|c|<eot>\n" in out
    assert "3 rows: 2 kept, 1 skipped (malformed)" in out


def test_inspect_takes_single_ratings_and_stars(monkeypatch, capsys, tmp_path):
    rows = [{"text": f"t{i}", "rating": 1 + i % 5} for i in range(20)]
    out = inspect(monkeypatch, capsys, write(tmp_path / "x.jsonl", *rows))
    assert "on the scale (1, 5) (inferred)" in out and "ratings: 20 items, 1.0 raters each" in out


def test_H11_one_rating_per_item_is_no_agreement(monkeypatch, capsys, tmp_path):
    rows = [
        {"text": f"The film number {i} is {('awful', 'great')[i % 2]} indeed", "rating": 2 + 2 * (i % 2)}
        for i in range(20)
    ]
    out = inspect(monkeypatch, capsys, write(tmp_path / "one.jsonl", *rows))
    assert "1.0 raters each, agreement (Krippendorff's alpha) -\n" in out


def test_H19_slider_ratings_are_binned(monkeypatch, capsys, tmp_path):
    rows = [{"text": f"Film {i}", "ratings": {"ann": round(i * 7.13 % 100, 3), "bob": round(i * 3.77 % 100, 3)},
             "scale": [0, 100]} for i in range(400)]  # fmt: skip
    out = inspect(monkeypatch, capsys, write(tmp_path / "s.jsonl", *rows))
    assert re.search(r"2.0 raters each, agreement \(Krippendorff's alpha\) -?0\.\d{3}\n", out)
    bars = re.findall(r"^ *(\S+) to (\S+) +(\d+) #*$", out, re.M)
    assert len(bars) == 20 and sum(int(n) for *_, n in bars) == 400
    assert bars[0][:2] == ("0", "5") and bars[-1][:2] == ("95", "100")


@pytest.mark.parametrize("scale", [[0, 1], [-1e8, 1e8], [0, 0.001]])
def test_histograms_of_any_scale_are_short(monkeypatch, capsys, tmp_path, scale):
    rows = [{"text": f"t{i}", "rating": scale[i % 2], "scale": scale} for i in range(6)]
    out = inspect(monkeypatch, capsys, write(tmp_path / "x.jsonl", *rows))
    assert len(out.splitlines()) < 40 and out.count(" 3 ###") == 2


def test_inspect_counts_what_a_context_cuts_and_drops(monkeypatch, capsys, tmp_path):
    from minirlhf.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: TOK))
    rows = [{"prompt": "p" * n, "completion": " answer"} for n in (1, 8, 99)]
    path = write(tmp_path / "x.jsonl", *rows)
    out = inspect(monkeypatch, capsys, path, "--tokenizer", "any", "--context", 12)
    account_line = "3 rows: 2 used (1 cut: the end of the text), 1 dropped (prompt longer than the context)"
    assert f"SFT at 12 tokens: {account_line}\n" in out
    assert "tokens of texts: median 17, 95 % at most 99, longest 108\n" in out
    assert "tokens of their prompts: median 9, 95 % at most 91, longest 100\n" in out
    path = write(tmp_path / "y.jsonl", {"prompt": "p"})
    out = inspect(monkeypatch, capsys, path, "--tokenizer", "any", "--context", 12)
    assert "SFT at 12 tokens: 1 row: 1 dropped (nothing to learn)\n" in out
    with pytest.raises(UserError, match="--context counts tokens: name a --tokenizer"):
        inspect(monkeypatch, capsys, path, "--context", 12)


def test_control_characters_of_the_data_reach_no_terminal(monkeypatch, capsys, tmp_path):
    out = inspect(
        monkeypatch, capsys, write(tmp_path / "x.jsonl", {"prompt": "a\x1b[31m", "completion": "b\r\n"})
    )
    assert "|a\\x1b[31m\n" in out and "|b\\r\\n|<eot>\n" in out and "\x1b" not in out


@pytest.mark.parametrize("options, message", [
    (["-n", "-1"], "-n: must be at least 0"), (["-n", "nan"], "-n: must be a whole number"),
    (["--context", "0"], "--context: must be at least 1"), (["--skip"], "unrecognized arguments: --skip"),
])  # fmt: skip
def test_numbers_of_options_are_range_checked(monkeypatch, capsys, options, message):
    with pytest.raises(UserError, match=message):
        inspect(monkeypatch, capsys, "toy", *options)


def test_ctrl_c_is_one_line(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "minirlhf.data", "inspect", str(pipe)]
    root = Path(data.__file__).parents[1]
    running = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(pipe, "wb"):  # returns once the command reads
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err.strip()) == (130, "", "interrupted")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "minirlhf.data", "inspect", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none.jsonl'}: no such file or folder (built in: vader, toy)\n"
