"""What the stage scripts share: optimiser, seeds, logs, claims on a folder; gradients over microbatches and ranks."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import train_ppo
import train_sft
from minirlhf import UserError, checkpoint, optim
from minirlhf import run as stage_run
from minirlhf.model import GPT, GPTConfig
from minirlhf.support import cli, hardware
from minirlhf.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
ALONE = hardware.Machine(torch.device("cpu"))
# Steps too small to move anything: then each step's gradient is that of the same weights, however the batch was split.
STILL = ["--preset", "smoke", "--precision", "fp32", "--lr", "1e-12", "--weight-decay", "0"]
SFT = [*STILL, "--n-layer", "1", "--n-embd", "16", "--dropout", "0", "--epochs", "1", "--samples", "0"]
PPO = [*STILL[:-2], "--value-lr", "1e-12", "--iterations", "1", "--epochs", "1"]


@contextlib.contextmanager
def gradients():
    """A list that fills with the gradient of each optimiser step, flat, before it is clipped."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, *rest):
        parameters = list(parameters)
        zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
        found.append(torch.cat([zero(p).flatten().clone() for p in parameters]))
        return clip(parameters, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
        yield found


def agree(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """To 1e-6 of the gradient's norm, at every step [D17]."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.norm() > 1e-3  # or there would be nothing to compare
        assert (x - y).norm() <= 1e-6 * max(1, x.norm())


# ----------------------------------------------------------------------------- microbatches and ranks


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of short texts of several lengths, so that microbatches differ in tokens."""
    path = tmp_path_factory.mktemp("few") / "texts.jsonl"
    texts = [f"{i} " + "word " * (i % 7) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_D17_sft_gradients_do_not_know_microbatches(run, few, tmp_path, metrics):
    found, logs = {}, {}
    for micro in (None, 1, 2, 4, "again"):
        options = {None: [], "again": ["--gradient-checkpointing"]}.get(micro, ["--microbatch", micro])
        with gradients() as found[micro]:
            out = tmp_path / str(micro)
            assert (
                run("train_sft", *SFT, "--data", few, "--vocab", 300, "--batch", 16, *options, "--out", out)
                == 0
            )
        logs[micro] = metrics(out)
        agree(found[micro], found[None])
        for a, b in zip(logs[micro], logs[None], strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_a_reward_model_learns_the_same_when_blocks_are_made_again(run, smoke, tmp_path, metrics):
    logs = []
    for name, options in {"kept": [], "again": ["--gradient-checkpointing"]}.items():
        options = [
            "--preset",
            "smoke",
            "--precision",
            "fp32",
            "--init",
            smoke / "sft",
            "--epochs",
            1,
            *options,
        ]
        assert run("train_rm", *options, "--out", tmp_path / name) == 0
        logs.append(metrics(tmp_path / name))
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_D17_ppo_gradients_do_not_know_microbatches(run, smoke, tmp_path, metrics):
    found = {}
    split = {None: [], "tokens": ["--tokens-per-microbatch", 40], "again": ["--gradient-checkpointing"]}
    for micro, options in (split | {n: ["--microbatch", n] for n in (1, 2, 4)}).items():
        with gradients() as found[micro]:
            out, inputs = tmp_path / str(micro), ["--init", smoke / "sft", "--reward-model", smoke / "rm"]
            assert run("train_ppo", *PPO, *inputs, *options, "--out", out) == 0
        agree(found[micro], found[None])
        (a,), (b,) = metrics(out), metrics(tmp_path / "None")
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


DRIVER = """
import importlib, json, os, signal, sys
from safetensors.torch import save_file
from test_training import gradients
from minirlhf import UserError, optim, run as stage_run
from minirlhf.support import hardware, cli

rank = os.environ["RANK"]
runs, found, said = json.loads(sys.argv[1]), {}, {}
log = stage_run.MetricLogger.log
for name, script, argv in runs:
    def log_and_stop(self, step, metrics):
        log(self, step, metrics)
        if name == "stopped" and rank == "1" and step == 1:
            signal.raise_signal(signal.SIGINT)
    stage_run.MetricLogger.log = log_and_stop
    sys.argv = [script, *argv]
    with gradients() as grads:
        try:
            importlib.import_module(script).main()
        except UserError as mistake:
            said[name] = str(mistake)
    found |= {f"{name}.{i}": g for i, g in enumerate(grads)}
save_file(found, f"grads.{rank}")
json.dump(said, open(f"said.{rank}", "w"))
"""


@pytest.fixture(scope="module")
def two_ranks(smoke, tmp_path_factory):
    """The stages on two processes, as torchrun would start them: (folder, gradients and messages of each rank, options)."""
    home = tmp_path_factory.mktemp("ranks")
    inputs = ["--init", str(smoke / "sft"), "--reward-model", str(smoke / "rm")]
    still_rm = [
        *STILL,
        "--init",
        str(smoke / "sft"),
        "--dropout",
        "0",
        "--epochs",
        "1",
        "--normalise-samples",
        "8",
    ]
    runs = [
        (
            "sft",
            "train_sft",
            [*SFT, "--batch", "311"],
        ),  # of 312 texts: the other batch holds one, so a rank has none
        ("rm", "train_rm", [*still_rm, "--batch", "311"]),
        ("ppo", "train_ppo", [*PPO, *inputs]),
        ("odd", "train_ppo", [*PPO, *inputs, "--batch", "15", "--minibatch", "15"]),
        ("stopped", "train_sft", [*SFT, "--batch", "100"]),
    ]
    argv = {name: options for name, _, options in runs}
    runs = [(name, script, [*options, "--out", str(home / name)]) for name, script, options in runs]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "driver.py").write_text(DRIVER)
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "driver.py", json.dumps(runs)], cwd=home, env=environment | {"RANK": str(rank)},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.wait(timeout=300) == 0, process.stderr.read()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    read = lambda rank: (load_file(home / f"grads.{rank}"), json.loads((home / f"said.{rank}").read_text()))
    return home, *zip(read(0), read(1), strict=True), argv


def steps(grads: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    return [grads[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in grads))]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_D17_ranks_take_the_same_step(two_ranks, stage):
    first, second = (steps(grads, stage) for grads in two_ranks[1])
    assert len(first) == len(second) > 0
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("stage", "script"), [("sft", "train_sft"), ("rm", "train_rm")])
def test_D17_two_ranks_take_the_step_of_one(two_ranks, run, metrics, tmp_path, stage, script):
    """A rank without a text included: gradients, losses and what validation finds."""
    home, (grads, _), _, argv = two_ranks
    with gradients() as alone:
        assert run(script, *argv[stage], "--out", tmp_path) == 0
    agree(steps(grads, stage), alone)
    for a, b in zip(metrics(home / stage), metrics(tmp_path), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_D17_ppo_on_two_ranks_logs_what_one_logs(two_ranks, metrics, smoke):
    (line,), one = metrics(two_ranks[0] / "ppo"), metrics(smoke / "ppo")[0]
    assert line.keys() == one.keys() - {"objective/judge"}
    assert all(math.isfinite(v) for v in line.values())
    assert line["val/ratio"] == pytest.approx(1, abs=1e-6)  # a sum over ranks: 1, not 2 or a half
    assert line["episode"] == one["episode"] and 1 <= line["val/response_length"] <= 12


def test_sizes_that_ranks_do_not_divide_are_refused(two_ranks):
    home, _, said, _ = two_ranks
    assert all("--batch over 2 processes: 15 does not divide by 2" in messages["odd"] for messages in said)
    assert not (home / "odd").exists()


def test_ctrl_c_on_one_rank_stops_all_at_the_same_step(two_ranks):
    home, _, said, _ = two_ranks
    assert all(messages["stopped"].startswith("stopped at step 1 of 4") for messages in said)
    assert checkpoint.load_config(home / "stopped")["step"] == 1


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_D17_sums_add_up(parts, cut):
    """3.7, not 2.5: a mean over parts of unequal size is the sum of their sums over the sum of their sizes."""
    sums = optim.Sums()
    for part in parts:
        sums.add(
            {"a": torch.tensor(float(part), requires_grad=True), "b": torch.tensor(1, dtype=torch.bfloat16)}
        )
    assert sums.over_ranks(ALONE) == {"a": float(sum(parts)), "b": float(len(parts))}


# ----------------------------------------------------------------------------- optimiser


def test_D16_adam_eps_of_ppo_reaches_the_optimiser(run, smoke, monkeypatch, tmp_path):
    assert train_ppo.Config().adam_eps == 1e-5 and {p.adam_eps for p in train_ppo.PRESETS.values()} == {1e-5}
    made, adamw = [], optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda *args: made.append(adamw(*args)) or made[-1])
    options = ["--init", smoke / "sft", "--reward-model", smoke / "rm", "--out", tmp_path]
    assert run("train_ppo", *PPO, *options, "--lr", 3e-4, "--value-lr", 2e-4) == 0
    assert len(made) == 2
    for optimizer, lr in zip(made, (3e-4, 2e-4), strict=True):
        for group in optimizer.param_groups:
            assert (group["eps"], group["betas"], group["weight_decay"], group["lr"]) == (
                1e-5,
                (0.9, 0.999),
                0.0,
                lr,
            )


def test_D16_where_torch_places_eps():
    """A first step at g = 1e-6 is 28.8 times TensorFlow's, which adds eps before the bias correction."""
    p, g, lr, eps, beta2 = torch.nn.Parameter(torch.zeros(1, 1)), 1e-6, 1e-3, 1e-5, 0.999
    holder = torch.nn.Module()
    holder.p = p
    optimizer = optim.adamw([holder], lr, 0.0, (0.9, beta2), eps)
    p.grad = torch.full_like(p, g)
    optimizer.step()
    torch_step = -p.item()
    assert torch_step == pytest.approx(lr * g / (g + eps), rel=1e-4)
    tensorflow_step = lr * math.sqrt(1 - beta2) * g / (math.sqrt(1 - beta2) * g + eps)
    assert torch_step / tensorflow_step == pytest.approx(28.8, abs=0.05)


def test_decay_is_on_matrices_only():
    model = GPT(GPTConfig(16, context=8, n_layer=1, n_head=1, n_embd=4))
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer = optim.adamw([model, frozen], 0.1, 0.5, (0.9, 0.95), 1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.dim() == 2 else 1), atol=1e-7), name
    optim.set_lr(optimizer, 7.0)
    assert {group["lr"] for group in optimizer.param_groups} == {7.0}


