"""Equations of PPO and its relatives, as pure functions: they know no model, tokenizer or config.

Dimensions: B sequences, R response tokens. `response_mask` [B, R] is bool, True = a real token of the
response; what stands where it is False may be NaN and reaches no value and no gradient [D22]. `logprobs`,
`ref_logprobs`, `values` come from the rollout and are constants; `new_logprobs`, `new_values` [B, R] are
the current model's and carry the gradient. One function, at one temperature, makes them all. `scores` [B] are
the reward model's; `rewards` [B, R] are scores after shaping, and the two are never mixed. PPO's advantages
and returns come from `kernels.gae` [D8].

Papers: PPO arXiv 1707.06347; RLHF arXiv 1909.08593, code openai/lm-human-preferences (lmhp); details arXiv
2403.17031 (N+) and "The N Implementation Details of RLHF with PPO" (N blog); KL estimators
joschu.net/blog/kl-approx.
"""

import math

import torch
from torch import Tensor

from .masked import SumOverRanks, masked_mean, masked_var


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates k1, k2, k3 of KL(policy || ref) from tokens the policy drew; any shape [D1].

    With r = ref / policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. Which is right depends on the
    use: k1, detached, inside the reward gives the true gradient of the KL. k3 has k1's mean with less noise
    and is never negative: log it. As terms of the loss: see kl_loss.
    """
    log_r = ref_logprobs - logprobs
    return -log_r, log_r.square() / 2, torch.expm1(log_r) - log_r  # expm1: r - 1 loses all digits near r = 1


@torch.no_grad()
def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """rewards_t = -kl_coef * k1_t, plus the score at the last real token; [B, R], 0 off the mask [D7].

    So each row sums to score - kl_coef * sum(k1), and the score counts exactly once: on EOS, or on the last
    token where the response was cut off (lmhp; TRL puts it a slot later when there is room). A row with no
    real token has nowhere to put its score and is all 0. Constants: the KL acts through the policy gradient
    alone [D1].
    """
    k1, _, _ = kl_estimates(logprobs, ref_logprobs)
    rewards = torch.where(response_mask, -kl_coef * k1, 0.0)
    # The last real token: counting from the right, the first one.
    is_last = response_mask & (response_mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


def apply_missing_eos(scores: Tensor, has_eos: Tensor, penalty: float, mode: str) -> Tensor:
    """Scores [B] of responses that never ended, has_eos [B] bool; two conventions and neither [D9].

    'replace': the score becomes -penalty (lmhp, N+: -1).  'subtract': `penalty` is taken off the score (TRL's
    missing_eos_penalty).  'none': left alone.  An EOS on the last allowed token is an EOS.
    """
    if mode == "none":
        return scores
    if mode not in ("replace", "subtract"):
        raise ValueError(f"missing-EOS mode must be 'replace', 'subtract' or 'none', not {mode!r}")
    return torch.where(has_eos, scores, -penalty if mode == "replace" else scores - penalty)


def group_advantages(rewards: Tensor, group: int, baseline: str, scale: str) -> Tensor:
    """Advantages [B] of whole responses, from their rewards [B] and those of the rest of the group [D27].

    Rows k * group .. (k + 1) * group - 1 answer one prompt and were drawn together. `baseline` 'mean': the
    group's mean (GRPO); 'leave-one-out': the mean of the others (RLOO). The latter gives the true gradient,
    the former (group - 1) / group of it. `scale` 'std' divides by the group's unbiased standard deviation
    + 1e-4, as TRL does; 'none' and 'rollout' do not. Equal rewards give exactly 0, as does a group of one.
    """
    rows, others = rewards.double().view(-1, group), max(group - 1, 1)
    advantages = rows - rows.mean(1, keepdim=True)
    std = (advantages.square().sum(1, keepdim=True) / others).sqrt()
    advantages = advantages * {"mean": 1, "leave-one-out": group / others}[baseline]
    advantages = advantages / {"none": 1, "rollout": 1, "std": std + 1e-4}[scale]
    return torch.where(equal_rewards(rewards, group), 0.0, advantages.view(-1)).to(rewards.dtype)


def equal_rewards(rewards: Tensor, group: int) -> Tensor:
    """Which of the responses [B] are in a group whose rewards [B] are equal to rounding: bool [B] [D27].

    Equal: to a millionth of their size. Such a group teaches nothing. Without this, rounding errors of large
    rewards would be divided by their own standard deviation and become advantages of full size.
    """
    rows = rewards.view(-1, group)
    equal = rows.amax(1) - rows.amin(1) <= 1e-6 * rows.abs().amax(1)
    return equal.repeat_interleave(group)


def averaging(response_mask: Tensor, how: str, longest: int) -> tuple[Tensor, Tensor]:
    """(weight [B, 1] of each token of a response, what the response adds to the divisor [B]) [D28]:

    loss = sum of weight * token's loss / sum of what responses add, over all micro-batches and ranks.
      'tokens'     weight 1            adds its length   all tokens count alike
      'responses'  weight 1 / length   adds 1            tokens of short responses weigh more (GRPO's bias)
      'constant'   weight 1 / longest  adds 1            longest: the length limit, not the padding (Dr. GRPO)
    A response without a token in the mask adds 0.
    """
    lengths = response_mask.sum(1).float()
    counts = (lengths > 0).float()  # a response that is left out of the loss leaves the divisor, too
    divisor = {"tokens": 1, "responses": lengths.clamp(min=1), "constant": longest}[how]
    return (counts / divisor)[:, None], lengths if how == "tokens" else counts


@torch.no_grad()
def importance_weights(
    logprobs: Tensor, engine_logprobs: Tensor, response_mask: Tensor, cap: float = 2.0
) -> Tensor:
    """Weights min(policy / engine, cap) of tokens that another engine drew: [B, R], 0 off the mask [D32].

    `logprobs` are recomputed here, with the weights that the engine had; `engine_logprobs` are the engine's
    own, at the same temperature and of the whole distribution. As `weights` of policy_loss they correct each
    token given those before it: exactly, but for ratios above the cap, which bounds the variance.
    """
    log_ratio = torch.where(response_mask, logprobs - engine_logprobs, -math.inf)
    return log_ratio.exp().clamp(max=cap)


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float | tuple[float, float],
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
    objective: str = "clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), ratio = exp(new - old) [D12].

    All inputs [B, R] -> scalar loss, detached scalar statistics. Until the first optimiser step ratio is 1
    [D4]. `clip_range`: low and high, or one number for both. `denominator` is the number of real tokens in
    the WHOLE minibatch, over all micro-batches and ranks: then losses and statistics of the parts simply add
    up to the minibatch's [D17]. Default: the real tokens given here. `weights` [B, 1] or [B, R] say how much
    a token counts in the loss (see averaging; None: 1). `objective` [D29]:
    - 'clip': as above, with each token's own ratio;
    - 'sequence': as above, with the geometric mean of the response's ratios at all of its tokens (GSPO);
    - 'cispo': -A min(ratio, 1 + high) log p, the ratio a constant, so that no token loses its gradient.
    Statistics, by metric name: `val/ratio`, its mean; `policy/clipfrac_avg`, the share of tokens whose ratio
    is beyond the range and whose clipped term decides the loss (cispo: whose ratio is capped);
    `policy/approxkl_avg`, the mean of (new - old)^2 / 2 as lmhp logs it.
    """
    if objective not in ("clip", "sequence", "cispo"):
        raise ValueError(f"objective must be 'clip', 'sequence' or 'cispo', not {objective!r}")
    total = _total(response_mask, denominator)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    # Off the mask 0 goes in BEFORE exp: exp(NaN) would poison the gradient even of what is dropped later.
    log_ratio = torch.where(response_mask, new_logprobs - logprobs, 0.0)
    advantages = torch.where(response_mask, advantages, 0.0)
    exponent = log_ratio
    if objective == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True).clamp(min=1)
        exponent = torch.where(response_mask, mean, 0.0)
    ratio = exponent.clamp(max=20).exp()  # an infinite one would make even a clipped token's gradient NaN
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    losses, was_clipped = torch.maximum(plain, clipped), clipped > plain  # off the mask both are 0
    if objective == "cispo":
        was_clipped = ratio > 1 + high
        losses = (
            -advantages * ratio.clamp(max=1 + high).detach() * torch.where(response_mask, new_logprobs, 0.0)
        )
    loss = (losses if weights is None else losses * weights).sum() / total
    with torch.no_grad():
        stats = {
            "val/ratio": torch.where(response_mask, ratio, 0.0).sum() / total,
            "policy/clipfrac_avg": was_clipped.sum() / total,
            "policy/approxkl_avg": log_ratio.square().sum() / 2 / total,
        }
    return loss, stats


