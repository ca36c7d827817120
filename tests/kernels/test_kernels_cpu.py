"""The four functions of `kernels` on CPU: against float64 oracles, and what holds whatever the numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.logprobs
from kernels import gae, linear_token_logprobs, token_kl, token_logprobs
from kernels.gae import gae_reference
from kernels.kl import token_kl_reference
from kernels.linear_logprobs import TILE, linear_token_logprobs_reference
from kernels.logprobs import CHUNK, token_logprobs_reference

INF, NAN = math.inf, math.nan
some = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def close(got, want, tolerance=2e-6):
    """Each element within `tolerance` of the oracle, relative where that is above 1; infinities equal."""
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    error = (got - want).abs()[finite] / want.abs()[finite].clamp(min=1)
    assert error.numel() == 0 or error.max() <= tolerance, error.max().item()


def grad_close(got, want, upstream):
    """Within 1.5 eps of the dtype relative to the row's largest gradient, and 1e-7 of what was multiplied."""
    size = want.abs().amax(-1, keepdim=True)
    error = (got.double() - want).abs() - 1.5 * torch.finfo(got.dtype).eps * size
    assert error.numel() == 0 or (error <= 1e-7 * (1 + upstream[:, None])).all(), error.max().item()


def gradients(function, inputs, upstream, **options):
    """Gradients of sum(upstream * outputs) with respect to the floating-point inputs."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves, **options)
    sum((u.to(o.dtype) * o).sum() for u, o in zip(upstream, outputs, strict=True)).backward()
    return [x.grad for x in leaves if x.requires_grad]


def rows(seed, N, V, scale=3.0, dtype=torch.float32, impossible=0.0):
    """logits and ref_logits [N, V], a share of both -inf (never the token's), tokens, the generator."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, N, V, generator=g).clamp(-3, 3) * scale / 3).to(dtype).unbind()
    tokens = torch.randint(V, (N,), generator=g)
    gone = torch.rand(N, V, generator=g) < impossible
    gone[torch.arange(N), tokens] = False
    return x.masked_fill(gone, -INF), y.masked_fill(gone, -INF), tokens, g


shapes = st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 7, 64, 1031]))
scales = st.sampled_from([0.1, 3.0, 50.0, 1000.0])
temperatures = st.sampled_from([0.3, 1.0, 1.7])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@some
@given(seeds, shapes, scales, temperatures, dtypes, st.sampled_from([0.0, 0.4]), st.booleans())
def test_agrees_with_the_float64_oracle(seed, shape, scale, temperature, dtype, impossible, masked):
    x, y, tokens, g = rows(seed, *shape, scale, dtype, impossible)
    mask = torch.rand(shape[0], generator=g) < 0.6 if masked else None
    options = {"temperature": temperature, "mask": mask}
    cases = [
        (token_logprobs, token_logprobs_reference, (x, tokens)),
        (token_kl, token_kl_reference, (x, y, tokens)),
    ]
    for function, reference, inputs in cases:
        exact = [t.double() if t.is_floating_point() else t for t in inputs]
        got, want = function(*inputs, **options), reference(*exact, **options)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32 and a.shape == tokens.shape
            close(a, b)
        upstream = torch.randn(len(got), shape[0], generator=g)
        pairs = zip(
            gradients(function, inputs, upstream, **options),
            gradients(reference, exact, upstream, **options),
            strict=True,
        )
        for a, b in pairs:
            assert a.dtype == dtype
            largest = want[-1].nan_to_num(posinf=0.0)  # the entropy, or the KL: factors of the gradient
            grad_close(a, b, upstream.abs().sum(0) * (1 + largest) / temperature)


