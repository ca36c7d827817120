"""Bytes and operations that a run is said to need, against what is kept and done."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minirlhf import optim
from minirlhf.model import GPT, GPTConfig, ValueModel, train_last
from minirlhf.rollout import read_before, response_logprobs, response_values
from minirlhf.support import hardware
from minirlhf.tools import estimate

GPT2 = GPTConfig(vocab_size=50, context=64, n_layer=3, n_head=4, n_embd=32)
LLAMA = GPTConfig(
    50, 64, 3, 4, 32, n_kv_head=2, n_inner=40, norm="rms", positions="rotary", mlp="swiglu", bias=False
)
SHAPES = {"gpt2": GPT2, "llama": LLAMA}


def whole(rows: int, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(50, (rows, width)), torch.ones(rows, width, dtype=torch.bool)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_grow_by_the_row(shape, half, fused):
    torch.manual_seed(0)
    policy = GPT(shape)
    critic, known = ValueModel(shape, trunk=policy), [*policy.parameters()]

    def forward(n):
        tokens, mask = whole(n)
        hidden = read_before(policy, tokens, mask, 8)
        return response_logprobs(policy, tokens, mask, 8, 1.0, None, fused, hidden), response_values(
            critic, tokens, mask, 8, hidden
        )

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        said, kept = (
            estimate.activation_bytes(forward, 9, known),
            estimate.saved_bytes(lambda: forward(9), known),
        )
    assert kept > 9 * 19 * 32 * 3 * 4 * (
        5 if half else 10
    )  # at least ten numbers a channel and block, or as many halves
    assert said == pytest.approx(kept, rel=0.01)


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
    model, (tokens, mask) = GPT(shape), whole(16, 21)
    train_last(model, layers, torch.float32)
    with FlopCounterMode(display=False) as forward:
        logprobs, _ = response_logprobs(model, tokens, mask, 8, 1.0)
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    lengths, predicted = mask[:, 1:].sum(1), 16 * 13
    more = 4 * 32 * 16 * (20**2 - 20 * 21 / 2)  # of a block's forward
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
    assert estimate.trained_bytes(model.parameters()) == 4 * sum(p.numel() for p in model.parameters())
    train_last(model, 0, torch.bfloat16)
    assert estimate.trained_bytes(model.parameters()) == 4 * LLAMA.n_embd  # of the last norm
    assert len(estimate.parameters([model, ValueModel(LLAMA, trunk=model)])) == len([*model.parameters()]) + 4


def test_gemm_rate_is_a_rate():
    assert 1e8 < estimate.gemm_rate(256, 64, torch.float32, torch.device("cpu"), seconds=0.02) < 1e15


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.23e9, "1.2 GB"), (4.5e15, "4500.0 TB")]
)
def test_sizes_are_readable(n, said):
    assert estimate.size(n, "B") == said


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9), st.none() | st.integers(1, 60)
)
def test_rows_are_split_by_number_and_by_tokens(lengths, rows, tokens):
    lengths = torch.tensor(lengths)
    picks = torch.randperm(len(lengths))
    groups = optim.split_rows(lengths, rows, tokens, picks)
    assert torch.equal(torch.cat(groups), picks)
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        n = int(lengths[group].sum())
        assert 1 <= len(group) <= rows and (tokens is None or n <= tokens or len(group) == 1)
        if following is not None and len(group) < rows:  # no smaller than it had to be
            assert n + lengths[following[0]] > tokens


def test_dry_run_says_what_and_leaves_nothing(run, smoke, tmp_path, capsys):
    inputs = ["--init", smoke / "sft", "--reward-model", smoke / "rm", "--monitor", smoke / "judge"]
    assert run("train_ppo", "--preset", "smoke", *inputs, "--out", tmp_path / "ppo", "--dry-run") == 0
    said = capsys.readouterr().out
    for name in (
        "policy",
        "critic",
        "reference",
        "reward model",
        "judge",
        "weights",
        "a microbatch",
        "peak, about",
    ):
        assert name in said
    assert "4 optimiser steps an iteration" in said and not (tmp_path / "ppo").exists()


def test_profile_traces_the_second_iteration(run, smoke, tmp_path):
    inputs = [
        "--init",
        smoke / "sft",
        "--reward-model",
        smoke / "rm",
        "--iterations",
        "3",
        "--out",
        tmp_path / "ppo",
    ]
    assert run("train_ppo", "--preset", "smoke", *inputs, "--profile") == 0
    names = {
        event.get("name") for event in json.loads((tmp_path / "ppo/trace.json").read_text())["traceEvents"]
    }
    assert "aten::baddbmm" in names
    lines = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["time/gemm_share"] < 2 and line["time/tokens_per_second"] > 0 for line in lines)
