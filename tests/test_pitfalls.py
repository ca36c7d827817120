"""Every pitfall of docs/conformance.md by its number, against our own code, with the numbers that tell it.

test_conformance.py asks the same of anybody's functions. Here are the exact numbers, and the pitfalls that
concern a loop rather than a function.
"""

import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels import gae, token_logprobs
from minirlhf import UserError, optim, ppo, preference
from minirlhf.algorithms import ALGORITHMS
from minirlhf.masked import whiten
from minirlhf.model import GPT, GPTConfig
from minirlhf.rollout import Sampling, generate, response_logprobs
from minirlhf.support.draw import draw_by_cdf
from minirlhf.support.hardware import Machine
from tests import planted

NAN = math.nan
EXACT = 1e-12
P, Q = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
KL = 0.19274475702175753  # of P to Q, in nats
EOS, PAD = 1, 0


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def real(*lengths, R):
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def near(got, want, tolerance=EXACT):
    torch.testing.assert_close(
        got.detach().double(), torch.as_tensor(want, dtype=torch.float64), atol=tolerance, rtol=0
    )


def slope(advantage, ratio, clip=0.2, objective="clip", dtype=torch.float64):
    """d loss / d log-probability of one token."""
    old = torch.full((1, 1), -2.0, dtype=dtype)
    new = (old + math.log(ratio)).requires_grad_()
    given = (new, old, torch.full_like(old, advantage), real(1, R=1), clip)
    (grad,) = torch.autograd.grad(ppo.policy_loss(*given, objective=objective)[0], new)
    return grad[0, 0]


def model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=12, context=24, n_layer=1, n_head=2, n_embd=16)).eval()


def some_texts(policy, n=64, temperature=1.0):
    prompts = torch.full((n, 3), 5)
    settings = Sampling(8, temperature, EOS, PAD)
    torch.manual_seed(1)
    return generate(policy, prompts, torch.ones(n, 3, dtype=torch.bool), settings), settings


def test_every_pitfall_of_the_page_has_a_test_by_its_number():
    page = (Path(__file__).parents[1] / "docs/conformance.md").read_text()
    listed = {int(number) for number in re.findall(r"^\| P(\d+) \|", page, re.M)}
    tests = [name for name in globals() if name.startswith("test_p")]
    assert {int(number) for name in tests for number in re.findall(r"p(\d\d)_", name)} == listed
    assert len(listed) == 26


# ----------------------------------------------------------------------------- averages


def test_p01_a_mean_of_microbatch_means_is_another_number():
    """100 tokens with a loss of 2.0 and 900 with .5: .65 for any partition. The mean of both means is 1.25."""
    mask = real(100, 900, R=900)
    advantages = -torch.where(torch.arange(2)[:, None] == 0, 2.0, 0.5).double().expand(2, 900)
    zeros = torch.zeros(2, 900, dtype=torch.float64)
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        new = zeros.clone().requires_grad_()
        losses = [
            ppo.policy_loss(new[p], zeros[p], advantages[p], mask[p], 0.2, mask.sum())[0] for p in parts
        ]
        near(sum(losses), 0.65)
        (grad,) = torch.autograd.grad(sum(losses), new)
        near(grad, torch.where(mask, -advantages / 1000, 0.0))
    near(sum(ppo.policy_loss(zeros[p], zeros[p], advantages[p], mask[p], 0.2)[0] for p in parts) / 2, 1.25)


def token_gradients(how, mask, longest=128):
    """The gradient of a token of each response where A = -1."""
    new = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros_like(new).detach(), -torch.ones_like(new).detach()
    weights, share = ppo.averaging(mask, how, longest)
    loss, _ = ppo.policy_loss(new, old, advantages, mask, 0.2, share.sum(), weights.double())
    return torch.autograd.grad(loss, new)[0][:, 0]


WEIGHTS = {"tokens": (1 / 110, 1 / 110), "responses": (0.05, 0.005), "constant": (1 / 256, 1 / 256)}


@pytest.mark.parametrize("how", WEIGHTS)
def test_p02_what_a_token_weighs_in_a_short_response_and_a_long_one(how):
    near(token_gradients(how, real(10, 100, R=100)), WEIGHTS[how], 1e-8)  # the weights are fp32


@pytest.mark.parametrize("how", WEIGHTS)
def test_p03_more_padding_changes_nothing(how):
    mask = real(10, 100, R=100)
    wide = token_gradients(how, torch.cat([mask, mask & False], 1))
    assert torch.equal(token_gradients(how, mask), wide)


