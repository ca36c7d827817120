"""Properties of what is computed from a rollout: KL estimates, shaped rewards, advantages, means, weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minirlhf.tools.conformance.subject import Broken, NotAsked, Property, Subject, same, shown, told

NAN = math.nan
P, Q = (0.8, 0.2), (0.5, 0.5)  # a policy and a reference over two tokens; KL(P || Q) = .19274 nats


def double(*numbers: object) -> Tensor:
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.float64)


def real(*lengths: int, R: int) -> Tensor:
    """A response mask with these lengths."""
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def random_mask(g: torch.Generator, B: int, R: int) -> Tensor:
    """Lengths of 1 to R."""
    return torch.arange(R) < torch.randint(1, R + 1, (B, 1), generator=g)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


# ------------------------------------------------------------------------------ kl: estimates per token


def estimate(f: Subject, name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    found = f(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if name not in found:
        raise NotAsked(f"it returns no {name}")
    return found[name]


def k1_is_log_policy_less_log_reference(f: Subject) -> None:
    p, q = double(0.5, 0.3, 0.2), double(0.2, 0.5, 0.3)
    example = "policy (.5, .3, .2), reference (.2, .5, .3), each token once"
    same(example, estimate(f, "k1", p.log(), q.log()), (p / q).log())


def k2_is_half_its_square(f: Subject) -> None:
    p, q = double(0.5, 0.3, 0.2), double(0.2, 0.5, 0.3)
    example = "k2 of policy (.5, .3, .2), reference (.2, .5, .3), each token once"
    same(example, estimate(f, "k2", p.log(), q.log()), (p / q).log().square() / 2)


def k3_of_one_token(f: Subject) -> None:
    same("k3 at logprobs 1, ref_logprobs 0", estimate(f, "k3", double([1.0]), double([0.0])), [math.exp(-1)])


def their_mean_is_the_kl(f: Subject) -> None:
    p, q = double(P), double(Q)
    found = f(logprobs=p.log(), ref_logprobs=q.log())
    for name in [name for name in ("k1", "k3") if name in found]:
        example = f"policy {shown(p)}, reference {shown(q)}: mean of {name} under the policy"
        same(example, (p * found[name]).sum(), kl_of(p, q))
    if not {"k1", "k3"} & {*found}:
        raise NotAsked("it returns neither k1 nor k3")


def k3_keeps_its_digits(f: Subject) -> None:
    for difference in (1e-6, -1e-6, 1e-5, -1e-4):
        logprobs = torch.tensor([-1.0])
        ref_logprobs = logprobs + difference
        exact = (ref_logprobs.double() - logprobs.double()).item()
        got, right = estimate(f, "k3", logprobs, ref_logprobs).item(), math.expm1(exact) - exact
        if not (got >= 0 and abs(got - right) <= right / 2):
            raise Broken(f"float32, logprobs -1, ref_logprobs -1 {difference:+g}", shown(got), shown(right))


KL = (
    Property(
        "D1",
        "k1 = logprobs - ref_logprobs",
        k1_is_log_policy_less_log_reference,
        "the penalty pushes the policy away from the reference",
    ),
    Property(
        "D1", "k2 = k1 squared / 2", k2_is_half_its_square, "k2 as a loss no longer has the KL's gradient"
    ),
    Property(
        "P7",
        "the means of k1 and of k3 under the policy are KL(policy || reference)",
        their_mean_is_the_kl,
        "the logged KL is that of the reversed distributions, and as a penalty it has the wrong size or sign",
        "a well-known book's code and its own test",
    ),
    Property(
        "P7",
        "k3 = expm1(ref - new) - (ref - new)",
        k3_of_one_token,
        "k3 is no estimate of the KL: with the ratio upside down it has another mean",
        "a well-known book's code and its own test",
    ),
    Property(
        "P10",
        "k3 is never negative, and keeps its digits where policies are nearly equal",
        k3_keeps_its_digits,
        "at the start of training the logged KL is rounding noise, and may be negative",
        "unsloth-zoo #1240",
    ),
)


# ------------------------------------------------------------------------------ shape_rewards


def shape(f: Subject, scores: Tensor, k1: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    return f(
        scores=scores, logprobs=k1, ref_logprobs=torch.zeros_like(k1), response_mask=mask, kl_coef=kl_coef
    )


def score_counts_once_at_the_last_real_token(f: Subject) -> None:
    mask = real(4, 2, 1, R=4)
    got = shape(f, double(1.0, 2.0, 3.0), torch.zeros(3, 4, dtype=torch.float64), mask, 0.1)
    want = [[0, 0, 0, 1.0], [0, 2.0, 0, 0], [3.0, 0, 0, 0]]
    same("scores 1, 2, 3 of responses of 4, 2 and 1 tokens, no KL", got, want)


def every_token_pays_its_k1(f: Subject) -> None:
    got = shape(f, double([1.0]), double([[1.0, 0.0, 1.0, -0.5]]), real(4, R=4), 0.1)
    same("score 1, kl_coef .1, k1 of 1, 0, 1, -.5", got, [[-0.1, 0.0, -0.1, 1.05]])


def rows_sum_to_score_less_kl(f: Subject) -> None:
    for g, B, R in f.cases():
        k1, scores = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((B, R), (B,)))
        mask = random_mask(g, B, R)
        got = shape(f, scores, k1.masked_fill(~mask, 0.0), mask, 0.3).sum(1)
        example = {"scores": scores, "k1": k1, "lengths": mask.sum(1), "kl_coef": 0.3}
        same(f"{told(example)}: rows sum to", got, scores - 0.3 * torch.where(mask, k1, 0.0).sum(1))


def padding_earns_nothing(f: Subject) -> None:
    got = shape(f, double([1.0]), double([[0.0, 0.0, 7.0, 1e3]]), real(2, R=4), 0.1)
    same("a response of 2 tokens, k1 of 7 and 1000 in its padding", got, [[0.0, 1.0, 0.0, 0.0]])


def rewards_are_constants(f: Subject) -> None:
    leaf = double([[0.5, 0.5]]).requires_grad_()
    if shape(f, double([1.0]), leaf, real(2, R=2), 0.1).requires_grad:
        raise Broken("logprobs that require a gradient", "rewards that require one", "constants")


SHAPE_REWARDS = (
    Property(
        "D7",
        "the score is added once, at the last real token",
        score_counts_once_at_the_last_real_token,
        "the score is lost, counted several times, or credited to padding",
        "TRL #1893",
    ),
    Property(
        "D1",
        "each token pays kl_coef k1, the sampled token's log-ratio",
        every_token_pays_its_k1,
        "with k2 or k3 in the reward, the policy follows another penalty than the KL",
    ),
    Property(
        "D7",
        "a row sums to score - kl_coef sum(k1)",
        rows_sum_to_score_less_kl,
        "the return is not the objective that is reported",
    ),
    Property(
        "D22",
        "padding earns nothing",
        padding_earns_nothing,
        "short responses are paid or fined for their padding",
    ),
    Property(
        "D1",
        "rewards carry no gradient",
        rewards_are_constants,
        "the loss descends through the reward as well, where k1 has no gradient on average",
    ),
)


# ------------------------------------------------------------------------------ gae

REWARDS, VALUES = [[-0.1, 0.0, -0.1, 1.0]], [[0.5, 0.4, 0.6, 0.8]]


def steps(f: Subject, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95):
    advantages, returns = f(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam)
    return advantages, returns


def gae_of_four_tokens(f: Subject) -> None:
    got, _ = steps(f, double(REWARDS), double(VALUES), real(4, R=4))
    example = "rewards -.1, 0, -.1, 1, values .5, .4, .6, .8, gamma 1, lam .95"
    same(example, got, [[0.251725, 0.4755, 0.29, 0.2]])


def gae_at_lam_0_and_1(f: Subject) -> None:
    for lam, want in ((1.0, [[0.3, 0.5, 0.3, 0.2]]), (0.0, [[-0.2, 0.2, 0.1, 0.2]])):
        got, _ = steps(f, double(REWARDS), double(VALUES), real(4, R=4), lam=lam)
        same(f"rewards -.1, 0, -.1, 1, values .5, .4, .6, .8, gamma 1, lam {lam:g}", got, want)


def gae_is_the_double_sum(f: Subject) -> None:
    for g, B, R in f.cases():
        rewards, values = torch.randn(2, B, R, generator=g, dtype=torch.float64)
        gamma, lam = torch.rand(2, generator=g).tolist()
        after = torch.cat([values[:, 1:], values.new_zeros(B, 1)], 1)
        delta, want = rewards + gamma * after - values, torch.zeros_like(rewards)
        for t in range(R):
            for k in range(t, R):
                want[:, t] += (gamma * lam) ** (k - t) * delta[:, k]
        got, _ = steps(f, rewards, values, torch.ones(B, R, dtype=torch.bool), gamma, lam)
        same({"rewards": rewards, "values": values, "gamma": gamma, "lam": lam}, got, want)


def nothing_follows_the_last_real_token(f: Subject) -> None:
    mask, pad = real(2, R=4), [9.0, -9.0]
    got, _ = steps(f, double([[0.0, 1.0, 0.0, 0.0]]), double([[0.5, 0.8, *pad]]), mask)
    example = "a response of 2 tokens: rewards 0, 1, values .5, .8, and 9, -9 in the padding's values"
    same(example, torch.where(mask, got, 0.0), [[0.3 + 0.95 * 0.2, 0.2, 0.0, 0.0]])


def returns_are_advantages_plus_values(f: Subject) -> None:
    advantages, returns = steps(f, double(REWARDS), double(VALUES), real(4, R=4))
    if returns is None:
        raise NotAsked("it returns no returns")
    example = "rewards -.1, 0, -.1, 1, values .5, .4, .6, .8: returns"
    same(example, returns, [[0.751725, 0.8755, 0.89, 1.0]])


GAE = (
    Property(
        "D8", "advantages of a response of four tokens", gae_of_four_tokens, "credit goes to the wrong tokens"
    ),
    Property(
        "D8",
        "lam 0 is the TD error, lam 1 the return less the value",
        gae_at_lam_0_and_1,
        "lam does not trade bias for variance",
    ),
    Property(
        "D8",
        "the recursion is the double sum over later TD errors",
        gae_is_the_double_sum,
        "credit goes to the wrong tokens",
    ),
    Property(
        "D8",
        "nothing follows the last real token",
        nothing_follows_the_last_real_token,
        "a critic's values of padding enter every token's advantage",
    ),
    Property(
        "P28",
        "returns are made from advantages before any whitening",
        returns_are_advantages_plus_values,
        "the critic learns targets with the wrong mean and scale, and never fits",
        "classic",
    ),
)


# ------------------------------------------------------------------------------ advantages of groups

SCALES = {
    "the group's mean, divided by the unbiased standard deviation (as TRL); rare successes weigh 2.4 times"
    " too much": (1.2076, -0.7246),
    "the group's mean, divided by the biased standard deviation (as GRPO-Zero); rare successes weigh 2.6"
    " times too much": (1.2910, -0.7746),
    "the group's mean (Dr. GRPO); the gradient is (G - 1) / G of the true one": (0.625, -0.375),
    "leave-one-out (RLOO); the gradient is the true one": (0.625 * 8 / 7, -0.375 * 8 / 7),
}


def grouped(f: Subject, rewards: Tensor, group: int) -> Tensor:
    return f(rewards=rewards, group=group)


def three_of_eight(f: Subject) -> str:
    got = grouped(f, double([1.0] * 3 + [0.0] * 5), 8)
    for name, (up, down) in SCALES.items():
        if got.shape == (8,) and (got - double([up] * 3 + [down] * 5)).abs().max() < 5e-4:
            return name
    right = (
        "1.2076 / -.7246 (unbiased), 1.2910 / -.7746 (biased), .625 / -.375 (none) or .7143 / -.4286 (RLOO)"
    )
    raise Broken("one group of 8, rewards 1, 1, 1, 0, 0, 0, 0, 0", shown(got), right)


def equal_rewards_give_0(f: Subject) -> str | None:
    cases = {
        "16 rewards of float32 1000.1": [1000.1] * 16,
        "8 rewards of float32 .1": [0.1] * 8,
        "rewards 2, 2, 2 and the float32 after 2": [2.0, 2.0, 2.0, 2.0 + 2**-22],
    }
    left = 0.0
    for example, rewards in cases.items():
        got = grouped(f, torch.tensor(rewards), len(rewards)).abs().max().item()
        if not got <= 1e-6 * max(rewards):
            raise Broken(f"one group: {example}: the largest advantage", shown(got), "0")
        left = max(left, got)
    return f"rounding noise of at most {left:.0e} is left, not amplified" if left else None


def a_group_of_one_has_no_advantage(f: Subject) -> None:
    same("one group of 1, reward 1", grouped(f, double([1.0]), 1), [0.0])


def groups_are_independent(f: Subject) -> None:
    one = grouped(f, double(1.0, 0.0, 0.0, 0.0), 4)
    both = grouped(f, double(1.0, 0.0, 0.0, 0.0, 50.0, 70.0, 10.0, 30.0), 4)
    same("groups (1, 0, 0, 0) and (50, 70, 10, 30): the first four rows", both[:4], one.detach())


def a_nan_stays_in_its_group(f: Subject) -> str | None:
    try:
        got = grouped(f, double(1.0, 0.0, 0.0, 0.0, NAN, 1.0, 0.0, 1.0), 4)[:4]
    except NotAsked:
        raise
    except Exception:
        return "NaN is refused"
    if not got.isfinite().all():
        raise Broken(
            "groups (1, 0, 0, 0) and (nan, 1, 0, 1): the first four rows", shown(got), "finite numbers"
        )
    return None


def a_shift_of_rewards_changes_nothing(f: Subject) -> None:
    for g, B, R in f.cases():
        rewards = torch.randn(B * (R + 1), generator=g, dtype=torch.float64)
        if B > 1 and not f.has("group"):
            continue
        want = grouped(f, rewards, R + 1).detach()
        example = {"rewards": rewards, "group": R + 1}
        same(f"{told(example)}, all raised by 10", grouped(f, rewards + 10, R + 1), want)


ADVANTAGES = (
    Property(
        "P4",
        "a known baseline and scale: 3 of 8 responses right",
        three_of_eight,
        "advantages have another size than papers and other libraries say, and so has the learning rate",
    ),
    Property(
        "P5",
        "equal rewards give 0, not amplified rounding noise",
        equal_rewards_give_0,
        "rounding noise becomes advantages of full size in every group where all are right or all are wrong",
        "small eps 1e-8 in several; verl #6348",
    ),
    Property(
        "P6",
        "a group of one has advantage 0",
        a_group_of_one_has_no_advantage,
        "its standard deviation makes all weights NaN; or it is trained on its raw reward, with no baseline",
        "TRL #5773 #5775",
    ),
    Property(
        "P6",
        "a NaN is refused, or stays in its group",
        a_nan_stays_in_its_group,
        "one reward function that fails once poisons the whole batch",
        "TRL #5773 #5775",
    ),
    Property(
        "P25",
        "a group's advantages depend on its own rewards only",
        groups_are_independent,
        "what a prompt teaches depends on which other prompts are in the batch",
        "",
        "REINFORCE++ and TRL's scale_rewards='batch' take the batch's spread",
    ),
    Property(
        "P4",
        "raising all rewards changes nothing",
        a_shift_of_rewards_changes_nothing,
        "the reward's offset, which says nothing, changes the policy",
    ),
)


# ------------------------------------------------------------------------------ whiten


def whitened_numbers(f: Subject) -> None:
    got = f(x=double([[1.0, 2.0, 3.0]]), mask=real(3, R=3), shift_mean=True)
    unbiased = bool((got - double([[-1.0, 0.0, 1.0]])).abs().max() < 1e-3)
    hint = " (the unbiased variance)" if unbiased else ""
    same("x 1, 2, 3", got, [[-1.224745, 0.0, 1.224745]], 1e-5, hint)


def whitened_around_its_mean(f: Subject) -> None:
    got = f(x=double([[1.0, 2.0, 3.0]]), mask=real(3, R=3), shift_mean=False)
    spread = got - got.mean()
    same("x 1, 2, 3 with shift_mean False: the mean", got.mean(), 2.0, 1e-5)
    same("x 1, 2, 3 with shift_mean False: least and largest differ in sign", spread[0, 0].sign(), -1.0)


def whitened_padding(f: Subject) -> None:
    want = torch.where(
        real(3, R=5), f(x=double([[1.0, 2.0, 3.0, 0, 0]]), mask=real(3, R=5), shift_mean=True), 0.0
    )
    short = f(x=double([[1.0, 2.0, 3.0]]), mask=real(3, R=3), shift_mean=True)
    same("x 1, 2, 3 and two places of padding", want[:, :3], short.detach())
    got = f(x=double([[1.0, 2.0, 3.0, 1e3, -7.0]]), mask=real(3, R=5), shift_mean=True)
    same("x 1, 2, 3 and 1000, -7 in the padding", torch.where(real(3, R=5), got, 0.0), want.detach())


def one_number_has_no_spread(f: Subject) -> None:
    for shift_mean in (True, False):
        got = f(x=double([[5.0, 0.0]]), mask=real(1, R=2), shift_mean=shift_mean)[0, 0]
        if not got.isfinite():
            raise Broken("a single real token, 5", shown(got), "a finite number")


def equal_numbers_give_0(f: Subject) -> None:
    got = f(x=torch.full((1, 3), 4.0, dtype=torch.float64), mask=real(3, R=3), shift_mean=True)
    same("x 4, 4, 4", got, [[0.0] * 3], 1e-3)


WHITEN = (
    Property(
        "D10",
        "mean 0 and biased variance 1",
        whitened_numbers,
        "advantages have another size than the learning rate was chosen for",
        "",
        "the unbiased variance differs by 1 / n, which is nothing for a large batch",
    ),
    Property(
        "D10",
        "shift_mean=False keeps the mean",
        whitened_around_its_mean,
        "whitened rewards lose the sign that says good or bad",
        "one public library, whose tests pin the inversion",
    ),
    Property(
        "D22", "only real tokens count", whitened_padding, "the amount of padding scales the advantages"
    ),
    Property(
        "D10",
        "one real token gives no NaN",
        one_number_has_no_spread,
        "a batch with one real token stops the run, or makes all weights NaN",
    ),
    Property("D10", "equal numbers give 0", equal_numbers_give_0, "all weights are NaN after the step"),
)


# ------------------------------------------------------------------------------ masked_mean


def tokens_count_alike(f: Subject) -> str | None:
    mask = real(100, 900, R=900)
    x = torch.where(torch.arange(2)[:, None] == 0, 2.0, 0.5).double().expand(2, 900)
    got = f(x=torch.where(mask, x, 0.0), mask=mask)
    hint = " (a mean of the responses' means)" if got.numel() == 1 and abs(float(got) - 1.25) < 1e-6 else ""
    same("100 tokens at 2.0 in one row and 900 at .5 in another", got, 0.65, hint=hint)


def mean_ignores_padding(f: Subject) -> None:
    got = f(x=double([[1.0, 3.0, 1e3]]), mask=real(2, R=3))
    same("x 1, 3 and 1000 in the padding", got, 2.0)


def mean_survives_nan_in_padding(f: Subject) -> None:
    for junk in (math.inf, NAN):
        x = double([[1.0, 3.0, junk]]).requires_grad_()
        got = f(x=x, mask=real(2, R=3))
        same(f"x 1, 3 and {junk} in the padding", got, 2.0)
        (grad,) = torch.autograd.grad(got, x)
        same(f"x 1, 3 and {junk} in the padding: gradient", grad, [[0.5, 0.5, 0.0]])


def mean_of_nothing(f: Subject) -> None:
    got = f(x=double([[1.0, 3.0]]), mask=real(0, R=2))
    if not got.isfinite():
        raise Broken("no real token at all", shown(got), "a finite number")


MASKED_MEAN = (
    Property(
        "P1",
        "all tokens count alike",
        tokens_count_alike,
        "tokens of short responses weigh more: the length bias of the GRPO paper",
        "TRL #7206 #7249, verl #5625, prime-rl #2562, open-instruct #1161, rlhf-book, nanochat",
        "GRPO's paper averages within a response first",
    ),
    Property(
        "D22",
        "padding does not count",
        mean_ignores_padding,
        "losses and metrics change with the amount of padding",
    ),
    Property(
        "D22",
        "padding may hold infinity or NaN",
        mean_survives_nan_in_padding,
        "0 * NaN is NaN: an overflow in padding makes all weights NaN",
    ),
    Property(
        "D22",
        "no real token gives a finite number",
        mean_of_nothing,
        "a microbatch of empty responses makes all weights NaN",
    ),
)


# ------------------------------------------------------------------------------ averaging


def token_weights(f: Subject, mask: Tensor, longest: int) -> Tensor:
    """What each token of each response counts in the minibatch's loss, [B]."""
    weight, share = f(response_mask=mask, longest=longest)
    return weight.double().reshape(-1) / share.double().sum()


