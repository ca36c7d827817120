"""What the public functions refuse, with the message; what they take although it is strange is a property."""

import pytest
import torch

from kernels import gae, linear_token_logprobs, token_kl, token_logprobs
from kernels.tools.testing import INTERPRETED, OPS

x, tokens = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
WRONG = {
    "tokens int32": ("tokens must be torch.int64", lambda: token_logprobs(x, tokens.int())),
    "tokens short": (r"tokens must be torch.int64 \(2,\)", lambda: token_logprobs(x, tokens[:1])),
    "tokens elsewhere": ("tokens must be on cpu, not on meta", lambda: token_logprobs(x, tokens.to("meta"))),
    "mask int64": ("mask must be torch.bool", lambda: token_logprobs(x, tokens, mask=tokens)),
    "temperature 0": ("temperature must be a positive", lambda: token_logprobs(x, tokens, 0.0)),
    "temperature nan": ("temperature must be a positive", lambda: token_logprobs(x, tokens, float("nan"))),
    "logits int64": (
        "logits must be rows of 16, 32 or 64 bit floats",
        lambda: token_logprobs(x.long(), tokens),
    ),
    "ref_logits int64": ("ref_logits must be rows", lambda: token_kl(x, x.long(), tokens)),
    "hidden int64": ("hidden must be rows", lambda: linear_token_logprobs(x.long(), x, tokens)),
    "weight int64": (r"weight must be floats \[V, C\]", lambda: linear_token_logprobs(x, x.long(), tokens)),
    "weight elsewhere": ("weight must be on cpu", lambda: linear_token_logprobs(x, x.to("meta"), tokens)),
    "logits scalar": ("logits must be rows", lambda: token_logprobs(torch.zeros(()), tokens[0])),
    "logits differ": ("ref_logits must be of shape", lambda: token_kl(x, x[:, :2], tokens)),
    "weight": (
        r"weight must be of shape \(5, 3\)",
        lambda: linear_token_logprobs(x, torch.zeros(5, 4), tokens),
    ),
    "linear tokens": ("tokens must be torch.int64", lambda: linear_token_logprobs(x, x, tokens.int())),
    "kl mask": ("mask must be torch.bool", lambda: token_kl(x, x, tokens, mask=tokens)),
    "values": (r"values must be of shape \(2, 3\)", lambda: gae(x, x[:1])),
    "last_values": (r"last_values must be of shape \(2,\)", lambda: gae(x, x, last_values=torch.zeros(3))),
    "mask float": ("mask must be torch.bool", lambda: gae(x, x, mask=x)),
    "mask with a gap": ("left-aligned", lambda: gae(x, x, mask=torch.tensor([[False, True, True]] * 2))),
    "lam": ("gamma and lam", lambda: gae(x, x, lam=1.5)),
    "rewards": (r"shape \[B, T\]", lambda: gae(tokens, tokens)),
}


@pytest.mark.parametrize(("message", "call"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("token", [3, -1])
@pytest.mark.parametrize("op", ["token_logprobs", "token_kl", "linear_token_logprobs"])
def test_a_token_outside_the_vocabulary(op, token):
    """On CPU an error; a Triton kernel cannot stop to raise one, and gives NaN for this row's log-prob and gradient."""
    logits, wrong = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.tensor([1, token]),
    )
    calls = {
        "token_logprobs": lambda t: token_logprobs(logits, t),
        "token_kl": lambda t: token_kl(logits, torch.ones(2, 3), t),
        "linear_token_logprobs": lambda t: linear_token_logprobs(logits, torch.eye(3), t),
    }
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.2, found"):
            calls[op](wrong)
        return
    results, right = calls[op](wrong), calls[op](torch.tensor([1, 1]))
    results[0].sum().backward()
    assert results[0][1].isnan() and logits.grad[1].isnan().all() and logits.grad[0].isfinite().all()
    assert torch.equal(results[0][0], right[0][0])
    others = [i for i, name in enumerate(OPS[op].results) if "logprobs" not in name]
    assert others and all(torch.equal(results[i], right[i]) for i in others)
