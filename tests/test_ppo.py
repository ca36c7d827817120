"""PPO's equations against the numbers of the papers and of the details' register."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import gae, token_logprobs
from minirlhf.masked import masked_mean, whiten
from minirlhf.ppo import (
    adapt_kl_coef,
    apply_missing_eos,
    best_of_n_kl,
    explained_variance,
    importance_weights,
    kl_estimates,
    linear_decay,
    policy_loss,
    rollout_metrics,
    shape_rewards,
    value_loss,
)

NAN = math.nan
some = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def real(*lengths, R=4):
    """A response mask with these lengths."""
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def near(got, want, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(got), torch.tensor(want), atol=tolerance, rtol=0)


def batch(seed, B=4, R=6):
    """new_logprobs, logprobs, advantages, new_values, values, returns, mask [B, R]; float64."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(R) < torch.randint(0, R + 1, (B, 1), generator=g)
    tensors = torch.randn(6, B, R, dtype=torch.float64, generator=g)
    return [*tensors.unbind(), mask]


# The three-token world of D1: policy p, reference q.
P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])


def test_D1_values_by_enumeration():
    k1, k2, k3 = kl_estimates(P.log(), Q.log())
    near(k1, [0.916291, -0.510826, -0.405465])
    near(k2, [0.419795, 0.130472, 0.082201], 2e-6)
    near(k3, [0.316291, 0.155841, 0.094535])
    near((P * k1).sum(), 0.223805)
    near((P * k3).sum(), 0.223805)
    near((P * k2).sum(), 0.265479)
    near(kl_estimates(P.log(), P.log())[2], [0.0, 0.0, 0.0], 0)  # k3 of equal policies is exactly 0
    k3 = kl_estimates(torch.zeros(1), torch.tensor([1e-4]))[2]
    assert k3.item() == pytest.approx(5e-9, rel=0.01)  # and has digits where policies are nearly equal


@pytest.mark.parametrize(
    "estimator, use, want",
    [
        (0, "reward", [0.346243, -0.220389, -0.125854]),  # the true gradient
        (1, "loss", [0.346243, -0.220389, -0.125854]),  # the true gradient
        (2, "reward", [0.046243, -0.020389, -0.025854]),  # wrong, though its value is unbiased
        (1, "reward", [0.077158, -0.040502, -0.036656]),  # wrong
        (2, "loss", [0.3, -0.2, -0.1]),  # the gradient of KL(q || p)
    ],
)
def test_D1_gradients_by_enumeration(estimator, use, want):
    logits = P.log().requires_grad_()
    logprobs, _ = token_logprobs(logits.expand(3, 3), torch.arange(3))
    k = kl_estimates(logprobs, Q.log())[estimator]
    surrogate = k.detach() * logprobs if use == "reward" else k
    (P * surrogate).sum().backward()
    near(logits.grad, want)


def test_D1_true_gradient_through_shaped_rewards_and_the_policy_loss():
    """The whole path: each token of the vocabulary sampled once, weighted by its probability."""
    logits = P.log().requires_grad_()
    new_logprobs, _ = token_logprobs(logits.expand(3, 1, 3), torch.arange(3)[:, None])
    mask = real(1, 1, 1, R=1)
    logprobs = new_logprobs  # a caller who forgot to detach gets constants all the same
    rewards = shape_rewards(torch.zeros(3), logprobs, Q.log()[:, None], mask, kl_coef=1.0)
    assert not rewards.requires_grad
    loss, _ = policy_loss(new_logprobs, logprobs.detach(), rewards * P[:, None], mask, 0.2, denominator=1)
    loss.backward()
    near(logits.grad, [0.346243, -0.220389, -0.125854])


def test_D7_score_lands_on_the_last_real_token():
    mask = real(4, 2, 1, 0)
    logprobs = torch.zeros(4, 4).masked_fill(~mask, NAN)
    ref_logprobs = torch.tensor([[-0.5, 0.0, -1.0, 0.25]]).expand(4, 4)
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0, NAN]), logprobs, ref_logprobs, mask, 0.2)
    want = [[-0.1, 0.0, -0.2, 1.05], [-0.1, 2.0, 0.0, 0.0], [2.9, 0.0, 0.0, 0.0], [0.0] * 4]
    near(rewards, want)  # the last row has no token: its score is nowhere
    assert shape_rewards(torch.ones(2), *torch.zeros(2, 2, 0), real(0, 0, R=0), 0.1).shape == (2, 0)