def one_of_three_averages(f: Subject) -> str:
    got = token_weights(f, real(10, 100, R=100), 128)
    known = {
        "tokens: each counts 1/110": [1 / 110] * 2,
        "responses: a token of 10 counts .05, one of 100 .005 (the length bias of the GRPO paper)": [
            0.05,
            0.005,
        ],
        "constant: each counts 1/256 at a length limit of 128 (Dr. GRPO)": [1 / 256] * 2,
    }
    for name, weights in known.items():
        if got.shape == (2,) and (got - double(weights)).abs().max() < 1e-6:
            return name
    right = "1/110, 1/110 (tokens), .05, .005 (responses) or 1/256, 1/256 (a constant of 128)"
    raise Broken(
        "responses of 10 and 100 tokens, longest 128: what a token of each counts", shown(got), right
    )


def more_padding_changes_no_average(f: Subject) -> None:
    want = token_weights(f, real(2, 3, R=3), 16)
    same("responses of 2 and 3 tokens, padded to 9", token_weights(f, real(2, 3, R=9), 16), want)


def parts_of_a_minibatch_add_up(f: Subject) -> None:
    whole, parts = real(1, 9, 4, R=9), (real(1, R=9), real(9, 4, R=9))
    shares = sum(f(response_mask=mask, longest=16)[1].double().sum() for mask in parts)
    weights = torch.cat([f(response_mask=mask, longest=16)[0].double().reshape(-1) for mask in parts])
    example = "responses of 1, 9 and 4 tokens as microbatches of one and two: what a token counts"
    same(example, weights / shares, token_weights(f, whole, 16))