def kl_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kind: str,
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """A KL penalty as a term of the loss instead of the reward: all [B, R] -> scalar [D30].

    'k3-ratio' (k3 times new / old): the gradient of each sampled token's own KL(policy || ref). 'k2': the
    same, until the first optimiser step on a rollout. 'k3' (GRPO): the gradient of KL(ref || policy). There
    is no 'k1': its gradient is 0 on average. None of them makes a token answer for the KL of later tokens;
    only a KL in the reward does [D1].
    `denominator` and `weights` as in policy_loss. In k3 a log-ratio above 20 counts as 20, without a
    gradient: its exponential would soon be infinite. 'reward' and 'none': 0, the KL is no term of the loss.
    """
    if kind in ("reward", "none"):
        return new_logprobs.new_zeros(())
    new, old, ref = (torch.where(response_mask, x, 0.0) for x in (new_logprobs, logprobs, ref_logprobs))
    _, k2, _ = kl_estimates(new, ref)
    _, _, k3 = kl_estimates(new, torch.minimum(ref, new + 20))
    losses = {"k2": k2, "k3": k3, "k3-ratio": k3 * (new - old).clamp(max=20).exp()}[kind]
    total = _total(response_mask, denominator)
    return (losses if weights is None else losses * weights).sum() / total


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range_value: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """mean of 1/2 max((V - return)^2, (V_clip - return)^2), V_clip = old + clip(V - old, -c, c) [D12].

    V new_values, old the ROLLOUT's values, c clip_range_value. All inputs [B, R] -> scalar loss,
    scalar share of tokens whose clipped loss is the larger. `clip_range_value` None: no clipping.
    `denominator` as in policy_loss [D17]. There is no vf_coef: the critic has its own optimiser.
    """
    total = _total(response_mask, denominator)
    new_values, values, returns = (torch.where(response_mask, x, 0.0) for x in (new_values, values, returns))
    plain = (new_values - returns).square()
    if clip_range_value is None:
        return plain.sum() / 2 / total, plain.new_zeros(())
    # Clamped between bounds, not old + clamp(V - old): unclipped values stay bit-equal and are not counted.
    near = new_values.clamp(values - clip_range_value, values + clip_range_value)
    clipped = (near - returns).square()
    return torch.maximum(plain, clipped).sum() / 2 / total, (clipped > plain).detach().sum() / total


