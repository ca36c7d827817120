"""A stage's process and folder: what may use OUT, how a run starts, stops, fails and goes on, and its logs."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf import Stopped, UserError, checkpoint, data, optim
from minirlhf import run as stage_run
from minirlhf.model import GPT, GPTConfig
from minirlhf.rollout import Texts
from minirlhf.run import Run, RunConfig
from minirlhf.support import claims, files, hardware, logs
from minirlhf.support.cli import Above0, Count
from minirlhf.support.logs import MetricLogger
from minirlhf.support.run_config import all_warmup
from minirlhf.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
SHAPE = GPTConfig(258, context=4, n_layer=1, n_head=1, n_embd=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    lr: Above0 = 0.1
    batch: Count = 8
    steps: Count = 5


def source(sha256: str = "a" * 64) -> data.Dataset:
    return data.Dataset("rows.jsonl", "text", [], [], sha256, Counter({"rows": 3}))


def begun(
    out: Path, sha256: str = "a" * 64, init: Path | None = None, **options
) -> tuple[Run, torch.optim.Optimizer]:
    """A stage up to its loop."""
    run = Run("sft", Config(out=out, precision="fp32", **options))
    assert run.begin(source(sha256), init=init)
    model = GPT(SHAPE)
    optimizer = optim.adamw([model], 0.1, 0.0, (0.9, 0.99), 1e-8)
    run.resume(TOKENIZER, model, {"drawn": 0.0}, optimizer=optimizer)
    return run, optimizer


def train(run: Run, optimizer: torch.optim.Optimizer, due: int = 99) -> None:
    """The rest of it: steps that depend on random numbers, a counter, and the result."""
    for step in run.loop(run.config.steps):
        x = torch.rand(3, requires_grad=False).mean() + random.random()
        (run.model.wte.weight.square().sum() * x).backward()
        run.counters["drawn"] += x.item()
        norm = run.take_step(optimizer, 1.0, "model")
        run.log(step + 1, {"loss": x, "norm": norm})
        run.checkpoint(step + 1, due=(step + 1) % due == 0)
    run.save(run.step, complete=True)


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def listing(out: Path) -> dict[str, float]:
    return {str(p): p.lstat().st_mtime_ns for p in out.rglob("*")}


# ----------------------------------------------------------------------------- may a stage use a folder?


def test_claim(tmp_path):
    settings = lambda **other: checkpoint.settings_of(Config(**{"out": tmp_path} | other))

    def leave(complete: bool, trainer: bool = True) -> None:
        about = checkpoint.describe("sft", SHAPE, Config(out=tmp_path), 7, complete, TOKENIZER)
        state = {"tensors": {}, "state": {"step": 7}} if trainer else None
        checkpoint.save(tmp_path, 7, {"w": torch.ones(1)}, about, TOKENIZER, state)

    def claim(resume: bool = False, stage: str = "sft", overwrite: bool = False, **other) -> str:
        saved = checkpoint.load_config(tmp_path) if (tmp_path / "latest").exists() else None
        return claims.claim(tmp_path, saved, stage, settings(**other), resume, overwrite)

    assert claim() == claim(resume=True) == "start"
    leave(complete=False)
    assert claim(resume=True) == "resume"
    with pytest.raises(
        UserError, match=r"unfinished run \(step 7\): --resume goes on, --overwrite starts again$"
    ):
        claim()
    leave(complete=True)
    assert claim() == claim(resume=True) == "complete"
    assert claim(overwrite=True) == "start"
    assert (
        claim(track="tensorboard", data_dir=tmp_path, out=Path("elsewhere")) == "complete"
    )  # they change no result
    for resume in (False, True):
        change = r"another batch \(8, now 9\), lr \(0\.1, now 1\.0\), seed \(1, now 3\): choose a new --out, or --overwrite$"
        with pytest.raises(UserError, match=change):
            claim(resume=resume, lr=1.0, batch=9, seed=3)
        with pytest.raises(UserError, match="holds a checkpoint of stage sft: choose another --out$"):
            claim(resume=resume, stage="ppo", overwrite=not resume)
    leave(complete=False, trainer=False)
    with pytest.raises(
        UserError, match="holds step 7 without trainer.json, so it cannot be resumed: .*--init.*--overwrite$"
    ):
        claim(resume=True)
    (tmp_path / "latest").unlink()
    for resume in (False, True):
        with pytest.raises(
            UserError, match=r"step-000007, but its link `latest` leads to no checkpoint: ln -sfn step-000007"
        ):
            claim(resume=resume)


@pytest.mark.parametrize("lost", ["latest", "latest/trainer.json"])
@pytest.mark.parametrize("resume", [True, False])
def test_F1_what_cannot_be_resumed_is_left_as_it_is(tmp_path, lost, resume):
    run, optimizer = begun(tmp_path)
    run.stop_signal = signal.SIGTERM
    with pytest.raises(Stopped):
        train(run, optimizer)
    run.lock.release()
    (tmp_path / lost).unlink()
    before = listing(tmp_path)
    with pytest.raises(UserError, match="--overwrite starts again|--overwrite$"):
        Run("sft", Config(out=tmp_path, resume=resume))
    assert listing(tmp_path) == before
    run, optimizer = begun(tmp_path, overwrite=True)
    assert run.step == 0 and {p.name for p in tmp_path.glob("*step-*")} == set()
    train(run, optimizer)
    assert steps_logged(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("what", ["data", "init"])
def test_F4_H6_other_data_or_another_checkpoint_below_is_refused(tmp_path, complete, what):
    """Not only other options: what the run was made from is compared by its content."""
    base, out = tmp_path / "base", tmp_path / "out"
    checkpoint.save(base, 1, {"w": torch.ones(1)}, {}, TOKENIZER)
    run, optimizer = begun(out, init=base)
    if not complete:
        run.stop_signal = signal.SIGINT
        with pytest.raises(Stopped):
            train(run, optimizer)
    else:
        train(run, optimizer)
    run.lock.release()
    before = listing(out)
    resumed = Run("sft", Config(out=out, precision="fp32", resume=True))
    assert resumed.begin(source(), init=base) is not complete
    resumed.lock.release()
    if what == "init":
        checkpoint.save(base, 1, {"w": torch.zeros(1)}, {}, TOKENIZER)
    resumed = Run("sft", Config(out=out, precision="fp32", resume=True))
    with pytest.raises(
        UserError,
        match=rf"^{out} was made from another {what} \(sha256 \w+, now \w+\): .*--out, or --overwrite$",
    ):
        resumed.begin(source("b" * 64 if what == "data" else "a" * 64), init=base)
    assert listing(out) == before


def test_H6_a_stage_refuses_a_checkpoint_that_is_stale(tmp_path):
    """PPO's reward model started from an SFT model that was trained again since."""
    sft, rm = tmp_path / "sft", tmp_path / "rm"
    checkpoint.save(sft, 1, {"w": torch.ones(1)}, {}, TOKENIZER)
    inputs = {"init": checkpoint.fingerprint(sft), "init_path": str(checkpoint.resolve(sft))}
    checkpoint.save(rm, 1, {"w": torch.ones(1)}, {"inputs": inputs}, TOKENIZER)
    begin = lambda: Run("ppo", Config(out=tmp_path / "ppo")).begin(
        source(), init=checkpoint.resolve(sft), reward_model=rm
    )
    assert begin()
    checkpoint.save(sft, 1, {"w": torch.zeros(1)}, {}, TOKENIZER)
    with pytest.raises(UserError, match=f"^{rm} was trained from .*as it was before.*: train it again"):
        begin()
    assert not (tmp_path / "ppo").exists()


