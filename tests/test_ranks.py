"""Two processes equal one on the same tokens [D17]: gradients, weights, metrics, and when they stop."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_ppo
from minirlhf import checkpoint, data, optim
from minirlhf import run as stage_run
from minirlhf.algorithms import ALGORITHMS
from minirlhf.rollout import Texts
from minirlhf.support import hardware
from tests.gradients import agree, gradients
from tests.two_ranks import start, steps

pytestmark = pytest.mark.long

SMALL = ["--preset", "smoke", "--precision", "fp32"]
TINY = [*SMALL, "--n-layer", "1", "--n-embd", "16", "--dropout", "0", "--samples", "0"]
RM = [*SMALL, "--dropout", "0", "--epochs", "1", "--normalise-samples", "8"]
INPUTS = {
    "train_sft": [],
    "train_rm": ["--init", "{sft}"],
    "train_ppo": ["--init", "{sft}", "--reward-model", "{rm}"],
    "train_dpo": ["--init", "{sft}"],
}
CASES = {
    # 311 of 312 texts a batch: the other batch holds one, so a rank has none.  Stops early.
    "sft": ("train_sft", [*TINY, "--batch", "311"]),
    "sft, stopped early": ("train_sft", [*TINY, "--batch", "312", "--epochs", "4", "--patience", "1", "--lr", "1e-30", "--weight-decay", "0"]),
    "rm": ("train_rm", [*RM, "--batch", "311"]),
    "rm, pairs of ratings": ("train_rm", [*RM, "--loss", "pairwise"]),
    "rm, both": ("train_rm", [*RM, "--loss", "both", "--batch", "100", "--raters", "majority"]),
    "rm, choices": ("train_rm", [*RM, "--data", "{choices}", "--batch", "50", "--normalise", "bias"]),
    # 311 of 312 pairs per batch: the other batch holds one, so a rank has none.
    "dpo": ("train_dpo", [*SMALL, "--pairs", "1", "--batch", "311", "--epochs", "2"]),
    "dpo, parts": ("train_dpo", [*SMALL, "--pairs", "1", "--batch", "52", "--microbatch", "7"]),
    "ipo, choices": ("train_dpo", [*SMALL, "--loss", "ipo", "--data", "{choices}", "--batch", "50"]),
    "ppo": ("train_ppo", SMALL),
    "ppo, whitened rewards": ("train_ppo", [*SMALL, "--whiten-rewards", "--kl-target", "0.05", "--kl-horizon", "50",
                                            "--iterations", "3", "--max-approxkl", "0.001", "--lr", "2e-4"]),
} | {name: ("train_ppo", [*SMALL, "--iterations", "2", "--algorithm", name]) for name in ALGORITHMS if name != "ppo"}  # fmt: skip
CASES["gspo"][1].extend(
    ["--clip-range", "0.2"]
)  # at its own, this learning rate leaves no gradient in the second pass


def choices(path: Path) -> Path:
    """Votes on pairs of toy texts, the shorter text before a longer one and the other way round."""
    texts = [record.response for record in data.load("toy").records]
    rows = [{"prompt": f"{i}:", "response_a": texts[i], "response_b": texts[i + 7], "votes": {"a": 1 + i % 3, "b": i % 2}}
            for i in range(150)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def same_tokens(world: int):
    """In train_ppo.py: responses that depend on their prompts and places in a group alone, and steps on the same texts for any
    number of ranks.

    Sampling is a function of (seed, stage, step, rank), so that real ranks draw other tokens than one process."""

    def generate(policy, queries, query_mask, sampling):
        seeds = (queries * query_mask).sum(1, keepdim=True) + torch.arange(len(queries))[:, None] % 8
        places = torch.arange(sampling.max_new)
        responses = (seeds * 7 + places * 13 + seeds * places) % 300
        lengths = 1 + seeds % sampling.max_new
        ended = (places == lengths - 1) & (seeds % 3 > 0)
        mask = places < lengths
        responses = torch.where(mask, torch.where(ended, sampling.eos[0], responses), sampling.pad)
        return Texts(queries, query_mask, responses, mask)

    def minibatches(n, size, epochs):
        for epoch in range(epochs):
            order = torch.randperm(n * world // 2, generator=torch.Generator().manual_seed(epoch))
            for rows in order.split(size * world // 2):
                yield torch.cat([rows + rank * len(order) for rank in range(2 // world)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "generate", generate)
        patch.setattr(optim, "minibatches", minibatches)
        yield


REWARD = """
import os
calls = []
def late(prompts, responses):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise ConnectionError("judge: reset")
    return [0.1 * len(r) for r in responses]