# ----------------------------------------------------------------------------- advantages of groups


@pytest.mark.parametrize(
    ("baseline", "scale", "up", "down"),
    [
        ("mean", "std", 0.625 / (math.sqrt(15 / 56) + 1e-4), -0.375 / (math.sqrt(15 / 56) + 1e-4)),
        ("mean", "none", 0.625, -0.375),
        ("leave-one-out", "none", 5 / 7, -3 / 7),
    ],
)
def test_p04_three_of_eight_right(baseline, scale, up, down):
    rewards = double(*[1.0] * 3, *[0.0] * 5)
    near(ppo.group_advantages(rewards, 8, baseline, scale), [up] * 3 + [down] * 5)
    assert [up, down] == pytest.approx([1.2076, -0.7246] if scale == "std" else [up, down], abs=3e-4)


TRUE = {0.5: 0.25, 0.1: 0.09, 0.02: 0.0196}
SCALED = {0.5: 0.43387, 0.1: 0.19591, 0.02: 0.04716}
EQUAL = {0.5: 0.008, 0.1: 0.430, 0.02: 0.851}


def expectation(baseline, scale, p, G=8):
    """The expected gradient of a one-parameter Bernoulli policy: all G + 1 outcomes, by their probabilities."""
    found = 0.0
    for k in range(G + 1):
        rewards = double(*[1.0] * k, *[0.0] * (G - k))
        advantages = ppo.group_advantages(rewards, G, baseline, scale)
        chance = math.comb(G, k) * p**k * (1 - p) ** (G - k)
        found += chance * (advantages * (rewards - p)).mean().item()  # d log p(answer) = answer - p
    return found


def scaled(p, G=8):
    """The expectation with a standard deviation by hand: k of G right have k (G - k) / (G (G - 1)) as variance."""
    chances = [math.comb(G, k) * p**k * (1 - p) ** (G - k) for k in range(G + 1)]
    stds = [math.sqrt(k * (G - k) / (G * (G - 1))) + 1e-4 for k in range(G + 1)]
    return sum(chances[k] * k * (G - k) / G**2 / stds[k] for k in range(G + 1))


@pytest.mark.parametrize("p", TRUE)
def test_p04_expected_gradients_of_a_bernoulli_policy(p):
    assert expectation("leave-one-out", "none", p) == pytest.approx(TRUE[p], abs=EXACT)
    assert expectation("mean", "none", p) == pytest.approx(TRUE[p] * 7 / 8, abs=EXACT)
    assert expectation("mean", "std", p) == pytest.approx(scaled(p), abs=EXACT)
    assert scaled(p) == pytest.approx(SCALED[p], abs=5e-6)
    equal = (1 - p) ** 8 + p**8
    assert equal == pytest.approx(EQUAL[p], abs=5e-4)


def test_p05_equal_rewards_give_exactly_0_and_leave_the_denominator():
    cases = ([1000.1] * 16, [2.0, 2.0, 2.0, 2.0 + 2**-22])
    for rewards, noise in zip(cases, (0.968, 1.5), strict=True):
        rewards = torch.tensor(rewards)
        for baseline, scale in itertools.product(("mean", "leave-one-out"), ("std", "none")):
            assert not ppo.group_advantages(rewards, len(rewards), baseline, scale).any()
        assert (
            planted.small_eps(rewards, len(rewards)).abs().max() > 0.9 * noise
        )  # what a small eps makes of them
    mask = real(3, 3, R=3)
    learnt = mask & ~ppo.equal_rewards(double(1.0, 1.0, 0.0, 1.0), 2)[:2, None]
    for how in WEIGHTS:
        assert not ppo.averaging(learnt, how, 8)[1].any()


def test_p06_a_group_of_one_has_no_advantage_and_a_nan_stays_in_its_group():
    """NaN rewards never get so far: train_ppo.py stops where a score is not finite (Run.require_finite)."""
    for baseline, scale in itertools.product(("mean", "leave-one-out"), ("std", "none")):
        assert ppo.group_advantages(double(1.0), 1, baseline, scale).tolist() == [0.0]
        rewards = double(1.0, 0.0, NAN, 1.0)
        near(ppo.group_advantages(rewards, 2, baseline, scale)[:2],
             ppo.group_advantages(rewards[:2], 2, baseline, scale))  # fmt: skip