def test_F6_one_process_per_folder(tmp_path):
    """Also where it begins while another one is still loading its data."""
    early = Run("sft", Config(out=tmp_path / "out", precision="fp32"))
    early.begin(source())
    first, optimizer = begun(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(
            UserError, match="another process is at work here: wait for it, or choose another --out$"
        ):
            Run("sft", Config(out=tmp_path / "out", resume=resume))
    with pytest.raises(UserError, match="another process is at work here"):
        early.resume(TOKENIZER, GPT(SHAPE))
    train(first, optimizer)
    first.lock.release()
    with pytest.raises(UserError, match="another process has begun a run here: choose another --out$"):
        early.resume(TOKENIZER, GPT(SHAPE))
    assert (
        steps_logged(tmp_path / "out") == [1, 2, 3, 4, 5]
        and checkpoint.load_config(tmp_path / "out")["complete"]
    )


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_H20_an_out_that_is_no_folder_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be made or written .*: choose another --out$"):
        begun(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------- start, stop and go on


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_D21_a_stopped_run_goes_on_where_it_was(tmp_path, stop):
    """Weights, optimiser, counters, seconds, random numbers, metrics, and what is in config.json."""
    train(*begun(tmp_path / "whole"))
    run, optimizer = begun(tmp_path / "out", init=None)
    log = run.logger.log
    run.logger.log = lambda step, metrics: (
        log(step, metrics),
        step == stop and signal.raise_signal(signal.SIGINT),
    )
    with pytest.raises(
        Stopped, match=f"^stopped at step {stop} of 5; the same command with --resume goes on from {run.out}$"
    ) as stopped:
        train(run, optimizer)
    assert stopped.value.signum == signal.SIGINT and run.saved_step == stop
    run.lock.release()
    run, optimizer = begun(tmp_path / "out", resume=True)
    assert run.step == run.saved_step == stop and run.seconds > 0
    train(run, optimizer)
    lines = [
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("out", "whole")
    ]
    for line in (*lines[0], *lines[1]):
        del line["time/seconds"]
    assert lines[0] == lines[1]
    weights = [checkpoint.load_state(tmp_path / name) for name in ("out", "whole")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    (tensors, state), (other_tensors, other) = (
        checkpoint.load_trainer(tmp_path / name) for name in ("out", "whole")
    )
    assert tensors.keys() == other_tensors.keys() != set()
    assert all(torch.equal(tensors[k], other_tensors[k]) for k in tensors)
    assert state.pop("seconds") > 0 and other.pop("seconds") > 0
    assert state == other and state["counters"]["drawn"] > 0
    about = [checkpoint.load_config(tmp_path / name) for name in ("out", "whole")]
    assert about[0]["inputs"] == about[1]["inputs"] == {"data": "a" * 64} and about[0]["world"] == 1


def test_a_signal_at_the_last_step_is_no_mistake(tmp_path):
    run, optimizer = begun(tmp_path)
    log = run.logger.log
    run.logger.log = lambda step, metrics: (
        log(step, metrics),
        step == 5 and signal.raise_signal(signal.SIGTERM),
    )
    train(run, optimizer)
    assert checkpoint.load_config(tmp_path)["complete"]


def test_a_signal_asks_once_and_the_second_time_stops(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run, _ = begun(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.loop(5):
            assert not run.stop_signal
            signal.raise_signal(signal.SIGTERM)
            assert run.stop_signal == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "stopping after this step (again to stop at once)" in capsys.readouterr().err


def test_F8_a_signal_while_ranks_agree_is_not_forgotten(tmp_path, monkeypatch):
    """It comes too late for this step's vote, so the next one stops."""
    agree, votes = hardware.Machine.any, []

    def any_(self, condition):
        votes.append(condition)
        if len(votes) == 2:
            signal.raise_signal(signal.SIGTERM)
        return agree(self, condition)

    run, optimizer = begun(tmp_path)
    monkeypatch.setattr(hardware.Machine, "any", any_)
    with pytest.raises(Stopped, match="^stopped at step 3 of 5") as stopped:
        train(run, optimizer)
    assert votes == [False, False, True] and stopped.value.signum == signal.SIGTERM
    assert checkpoint.load_config(tmp_path)["step"] == 3


def test_a_signal_to_another_rank_stops_this_one(tmp_path, monkeypatch):
    run, optimizer = begun(tmp_path)
    monkeypatch.setattr(hardware.Machine, "any", lambda self, condition: not condition)
    with pytest.raises(Stopped, match="^stopped at step 1 of 5") as stopped:
        train(run, optimizer)
    assert stopped.value.signum == signal.SIGTERM


def test_D21_a_steps_random_numbers_are_those_of_seed_stage_step_and_rank(tmp_path):
    def draws(stage: str, seed: int, first: int, rank: int = 0) -> list:
        run = Run(stage, Config(out=tmp_path / "none", seed=seed))
        run.rank, run.step = rank, first
        return [(torch.rand(1).item(), random.random(), random.random()) for _ in run.loop(3)]

    whole = draws("sft", 1, 0)
    assert draws("sft", 1, 1) == whole[1:] and len({*whole}) == 3
    others = draws("rm", 1, 0) + draws("ppo", 1, 0) + draws("sft", 2, 0) + draws("sft", 1, 0, rank=1)
    assert len({*others, *whole}) == 15


def test_a_choice_that_must_not_depend_on_the_rank(tmp_path):
    def draws(rank: int) -> list:
        run = Run("rm", Config(out=tmp_path / "none"))
        run.rank = rank
        return [
            (run.same_on_all_ranks(torch.rand, step, 2).tolist(), torch.rand(1).item())
            for step in run.loop(2)
        ]

    first, second = draws(0), draws(1)
    assert [same for same, _ in first] == [same for same, _ in second]
    assert all(a != b for (_, a), (_, b) in zip(first, second, strict=True))


def test_another_number_of_processes_is_told(tmp_path, capsys, monkeypatch):
    run, optimizer = begun(tmp_path)
    run.stop_signal = signal.SIGINT
    with pytest.raises(Stopped):
        train(run, optimizer)
    run.lock.release()
    machine = hardware.Machine(torch.device("cpu"), world=2)
    monkeypatch.setattr(stage_run, "setup_machine", lambda: machine)
    capsys.readouterr()
    Run("sft", Config(out=tmp_path, precision="fp32", resume=True))
    assert "begun with 1 processes, now 2: other draws" in capsys.readouterr().out


def test_what_became_of_the_rows_is_printed_and_recorded(tmp_path, capsys):
    run, optimizer = begun(tmp_path)
    assert "rows.jsonl: 0 text rows; sha256 aaaaaaaaaaaa" in capsys.readouterr().out
    run.account("train", Counter({"rows": 3, "used": 2, "dropped: thumbs down": 1}))
    assert "train: 3 rows: 2 used, 1 dropped (thumbs down)" in capsys.readouterr().out
    train(run, optimizer)
    about = checkpoint.load_config(tmp_path)
    assert about["rows"] == {"train": {"rows": 3, "used": 2, "dropped: thumbs down": 1}}
    assert about["data"] == {"name": "rows.jsonl", "sha256": "a" * 64} and about["stage"] == "sft"


def test_what_models_write_cannot_steer_the_terminal(tmp_path, capsys):
    run, _ = begun(tmp_path)
    run.print("a text\x1b[2J\rwith é\nand a line")
    assert "a text\\x1b[2J\\rwith é\nand a line\n" in capsys.readouterr().out


def test_a_complete_run_is_swept(tmp_path):
    """Killed between the last flip and the clean-up, it leaves old folders; the next start removes them."""
    train(*begun(tmp_path))
    shutil.copytree(tmp_path / "latest", tmp_path / "step-000002")
    (tmp_path / ".step-000005.1a2b3c4d.gone").mkdir()
    run = Run("sft", Config(out=tmp_path, precision="fp32"))
    assert not run.begin(source())
    assert [p.name for p in tmp_path.glob("*step-*")] == ["step-000005"]


# ----------------------------------------------------------------------------- a step that fails


def test_H13_where_a_step_fails_finished_ones_are_saved(tmp_path):
    def fail(x):
        raise UserError(f"--reward mine:f failed: {x}")

    run, _ = begun(tmp_path)
    message = "^--reward mine:f failed: 7 \\(sft, step 4; the last checkpoint is that of step 3; --resume does this step again\\)$"
    with pytest.raises(UserError, match=message):
        for step in run.loop(5):
            if step == 3:
                run.together(fail, 7)
            run.model.wte.weight.data.fill_(step)
            run.log(step + 1, {"loss": run.together(lambda x: x + 1, step)})
            run.checkpoint(step + 1, due=step == 0)
    assert checkpoint.load_config(tmp_path)["step"] == 3 and steps_logged(tmp_path) == [1, 2, 3]
    assert (checkpoint.load_state(tmp_path)["wte.weight"] == 2).all()
    run.lock.release()
    assert begun(tmp_path, resume=True)[0].step == 3


def test_H13_where_it_fails_on_another_rank_this_one_stops_too(tmp_path, monkeypatch):
    run, _ = begun(tmp_path)
    monkeypatch.setattr(hardware.Machine, "any", lambda self, condition: True)
    with pytest.raises(
        UserError,
        match=r"^another process failed \(sft, step 1; no checkpoint yet; --resume does this step again\)$",
    ):
        run.together(lambda: 3)
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_H12_F20_numbers_that_are_not_finite_end_the_run_in_one_line(tmp_path, bad):
    run, _ = begun(tmp_path)
    run.require_finite(values=torch.zeros(3), scores=torch.ones(2))
    logprobs = torch.zeros(4, requires_grad=True)
    with pytest.raises(UserError) as error:
        run.require_finite(logprobs=logprobs * bad, values=torch.zeros(3), scores=torch.tensor([1.0, bad]))
    assert str(error.value) == (
        "logprobs and scores: not finite any more: lower the learning rate, or train in --precision fp32 "
        "(sft, step 1; no checkpoint yet)"
    )


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_H12_F20_no_step_is_taken_on_a_gradient_that_is_not_finite(tmp_path, max_norm, bad):
    run, optimizer = begun(tmp_path)
    before = [p.detach().clone() for p in run.model.parameters()]
    (run.model.wte.weight.sum() + run.model.wpe.weight[0, 0] * bad).backward()
    with pytest.raises(
        UserError,
        match=r"^the policy's gradient norm is (nan|inf): lower .*\(sft, step 1; no checkpoint yet\)$",
    ):
        run.take_step(optimizer, max_norm, "policy")
    assert all(map(torch.equal, before, run.model.parameters())) and not optimizer.state
    assert all(p.grad is None for p in run.model.parameters())


# ----------------------------------------------------------------------------- logs


def test_phases_add_up_and_are_logged(tmp_path, monkeypatch):
    clock = iter(range(1, 100))
    monkeypatch.setattr(stage_run.time, "perf_counter", lambda: float(next(clock)))
    run, _ = begun(tmp_path)
    for step in run.loop(2):
        run.phase("rollout")
        run.phase("update")
        run.phase("rollout")
        run.phase(None)
        run.log(step + 1, {"loss": 0.5}, "loss {loss:.1f}")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["time/rollout"], line["time/update"], line["loss"]) for line in lines] == [(2, 1, 0.5)] * 2
    assert lines[1]["time/seconds"] > lines[0]["time/seconds"] > 0


def texts(n: int) -> Texts:
    whole = torch.ones(n, 1, dtype=torch.bool)
    return Texts(torch.full((n, 1), 65), whole, torch.arange(66, 66 + n).view(n, 1), whole)


def test_texts_are_recorded_at_the_steps_that_were_asked_for(tmp_path, capsys):
    run, _ = begun(tmp_path)
    said = {
        "objective/scores": torch.tensor([1.0, 2, 3, 4]),
        "objective/kl": torch.zeros(4),
        "val/eos_rate": torch.ones(4),
    }
    for step in range(1, 7):
        run.record_texts(step, texts(4), said, 0.1, show=step == 4, every=3)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3] * 4 + [6] * 4
    assert rows[1] == {"step": 3, "prompt": "A", "response": "C", "score": 2.0, "kl": 0.0}
    shown = capsys.readouterr().out.splitlines()
    assert shown[-6:-4] == ["  'A' -> 'B'", "    score +1.00  kl 0.0  total +1.00"]
    run.record_texts(9, texts(4), said, 0.1, show=False, every=None)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8


def test_p30_a_first_rollout_of_which_nothing_ends_is_said(tmp_path, capsys, monkeypatch):
    """Once, and not where nothing can end.  The usual reason: a chat model that is fed bare text [P30]."""
    run, _ = begun(tmp_path)
    run.started = 0.0
    for step, rate in ((1, 0.25), (2, 0.0), (1, 0.0)):
        capsys.readouterr()
        monkeypatch.setattr(run, "bar", SimpleNamespace(set_postfix_str=lambda *_, **__: None), raising=False)
        run.log(step, {"val/eos_rate": rate})
        warned = "warning: no response of the first rollout ended by itself" in capsys.readouterr().out
        assert warned == (step == 1 and rate == 0)
    monkeypatch.setattr(run, "config", SimpleNamespace(stop=False))
    run.log(1, {"val/eos_rate": 0.0})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("keep", [0, 2, 5])
def test_D21_logger_drops_what_is_done_again(tmp_path, keep):
    tmp_path.joinpath("sft").mkdir()
    out = tmp_path / "sft"
    first = MetricLogger(out, 0, keep_until=0)
    for step in range(1, 6):
        first.log(step, {"loss": torch.tensor(step / 2), "n": step})
        first.write("samples", step, [{"response": "a\u2028b"}, {"response": "c}"}])
    for name in ("metrics", "samples"):
        with open(out / f"{name}.jsonl", "a") as file:
            file.write('{"step": 6, "lo": "f(x) {}')  # killed while it wrote; a brace is no end
    again = MetricLogger(out, 0, keep_until=keep)
    again.log(keep + 1, {"loss": 0.25, "n": 1})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, keep + 1), keep + 1]
    assert lines[:-1] == [{"step": step, "loss": step / 2, "n": step} for step in range(1, keep + 1)]
    if keep:
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n")[:-1]]
        assert rows == [{"step": s, "response": r} for s in range(1, keep + 1) for r in ("a\u2028b", "c}")]
    else:
        assert not (out / "samples.jsonl").exists()