@some
@given(seeds, shapes, st.integers(1, 40), temperatures, st.booleans())
def test_linear_agrees_with_the_float64_oracle(seed, shape, C, temperature, masked):
    (N, V), g = shape, torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) / C**0.5
    tokens = torch.randint(V, (N,), generator=g)
    mask = torch.rand(N, generator=g) < 0.6 if masked else None
    options = {"temperature": temperature, "mask": mask}
    exact = hidden.double(), weight.double(), tokens
    got = linear_token_logprobs(hidden, weight, tokens, **options)
    for a, b in zip(got, linear_token_logprobs_reference(*exact, **options), strict=True):
        assert a.dtype == torch.float32
        close(a, b, 4e-6)  # the product itself rounds
    upstream = torch.randn(2, N, generator=g)
    got = gradients(linear_token_logprobs, (hidden, weight, tokens), upstream, **options)
    for a, b in zip(got, gradients(linear_token_logprobs_reference, exact, upstream, **options), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [50257, 262144])
def test_large_vocabularies(V):
    x, y, tokens, _ = rows(V, 5, V, 1000.0)
    for a, b in zip(token_kl(x, y, tokens), token_kl_reference(x.double(), y.double(), tokens), strict=True):
        close(a, b)
    for a, b in zip(token_logprobs(x, tokens), token_logprobs_reference(x.double(), tokens), strict=True):
        close(a, b)


def test_gradcheck_of_oracles_and_fast_paths():
    x, y, tokens, g = rows(0, 3, 5)
    mask = torch.tensor([True, False, True])
    x, y = (t.double().requires_grad_() for t in (x, y))
    hidden = torch.randn(3, 4, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=g, requires_grad=True)
    for function in (token_logprobs, token_logprobs_reference):
        assert torch.autograd.gradcheck(lambda a, f=function: f(a, tokens, 0.7, mask), (x,))
    for function in (token_kl, token_kl_reference):
        assert torch.autograd.gradcheck(lambda a, b, f=function: f(a, b, tokens, 0.7, mask), (x, y))
    for function in (linear_token_logprobs, linear_token_logprobs_reference):
        assert torch.autograd.gradcheck(lambda a, b, f=function: f(a, b, tokens, 0.7, mask), (hidden, weight))


def test_D3_one_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3)
    want = {1.0: [-0.4076, -1.4076, -2.4076], 0.7: [-0.2601, -1.6887, -3.1173]}
    for temperature, numbers in want.items():
        options = (torch.arange(3), temperature)
        for logprobs in (
            token_logprobs(logits, *options)[0],
            token_kl(logits, logits, *options)[0],
            token_kl(logits, logits, *options)[1],
            linear_token_logprobs(logits, torch.eye(3), *options)[0],
        ):
            torch.testing.assert_close(logprobs, torch.tensor(numbers), atol=5e-5, rtol=0)


@some
@given(seeds, temperatures)
def test_D18_bf16_logits_meet_an_fp32_softmax(seed, temperature):
    x, y, tokens, _ = rows(seed, 4, 501, 30.0, torch.bfloat16)
    exact = token_kl_reference(x.double(), y.double(), tokens, temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, alone = token_kl(x, y, tokens, temperature), token_logprobs(x, tokens, temperature)
    for a, b in zip((*got, *alone), (*exact, exact[0], exact[2]), strict=True):
        assert a.dtype == torch.float32
        close(a, b)


@some
@given(seeds, st.sampled_from([1, 2, 13, 1031]), scales)
def test_what_every_distribution_obeys(seed, V, scale):
    x, y, _, _ = rows(seed, 1, V, scale)
    logprobs, ref_logprobs, entropy, kl = token_kl(x.expand(V, V), y.expand(V, V), torch.arange(V))
    assert (logprobs <= 0).all() and (ref_logprobs <= 0).all()
    assert abs(logprobs.double().exp().sum() - 1) < 1e-5
    assert (entropy >= -1e-6).all() and (entropy <= math.log(V) + 2e-6).all()
    assert (kl >= -1e-6).all()
    shifted = token_logprobs(x.double() + 12345.0, torch.zeros(1, dtype=torch.int64))
    close(shifted[0][0], logprobs[0])
    (grad,) = gradients(token_logprobs, (x, torch.zeros(1, dtype=torch.int64)), torch.ones(2, 1))
    assert abs(grad.double().sum()) < 1e-5


@some
@given(seeds, st.sampled_from([2, 64, 1031]), scales, dtypes)
def test_equal_inputs_have_no_kl_at_all(seed, V, scale, dtype):
    x, _, tokens, _ = rows(seed, 4, V, scale, dtype, impossible=0.3)
    assert torch.equal(token_kl(x, x.clone(), tokens, 0.8)[3], torch.zeros(4))
    only_kl = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None].expand(4, 4)
    for grad in gradients(token_kl, (x, x, tokens), only_kl, temperature=0.8)[:1]:
        assert not grad.any()


