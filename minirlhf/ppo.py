"""PPO's equations for language models, as pure functions: they know no model, tokenizer or config.

Dimensions: B sequences, R response tokens. `response_mask` [B, R] is bool, True = a real token of the
response; what stands where it is False may be NaN and reaches no value and no gradient [D22]. `logprobs`,
`ref_logprobs`, `values` come from the rollout and are constants; `new_logprobs`, `new_values` [B, R] are
today's and carry the gradient. All come from one forward at one temperature. `scores` [B] are the reward
model's; `rewards` [B, R] are scores after shaping, and the two are never mixed. Advantages and returns come
from `kernels.gae` [D8].

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
    use: k1, detached, inside the reward gives the true gradient of the KL, and so does k2 as a loss. k3 has
    k1's mean with less noise and is never negative: log it, but do not train on it (as a loss it descends
    KL(ref || policy)).
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


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)), ratio = exp(new - old) [D12].

    All inputs [B, R] -> scalar loss, detached scalar statistics. Until the first optimiser step ratio is 1
    [D4]. `denominator` is the number of real tokens in the WHOLE minibatch, over all micro-batches and ranks:
    then losses and statistics of the parts simply add up to the minibatch's [D17]. Default: the real tokens
    given here. Statistics, by metric name: `val/ratio`, its mean; `policy/clipfrac_avg`, the share of tokens
    whose clipped loss is the larger; `policy/approxkl_avg`, the mean of (new - old)^2 / 2 as lmhp logs it.
    """
    total = _total(response_mask, denominator)
    # Off the mask 0 goes in BEFORE exp: exp(NaN) would poison the gradient even of what is dropped later.
    log_ratio = torch.where(response_mask, new_logprobs - logprobs, 0.0)
    advantages = torch.where(response_mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped).sum() / total
    with torch.no_grad():
        stats = {
            "val/ratio": torch.where(response_mask, ratio, 0.0).sum() / total,
            "policy/clipfrac_avg": (clipped > plain).sum() / total,  # off the mask both are 0
            "policy/approxkl_avg": log_ratio.square().sum() / 2 / total,
        }
    return loss, stats


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range_value: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """mean of 1/2 max((V - G)^2, (V_clip - G)^2), V_clip = old + clip(V - old, -c, c) [D12].

    V new_values, old the ROLLOUT's values, G returns, c clip_range_value. All inputs [B, R] -> scalar loss,
    scalar share of tokens whose clipped loss is the larger. `clip_range_value` None: no clipping.
    `denominator` as in policy_loss [D17]. The factor 1/2 is here, vf_coef is not.
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
    k1, _, k3 = kl_estimates(logprobs, ref_logprobs)  # padding holds 0
    kl = k1.sum(1)
    return {
        "objective/kl": kl,
        "objective/kl_k3": k3.sum(1),
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