"""


@pytest.fixture(scope="module")
def two_ranks(smoke, tmp_path_factory):
    """All cases on two processes, as torchrun would start them: (folder, gradients and messages of each rank, options)."""
    home = tmp_path_factory.mktemp("ranks")
    (home / "flaky.py").write_text(REWARD)
    more = {
        "odd": ("train_ppo", [*SMALL, "--batch", "15", "--minibatch", "15"]),
        "stopped": ("train_sft", [*TINY, "--batch", "100", "--epochs", "1"]),
        "failing": ("train_ppo", [*SMALL, "--reward", "rm", "--reward", "flaky:late"]),
    }
    fill = {"sft": smoke / "sft", "rm": smoke / "rm", "choices": choices(home / "choices.jsonl")}
    filled = lambda script, options: [word.format(**fill) for word in [*options, *INPUTS[script]]]
    argv = {name: (script, filled(script, options)) for name, (script, options) in (CASES | more).items()}
    runs = [(name, script, [*options, "--out", str(home / name)]) for name, (script, options) in argv.items()]
    return home, *zip(*start(home, runs), strict=True), argv


def numbers(found, path: str = "") -> dict[str, float]:
    """{path: number} of everything in a JSON document."""
    if isinstance(found, dict | list):
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        return {k: v for key, value in pairs for k, v in numbers(value, f"{path}.{key}").items()}
    return {path: found} if isinstance(found, int | float) else {}


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("case", CASES)
def test_D17_F7_two_ranks_equal_one(two_ranks, run, metrics, tmp_path, case):
    """Rank for rank the same gradients; and those of one process, its weights, its metrics, its report."""
    home, (first, second), _, argv = two_ranks
    grads, out = steps(first, case), home / case
    assert len(grads) == len(steps(second, case)) > 0
    assert all(map(torch.equal, grads, steps(second, case)))
    script, options = argv[case]
    with gradients() as alone, same_tokens(1):
        assert run(script, *options, "--out", tmp_path) == 0
    agree(grads[:1], alone[:1], 1e-6)
    agree(grads, alone, 1e-5)  # of weights that have been trained apart
    weights, weights_alone = (that_matter(load_file(p / "model.safetensors")) for p in (out, tmp_path))
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    for line, line_alone in zip(metrics(out), metrics(tmp_path), strict=True):
        assert line == pytest.approx(line_alone, rel=1e-5, abs=1e-5)
    results, results_alone = (numbers(checkpoint.load_config(p)["results"]) for p in (out, tmp_path))
    del results[".seconds"], results_alone[".seconds"]
    assert results == pytest.approx(results_alone, rel=1e-4, abs=1e-4)


def that_matter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without two constants whose gradients are rounding noise, of which Adam makes whole steps.

    A bias of the keys moves all scores of a query alike.  A reward model's last bias cancels in a pair; its
    normalisation takes it out again."""
    for name, weight in weights.items():
        if name.endswith("qkv.bias"):
            weight.view(3, -1)[1] = 0
        if name.endswith(".out.bias"):
            member = name.removesuffix(".out.bias")
            weights[f"{member}.bias"] = weights[f"{member}.bias"] + weights[f"{member}.gain"] * weight
            weight.zero_()
    return weights


