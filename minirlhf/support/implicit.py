"""The reward that a DPO policy implies, read by everything that reads a reward model's scores.

    r(prompt, response) = beta (log p(response | prompt) - log p_ref(response | prompt))

is the reward that the policy maximises at a KL coefficient of beta, up to a constant of the prompt (Rafailov
et al. 2023, arXiv 2305.18290).  The prompt's own tokens do not count.  The reference is the checkpoint that
the policy was trained from, which the policy's config.json names by path and checksum.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from minirlhf import UserError, checkpoint, preference
from minirlhf.model import GPT
from minirlhf.rollout import Sampling, Texts, response_logprobs
from minirlhf.support import origin
from minirlhf.tokenizer import Tokenizer


class ImplicitReward(nn.Module):
    """A policy and its reference, as one scorer."""

    def __init__(self, policy: GPT, ref: GPT, beta: float, loss: str, sampling: Sampling):
        super().__init__()
        self.policy, self.ref, self.beta, self.loss, self.sampling = policy, ref, beta, loss, sampling

    def by_token(self, texts: Texts) -> Tensor:
        """[B, R]: what each token of the responses adds to their scores, 0 at padding."""
        logprobs, ref_logprobs = (
            response_logprobs(model, texts, self.sampling)[0] for model in (self.policy, self.ref)
        )
        lengths = texts.response_mask.sum(1, keepdim=True)
        return self.beta * preference.sequence_log_ratios(logprobs, ref_logprobs, lengths, self.loss)

    def forward(self, texts: Texts) -> Tensor:
        """Scores [B] of the responses, which this policy's own tokenizer encoded."""
        return self.by_token(texts).sum(1)


def load(path: str | Path) -> tuple[ImplicitReward, Tokenizer]:
    """The implicit reward of the DPO policy at `path`, on the CPU, and its tokenizer.

    Raises UserError where the reference cannot be found, or was trained again since.
    """
    folder, about, tokenizer = checkpoint.writer(path)
    settings = about.get("training")
    settings = settings if isinstance(settings, dict) else {}
    beta, temperature, loss = (settings.get(name) for name in ("beta", "temperature", "loss"))
    numbers = all(isinstance(x, int | float) and 0 < x < 1e9 for x in (beta, temperature))
    if not numbers or loss not in ("dpo", "ipo"):
        raise UserError(f"{path}/config.json: training: beta, temperature or loss is missing or damaged")
    remedy = "a policy's score is relative to its reference: put it back, or name a model of train_rm.py"
    reference = origin.find(folder, "init", checkpoint.fingerprint, remedy)
    models = (checkpoint.load_gpt(place, dropout=0.0).eval() for place in (folder, reference))
    sampling = Sampling(1, float(temperature), tokenizer.ends, tokenizer.pad)
    return ImplicitReward(*models, float(beta), loss, sampling), tokenizer
