"""Properties of losses: of the policy, of the KL, of the critic, of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.tools.conformance.signals import P, Q, double, kl_of, random_mask, real
from minirlhf.tools.conformance.subject import Broken, NotAsked, Property, Subject, same, shown, told

EVERYONE = "TRL #7206 #7249, verl #5625, prime-rl #2562, open-instruct #1161, rlhf-book, nanochat"
Make = Callable[[torch.Generator, int, int], dict[str, Any]]

# ------------------------------------------------------------------------------ what holds of every loss over tokens

POLICY, KL, VALUE = "new_logprobs", "new_logprobs", "new_values"


def policy_batch(g: torch.Generator, B: int, R: int) -> dict[str, Any]:
    logprobs, noise, advantages = torch.randn(3, B, R, generator=g, dtype=torch.float64)
    logprobs = -logprobs.abs()
    return {"new_logprobs": logprobs + 0.2 * noise, "logprobs": logprobs, "advantages": advantages}


def sequence_batch(g: torch.Generator, B: int, R: int) -> dict[str, Any]:
    """As policy_batch, but one advantage for all tokens of a response."""
    made = policy_batch(g, B, R)
    return made | {"advantages": made["advantages"][:, :1].expand(B, R).clone()}


def kl_batch(g: torch.Generator, B: int, R: int) -> dict[str, Any]:
    logprobs, noise, other = torch.randn(3, B, R, generator=g, dtype=torch.float64)
    logprobs = -logprobs.abs()
    new = logprobs + 0.2 * noise
    return {"new_logprobs": new, "logprobs": logprobs, "ref_logprobs": new + 0.5 * other}


def value_batch(g: torch.Generator, B: int, R: int) -> dict[str, Any]:
    values, noise, returns = torch.randn(3, B, R, generator=g, dtype=torch.float64)
    return {"new_values": values + 0.3 * noise, "values": values, "returns": returns}


def both(f: Subject, of: str, given: dict[str, Any]) -> Tensor:
    """The loss and its gradient in one vector."""
    loss, grad = f.gradient(of, **given)
    return torch.cat([loss.double().reshape(1), grad.double().flatten()])


def of_padding(make: Make, of: str) -> tuple[Property, ...]:
    """What padding must not do to a loss made of `make`'s tensors, with its gradient in `of`."""

    def padded(f: Subject, junk: Callable[[Tensor, str], Tensor], words: str) -> None:
        for g, B, R in f.cases():
            given, mask = make(g, B, R + 1), random_mask(g, B, R)
            mask = torch.cat([mask, torch.zeros(B, 1, dtype=torch.bool)], 1)
            clean = {name: x.masked_fill(~mask, 0.0) for name, x in given.items()}
            dirty = {name: torch.where(mask, x, junk(x, name)) for name, x in given.items()}
            want = both(f, of, clean | {"response_mask": mask})
            got = both(f, of, dirty | {"response_mask": mask})
            same(f"lengths {shown(mask.sum(1))} of {R + 1}, {words}: loss, gradient", got, want)

    def content(f: Subject) -> None:
        padded(f, lambda x, name: x + 1.0 + (name == of), "other numbers in the padding")

    def overflow(f: Subject) -> None:
        for size in (100.0, 1000.0):
            words = f"differences of {size:g} in the padding"
            padded(f, lambda x, name, size=size: torch.full_like(x, size * (name == of)), words)

    def amount(f: Subject) -> None:
        for g, B, R in f.cases():
            given, mask = make(g, B, R), random_mask(g, B, R)
            given = {name: x.masked_fill(~mask, 0.0) for name, x in given.items()}
            wide = {name: torch.cat([x, x.new_zeros(B, 3)], 1) for name, x in given.items()}
            wide_mask = torch.cat([mask, torch.zeros(B, 3, dtype=torch.bool)], 1)
            loss, grad = f.gradient(of, **wide, response_mask=wide_mask)
            got = torch.cat([loss.double().reshape(1), grad[:, :R].double().flatten()])
            example = f"lengths {shown(mask.sum(1))}, padded by 3 more: loss, gradient"
            same(example, got, both(f, of, given | {"response_mask": mask}))

    def nothing(f: Subject) -> None:
        """As one microbatch of several, where the function knows of the others."""
        given = make(torch.Generator().manual_seed(f.seed), 1, 2) | {"response_mask": real(0, R=2)}
        given |= {"denominator": torch.tensor(4)} if f.has("denominator") else {}
        same("a microbatch without a real token: loss, gradient", both(f, of, given), [0.0] * 3)

    return (
        Property("D22", "what stands in padding changes nothing", content,
            "short responses are trained on their padding"),
        Property("P3", "more padding changes nothing", amount,
            "the step size depends on the longest response that happens to be in the batch", "verl #3741"),
        Property("P11", "where exp overflows in padding, loss and gradient stay finite", overflow,
            "inf * 0 is NaN: one odd number in padding makes all weights NaN", "OpenRLHF #1335"),
        Property("D22", "no real token gives 0, and a gradient of 0", nothing,
            "a microbatch whose responses are all empty makes all weights NaN"),
    )  # fmt: skip


