"""Bytes and operations that a run is told to need, against what is kept and done (minirlhf/tools/estimate.py)."""

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minirlhf import checkpoint
from minirlhf.model import GPT, GPTConfig, ValueModel
from minirlhf.rollout import Sampling, Texts, response_logprobs, response_values
from minirlhf.support import hardware
from minirlhf.support.prepare import train_last
from minirlhf.tools import estimate

GPT2 = GPTConfig(vocab_size=50, context=64, n_layer=3, n_head=4, n_embd=32)
LLAMA = GPTConfig(
    50, 64, 3, 4, 32, n_kv_head=2, n_inner=40, norm="rms", positions="rotary", mlp="swiglu", bias=False
)
QWEN3 = dataclasses.replace(LLAMA, head_dim=12, qk_norm=True)
SHAPES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}


def whole(rows: int, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(50, (rows, width)), torch.ones(rows, width, dtype=torch.bool)


def texts(rows: int, prompt: int = 8, response: int = 12) -> Texts:
    """Texts without padding."""
    (prompts, prompt_mask), (responses, response_mask) = whole(rows, prompt), whole(rows, response)
    return Texts(prompts, prompt_mask, responses, response_mask)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_grow_by_the_row(shape, half, fused):
    torch.manual_seed(0)
    policy, critic = GPT(shape), ValueModel(shape)
    sampling = Sampling(12, 1.0, 0, 0, fused_head=fused)
    known = [*policy.parameters(), *critic.parameters()]

    def forward(n):
        return response_logprobs(policy, texts(n), sampling), response_values(critic, texts(n))

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        told = estimate.activation_bytes(forward, 9, known)
        kept = estimate.saved_bytes(lambda: forward(9), known)
    numbers = 9 * 19 * 32 * 3 * 2  # rows, tokens, channels, blocks, models
    assert kept > numbers * 4 * (
        5 if half else 10
    )  # at least ten numbers per channel and block, or as many halves
    assert told == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_checkpointing_keeps_little_and_changes_no_gradient(shape):
    torch.manual_seed(0)
    model, (tokens, mask) = GPT(dataclasses.replace(shape, dropout=0.25)), whole(4)
    mask[1, 9:] = False
    kept, gradients = [], []
    for model.recompute in (False, True):
        known = [*model.parameters()]
        kept.append(estimate.saved_bytes(lambda: model(tokens, mask), known))
        hardware.seed_everything(3)
        model(tokens, mask).square().mean().backward()
        gradients.append([p.grad.clone() for p in known if p.grad is not None])
        model.zero_grad()
    assert kept[1] < kept[0] / 4
    assert len(gradients[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layers", [None, 2, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_operations_are_those_that_torch_counts(shape, layers):
    """But for attention: on short texts all pairs of tokens are computed, and half of them are needed."""
    torch.manual_seed(0)
    model, batch = GPT(shape), texts(16, 8, 13)
    train_last(model, layers, torch.float32)
    with FlopCounterMode(display=False) as forward:
        logprobs, _ = response_logprobs(model, batch, Sampling(13, 1.0, 0, 0))
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    lengths, predicted = batch.mask[:, 1:].sum(1), 16 * 13
    width = shape.n_head * shape.head_dim
    more = 4 * width * 16 * (20**2 - 20 * 21 / 2)  # of a block's forward
    block, last, head = estimate.forward_operations(model, lengths, predicted, True)
    assert 2 * block + last + head + 3 * more == forward.get_total_flops()
    both = estimate.training_operations(model, lengths, predicted, True) + (3 + 2 * (layers or 3)) * more
    assert both == forward.get_total_flops() + backward.get_total_flops()


def test_a_causal_token_looks_back_and_an_encoders_everywhere():
    lengths = torch.tensor([3, 1])
    of = lambda causal: estimate.forward_operations(
        GPT(dataclasses.replace(GPT2, causal=causal)), lengths, 4, False
    )
    assert of(False)[0] - of(True)[0] == 4 * 32 * ((9 + 1) - (6 + 1))
    assert of(True)[0] == of(True)[1] and of(True)[2] == 0


def test_bytes_of_the_cache_and_of_what_is_trained():
    model = GPT(LLAMA)
    assert estimate.cache_bytes(LLAMA, 5, 20) == 2 * 4 * 3 * 2 * 8 * 5 * 20
    assert estimate.cache_bytes(QWEN3, 5, 20) == 2 * 4 * 3 * 2 * 12 * 5 * 20
    assert estimate.trained_bytes(model.parameters()) == 4 * sum(p.numel() for p in model.parameters())
    train_last(model, 0, torch.bfloat16)
    assert estimate.trained_bytes(model.parameters()) == 4 * LLAMA.n_embd  # of the last norm
    assert len(estimate.parameters([model, model])) == len([*model.parameters()])


def test_gemm_rate_is_a_rate():
    assert 1e8 < estimate.gemm_rate(256, 64, torch.float32, torch.device("cpu"), seconds=0.02) < 1e15


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.23e9, "1.2 GB"), (4.5e15, "4500.0 TB")]
)
def test_sizes_are_readable(n, said):
    assert estimate.size(n, "B") == said