AVERAGING = (
    Property(
        "P2",
        "a known average over tokens of short and long responses",
        one_of_three_averages,
        "tokens weigh differently from what papers and other libraries say",
        "the GRPO paper and most ports",
    ),
    Property(
        "P3",
        "more padding changes nothing",
        more_padding_changes_no_average,
        "the step size depends on the longest response that happens to be in the batch",
        "verl #3741",
    ),
    Property(
        "P1",
        "microbatches add up to the minibatch",
        parts_of_a_minibatch_add_up,
        "the mean of microbatch means gives tokens of small microbatches more weight",
        "TRL #7206 #7249, verl #5625, prime-rl #2562, open-instruct #1161, rlhf-book, nanochat",
    ),
)


# ------------------------------------------------------------------------------ sampling_weights


def weights_of(f: Subject, ratios: Tensor, cap: float = 2.0) -> Tensor:
    given = {"sampler_logprobs": torch.zeros_like(ratios), "response_mask": ratios > 0, "cap": cap}
    return f(logprobs=ratios.log(), **given)


def weight_of_equal_engines(f: Subject) -> None:
    same("both engines give the same log-probabilities", weights_of(f, double([[1.0, 1.0]])), [[1.0, 1.0]])


def weight_is_the_ratio_below_the_cap(f: Subject) -> None:
    same("trainer / sampler = .1 and 1.5, cap 2", weights_of(f, double([[0.1, 1.5]])), [[0.1, 1.5]])


