"""Fixtures shared by the tests: a script run in this process (so that torch is imported once), and a smoke run of them all."""

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

# Before torch is imported, here and in every process started: on tensors this small, threads that wait for each other on
# busy cores make a test a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In the background of a shell (`make test &`) Ctrl-C is ignored, and so it would be in every process started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
FRONTS = {f"minirlhf.{name}": f"minirlhf.tools.{name}" for name in ("chat", "evaluate", "why", "estimate")}
FRONTS |= {f"minirlhf.{name}": f"minirlhf.tools.{name}.__main__" for name in ("conformance", "report")}
sys.path.insert(0, str(ROOT))  # the stage scripts belong to no package


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(scope="session")
def run():
    """run(script, *argv) -> exit code: what `python script.py argv` would do, told apart from a crash, which raises.

    `stop_at` sends Ctrl-C when that step has been logged."""
    from minirlhf.support import cli, logs

    def call(script: str, *argv, stop_at: int | None = None) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, argv)])
            patch.setattr(os, "fsync", lambda descriptor: None)  # nobody will cut the power
            if stop_at is not None:
                log = logs.MetricLogger.log

                def log_and_stop(self, step, metrics):
                    log(self, step, metrics)
                    if step == stop_at:
                        signal.raise_signal(signal.SIGINT)

                patch.setattr(logs.MetricLogger, "log", log_and_stop)
            try:
                cli.run_script(importlib.import_module(FRONTS.get(script, script)).main)
            except SystemExit as stop:
                return stop.code or 0
            finally:
                gc.collect()  # a run that failed may live on in a cycle, and hold the lock on its folder
        return 0

    return call


@pytest.fixture(scope="session")
def metrics():
    """metrics(out) -> the lines of OUT/metrics.jsonl less what a clock says."""

    def read(out: Path) -> list[dict]:
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    return read


@pytest.fixture
def no_baselines(monkeypatch):
    """The report at the end of train_rm.py is not the subject, and takes longer than the training."""
    from minirlhf.measure import baselines

    monkeypatch.setattr(baselines, "tfidf_ridge", lambda *args, **options: None)
    monkeypatch.setattr(baselines, "vader_lexicon", lambda *args: None)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, run) -> Path:
    """The folder of a whole run at the smoke preset: sft, rm, judge, ppo, dpo, results.json.  Read it, do not write to it."""
    home = tmp_path_factory.mktemp("runs") / "smoke"
    stages = {
        "sft": ["train_sft"],
        "rm": ["train_rm"],
        "judge": ["train_rm", "--part", "b", "--seed", 101],
        "ppo": ["train_ppo", "--monitor", home / "judge"],
        "dpo": ["train_dpo"],
    }
    for stage, (script, *options) in stages.items():
        assert run(script, "--preset", "smoke", "--out", home / stage, *options) == 0, stage
    assert run("minirlhf.evaluate", "--run", home) == 0
    return home