# ----------------------------------------------------------------------------- the command

SMALL = ["--batch", 16, "--minibatch", 8, "--response-tokens", 12, "--precision", "fp32"]


def told(run, capsys, *argv) -> dict[str, str]:
    """What the command prints, by the name at the beginning of the line."""
    assert run("minirlhf.estimate", *argv) == 0
    lines = [
        re.split(r"\s{2,}|: | (?=[\d,]+ param)", line, maxsplit=1)
        for line in capsys.readouterr().out.splitlines()
    ]
    return {name.strip(): rest for name, rest in lines}


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * 1000 ** ("B", "kB", "MB", "GB").index(unit)


def test_the_command_counts_what_ppo_holds(run, smoke, capsys):
    models = ["--reward-model", smoke / "rm", "--monitor", smoke / "judge"]
    found = told(run, capsys, smoke / "sft", *models, *SMALL)
    policy = sum(p.numel() for p in checkpoint.load_gpt(smoke / "sft").parameters())
    critic = sum(p.numel() for p in checkpoint.load_reward(smoke / "rm")[0].parameters())
    for name, count, trained in (
        ("policy", policy, policy),
        ("critic", critic, critic),
        ("reference", policy, 0),
        ("reward model", critic, 0),
        ("judge", critic, 0),
    ):
        assert found[name] == f"{count:,} parameters, {trained:,} trained"
    assert in_bytes(found["weights"]) == pytest.approx(4 * (2 * policy + 3 * critic), rel=0.02)
    assert in_bytes(found["Adam's moments"]) == pytest.approx(8 * (policy + critic), rel=0.03)
    assert in_bytes(found["gradients"]) == pytest.approx(4 * max(policy, critic), rel=0.03)
    assert in_bytes(found["peak, about"]) > sum(
        in_bytes(found[k]) for k in ("Adam's moments", "gradients", "a microbatch")
    )
    assert found["a rollout"].startswith("up to 272 tokens, 192 of them")  # 16 texts of 1 + 4 + 12
    assert found["an epoch over it"].startswith("2 optimiser steps, ")


def test_without_a_critic_there_is_none_to_hold(run, smoke, capsys):
    said = []
    for algorithm in ("ppo", "grpo"):
        assert run("minirlhf.estimate", smoke / "sft", *SMALL, "--algorithm", algorithm) == 0
        said.append(capsys.readouterr().out)
    assert "critic" in said[0] and "critic" not in said[1]
    weights = [float(re.search(r"weights +([\d.]+) MB", text)[1]) for text in said]
    assert weights[1] < 0.7 * weights[0]  # policy and reference, of three models of one size


def test_what_saves_memory_is_seen_to(run, smoke, capsys):
    plain = told(run, capsys, smoke / "sft", *SMALL, "--response-tokens", 60)
    for options, less, same in (
        (["--microbatch", 2], "a microbatch", "weights"),
        (["--gradient-checkpointing"], "a microbatch", "weights"),
        (["--train-layers", 1], "Adam's moments", "keys and values of a rollout"),
        (["--precision", "bf16"], "weights", "keys and values of a rollout"),
    ):
        found = told(run, capsys, smoke / "sft", *SMALL, "--response-tokens", 60, *options)
        assert in_bytes(found[less]) < 0.9 * in_bytes(plain[less]), options
        assert found[same] == plain[same]
    assert "reward model" not in plain and plain["critic"].startswith(plain["policy"].split()[0][:2])


@pytest.mark.parametrize("options, message", [
    (["--batch", "0"], "--batch: must be at least 1"), (["--minibatch", "x"], "must be a whole number"),
    (["--batch", "10"], "--batch 10 is not divisible by --minibatch 32"), (["--response-tokens", "1000"], "the policy's context"),
    (["--train-layers", "9"], "the model has 2 layers"), (["--bach", "8"], "--bach"), (["--reward-model", "README.md"], "README.md"),
])  # fmt: skip
def test_mistakes_are_one_line(run, smoke, capsys, options, message):
    assert run("minirlhf.estimate", smoke / "sft", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_large_numbers_are_only_counted(run, smoke, capsys):
    """No tensor of their size is made."""
    found = told(run, capsys, smoke / "sft", "--batch", 10**9, "--minibatch", 10**9)
    assert found["a rollout"].startswith("up to 29,000,000,000 tokens") and "TB" in found["a microbatch"]


def test_what_writes_no_text_has_no_policy(run, smoke, capsys):
    assert run("minirlhf.estimate", smoke / "rm") == 2 and "writes no text" in capsys.readouterr().err