@some
@given(seeds, st.floats(0, 2))
def test_D7_rows_sum_to_score_minus_kl(seed, kl_coef):
    logprobs, ref_logprobs, _, _, _, _, mask = batch(seed)
    scores = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)
    want = torch.where(mask.any(1), scores - kl_coef * kl, 0.0)
    torch.testing.assert_close(rewards.sum(1), want)
    score_alone = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.0)
    assert ((score_alone != 0).sum(1) == mask.any(1)).all()  # exactly once


def test_D8_from_scores_to_advantages():
    """D8's numbers by way of shaping: score 1, kl_coef .1, k1 = 1, 0, 1, 0; padding changes nothing."""
    want = [0.251725, 0.4755, 0.29, 0.2]
    for R in (4, 7):
        pad = [NAN] * (R - 4)
        k1 = torch.tensor([[1.0, 0.0, 1.0, 0.0, *pad]])
        rewards = shape_rewards(torch.ones(1), k1, torch.zeros(1, R), real(4, R=R), 0.1)
        near(rewards[:, :4], [[-0.1, 0.0, -0.1, 1.0]])
        values = torch.tensor([[0.5, 0.4, 0.6, 0.8, *pad]])
        advantages, returns = gae(rewards, values, mask=real(4, R=R))
        near(advantages, [want + [0.0] * (R - 4)])
        near(returns, [[0.751725, 0.8755, 0.89, 1.0] + [0.0] * (R - 4)])


def test_D8_returns_are_made_before_whitening():
    rewards, values = torch.tensor([[-0.1, 0.0, -0.1, 1.0]]), torch.tensor([[0.5, 0.4, 0.6, 0.8]])
    advantages, returns = gae(rewards, values)
    white = whiten(advantages, real(4))
    near(returns, [[0.751725, 0.8755, 0.89, 1.0]])
    near(masked_mean(white, real(4)), 0.0)
    assert (white + values - returns).abs().max() > 0.5  # whitened advantages are no basis for returns


@pytest.mark.parametrize(
    "mode, penalty, want",
    [
        ("replace", 1.0, [2.0, -1.0, 0.5, -1.0]),
        ("replace", 0.25, [2.0, -0.25, 0.5, -0.25]),
        ("subtract", 1.0, [2.0, 2.0, 0.5, -1.5]),
        ("none", 1.0, [2.0, 3.0, 0.5, -0.5]),
    ],
)
def test_D9_two_conventions(mode, penalty, want):
    scores, has_eos = torch.tensor([2.0, 3.0, 0.5, -0.5]), torch.tensor([True, False, True, False])
    near(apply_missing_eos(scores, has_eos, penalty, mode), want, 0)
    assert torch.equal(scores, torch.tensor([2.0, 3.0, 0.5, -0.5]))


def test_D9_cases():
    """Empty, EOS first, EOS exactly at the limit, several EOS, cut off; EOS belongs to its response."""
    E, x = 9, 1
    responses = torch.tensor([[0, 0, 0], [E, 0, 0], [x, x, E], [x, E, E], [x, x, x]])
    mask = real(0, 1, 3, 2, 3, R=3)  # the second EOS of row 3 was never sampled: it is not in the mask
    has_eos = (mask & (responses == E)).any(1)
    scores = torch.tensor([NAN, 1.0, 2.0, 3.0, 4.0])
    zeros = torch.zeros(5, 3)
    shaped = shape_rewards(apply_missing_eos(scores, has_eos, 1.0, "replace"), zeros, zeros, mask, 0.1)
    near(shaped, [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, -1.0]], 0)
    shaped = shape_rewards(apply_missing_eos(scores, has_eos, 0.5, "subtract"), zeros, zeros, mask, 0.1)
    near(shaped.sum(1), [0.0, 1.0, 2.0, 3.0, 3.5], 0)