@some
@given(seeds, st.integers(1, 40), st.booleans())
def test_impossible_tokens_equal_deleted_ones(seed, kept, leading):
    """A leading block of -inf, or every other column: results and gradients as if those were not there."""
    x, y, tokens, g = rows(seed, 3, kept)
    where = torch.arange(kept) + 300 if leading else 2 * torch.arange(kept)
    wide_x, wide_y = (torch.full((3, 700), -INF).index_copy(1, where, t) for t in (x, y))
    upstream = torch.randn(4, 3, generator=g)
    pair = token_kl(x, y, tokens), token_kl(wide_x, wide_y, where[tokens])
    for a, b in zip(*pair, strict=True):
        close(b, a, 1e-6)
    narrow = gradients(token_kl, (x, y, tokens), upstream)
    wide = gradients(token_kl, (wide_x, wide_y, where[tokens]), upstream)
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(b[:, where], a, atol=1e-6, rtol=1e-5)
        assert b.count_nonzero() <= a.numel()
    (a,) = gradients(token_logprobs, (x, tokens), upstream[:2])
    (b,) = gradients(token_logprobs, (wide_x, where[tokens]), upstream[:2])
    torch.testing.assert_close(b[:, where], a, atol=1e-6, rtol=1e-5)


def test_tokens_that_cannot_be():
    x, y = torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[0.0, 1.0, -INF]])
    token = torch.tensor([1])
    logprobs, ref_logprobs, entropy, kl = token_kl(x, y, token)
    assert logprobs == -INF and kl == INF and ref_logprobs.isfinite() and entropy.isfinite()
    with_kl = gradients(token_kl, (x, y, token), torch.ones(4, 1))
    without = gradients(token_kl, (x, y, token), torch.tensor([[1.0], [1.0], [1.0], [0.0]]))
    for a, b in zip(with_kl, without, strict=True):  # an infinite KL has no gradient, the other results have
        assert a.isfinite().all() and a.any() and torch.equal(a, b)


def test_kl_gradient_of_a_sure_policy_that_the_reference_contradicts():
    """log p/q - kl nearly cancels at the likely token: computed as it stands it is wrong by 1e-5 and more."""
    x, y, tokens, _ = rows(0, 30, 7, 50.0)
    upstream = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None].expand(4, 30)
    got, _ = gradients(token_kl, (x, y, tokens), upstream)
    want, _ = gradients(token_kl_reference, (x.double(), y.double(), tokens), upstream)
    assert ((got - want).abs() / (1 + want.abs().amax(1, keepdim=True))).max() < 5e-7
    assert got.double().sum(1).abs().max() < 1e-5


