"""What the fields of a GPTConfig may hold: a config.json may be damaged or written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minirlhf import UserError

if TYPE_CHECKING:
    from minirlhf.model import GPTConfig

ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MAX_LAYERS, MAX_MEMBERS = 1000, 100  # a damaged file may ask for a billion, and building them would take days

Rule = tuple[Callable[[Any], bool], str]  # a test of the value, and what to say when it fails


def check(config: GPTConfig) -> None:
    """Refuse a config with a value of the wrong type or range, or with values that do not fit together."""
    for name, (accepts, expected) in RULES.items():
        value = getattr(config, name)
        if not accepts(value):
            raise UserError(f"model: {name} must be {expected}, not {value!r:.50}")
    if config.head_dim is None and config.n_embd % config.n_head:
        raise UserError(
            f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}: change --n-embd or --n-head"
        )
    if config.n_head % config.kv_heads:
        raise UserError(f"n_head {config.n_head} is not divisible by n_kv_head {config.n_kv_head}")
    width = config.head_dim or config.n_embd // config.n_head
    if config.positions == "rotary" and width % 2:
        raise UserError(
            f"rotary positions need an even number of channels per head, not {width}: change n_head"
        )
    if config.nope_layers and (config.positions != "rotary" or max(config.nope_layers) >= config.n_layer):
        raise UserError(
            f"nope_layers {config.nope_layers!s:.50} of {config.n_layer} layers with {config.positions} "
            "positions: name layers, from 0, of a model with rotary ones"
        )
    if config.n_bidirectional > config.n_layer:
        raise UserError(
            f"n_bidirectional {config.n_bidirectional}, but {config.n_layer} layers: change --bidirectional"
        )


def check_members(members: int) -> None:
    """Refuse a reward ensemble of no members, or of more than anybody trains."""
    if not _is_size(members) or members > MAX_MEMBERS:
        raise UserError(f"members must be a whole number from 1 to {MAX_MEMBERS}, not {members!r:.50}")


def _is_size(x: Any) -> bool:
    return type(x) is int and 0 < x < 2**31


def _is_positive(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < 1e30


def _is_scaling(x: Any) -> bool:
    if not isinstance(x, dict) or x.keys() != {*ROPE_SCALING} or not all(map(_is_positive, x.values())):
        return False
    return x["low_freq_factor"] < x["high_freq_factor"]


def _is_layers(x: Any) -> bool:
    whole = isinstance(x, list) and len(x) > 0 and all(type(i) is int and i >= 0 for i in x)
    return whole and x == sorted({*x})


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or accepts(x)


def _one_of(*words: Any) -> Rule:
    # Types are compared as well: 1 == True in Python, and JSON has both.
    accepts = lambda x: any(type(x) is type(word) and x == word for word in words)
    return accepts, "one of " + ", ".join(map(str, words))


RULES: dict[str, Rule] = {
    "vocab_size": (_is_size, "a whole number above 0"),
    "context": (_is_size, "a whole number above 0"),
    "n_layer": (lambda x: _is_size(x) and x <= MAX_LAYERS, f"a whole number from 1 to {MAX_LAYERS}"),
    "n_head": (_is_size, "a whole number above 0"),
    "n_embd": (_is_size, "a whole number above 0"),
    "dropout": (
        lambda x: type(x) is int and x == 0 or type(x) is float and 0 <= x < 1,
        "at least 0 and below 1",
    ),
    "n_kv_head": (_or_none(_is_size), "a whole number above 0, or None"),
    "head_dim": (_or_none(_is_size), "a whole number above 0, or None"),
    "qk_norm": _one_of(True, False),
    "n_inner": (_or_none(_is_size), "a whole number above 0, or None"),
    "norm": _one_of("layer", "rms"),
    "norm_eps": (_is_positive, "a number above 0"),
    "positions": _one_of("learned", "rotary"),
    "rope_theta": (_is_positive, "a number above 0"),
    "rope_scaling": (
        _or_none(_is_scaling),
        "None, or a positive number for each of " + ", ".join(ROPE_SCALING),
    ),
    "nope_layers": (_or_none(_is_layers), "None, or layers in rising order"),
    "mlp": _one_of("gelu_tanh", "gelu", "swiglu"),
    "bias": _one_of(True, False),
    "qkv_bias": _one_of(True, False, None),
    "tied": _one_of(True, False),
    "causal": _one_of(True, False),
    "n_bidirectional": (lambda x: type(x) is int and x >= 0, "a whole number, 0 or larger"),
    "pre_norm": _one_of(True, False),
    "lora_rank": (lambda x: type(x) is int and 0 <= x < 2**31, "a whole number, 0 or larger"),
    "lora_alpha": (_is_positive, "a number above 0"),
    "lora_layers": (_or_none(_is_size), "a whole number above 0, or None"),
}
