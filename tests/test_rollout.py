"""Sampling and scoring: one distribution, one temperature, masks from lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import rollout
from minirlhf.model import GPT, GPTConfig, ValueModel
from minirlhf.ppo import kl_estimates, policy_loss
from minirlhf.rollout import forbid, generate, read_before, response_logprobs, response_values, sample

EOS, PAD, V = 1, 0, 12
CONFIG = GPTConfig(vocab_size=V, context=24, n_layer=2, n_head=2, n_embd=16)


def sharp_model(seed=0):
    """A small model whose distributions are far from flat."""
    torch.manual_seed(seed)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        model.wte.weight.mul_(40)
    return model


def left_padded(n=4):
    prompts = torch.randint(2, V, (n, 4))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :2] = False
    return prompts.masked_fill(~mask, PAD), mask


def test_D6_response_mask_comes_from_lengths_and_holds_the_eos():
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()  # all but flat: an EOS comes at one step in twelve
    prompts, prompt_mask = left_padded(64)
    responses, mask = generate(model, prompts, prompt_mask, 10, 1.0, EOS, PAD)
    lengths = mask.sum(1)
    for row, keep, n in zip(responses.tolist(), mask.tolist(), lengths.tolist(), strict=True):
        assert keep == [i < n for i in range(10)]
        assert EOS not in row[: n - 1] and (n == 10 or row[n - 1] == EOS)
        assert set(row[n:]) <= {PAD}
    assert 1 < lengths.float().mean() < 10  # both endings occur


def test_generate_greedy_equals_the_uncached_argmax():
    model = sharp_model()
    prompts, prompt_mask = left_padded()
    responses, mask = generate(model, prompts, prompt_mask, 8, 0.0, EOS, PAD)
    tokens, real = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
    best = model.logits(model(tokens, real)).argmax(-1)[:, 3:-1]
    assert (best == responses)[mask].all()


@pytest.mark.parametrize("stay", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("even", [False, True])
def test_sampling_without_a_cache_draws_the_same_tokens(monkeypatch, stay, even):
    """Whether the rows that have ended stay in the batch (0), leave it in groups or at once."""
    monkeypatch.setattr(rollout, "STAY", stay)
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    prompts, prompt_mask = left_padded(32)
    if even:
        prompts, prompt_mask = torch.randint(2, V, (32, 4)), torch.ones(32, 4, dtype=torch.bool)
    responses, mask = generate(
        model, prompts, prompt_mask, 12, 1.0, EOS, PAD, torch.Generator().manual_seed(3)
    )
    again, tokens, real = torch.Generator().manual_seed(3), prompts, prompt_mask
    running, length = torch.ones(32, dtype=torch.bool), torch.full((32,), 12)
    for t in range(int(mask.sum(1).max())):
        drawn = sample(model.logits(model(tokens, real)[:, -1]), 1.0, torch.rand(32, 1, generator=again))
        assert torch.equal(responses[running, t], drawn[running])
        length[running & (drawn == EOS)] = t + 1
        running &= drawn != EOS
        tokens, real = (
            torch.cat([tokens, drawn[:, None]], 1),
            torch.cat([real, torch.ones(32, 1, dtype=torch.bool)], 1),
        )
    assert torch.equal(mask.sum(1), length) and len(set(length.tolist())) > 5


def test_D2_sampler_is_the_policy():
    """Frequencies of one draw against the softmax: 20,000 draws, chi-square at odds of about 1 in 10,000."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.5, -1.0, float("-inf"), 1.0, -20.0])
    for temperature in (0.7, 1.0):
        p = (logits / temperature).softmax(0)
        drawn = sample(logits.expand(20_000, -1), temperature, torch.rand(20_000, 1))
        counts = torch.bincount(drawn, minlength=6).float()
        assert counts[3] == 0
        seen = p > 1e-4
        chi_square = ((counts - 20_000 * p) ** 2 / (20_000 * p).clamp(min=1e-9))[seen].sum()
        assert chi_square < 21.0  # 4 degrees of freedom or fewer


