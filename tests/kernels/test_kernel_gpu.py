"""What only a GPU can show: that threads keep the order that a kernel relies on, and that both paths agree there."""

import pytest
import torch

import kernels
from kernels import token_kl, token_logprobs
from kernels.kl import token_kl_reference

pytestmark = pytest.mark.gpu


def sure_policy(rows: int, V: int):
    """Logits of policies that are nearly sure, with references that contradict them, on the GPU; tokens."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, V, generator=g).clamp(-3, 3).mul(50 / 3).unbind()
    likeliest = torch.randint(V, (rows,), generator=g)
    x.scatter_(1, likeliest[:, None], 80.0)
    tokens = torch.where(torch.arange(rows) % 2 == 0, likeliest, torch.randint(V, (rows,), generator=g))
    return x.cuda(), y.cuda(), tokens.cuda()


@pytest.mark.parametrize("V", [7, 1031, 50257])
def test_R27_the_second_store_of_the_kl_gradient_wins(V):
    """token_kl's backward writes the likeliest column twice, and a barrier orders the two stores.

    If the first store won in some row, that entry would keep the rounding of kl, and the row's gradients would not sum to 0.
    """
    x, y, tokens = sure_policy(512, V)
    leaf = x.double().requires_grad_()
    token_kl_reference(leaf, y.double(), tokens)[3].sum().backward()
    first = None
    for _ in range(50):
        again = x.clone().requires_grad_()
        token_kl(again, y, tokens)[3].sum().backward()
        error = (again.grad.double() - leaf.grad).abs() / (1 + leaf.grad.abs().amax(1, keepdim=True))
        assert error.max() < 5e-7
        assert again.grad.double().sum(1).abs().max() < 1e-5
        first = again.grad if first is None else first
        assert torch.equal(again.grad, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_R27_the_one_hot_term_is_in_the_gradient_once(dtype):
    """The kernel adds it where it computes the token's column, so no second store is needed."""
    x, _, tokens = sure_policy(512, 50257)
    x = x.to(dtype).requires_grad_()
    token_logprobs(x, tokens)[0].sum().backward()
    got = x.grad.gather(1, tokens[:, None])[:, 0].double()
    want = 1 - x.detach().double().log_softmax(1).gather(1, tokens[:, None])[:, 0].exp()
    assert (got - want).abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("op", ["token_logprobs", "token_kl", "linear_token_logprobs", "gae"])
def test_MINIRLHF_PLAIN_agrees_with_the_kernels(monkeypatch, op):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(501, (64,), generator=g).cuda()
    shapes = {"linear_token_logprobs": [(64, 48), (501, 48)], "gae": [(64, 700)] * 2}
    leaves = [
        torch.randn(*s, generator=g).cuda() for s in shapes.get(op, [(64, 501)] * (1 + (op == "token_kl")))
    ]
    found = []
    for plain in ("0", "1"):
        monkeypatch.setenv("MINIRLHF_PLAIN", plain)
        inputs = [x.clone().requires_grad_(op != "gae") for x in leaves]
        out = getattr(kernels, op)(*inputs, *([] if op == "gae" else [tokens]))
        if op != "gae":
            sum(x.sum() for x in out).backward()
        found.append([*out, *(x.grad for x in inputs if x.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