def test_p25_a_prompt_drawn_twice_makes_two_groups():
    near(ppo.group_advantages(double(1, 0, 5, 7), 2, "mean", "none"), [0.5, -0.5, -1, 1])


# ----------------------------------------------------------------------------- KL


def test_p07_k1_and_k3_have_the_mean_of_the_kl():
    k1, _, k3 = ppo.kl_estimates(P.log(), Q.log())
    near((P * k1).sum(), KL)
    near((P * k3).sum(), KL)
    upside_down = planted.upside_down(P.log(), Q.log())
    near((P * upside_down[0]).sum(), -KL)
    near((P * upside_down[2]).sum(), 0.1672552429782425)
    near(ppo.kl_estimates(double(1), double(0))[2], [math.exp(-1)])


def of_policy(logits):
    """new_logprobs [5, 1] of the tokens 0, 0, 0, 0, 1, whose mean is an expectation under P; and Q's."""
    tokens = torch.tensor([0, 0, 0, 0, 1])
    return logits.log_softmax(0)[tokens][:, None], Q.log()[tokens][:, None]


def kl_gradient(kind):
    logits = P.log().requires_grad_()
    new, ref = of_policy(logits)
    loss = ppo.kl_loss(new, new.detach(), ref, torch.ones(5, 1, dtype=torch.bool), kind)
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


@pytest.mark.parametrize("kind", ["k2", "k3", "k3-ratio"])
def test_p08_a_step_on_the_kl_loss_lowers_the_kl(kind):
    after = (P.log() - 0.1 * kl_gradient(kind)).softmax(0)
    assert (after * (after / Q).log()).sum() < KL - 0.001


GRADIENT = 0.16 * math.log(4)  # of KL(P || Q) in P's first logit: .2218


@pytest.mark.parametrize(("kind", "want"), [("k2", GRADIENT), ("k3-ratio", GRADIENT), ("k3", 0.3)])
def test_p09_gradients_of_the_kl_as_a_loss(kind, want):
    near(kl_gradient(kind)[0], want)


def test_p09_k1_in_the_reward_has_the_gradient_of_the_kl_and_none_as_a_loss():
    logits, mask = P.log().requires_grad_(), torch.ones(5, 1, dtype=torch.bool)
    new, ref = of_policy(logits)
    rewards = ppo.shape_rewards(torch.zeros(5).double(), new.detach(), ref, mask, 1.0)
    loss, _ = ppo.policy_loss(new, new.detach(), rewards, mask, 0.2)
    near(torch.autograd.grad(loss, logits, retain_graph=True)[0][0], GRADIENT)
    near(torch.autograd.grad((new - ref).mean(), logits)[0][0], 0.0)


def test_p10_k3_keeps_its_digits():
    new = torch.tensor([1.0])  # in fp32, 1 + 1e-6 is 8 steps of 2^-23 above it
    for difference in (1e-6, -1e-6):
        found = ppo.kl_estimates(new, new + difference)[2].item()
        assert found == pytest.approx(4.55e-13, rel=0.3) and found >= 0
    assert planted.k3_that_cancels(new, new + 1e-6).item() == 0  # exp(d) - 1 - d has no digit left


@pytest.mark.parametrize("difference", [-100.0, 100.0])
def test_p11_gradients_are_finite_where_exp_overflows(difference):
    """In fp32, on a real token and in padding, in every loss that exponentiates."""
    mask, A = real(1, R=2), torch.ones(1, 2)
    for kind in ("k2", "k3", "k3-ratio"):
        new = torch.full((1, 2), -1.0, requires_grad=True)
        loss = ppo.kl_loss(new, new.detach() - difference, new.detach() - difference, mask, kind)
        assert torch.autograd.grad(loss, new)[0].isfinite().all() and loss.isfinite()
    for objective, advantage in itertools.product(("clip", "cispo", "sequence"), (1.0, -1.0)):
        new = torch.full((1, 2), -1.0, requires_grad=True)
        old = new.detach() - difference
        loss, _ = ppo.policy_loss(new, old, A * advantage, mask, (0.2, 0.2), objective=objective)
        (grad,) = torch.autograd.grad(loss, new)
        assert grad.isfinite().all() and loss.isfinite() and grad[0, 1] == 0
        if objective == "clip" and (advantage > 0 or difference < 0):
            assert grad[0, 0] == (0 if advantage * difference > 0 or advantage < 0 else -math.exp(-100))


