"""What a stage does to a model before using it: freeze, store in bf16, recompute, compile, no dropout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from minirlhf import UserError


def train_last(model: nn.Module, layers: int | None, dtype: torch.dtype) -> None:
    """Train only the last `layers` blocks of every GPT in `model`, and what follows them; None trains all.

    Frozen matrices are stored in `dtype`, which saves memory, and under autocast the time to round them.
    """
    if layers is None:
        return
    for gpt in gpts_in(model):
        if not 0 <= layers <= len(gpt.blocks):
            raise UserError(f"--train-layers {layers}: the model has {len(gpt.blocks)} layers")
        frozen = [gpt.wte, *gpt.blocks[: len(gpt.blocks) - layers]]
        if gpt.config.positions == "learned":
            frozen.append(gpt.wpe)
        gpt.dropout = 0.0  # also in frozen blocks: they cannot learn to bear noise
        for module in frozen:
            module.dropout = 0.0
            module.requires_grad_(False)
        _store(frozen, dtype)


def store_blocks(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the blocks' matrices of a model that is never trained in `dtype`.

    Autocast multiplies the same bits as before, from half the memory and without rounding them at each use.
    Embeddings are not multiplied, and stay as they are.
    """
    _store([block for gpt in gpts_in(model) for block in gpt.blocks], dtype)


def run_blocks(models: Iterable[nn.Module], recompute: bool, compiled: bool) -> None:
    """Recompute the activations of every GPT's blocks in backward, or compile the blocks."""
    for gpt in {gpt for model in models for gpt in gpts_in(model)}:
        gpt.recompute = recompute
        for block in gpt.blocks if compiled else []:
            block.compile(dynamic=True)


def disable_dropout(model: nn.Module) -> nn.Module:
    """RL compares log-probabilities of two forwards: with dropout in train mode they would differ [D5]."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return model


def gpts_in(model: nn.Module) -> list[nn.Module]:
    """Every GPT in a model: the modules that have blocks."""
    return [module for module in model.modules() if hasattr(module, "blocks")]


def _store(modules: list[nn.Module], dtype: torch.dtype) -> None:
    for module in modules:
        for p in module.parameters():
            if p.dim() == 2:
                p.data = p.data.to(dtype)


def prepare(config: Any, run: Any, trained: list[nn.Module], frozen: list[nn.Module]) -> None:
    """Move all models to the device, without dropout [D5]; freeze what is not trained."""
    for model in (*trained, *frozen):
        disable_dropout(model.to(run.device))
        if config.train_layers is not None:
            train_last(model, config.train_layers if model in trained else 0, run.frozen_dtype)
    for model in frozen:
        store_blocks(model.requires_grad_(False), run.frozen_dtype)
    run_blocks(trained, config.gradient_checkpointing, config.compile)
