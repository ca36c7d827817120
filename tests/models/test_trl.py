"""Our losses and advantages beside TRL 1.16's own code, on the same tensors: equal wherever the definitions agree.

TRL's code is called, not copied: GRPOTrainer._compute_loss and RLOOTrainer._compute_loss on a stand-in for the
trainer, and the statements of _generate_and_score_completions that make advantages (benchmarks/conformance.py).
Where the two differ, a test says how; docs/conformance.md lists it.
"""

import math

import pytest

pytestmark = pytest.mark.models
pytest.importorskip("trl")

import torch  # noqa: E402

from benchmarks.conformance import (  # noqa: E402
    trl_grpo_advantages,
    trl_grpo_loss,
    trl_rloo_advantages,
    trl_rloo_loss,
)
from minirlhf import ppo  # noqa: E402

B, R, LONGEST = 6, 7, 16  # LONGEST: TRL's max_completion_length


@pytest.fixture(params=range(3))
def batch(request):
    """new_logprobs, logprobs, ref_logprobs, advantages [B], mask: ratios on both sides of every clip range."""
    g = torch.Generator().manual_seed(request.param)
    logprobs = -torch.randn(B, R, generator=g, dtype=torch.float64).abs()
    new = logprobs + 0.3 * torch.randn(B, R, generator=g, dtype=torch.float64)
    ref = new + 0.5 * torch.randn(B, R, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    mask = torch.arange(R) < torch.randint(1, R + 1, (B, 1), generator=g)
    return new, logprobs, ref, advantages, mask


def with_gradient(function, new):
    leaf = new.clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def equal(ours, theirs, new, tolerance=1e-6):
    """The same loss and gradient in new_logprobs."""
    for a, b in zip(with_gradient(ours, new), with_gradient(theirs, new), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def ours(logprobs, advantages, mask, average, objective="clip", clip=(0.2, 0.28)):
    weights, share = ppo.averaging(mask, average, LONGEST)
    spread = advantages[:, None].expand_as(logprobs)
    given = (logprobs, spread, mask, clip, share.sum(), weights, objective)
    return lambda new: ppo.policy_loss(new, *given)[0]


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}


@pytest.mark.parametrize(
    ("loss_type", "average"), [("dapo", "tokens"), ("grpo", "responses"), ("dr_grpo", "constant")]
)
def test_clipped_losses(batch, loss_type, average):
    new, logprobs, _, advantages, mask = batch
    theirs = lambda x: trl_grpo_loss(x, logprobs, advantages, mask, loss_type=loss_type, **CLIP)
    equal(ours(logprobs, advantages, mask, average), theirs, new)


def test_bnpo_is_a_mean_over_the_microbatchs_tokens(batch):
    """As dapo while there is one microbatch; with several, a mean of means, which we do not have [P1]."""
    new, logprobs, _, advantages, mask = batch
    theirs = lambda x: trl_grpo_loss(x, logprobs, advantages, mask, loss_type="bnpo", **CLIP)
    equal(ours(logprobs, advantages, mask, "tokens"), theirs, new)


@pytest.mark.parametrize("cap", [1.28, 5.0])
def test_cispo(batch, cap):
    """TRL's epsilon_high is the cap itself (its default: 5). Ours is 1 + high, as the paper writes it."""
    new, logprobs, _, advantages, mask = batch
    theirs = lambda x: trl_grpo_loss(x, logprobs, advantages, mask, loss_type="cispo", epsilon_high=cap)
    equal(ours(logprobs, advantages, mask, "tokens", "cispo", (0.2, cap - 1)), theirs, new)


@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.05, 0.1)])
def test_gspo(batch, clip):
    new, logprobs, _, advantages, mask = batch
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    options |= {"epsilon_low": clip[0], "epsilon_high": clip[1]}
    theirs = lambda x: trl_grpo_loss(x, logprobs, advantages, mask, **options)
    equal(ours(logprobs, advantages, mask, "responses", "sequence", clip), theirs, new)