def test_warmup_cosine():
    factors = [optim.warmup_cosine(step, 104, 4) for step in range(104)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[54] == pytest.approx(0.5) and factors[29] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.001
    assert optim.warmup_cosine(0, 10, 0) == 1.0
    assert optim.warmup_cosine(5, 6, 5) == 1.0
    assert math.isfinite(optim.warmup_cosine(3, 3, 3))  # warm-up as long as the run


def test_sft_learning_rate_follows_the_schedule(smoke, metrics):
    config, lines = train_sft.PRESETS["smoke"], metrics(smoke / "sft")
    factors = [optim.warmup_cosine(i, len(lines), config.warmup) for i in range(len(lines))]
    assert [line["lr"] for line in lines] == pytest.approx([config.lr * f for f in factors])


# ----------------------------------------------------------------------------- seeds, machine


def draws() -> tuple:
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()


@given(
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_D21_seeds_are_a_function_of_their_parts(a, b):
    hardware.seed_everything(*a)
    first = draws()
    draws()
    hardware.seed_everything(*b)
    other = draws()
    hardware.seed_everything(*a)
    assert draws() == first
    # SeedSequence reads (1, 0) as (1,): only zeros at the end are lost.
    if (a + [0, 0])[:3] != (b + [0, 0])[:3]:
        assert all(x != y for x, y in zip(first, other, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_exact_div(a, b):
    assert optim.exact_div(a * b, b, "batch") == a
    if b > 1:
        with pytest.raises(UserError, match=rf"^--batch: {a * b + 1} does not divide by {b}$"):
            optim.exact_div(a * b + 1, b, "--batch")


def test_pick_precision(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(hardware, "has_fast_bf16", lambda fast=fast: fast)
        assert hardware.pick_precision("auto") == ("bf16" if fast else "fp32")
        assert [hardware.pick_precision(wish) for wish in ("fp32", "bf16")] == ["fp32", "bf16"]
    x = torch.randn(4, 4)
    with ALONE.autocast("bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with ALONE.autocast("fp32"):
        assert (x @ x).dtype == torch.float32


def test_run_script(capsys):
    def mistaken():
        raise UserError("a.jsonl:3: text: missing")

    with pytest.raises(SystemExit) as stop:
        cli.run_script(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: a.jsonl:3: text: missing\n")
    cli.run_script(lambda: None)
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        cli.run_script(lambda: 1 / 0)


# ----------------------------------------------------------------------------- a stage's folder


@pytest.mark.parametrize("keep", [0, 2, 5])
def test_D21_logger_drops_what_is_done_again(tmp_path, keep):
    out = tmp_path / "new" / "sft"
    first = stage_run.MetricLogger(out, ALONE, tensorboard=False, keep_until=0)
    for step in range(1, 6):
        first.log(step, {"loss": torch.tensor(step / 2), "n": step})
        first.write("samples", step, [{"response": "a\u2028b"}, {"response": "c"}])
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    again = stage_run.MetricLogger(out, ALONE, tensorboard=False, keep_until=keep)
    again.log(keep + 1, {"loss": 0.25, "n": 1})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, keep + 1), keep + 1]
    assert lines[:-1] == [{"step": step, "loss": step / 2, "n": step} for step in range(1, keep + 1)]
    if keep:
        texts = [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n")[:-1]]
        assert texts == [{"step": s, "response": r} for s in range(1, keep + 1) for r in ("a\u2028b", "c")]
    else:
        assert not (out / "samples.jsonl").exists()


def test_only_the_first_rank_logs(tmp_path):
    out = tmp_path / "sft"
    stage_run.MetricLogger(out, hardware.Machine(torch.device("cpu"), rank=1, world=2), False, 0).log(
        1, {"loss": 1.0}
    )
    assert not out.exists()


def test_claim(tmp_path):
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    config = train_sft.Config(out=tmp_path, data_dir=tmp_path)

    def leave(complete: bool) -> None:
        about = stage_run.describe("sft", GPTConfig(258), config, 7, complete, tokenizer)
        checkpoint.save(tmp_path, 7, {"w": torch.ones(1)}, about, tokenizer)

    claim = lambda resume=False, overwrite=False, **other: stage_run.claim(
        tmp_path, train_sft.Config(**{"out": tmp_path, "data_dir": tmp_path} | other), resume, overwrite
    )
    assert claim() == claim(resume=True) == "start"
    leave(complete=False)
    assert claim(resume=True) == "resume" and claim(overwrite=True) == "start"
    with pytest.raises(
        UserError, match=r"unfinished run \(step 7\): --resume goes on, --overwrite starts again"
    ):
        claim()
    leave(complete=True)
    assert claim() == claim(resume=True) == "skip" and claim(overwrite=True) == "start"
    assert (
        claim(tensorboard=True, data_dir=None, out=Path("elsewhere")) == "skip"
    )  # none of these changes the result
    for resume in (False, True):
        with pytest.raises(UserError, match="another batch, lr, seed: choose a new --out, or --overwrite"):
            claim(resume=resume, lr=1.0, batch=8, seed=3)
    assert claim(lr=1.0, overwrite=True) == "start"


def test_interrupt_asks_once_and_the_second_time_stops(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stage_run.Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "stopping after this step" in capsys.readouterr().err


def test_stopwatch_adds_up():
    times = {"a": 1.0}
    with stage_run.stopwatch(times, "a"), stage_run.stopwatch(times, "b"):
        pass
    assert 1.0 < times["a"] < 1.5 and 0 < times["b"] < 0.5
