"""PPO's relatives: the table, its cells, what is refused, and a run of each."""

import ast
import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

import train_ppo
from minirlhf import UserError, checkpoint, ppo
from minirlhf.algorithms import ALGORITHMS, Algorithm, AlgorithmOptions
from tests.gradients import agree, gradients

SMALL = ["--preset", "smoke", "--precision", "fp32", "--iterations", "2"]
RELATIVES = [name for name in ALGORITHMS if name != "ppo"]


def refusal(capsys) -> str:
    return capsys.readouterr().err.strip()


# ----------------------------------------------------------------------------- the table


def test_every_cell_of_the_table_can_be_overridden():
    others = {
        "group": 4,
        "baseline": "leave-one-out",
        "scale": "none",
        "objective": "cispo",
        "clip_range": 0.1,
        "clip_range_high": 0.3,
        "average": "constant",
        "kl": "k2",
        "equal_groups": "drop",
    }
    assert others.keys() == {field.name for field in dataclasses.fields(Algorithm)}
    for name, value in others.items():
        more = (
            {"clip_range_high": 0.2} if name == "objective" else {}
        )  # another objective wants a range of its own
        row = AlgorithmOptions(algorithm="grpo", **{name: value}, **more).row()
        changed = {k for k, v in dataclasses.asdict(row).items() if v != getattr(ALGORITHMS["grpo"], k)}
        assert changed == ({name, "clip_range_high"} if name == "clip_range" else {name})


def test_a_clip_range_alone_is_of_both_sides():
    row = AlgorithmOptions(algorithm="dapo", clip_range=0.1).row()
    assert (row.clip_range, row.clip_range_high) == (0.1, 0.1)
    row = AlgorithmOptions(algorithm="dapo").row()
    assert (row.clip_range, row.clip_range_high) == (0.2, 0.28)


PAGE = (Path(__file__).parents[1] / "docs/algorithms.md").read_text()


def test_the_pages_table_is_the_code():
    rows = re.findall(r"^\| `([a-z-]+)` \(\[.+?\]\(.+?\)\) \| (.+) \|$", PAGE, re.M)
    assert [name for name, _ in rows] == [*ALGORITHMS]
    for name, cells in rows:
        group, baseline, scale, objective, clip, average, kl, equal = cells.split(" | ")
        row = ALGORITHMS[name]
        low, high = (
            row.clip_range if x == "-" else float(x) for x in clip.split(", ")
        )  # CISPO reads no low one
        read = Algorithm(int(group), baseline, scale, objective, low, high, average, kl, equal)
        assert read == row and clip.startswith("-") == (objective == "cispo")


# What GRPO adds to PPO's loop, in the order of the page's sentence.
LOOP = [
    [
        "G, world =",
        "groups = optim",
        "local_batch = groups",
        "order = data.cursor",
        "mine = [i for i in order",
    ],
    ["k1_coef = kl_coef if"],
    ["advantages = ppo.group_advantages", "advantages = advantages[:, None]"],
    ["weights, shares = ppo.averaging", "tokens, divisor =", "old, mask, weight ="],
    ["kl = ppo.kl_loss", "(loss + kl_coef * kl"],
]


def test_the_page_counts_the_lines_that_are_to_be_read_after_ppo():
    bodies = 0
    for name in ("group_advantages", "equal_rewards", "averaging", "kl_loss"):
        function = ast.parse(inspect.getsource(getattr(ppo, name))).body[0]
        bodies += function.end_lineno - function.body[1].lineno + 1
    code = Path(train_ppo.__file__).read_text()
    for line in itertools.chain(*LOOP):
        assert code.count(f" {line}") == 1, line
    counts = [2, bodies, *map(len, LOOP)]
    paragraph = PAGE.partition("## What to read after PPO")[2].partition("**The group**")[0]
    assert [int(n) for n in re.findall(r"\((\d+)\)", paragraph)] == counts
    assert f"GRPO is {sum(counts)} lines" in paragraph and sum(counts) <= 40


def test_nothing_branches_on_a_name():
    """Whoever adds a row adds no code."""
    code = (train_ppo.Path(train_ppo.__file__)).read_text()
    for name in ALGORITHMS:
        assert f'== "{name}"' not in code and f'"{name}"]' not in code


# ----------------------------------------------------------------------------- equations