def _total(mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Tokens to divide by. Not one real token anywhere gives a loss of 0, not 0 / 0."""
    total = mask.sum() if denominator is None else torch.as_tensor(denominator, device=mask.device)
    return total.clamp(min=1)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, sum_: SumOverRanks | None = None
) -> Tensor:
    """1 - var(returns - values) / var(returns), all [B, R] -> scalar: 1 perfect critic, 0 constant one [D12].

    Returns without variance leave nothing to explain and give 0; a millionth of their size is rounding noise.
    `sum_` sums over the ranks (see masked.py).
    """
    variance = masked_var(returns, mask, sum_=sum_)
    constant = variance <= 1e-12 * masked_mean(returns.square(), mask, sum_=sum_)
    explained = 1 - masked_var(returns - values, mask, sum_=sum_) / torch.where(constant, 1.0, variance)
    return torch.where(constant, 0.0, explained)


@torch.no_grad()
def rollout_metrics(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    has_eos: Tensor,
    kl_coef: float,
) -> dict[str, Tensor]:
    """What a rollout looked like: by metric name, one number per sequence [B], whose mean is logged [D22].

    objective/kl is in nats per sequence and uses k1; objective/kl_k3 has the same mean with less noise [D1].
    """
    logprobs, ref_logprobs = (torch.where(response_mask, x, 0.0) for x in (logprobs, ref_logprobs))
    kl, _, kl_k3 = (k.sum(1) for k in kl_estimates(logprobs, ref_logprobs))
    return {
        "objective/kl": kl,
        "objective/kl_k3": kl_k3,
        "objective/entropy": -logprobs.sum(1),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/scores": scores,
        "val/eos_rate": has_eos.float(),
        "val/response_length": response_mask.sum(1).float(),
    }


def adapt_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon) [D11] (arXiv 1909.08593, section 2.2).

    kl in nats per SEQUENCE, averaged over the n episodes of ALL ranks; horizon in episodes. Call it after the
    update that used the present coefficient, and keep the result in checkpoints.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


def linear_decay(update: int, total: int) -> float:
    """Learning-rate factor of PPO update 0 .. total - 1: from 1 linearly towards 0 [D16] (lmhp, N blog)."""
    if not 0 <= update < total:
        raise ValueError(f"update must lie in 0..{total - 1}, not {update}")
    return 1 - update / total


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling to its own policy, in nats: ln n - (n - 1) / n [D20] (arXiv 2210.10760)."""
    return math.log(n) - (n - 1) / n