def test_D2_mean_k1_of_the_policys_own_samples_is_not_negative():
    policy, ref = sharp_model(0), sharp_model(0)
    with torch.no_grad():
        ref.wpe.weight.add_(0.5 * torch.randn_like(ref.wpe.weight))
    torch.manual_seed(1)
    prompts, prompt_mask = left_padded(512)
    responses, mask = generate(policy, prompts, prompt_mask, 8, 1.0, EOS, PAD)
    tokens, real = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        logprobs, ref_logprobs = (response_logprobs(m, tokens, real, 4, 1.0)[0] for m in (policy, ref))
    k1, _, k3 = kl_estimates(logprobs, ref_logprobs)
    assert k1.sum(1).mean() > 0.1
    assert k1.sum(1).mean() == pytest.approx(k3.sum(1).mean().item(), rel=0.3)


def test_D3_log_probabilities_use_the_samplers_temperature():
    model = sharp_model()
    tokens, mask = torch.randint(2, V, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    for temperature in (0.7, 1.0, 1.5):
        logprobs, entropy = response_logprobs(model, tokens, mask, 4, temperature)
        log_p = (model.logits(model(tokens))[:, 3:-1].double() / temperature).log_softmax(-1)
        torch.testing.assert_close(
            logprobs.double(), log_p.gather(-1, tokens[:, 4:, None])[..., 0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)


def test_forbidden_token_leaves_a_distribution_of_the_rest():
    model = sharp_model()
    prompts, prompt_mask = left_padded(32)
    responses, mask = generate(model, prompts, prompt_mask, 10, 1.0, EOS, PAD, forbidden=EOS)
    assert mask.all() and not (responses == EOS).any()
    p = forbid(torch.randn(2, V), EOS).softmax(-1)
    assert (p[:, EOS] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), micro=st.sampled_from([1, 2, 3, 6]), more=st.integers(0, 4))
def test_D4_ratio_is_one_until_the_first_step(seed, micro, more):
    """For any split into microbatches and any amount of left padding, in fp32."""
    model = sharp_model(seed % 7)
    prompts, prompt_mask = left_padded(6)
    responses, mask = generate(model, prompts, prompt_mask, 8, 0.8, EOS, PAD)
    tokens, real = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        old, _ = response_logprobs(model, tokens, real, 4, 0.8)
    wider = torch.cat([torch.full((6, more), PAD), tokens], 1)
    wider_mask = torch.cat([torch.zeros(6, more, dtype=torch.bool), real], 1)
    for rows in torch.randperm(6).split(micro):
        new, _ = response_logprobs(model, wider[rows], wider_mask[rows], 4 + more, 0.8)
        assert (new - old[rows]).abs().max() <= 1e-6 * (1 + old.abs().max())
        _, stats = policy_loss(new, old[rows], torch.randn_like(new), mask[rows], 0.2)
        assert stats["policy/clipfrac_avg"] == 0
        assert stats["policy/approxkl_avg"] < 1e-10


def test_D8_values_are_read_before_the_token():
    torch.manual_seed(0)
    critic = ValueModel(CONFIG).eval()
    tokens, mask = torch.randint(2, V, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    values = response_values(critic, tokens, mask, 4)
    assert values.shape == (2, 5)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % V  # response token 2: its own value must not know it
    after = response_values(critic, changed, mask, 4)
    assert torch.equal(values[:, :3], after[:, :3])
    assert not torch.equal(values[:, 3], after[:, 3])


def test_one_forward_of_a_shared_trunk_equals_two():
    torch.manual_seed(0)
    policy = GPT(CONFIG).eval()
    critic = ValueModel(CONFIG, trunk=policy).eval()
    prompts, prompt_mask = left_padded()
    responses, mask = generate(policy, prompts, prompt_mask, 8, 1.0, EOS, PAD)
    tokens, mask = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
    hidden = read_before(policy, tokens, mask, 4)
    for got, wanted in zip(
        (
            *response_logprobs(policy, tokens, mask, 4, 0.7, hidden=hidden),
            response_values(critic, tokens, mask, 4, hidden),
        ),
        (*response_logprobs(policy, tokens, mask, 4, 0.7), response_values(critic, tokens, mask, 4)),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("forbidden", [None, EOS])
def test_fused_head_gives_the_same_logprobs_and_gradients(forbidden):
    """Also where a token is forbidden, for which the logits are made after all."""
    model, (prompts, prompt_mask) = sharp_model(), left_padded()
    responses, mask = generate(model, prompts, prompt_mask, 8, 1.0, EOS, PAD, forbidden=forbidden)
    tokens, real = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
    found = []
    for fused in (False, True):
        model.zero_grad()
        logprobs, entropy = response_logprobs(model, tokens, real, 4, 0.7, forbidden, fused)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        found.append([logprobs.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
