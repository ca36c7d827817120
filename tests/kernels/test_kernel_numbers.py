"""Numbers worked out by hand or in float64, and cases too special for a property."""

import math
from types import SimpleNamespace

import pytest
import torch

from kernels import advantages, gae, linear_token_logprobs, token_kl, token_logprobs
from kernels.kl import token_kl_reference

NAN = math.nan


def near(got, want, tolerance=2e-6):
    error = (got.detach().double() - want).abs() / want.abs().clamp(min=1)
    assert error.max() <= tolerance, error.max().item()


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


def test_kl_of_three_tokens():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    x = p.log().requires_grad_()
    _, _, entropy, kl = token_kl(x, q.log(), torch.tensor([0]))
    near(kl, torch.tensor([0.223805]), 1e-6)
    near(entropy, torch.tensor([1.029653]), 1e-6)
    kl.sum().backward()
    near(x.grad, torch.tensor([[0.346243, -0.220389, -0.125854]]), 1e-6)


def test_D18_bf16_logits_meet_an_fp32_softmax():
    """Under autocast too, which turns nothing back into bf16."""
    g = torch.Generator().manual_seed(0)
    x, y = (30 * torch.randn(2, 4, 501, generator=g)).bfloat16().unbind()
    tokens = torch.randint(501, (4,), generator=g)
    exact = token_kl_reference(x.double(), y.double(), tokens, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, alone = token_kl(x, y, tokens, 0.7), token_logprobs(x, tokens, 0.7)
    for a, b in zip((*got, *alone), (*exact, exact[0], exact[2]), strict=True):
        assert a.dtype == torch.float32
        near(a, b)


def test_D22_masked_rows_may_hold_anything():
    mask = torch.tensor([True, False])
    logits = torch.tensor([[1.0, 1.0], [NAN, math.inf]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    tokens = torch.tensor([0, -100])
    for results in (
        token_logprobs(logits, tokens, mask=mask),
        token_kl(logits, logits, tokens, mask=mask),
        linear_token_logprobs(logits, weight, tokens, mask=mask),
    ):
        torch.testing.assert_close(results[0], torch.tensor([-math.log(2), 0.0]))
        for x in results:
            assert x[1] == 0
        sum((x * torch.tensor([1.0, NAN])).nansum() for x in results).backward()
    assert not logits.grad[1].any() and logits.grad.isfinite().all() and weight.grad.isfinite().all()


def test_equal_inputs_have_no_kl_gradient_at_all():
    x = torch.randn(4, 501, generator=torch.Generator().manual_seed(0)).mul(30).requires_grad_()
    token_kl(x, x.detach(), torch.arange(4), 0.8)[3].sum().backward()
    assert not x.grad.any()


def test_kl_gradient_of_a_sure_policy_that_the_reference_contradicts():
    """log p/q - kl nearly cancels at the likely token: computed as it stands it is wrong by 1e-5 and more."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 7, generator=g).clamp(-3, 3).mul(50 / 3).unbind()
    tokens, grads = torch.randint(7, (30,), generator=g), []
    for function, dtype in ((token_kl, torch.float32), (token_kl_reference, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        function(leaf, y.to(dtype), tokens)[3].sum().backward()
        grads.append(leaf.grad.double())
    got, want = grads
    assert ((got - want).abs() / (1 + want.abs().amax(1, keepdim=True))).max() < 5e-7
    assert got.sum(1).abs().max() < 1e-5


def test_whoever_wants_one_gradient_gets_it():
    """Of the policy alone, of the reference alone, of hidden alone, of the weight alone."""
    g, tokens = torch.Generator().manual_seed(0), torch.tensor([1, 2])
    for function in (token_kl, linear_token_logprobs):
        inputs = (
            torch.randn(2, 2, 2, generator=g)
            if function is linear_token_logprobs
            else torch.randn(2, 2, 3, generator=g)
        )
        inputs = (
            [inputs[0], torch.randn(3, 2, generator=g)] if function is linear_token_logprobs else list(inputs)
        )
        both = [x.clone().requires_grad_() for x in inputs]
        sum(x.sum() for x in function(*both, tokens)).backward()
        for i in range(2):
            one = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            sum(x.sum() for x in function(*one, tokens)).backward()
            assert torch.equal(one[i].grad, both[i].grad) and one[1 - i].grad is None


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
    torch.testing.assert_close(
        gae(rewards, values)[1], torch.tensor([[0.751725, 0.8755, 0.89, 1.0]]), atol=1e-6, rtol=0
    )


def test_gae_keeps_float64():
    x = torch.rand(2, 5, dtype=torch.float64)
    assert all(y.dtype == torch.float64 and y.is_contiguous() for y in gae(x, x))


def test_gae_reads_nothing_behind_a_done():
    """The step after it may be NaN; the steps before it are not."""
    rewards = torch.tensor([[1.0, 1.0, NAN, NAN]])
    dones = torch.tensor([[False, True, False, False]])
    advantages, _ = gae(rewards, rewards, dones=dones, lam=1.0)
    assert advantages[0, :2].tolist() == [1.0, 0.0] and advantages[0, 2:].isnan().all()


def compose(*steps):
    """The kernel's own combine function, outside of any kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantages, "tl", SimpleNamespace(where=lambda condition, a, b: a if condition else b))
        return getattr(advantages.compose, "fn", advantages.compose)(
            *steps
        )  # a plain function where Triton is not in use


def test_combine_of_gae_is_associative():
    """On numbers that fp32 holds exactly, cuts among them."""
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        a, b, c = ((x[0] / 8, x[1]) for x in torch.randint(0, 9, (3, 2), generator=g).double().tolist())
        assert compose(*compose(*a, *b), *c) == compose(*a, *compose(*b, *c))
