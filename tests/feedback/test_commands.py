"""The commands as a user runs them, and the whole loop of docs/feedback.md with a scripted rater."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirlhf import UserError, checkpoint, data
from minirlhf.feedback.__main__ import parse
from minirlhf.feedback.add import add
from minirlhf.feedback.export import export
from minirlhf.feedback.rate import rate
from minirlhf.feedback.sample import choose
from minirlhf.feedback.stats import print_stats, summarise
from minirlhf.feedback.store import Policy, Store
from minirlhf.measure.agreement import krippendorff_alpha
from tests.feedback.conftest import make_items

ROOT = Path(__file__).resolve().parents[2]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------- add


def test_add(tmp_path, capsys):
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "y", "gold": "a"},
        {"response": "z", "gold": 4},
        {"response": "w"},
    ]
    for said in ("3 new items, 0 already there", "0 new items, 3 already there"):
        add(jsonl(tmp_path / "items.jsonl", rows), tmp_path / "f.db")
        assert said in capsys.readouterr().out
    found = [
        (r["mode"], r["prompt"], r["a"], r["b"], r["gold"])
        for r in Store(tmp_path / "f.db").rows("SELECT * FROM items")
    ]
    assert sorted(found) == [
        ("pair", "p", "x", "y", "a"),
        ("rating", "", "w", None, None),
        ("rating", "", "z", None, "4"),
    ]


@pytest.mark.parametrize("row, message", [
    ("{", "not JSON"), ("[]", "expected an object"), ({}, "response: expected text"), ({"response": ""}, "response: empty"),
    ({"response_a": "x"}, "response_b: expected text"), ({"response_a": "x", "response_b": "x"}, "the same"),
    ({"response": "x", "gold": 9}, "gold: expected one of 1, 2"), ({"response": "x", "gold": True}, "gold"),
    ({"response_a": "x", "response_b": "y", "gold": "left"}, "gold: expected one of a, b"),
    ({"response": "x", "respons": "y"}, "respons: unknown"), ({"response": "x", "prompt": 3}, "prompt: expected text"),
    ('{"response": "\\ud800"}', "surrogate"), ({"response": "x" * 100_001}, "at most 100,000"),
])  # fmt: skip
def test_bad_rows_are_named_and_nothing_is_stored(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as said:
        add(jsonl(tmp_path / "items.jsonl", [{"response": "good"}, row]), tmp_path / "f.db")
    assert "items.jsonl:2: " in str(said.value)
    assert not (tmp_path / "f.db").exists()


# ----------------------------------------------------------------------------- rate


def test_rate_in_the_terminal(make_store, monkeypatch, capsys):
    store = make_store(pairs=2, ratings=2)
    store.add(make_items(ratings=1, a="red \x1b[31m alert\x07\nsecond line"))
    lines = iter(["5 longer, but true", "x", "u", "2", "0", "s", "4", "9", "1", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    rate(store, " Ann ")
    out = capsys.readouterr().out
    assert "5 judged" in out and "\x1b" not in out and "\x07" not in out and "\\x1b[31m" in out
    votes = store.judgements()
    assert {v["rater"] for v in votes} == {"ann"} and next(lines, "used up") == "q"
    first = votes[0]
    assert (first["choice"], first["strength"]) == (first["shown"][0], 1)  # the answer after the undo
    assert [v.get("rating", v.get("choice")) for v in votes[1:]] == ["bad", 4, 1]
    assert [e["kind"] for e in store.events()] == ["vote", "undo", "vote", "vote", "skip", "vote", "vote"]
    assert store.events()[0]["data"]["note"] == "longer, but true"


def test_rate_stops_at_the_end_of_input(make_store, monkeypatch, capsys):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    rate(make_store(ratings=1), "ann")
    assert "0 judged" in capsys.readouterr().out


# ----------------------------------------------------------------------------- stats


def test_stats_of_known_raters(make_store, judge, capsys):
    """ann tells by length, bob agrees, cy is an inverter, dan always takes the left."""
    store = make_store(raters=4, gold_every=10, repeat_every=10)
    store.add([{"mode": "pair", "prompt": f"{i}", "a": "long " * 3, "b": f"{i}"} for i in range(60)])
    store.add(
        [{"mode": "pair", "prompt": f"g{i}", "a": "long " * 3, "b": f"{i}", "gold": "a"} for i in range(5)]
    )
    longer = lambda item: {"choice": ("left", "right")[len(item["texts"][0]) < len(item["texts"][1])]}
    shorter = lambda item: {"choice": ("right", "left")[len(item["texts"][0]) < len(item["texts"][1])]}
    for rater, answer in {"ann": longer, "bob": longer, "cy": shorter, "dan": {"choice": "left"}}.items():
        judge(store, rater, answer=answer)
    found = summarise(store)
    rates = {name: {m: r[m]["rate"] for m in ("gold", "self")} for name, r in found["raters"].items()}
    assert rates["ann"] == rates["bob"] == {"gold": 1, "self": 1} and rates["cy"] == {"gold": 0, "self": 1}
    assert rates["dan"]["self"] == 0  # a repeat is shown the other way round
    assert all(
        r["votes"] == 72 and r["gold"]["n"] == 5 and r["self"]["n"] == 7 for r in found["raters"].values()
    )
    pair = found["agreement"]["pair"]
    assert (pair["items"], pair["votes"], pair["shared"], pair["pairs"]) == (60, 240, 60, 360)
    dan = sum(
        v["rater"] == "dan" and v["choice"] == "a" and v["gold"] is None and not v["repeat"]
        for v in store.judgements()
    )
    assert pair["raw"] == pytest.approx(
        (60 + 2 * dan + (60 - dan)) / 360
    )  # ann-bob; dan with both; dan with cy
    units = [[1, 1, 0, 1]] * dan + [[1, 1, 0, 0]] * (60 - dan)
    assert pair["alpha"]["nominal"] == pytest.approx(krippendorff_alpha(units, "nominal"))
    assert pair["alpha"]["interval"] == pytest.approx(krippendorff_alpha(units, "interval"))
    left = found["left_chosen"]
    assert left["n"] == 288 and left["interval"][0] < left["rate"] < left["interval"][1]
    print_stats(found)
    assert "Krippendorff" in capsys.readouterr().out
    only_dan = Store(store.path.with_name("dan.db"), Policy(repeat_every=0), create=True, seed=1)
    only_dan.add(make_items(pairs=20))
    judge(only_dan, "dan", answer={"choice": "left"})
    found = summarise(only_dan)
    assert found["left_chosen"]["rate"] == 1 and found["left_chosen"]["interval"][0] > 0.5
    print_stats(found)
    assert "a position bias" in capsys.readouterr().out


def test_H11_what_cannot_be_measured_is_a_dash(make_store, judge, capsys):
    store = make_store(pairs=3, ratings=3)
    judge(store, "ann", answer=lambda item: {"choice": "bad"} if item["mode"] == "pair" else {"rating": 3})
    found = summarise(store)
    for mode in ("pair", "rating"):  # one rater agrees with nobody
        assert found["agreement"][mode]["raw"] is None
        assert found["agreement"][mode]["alpha"] == {"nominal": None, "ordinal": None, "interval": None}
    assert found["left_chosen"] is None
    print_stats(found)
    out = capsys.readouterr().out
    assert (
        out.count(
            "raw agreement - of 0 pairs of raters; Krippendorff's alpha: nominal -, ordinal -, interval -"
        )
        == 2
    )
    assert "left chosen: -\n" in out and "0.000" not in out
    judge(store, "bob", answer=lambda item: {"choice": "bad"} if item["mode"] == "pair" else {"rating": 4})
    pair = summarise(store)["agreement"]["pair"]
    assert pair["raw"] == 1 and pair["alpha"] == {
        "nominal": 0.0,
        "ordinal": None,
        "interval": None,
    }  # "bad" has no place


def test_statistics_of_an_empty_store(make_store, capsys):
    print_stats(summarise(make_store()))
    assert "items: none" in capsys.readouterr().out


def test_D23_alpha_of_a_store_is_the_fixture_s(make_store):
    """CORRECTNESS's fixture, entered as ratings through the store."""
    units = {"A": "*****34121133*3", "B": "1*213343*******", "C": "**21344*21133*4"}
    store = make_store(ratings=15)
    items = [r["id"] for r in store.rows("SELECT id FROM items ORDER BY id")]
    for rater, row in units.items():
        for item, value in zip(items, row, strict=True):
            if value != "*":
                store._open(rater, item, 0)
                lease = store.rows("SELECT lease FROM leases WHERE rater = ?", rater)[0]["lease"]
                store.vote(rater, item, lease, {"rating": int(value)})
    alpha = summarise(store)["agreement"]["rating"]["alpha"]
    expected = {"nominal": 0.691358, "ordinal": 0.806721, "interval": 0.810845}
    assert alpha == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------------------- export