@pytest.mark.parametrize("p", [0.5, 0.1, 0.02])
def test_D27_expectations_of_the_baselines(p):
    """A policy with one parameter whose answers are right with probability p: the true gradient is p (1 - p).

    All 2^8 groups of eight answers are enumerated, so that the expectations are exact.
    """
    groups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)  # [256, 8]
    chance = (p**groups * (1 - p) ** (1 - groups)).prod(1)
    score = groups - p  # d log p(answer) / d theta, of a logit theta

    def gradient(baseline: str, scale: str) -> float:
        advantages = ppo.group_advantages(groups.view(-1), 8, baseline, scale).view(-1, 8)
        return float((chance * (advantages * score).mean(1)).sum())

    true = p * (1 - p)
    assert gradient("leave-one-out", "none") == pytest.approx(true, abs=1e-12)
    assert gradient("mean", "none") == pytest.approx(true * 7 / 8, abs=1e-12)
    k = groups.sum(1)  # a group of which k are right has the variance k (8 - k) / 56
    by_hand = float((chance * k * (8 - k) / 64 / ((k * (8 - k) / 56).sqrt() + 1e-4)).sum())
    assert gradient("mean", "std") == pytest.approx(by_hand, abs=1e-12)
    equal = ppo.equal_rewards(groups.view(-1), 8).view(-1, 8)[:, 0]
    assert float(chance[equal].sum()) == pytest.approx(p**8 + (1 - p) ** 8, abs=1e-12)
    row = [f"{p:g}"[1:], *(f"{x:.6g}"[1:] for x in (true, true, true * 7 / 8)), f"{by_hand:.5f}"[1:]]
    assert f"| {' | '.join(row)} | {p**8 + (1 - p) ** 8:.3f}".replace(" 0.", " .") in PAGE


def test_D27_groups_are_rows_that_follow_each_other():
    """Two groups of one prompt stay two, and no group sees another's rewards."""
    rewards = torch.tensor([1.0, 0.0, 5.0, 7.0])
    assert ppo.group_advantages(rewards, 2, "mean", "none").tolist() == [0.5, -0.5, -1, 1]
    assert ppo.group_advantages(rewards, 2, "leave-one-out", "none").tolist() == [1, -1, -2, 2]


def test_D27_equal_rewards_give_exactly_0():
    for scale, baseline in itertools.product(["std", "none"], ["mean", "leave-one-out"]):
        for rewards in ([1000.1] * 16, [2.0, 2.0, 2.0, 2.0 + 2**-22], [0.0] * 4, [3.0]):
            found = ppo.group_advantages(torch.tensor(rewards), len(rewards), baseline, scale)
            assert found.tolist() == [0.0] * len(rewards)


MASK = torch.arange(128) < torch.tensor([[10], [100]])


@pytest.mark.parametrize(
    ("how", "short", "long"),
    [("tokens", 1 / 110, 1 / 110), ("responses", 0.05, 0.005), ("constant", 1 / 256, 1 / 256)],
)
def test_D28_what_a_token_weighs(how, short, long):
    """Two responses of 10 and 100 tokens, with a length limit of 128: see docs/algorithms.md."""
    for mask in (MASK, MASK[:, :100], torch.cat([MASK, MASK & False], 1)):  # padding changes nothing
        weights, share = ppo.averaging(mask, how, 128)
        token = (weights / share.sum()).view(-1)
        assert token.tolist() == pytest.approx([short, long], rel=1e-6)


@pytest.mark.parametrize("how", ["tokens", "responses", "constant"])
def test_D28_what_is_left_out_leaves_the_divisor(how):
    left_out = torch.cat([MASK, MASK[:1] & False])
    weights, share = ppo.averaging(left_out, how, 128)
    expected, expected_share = ppo.averaging(MASK, how, 128)
    assert torch.equal(weights[:2], expected) and weights[2] == 0
    assert torch.equal(share[:2], expected_share) and share[2] == 0


def test_D27_D28_D29_unknown_words_are_refused():
    """Not taken for another one without a word: these functions are anybody's."""
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    for baseline, scale in (("loo", "std"), ("mean", "batch")):
        with pytest.raises(KeyError):
            ppo.group_advantages(torch.ones(2), 2, baseline, scale)
    with pytest.raises(KeyError):
        ppo.averaging(mask, "sequences", 2)
    with pytest.raises(ValueError, match="not 'gspo'"):
        ppo.policy_loss(ones, ones, ones, mask, 0.2, objective="gspo")