def of_parts(make: Make, of: str) -> Property:
    def add_up(f: Subject) -> None:
        """Rows one by one, each divided by the tokens of all."""
        if not (f.has("denominator") or {"sum", "tensor"} & {*f.output}):
            raise NotAsked(
                "it takes no denominator: see that its caller divides by the tokens of all microbatches"
            )
        for g, B, R in f.cases():
            given, mask = make(g, B, R), random_mask(g, B, R)
            parts = []
            for b in range(B):
                part = {name: x[b : b + 1] for name, x in given.items()} | {"response_mask": mask[b : b + 1]}
                parts.append(both(f, of, part | {"denominator": mask.sum()}))
            loss, grads = sum(part[:1] for part in parts), torch.cat([part[1:] for part in parts])
            want = both(f, of, given | {"response_mask": mask})
            example = f"rows of {shown(mask.sum(1))} tokens, each a microbatch with denominator {mask.sum()}"
            same(f"{example}: sum of losses, gradient", torch.cat([loss, grads]), want)

    return Property("P1", "microbatches with the minibatch's denominator add up to the minibatch", add_up,
        "the mean of microbatch means gives tokens of small microbatches more weight", EVERYONE)  # fmt: skip


# ------------------------------------------------------------------------------ policy_loss


def one_token(f: Subject, advantage: float, ratio: float, clip_range: Any = 0.2, logprob: float = -2.0):
    """(loss, gradient in the token's log-probability) of a response of one token."""
    new = torch.tensor([[logprob + math.log(ratio)]], dtype=torch.float64)
    given = {"logprobs": double([[logprob]]), "advantages": double([[advantage]])}
    try:
        loss, grad = f.gradient(
            "new_logprobs", new_logprobs=new, **given, response_mask=real(1, R=1), clip_range=clip_range
        )
    except NotAsked:
        raise
    except TypeError:
        if isinstance(clip_range, tuple):
            raise NotAsked("it takes no pair as clip_range") from None
        raise
    return loss, grad.reshape(())


def smaller_of_plain_and_clipped(f: Subject) -> None:
    for advantage, ratio, want in ((1, 1.5, -1.2), (1, 0.5, -0.5), (-1, 1.5, 1.5), (-1, 0.5, 0.8)):
        loss, _ = one_token(f, advantage, ratio)
        same(f"one token, advantage {advantage}, ratio {ratio:g}, clip .2: loss", loss, want)


def clipped_tokens_push_no_further(f: Subject) -> None:
    for advantage, ratio, want in ((1, 1.5, 0.0), (1, 0.5, -0.5), (-1, 0.5, 0.0)):
        _, grad = one_token(f, advantage, ratio)
        same(f"one token, advantage {advantage}, ratio {ratio:g}, clip .2: gradient in log ratio", grad, want)


def the_unbounded_side(f: Subject) -> None:
    for ratio in (1.5, 10.0):
        _, grad = one_token(f, -1, ratio)
        same(f"one token, advantage -1, ratio {ratio:g}, clip .2: gradient in log ratio", grad, ratio)


