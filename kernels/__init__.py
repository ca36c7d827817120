"""Per-token statistics of a language model's logits, and GAE: one operation a file, its oracle beside it."""

from .gae import gae
from .kl import token_kl
from .linear_logprobs import linear_token_logprobs
from .logprobs import token_logprobs

__all__ = ["gae", "linear_token_logprobs", "token_kl", "token_logprobs"]
