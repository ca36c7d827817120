"""Stages that are stopped, killed and started again: the run that follows is the run that was never stopped [D21]."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf import UserError, checkpoint
from minirlhf.support import files, logs, steps

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--preset", "smoke", "--precision", "fp32"]
SFT = [*SMALL, "--n-layer", 1, "--n-embd", 16, "--batch", 104, "--samples", 0]  # 3 steps an epoch


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_stage_is_skipped(run, capsys, smoke):
    before = {p: p.lstat().st_mtime_ns for p in smoke.rglob("*")}
    for stage, script in (("sft", "train_sft"), ("rm", "train_rm")):
        for more in ([], ["--resume"]):
            assert run(script, "--preset", "smoke", "--out", smoke / stage, *more) == 0
            assert f"{smoke / stage} is complete: nothing to do" in capsys.readouterr().out
    assert {p: p.lstat().st_mtime_ns for p in smoke.rglob("*")} == before


def test_other_settings_are_refused(run, capsys, smoke):
    before = {p: p.lstat().st_mtime_ns for p in smoke.rglob("*")}
    assert run("train_sft", "--preset", "smoke", "--seed", 2, "--out", smoke / "sft") == 2
    assert (
        "holds a run with another seed (1, now 2): choose a new --out, or --overwrite"
        in capsys.readouterr().err
    )
    assert (
        run("train_sft", "--preset", "smoke", "--lr", 1, "--batch", 8, "--out", smoke / "ppo", "--resume")
        == 2
    )
    assert "holds a checkpoint of stage ppo: choose another --out" in capsys.readouterr().err
    assert {p: p.lstat().st_mtime_ns for p in smoke.rglob("*")} == before


def test_an_unfinished_run_needs_resume_or_overwrite(run, capsys, metrics, tmp_path):
    options = [*SFT, "--out", tmp_path / "sft"]
    assert run("train_sft", *options, stop_at=4) == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("stopped at step 4 of 6; the same command with --resume goes on")
    assert run("train_sft", *options) == 2
    assert (
        "holds an unfinished run (step 4): --resume goes on, --overwrite starts again"
        in capsys.readouterr().err
    )
    assert checkpoint.load_config(tmp_path / "sft")["step"] == 4

    # Overwriting leaves nothing of it, not even where the new run is stopped before its first validation.
    assert run("train_sft", *options, "--seed", 2, "--overwrite", stop_at=1) == 130
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1]
    assert {p.name for p in (tmp_path / "sft").iterdir() if p.is_dir()} == {"latest", "step-000001"}
    assert run("train_sft", *options, "--seed", 2, "--resume") == 0
    assert run("train_sft", *SFT, "--seed", 2, "--out", tmp_path / "straight") == 0
    assert metrics(tmp_path / "sft") == metrics(tmp_path / "straight")
    assert equal(final(tmp_path / "sft"), final(tmp_path / "straight"))


def test_an_overwritten_run_that_is_killed_at_once_leaves_nothing_of_the_old_one(run, tmp_path, metrics):
    """No model beside metrics of another run, no step that --resume could go on from: it begins again."""
    assert run("train_sft", *SFT, "--seed", 2, "--out", tmp_path) == 0
    assert killed(run, (logs.MetricLogger, "write", 1), "train_sft", *SFT, "--out", tmp_path, "--overwrite")
    assert not [*tmp_path.glob("step-*")] and not (tmp_path / "model.safetensors").exists()
    with pytest.raises(UserError, match="no checkpoint here"):
        checkpoint.load_config(tmp_path)
    assert run("train_sft", *SFT, "--out", tmp_path, "--resume") == 0
    assert run("train_sft", *SFT, "--out", tmp_path / "straight") == 0
    assert metrics(tmp_path) == metrics(tmp_path / "straight")
    assert equal(final(tmp_path), final(tmp_path / "straight"))


# ----------------------------------------------------------------------------- stopped


STAGES = {  # script, options, steps to stop at; the last of them is the run's last
    "sft": ("train_sft", SFT, [1, 3, 4, 6]),  # in the first epoch, at its end, in the second, at the very end
    "rm": (
        "train_rm",
        [*SMALL, "--batch", 156, "--members", 2, "--normalise-samples", 8],
        [1, 4, 8],
    ),  # 4 a member
    "ppo": ("train_ppo", [*SMALL, "--kl-target", 0.01, "--kl-horizon", 50], [1, 3, 4]),
    "dpo": ("train_dpo", [*SMALL, "--pairs", 1, "--batch", 156, "--epochs", 2], [1, 3, 4]),
    "online": ("train_dpo", [*SMALL, "--online", "--batch", 16], [1, 4]),
}


@pytest.fixture(scope="module")
def straight(run, smoke, tmp_path_factory):
    """straight(stage) -> (its options, the folder of a run that nothing stopped)."""
    done = {}

    def once(stage: str):
        if stage not in done:
            script, options, _ = STAGES[stage]
            inputs = ["--init", smoke / "sft"], ["--reward-model", smoke / "rm"]
            needed = {"sft": 0, "rm": 1, "dpo": 1}.get(stage, 2)
            options = [*options, *sum(inputs[:needed], [])]
            out = tmp_path_factory.mktemp("straight") / stage
            assert run(script, *options, "--out", out) == 0
            done[stage] = options, out
        return done[stage]

    return once


def never_stopped(out: Path, whole: Path, metrics) -> None:
    """The run in `out` is the one in `whole`: history, result, trainer, and what config.json says of it."""
    assert metrics(out) == metrics(whole) == metrics(out / "latest")
    assert equal(final(out), final(whole))
    (tensors, state), (whole_tensors, whole_state) = (
        checkpoint.load_trainer(out),
        checkpoint.load_trainer(whole),
    )
    assert equal(tensors, whole_tensors)
    assert state | {"seconds": 0} == whole_state | {"seconds": 0} and state["seconds"] > 0
    about, whole_about = checkpoint.load_config(out), checkpoint.load_config(whole)
    for timed in (about, whole_about):
        del timed["training"], timed["results"]["seconds"]
    assert about == whole_about and about["complete"]
    left = {p.name for p in out.iterdir()} - {p.name for p in whole.iterdir()}
    assert not left, left


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize(("stage", "step"), [(stage, k) for stage, (_, _, at) in STAGES.items() for k in at])
def test_D21_stopped_and_resumed_is_never_stopped(run, straight, metrics, tmp_path, stage, step):
    """Ctrl-C in the last step is no mistake: the result is whole by then."""
    (script, _, at), (options, whole), out = STAGES[stage], straight(stage), tmp_path / stage
    if step == at[-1]:
        assert run(script, *options, "--out", out, stop_at=step) == 0
    else:
        assert run(script, *options, "--out", out, stop_at=step) == 130
        about = checkpoint.load_config(out)
        assert about["step"] == step and not about["complete"]
        assert run(script, *options, "--out", out, "--resume") == 0
    never_stopped(out, whole, metrics)


def test_D21_stopped_as_patience_runs_out(run, metrics, tmp_path):
    options = [*SFT, "--lr", 1e-30, "--weight-decay", 0, "--epochs", 6, "--patience", 1]
    assert run("train_sft", *options, "--out", tmp_path / "whole") == 0
    last = metrics(tmp_path / "whole")[-1]["step"]
    assert run("train_sft", *options, "--out", tmp_path / "stopped", stop_at=last) == 130
    assert run("train_sft", *options, "--out", tmp_path / "stopped", "--resume") == 0
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_D21_lines_after_the_checkpoint_are_done_again(run, straight, metrics, tmp_path):
    """Killed two steps after its last checkpoint, in the middle of a line."""
    options, whole = straight("sft")
    assert run("train_sft", *options, "--out", tmp_path, stop_at=2) == 130
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])
    assert run("train_sft", *options, "--out", tmp_path, "--resume") == 0
    assert metrics(tmp_path) == metrics(whole)


def test_F2_a_history_that_was_lost_comes_back(run, straight, metrics, tmp_path):
    options, whole = straight("sft")
    assert run("train_sft", *options, "--out", tmp_path, stop_at=4) == 130
    (tmp_path / "metrics.jsonl").write_text("")
    assert run("train_sft", *options, "--out", tmp_path, "--resume") == 0
    assert metrics(tmp_path) == metrics(whole)


# ----------------------------------------------------------------------------- killed


def killed(run, where: tuple, script: str, *options) -> bool:
    """Run a script in a process that gets SIGKILL when a function is called: where = (holder, its name, which call).

    Which call: its number, or a test of its arguments.  MetricLogger.write is killed half way through its line.
    False where the run came to its end without."""
    holder, name, which = where
    child = os.fork()
    if child == 0:
        calls, original = itertools.count(1), getattr(holder, name)

        def dying(*args, **kwargs):
            if which(args, kwargs) if callable(which) else next(calls) == which:
                if name == "write":
                    with open(args[0].out / "metrics.jsonl", "a") as file:
                        file.write('{"step": 1, "train/lo')
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(holder, name, dying)
        try:
            os._exit(run(script, *options))
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def is_complete(out: Path) -> bool:
    return (out / "latest").exists() and checkpoint.load_config(out)["complete"]


KILLS = {  # in this order; each run goes on from where the one before was killed
    "in the second line": (logs.MetricLogger, "write", 2),
    "before the first save": (steps, "write_step", 1),
    "in the first save's tensors": (steps, "write_tensors", 2),
    "before the first step has its name": (steps, "_replace", 1),
    "before old steps are removed": (steps, "sweep", lambda args, _: (args[0] / "latest").exists()),
    "in the next line": (logs.MetricLogger, "write", 1),
    "while the logs are replaced": (files.os, "replace", 1),
    "before a link flips": (steps, "point", 2),
    "in the same save's tensors": (steps, "write_tensors", 1),
    "while old steps are removed": (steps.shutil, "rmtree", 1),
    "before the result is saved": (checkpoint, "save", lambda args, _: args[3]["complete"]),
    "when the result is saved": (steps, "sweep", lambda args, _: is_complete(args[0])),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("stage", STAGES)
def test_D21_killed_anywhere_and_resumed_is_never_stopped(run, straight, metrics, tmp_path, capfd, stage):
    """SIGKILL, again and again, until it is done; and once more when it is."""
    (script, _, _), (options, whole), out = STAGES[stage], straight(stage), tmp_path / stage
    options = [*options, *(["--save-every", 1] if stage == "ppo" else []), "--out", out, "--resume"]
    for moment, where in KILLS.items():
        assert killed(run, where, script, *options), moment
    capfd.readouterr()
    assert run(script, *options) == 0
    assert "is complete: nothing to do" in capfd.readouterr().out
    never_stopped(out, whole, metrics)


# ----------------------------------------------------------------------------- signals to real processes


def test_signals(smoke, tmp_path, metrics):
    """Ctrl-C and SIGTERM, to processes of their own: a checkpoint, one line, 128 + the signal as exit code."""
    inputs = ["--init", smoke / "sft", "--reward-model", smoke / "rm"]
    commands = {
        "sft": ("train_sft.py", [*SFT, "--epochs", 1000], signal.SIGINT),
        "ppo": ("train_ppo.py", [*SMALL, *inputs, "--iterations", 10_000], signal.SIGTERM),
    }
    started = {}
    for stage, (script, options, _) in commands.items():
        words = [sys.executable, ROOT / script, *options, "--out", tmp_path / stage]
        started[stage] = subprocess.Popen(
            [*map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
    try:
        for stage, process in started.items():
            file, patience = tmp_path / stage / "metrics.jsonl", time.monotonic() + 300
            while (
                not (file.exists() and file.stat().st_size)
                and time.monotonic() < patience
                and process.poll() is None
            ):
                time.sleep(0.05)
            process.send_signal(commands[stage][2])
        for stage, process in started.items():
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 128 + commands[stage][2], said[-2000:]
            last = said.splitlines()[-1]
            assert last.startswith("stopped at step ") and "--resume" in last and "Traceback" not in said
            about = checkpoint.load_config(tmp_path / stage)
            assert not about["complete"] and about["step"] == metrics(tmp_path / stage)[-1]["step"] >= 1
    finally:
        for process in started.values():
            if process.poll() is None:
                process.kill()
                process.wait()
