"""Sampling and reading: one distribution, one temperature, masks from lengths."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, rollout
from minirlhf.model import GPT, GPTConfig, ValueModel
from minirlhf.ppo import kl_estimates, policy_loss
from minirlhf.rollout import (
    Sampling,
    Texts,
    by_microbatch,
    forbid,
    generate,
    read_before,
    response_logprobs,
    response_values,
    sample,
)
from minirlhf.support.draw import draw_by_cdf, draw_by_race

EOS, PAD, V = 1, 0, 12
CONFIG = GPTConfig(vocab_size=V, context=24, n_layer=2, n_head=2, n_embd=16)


def sampling(max_new=8, temperature=1.0, **others):
    return Sampling(max_new, temperature, EOS, PAD, **others)


def small_model(seed=0, sharp=False):
    """A small model.  Its distributions are all but flat, so that an EOS comes at one step in twelve; or sharp."""
    torch.manual_seed(seed)
    model = GPT(CONFIG).eval()
    if sharp:
        with torch.no_grad():
            model.wte.weight.mul_(40)
    return model


def left_padded(n=4):
    prompts = torch.randint(2, V, (n, 4))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :2] = False
    return prompts.masked_fill(~mask, PAD), mask


def some_texts(n=3, prompt=4, response=5):
    """Texts without padding, of random tokens."""
    ones = lambda width: torch.ones(n, width, dtype=torch.bool)
    prompts, responses = torch.randint(2, V, (n, prompt)), torch.randint(2, V, (n, response))
    return Texts(prompts, ones(prompt), responses, ones(response))


def parts(texts):
    return texts.prompts, texts.prompt_mask, texts.responses, texts.response_mask


# ------------------------------------------------------------------------------------------------- Texts


def test_texts_are_each_prompt_followed_by_its_response():
    prompts, prompt_mask = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[False, True], [True, True]])
    responses = torch.tensor([[8, 1, 0], [9, 10, 11]])
    texts = Texts(prompts, prompt_mask, responses, torch.tensor([[True, True, False], [True, True, True]]))
    assert texts.tokens.tolist() == [[0, 5, 8, 1, 0], [6, 7, 9, 10, 11]]
    assert texts.mask.int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(texts.mask, texts.host_mask)
    assert len(texts) == 2
    assert texts.ended(EOS).tolist() == [True, False]


def test_an_end_that_is_masked_ends_nothing():
    texts = some_texts(2)
    texts.responses[:, 2] = EOS
    texts.response_mask[1, 2:] = False
    assert texts.ended(EOS).tolist() == [True, False]


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3), torch.tensor([1])])
def test_rows_of_texts_are_rows_of_all_their_parts(rows):
    texts = generate(small_model(), *left_padded(3), sampling(6))
    chosen = texts[rows]
    for part, whole in zip(parts(chosen), parts(texts), strict=True):
        assert torch.equal(part, whole[rows])
    assert torch.equal(chosen.host_mask, texts.mask[rows])
    assert torch.equal(chosen.tokens, texts.tokens[rows])


def test_texts_of_several_widths_are_joined():
    a, b = some_texts(2, prompt=2, response=3), some_texts(1, prompt=4, response=2)
    whole = Texts.cat([a, b])
    assert whole.prompts.shape == (3, 4) and whole.responses.shape == (3, 3)
    assert torch.equal(whole.prompts[:2, 2:], a.prompts) and torch.equal(whole.responses[2:, :2], b.responses)
    assert whole.prompt_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert whole.response_mask.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    model = small_model(sharp=True)
    joined = response_logprobs(model, whole, sampling())[0]
    for rows, alone in ((joined[:2], a), (joined[2:, :2], b)):
        torch.testing.assert_close(rows, response_logprobs(model, alone, sampling())[0])


def test_decode_gives_prompts_and_responses_without_their_padding():
    class Letters:
        decode = staticmethod(lambda ids: "".join("_$abcdefghij"[i] for i in ids))

    texts = Texts(
        torch.tensor([[0, 2], [3, 4]]),
        torch.tensor([[False, True], [True, True]]),
        torch.tensor([[5, 1, 0], [6, 7, 8]]),
        torch.tensor([[True, True, False], [True, True, True]]),
    )
    assert texts.decode(Letters) == (["a", "bc"], ["d$", "efg"])


def test_by_microbatch_keeps_the_order_and_passes_the_rest_on():
    texts, calls = some_texts(5), []

    def first_token(model, rows, factor):
        calls.append(len(rows))
        return model * factor * rows.responses[:, 0]

    def two(model, rows):
        return rows.responses, rows.prompts[:, 0]

    for microbatch, sizes in ((2, [2, 2, 1]), (5, [5]), (9, [5]), (None, [5])):
        calls.clear()
        assert torch.equal(by_microbatch(first_token, 3, texts, microbatch, 10), 30 * texts.responses[:, 0])
        assert calls == sizes
        found = by_microbatch(two, None, texts, microbatch)
        assert torch.equal(found[0], texts.responses) and torch.equal(found[1], texts.prompts[:, 0])


# ------------------------------------------------------------------------------------------------- sampling


def test_D6_response_mask_comes_from_lengths_and_holds_the_eos():
    texts = generate(small_model(), *left_padded(64), sampling(10))
    lengths = texts.response_mask.sum(1)
    for row, keep, n in zip(
        texts.responses.tolist(), texts.response_mask.tolist(), lengths.tolist(), strict=True
    ):
        assert keep == [i < n for i in range(10)]
        assert EOS not in row[: n - 1] and (n == 10 or row[n - 1] == EOS)
        assert set(row[n:]) <= {PAD}
    assert 1 < lengths.float().mean() < 10  # both endings occur


def test_the_prompts_come_back_as_they_were():
    prompts, prompt_mask = left_padded()
    texts = generate(small_model(), prompts, prompt_mask, sampling())
    assert torch.equal(texts.prompts, prompts) and torch.equal(texts.prompt_mask, prompt_mask)


def test_generate_greedy_equals_the_uncached_argmax():
    model = small_model(sharp=True)
    texts = generate(model, *left_padded(), sampling(temperature=0.0))
    best = model.logits(model(texts.tokens, texts.mask)).argmax(-1)[:, 3:-1]
    assert (best == texts.responses)[texts.response_mask].all()


@pytest.mark.parametrize("compact_below", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("even", [False, True])
def test_sampling_without_a_cache_draws_the_same_tokens(monkeypatch, compact_below, even):
    """Whether rows that have ended stay in the batch (0), leave it in groups, or leave it at once."""
    monkeypatch.setattr(rollout, "COMPACT_BELOW", compact_below)
    model = small_model()
    prompts, prompt_mask = left_padded(32)
    if even:
        prompts, prompt_mask = torch.randint(2, V, (32, 4)), torch.ones(32, 4, dtype=torch.bool)
    texts = generate(model, prompts, prompt_mask, sampling(12), torch.Generator().manual_seed(3))
    again, tokens, real = torch.Generator().manual_seed(3), prompts, prompt_mask
    running, length = torch.ones(32, dtype=torch.bool), torch.full((32,), 12)
    for t in range(int(texts.response_mask.sum(1).max())):
        p = model.logits(model(tokens, real)[:, -1]).softmax(-1)
        drawn = draw_by_cdf(p, torch.rand(32, 1, generator=again))
        assert torch.equal(texts.responses[running, t], drawn[running])
        length[running & (drawn == EOS)] = t + 1
        running &= drawn != EOS
        tokens = torch.cat([tokens, drawn[:, None]], 1)
        real = torch.cat([real, torch.ones(32, 1, dtype=torch.bool)], 1)
    assert torch.equal(texts.response_mask.sum(1), length) and len(set(length.tolist())) > 5


def test_what_is_drawn_for_a_row_does_not_depend_on_the_other_rows():
    """On a CPU: the others' prompts change, so they end elsewhere and leave the batch at other times."""
    model, prompts = small_model(sharp=True), torch.randint(2, V, (8, 4))
    ones = torch.ones_like(prompts, dtype=torch.bool)
    others = prompts.clone()
    others[1:] = torch.randint(2, V, (7, 4))
    a, b = (
        generate(model, p, ones, sampling(12), torch.Generator().manual_seed(5)) for p in (prompts, others)
    )
    assert torch.equal(a.responses[0], b.responses[0])
    assert not torch.equal(a.response_mask.sum(1), b.response_mask.sum(1))