def test_p12_the_kl_stands_in_one_place():
    """A row of the table has one KL; where it stands in the reward it is no term of the loss. Two are refused."""
    assert {row.kl for row in ALGORITHMS.values()} <= {"reward", "none", "k2", "k3", "k3-ratio"}
    new = torch.zeros(1, 1, requires_grad=True)
    for kind in ("reward", "none"):
        loss = ppo.kl_loss(new, new.detach(), new.detach() + 1, real(1, R=1), kind)
        assert loss == 0 and not loss.requires_grad


# ----------------------------------------------------------------------------- the sampler and the trainer


def test_p13_one_temperature_for_sampling_and_scoring():
    """Logits 2, 1, 0: at .7 the log-probabilities are others than at 1. One object holds it for both."""
    logits = torch.tensor([[2.0, 1.0, 0.0]]).double().expand(3, 3)
    for temperature, want in ((1.0, [-0.4076, -1.4076, -2.4076]), (0.7, [-0.2601, -1.6887, -3.1173])):
        found = token_logprobs(logits, torch.arange(3), temperature)[0]
        near(found, (logits[0] / temperature).log_softmax(0))
        near(found, want, 5e-5)
    for function in (generate, response_logprobs):
        taken = inspect.signature(function).parameters
        assert "sampling" in taken and "temperature" not in taken
    policy = model()
    with torch.no_grad():
        policy.wte.weight.mul_(20)
    texts, settings = some_texts(policy, temperature=0.7)
    other = Sampling(settings.max_new, 1.0, EOS, PAD)
    ours, theirs = (response_logprobs(policy, texts, s)[0] for s in (settings, other))
    assert (ours - theirs).abs().max() > 0.1


def test_p14_the_whole_distribution_is_sampled():
    """p = (.5, .3, .2), q = (.7, .2, .1): always the top token shows a k1 of -.3365, which no KL can be."""
    p, q = double(0.5, 0.3, 0.2), double(0.7, 0.2, 0.1)
    k1, _, _ = ppo.kl_estimates(p.log(), q.log())
    near(k1[0], math.log(0.5 / 0.7))
    assert k1[0] == pytest.approx(-0.3365, abs=5e-5) and (p * k1).sum() > 0.08
    u = (torch.arange(1000).double()[:, None] + 0.5) / 1000  # every number that the generator could give
    drawn = draw_by_cdf(p.expand(1000, 3), u)
    near((k1[drawn]).mean(), (p * k1).sum())  # each token exactly as often as it is likely
    assert not {"top_k", "top_p", "min_p"} & {
        *inspect.signature(generate).parameters,
        *Sampling.__annotations__,
    }


def test_p15_p16_weights_of_another_engines_samples():
    """sg[min(old / sampler, 2)], which policy_loss takes as weights [D32]. The stages sample with the policy,
    and take old log-probabilities from the update's own forward pass [D18]."""
    ratio = double([5.0, 0.1, 1.0])
    weights = ppo.importance_weights(ratio.log(), torch.zeros_like(ratio), real(3, R=3), cap=2.0)
    near(weights, [[2.0, 0.1, 1.0]])
    new = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    old, A = new.detach(), torch.ones(1, 3, dtype=torch.float64)
    loss, _ = ppo.policy_loss(new, old, A, real(3, R=3), 0.2, weights=weights)
    near(torch.autograd.grad(loss, new)[0], -weights / 3)


# ----------------------------------------------------------------------------- clips, ratios, masks


def test_p20_gradients_at_the_clips():
    assert slope(1, 1.25) == 0
    near(slope(1, 1.25, (0.2, 0.28)), -1.25)
    near(slope(-1, 1.5), 1.5)
    near(slope(1, 1.5, (0.2, 4.0), "cispo"), -1.5)


def test_p21_a_sequences_ratio_is_the_geometric_mean():
    new, mask = torch.full((1, 60), 0.01, dtype=torch.float64), real(50, R=60)
    old, A = torch.zeros_like(new), torch.ones_like(new)
    loss, stats = ppo.policy_loss(new, old, A, mask, 0.2, objective="sequence")
    near(stats["val/ratio"], math.exp(0.01))  # 1.01005
    near(loss, -math.exp(0.01))
    near(planted.product_of_ratios(new, old, A, mask, (1.0, 1.0)), -math.exp(0.5))  # 1.6487


