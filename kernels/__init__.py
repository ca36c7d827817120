"""Per-token statistics of a language model's logits, and GAE: one operation a file, its oracle beside it.

    token_logprobs         log-probability of each token, entropy                logprobs.py
    token_kl               the same under a reference too, and the exact KL      kl.py
    linear_token_logprobs  token_logprobs of hidden @ weight.T, without logits   linear_logprobs.py
    gae                    generalised advantage estimation                      advantages.py

Nothing is imported until it is used: another package that merely probes for one called `kernels` loads nothing.
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
