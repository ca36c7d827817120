"""What PPO maximises: a reward model, functions of your own, or a weighted sum of them.

`--reward rm` is the reward model.  `--reward package.module:function` calls

    function(prompts: list[str], responses: list[str]) -> list[float]

which returns one finite number per response; higher is better.  With a third parameter, rows: list[dict], it
gets the data's own rows, too.  Each may carry a weight: `--reward rm --reward minirlhf.rewards:length:-0.5`.
Shipped are four rules (minirlhf/measure/rules.py) and six that check an answer (answers.py, program.py).

A policy made by train_dpo.py serves wherever a reward model does: its implicit reward is the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint
from minirlhf.measure.answers import choice, chrf, exact, format, numeric
from minirlhf.measure.program import tests
from minirlhf.measure.rules import blocked_words, length, repetition, sameness
from minirlhf.model import GPT, RewardEnsemble, RewardModel, ValueModel, critic_from, zero_critic
from minirlhf.rollout import Texts, by_microbatch
from minirlhf.support import functions, implicit, retokenize
from minirlhf.support.functions import Reward, fields_read, load_rewards
from minirlhf.support.implicit import ImplicitReward
from minirlhf.tokenizer import Tokenizer

__all__ = ["RewardReader", "Scorer", "fields_read", "load_rewards", "make_critic"]
__all__ += ["blocked_words", "length", "repetition", "sameness"]
__all__ += ["choice", "chrf", "exact", "format", "numeric", "tests"]


@dataclass
class RewardReader:
    """A reward model, or a DPO policy's implicit reward, and the tokenizer that it reads with."""

    model: RewardEnsemble | ImplicitReward
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str | Path | None, remedy: str) -> RewardReader | None:
        """The scorer in a checkpoint, on the CPU; None for None.  The remedy is for a missing checkpoint."""
        if not path:
            return None
        of_policy = checkpoint.load_config(checkpoint.resolve(path, remedy)).get("stage") == "dpo"
        return cls(*(implicit.load(path) if of_policy else checkpoint.load_reward(path)))

    @property
    def members(self) -> list[RewardModel]:
        """The reward models of an ensemble; none where the score is an implicit reward."""
        return [] if isinstance(self.model, ImplicitReward) else list(self.model.members)

    @property
    def context(self) -> int:
        gpt = self.members[0].backbone if self.members else self.model.policy
        return gpt.config.context

    def reads_prefixes(self, tokenizer: Tokenizer) -> bool:
        """Whether a text that `tokenizer` encoded has a score at each of its tokens."""
        causal = all(member.backbone.config.reads_prefixes for member in self.members)
        return self.tokenizer.hash == tokenizer.hash and causal

    def each(self, texts: Texts, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Scores [B, K] by each of the K members (1 of an implicit reward), and whether the text was cut [B].

        texts: encoded by `tokenizer`, and encoded again where the model has another one.
        """
        if isinstance(self.model, ImplicitReward):
            own, cut = retokenize.apart(texts, tokenizer, self.tokenizer, self.context)
            return self.model(own)[:, None], cut
        tokens, mask, cut = retokenize.whole(texts, tokenizer, self.tokenizer, self.context)
        return self.model.each(tokens, mask).T, cut

    def scores(
        self, texts: Texts, tokenizer: Tokenizer, microbatch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, disagreement and whether the text was cut, [B] each, of texts that `tokenizer` encoded."""
        scores, cut = by_microbatch(RewardReader.each, self, texts, microbatch, tokenizer)
        return scores.mean(1), scores.std(1, correction=0), cut

    def by_token(self, texts: Texts) -> Tensor:
        """What each response token adds to the score [B, R]; texts: in the model's own tokens."""
        if isinstance(self.model, ImplicitReward):
            return self.model.by_token(texts)
        begun = texts.prompts.shape[1]
        values = torch.stack([member.values(texts.tokens, texts.mask) for member in self.members]).mean(0)
        return values[:, begun:] - values[:, begun - 1 : -1]  # [B, T]: the score of the text so far


def make_critic(policy: GPT, tokenizer: Tokenizer, reward: RewardReader | None, start: str) -> ValueModel:
    """A value model that starts as the reward model, or as the policy with a zero head [D13]; by `start`.

    'auto' is 'reward' where the reward model can score a prefix of the policy's own tokens, else 'sft'.
    """
    same_tokens = reward is not None and reward.tokenizer.hash == tokenizer.hash
    if start == "reward" and not same_tokens:
        raise UserError(
            "the reward model has another tokenizer than the policy: use --value-init sft or auto"
        )
    if start == "reward" and not reward.members:
        raise UserError("a DPO policy has no head to start a value model from: use --value-init sft or auto")
    prefixes = same_tokens and reward.members and reward.reads_prefixes(tokenizer)
    from_reward = start == "reward" or start == "auto" and prefixes
    return critic_from(reward.members[0]) if from_reward else zero_critic(policy)


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
        if disagreement_coef and len(reward_model.members) < 2:
            raise UserError("--disagreement-coef: the reward model has one member: train it with --members 3")
        self.rewards, self.tokenizer, self.microbatch = rewards, tokenizer, microbatch
        self.reward_model, self.judge, self.disagreement_coef = reward_model, judge, disagreement_coef

    @torch.no_grad()
    def __call__(self, texts: Texts, records: Sequence | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """texts -> scores [B], and by metric name what the reward model and the judge said [B].

        records: those of the texts' prompts, for functions that read the data's own rows.  Raises UserError
        where a reward function fails.
        """
        parts: dict[str, Tensor] = {}
        if self.reward_model is not None:
            rm_scores, disagreement, cut = self.reward_model.scores(texts, self.tokenizer, self.microbatch)
            parts |= {"objective/rm_scores": rm_scores, "objective/rm_disagreement": disagreement}
            if self.reward_model.tokenizer.hash != self.tokenizer.hash:
                parts["objective/rm_cut"] = cut
            cautious = rm_scores - self.disagreement_coef * disagreement
        if self.judge is not None:  # before the functions, which may fail: sharded models read on all ranks
            parts["objective/judge"] = self.judge.scores(texts, self.tokenizer, self.microbatch)[0]
        prompts, responses = texts.decode(self.tokenizer)
        scores = torch.zeros(len(texts), device=texts.tokens.device)
        for name, function, weight in self.rewards:
            if function is None:
                values = cautious
            else:
                values = functions.call(function, prompts, responses, name, records)
            scores = scores + weight * torch.as_tensor(values, dtype=scores.dtype, device=scores.device)
        return scores, parts