def test_p22_the_eos_has_a_gradient():
    texts, settings = some_texts(model())
    ended = texts.ended(EOS)
    assert 0 < ended.sum() < len(texts)
    new = response_logprobs(model(), texts, settings)[0].detach().requires_grad_()
    mask = texts.response_mask
    loss, _ = ppo.policy_loss(new, new.detach(), torch.ones_like(new), mask, 0.2)
    (grad,) = torch.autograd.grad(loss, new)
    last = mask.sum(1) - 1
    assert (texts.responses[ended].gather(1, last[ended, None]) == EOS).all()
    assert (grad != 0).equal(mask) and (grad.gather(1, last[:, None]) != 0).all()
    assert (texts.responses[mask] == PAD).any()  # sampled, and counted, though its id is that of padding


# ----------------------------------------------------------------------------- steps


def trained(step):
    """(weights before, after) one step with Adam's moments at work, then step(optimiser, parameter)."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    (weight.sum() * 2).backward()
    optim.take_step(Machine(torch.device("cpu")), optimizer, 1.0)
    before = weight.detach().clone()
    step(optimizer, weight)
    return before, weight.detach()


def test_p23_an_early_stop_leaves_the_loop():
    """A loss times 0 still moves the weights, by Adam's moments; no step moves nothing. That train_ppo.py
    takes none is in test_stages.py (--max-approxkl)."""

    def times_0(optimizer, weight):
        (weight.sum() * 0).backward()
        optimizer.step()

    before, after = trained(times_0)
    assert (before - after).abs().min() > 0.01
    before, after = trained(lambda optimizer, weight: optimizer.zero_grad(set_to_none=True))
    assert torch.equal(before, after)


def test_p24_a_microbatch_that_is_not_finite_drops_the_whole_step():
    """The run ends: the others of the step are neither rescaled nor learnt."""

    def one_of_two(optimizer, weight):
        (weight.sum() * 0.5).backward()
        (weight.sum() * NAN).backward()
        with pytest.raises(UserError, match="gradient norm is nan"):
            optim.take_step(Machine(torch.device("cpu")), optimizer, 1.0)
        assert weight.grad is None

    before, after = trained(one_of_two)
    assert torch.equal(before, after)


def test_p27_policy_and_reference_agree_bit_for_bit_at_step_0():
    """Two loads of one checkpoint, read by one function; in train mode as well, where the update runs [D5]."""
    policy, ref = model(), model()
    texts, settings = some_texts(policy)
    policy.train()
    new, old = (response_logprobs(m, texts, settings)[0] for m in (policy, ref))
    assert torch.equal(new, old)
    assert not any(k.any() for k in ppo.kl_estimates(new, old))


# ----------------------------------------------------------------------------- pairs, critics, chat models


def test_p26_dpo_and_ipo_at_their_landmarks():
    for beta, margin in itertools.product((0.1, 0.5), (0.0, 3.0)):
        chosen = double(margin).requires_grad_()
        loss = preference.dpo_loss(chosen, double(0.0), beta)
        near(loss, math.log1p(math.exp(-beta * margin)), 1e-6)  # in fp32
        (grad,) = torch.autograd.grad(loss, chosen)
        # The slope is -beta / 2 at policy = reference, where the loss is ln 2.
        near(grad, [-beta / (1 + math.exp(beta * margin))], 1e-6)
        near(preference.ipo_loss(double(1 / (2 * beta)), double(0.0), beta), 0.0, 1e-6)
    logps, ref_logps, lengths = double(-3.0, -6.0), double(-4.0, -8.0), torch.tensor([10, 20])
    near(preference.sequence_log_ratios(logps, ref_logps, lengths, "dpo"), [1.0, 2.0])  # sums
    near(preference.sequence_log_ratios(logps, ref_logps, lengths, "ipo"), [0.1, 0.1])  # means


def test_p28_returns_are_those_of_unwhitened_advantages():
    rewards, values, mask = double([-0.1, 0.0, -0.1, 1.0]), double([0.5, 0.4, 0.6, 0.8]), real(4, R=4)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    near(returns, [[0.751725, 0.8755, 0.89, 1.0]])
    assert (whiten(advantages, mask) + values - returns).abs().max() > 0.5


def test_p30_the_share_of_responses_that_end_is_logged():
    zeros, mask = torch.zeros(2, 3), real(3, 3, R=3)
    for ended, rate in ((False, 0.0), (True, 1.0)):
        has_eos = torch.full((2,), ended)
        found = ppo.rollout_metrics(torch.zeros(2), zeros, zeros, mask, has_eos, 0.1)
        assert found["val/eos_rate"].mean() == rate