def gradient(objective: str, advantage: float, ratio: float, clip=(0.2, 0.2)) -> float:
    """d loss / d log-probability of one token."""
    new = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    here = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = ppo.policy_loss(
        new,
        torch.zeros_like(new).detach(),
        torch.full_like(new, advantage).detach(),
        here,
        clip,
        objective=objective,
    )
    return torch.autograd.grad(loss, new)[0].item()


def test_D29_gradients_at_the_clips():
    assert gradient("clip", 1, 1.25) == 0
    assert gradient("clip", 1, 1.25, (0.2, 0.28)) == pytest.approx(-1.25)
    assert gradient("clip", -1, 1.5) == pytest.approx(1.5)  # the side without a bound
    assert gradient("cispo", 1, 1.5, (0.2, 4.0)) == pytest.approx(-1.5)
    assert gradient("cispo", 1, 9.0, (0.2, 4.0)) == pytest.approx(-5.0)  # capped, but not without a gradient


def test_D29_a_sequences_ratio_is_the_geometric_mean():
    new = torch.full((1, 60), 0.01, dtype=torch.float64)
    mask = torch.arange(60)[None] < 50
    _, stats = ppo.policy_loss(
        new, torch.zeros_like(new), torch.ones_like(new), mask, 1.0, objective="sequence"
    )
    assert stats["val/ratio"].item() == pytest.approx(1.0100502, abs=1e-7)  # not exp(.5) = 1.6487


def test_D30_gradients_of_the_kl_losses():
    """At p = (.8, .2), q = (.5, .5), in the logit of the first token; expectations over p are exact."""
    q, size = torch.tensor([0.5, 0.5], dtype=torch.float64), {}
    for kind in ("k2", "k3", "k3-ratio"):
        logit = torch.tensor(0.8 / 0.2, dtype=torch.float64).log().requires_grad_()
        new = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])[
            :, None
        ]
        p, here = new.detach().exp(), torch.ones(2, 1, dtype=torch.bool)
        loss = ppo.kl_loss(
            new, new.detach(), q.log()[:, None], here, kind, 1, p
        )  # weighed by their probabilities
        size[kind] = torch.autograd.grad(loss, logit)[0].item()
    assert size == pytest.approx({"k2": 0.2218, "k3": 0.3000, "k3-ratio": 0.2218}, abs=5e-5)


@pytest.mark.parametrize(("second", "in_reward", "in_loss"), [(0.8, 0.2526, 0.2218), (0.5, 0.2218, 0.2218)])
def test_D30_only_the_reward_counts_the_kl_of_later_tokens(second, in_reward, in_loss):
    """Two tokens: after a first one of 1 (probability .8) the second is 1 with `second`, else as the reference, .5.

    Derivatives in the first token's logit, exact over all four texts."""
    logit = torch.tensor(0.8 / 0.2, dtype=torch.float64).log().requires_grad_()
    first = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])
    later = torch.tensor([[second, 1 - second], [0.5, 0.5]], dtype=torch.float64).log()
    new = torch.stack(
        [torch.stack([first[a], later[a, b]]) for a in (0, 1) for b in (0, 1)]
    )  # [4 texts, 2 tokens]
    ref, mask = torch.full_like(new, 0.5).log().detach(), torch.ones(4, 2, dtype=torch.bool)
    chance = new.detach().sum(1).exp()[:, None]
    for kind in ("k2", "k3-ratio"):
        loss = ppo.kl_loss(new, new.detach(), ref, mask, kind, 1, chance)
        assert torch.autograd.grad(loss, logit, retain_graph=True)[0].item() == pytest.approx(
            in_loss, abs=5e-5
        )
    k1, _, _ = ppo.kl_estimates(new.detach(), ref)
    loss = (
        chance * new.sum(1, keepdim=True) * k1.sum(1, keepdim=True)
    ).sum()  # REINFORCE, all later k1 counted
    assert torch.autograd.grad(loss, logit)[0].item() == pytest.approx(in_reward, abs=5e-5)