def logits_of(p):
    return torch.tensor(p, dtype=torch.float64).log().float()


def draw_many(way, logits, n, temperature=1.0):
    """n tokens from one row of logits, as a CPU draws them or as a GPU does."""
    if way == "cdf":
        return sample(logits.expand(n, -1), temperature, torch.arange(n), n, None)
    p = (logits / temperature).softmax(-1).expand(n, -1)
    return draw_by_race(p, torch.empty(p.shape).exponential_())


@pytest.mark.parametrize("way", ["cdf", "race"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_D2_sampler_is_the_policy(way, temperature):
    """Frequencies of 200,000 draws against the softmax.  The odds of a false alarm are 1 in a million by chi-square."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.5, -1.0, float("-inf"), 1.0, -4.0, 0.0])
    expected = 200_000 * (logits / temperature).softmax(0)
    counts = torch.bincount(draw_many(way, logits, 200_000, temperature), minlength=7)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    assert chi_square < 35.9  # 5 degrees of freedom


@pytest.mark.parametrize("way", ["cdf", "race"])
def test_D2_draws_of_a_large_vocabulary_are_the_policys(way):
    """Half of 1,000 tokens are impossible, and the others differ a hundredfold.  Odds of a false alarm: 1 in 700,000."""
    torch.manual_seed(1)
    logits = (torch.rand(1000) * 4.6).masked_fill(torch.arange(1000) % 2 == 0, float("-inf"))
    counts = torch.bincount(draw_many(way, logits, 20_000), minlength=1000)
    assert counts[::2].sum() == 0
    expected, counts = (20_000 * logits.softmax(0)).view(50, 20).sum(1), counts.view(50, 20).sum(1)
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 110.0  # 49 degrees of freedom


@pytest.mark.parametrize("way", ["cdf", "race"])
@pytest.mark.parametrize(
    "p",
    [
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
        [0.5, 0.0, 0.0, 0.5],
        [1e-38, 0.0, 1.0, 0.0],
        [0.0, 1e-30, 0.0, 1e-30, 0.0, 1e-30],
        [0.0] + 999 * [1.0, 0.0],
    ],
    ids=["first", "last", "between", "almost", "tiny", "half"],
)
def test_R2_a_token_of_probability_0_is_never_drawn(way, p):
    """REVIEW 7.2.  A million draws, and for the inverse CDF the u at which rounding could pass the last token."""
    torch.manual_seed(0)
    logits = logits_of(p)
    impossible = logits.softmax(0) == 0
    assert impossible.any()
    assert not impossible[draw_many(way, logits, 1_000_000 if len(p) < 10 else 1000)].any()
    if way == "cdf":
        last = 1 - 2.0**-24  # the largest number that torch.rand gives
        u = torch.tensor([0.0, 0.5, last])[:, None]
        for total in (0.5, 0.5000001, 0.75, 0.99999994, 1.0, 1.0000001, 1.9999999):
            assert not impossible[draw_by_cdf(total * logits.softmax(0).expand(3, -1), u)].any()


def test_R2_no_noise_makes_the_race_choose_the_impossible():
    """Exponential noise of exactly 0, which some generators return, and the smallest and largest there are."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.7])
    values = torch.tensor([0.0, torch.finfo(torch.float32).tiny, 1e-20, 1.0, 80.0, float("inf")])
    noise = torch.cartesian_prod(*[values] * 4)
    noise = noise[~noise[:, [1, 3]].isinf().all(1)]
    assert set(draw_by_race(p.expand(len(noise), -1), noise).tolist()) == {1, 3}


def test_R2_a_device_other_than_the_cpu_runs_the_race(monkeypatch):
    """Its parallel cumulative sum may decrease, so it must not be searched."""
    monkeypatch.setattr(rollout, "draw_by_cdf", None)
    logits, rows = torch.zeros(2, V, device="meta"), torch.arange(2, device="meta")
    assert sample(logits, 1.0, rows, 2, None).shape == (2,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_F9_logits_that_are_not_numbers_end_in_one_line(bad):
    """RELIABILITY F9: NaN weights ended in an IndexError of the embedding."""
    model = small_model()
    with torch.no_grad():
        model.ln_f.bias[3] = bad
    with pytest.raises(UserError, match="weights are damaged, or its training diverged"):
        generate(model, *left_padded(), sampling())


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert sample(logits, 0.0, torch.arange(2), 2, None).tolist() == [1, 0]


def test_forbid_takes_one_token_out_of_the_distribution():
    logits = torch.randn(2, 3, V)
    found = forbid(logits, EOS)
    assert (found[..., EOS] == float("-inf")).all()
    others = torch.arange(V) != EOS
    assert torch.equal(found[..., others], logits[..., others])
    assert forbid(logits, None) is logits


def test_forbidden_token_leaves_a_distribution_of_the_rest():
    model, settings = small_model(sharp=True), sampling(10, forbidden=EOS)
    texts = generate(model, *left_padded(32), settings)
    assert texts.response_mask.all() and not (texts.responses == EOS).any()
    logprobs, entropy = response_logprobs(model, texts, settings)
    p = model.logits(read_before(model, texts))[..., torch.arange(V) != EOS].double().softmax(-1)
    at = (texts.responses - (texts.responses > EOS).long())[..., None]
    torch.testing.assert_close(logprobs.double(), p.gather(-1, at)[..., 0].log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
    texts.responses[0, 0] = EOS
    assert response_logprobs(model, texts, settings)[0][0, 0] == float("-inf")


# ------------------------------------------------------------------------------------------------- reading


def test_D2_mean_k1_of_the_policys_own_samples_is_not_negative():
    policy, ref = small_model(sharp=True), small_model(sharp=True)
    with torch.no_grad():
        ref.wpe.weight.add_(0.5 * torch.randn_like(ref.wpe.weight))
    torch.manual_seed(1)
    texts = generate(policy, *left_padded(512), sampling())
    with torch.no_grad():
        logprobs, ref_logprobs = (response_logprobs(m, texts, sampling())[0] for m in (policy, ref))
    k1, _, k3 = kl_estimates(logprobs, ref_logprobs)
    assert k1.sum(1).mean() > 0.1
    assert k1.sum(1).mean() == pytest.approx(k3.sum(1).mean().item(), rel=0.3)


def test_D3_log_probabilities_use_the_samplers_temperature():
    model, texts = small_model(sharp=True), some_texts()
    for temperature in (0.7, 1.0, 1.5):
        logprobs, entropy = response_logprobs(model, texts, sampling(temperature=temperature))
        log_p = (model.logits(model(texts.tokens))[:, 3:-1].double() / temperature).log_softmax(-1)
        expected = log_p.gather(-1, texts.responses[..., None])[..., 0]
        torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)


def test_D22_what_is_off_the_response_mask_is_0():
    model, texts = small_model(sharp=True), generate(small_model(), *left_padded(32), sampling(12))
    real = texts.response_mask
    assert not real.all()
    found = response_logprobs(model, texts, sampling())
    for result in found:
        assert (result[~real] == 0).all() and (result[real] != 0).all()
    texts.responses[~real] = 7  # what stands there changes nothing
    assert all(map(torch.equal, found, response_logprobs(model, texts, sampling())))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), micro=st.sampled_from([1, 2, 3, 6]), more=st.integers(0, 4))
def test_D4_ratio_is_one_until_the_first_step(seed, micro, more):
    """For any split into microbatches and any amount of left padding, in fp32."""
    model, settings = small_model(seed % 7, sharp=True), sampling(temperature=0.8)
    texts = generate(model, *left_padded(6), settings)
    with torch.no_grad():
        old, _ = response_logprobs(model, texts, settings)
    padding = torch.full((6, more), PAD)
    wider = Texts(
        torch.cat([padding, texts.prompts], 1),
        torch.cat([padding > PAD, texts.prompt_mask], 1),
        texts.responses,
        texts.response_mask,
    )
    for rows in torch.randperm(6).split(micro):
        new, _ = response_logprobs(model, wider[rows], settings)
        assert (new - old[rows]).abs().max() <= 1e-6 * (1 + old.abs().max())
        mask = texts.response_mask[rows]
        _, stats = policy_loss(new, old[rows], torch.randn_like(new), mask, 0.2)
        assert stats["policy/clipfrac_avg"] == 0
        assert stats["policy/approxkl_avg"] < 1e-10


def test_D8_values_are_read_before_the_token():
    torch.manual_seed(0)
    critic, texts = ValueModel(CONFIG).eval(), some_texts(2)
    values = response_values(critic, texts)
    assert values.shape == (2, 5)
    torch.testing.assert_close(values, critic(texts.tokens, texts.mask)[:, 3:-1], atol=1e-6, rtol=1e-5)
    changed = texts.responses.clone()
    changed[:, 2] = (changed[:, 2] + 1) % V  # the value before response token 2 must not know it
    after = response_values(critic, dataclasses.replace(texts, responses=changed))
    assert torch.equal(values[:, :3], after[:, :3])
    assert not torch.equal(values[:, 3], after[:, 3])


def test_hidden_states_are_read_before_the_token():
    model, texts = small_model(), some_texts()
    torch.testing.assert_close(read_before(model, texts), model(texts.tokens)[:, 3:-1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("forbidden", [None, EOS])
def test_fused_head_gives_the_same_logprobs_and_gradients(forbidden):
    """Also where a token is forbidden, for which the logits are made after all."""
    model = small_model(sharp=True)
    texts = generate(model, *left_padded(), sampling(forbidden=forbidden))
    found = []
    for fused in (False, True):
        model.zero_grad()
        settings = sampling(temperature=0.7, forbidden=forbidden, fused_head=fused)
        logprobs, entropy = response_logprobs(model, texts, settings)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        found.append([logprobs.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