def clip_higher(f: Subject) -> None:
    for clip_range, want in ((0.2, 0.0), ((0.2, 0.28), -1.25)):
        _, grad = one_token(f, 1, 1.25, clip_range)
        example = f"one token, advantage 1, ratio 1.25, clip_range {clip_range}: gradient in log ratio"
        same(example, grad, want)


def the_first_step(f: Subject) -> None:
    for g, B, R in f.cases():
        given, mask = policy_batch(g, B, R), torch.ones(B, R, dtype=torch.bool)
        given["new_logprobs"] = given["logprobs"]
        got = both(f, POLICY, given | {"response_mask": mask})
        advantages = given["advantages"]
        want = torch.cat([-advantages.mean().reshape(1), -advantages.flatten() / (B * R)])
        same(f"{told({'advantages': advantages})}, ratio 1: loss, gradient", got, want)


def tokens_weigh_alike(f: Subject) -> None:
    mask = real(10, 100, R=100)
    zeros = torch.zeros(2, 100, dtype=torch.float64)
    given = {"logprobs": zeros, "advantages": -torch.where(mask, 1.0, 0.0).double(), "response_mask": mask}
    _, grad = f.gradient("new_logprobs", new_logprobs=zeros, **given)
    got = grad[:, 0]
    hint = " (a mean within each response first)" if abs(float(got[0] / got[1]) - 10) < 1e-6 else ""
    same(
        "advantage -1, responses of 10 and 100 tokens: a token's gradient",
        got,
        [1 / 110, 1 / 110],
        1e-9,
        hint,
    )


def far_outside_the_clip_range(f: Subject) -> None:
    for advantage, log_ratio in ((1.0, 100.0), (1.0, -100.0), (-1.0, -100.0)):
        new = torch.tensor([[-1.0 + log_ratio]]) if log_ratio < 0 else torch.tensor([[-1.0]])
        given = {"logprobs": new - log_ratio, "advantages": torch.tensor([[advantage]])}
        _, grad = f.gradient("new_logprobs", new_logprobs=new, **given, response_mask=real(1, R=1))
        example = f"float32, one token, advantage {advantage:g}, log ratio {log_ratio:g}: gradient"
        same(example, grad.reshape(()), 0.0)


def weights_multiply(f: Subject) -> None:
    for g, B, R in f.cases():
        given, mask = policy_batch(g, B, R), torch.ones(B, R, dtype=torch.bool)
        weights = torch.rand(B, R, generator=g, dtype=torch.float64) * 2
        given |= {"response_mask": mask, "denominator": mask.sum()}
        got = both(f, POLICY, given | {"weights": weights})
        plain = both(f, POLICY, given)
        per_row = [both(f, POLICY, given | {"weights": weights * (torch.arange(B * R).view(B, R) == i)})
            for i in range(B * R)]  # fmt: skip
        same(f"{told({'weights': weights})}: gradient", got[1:], plain[1:] * weights.flatten())
        same(f"{told({'weights': weights})}: loss, token by token", sum(x[0] for x in per_row), float(got[0]))


POLICY_LOSS = (
    Property("D12", "the larger of the plain and the clipped loss", smaller_of_plain_and_clipped,
        "the policy is updated past the range in which the advantages mean something"),
    Property("D12", "a clipped token pushes no further", clipped_tokens_push_no_further,
        "the policy is updated past the range in which the advantages mean something"),
    Property("P20", "a bad token that became likelier keeps its gradient", the_unbounded_side,
        "a token that is bad and became likelier is not corrected any more", "",
        "dual-clip PPO bounds this side on purpose, mostly at a ratio of 3"),
    Property("P20", "the bound above may be wider than the bound below", clip_higher,
        "with one bound for both sides, rare tokens can hardly become likelier"),
    Property("D4", "with ratio 1, loss -mean(A) and gradient -A / tokens", the_first_step,
        "even the first step after a rollout is not the policy gradient", "TRL #454"),
    Property("P2", "a token weighs the same in a short response and in a long one", tokens_weigh_alike,
        "long bad responses are pushed down less per token, so responses grow longer",
        "the GRPO paper and most ports", "GRPO's paper averages within a response first"),
    of_parts(policy_batch, POLICY),
    *of_padding(policy_batch, POLICY),
    Property("P11", "a token far outside the clip range has gradient 0, not NaN", far_outside_the_clip_range,
        "exp overflows, inf * 0 is NaN, and so are all weights", "OpenRLHF #1335"),
    Property("P15", "weights multiply each token's loss", weights_multiply,
        "tokens that the sampling engine drew differently keep full weight", "everyone with a separate engine"),
)  # fmt: skip


