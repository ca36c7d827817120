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
    models = (checkpoint.load_gpt(place, dropout=0.0).eval() for place in (folder, reference_of(folder)))
    sampling = Sampling(1, float(temperature), tokenizer.ends, tokenizer.pad)
    return ImplicitReward(*models, float(beta), loss, sampling), tokenizer


def reference_of(folder: Path) -> Path:
    """The checkpoint that the policy in a step folder was trained from, told by its checksum.

    It is where it was then, where it was as seen from the policy (runs that were copied together), or beside.
    """
    inputs = checkpoint.load_config(folder).get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    checksum, recorded, relative = (inputs.get(f"init{end}") for end in ("", "_path", "_relative_path"))
    if not all(isinstance(value, str) and value for value in (checksum, recorded, relative)):
        raise UserError(f"{folder}/config.json: names no checkpoint that the policy was trained from")
    step, out = Path(recorded), folder.parent
    run = step.parent if step.name.startswith("step-") else step
    places = [step, out / relative, run, out.parent / run.name]
    there = [place for place in places if (place / "config.json").is_file()]
    same = [place for place in there if checkpoint.fingerprint(place) == checksum]
    if not same:
        why = "was trained again since, or replaced" if there else "is not here"
        raise UserError(
            f"{folder}: its score is relative to {recorded!r:.100}, which {why} "
            f"(want sha256 {checksum[:12]}): without its reference a policy cannot score: "
            f"put it back, or name a model of train_rm.py"
        )
    return same[0]