@pytest.mark.parametrize("kind", ["k2", "k3", "k3-ratio"])
@pytest.mark.parametrize("difference", [-100.0, 100.0, 0.0, 1e-6])
def test_D30_gradients_are_finite_and_padding_has_none(kind, difference):
    new = torch.tensor([[0.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    ref = torch.tensor([[difference, float("inf")]])
    loss = ppo.kl_loss(new, torch.zeros(1, 2), ref, mask, kind)
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and loss >= 0 and gradient.isfinite().all() and gradient[0, 1] == 0


# ----------------------------------------------------------------------------- runs


@pytest.fixture
def inputs(smoke):
    return ["--init", smoke / "sft", "--reward-model", smoke / "rm"]


@pytest.mark.parametrize("name", RELATIVES)
def test_a_run_of_each(run, metrics, inputs, tmp_path, name):
    """Finite numbers, no critic in the checkpoint, a first ratio of 1, and groups that are counted."""
    assert run("train_ppo", *SMALL, *inputs, "--algorithm", name, "--out", tmp_path) == 0
    config = checkpoint.load_config(tmp_path)
    assert config["algorithm"] == dataclasses.asdict(ALGORITHMS[name])
    tensors, _ = checkpoint.load_trainer(tmp_path)
    assert not [key for key in tensors if key.startswith("value")]
    for line in metrics(tmp_path):
        assert all(map(torch.isfinite, map(torch.tensor, line.values())))
        assert 0 <= line["frac_reward_zero_std"] < 1 and "val/explained_variance" not in line
        assert line["objective/kl_coef"] == (0 if ALGORITHMS[name].kl == "none" else 0.15)
        assert line["val/ratio"] == pytest.approx(1, abs=0.1)
    assert line["optimizer_steps"] == 4


@pytest.fixture
def seen(monkeypatch):
    """{name of an equation: [(its arguments, what it returned)]} of what a run calls."""
    calls = {}

    def watch(name):
        equation = getattr(ppo, name)

        def call(*args):
            found = equation(*args)
            calls.setdefault(name, []).append((args, found))
            return found

        monkeypatch.setattr(ppo, name, call)

    for name in ("shape_rewards", "group_advantages", "averaging", "policy_loss", "kl_loss"):
        watch(name)
    return calls


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loop_hands_every_cell_to_its_equation(run, inputs, tmp_path, seen, name):
    """In the second iteration, where policy and reference differ.  The KL enters once, by the cell [D30] [P12]."""
    row = ALGORITHMS[name]
    assert run("train_ppo", *SMALL, *inputs, "--algorithm", name, "--out", tmp_path) == 0
    (scores, _, _, _, coef), token_rewards = seen["shape_rewards"][-1]
    rewards = token_rewards.sum(1)
    assert coef == (0.15 if row.kl == "reward" else 0)
    assert ((rewards - scores).abs().max() > 1e-4) == (row.kl == "reward")
    assert ("group_advantages" in seen) == (row.baseline != "critic")
    if row.baseline != "critic":
        (given, *cells), advantages = seen["group_advantages"][-1]
        assert given.equal(rewards) and cells == [row.group, row.baseline, row.scale]
        trained = torch.cat(
            [args[2][:, 0] for args, _ in seen["policy_loss"][-2:]]
        )  # an epoch of two minibatches
        assert trained.sort()[0].equal(advantages.sort()[0])
    assert seen["averaging"][-1][0][1:] == (row.average, 12)  # 12 tokens at most
    for args, _ in seen["policy_loss"]:
        assert args[4] == (row.clip_range, row.clip_range_high) and args[7] == row.objective
    assert all(args[4] == row.kl for args, _ in seen["kl_loss"])


@pytest.mark.parametrize("kl", ["k3", "reward"])
def test_the_kl_of_the_loss_has_its_coefficient(run, inputs, tmp_path, monkeypatch, kl):
    """A term with a known gradient in its place: it moves the weights as often as kl_coef says."""
    options = [*SMALL, *inputs, "--algorithm", "grpo", "--kl", kl, "--iterations", 1]

    def first_gradients(coef):
        with gradients() as found:
            assert (
                run("train_ppo", *options, "--kl-coef", coef, "--out", tmp_path / f"{len(taken)}-{coef}") == 0
            )
        taken.append(found[0])
        return found[0]

    taken = []
    plain = first_gradients(1)
    if kl == "k3":
        monkeypatch.setattr(
            ppo, "kl_loss", lambda new, old, ref, mask, *rest: (new * mask).sum() / mask.sum()
        )
    none, one, two = (first_gradients(coef) for coef in (0, 1, 2))
    agree([none], [plain], 1e-6)  # k3 has no gradient yet: the policy is its reference
    if kl == "k3":
        assert (one - none).norm() > 0.01 * none.norm()
        torch.testing.assert_close(two - none, 2 * (one - none), atol=1e-5, rtol=1e-3)
    else:  # nor has k1 in the reward any yet, and the loss has no such term
        assert one.equal(none) and two.equal(none)


def test_dapo_leaves_out_the_groups_that_are_equal_and_no_others(run, inputs, tmp_path, seen, monkeypatch):
    code = "def some(prompts, responses):\n    return [0.0] * 4 + [float(i) for i in range(len(responses) - 4)]\n"
    (tmp_path / "first.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    more = [
        "--algorithm",
        "dapo",
        "--group",
        "4",
        "--missing-eos",
        "none",
        "--reward",
        "first:some",
        "--iterations",
        "1",
    ]
    assert run("train_ppo", *SMALL, *inputs[:2], *more, "--out", tmp_path / "out") == 0
    ((learnt, _, _), (weights, shares)) = seen["averaging"][-1]
    assert (
        learnt.any(1).tolist()
        == (shares > 0).tolist()
        == (weights[:, 0] > 0).tolist()
        == [False] * 4 + [True] * 12
    )
    for args, _ in seen["policy_loss"]:  # out of the loss, and out of what divides it
        assert args[5] == args[3].sum() and (args[2][~args[3].any(1)] == 0).all()


@pytest.mark.parametrize("name", RELATIVES)
def test_D17_microbatches_change_no_gradient(run, inputs, tmp_path, name):
    """Tokens, responses or a constant: the loss's divisor is that of the whole optimiser step [P1]."""
    found = []
    for microbatch in (8, 2):
        with gradients() as grads:
            more = ["--algorithm", name, "--microbatch", microbatch, "--iterations", 1, "--group", 4]
            assert run("train_ppo", *SMALL, *inputs, *more, "--out", tmp_path / str(microbatch)) == 0
        found.append(grads[:1])
    agree(*found, 1e-6)


def test_D21_a_run_without_a_critic_resumes_bit_for_bit(run, metrics, inputs, tmp_path, monkeypatch):
    options = [*SMALL, *inputs, "--algorithm", "grpo", "--save-every", 1]
    assert run("train_ppo", *options, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:  # a kill after the first iteration
        patch.setattr(train_ppo.Run, "checkpoint", lambda self, step, due: self.save(step) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("train_ppo", *options, "--out", tmp_path / "killed")
    assert run("train_ppo", *options, "--out", tmp_path / "killed", "--resume") == 0
    weights = [checkpoint.load_state(tmp_path / name) for name in ("whole", "killed")]
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
    assert len(metrics(tmp_path / "killed")) == 2


def test_prompts_of_a_group_are_drawn_together(run, inputs, tmp_path, monkeypatch):
    seen = []
    generate = train_ppo.generate

    def spy(policy, queries, mask, sampling):
        seen.append(queries.masked_fill(~mask, -1).tolist())
        return generate(policy, queries, mask, sampling)

    monkeypatch.setattr(train_ppo, "generate", spy)
    assert run("train_ppo", *SMALL, *inputs, "--algorithm", "rloo", "--group", 4, "--out", tmp_path) == 0
    for queries in seen:
        assert [queries[i] for i in range(16)] == [queries[i - i % 4] for i in range(16)]
        assert len({tuple(q) for q in queries}) > 1


def test_equal_rewards_everywhere_are_counted_and_said(run, metrics, inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "flat.py").write_text("def flat(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = [
        "--algorithm",
        "dapo",
        "--reward",
        "flat:flat",
        "--missing-eos",
        "none",
        "--out",
        tmp_path / "out",
    ]
    assert run("train_ppo", *SMALL, *inputs[:2], *more) == 0
    assert "iteration 2: all scores are equal in every group: they teach nothing" in capsys.readouterr().out
    assert [line["frac_reward_zero_std"] for line in metrics(tmp_path / "out")] == [1, 1]
    assert [line["optimizer_steps"] for line in metrics(tmp_path / "out")] == [0, 0]
    before, after = (checkpoint.load_state(folder) for folder in (inputs[1], tmp_path / "out"))
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_equal_groups_stay_at_0_when_the_rollout_is_whitened(run, inputs, tmp_path, monkeypatch):
    """The mean over tokens is not 0 where lengths differ, and must not become an advantage of those that have none."""
    (tmp_path / "some.py").write_text(
        "def some(prompts, responses):\n    return [0.0] * 4 + [float(len(r)) for r in responses[4:]]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    policy_loss = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *args: seen.append(args[2]) or policy_loss(*args))
    more = [
        "--algorithm",
        "rloo",
        "--group",
        4,
        "--scale",
        "rollout",
        "--kl-coef",
        0,
        "--missing-eos",
        "none",
    ]
    assert (
        run("train_ppo", *SMALL, *inputs[:2], *more, "--reward", "some:some", "--out", tmp_path / "out") == 0
    )
    for minibatch in seen:
        assert (minibatch == 0).all(1).any() and minibatch.abs().max() > 0.1


def test_whitening_a_rollout_counts_an_advantage_that_is_0_in_a_group_that_differs(
    run, inputs, tmp_path, monkeypatch
):
    """Rewards of 0, 1, 2 and 1: the ones are as good as their group, and still tokens of the rollout [D10]."""
    code = "def steps(prompts, responses):\n    return [0.0, 1.0, 2.0, 1.0] * (len(responses) // 4)\n"
    (tmp_path / "steps.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    policy_loss = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *args: seen.append(args[2:4]) or policy_loss(*args))
    more = "--algorithm rloo --group 4 --scale rollout --kl none --missing-eos none --reward steps:steps"
    out = tmp_path / "out"
    assert run("train_ppo", *SMALL, *inputs[:2], *more.split(), "--iterations", 1, "--out", out) == 0
    first_epoch = [advantages[mask] for advantages, mask in seen[:2]]
    tokens = torch.cat(first_epoch)
    assert tokens.mean().abs() < 1e-5 and tokens.var(correction=0) == pytest.approx(1, abs=1e-4)
    assert len(tokens.unique()) == 3


REFUSED = [
    ("--algorithm grpo --group 1", "--baseline mean compares the answers of a group: --group must be at least 2"),
    ("--baseline leave-one-out", "--baseline leave-one-out compares the answers of a group"),
    ("--algorithm grpo --group 3", "--batch 16 is not divisible by --group 3"),
    ("--scale std", "take one advantage for a whole response"),
    ("--algorithm grpo --baseline critic", "take one advantage for a whole response"),
    ("--algorithm grpo --value-init sft", "--value-init has no effect without a critic"),
    ("--algorithm rloo --value-lr 1e-4", "--value-lr has no effect without a critic"),
    ("--algorithm rloo --clip-range-value .1", "--clip-range-value has no effect without a critic"),
    ("--algorithm rloo --lam .9", "--lam has no effect without a critic"),
    ("--algorithm rloo --gamma .9", "--gamma has no effect without a critic"),
    ("--algorithm dapo --kl-coef .1", "--kl-coef has no effect with --kl none"),
    ("--algorithm dapo --kl-target 6", "--kl-target has no effect with --kl none"),
    ("--kl reward --kl k3", "--kl is both reward and k3: drop one of them"),
    ("--algorithm grpo --kl", "--kl needs a value"),
    ("--algorithm cispo --clip-range .2", "give --clip-range-high, not --clip-range"),
    ("--objective cispo", "--objective cispo needs a range of its own: give --clip-range-high"),
    ("--algorithm gspo --objective clip", "--objective clip needs a range of its own: give --clip-range"),
    ("--algorithm gspo --objective clip --clip-range-high .28", "give --clip-range"),  # the low one is GSPO's
    ("--algorithm rloo --objective sequence --clip-range-high 4e-4", "give --clip-range"),
    ("--num-generations 4", "unknown option --num-generations: did you mean --group?"),
    ("--loss_type grpo", "unknown option --loss_type: did you mean --algorithm?"),
    ("--beta .04", "unknown option --beta: did you mean --kl-coef?"),
    ("--alg grpo", "unknown option --alg: did you mean --algorithm?"),
    ("--algorithm a2c", "--algorithm must be one of ppo, rloo, grpo, dr-grpo, dapo, cispo, gspo, not 'a2c'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[options for options, _ in REFUSED])
def test_bad_combinations_are_one_line_and_nothing_is_written(
    run, inputs, tmp_path, capsys, options, message
):
    assert run("train_ppo", *SMALL, *inputs, *options.split(), "--out", tmp_path / "out") == 2
    assert message in refusal(capsys) and len(refusal(capsys).splitlines()) <= 1
    assert not (tmp_path / "out").exists()


def test_rows_refuse_what_contradicts_itself():
    with pytest.raises(UserError, match="group must be at least 2"):
        dataclasses.replace(ALGORITHMS["rloo"], group=1)
