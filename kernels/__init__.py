"""Per-token statistics of a language model's logits, and GAE. Each operation is in one file with its oracle.

    token_logprobs         log-probability of each token, and entropy              logprobs.py
    token_kl               the same under a reference as well, and the exact KL    kl.py
    linear_token_logprobs  token_logprobs of hidden @ weight.T, without logits     linear_logprobs.py
    gae                    generalised advantage estimation                        advantages.py

Tensors on a GPU go to Triton kernels, all others and float64 to plain PyTorch. MINIRLHF_PLAIN=1 in the
environment sends tensors on a GPU to plain PyTorch too. The scripts pass real rows only: the `mask` of the
first three is for tests and other callers. No stage calls token_kl. An operation is imported at its first
use: other libraries look for a package named `kernels` (Hugging Face has one), and looking must cost nothing.
"""

__all__ = ["gae", "linear_token_logprobs", "token_kl", "token_logprobs"]

_MODULES = {
    "gae": "advantages",
    "linear_token_logprobs": "linear_logprobs",
    "token_kl": "kl",
    "token_logprobs": "logprobs",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
