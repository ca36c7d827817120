"""A model from a checkpoint that somebody else may have written: built once its weights are known to fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from minirlhf import UserError
from minirlhf.support.shape import check_members

DAMAGED = "take another step folder or train again"
HEAD = {"pooling": str, "members": int, "mlp": bool}


def head_of(about: dict[str, Any], where: object) -> dict[str, Any]:
    """What config.json says of the head of a reward model; UserError for anything that is no head."""
    head = about.get("head")
    whole = isinstance(head, dict) and all(type(v) is HEAD.get(k) for k, v in head.items())
    if not whole or "pooling" not in head:
        raise UserError(f"{where}/config.json: head: {head!r:.60} is no head: {DAMAGED}")
    check_members(head.get("members", 1))
    return {"members": 1, "mlp": True} | head


def filled(build: Callable[[], Module], layers: int, state: dict[str, Tensor], where: object) -> Module:
    """build(), with the weights in `state`; `layers`: how many blocks it will have, at least.

    A config of a few bytes can ask for more than fits in memory.  So its names and shapes are compared with
    those of the weights before anything is allocated.  Raises UserError where they differ.
    """
    shapes = shapes_of(build, layers, state, where)
    found = {name: tuple(t.shape) for name, t in state.items()}
    if odd := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        known = {None: "missing"}
        wants, has = (known.get(s.get(odd[0]), s.get(odd[0])) for s in (shapes, found))
        raise UserError(
            f"{where}: weights do not fit config.json: {odd[0]}: {wants} in the config, {has} in the file: "
            f"{DAMAGED}"
        )
    model = build()
    model.load_state_dict(state)
    return model


def shapes_of(
    build: Callable[[], Module], layers: int, state: dict[str, Tensor], where: object
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of build()'s weights, without memory for them."""
    if layers > len(state):
        raise UserError(
            f"{where}: weights do not fit config.json: {layers:,} layers, {len(state):,} tensors: {DAMAGED}"
        )
    try:
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in build().state_dict().items()}
    except RuntimeError as error:  # sizes whose product no tensor can have
        raise UserError(
            f"{where}: weights do not fit config.json: {str(error).splitlines()[0]:.100}: {DAMAGED}"
        ) from None
