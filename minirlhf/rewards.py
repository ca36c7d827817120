"""What PPO maximises: a reward model, functions of your own, or a weighted sum of them.

`--reward rm` is the reward model.  `--reward package.module:function` calls

    function(prompts: list[str], responses: list[str]) -> list[float]

which returns one finite number per response; higher is better.  Each may carry a weight: `--reward rm
--reward minirlhf.rewards:repetition:-0.5`.  Four rules are shipped (minirlhf/measure/rules.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data
from minirlhf.measure.rules import blocked_words, length, repetition, sameness
from minirlhf.model import GPT, RewardEnsemble, ValueModel, critic_from, zero_critic
from minirlhf.rollout import Texts, by_microbatch
from minirlhf.support import functions
from minirlhf.support.functions import Reward, load_rewards
from minirlhf.tokenizer import Tokenizer

__all__ = [
    "RewardReader",
    "Scorer",
    "blocked_words",
    "length",
    "load_rewards",
    "make_critic",
    "repetition",
    "sameness",
]


def encode_for(
    model: RewardEnsemble, model_tokenizer: Tokenizer, texts: Texts, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """texts in the model's own tokens: tokens, mask [B, T], and which of them were cut [B].

    Texts of another tokenizer are decoded and encoded again, and cut at the end where they exceed the model's
    context, as in its training."""
    tokens, mask = texts.tokens, texts.mask
    if model_tokenizer.hash == tokenizer.hash:
        return tokens, mask, torch.zeros(len(texts), device=tokens.device)
    context = model.members[0].backbone.config.context
    rows = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]
    rows = [data.translate(row, tokenizer, model_tokenizer) for row in rows]
    cut = torch.tensor([float(len(row) > context) for row in rows])
    found = *data.collate([row[:context] for row in rows], model_tokenizer.pad), cut
    return tuple(x.to(tokens.device) for x in found)


@dataclass
class RewardReader:
    """A reward model and its tokenizer, which need not be the policy's."""

    model: RewardEnsemble
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str | Path | None, remedy: str) -> RewardReader | None:
        """The reward model of a checkpoint, on the CPU; None for None.  The remedy is for a missing one."""
        return cls(*checkpoint.load_reward(checkpoint.resolve(path, remedy))) if path else None

    @property
    def context(self) -> int:
        return self.model.members[0].backbone.config.context

    def scores(
        self, texts: Texts, tokenizer: Tokenizer, microbatch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, disagreement and whether the text was cut, [B] each, of texts that `tokenizer` encoded."""

        def read(model: RewardEnsemble, rows: Texts) -> tuple[Tensor, Tensor, Tensor]:
            tokens, mask, cut = encode_for(model, self.tokenizer, rows, tokenizer)
            return *model(tokens, mask), cut

        return by_microbatch(read, self.model, texts, microbatch)


def make_critic(policy: GPT, tokenizer: Tokenizer, reward: RewardReader | None, start: str) -> ValueModel:
    """A value model that starts as the reward model, or as the policy with a zero head [D13]; by `start`.

    'auto' is 'reward' where the reward model can score a prefix of the policy's own tokens, else 'sft'.
    """
    same_tokens = reward is not None and reward.tokenizer.hash == tokenizer.hash
    if start == "reward" and not same_tokens:
        raise UserError(
            "the reward model has another tokenizer than the policy: use --value-init sft or auto"
        )
    prefixes = same_tokens and reward.model.members[0].backbone.config.reads_prefixes
    from_reward = start == "reward" or start == "auto" and prefixes
    return critic_from(reward.model.members[0]) if from_reward else zero_critic(policy)


class Scorer:
    """Scores texts as PPO's objective does, and reports what each part of it contributed."""

    def __init__(
        self,
        rewards: list[tuple[str, Reward | None, float]],
        tokenizer: Tokenizer,
        reward_model: RewardReader | None = None,
        judge: RewardReader | None = None,
        disagreement_coef: float = 0.0,
        microbatch: int | None = None,
    ):
        """rewards: what load_rewards returns.  The judge's scores are reported and never optimised."""
        if disagreement_coef and len(reward_model.model.members) == 1:
            raise UserError("--disagreement-coef: the reward model has one member: train it with --members 3")
        self.rewards, self.tokenizer, self.microbatch = rewards, tokenizer, microbatch
        self.reward_model, self.judge, self.disagreement_coef = reward_model, judge, disagreement_coef

    @torch.no_grad()
    def __call__(self, texts: Texts) -> tuple[Tensor, dict[str, Tensor]]:
        """texts -> scores [B], and by metric name what the reward model and the judge said [B].

        Raises UserError where a reward function fails.
        """
        parts: dict[str, Tensor] = {}
        if self.reward_model is not None:
            rm_scores, disagreement, cut = self.reward_model.scores(texts, self.tokenizer, self.microbatch)
            parts |= {"objective/rm_scores": rm_scores, "objective/rm_disagreement": disagreement}
            if self.reward_model.tokenizer.hash != self.tokenizer.hash:
                parts["objective/rm_cut"] = cut
            cautious = rm_scores - self.disagreement_coef * disagreement
        prompts, responses = texts.decode(self.tokenizer)
        scores = torch.zeros(len(texts), device=texts.tokens.device)
        for name, function, weight in self.rewards:
            values = cautious if function is None else functions.call(function, prompts, responses, name)
            scores = scores + weight * torch.as_tensor(values, dtype=scores.dtype, device=scores.device)
        if self.judge is not None:
            parts["objective/judge"] = self.judge.scores(texts, self.tokenizer, self.microbatch)[0]
        return scores, parts
