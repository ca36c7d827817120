"""data.py: what is accepted, what is refused and with which words, the built-in dataset, token batches. No network."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, data
from minirlhf.data import Preference, Response, batches, collate, encode_all, encode_example, load, split_of


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
    assert not found.skipped and not found.dropped
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
    (tmp_path / "README.md").write_text("not data")
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
    ({"text": None}, "text: expected text, got None"),
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
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages: expected messages"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages: expected messages"),
    ({"messages": [user("a"), bot(["part"])]}, "messages: expected messages"),
    ({"messages": [bot("a"), user("b")]}, "messages: the last turn must be the assistant's"),
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
    assert "\n" not in str(e.value)


def test_skip_bad_counts_and_goes_on(tmp_path):
    path = write(
        tmp_path / "x.jsonl", {"text": "a"}, "{", {"text": 1}, {"prompt": "another kind"}, {"text": "b"}
    )
    found = load(path, skip_bad=True)
    assert [r.response for r in found.records] == ["a", "b"] and len(found.skipped) == 3
    assert f"skipped 3 bad rows, first {path}:2: row: not JSON" in found.describe()


def test_one_kind_and_one_scale_to_a_source(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"})
    b = write(tmp_path / "b.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(UserError) as e:
        load(tmp_path)
    assert str(e.value).startswith(
        f"{b}:1: keys: (kind, scale) ('completion', None) after ('text', None): keep one"
    )
    rows = [{"text": "t", "rating": 3, "scale": [1, 5]}, {"text": "u", "rating": 3, "scale": [0, 4]}]
    with pytest.raises(UserError, match=r"c.jsonl:2: keys: .*\(0, 4\)\) after \('rated', \(1, 5\)\)"):
        load(write(tmp_path / "c.jsonl", *rows))


def test_a_source_that_cannot_be_read(tmp_path):
    def refuses(path, message):
        with pytest.raises(UserError) as e:
            load(path)
        assert str(e.value).startswith(f"{path}: {message}") and "\n" not in str(e.value), str(e.value)

    refuses(tmp_path / "none.jsonl", "no such file or folder (built in: vader, toy)")
    refuses(tmp_path, "expected .jsonl, .jsonl.gz, .txt, or a folder of them")
    refuses(write(tmp_path / "x.csv", "a,b"), "expected .jsonl, .jsonl.gz, .txt, or a folder of them")
    refuses(write(tmp_path / "empty.jsonl", ""), "empty: no usable row (0 bad, 0 dropped)")
    refuses(write(tmp_path / "blank.jsonl", {"text": " "}), "empty: no usable row (0 bad, 1 dropped)")
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
    assert found.dropped == {"identical pairs": 2} and "dropped 2 identical pairs" in found.describe()


def test_empty_texts_are_dropped_and_counted(tmp_path):
    found = load(write(tmp_path / "x.jsonl", {"text": ""}, {"text": "a"}, {"text": " \n"}))
    assert [r.response for r in found.records] == ["a"] and found.dropped == {"empty texts": 2}


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
    with pytest.raises(
        UserError, match=r"toy: none of 400 rows has split val and one of the genres \['tweets'\]"
    ):
        toy.select("val", ["tweets"])


def test_genres_are_a_choice_only_where_there_are_genres(tmp_path):
    assert load("toy").genres_among(["tweets"]) == ["tweets"]
    plain = load(write(tmp_path / "x.jsonl", {"text": "a"}))
    assert plain.genres_among(["tweets"]) is None and plain.select(genres=None).records == plain.records


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

    monkeypatch.setattr(data.subprocess, "run", no_pip)

    def place(content: bytes) -> Path:
        monkeypatch.setattr(data, "VADER_SHA256", hashlib.sha256(content).hexdigest())
        (tmp_path / data.SDIST).write_bytes(content)
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
    assert found.dropped == {"mismatched": 1, "duplicate": 2}
    assert Counter(r.genre for r in found.records) == {
        "movies": 2,
        "products": 2,
        "editorials": 1,
        "tweets": 1,
        "words": 2,
    }
    assert "8 rated rows by human raters; dropped 1 mismatched; dropped 2 duplicate" in found.describe()


@pytest.mark.parametrize("raw, text", [
    ("''quoted'' word", '"quoted" word'), ("it''s 'so'", "it\"s 'so'"), ("a 'B.'''", "a 'B.'\""),
    ("R&amp;B &amp;amp; &lt;3", "R&B & <3"), (" a \t b\u00a0c ", "a b c"), ("caf\u00e9 \u2013", "caf\u00e9 \u2013"),
])  # fmt: skip
def test_clean(raw, text):
    assert data.clean(raw) == text


def test_the_cache_answers_without_source_and_without_pip(place):
    folder = place(sdist())
    first = load("vader", data_dir=folder)
    (folder / data.SDIST).unlink()
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

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(
        UserError, match="vader.jsonl: cannot be written: No space left on device: see --data-dir"
    ):
        load("vader", data_dir=folder)
    assert os.listdir(folder) == [data.SDIST]


def test_the_cache_folder_is_the_users(place, monkeypatch):
    folder = place(sdist())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "cache" / "minirlhf").mkdir(parents=True)
    (folder / data.SDIST).rename(folder / "cache" / "minirlhf" / data.SDIST)
    assert load("vader").sources == [str(folder / "cache" / "minirlhf" / "vader.jsonl")]


def test_a_source_with_another_hash_is_refused(place):
    folder = place(sdist())
    (folder / data.SDIST).write_bytes(sdist() + b"x")
    with pytest.raises(UserError) as e:
        load("vader", data_dir=folder)
    assert str(e.value) == f"{folder / data.SDIST}: sha256 is not {data.VADER_SHA256}: delete it"
    assert os.listdir(folder) == [data.SDIST]


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
    monkeypatch.setattr(data, "MAX_MEMBER", 1500)
    with pytest.raises(UserError, match=f"{data.SDIST}: .*{message}"):
        load("vader", data_dir=folder)
    assert os.listdir(folder) == [data.SDIST]


def test_members_of_other_names_are_ignored_and_nothing_is_unpacked(place):
    evil = {"../evil.txt": b"x", "/tmp/evil.txt": b"x", f"../{LEXICON}": b"x", f"x/{LEXICON}": b"x"}
    folder = place(sdist(inner_members() | evil, **evil))
    load("vader", data_dir=folder)
    assert sorted(os.listdir(folder)) == sorted(["vader.jsonl", data.SDIST])
    assert not (folder.parent / "evil.txt").exists() and not Path("/tmp/evil.txt").exists()


def test_pip_fetches_the_pinned_version_by_hash(place, monkeypatch, tmp_path):
    content = sdist()
    (place(content) / data.SDIST).unlink()
    seen = {}

    def pip(command, **kwargs):
        seen.update(kwargs, command=command, pins=Path(command[command.index("-r") + 1]).read_text())
        Path(command[command.index("-d") + 1], data.SDIST).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", pip)
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

    monkeypatch.setattr(data.subprocess, "run", pip)
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
            UserError, match=rf"prompt: {len(head)} tokens, context {context}: raise --context"
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
    rows = encode_all(TOK, records, 16)
    assert [TOK.decode(ids) for ids, _ in rows] == ["pc", "text", "px"]
    assert all(any(mask[1:]) for _, mask in rows)


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
    found = data.prompts_of(records, TOK, 3)
    assert found == [[TOK.bos, *TOK.encode("own prompt")], [TOK.bos, *TOK.encode("abc")]]
    with pytest.raises(UserError, match="no text is longer than 9 tokens: lower --prompt-tokens"):
        data.prompts_of(records[1:], TOK, 9)


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
    data.main()
    return capsys.readouterr().out


def test_inspect_prints_counts_splits_histogram_agreement_and_examples(monkeypatch, capsys):
    out = inspect(monkeypatch, capsys, "toy", "-n", 2)
    assert "toy: 400 rated rows by SIMULATED raters" in out and "'train': 3" in out
    assert "movies: 400 items, 5.0 raters each, agreement (Krippendorff's alpha) 0." in out
    counts = [int(line.split()[1]) for line in out.splitlines() if line[:4].strip().lstrip("-").isdigit()]
    assert len(counts) == 9 and sum(counts) == 400
    assert out.count("[[The plot is") == 2 and out.count("<eot>]]") == 2


def test_inspect_shows_tokens_and_what_is_trained(monkeypatch, capsys, tmp_path):
    from minirlhf.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, source: TOK))
    path = write(
        tmp_path / "x.jsonl", {"prompt": "a\n", "completion": "bc"}, "{", {"prompt": "d", "completion": "e"}
    )
    out = inspect(monkeypatch, capsys, path, "--skip-bad", "--tokenizer", "any")
    assert "<bos>|a|\\n|[[|b|c|<eot>]]" in out and "2 completion rows; skipped 1 bad rows" in out


def test_inspect_takes_single_ratings_and_stars(monkeypatch, capsys, tmp_path):
    rows = [{"text": f"t{i}", "rating": 1 + i % 5} for i in range(20)]
    out = inspect(monkeypatch, capsys, write(tmp_path / "x.jsonl", *rows))
    assert "on the scale (1, 5) (inferred)" in out and "ratings: 20 items, 1.0 raters each" in out


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "minirlhf.data", "inspect", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none.jsonl'}: no such file or folder (built in: vader, toy)\n"