def test_D22_masked_rows_may_hold_anything():
    x, y, tokens, g = rows(1, 6, 33)
    hidden, weight = torch.randn(6, 5, generator=g), torch.randn(33, 5, generator=g)
    mask = torch.tensor([True, False, True, True, False, False])
    upstream = torch.randn(4, 6, generator=g)
    calls = [(token_logprobs, (x,)), (token_kl, (x, y)), (linear_token_logprobs, (hidden, weight))]
    for function, inputs in calls:
        n = 4 if function is token_kl else 2
        clean = function(*(t[mask] if len(t) == 6 else t for t in inputs), tokens[mask])
        poisoned = [t.clone() for t in inputs]
        for t in poisoned:
            if len(t) == 6:
                t[~mask] = torch.tensor([NAN, INF, -INF])[:, None].expand(3, t.shape[1])
        bad_tokens = tokens.masked_fill(~mask, -(10**12))
        bad_upstream = upstream[:n].masked_fill(~mask, NAN)
        for out, want in zip(function(*poisoned, bad_tokens, mask=mask), clean, strict=True):
            torch.testing.assert_close(out[mask], want)
            assert torch.equal(out[~mask], torch.zeros(3))
        # NaN upstream at masked rows too: where() in a loss passes 0 on, but a caller may not use one.
        leaves = [t.requires_grad_() for t in poisoned]
        torch.autograd.backward(function(*leaves, bad_tokens, mask=mask), list(bad_upstream))
        want = gradients(function, (*inputs, tokens), upstream[:n], mask=mask)
        for leaf, grad in zip(leaves, want, strict=True):
            torch.testing.assert_close(leaf.grad, grad)
            if len(grad) == 6:
                assert not grad[~mask].any()


def test_no_row_at_all_is_no_error():
    logits = torch.full((2, 3), NAN, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.zeros(2, dtype=torch.int64), mask=torch.zeros(2, dtype=torch.bool))
    (logprobs + entropy).sum().backward()
    assert torch.equal(logprobs, torch.zeros(2)) and torch.equal(logits.grad, torch.zeros(2, 3))


