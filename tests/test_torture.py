"""The short forms of benchmarks/torture.py and benchmarks/fuzz.py: their long forms take minutes to an hour."""

import json
import os
import random

import pytest

pytest.importorskip("resource", reason="needs a Unix")
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

from benchmarks import fuzz, torture
from benchmarks.fuzz_kinds import KINDS

QUICK = ("jsonl", "json", "txt", "tokenizer", "checkpoint", "run", "reward", "template", "store", "results")


@pytest.mark.long
def test_killed_starved_and_with_a_clock_that_jumps_it_is_never_disturbed(tmp_path, capsys):
    out = tmp_path / "torture.txt"
    parts = ["kills", "disk", "clock"]
    with pytest.raises(SystemExit) as stop:
        torture.main(["--runs", "sft", "--kills", "4", "--only", *parts, "--out", str(out)])
    said = capsys.readouterr().out
    total = json.loads(out.read_text().splitlines()[0])
    assert stop.value.code == 0 and total["wrong"] == 0, said
    assert total["kills"] >= 1 and total["kills inside a save"] >= 1 and total["full disks"] == 3


@pytest.mark.parametrize("how", torture.DAMAGES)
def test_a_damage_changes_the_file(tmp_path, how):
    for name in ("a", "b"):
        (tmp_path / name / "step-000001").mkdir(parents=True)
        (tmp_path / name / "step-000001" / "config.json").write_text(json.dumps({"name": name}))
    file = tmp_path / "a" / "step-000001" / "config.json"
    torture.DAMAGES[how](random.Random(1), file)
    assert not file.is_file() or file.read_text() != '{"name": "a"}'


@pytest.mark.parametrize("name", QUICK)
def test_fuzzed_inputs_are_read_or_refused(tmp_path, monkeypatch, name):
    """A few of the 50,000 inputs of each kind, without those that are made to take long."""
    if name in ("results", "store"):
        pytest.importorskip("flask" if name == "store" else "matplotlib")
    home = tmp_path.resolve()
    (home / "in").mkdir()
    (home / "in" / fuzz.CANARY).write_bytes(b"not yours")
    monkeypatch.chdir(home / "in")
    kind = KINDS[name]
    monkeypatch.setattr(kind, "bombs", {})
    n = 5 if name == "results" else 25  # each draws a picture
    found = fuzz.run_kind(name, kind, kind.seeds(home / "seeds"), n, 1, home)
    assert found["failures"] == [] and sum(found["outcomes"].values()) == n


def test_the_fuzzer_finds_a_planted_fault_and_makes_it_small(tmp_path, monkeypatch):
    """A reader that indexes what may not be there, one that writes elsewhere, and one that never ends."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    seeds = lambda folder: [{"x.json": b'{"a": {"b": 1}, "c": [1, 2, 3]}'}]

    def careless(folder):
        return json.loads((folder / "x.json").read_bytes())["a"]["b"] + 1

    def writes(folder):
        (folder.parent.parent / "elsewhere").write_text("x")

    def endless(folder):
        while (folder / "x.json").read_bytes() != seeds(folder)[0]["x.json"]:
            pass

    for read, word, n in ((careless, "foreign", 30), (endless, "died", 2)):
        found = fuzz.run_kind("x", fuzz.Kind(1, seeds, read), seeds(tmp_path), n, 1, tmp_path.resolve())
        assert {failure["group"].split(":")[0] for failure in found["failures"]} == {word}
        assert all("--at" not in str(f["at"]) and f["least"] for f in found["failures"])
    with pytest.raises(SystemExit, match="a seed is not read: forbidden open to write"):
        fuzz.run_kind("x", fuzz.Kind(1, seeds, writes), seeds(tmp_path), 1, 1, tmp_path.resolve())


def test_an_input_depends_on_seed_kind_and_number_alone(tmp_path):
    kind = KINDS["jsonl"]
    seeds = kind.seeds(tmp_path)
    make = lambda name, seed, i: fuzz.make_input(kind, seeds, name, seed, i)
    assert make("jsonl", 1, 7) == make("jsonl", 1, 7)
    assert len({str(make("jsonl", seed, i)) for seed in (1, 2) for i in range(20)}) > 30