# ------------------------------------------------------------------------------ cispo_loss


def no_token_loses_its_gradient(f: Subject) -> None:
    for advantage, ratio, cap, want in (
        (1, 1.5, 4.0, -1.5),
        (1, 0.5, 4.0, -0.5),
        (1, 2.0, 0.5, -1.5),
        (-1, 2.0, 0.5, 1.5),
    ):
        _, grad = one_token(f, advantage, ratio, (0.2, cap))
        example = (
            f"one token, advantage {advantage}, ratio {ratio:g}, capped at {1 + cap:g}: gradient in log p"
        )
        same(example, grad, want)


CISPO_LOSS = (
    Property("P20", "the gradient is -A min(ratio, cap), for every token", no_token_loses_its_gradient,
        "rare tokens, such as those that begin a new thought, lose their gradient after one step"),
    of_parts(policy_batch, POLICY),
    *of_padding(policy_batch, POLICY),
)  # fmt: skip


# ------------------------------------------------------------------------------ gspo_loss


def sequence(
    f: Subject, log_ratio: float, tokens: int, clip_range: Any, advantage: float = 1.0, pad: int = 0
):
    logprobs = torch.full((1, tokens + pad), -2.0, dtype=torch.float64)
    mask = real(tokens, R=tokens + pad)
    given = {"logprobs": logprobs, "advantages": torch.full_like(logprobs, advantage), "response_mask": mask}
    return f.gradient("new_logprobs", new_logprobs=logprobs + log_ratio, clip_range=clip_range, **given)


def ratio_is_the_geometric_mean(f: Subject) -> None:
    for pad in (0, 14):
        loss, grad = sequence(f, 0.01, 50, (0.2, 0.2), pad=pad)
        example = f"50 tokens of log ratio .01, advantage 1, clip .2, {pad} places of padding"
        hint = " (the product of the ratios, clipped)" if abs(float(loss) + 1.2) < 1e-6 else ""
        same(f"{example}: loss", loss, -math.exp(0.01), hint=hint)
        same(f"{example}: gradient of each token", grad[0, :50], [-math.exp(0.01) / 50] * 50)


def sequences_are_clipped_as_a_whole(f: Subject) -> None:
    for log_ratio, want in ((0.001, 0.0), (0.0002, -math.exp(0.0002) / 10)):
        _, grad = sequence(f, log_ratio, 10, (3e-4, 4e-4))
        example = f"10 tokens of log ratio {log_ratio:g}, advantage 1, clip_range (.0003, .0004): gradient"
        same(example, grad, [[want] * 10])


GSPO_LOSS = (
    Property("P21", "a response's ratio is the geometric mean of its tokens' ratios", ratio_is_the_geometric_mean,
        "the product of many ratios leaves any clip range at once, and long responses are never trained",
        "GSPO misread"),
    Property("P20", "all tokens of a response are clipped together", sequences_are_clipped_as_a_whole,
        "with PPO's clip range nothing is ever clipped: a mean of log-ratios moves by a few 1e-4"),
    of_parts(sequence_batch, POLICY),
    *of_padding(sequence_batch, POLICY),
)  # fmt: skip


# ------------------------------------------------------------------------------ kl_loss