@pytest.mark.parametrize(("corrected", "kind"), [(False, "k3"), (True, "k3-ratio")])
def test_kl_as_a_loss(batch, corrected, kind):
    new, logprobs, ref, advantages, mask = batch
    options = {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": corrected, **CLIP}
    theirs = lambda x: trl_grpo_loss(x, logprobs, advantages, mask, ref_logprobs=ref, **options)
    policy = ours(logprobs, advantages, mask, "tokens")
    equal(lambda x: policy(x) + 0.3 * ppo.kl_loss(x, logprobs, ref, mask, kind), theirs, new)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_microbatches_add_up_in_both(batch, loss_type):
    """TRL's num_items_in_batch counts the tokens of the whole generation batch; here it is one step's."""
    new, logprobs, _, advantages, mask = batch
    high = 5.0 if loss_type == "cispo" else 0.28

    def theirs(x):
        parts = []
        for rows in (slice(0, 2), slice(2, B)):
            given = (x[rows], logprobs[rows], advantages[rows], mask[rows], mask.sum())
            parts.append(trl_grpo_loss(*given, loss_type=loss_type, epsilon_high=high))
        return sum(parts)

    objective = "cispo" if loss_type == "cispo" else "clip"
    clip = (0.2, 4.0) if loss_type == "cispo" else (0.2, 0.28)
    equal(ours(logprobs, advantages, mask, "tokens", objective, clip), theirs, new)


# ----------------------------------------------------------------------------- advantages


@pytest.fixture(params=range(3))
def rewards(request):
    return torch.randn(24, generator=torch.Generator().manual_seed(request.param), dtype=torch.float64)


def test_advantages_of_grpo_and_dr_grpo(rewards):
    for scale_rewards, scale in (("group", "std"), ("none", "none")):
        theirs = trl_grpo_advantages(rewards.clone(), 8, scale_rewards)
        found = ppo.group_advantages(rewards, 8, "mean", scale)
        torch.testing.assert_close(found, theirs, atol=1e-7, rtol=1e-7)  # nanstd's n / (n - 1) is fp32


def test_advantages_of_rloo(rewards):
    theirs = trl_rloo_advantages(rewards.clone(), 8)
    found = ppo.group_advantages(rewards, 8, "leave-one-out", "none")
    torch.testing.assert_close(found, theirs, atol=1e-12, rtol=1e-12)


def test_rloos_kl_in_the_reward(batch):
    """The sum over a response's tokens of k1, off its reward before the group is compared [D1]."""
    _, logprobs, ref, scores, mask = batch
    tensors = {"old_per_token_logps": logprobs, "ref_per_token_logps": ref, "completion_mask": mask}
    theirs = trl_rloo_advantages(scores.clone(), 3, beta=0.3, **tensors)
    rewards = ppo.shape_rewards(scores, logprobs, ref, mask, 0.3).sum(1)
    found = ppo.group_advantages(rewards, 3, "leave-one-out", "none")
    torch.testing.assert_close(found, theirs, atol=1e-12, rtol=1e-12)
    assert (found - ppo.group_advantages(scores, 3, "leave-one-out", "none")).abs().max() > 0.01


def test_a_group_of_one_has_no_advantage_in_either():
    for theirs in (trl_grpo_advantages(torch.ones(1), 1), trl_rloo_advantages(torch.ones(1), 1)):
        assert theirs.tolist() == ppo.group_advantages(torch.ones(1), 1, "mean", "std").tolist() == [0.0]


# ----------------------------------------------------------------------------- where they differ


def test_rounding_noise_of_equal_rewards_is_scaled_up_to_a_third_in_trl():
    rewards = torch.full((16,), 1000.1)
    assert not ppo.group_advantages(rewards, 16, "mean", "std").any()
    assert trl_grpo_advantages(rewards.clone(), 16).abs().max() == pytest.approx(0.374, abs=0.01)


def test_a_nan_reward_leaves_the_group_in_trl_and_ends_the_run_in_ours():
    """Of (1, nan, 0) TRL compares 1 with 0. Ours never sees one: train_ppo.py's scores are required to be finite."""
    rewards = torch.tensor([1.0, math.nan, 0.0], dtype=torch.float64)
    assert trl_rloo_advantages(rewards.clone(), 3).tolist() == [1.0, 0.0, -1.0]
    assert trl_grpo_advantages(rewards.clone(), 3, "none").tolist() == [0.5, 0.0, -0.5]


def test_rloos_first_step_is_ours_with_a_constant_of_one_token(batch):
    """TRL averages the response's log-probability over responses. Ours with a constant is the same gradient."""
    new, _, _, advantages, mask = batch
    old = new.clone()
    weights, share = ppo.averaging(mask, "constant", 1)
    spread = advantages[:, None].expand_as(old)
    mine = lambda x: ppo.policy_loss(x, old, spread, mask, 0.2, share.sum(), weights)[0]
    theirs = lambda x: trl_rloo_loss(x, old, advantages, mask)
    _, grad = with_gradient(mine, new)
    torch.testing.assert_close(grad, with_gradient(theirs, new)[1], atol=1e-12, rtol=1e-12)


def test_rloos_later_steps_clip_the_products_of_ratios_in_trl():
    """50 tokens of log ratio .01: TRL's ratio is exp(.5), past its clip range, and the response is not trained."""
    old, mask = torch.full((1, 50), -2.0, dtype=torch.float64), torch.ones(1, 50, dtype=torch.bool)
    advantages = torch.ones(1, dtype=torch.float64)
    loss, grad = with_gradient(lambda x: trl_rloo_loss(x, old, advantages, mask), old + 0.01)
    assert loss.item() == pytest.approx(-1.2) and not grad.any()
    loss, grad = with_gradient(ours(old, advantages, mask, "tokens"), old + 0.01)
    assert loss.item() == pytest.approx(-math.exp(0.01)) and (grad < 0).all()


def test_an_empty_response_stays_in_trls_divisor(batch):
    """Ours counts responses that have tokens; DAPO's groups without variance leave the divisor that way."""
    new, logprobs, _, advantages, mask = batch
    mask = mask.clone()
    mask[0] = False
    for loss_type, average in (("grpo", "responses"), ("dr_grpo", "constant")):
        theirs = lambda x, t=loss_type: trl_grpo_loss(x, logprobs, advantages, mask, loss_type=t, **CLIP)
        mine = ours(logprobs, advantages, mask, average)
        equal(lambda x, mine=mine: mine(x) * (B - 1) / B, theirs, new)


def test_microbatches_of_grpo_are_a_mean_of_means_of_responses_in_trl(batch):
    """The same number as ours where all microbatches have as many responses, which they do in TRL."""
    new, logprobs, _, advantages, mask = batch

    def theirs(x):
        rows = (slice(0, 3), slice(3, 6))
        options = {"loss_type": "grpo", "current_gradient_accumulation_steps": 2, **CLIP}
        return sum(trl_grpo_loss(x[r], logprobs[r], advantages[r], mask[r], **options) for r in rows)

    equal(ours(logprobs, advantages, mask, "responses"), theirs, new)