def test_D9_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'replace', 'subtract' or 'none', not 'subtrakt'"):
        apply_missing_eos(torch.zeros(1), torch.ones(1, dtype=torch.bool), 1.0, "subtrakt")


@pytest.mark.parametrize(
    "kl, want", [(12.0, 0.150192), (6.6, 0.150096), (6.0, 0.15), (3.0, 0.149808), (60.0, 0.150192)]
)
def test_D11_adaptive_kl_coefficient(kl, want):
    assert adapt_kl_coef(0.15, kl, target=6.0, n=64, horizon=10000) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    "advantage, ratio, want, clipped, slope",
    [
        (1.0, 1.5, -1.2, 1.0, 0.0),
        (1.0, 0.5, -0.5, 0.0, -0.5),
        (-1.0, 1.5, 1.5, 0.0, 1.5),
        (-1.0, 0.5, 0.8, 1.0, 0.0),
    ],
)
def test_D12_policy_loss(advantage, ratio, want, clipped, slope):
    new = torch.tensor([[math.log(ratio), NAN]], requires_grad=True)
    loss, stats = policy_loss(new, torch.zeros(1, 2), torch.full((1, 2), advantage), real(1, R=2), 0.2)
    loss.backward()
    near(loss, want)
    near(new.grad, [[slope, 0.0]])  # a clipped token pushes no further
    near(stats["policy/clipfrac_avg"], clipped, 0)
    near(stats["val/ratio"], ratio)
    near(stats["policy/approxkl_avg"], math.log(ratio) ** 2 / 2)
    assert not any(s.requires_grad for s in stats.values())


def test_D12_statistics_are_means_over_the_tokens_of_the_minibatch():
    """Ratios 1.5, .5, 1 and 1.1 with advantage 1, -1, 1, 1: one of them is clipped at 1.2, one at .8."""
    ratios = torch.tensor([[1.5, 0.5, 1.0], [1.1, NAN, NAN]])
    advantages = torch.tensor([[1.0, -1.0, 1.0], [1.0, NAN, NAN]])
    mask = real(3, 1, R=3)
    for tokens, share in ((None, 1.0), (4, 1.0), (torch.tensor(8), 0.5)):  # 8: another 4 tokens are elsewhere
        loss, stats = policy_loss(ratios.log(), torch.zeros(2, 3), advantages, mask, 0.2, tokens)
        near(loss, share * (-1.2 + 0.8 - 1.0 - 1.1) / 4)
        near(stats["val/ratio"], share * (1.5 + 0.5 + 1.0 + 1.1) / 4)
        near(stats["policy/clipfrac_avg"], share * 2 / 4)
        squares = [math.log(ratio) ** 2 for ratio in (1.5, 0.5, 1.0, 1.1)]
        near(stats["policy/approxkl_avg"], share * sum(squares) / 2 / 4)


def test_D12_value_statistics_are_means_over_the_tokens_of_the_minibatch():
    """Old 0, returns 1; new .5 and -.5 are clipped to .2 and -.2, where the first is further off, and .1 is not clipped."""
    new, values, returns = torch.tensor([[0.5, -0.5, 0.1, NAN]]), torch.zeros(1, 4), torch.ones(1, 4)
    for tokens, share in ((None, 1.0), (6, 0.5)):
        loss, clipfrac = value_loss(new, values, returns, real(3), 0.2, tokens)
        near(loss, share * (0.8**2 + 1.5**2 + 0.9**2) / 2 / 3)
        near(clipfrac, share * 1 / 3)
        near(
            value_loss(new, values, returns, real(3), None, tokens)[0],
            share * (0.5**2 + 1.5**2 + 0.9**2) / 2 / 3,
        )