def test_export(make_store, judge, tmp_path):
    store = make_store(pairs=3, ratings=2, raters=3)
    store.add(make_items(pairs=1, prompt="gold", gold="a"))
    with pytest.raises(UserError, match="no judgements yet"):
        export(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for rater, pick in {
        "ann": {"choice": "tie"},
        "bob": {"choice": "bad"},
        "a": {"choice": "left", "strength": 2},
    }.items():
        judge(store, rater, answer=lambda item, pick=pick: pick if item["mode"] == "pair" else {"rating": 2})
    store.undo("ann")  # a rating
    export(store, tmp_path / "out")
    read = lambda name: [
        json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()
    ]
    rows = read("preferences")
    assert len(rows) == 3 == len(read("pairs"))
    for row, pair in zip(rows, read("pairs"), strict=True):
        side = row["votes"]["a"]
        assert row["votes"] == {"ann": "tie", "bob": "tie", "a": side}
        assert row["strengths"] == {"ann": 0, "bob": 0, "a": {"a": 2, "b": -2}[side]}
        other = {"a": "b", "b": "a"}[side]
        assert pair == {
            "prompt": row["prompt"],
            "chosen": row[f"response_{side}"],
            "rejected": row[f"response_{other}"],
        }
    assert sorted(len(row["ratings"]) for row in read("ratings")) == [2, 3]
    found = data.load(tmp_path / "out/preferences.jsonl")
    assert found.kind == "preference" and [r.share for r in found.records] == [pytest.approx(2 / 3)] * 3
    assert {r.raters for r in found.records} == {("ann", "bob", "a")}
    found = data.load(tmp_path / "out/ratings.jsonl")
    assert found.kind == "rated" and {(r.rating, r.scale) for r in found.records} == {(2.0, (1, 5))}
    assert data.load(tmp_path / "out/pairs.jsonl").kind == "preference"
    assert [e["kind"] for e in read("events")].count("undo") == 1 and len(read("events")) == 16
    assert all({"at", "rater", "item", "prompt", "a", "data", "source"} <= set(e) for e in read("events"))
    secret = store.meta["secret"]
    assert not any(secret in file.read_text() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("part", ["data", "source"])
@pytest.mark.parametrize(
    "value", ["{", "[]", "{}", '{"choice": "left", "seconds": 1, "shown": "ab"}', "x" * 99]
)
def test_damaged_judgements_are_one_line(make_store, judge, tmp_path, run, capsys, part, value):
    store = make_store(pairs=1, ratings=1)
    judge(store, "ann")
    store.db.execute("DROP TRIGGER no_update")
    store.db.execute(f"UPDATE {'events' if part == 'data' else 'items'} SET {part} = ?", [value])
    if part == "source" and value in ("{}", '{"choice": "left", "seconds": 1, "shown": "ab"}'):
        summarise(store)  # an object says where an item is from: any will do
        return
    for command in (["stats"], ["export", tmp_path / "out"]):
        assert run("minirlhf.feedback.__main__", *command, "--store", store.path) == 2
        error = capsys.readouterr().err
        assert "damaged: go back to a copy of the store" in error and error.count("\n") == 1


def test_a_store_with_damaged_pages_is_one_line(make_store, judge, tmp_path, run, capsys):
    """Bytes changed all over the file: refused in one line, or read, but never a traceback."""
    store = make_store(pairs=40, ratings=40)
    for rater in ("ann", "bob"):
        judge(store, rater)
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = store.path.read_bytes()
    refused = 0
    for place in range(4096 + 10, len(whole), 2 * 4096 + 777):
        bad = tmp_path / "bad.db"
        bad.write_bytes(whole[:place] + bytes(range(64)) + whole[place + 64 :])
        for command in (["stats"], ["export", tmp_path / "out"]):
            code = run("minirlhf.feedback.__main__", *command, "--store", bad)
            error = capsys.readouterr().err
            refused += code == 2
            assert code in (0, 2) and error.count("\n") == (code == 2), error
        for extra in ("", "-wal", "-shm"):
            Path(f"{bad}{extra}").unlink(missing_ok=True)
    assert refused > 4


def test_numbers_that_cannot_be_written_are_one_line(make_store, run, capsys):
    assert (
        run("minirlhf.feedback.__main__", "stats", "--store", make_store().path, "--json", "/no/such/x.json")
        == 2
    )
    assert capsys.readouterr().err == "error: /no/such/x.json: cannot be written: No such file or directory\n"


# ----------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("argv, message", [
    (["serve"], "no such store"), (["stats", "--store", "none.db"], "no such store"), (["export", "out"], "no such store"),
    (["serve", "--port", "99999"], "--port: must be at least 0 and at most 65535, not 99999"), (["serve", "--port", "-1"], "--port"),
    (["serve", "--lease", "nan"], "--lease: must be above 0"), (["rate", "--rater", "ann", "--raters", "0"], "--raters: must be"),
    (["serve", "--gold-every", "-1"], "--gold-every: must be at least 0"), (["serve", "--repeat-every", "x"], "whole number"),
    (["serv"], "invalid choice"), ([], "command"), (["stats", "--stor", "x.db"], "unrecognized arguments: --stor"),
    (["add", "none.jsonl"], "none.jsonl: cannot be read"), (["rate", "--rater", "ann"], "no such store"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, argv, message):
    command = [sys.executable, "-m", "minirlhf.feedback", *argv]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "port, accepted", [("-1", False), ("0", True), ("65535", True), ("65536", False), ("99999", False)]
)
def test_F17_a_port_is_a_port(port, accepted):
    """99999 would listen on 34463, 99999 modulo 65536."""
    if accepted:
        assert parse(["serve", "--port", port]).port == int(port)
    else:
        with pytest.raises(UserError, match="--port: must be at least 0 and at most 65535, not"):
            parse(["serve", "--port", port])


def commands_of_the_page() -> list[list[str]]:
    """Those of the loop and of its second round: the first two blocks of docs/feedback.md that sample."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/feedback.md").read_text(), re.M | re.S)
    loop = "".join([block for block in blocks if "minirlhf.feedback sample" in block][:2])
    return [shlex.split(line, comments=True) for line in loop.splitlines() if line.startswith("python ")]


def test_the_loop_of_the_page(smoke, run, tmp_path, monkeypatch):
    """Its commands, on the smoke models, prompts of a file and generated data; two raters who like long texts."""
    pytest.importorskip("waitress", reason="pip install 'minirlhf[feedback]'")
    from benchmarks.feedback import Rater, running_server

    nouns = ("plot", "cast", "pace", "story", "music", "camera", "script", "ending")
    ends = ("is", "was", "will be", "may seem", "of it")
    prompts = jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"The {noun} {end}"} for noun in nouns for end in ends]
    )
    places = {"vader": str(prompts), "runs/demo": str(smoke), "runs": str(tmp_path / "runs")}
    place = lambda word: re.sub(r"^(vader|runs/demo|runs)(?=$|/)", lambda found: places[found[1]], word)
    store, done = tmp_path / "feedback.db", []
    for _, *words in commands_of_the_page():
        words = list(map(place, words))
        if words[0] != "-m":
            assert run(words[0].removesuffix(".py"), "--preset", "smoke", *words[1:]) == 0, words
            done.append(words[0])
            continue
        command = words[2]
        done.append(command)
        if command != "serve":
            assert run("minirlhf.feedback.__main__", *words[2:], "--store", store) == 0, words
            continue
        with running_server(store, *words[3:]) as (_, address):
            for name in ("ann", "bob"):
                rater = Rater(address, name)
                item = rater.join()
                while item:
                    left, right = map(len, item["texts"])
                    item = rater.vote(
                        item, {"choice": "left" if left > right else "right" if right > left else "tie"}
                    )
    assert done == ["sample", "serve", "stats", "export", "train_rm.py", "train_ppo.py"] + [
        "sample", "serve", "export", "train_rm.py", "train_ppo.py"]  # fmt: skip
    found = data.load(tmp_path / "runs/feedback/preferences.jsonl")
    assert len(found.records) >= 35 and all(len(r.chosen) >= len(r.rejected) for r in found.records)
    assert {r.raters for r in found.records} == {("ann", "bob")}
    assert {r.prompt for r in found.records} <= {
        json.loads(line)["prompt"] for line in prompts.read_text().splitlines()
    }
    for k in (1, 2):
        about = json.loads((tmp_path / f"runs/round{k}/ppo/config.json").read_text())
        assert about["complete"] and about["inputs"]["reward_model_path"] == str(
            tmp_path / f"runs/round{k}/rm"
        )
    sources = [json.loads(r["source"]) for r in Store(store).rows("SELECT source FROM items")]
    second = ["chosen" in s for s in sources]
    assert second == ["round1" in s["checkpoint"] for s in sources] and 0 < sum(second) < len(second)
    weighed = [
        "--data",
        tmp_path / "runs/feedback/preferences.jsonl",
        "--init",
        smoke / "sft",
        "--raters",
        "model",
    ]
    assert run("train_rm", "--preset", "smoke", *weighed, "--out", tmp_path / "runs/weighed") == 0
    # The same sample again changes nothing.
    assert (
        run("minirlhf.feedback.__main__", "sample", smoke / "ppo", "--prompts", prompts, "--store", store)
        == 0
    )
    assert len(Store(store).rows("SELECT 1 FROM items")) == len(found.records)


@pytest.mark.parametrize("options, message", [
    (["--per-prompt", 1], "--per-prompt must be 2"), (["--temperature", "nan"], "above 0"), (["--limit", 0], "at least 1"),
    (["--seed", "-1"], "at least 0"), (["--keep", "2.5"], "must be a whole number"), (["--prompt-tokens", "1e3"], "whole number"),
    (["--response-tokens", 10_000], "leaves no room for the response"), (["--prompts", "none.jsonl"], "no such file"),
])  # fmt: skip
def test_sample_refuses(smoke, run, tmp_path, capsys, options, message):
    argv = ["sample", smoke / "ppo", "--prompts", "toy", "--store", tmp_path / "f.db", *options]
    assert run("minirlhf.feedback.__main__", *argv) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "f.db").exists()


def test_choose_takes_the_next_best_of_each_criterion_by_turns():
    scores = [
        [(0.0, 0.0), (1.0, 1.0)],
        [(0.0, 3.0), (0.0, 0.0)],
        [(5.0, 9.0), (5.0, 9.0)],
        [(0.0, 1.0), (0.0, 0.0)],
    ]
    pairs = [tuple(map(torch.tensor, item)) for item in scores]  # of two texts, by two members
    assert choose(pairs, ["disagreement"], 2) == [1, 3]  # on the third they agree that the texts are alike
    assert choose(pairs, ["score"], 3) == [2, 1, 0]
    assert choose(pairs, ["disagreement", "score"], 3) == [1, 2, 3]
    assert choose([texts[:1] for texts in pairs], ["disagreement"], 1) == [
        2
    ]  # single texts: on the score itself


def test_sample_by_what_a_reward_model_says(smoke, run, tmp_path, capsys):
    argv = ["sample", smoke / "ppo", "--prompts", "toy", "--limit", 12]
    sample = lambda name, *options: run(
        "minirlhf.feedback.__main__", *argv, "--store", tmp_path / name, *options
    )
    assert (
        sample("one.db", "--reward-model", smoke / "rm") == 2
        and "give both or neither" in capsys.readouterr().err
    )
    assert (
        sample("one.db", "--reward-model", smoke / "rm", "--keep", 3) == 2
        and "--by score" in capsys.readouterr().err
    )
    assert not (tmp_path / "one.db").exists()
    assert sample("all.db", "--per-prompt", 3) == 0
    assert (
        sample("few.db", "--per-prompt", 3, "--reward-model", smoke / "rm", "--keep", 5, "--by", "score") == 0
    )
    every, few = (
        Store(tmp_path / name).rows("SELECT prompt, a, b, source FROM items") for name in ("all.db", "few.db")
    )
    assert len(few) == 5 < len(every) and "reward_model" in few[0]["source"]
    model, tokenizer = checkpoint.load_reward(smoke / "rm")
    read = lambda prompt, text: model.eval()(*data.collate([tokenizer.encode(prompt + text)], tokenizer.pad))[
        0
    ].item()
    value = lambda item: max(read(item["prompt"], item["a"]), read(item["prompt"], item["b"]))
    kept = {(r["prompt"], r["a"], r["b"]) for r in few}
    assert kept <= {(r["prompt"], r["a"], r["b"]) for r in every}
    rest = [value(r) for r in every if (r["prompt"], r["a"], r["b"]) not in kept]
    # The model reads an end of text where there was one, this test does not: means of both are well apart.
    assert sum(map(value, few)) / 5 > sum(rest) / len(rest)


def test_sample_refuses_a_reward_model_and_takes_ratings(smoke, run, tmp_path, capsys):
    argv = [
        "--prompts",
        "toy",
        "--store",
        tmp_path / "f.db",
        "--mode",
        "rating",
        "--per-prompt",
        3,
        "--limit",
        4,
    ]
    assert run("minirlhf.feedback.__main__", "sample", smoke / "rm", *argv) == 2
    assert "writes no text" in capsys.readouterr().err
    assert run("minirlhf.feedback.__main__", "sample", smoke / "sft", *argv) == 0
    rows = Store(tmp_path / "f.db").rows("SELECT * FROM items")
    assert (
        4 < len(rows) <= 12
        and {r["mode"] for r in rows} == {"rating"}
        and len({r["prompt"] for r in rows}) == 4
    )