def expected_kl_loss(f: Subject, logits: Tensor) -> Tensor:
    """The loss over the tokens 0, 0, 0, 0, 1: exactly its expectation under P = (.8, .2)."""
    tokens = torch.tensor([0, 0, 0, 0, 1])
    new = logits.log_softmax(0)[tokens][:, None]
    ref = double(Q).log()[tokens][:, None]
    mask = torch.ones(5, 1, dtype=torch.bool)
    return f(new_logprobs=new, logprobs=new.detach(), ref_logprobs=ref, response_mask=mask)


def expected_kl_gradient(f: Subject) -> tuple[Tensor, Tensor]:
    logits = double(P).log().requires_grad_()
    (grad,) = torch.autograd.grad(expected_kl_loss(f, logits), logits)
    exact = double(P).log().requires_grad_()
    (want,) = torch.autograd.grad(kl_of(exact.softmax(0), double(Q)), exact)
    return grad[0], want[0]


def one_step_lowers_the_kl(f: Subject) -> None:
    logits = double(P).log().requires_grad_()
    (grad,) = torch.autograd.grad(expected_kl_loss(f, logits), logits)
    before, after = kl_of(double(P), double(Q)), kl_of((logits.detach() - 0.1 * grad).softmax(0), double(Q))
    if not after < before - 1e-6:
        example = f"policy {shown(double(P))}, reference {shown(double(Q))}, one step of .1"
        raise Broken(example, f"a KL of {shown(float(after))}", f"below {shown(float(before))}")


def gradient_is_that_of_the_kl(f: Subject) -> None:
    got, want = expected_kl_gradient(f)
    hint = " (the gradient of KL(reference || policy))" if abs(float(got) - 0.3) < 1e-6 else ""
    hint = " (no gradient at all: k1 as a loss)" if abs(float(got)) < 1e-9 else hint
    example = f"policy {shown(double(P))}, reference {shown(double(Q))}: expected gradient in the first logit"
    same(example, got, float(want), hint=hint)


def far_from_the_reference(f: Subject) -> None:
    for difference in (-100.0, 100.0):
        given = {"new_logprobs": torch.tensor([[min(difference, 0.0) - 1]])}
        given |= {"ref_logprobs": given["new_logprobs"] - difference, "logprobs": given["new_logprobs"]}
        loss, grad = f.gradient("new_logprobs", **given, response_mask=real(1, R=1))
        if not (grad.isfinite().all() and loss.isfinite()):
            example = f"float32, new_logprobs - ref_logprobs = {difference:g}: loss, gradient"
            raise Broken(example, f"{shown(loss)}, {shown(grad.reshape(()))}", "finite numbers")


KL_LOSS = (
    Property("P8", "one step lowers the KL", one_step_lowers_the_kl,
        "the policy is pushed away from the reference", "verl before a65c9157"),
    Property("P9", "the expected gradient is that of KL(policy || reference)", gradient_is_that_of_the_kl,
        "k3 alone descends KL(reference || policy), and k1 as a loss has no gradient on average",
        "GRPO paper, TRL until #6503", "GRPO's paper uses k3 alone"),
    Property("P11", "a large difference gives a finite loss and gradient", far_from_the_reference,
        "exp overflows in float32, and all weights are infinite or NaN after the step", "OpenRLHF #1335"),
    of_parts(kl_batch, KL),
    *of_padding(kl_batch, KL),
)  # fmt: skip


# ------------------------------------------------------------------------------ value_loss


def one_value(f: Subject, old: float, new: float, target: float, clip: float | None) -> tuple[Tensor, Tensor]:
    given = {"values": double([[old]]), "returns": double([[target]]), "response_mask": real(1, R=1)}
    loss, grad = f.gradient("new_values", new_values=double([[new]]), clip_range_value=clip, **given)
    return loss, grad.reshape(())


def unit(f: Subject) -> float:
    """The factor of the squared error: .5, or what the function has instead."""
    return float(one_value(f, 0.0, 0.1, 1.0, 0.2)[0]) / 0.81


def half_the_squared_error(f: Subject) -> str | None:
    factor = unit(f)
    if factor > 0 and abs(factor - 1) < 1e-6:
        return "without the factor 1/2, so vf_coef means twice as much"
    same("old value 0, new .1, return 1, clip .2", factor * 0.81, 0.405)
    return None