class Killed(BaseException):
    """Not an Exception: like a kill, nothing may catch it."""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_F2_metrics_are_never_cut_in_place(tmp_path, monkeypatch, moment):
    """A run that is killed, or finds the disk full, while it resumes keeps its whole history."""
    first = MetricLogger(tmp_path, 0, keep_until=0)
    for step in range(1, 6):
        first.log(step, {"loss": step})
        first.write("samples", step, [{"response": "a"}])
    before = {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in ("metrics", "samples")}

    def die(*args):
        raise Killed

    where, name = {"write": (Path, "write_bytes"), "rename": (files.os, "replace")}[moment]
    monkeypatch.setattr(where, name, die)
    with pytest.raises(Killed):
        MetricLogger(tmp_path, 0, keep_until=3)
    assert {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in before} == before


def test_F2_lost_metrics_come_back_from_the_checkpoint(tmp_path):
    (tmp_path / "latest").mkdir()
    lines = "".join(json.dumps({"step": step, "loss": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "latest" / "metrics.jsonl").write_text(lines)
    for damaged in (b"", b'{"step": 3, "loss": 3}\n', b"\xff\xfe\n[1]\n{}\n" + lines.encode()[:30], None):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        if damaged is not None:
            (tmp_path / "metrics.jsonl").write_bytes(damaged)
        MetricLogger(tmp_path, 0, keep_until=3)
        assert (tmp_path / "metrics.jsonl").read_text() == lines
    MetricLogger(tmp_path, 0, keep_until=0)  # a new run takes nothing from the old one
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_the_first_rank_writes(tmp_path):
    MetricLogger(tmp_path / "sft", 1, False, 0).log(1, {"loss": 1.0})
    assert not (tmp_path / "sft").exists()
    run = Run("sft", Config(out=tmp_path / "out"))
    run.rank = 1
    run.begin(source())
    run.resume(TOKENIZER, GPT(SHAPE))
    for step in run.loop(1):
        run.log(step + 1, {"loss": 1.0})
        run.record_texts(1, texts(2), {"objective/scores": torch.ones(2)}, 0.1, show=True, every=1)
        run.checkpoint(step + 1, due=True)
    assert not (tmp_path / "out").exists() and run.saved_step == 1


def test_lines_without_a_step_are_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1}\n3\n[]\nnull\n{"loss": 2}\n{"step": "x"}\n{"step": 2}\n{"step": 3}'
    )
    assert logs.lines_until(tmp_path / "m.jsonl", 9) == ['{"step": 1}', '{"step": 2}']
    assert logs.lines_until(tmp_path / "none.jsonl", 9) == []


@pytest.mark.parametrize("steps, said", [(5, False), (4, True), (2, True)])
def test_a_run_that_ends_while_it_warms_up_says_so(steps, said):
    remark = all_warmup(train_sft.Config(warmup=4, lr=1e-3), steps)
    assert (remark is not None) == said
    assert all_warmup(train_ppo.Config(), 1) is None  # PPO has no warm-up
    of_members = train_rm.Config(warmup=4, members=2, lr=1e-3)  # each member has half of the steps
    assert "4 steps" in all_warmup(of_members, 8) and all_warmup(of_members, 10) is None
    if said:
        assert f"{steps} steps" in remark and "--lr 0.001" in remark