@pytest.mark.parametrize(
    "clip, want, clipped, slope",
    [(0.2, 0.32, 1.0, 0.0), (1.0, 0.125, 0.0, -0.5), (None, 0.125, 0.0, -0.5)],
)
def test_D12_value_loss(clip, want, clipped, slope):
    """Old 0, new .5, return 1: clipped around the rollout's value, .5 * max(.25, .64)."""
    new = torch.tensor([[0.5, NAN]], requires_grad=True)
    loss, clipfrac = value_loss(new, torch.zeros(1, 2), torch.ones(1, 2), real(1, R=2), clip)
    loss.backward()
    near(loss, want)
    near(clipfrac, clipped, 0)
    near(new.grad, [[slope, 0.0]])


@some
@given(seeds)
def test_D12_nothing_is_counted_as_clipped_inside_the_range(seed):
    """Written old + clamp(new - old), rounding alone gives a clipfrac of .17 on such numbers."""
    g = torch.Generator().manual_seed(seed)
    values, returns = torch.randn(2, 8, 9, generator=g).clamp(-4, 4) / 30
    new_values = torch.randn(8, 9, generator=g) / 300
    mask = torch.ones(8, 9, dtype=torch.bool)
    loss, clipfrac = value_loss(new_values, values, returns, mask, 0.2)
    assert clipfrac == 0 and torch.equal(loss, value_loss(new_values, values, returns, mask, None)[0])
    near(policy_loss(values, values, returns, mask, 0.2)[1]["policy/clipfrac_avg"], 0.0, 0)


def test_D12_explained_variance():
    returns, values = torch.tensor([[1.0, 2, 3, 4, NAN]]), torch.tensor([[1.5, 1.5, 3.5, 3.5, NAN]])
    mask = real(4, R=5)
    near(explained_variance(values, returns, mask), 0.8)
    near(explained_variance(returns, returns, mask), 1.0)
    near(explained_variance(values * 1e-6, returns * 1e-6, mask), 0.8)  # small returns vary as well
    near(explained_variance(values - 1e4, returns - 1e4, mask), 0.8, 1e-3)
    far = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64) - 1e7
    assert (
        explained_variance(far, far, real(4)) == 0
    )  # a ten-millionth of their size is noise, however well it is met
    assert explained_variance(far + 9.99e6, far + 9.99e6, real(4)) == 1
    for constant in (0.0, 0.1, 1e4, -0.1, -1e4):  # in fp32 a thousand times .1 does not average to .1
        flat = torch.full((1, 1000), constant)
        assert explained_variance(torch.randn(1, 1000), flat, flat == constant) == 0
    assert explained_variance(values, returns, real(0, R=5)) == 0


def test_D22_metrics_of_a_rollout():
    """Two responses of two tokens and one; padding holds 0, as in the sampler's record."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.5], [-1.5, 0.0]])
    has_eos = torch.tensor([True, False])
    found = rollout_metrics(torch.tensor([3.0, 1.0]), logprobs, ref_logprobs, real(2, 1, R=2), has_eos, 0.2)
    k3 = lambda log_r: math.exp(log_r) - 1 - log_r
    want = {
        "objective/kl": [1.0 - 0.5, 1.0],
        "objective/kl_k3": [k3(-1.0) + k3(0.5), k3(-1.0)],
        "objective/entropy": [3.0, 0.5],
        "objective/non_score_reward": [-0.2 * 0.5, -0.2],
        "objective/rlhf_reward": [3.0 - 0.2 * 0.5, 1.0 - 0.2],
        "objective/scores": [3.0, 1.0],
        "val/eos_rate": [1.0, 0.0],
        "val/response_length": [2.0, 1.0],
    }
    assert found.keys() == want.keys() and all(x.dtype == torch.float32 for x in found.values())
    for name, numbers in want.items():
        near(found[name], numbers)
    assert not any(x.requires_grad for x in found.values())


# What another engine draws where the policy is P: close to it, as roundings are, and far from it.
ENGINES = {"near": torch.tensor([0.51, 0.295, 0.195]), "far": torch.tensor([0.1, 0.2, 0.7])}


@pytest.mark.parametrize("engine", ENGINES)
def test_D32_weights_give_the_policys_expectation_by_enumeration(engine):
    """Each token drawn once, in its share: without a cap, values and gradients are those of the policy's own draws."""
    policy, drawn, mask = P.double(), ENGINES[engine].double(), real(1, 1, 1, R=1)
    policy, drawn = policy / policy.sum(), drawn / drawn.sum()
    values = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    weights = importance_weights(policy.log()[:, None], drawn.log()[:, None], mask, cap=math.inf)
    raw, corrected, wanted = (
        (share * values).sum().item() for share in (drawn, drawn * weights[:, 0], policy)
    )
    assert abs(corrected - wanted) < 1e-12 < 1e-3 < abs(raw - wanted)

    def gradient(shares, weights):
        logits = policy.log().requires_grad_()
        new = logits.log_softmax(0)[:, None]
        advantages = (shares * values)[:, None]
        policy_loss(new, policy.log()[:, None], advantages, mask, 0.2, 1, weights)[0].backward()
        return logits.grad

    difference = gradient(drawn, weights) - gradient(policy, None)
    assert difference.abs().max() < 1e-12
    assert (gradient(drawn, None) - gradient(policy, None)).abs().max() > 1e-3