def test_any_layout_any_leading_shape():
    """Slices, transposes, broadcast rows and a single row give the contiguous results, bit for bit."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 7, 29, generator=g)
    tokens = torch.randint(29, (3, 4), generator=g)
    layouts = [
        whole[:, 2:6],  # what cutting the prompt off does
        torch.randn(3, 4, 58, generator=g)[..., ::2],
        torch.randn(29, 4, 3, generator=g).permute(2, 1, 0),
        torch.randn(1, 1, 29, generator=g).expand(3, 4, 29),
    ]
    upstream = torch.randn(2, 3, 4, generator=g)
    for x in layouts:
        plain = token_logprobs(x.contiguous(), tokens)
        for a, b in zip(token_logprobs(x, tokens), plain, strict=True):
            assert torch.equal(a, b)
        want = gradients(token_logprobs, (x.contiguous(), tokens), upstream)[0]
        leaf = x.detach().requires_grad_()  # keeps the strides, which clone() would not
        torch.autograd.backward(token_logprobs(leaf, tokens), list(upstream))
        assert torch.equal(leaf.grad, want)
    one = token_logprobs(whole[0, 0], tokens[0, 0])
    assert one[0].shape == () and torch.equal(one[0], token_logprobs(whole[:1, 0], tokens[:1, 0])[0][0])
    assert token_logprobs(whole[:0], torch.zeros(0, 7, dtype=torch.int64))[0].shape == (0, 7)


def test_bit_equal_on_repetition_and_whatever_the_chunk(monkeypatch):
    x, y, tokens, g = rows(3, 40, 1031)
    hidden, weight = torch.randn(40, 16, generator=g), torch.randn(1031, 16, generator=g)
    upstream = torch.randn(4, 40, generator=g)

    def everything():
        return [
            *token_logprobs(x, tokens),
            *token_kl(x, y, tokens),
            *linear_token_logprobs(hidden, weight, tokens),
            *gradients(token_logprobs, (x, tokens), upstream[:2]),
            *gradients(token_kl, (x, y, tokens), upstream),
            *gradients(linear_token_logprobs, (hidden, weight, tokens), upstream[:2]),
        ]

    first = everything()
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    for name in ("logprobs.CHUNK", "kl.CHUNK", "linear_logprobs.TILE"):
        monkeypatch.setattr(f"kernels.{name}", 5000)
    for a, b in zip(first, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, torch.Tensor)]
        old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        fresh = [t.numel() for t in made if t.untyped_storage().data_ptr() not in old]
        self.largest = max([self.largest, *fresh])
        return out


def test_nothing_of_the_size_of_the_logits_is_made():
    N, V, C = 600, 8192, 4
    tokens = torch.zeros(N, dtype=torch.int64)
    logits = torch.zeros(N, V, dtype=torch.bfloat16)  # a conversion of them all would be seen
    for function, inputs in ((token_logprobs, (logits,)), (token_kl, (logits, logits))):
        with Sizes() as sizes:
            function(*inputs, tokens)
        assert 0 < sizes.largest <= CHUNK
    hidden, weight = torch.zeros(N, C, requires_grad=True), torch.zeros(V, C, requires_grad=True)
    with Sizes() as sizes:
        linear_token_logprobs(hidden, weight, tokens)[0].sum().backward()
    assert 0 < sizes.largest <= TILE < N * V


def test_saved_for_backward():
    """12 bytes a row beside the inputs (20 with a reference), and nothing under no_grad."""
    x, y, tokens, _ = rows(0, 10, 50)
    x.requires_grad_()
    for function, inputs, numbers in ((token_logprobs, (x,), 3), (token_kl, (x, y), 5)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            function(*inputs, tokens)
        kept = [t for t in saved if t.dtype == torch.float32 and t.numel() == 10]
        assert len(kept) == numbers and all(t.untyped_storage().nbytes() == 40 for t in kept)
        with torch.no_grad():
            assert not function(*inputs, tokens)[0].requires_grad


def test_autocast_and_bf16_linear():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 64, generator=g), torch.randn(300, 64, generator=g) / 8
    tokens = torch.randint(300, (20,), generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the same numbers as with the logits written out
        fused = linear_token_logprobs(hidden, weight, tokens)
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        for a, b in zip(fused, token_logprobs(logits, tokens), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)
    low = hidden.bfloat16(), weight.bfloat16()  # without autocast bf16 inputs lose nothing more
    exact = linear_token_logprobs_reference(*(t.double() for t in low), tokens)
    for a, b in zip(linear_token_logprobs(*low, tokens), exact, strict=True):
        close(a, b, 4e-6)
    upstream = torch.randn(2, 20, generator=g)
    got = gradients(linear_token_logprobs, (*low, tokens), upstream)
    want = gradients(linear_token_logprobs_reference, (*(t.double() for t in low), tokens), upstream)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        grad_close(a, b, torch.zeros(len(a)))


def test_wrong_arguments_are_refused():
    x, tokens = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    wrong = [
        ("tokens must be torch.int64", lambda: token_logprobs(x, tokens.int())),
        (r"tokens must be torch.int64 \(2,\)", lambda: token_logprobs(x, tokens[:1])),
        ("mask must be torch.bool", lambda: token_logprobs(x, tokens, mask=tokens)),
        ("temperature must be a positive", lambda: token_logprobs(x, tokens, 0.0)),
        (r"tokens must lie in 0\.\.2, found 0\.\.3", lambda: token_logprobs(x, torch.tensor([0, 3]))),
        ("logits and ref_logits differ", lambda: token_kl(x, x[:, :2], tokens)),
        ("do not fit", lambda: linear_token_logprobs(x, torch.zeros(5, 4), tokens)),
        ("values must have rewards' shape", lambda: gae(x, x[:1])),
        ("last_values must have shape", lambda: gae(x, x, last_values=torch.zeros(3))),
        ("must be bool", lambda: gae(x, x, mask=x)),
        ("left-aligned", lambda: gae(x, x, mask=torch.tensor([[False, True, True]] * 2))),
        ("gamma and lam", lambda: gae(x, x, lam=1.5)),
        (r"shape \[B, T\]", lambda: gae(tokens, tokens)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


# GAE


def episodes(seed, B, T):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=g).unbind()
    mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)
    dones = torch.rand(B, T, generator=g) < 0.2
    return rewards, values, mask, dones, torch.randn(B, generator=g)


def test_D8_numbers():
    rewards, values = torch.tensor([[-0.1, 0.0, -0.1, 1.0]]), torch.tensor([[0.5, 0.4, 0.6, 0.8]])
    want = {
        0.95: [0.251725, 0.4755, 0.29, 0.2],
        1.0: [0.3, 0.5, 0.3, 0.2],
        0.0: [-0.2, 0.2, 0.1, 0.2],
    }
    for lam, numbers in want.items():
        advantages, returns = gae(rewards, values, lam=lam)
        torch.testing.assert_close(advantages, torch.tensor([numbers]), atol=1e-6, rtol=0)
        torch.testing.assert_close(returns, torch.tensor([numbers]) + values, atol=1e-6, rtol=0)
    torch.testing.assert_close(gae(rewards, values)[1], torch.tensor([[0.751725, 0.8755, 0.89, 1.0]]), atol=1e-6, rtol=0)


fractions = st.floats(0, 1)


@some
@given(seeds, st.integers(0, 4), st.integers(0, 12), fractions, fractions, dtypes)
def test_D8_equals_the_double_sum(seed, B, T, gamma, lam, dtype):
    rewards, values, mask, dones, last = episodes(seed, B, T)
    rewards, values = rewards.to(dtype), values.to(dtype)
    calls = [{}, {"mask": mask}, {"mask": mask, "dones": dones, "last_values": last}]
    for options in calls:
        got = gae(rewards, values, gamma=gamma, lam=lam, **options)
        for a, b in zip(got, gae_reference(rewards, values, gamma=gamma, lam=lam, **options), strict=True):
            assert a.dtype == torch.float32 and a.is_contiguous()
            torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)


@some
@given(seeds)
def test_D8_padding_changes_nothing(seed):
    """Neither its amount nor its content; rows are independent of one another."""
    rewards, values, mask, dones, last = episodes(seed, 5, 9)
    plain = gae(rewards, values, mask, dones, last)
    poison = torch.full((5, 4), NAN)
    wide = gae(
        torch.cat([rewards.masked_fill(~mask, INF), poison], 1),
        torch.cat([values.masked_fill(~mask, NAN), poison], 1),
        torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], 1),
        torch.cat([dones | ~mask, torch.ones(5, 4, dtype=torch.bool)], 1),
        last,
    )
    for a, b in zip(plain, wide, strict=True):
        assert torch.equal(a, b[:, :9]) and not b[:, 9:].any() and not a[~mask].any()
        single = gae(*(x[2:3] for x in (rewards, values, mask, dones, last)))
    assert torch.equal(single[0], plain[0][2:3])


def test_D8_a_done_splits_a_row_in_two():
    rewards, values, _, _, last = episodes(0, 2, 8)
    dones = torch.zeros(2, 8, dtype=torch.bool)
    dones[:, 4] = True
    whole = gae(rewards, values, dones=dones, last_values=last, gamma=0.9)
    first = gae(rewards[:, :5], values[:, :5], gamma=0.9)
    second = gae(rewards[:, 5:], values[:, 5:], last_values=last, gamma=0.9)
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a, torch.cat([b, c], 1))
    dones[:, 7] = True  # a done at the end: the value after it does not exist, and may be NaN
    ended = gae(rewards, values, dones=dones, last_values=torch.full((2,), NAN))
    assert ended[0].isfinite().all()


@some
@given(seeds, fractions)
def test_D8_limits(seed, gamma):
    rewards, values, mask, dones, last = episodes(seed, 3, 10)
    following = torch.cat([values[:, 1:], last[:, None]], 1)
    advantages, _ = gae(rewards, values, last_values=last, gamma=gamma, lam=0.0)
    torch.testing.assert_close(advantages, rewards + gamma * following - values)  # the TD error
    _, returns = gae(rewards, values, last_values=last, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) + last[:, None]
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=1e-5)  # the plain sum of what follows
    zero = torch.zeros_like(values)
    one, two = (gae(r, zero, mask, dones, gamma=gamma)[0] for r in (rewards, 2 * rewards))
    torch.testing.assert_close(two, 2 * one)


def test_gae_carries_no_gradient():
    rewards, values = torch.ones(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    assert not any(x.requires_grad for x in gae(rewards, values))


def test_package_exports_the_four_functions():
    assert sorted(kernels.__all__) == ["gae", "linear_token_logprobs", "token_kl", "token_logprobs"]
