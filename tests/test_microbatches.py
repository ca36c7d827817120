"""Microbatches and gradient checkpointing save memory and change nothing: gradients, losses and metrics [D17]."""

import json

import pytest

from tests.gradients import agree, gradients

# Steps too small to move anything: then each step's gradient is that of the same weights, however the batch was split.
STILL = ["--preset", "smoke", "--precision", "fp32", "--lr", "1e-12", "--weight-decay", "0"]
SFT = [*STILL, "--n-layer", "1", "--n-embd", "16", "--dropout", "0", "--epochs", "1", "--samples", "0"]
PPO = [*STILL[:-2], "--value-lr", "1e-12", "--iterations", "1", "--epochs", "1"]


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
    split = {None: [], "again": ["--gradient-checkpointing"]}
    for micro, options in (split | {n: ["--microbatch", n] for n in (1, 2, 4)}).items():
        with gradients() as found[micro]:
            out, inputs = tmp_path / str(micro), ["--init", smoke / "sft", "--reward-model", smoke / "rm"]
            assert run("train_ppo", *PPO, *inputs, *options, "--out", out) == 0
        agree(found[micro], found[None])
        (a,), (b,) = metrics(out), metrics(tmp_path / "None")
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