def weight_is_at_most_the_cap(f: Subject) -> None:
    same("trainer / sampler = 5 and 100, cap 2", weights_of(f, double([[5.0, 100.0]])), [[2.0, 2.0]])


def weights_are_constants(f: Subject) -> None:
    leaf = double([[0.1]]).requires_grad_()
    given = {"sampler_logprobs": double([[0.0]]), "response_mask": real(1, R=1), "cap": 2.0}
    if f(logprobs=leaf, **given).requires_grad:
        raise Broken("logprobs that require a gradient", "weights that require one", "constants")


def weights_of_padding_are_finite(f: Subject) -> None:
    for junk in (NAN, math.inf):
        given = {"sampler_logprobs": double([[0.0, 0.0]]), "response_mask": real(1, R=2), "cap": 2.0}
        got = f(logprobs=double([[0.0, junk]]), **given)
        if not got.isfinite().all():
            raise Broken(f"logprobs 0, and {junk} in the padding: weights", shown(got), "finite numbers")


SAMPLING_WEIGHTS = (
    Property(
        "P15",
        "weights of equal engines are 1",
        weight_of_equal_engines,
        "the loss changes though nothing needs a correction",
        "everyone with a separate engine",
    ),
    Property(
        "P15",
        "below the cap, the weight is old / sampler",
        weight_is_the_ratio_below_the_cap,
        "tokens that the sampler likes more than the trainer does keep too much weight",
        "everyone with a separate engine",
    ),
    Property(
        "P16",
        "no weight above the cap",
        weight_is_at_most_the_cap,
        "one token with a large mismatch dominates the step",
        "OpenRLHF 3c3be623",
    ),
    Property(
        "P15",
        "weights carry no gradient",
        weights_are_constants,
        "the policy is pushed to agree or disagree with the sampling engine",
        "everyone with a separate engine",
    ),
    Property(
        "D22",
        "weights of padding are finite",
        weights_of_padding_are_finite,
        "0 * NaN is NaN: padding that the sampling engine left undefined makes all weights of the model NaN",
    ),
)


