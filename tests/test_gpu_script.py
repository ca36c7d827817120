"""benchmarks/gpu.sh in small: what a GPU will be asked runs to its end on a machine without one, and a failure stops nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("timeout") is None, reason="the script needs GNU timeout"),
]


def gpu(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def steps(out: Path) -> dict[str, int]:
    lines = (out / "steps.jsonl").read_text().splitlines()
    return {line["step"]: line["exit_code"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_runs_to_its_end_in_small(tmp_path):
    done = gpu("--small", OUT=str(tmp_path / "out"))
    logs = {log.name: log.read_text()[-2000:] for log in (tmp_path / "out").glob("*.log")}
    names = ["packages", "oracles", "tests", "kernels", "attention", "decode", "ppo"]
    assert steps(tmp_path / "out") == dict.fromkeys(names, 0), logs
    assert done.returncode == 0, done.stdout + done.stderr
    oracles = json.loads((tmp_path / "out/oracles.json").read_text())["rows"]
    assert len(oracles) == 12 and all(row["ok"] for row in oracles)
    ppo = json.loads((tmp_path / "out/ppo.json").read_text())
    assert len(ppo["iterations"]) == 2 and ppo["median_seconds"]["time/update"] > 0
    assert ppo["estimate_bytes"]["peak, about"] > 0 and ppo["peak_bytes"]["resident"] > 0
    attention = json.loads((tmp_path / "out/attention.json").read_text())
    assert attention["pairs"] < attention["padded_pairs"] and attention["padded / packed"] > 0
    assert max(attention["packed"]["error"].values()) < 0.03  # the smallest parts of bf16 are .004
    decode = json.loads((tmp_path / "out/decode.json").read_text())
    assert decode["equal_tokens"] == 1 and len(decode["compiled"]["seconds"]) == 2
    kernels = json.loads((tmp_path / "out/kernels.json").read_text())["operations"]
    assert {name.split()[0] for name in kernels} == {
        "token_logprobs",
        "token_kl",
        "linear_token_logprobs",
        "gae",
    }


def test_a_step_that_fails_stops_no_other(tmp_path):
    """Each step's exit code is recorded, also where the program cannot do anything."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) echo;; *) echo broken; exit 7;; esac\n')
    python.chmod(0o755)
    done = gpu("--small", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 1
    assert set(steps(tmp_path / "out").values()) == {7} and len(steps(tmp_path / "out")) == 7
    assert (tmp_path / "out/oracles.log").read_text() == "broken\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = gpu(OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "torch sees no GPU: add --small" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_arguments_are_refused():
    done = gpu("--smal")
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_packages_come_from_the_wheels(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu as module

    monkeypatch.setattr(module, "PACKAGES", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(module, "WHEELS", tmp_path / "missing")
    assert module.install(tmp_path) == 1
    assert "missing: no-such-package, and there is no .wheels/" in capsys.readouterr().out
    calls = []
    monkeypatch.setattr(module, "WHEELS", tmp_path)
    monkeypatch.setattr(module.subprocess, "call", lambda command: calls.append(command) or 0)
    assert module.install(tmp_path / "to") == 0
    assert {"--no-index", "--no-deps", str(tmp_path / "to"), "no-such-package"} <= set(calls[0])
