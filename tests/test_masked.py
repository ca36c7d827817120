"""Masked mean, variance and whitening: the numbers, and that padding can hold anything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.masked import masked_mean, masked_var, whiten
from minirlhf.ppo import explained_variance
from tests.ranks import in_ranks

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("junk", [0.0, 1e30, NAN, INF, -INF])
def test_D10_whiten_numbers(junk):
    x = torch.tensor([[1.0, 2.0, 3.0, junk, junk]])
    mask = torch.tensor([[True, True, True, False, False]])
    want = torch.tensor([[-1.224745, 0.0, 1.224745, 0.0, 0.0]])
    torch.testing.assert_close(whiten(x, mask), want, atol=1e-6, rtol=0)
    want = torch.tensor([[0.775255, 2.0, 3.224745, 0.0, 0.0]])
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), want, atol=1e-6, rtol=0)


def test_D10_fewer_than_two_real_values_stay_as_they_are():
    for real in (1, 0):
        mask = (torch.arange(3) < real)[None]
        for shift_mean in (True, False):
            x = torch.tensor([[5.0, NAN, NAN]]) if real else torch.full((1, 3), NAN)
            assert torch.equal(whiten(x, mask, shift_mean), torch.tensor([[5.0 * real, 0.0, 0.0]]))


def test_D10_equal_values_have_no_nan():
    x, mask = torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(whiten(x, mask), torch.zeros(2, 3))
    assert torch.equal(whiten(x, mask, shift_mean=False), x)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6))
def test_D22_only_real_values_count(seed, B, R):
    """Equal to what plain torch says of the selected values, whatever stands elsewhere; gradients too."""
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(B, R, generator=g, dtype=torch.float64), torch.rand(B, R, generator=g) < 0.6
    mask[0, 0] = True
    real = x[mask]
    poisoned = x.masked_fill(~mask, NAN).requires_grad_()
    torch.testing.assert_close(masked_mean(poisoned, mask), real.mean())
    torch.testing.assert_close(masked_var(poisoned, mask), real.var(correction=0))
    if len(real) > 1:
        white = whiten(poisoned, mask)
        torch.testing.assert_close(white.sum(), torch.zeros_like(white.sum()), atol=1e-9, rtol=0)
    for b in range(B):
        if mask[b].any():
            torch.testing.assert_close(masked_mean(poisoned, mask, dim=1)[b], x[b][mask[b]].mean())
            torch.testing.assert_close(masked_var(poisoned, mask, dim=1)[b], x[b][mask[b]].var(correction=0))
        else:
            assert masked_mean(poisoned, mask, dim=1)[b] == 0 == masked_var(poisoned, mask, dim=1)[b]
    weights = torch.randn(B, R, generator=g, dtype=torch.float64)
    total = (
        (whiten(poisoned, mask) * weights).sum() + masked_var(poisoned, mask) + masked_mean(poisoned, mask)
    )
    total.backward()
    assert poisoned.grad.isfinite().all() and not poisoned.grad[~mask].any()


def test_D22_entropy_of_a_padded_buffer():
    """Two real log-probs and two pads filled with 1.0 (as some libraries do): 1.2 nats, not -.8."""
    mask = torch.tensor([[True, True, False, False]])
    for pad in (1.0, NAN):
        logprobs = torch.tensor([[-0.5, -0.7, pad, pad]])
        assert masked_mean(-logprobs, mask).item() * 2 == pytest.approx(1.2, abs=1e-6)
    assert -torch.tensor([-0.5, -0.7, 1.0, 1.0]).sum().item() == pytest.approx(-0.8, abs=1e-6)


# ----------------------------------------------------------------------------- over ranks


def cut(world: int, *wholes):
    """Rank -> its rows of each tensor."""
    return lambda rank: tuple(x.tensor_split(world)[rank] for x in wholes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.1, 0.6]))
def test_D17_statistics_of_ranks_are_those_of_the_whole_batch(seed, world, R, share):
    """F7: whatever the number of ranks, and where a rank has not one real position."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, R, generator=g, dtype=torch.float64) + torch.tensor([3.0, 1.0])[:, None, None]
    mask = torch.rand(5, R, generator=g) < share
    x, y = (z.masked_fill(~mask, NAN) for z in (x, y))
    mine = cut(world, x, y, mask)

    def statistics(rank, sum_):
        x, y, mask = mine(rank)
        per_place = whiten(x, mask, sum_=sum_), whiten(x, mask, shift_mean=False, sum_=sum_)
        scalars = masked_mean(x, mask, sum_=sum_), masked_var(x, mask, sum_=sum_)
        return per_place, (*scalars, explained_variance(y, x, mask, sum_))

    found = in_ranks(world, statistics)
    for i, shift_mean in enumerate((True, False)):
        together = torch.cat([per_place[i] for per_place, _ in found])
        torch.testing.assert_close(together, whiten(x, mask, shift_mean), atol=1e-12, rtol=1e-12)
    whole = masked_mean(x, mask), masked_var(x, mask), explained_variance(y, x, mask)
    for _, scalars in found:  # every rank knows them
        torch.testing.assert_close(scalars, whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_D10_two_real_values_on_two_ranks_have_a_spread(world):
    """Each rank has one at most: fewer than two are counted over all ranks, not on each."""
    x = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, NAN]])
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    mine = cut(world, x, mask)
    found = torch.cat(in_ranks(world, lambda rank, sum_: whiten(*mine(rank), sum_=sum_)))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0], [1, 0], [0, 0]]), atol=1e-6, rtol=0)
    mask[1] = False  # one, on all ranks
    mine = cut(world, x, mask)
    found = torch.cat(in_ranks(world, lambda rank, sum_: whiten(*mine(rank), sum_=sum_)))
    assert torch.equal(found, torch.tensor([[1.0, 0], [0, 0], [0, 0]]))