# ------------------------------------------------------------------------------ response_mask, KL controller


def eos_is_real(f: Subject) -> None:
    got = f(responses=torch.tensor([[5, 9, 0, 0], [5, 6, 7, 9], [5, 6, 7, 8]]), eos=9, pad=0)
    same("eos 9, pad 0: responses (5 9 0 0), (5 6 7 9), (5 6 7 8)", got.double(), real(2, 4, 4, R=4).double())


def eos_may_be_the_pad(f: Subject) -> None:
    got = f(responses=torch.tensor([[5, 9, 9, 9]]), eos=9, pad=9)
    same("eos and pad both 9: response (5 9 9 9)", got.double(), [[1.0, 1.0, 0.0, 0.0]])


def pad_may_occur_in_a_text(f: Subject) -> None:
    got = f(responses=torch.tensor([[5, 0, 6, 9]]), eos=9, pad=0)
    same("eos 9, pad 0: response (5 0 6 9), whose 0 was sampled", got.double(), [[1.0] * 4])


RESPONSE_MASK = (
    Property(
        "P22",
        "the EOS counts, and nothing after it",
        eos_is_real,
        "the EOS has no gradient: the policy never learns to stop",
        "tiny-grpo, rlhf-book, minimind",
    ),
    Property(
        "P22",
        "the first EOS counts, even where padding is the same token",
        eos_may_be_the_pad,
        "the EOS has no gradient: the policy never learns to stop",
        "tiny-grpo, rlhf-book, minimind",
    ),
    Property(
        "P22",
        "a token that was sampled counts, whatever its id",
        pad_may_occur_in_a_text,
        "sampled tokens have no gradient",
        "tiny-grpo, rlhf-book, minimind",
    ),
)


def controller_numbers(f: Subject) -> None:
    for kl, want in ((12.0, 0.150192), (6.6, 0.150096), (6.0, 0.15), (3.0, 0.149808), (60.0, 0.150192)):
        got = f(kl_coef=0.15, kl=kl, target=6.0, n=64, horizon=10000)
        same(f"coefficient .15, KL {kl:g}, target 6, 64 episodes, horizon 10000", got, want, 1e-9)


KL_CONTROLLER = (
    Property(
        "D11",
        "coefficient * (1 + clip(KL / target - 1, -.2, .2) n / horizon)",
        controller_numbers,
        "the coefficient runs away, or follows noise",
    ),
)
