"""What the plain path allocates and keeps."""

import pytest
import torch

from kernels import linear_token_logprobs, token_kl, token_logprobs
from kernels.tools.meters import Buffers
from kernels.tools.testing import INTERPRETED

MIB = 1 << 20


@pytest.mark.skipif(INTERPRETED, reason="of the plain path, at sizes that would take the interpreter minutes")
def test_nothing_of_the_size_of_the_logits_is_made():
    N, V = 2048, 8192
    tokens, logits = torch.zeros(N, dtype=torch.int64), torch.zeros(N, V, dtype=torch.bfloat16)  # 32 MiB
    for function, count in ((token_logprobs, 1), (token_kl, 2)):
        leaves = [logits.detach().requires_grad_() for _ in range(count)]
        with Buffers() as forward:
            results = function(*leaves, tokens)
        assert 0 < forward.peak < 12 * MIB
        with Buffers() as backward:
            sum(x.sum() for x in results).backward()
        assert 32 * count <= backward.peak / MIB < 32 * count + 16


@pytest.mark.skipif(INTERPRETED, reason="of the plain path, at sizes that would take the interpreter minutes")
def test_linear_never_holds_the_logits():
    N, V, C = 8192, 8192, 4
    hidden, weight = torch.zeros(N, C, requires_grad=True), torch.zeros(V, C, requires_grad=True)
    with Buffers() as buffers:
        linear_token_logprobs(hidden, weight, torch.zeros(N, dtype=torch.int64))[0].sum().backward()
    assert 0 < buffers.peak < N * V * 4 / 4


def test_saved_for_backward():
    """12 bytes a row beside the inputs, 24 with a reference, and nothing under no_grad."""
    rows, tokens = torch.zeros(10, 50), torch.zeros(10, dtype=torch.int64)
    cases = [
        (token_logprobs, (rows,), 12),
        (token_kl, (rows, rows.clone()), 24),
        (linear_token_logprobs, (rows[:, :5], torch.zeros(50, 5)), 12),
    ]
    for function, inputs, most in cases:
        saved, leaves = [], [x.detach().requires_grad_() for x in inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            function(*leaves, tokens)
        given = {x.untyped_storage().data_ptr() for x in (*inputs, tokens)}
        extra = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
        assert 0 < sum(size for pointer, size in extra.items() if pointer not in given) <= most * 10, (
            function.__name__
        )
        with torch.no_grad():
            assert not function(*leaves, tokens)[0].requires_grad