def test_the_cases_are_what_they_are_called(two_ranks, metrics):
    """Steps and stops that the comparison is about do occur."""
    home = two_ranks[0]
    assert min(line["train/tokens"] for line in metrics(home / "sft")) < 30  # a batch of one text
    assert len(metrics(home / "sft, stopped early")) == 2  # of 4 epochs
    taken = [line["optimizer_steps"] for line in metrics(home / "ppo, whitened rewards")]
    assert min(taken) < 4 == max(taken)
    kl_coefs = [line["objective/kl_coef"] for line in metrics(home / "ppo, whitened rewards")]
    assert len({*kl_coefs}) == 3
    for line in metrics(home / "ppo"):
        assert line["val/ratio"] == pytest.approx(1, abs=0.1) and line["val/response_length"] < 12
        assert 0 < line["val/eos_rate"] < 1


def test_sizes_that_ranks_do_not_divide_are_refused(two_ranks):
    home, _, said, _ = two_ranks
    assert all(
        "--batch over 2 processes, in groups of 1: 15 is not divisible by 2" in messages["odd"]
        for messages in said
    )
    assert not (home / "odd").exists()


def test_ctrl_c_on_one_rank_stops_all_at_the_same_step(two_ranks):
    home, _, said, _ = two_ranks
    assert all(messages["stopped"].startswith("stopped at step 1 of 4; ") for messages in said)
    assert checkpoint.load_config(home / "stopped")["step"] == 1


def test_H13_a_reward_function_that_fails_on_one_rank_stops_all(two_ranks):
    home, _, (first, second), _ = two_ranks
    assert first["failing"].startswith(
        "another process failed (ppo, step 2; the last checkpoint is that of step 1; "
    )
    assert second["failing"].startswith(
        "--reward flaky:late failed: ConnectionError: judge: reset (ppo, step 2; "
    )
    assert checkpoint.load_config(home / "failing")["step"] == 1


def test_sums_over_ranks_are_of_a_views_own_numbers(two_ranks):
    """Not of the memory that it looks at: the transpose of a table, and some of its columns."""
    for messages in two_ranks[2]:
        assert messages["view"] == (2 * torch.arange(12.0).view(3, 4).T[1:, :2]).tolist()


# ----------------------------------------------------------------------------- who waits for whom


WAITING = {  # the last batch leaves one rank of three, or two, without a text
    "sft": ("train_sft", [*TINY, "--batch", "311", "--epochs", "1"]),
    "rm": ("train_rm", [*RM, "--batch", "311"]),
    "rm, both": ("train_rm", [*RM, "--loss", "both", "--batch", "310"]),
    "dpo": ("train_dpo", [*SMALL, "--pairs", "1", "--batch", "311"]),
    "rm, pairs of ratings": ("train_rm", [*RM, "--loss", "pairwise", "--batch", "310"]),
    "ppo": ("train_ppo", [*SMALL, "--iterations", "1", "--batch", "12", "--minibatch", "6", "--max-approxkl", "9",
                          "--whiten-rewards"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("case", WAITING)
def test_all_ranks_sum_the_same_tensors_in_the_same_order(smoke, run, tmp_path, monkeypatch, case):
    """Or some would wait for the others for ever, or add up what does not belong together."""
    script, options = WAITING[case]
    inputs = [word.format(sft=smoke / "sft", rm=smoke / "rm") for word in INPUTS[script]]
    found = []
    for rank in range(3):
        shapes = []

        def sum_(self, tensors, shapes=shapes):
            for x in tensors:
                shapes.append(tuple(x.shape))
                if x.numel() > 4 and not x.any():  # others would add something; flags stay as they are
                    x.add_(torch.linspace(0, 1e-3, x.numel()).view_as(x))

        monkeypatch.setattr(hardware.Machine, "sum_", sum_)
        monkeypatch.setattr(
            stage_run, "setup_machine", lambda r=rank: hardware.Machine(torch.device("cpu"), r, 3)
        )
        assert run(script, *options, *inputs, "--out", tmp_path / str(rank)) == 0
        found.append(shapes)
    assert any(shape and shape[0] > 1000 for shape in found[0])  # gradients, in one piece
    assert found[1] == found[2] == found[0]
    assert [p.name for p in tmp_path.iterdir()] == ["0"]
