"""What a checkpoint's config.json says about it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from minirlhf.support.hardware import versions
from minirlhf.support.layout import layout_of


def describe(
    stage: str, shape: Any, config: Any, step: int, complete: bool, tokenizer: Any, **more: Any
) -> dict:
    """A checkpoint's config.json: everything that is needed to load the model and to know where it came
    from."""
    return {
        "stage": stage,
        "model": dataclasses.asdict(shape),
        "training": settings_of(config),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "layout": layout_of(tokenizer).name,  # how conversations become ids: every later stage obeys it
        "step": step,
        "complete": complete,
        "versions": versions(),
    } | more


def settings_of(config: Any) -> dict[str, Any]:
    """A dataclass of options as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