def larger_of_plain_and_clipped(f: Subject) -> None:
    factor = unit(f) / 0.5
    for new, want, slope in ((0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (0.1, 0.405, -0.9)):
        loss, grad = one_value(f, 0.0, new, 1.0, 0.2)
        same(f"old value 0, new {new:g}, return 1, clip .2: loss", loss, factor * want)
        same(f"old value 0, new {new:g}, return 1, clip .2: gradient", grad, factor * slope)


def clipped_around_the_rollouts_value(f: Subject) -> None:
    factor = unit(f) / 0.5
    loss, _ = one_value(f, 2.0, 3.0, 4.0, 0.2)
    same("old value 2, new 3, return 4, clip .2: loss", loss, factor * 0.5 * 1.8**2)


def not_clipped(f: Subject) -> None:
    try:
        loss, _ = one_value(f, 0.0, 0.5, 1.0, None)
    except TypeError:
        raise NotAsked("it takes no None as clip_range_value") from None
    same("old value 0, new .5, return 1, no clipping: loss", loss, unit(f) * 0.25)


VALUE_LOSS = (
    Property("D12", "half the squared error where nothing is clipped", half_the_squared_error,
        "vf_coef means something else than in papers and other libraries"),
    Property("D12", "the larger of the plain and the clipped loss", larger_of_plain_and_clipped,
        "the clipped value hides errors from the critic instead of slowing it"),
    Property("D12", "the value is clipped around the rollout's value", clipped_around_the_rollouts_value,
        "the critic is held near a wrong number"),
    Property("D12", "clip_range_value None clips nothing", not_clipped, "the critic is clipped all the same"),
    of_parts(value_batch, VALUE),
    *of_padding(value_batch, VALUE),
)  # fmt: skip


# ------------------------------------------------------------------------------ pairs


def pairs(f: Subject, margin: list[float], beta: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, gradient in the chosen log-ratios) of pairs with these margins."""
    chosen = double(margin) + offset
    given = {"rejected": torch.full_like(chosen, offset), "beta": beta}
    return f.gradient("chosen", chosen=chosen, **given)


def dpo_at_the_reference(f: Subject) -> None:
    loss, grad = pairs(f, [0.0], 0.1)
    same("policy = reference, beta .1: loss", loss, math.log(2))
    same("policy = reference, beta .1: slope in the margin", grad, [-0.05])


def dpo_numbers(f: Subject) -> None:
    for margin, want in ((10.0, 0.313262), (20.0, 0.126928), (-10.0, 1.313262)):
        loss, _ = pairs(f, [margin], 0.1)
        same(f"margin {margin:g} nats, beta .1: loss", loss, want)


def dpo_far_away(f: Subject) -> None:
    loss, grad = pairs(f, [-1e5], 0.1)
    same("margin -100000 nats, beta .1: loss", loss, 1e4)
    same("margin -100000 nats, beta .1: slope", grad, [-0.1])
    same("margin 100000 nats, beta .1: loss", pairs(f, [1e5], 0.1)[0], 0.0)


def only_the_margin_counts(f: Subject) -> None:
    want, _ = pairs(f, [3.0, -1.0], 0.2)
    same("margins 3 and -1, both log-ratios raised by 7", pairs(f, [3.0, -1.0], 0.2, 7.0)[0], float(want))


def pairs_are_averaged(f: Subject) -> None:
    each = [float(pairs(f, [margin], 0.2)[0]) for margin in (3.0, -1.0)]
    same("margins 3 and -1, beta .2: loss", pairs(f, [3.0, -1.0], 0.2)[0], sum(each) / 2)


OF_PAIRS = (
    Property("P26", "only the difference of the two log-ratios counts", only_the_margin_counts,
        "the loss can be lowered without preferring anything"),
    Property("D17", "the loss is the mean over pairs", pairs_are_averaged,
        "the learning rate depends on the batch size"),
)  # fmt: skip

DPO_LOSS = (
    Property("P26", "at policy = reference: ln 2, slope -beta / 2 in the margin", dpo_at_the_reference,
        "the first step has the wrong size or sign; a loss other than ln 2 before it says that something is off"),
    Property("P26", "-log sigmoid(beta margin)", dpo_numbers, "beta does not mean what papers say"),
    Property("D15", "margins of any size give finite numbers", dpo_far_away,
        "log(sigmoid(x)) is -inf for a pair that is very wrong, and all weights are NaN"),
    *OF_PAIRS,
)  # fmt: skip


def ipo_numbers(f: Subject) -> None:
    for margin, want, slope in ((5.0, 0.0, 0.0), (0.0, 25.0, -10.0), (6.0, 1.0, 2.0)):
        loss, grad = pairs(f, [margin], 0.1)
        same(f"mean margin {margin:g}, beta .1: loss", loss, want)
        same(f"mean margin {margin:g}, beta .1: slope in the margin", grad, [slope])


IPO_LOSS = (
    Property("P26", "(margin - 1 / (2 beta)) squared: 0 at a margin of 1 / (2 beta)", ipo_numbers,
        "the margin is driven to another size than beta says"),
    *OF_PAIRS,
)  # fmt: skip


def summed_over_tokens(f: Subject) -> None:
    logprobs, mask = double([[-1.0, -2.0, -3.0], [-1.0, -9.0, -9.0]]), real(3, 1, R=3)
    got = f(logprobs=torch.where(mask, logprobs, 0.0), mask=mask)
    hint = (
        " (the mean over tokens, which is IPO's)"
        if got.shape == (2,) and abs(float(got[0]) + 2) < 1e-6
        else ""
    )
    same("log-probabilities -1, -2, -3 and -1", got, [-6.0, -1.0], hint=hint)


def sums_ignore_padding(f: Subject) -> None:
    got = f(logprobs=double([[-1.0, -9.0, -9.0]]), mask=real(1, R=3))
    same("log-probability -1, and -9, -9 in the padding", got, [-1.0])


SEQUENCE_LOGPROBS = (
    Property("P26", "a response's log-probability is the sum over its tokens", summed_over_tokens,
        "DPO's beta is divided by the length: long responses are hardly held near the reference",
        "minimind #298 #659, others", "IPO takes means, as does length-normalised DPO"),
    Property("D22", "padding does not count", sums_ignore_padding, "short responses look less likely than they are"),
)  # fmt: skip


def bradley_terry(f: Subject) -> None:
    for d, want in ((0.0, 0.693147), (1.0, 0.313262), (2.0, 0.126928), (-1.0, 1.313262)):
        same(f"scores {d:g} and 0: loss", f(scores_a=double([d]), scores_b=double([0.0])), want)


def bradley_terry_far_away(f: Subject) -> None:
    for d, want in ((1e4, 0.0), (-1e4, 1e4)):
        leaf = double([d]).requires_grad_()
        loss = f(scores_a=leaf, scores_b=double([0.0]))
        same(f"scores {d:g} and 0: loss", loss, want)
        (grad,) = torch.autograd.grad(loss, leaf)
        same(f"scores {d:g} and 0: gradient", grad, [0.0 if d > 0 else -1.0])


def votes_are_soft_targets(f: Subject) -> None:
    got = f(scores_a=double([1.0]), scores_b=double([0.0]), share=double([0.75]))
    same("scores 1 and 0, three of four voted for the first", got, 0.75 * 0.313262 + 0.25 * 1.313262)
    swapped = f(scores_a=double([0.0]), scores_b=double([1.0]), share=double([0.25]))
    same("the same pair swapped, with its votes", swapped, float(got))


PAIRWISE_LOSS = (
    Property("D15", "log(1 + exp(-d)) of the difference of scores", bradley_terry,
        "the reward model's scale is not that of log-odds"),
    Property("D15", "differences of any size give finite numbers", bradley_terry_far_away,
        "log(sigmoid(d)) is -inf for a pair that is very wrong, and all weights are NaN"),
    Property("D15", "vote shares are soft targets", votes_are_soft_targets,
        "a tie is trained as a win"),
)  # fmt: skip
