"""The optimiser, its step, learning rates, and sums over microbatches and ranks (minirlhf/optim.py)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_ppo
import train_sft
from minirlhf import UserError, optim
from minirlhf.model import GPT, GPTConfig
from minirlhf.support import hardware
from minirlhf.support.history import History, Sums
from tests.ranks import in_ranks

ALONE = hardware.Machine(torch.device("cpu"))


class Rank:
    """A Machine and a Run in one, of a rank that is a thread."""

    device = torch.device("cpu")

    def __init__(self, sum_):
        self.sum_tensors = sum_

    def sum_(self, x):
        self.sum_tensors([x] if isinstance(x, torch.Tensor) else x)
        return x

    def sum_gradients(self, parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.sum_(p.grad)

    def clip_gradients(self, parameters, max_norm):
        return ALONE.clip_gradients(parameters, max_norm)


def test_D16_adam_eps_of_ppo_reaches_the_optimiser(run, smoke, monkeypatch, tmp_path):
    assert train_ppo.Config().adam_eps == 1e-5 and {p.adam_eps for p in train_ppo.PRESETS.values()} == {1e-5}
    made, adamw = [], optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda *args: made.append(adamw(*args)) or made[-1])
    options = ["--preset", "smoke", "--iterations", 1, "--epochs", 1, "--out", tmp_path]
    options += ["--init", smoke / "sft", "--reward-model", smoke / "rm"]
    assert run("train_ppo", *options, "--lr", 3e-4, "--value-lr", 2e-4) == 0
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


def test_embeddings_may_learn_faster():
    """A rare word is in few batches.  Its factor stays when the schedule sets the rate."""
    model = GPT(GPTConfig(16, context=8, n_layer=1, n_head=1, n_embd=4))
    optimizer = optim.adamw([model], 0.1, 0.0, (0.9, 0.95), 1e-8, embedding_scale=12.0)
    optim.set_lr(optimizer, 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = 0.12 if name == "wte.weight" else 0.01
        torch.testing.assert_close(
            before[name] - p, torch.full_like(p, expected), atol=1e-6, rtol=1e-4, msg=name
        )


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


def test_warmup_linear():
    factors = [optim.warmup_linear(step, 10, 4) for step in range(10)]
    assert factors == pytest.approx([0.25 * 1, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert optim.warmup_linear(0, 3, 0) == 1.0


# ----------------------------------------------------------------------------- a step


def two_parameters(gradient: list[float]) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in gradient]
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = torch.full_like(p, g)
    return torch.optim.SGD(parameters, lr=1.0)


def moved(optimizer: torch.optim.Optimizer) -> list[float]:
    return [-p.item() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("max_norm", "expected"), [(0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (0.5, [0.3, 0.4])]
)
def test_H2_a_step_is_clipped_to_its_norm_and_0_clips_nothing(max_norm, expected):
    optimizer = two_parameters([3.0, 4.0])
    assert optim.take_step(ALONE, optimizer, max_norm) == pytest.approx(5.0)
    assert moved(optimizer) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])


def test_D17_a_step_is_that_of_the_gradients_sum_over_ranks():
    """The norm, too: gradients of ranks may cancel.  A rank whose share had no token takes part."""

    def step(rank, sum_):
        optimizer = two_parameters([[3.0, -4.0], [-3.0, 0.0], [5.0, 0.0]][rank])
        if rank == 1:
            optimizer.param_groups[0]["params"][1].grad = None
        return optim.take_step(Rank(sum_), optimizer, 1.0), moved(optimizer)

    for norm, move in in_ranks(3, step):
        assert norm == pytest.approx(math.hypot(5, 4)) and move == pytest.approx(
            [5 / norm, -4 / norm], rel=1e-4
        )


def test_F20_ranks_refuse_a_step_together():
    """One rank's nan is in the sum, so that all raise, and none moves."""

    def step(rank, sum_):
        optimizer = two_parameters([1.0, math.nan if rank else 1.0])
        with pytest.raises(
            UserError,
            match="^the critic's gradient norm is nan: lower its learning rate, or use fp32",
        ):
            optim.take_step(Rank(sum_), optimizer, 1.0, "critic")
        return moved(optimizer)

    assert in_ranks(2, step) == [[0.0, 0.0]] * 2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_minibatches_are_every_row_once_an_epoch(n, size, epochs):
    found = list(optim.minibatches(n, size, epochs))
    per_epoch = -(-n // size)
    assert len(found) == epochs * per_epoch and max(map(len, found)) <= size
    for k in range(epochs):
        rows = torch.cat(found[k * per_epoch : (k + 1) * per_epoch])
        assert sorted(rows.tolist()) == list(range(n))


def test_minibatches_are_in_random_order_and_another_one_each_epoch():
    torch.manual_seed(0)
    first, second = list(optim.minibatches(50, 50, 2))
    assert first.tolist() != second.tolist() and list(range(50)) not in (first.tolist(), second.tolist())
    torch.manual_seed(0)
    assert torch.equal(next(optim.minibatches(50, 50, 1)), first)


def test_the_head_is_fused_where_logits_are_large():
    limit = 2**27 // (4 * 50_000)  # tokens whose logits take 128 MiB in fp32
    assert [optim.fuse_head("auto", limit + k, 50_000) for k in (0, 1)] == [False, True]
    assert optim.fuse_head("on", 1, 1) and not optim.fuse_head("off", 10**6, 10**6)


# ----------------------------------------------------------------------------- sums over microbatches and ranks


@given(st.integers(0, 10_000), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_exact_div(a, b):
    assert optim.exact_div(a * b, b, "batch") == a
    if b > 1:
        with pytest.raises(UserError, match=rf"^--batch: {a * b + 1} is not divisible by {b}$"):
            optim.exact_div(a * b + 1, b, "--batch")


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_D17_sums_add_up(parts, cut):
    """3.7, not 2.5: a mean over parts of unequal size is the sum of their sums over the sum of their sizes."""
    sums = Sums()
    for part in parts:
        sums.add(
            {"a": torch.tensor(float(part), requires_grad=True), "b": torch.tensor(1, dtype=torch.bfloat16)}
        )
    assert sums.over_ranks(ALONE) == {"a": float(sum(parts)), "b": float(len(parts))}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_D17_sums_over_ranks(world):
    def add(rank, sum_):
        sums, machine = Sums(), Rank(sum_)
        for k in range(2):
            sums.add({"a": torch.tensor(1.0 + rank + k), "b": torch.tensor(10.0)})
        before = sums.sum(machine, "a"), sums.sum(machine, "a")  # asking changes nothing
        return before, sums.over_ranks(machine)

    a = float(sum(3 + 2 * rank for rank in range(world)))
    assert in_ranks(world, add) == [((a, a), {"a": a, "b": 20.0 * world})] * world


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("left_early", [False, True])
def test_D22_an_updates_statistics_are_means_over_its_tokens(world, left_early):
    """Steps weigh as many tokens as they have; a last step that was left has no statistics of the value model."""
    tokens, ratios, losses = [10.0, 30.0, 60.0], [1.0, 1.1, 1.4], [0.5, 0.3, 0.2]

    def update(rank, sum_):
        history = History()
        for k in range(3):
            stats = history.new_step(torch.tensor(tokens[k]))
            for share in (0.25, 0.75):  # microbatches; a rank adds its share of the minibatch's mean
                stats.add({"val/ratio": torch.tensor(ratios[k] * share / world)})
                if not (left_early and k == 2):
                    stats.add({"loss/value_avg": torch.tensor(losses[k] * share / world)})
        if left_early:
            history.leave_step()
        return history.means(Rank(sum_))

    steps = 2 if left_early else 3
    expected = {
        "val/ratio": np.average(ratios, weights=tokens),
        "loss/value_avg": np.average(losses[:steps], weights=tokens[:steps]),
        "val/ratio_var": np.var(ratios),
        "optimizer_steps": steps,
    }
    for found in in_ranks(world, update):
        assert found == pytest.approx(expected, rel=1e-6) and list(found)[0] == "val/ratio"