def test_D32_two_tokens_need_the_product_and_get_each_tokens_own():
    """A token's weight corrects it given those before it, not how often the engine writes those."""
    policy = torch.tensor(
        [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64
    )  # first; after 0; after 1
    drawn = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.3, 0.7]], dtype=torch.float64)
    texts = [(a, b) for a in (0, 1) for b in (0, 1)]
    of = lambda p: torch.stack([torch.stack([p[0, a], p[1 + a, b]]) for a, b in texts])  # [4, 2]
    weights = importance_weights(of(policy).log(), of(drawn).log(), real(2, 2, 2, 2, R=2), cap=math.inf)
    exact, found = of(policy).prod(1), of(drawn).prod(1) * weights.prod(1)
    assert (exact - found).abs().max() < 1e-12
    second = of(drawn)[:, 0] * of(policy)[:, 1]  # the engine's first token, then the policy's second
    assert (of(drawn).prod(1) * weights[:, 1] - second).abs().max() < 1e-12


def test_D32_ratios_are_capped_from_above_alone():
    ratio = torch.tensor([[0.01, 0.5, 1.0, 1.99, 2.5, 1e30]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    near(importance_weights(ratio.log(), torch.zeros(1, 6), mask), [[0.01, 0.5, 1.0, 1.99, 2.0, 2.0]])
    near(importance_weights(ratio.log(), torch.zeros(1, 6), mask, cap=0.5), [[0.01] + 5 * [0.5]])
    huge = importance_weights(torch.zeros(1, 6), torch.full((1, 6), -math.inf), mask)
    near(huge, [6 * [2.0]])  # the engine drew what it calls impossible
    same = torch.randn(3, 4)
    near(importance_weights(same, same, real(4, 2, 0)), real(4, 2, 0).float().tolist(), 0)


def test_D32_masked_tokens_weigh_nothing_and_no_gradient_flows():
    logprobs = torch.tensor([[-1.0, NAN, -math.inf], [-2.0, -1.0, NAN]], requires_grad=True)
    engine = torch.tensor([[-1.0, 0.0, -math.inf], [-1.0, -1.0, 1.0]], requires_grad=True)
    weights = importance_weights(logprobs, engine, real(1, 2, R=3))
    near(weights, [[1.0, 0.0, 0.0], [math.exp(-1), 1.0, 0.0]])
    assert not weights.requires_grad


def test_D32_kl_of_the_mismatch_is_that_of_the_engine_to_the_policy():
    """What docs/scaling.md says to log: kl_estimates(engine's, recomputed), a mean over tokens the engine drew."""
    policy, drawn = P.double() / P.double().sum(), ENGINES["far"].double() / ENGINES["far"].double().sum()
    k1, _, k3 = kl_estimates(drawn.log(), policy.log())
    exact = (drawn * (drawn / policy).log()).sum()
    assert abs((drawn * k1).sum() - exact) < 1e-12 and abs((drawn * k3).sum() - exact) < 1e-12


def test_D16_linear_decay():
    assert [linear_decay(u, 4) for u in range(4)] == [1.0, 0.75, 0.5, 0.25]
    for update in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            linear_decay(update, 4)


@pytest.mark.parametrize("parts, want", [(((1, 1.0), (9, 4.0)), 3.7), (((2, 1.0), (8, 3.0)), 2.6)])
def test_D17_parts_of_unequal_size_add_up(parts, want):
    """Micro-batches (or ranks) of n tokens with mean loss m; a mean of means would give 2.5 and 2."""
    total = sum(n for n, _ in parts)
    policy, value, means = 0.0, 0.0, []
    for n, m in parts:
        zeros, mask = torch.zeros(1, 9), real(n, R=9)
        policy += policy_loss(zeros, zeros, torch.full((1, 9), -m), mask, 0.2, total)[0]
        value += value_loss(zeros, zeros, torch.full((1, 9), (2 * m) ** 0.5), mask, 0.2, torch.tensor(total))[
            0
        ]
        means.append(policy_loss(zeros, zeros, torch.full((1, 9), -m), mask, 0.2)[0])
    near(policy, want)
    near(value, want)
    assert abs(sum(means) / len(means) - want) > 0.5


@some
@given(seeds, st.sampled_from([1, 2, 4]))
def test_D17_gradients_and_statistics_do_not_depend_on_the_split(seed, pieces):
    new, old, advantages, new_values, values, returns, mask = batch(seed)
    new.requires_grad_(), new_values.requires_grad_()
    whole, stats = policy_loss(new, old, advantages, mask, 0.2)
    whole_value, clipfrac = value_loss(new_values, values, returns, mask, 0.2)
    want = torch.autograd.grad(whole + whole_value, (new, new_values))
    summed, loss = dict.fromkeys(("value", *stats), 0.0), 0.0
    for part in torch.arange(4).chunk(pieces):  # a part may well have no token at all
        p, s = policy_loss(new[part], old[part], advantages[part], mask[part], 0.2, mask.sum())
        v, c = value_loss(new_values[part], values[part], returns[part], mask[part], 0.2, mask.sum())
        loss = loss + p + v
        for name, x in {**s, "value": c}.items():
            summed[name] += x
    for a, b in zip(torch.autograd.grad(loss, (new, new_values)), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    for name, x in {**stats, "value": clipfrac}.items():
        torch.testing.assert_close(summed[name], x)


@pytest.mark.parametrize("n, want", [(1, 0.0), (4, 0.6363), (16, 1.8351), (64, 3.1745)])
def test_D20_best_of_n_kl(n, want):
    assert best_of_n_kl(n) == pytest.approx(want, abs=5e-5)


@some
@given(seeds)
def test_D22_padding_reaches_no_number_and_no_gradient(seed):
    *tensors, mask = batch(seed)
    scores = torch.ones(4, dtype=torch.float64)

    def everything(new, old, advantages, new_values, values, returns):
        new, new_values = new.clone().requires_grad_(), new_values.clone().requires_grad_()
        loss, stats = policy_loss(new, old, advantages, mask, 0.2)
        vf_loss, clipfrac = value_loss(new_values, values, returns, mask, 0.2)
        (loss + vf_loss).backward()
        rewards = shape_rewards(scores, old, new.detach(), mask, 0.1)
        variance = explained_variance(values, returns, mask)
        numbers = [loss, *stats.values(), vf_loss, clipfrac, rewards, variance, *gae(rewards, values, mask)]
        return [x.detach() for x in (*numbers, new.grad, new_values.grad)]

    clean = everything(*tensors)
    for junk in (NAN, math.inf, 1e30):
        poisoned = everything(*(t.masked_fill(~mask, junk) for t in tensors))
        assert all(x.isfinite().all() for x in poisoned)
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_D22_no_real_token_gives_zero_not_nan():
    empty = real(0, 0)
    new = torch.full((2, 4), NAN, requires_grad=True)
    loss, stats = policy_loss(new, new.detach(), new.detach(), empty, 0.2)
    vf_loss, clipfrac = value_loss(new, new.detach(), new.detach(), empty, 0.2, denominator=0)
    (loss + vf_loss).backward()
    assert loss == vf_loss == clipfrac == 0 and not any(stats.values()) and not new.grad.any()
