"""What a stage does to a model before using it: freeze or adapt, store in bf16, shard, recompute, compile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from minirlhf import UserError
from minirlhf.support import adapters, decode, shard


def choose_trained(model: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """Train the weights of all blocks or the last (--train-layers), or adapters (--lora) there; and heads.

    Frozen matrices are stored in `dtype`, which saves memory, and under autocast the time to round them.
    """
    for gpt in gpts_in(model):
        refuse_missing_layers(gpt, config.train_layers)
        adapters.adapt(gpt, config.lora, config.lora_alpha, config.train_layers)
    if not config.lora:
        train_last(model, config.train_layers, dtype)
        return
    disable_dropout(model)
    store(model, dtype)
    share_frozen([model])


def refuse_missing_layers(gpt: nn.Module, layers: int | None) -> None:
    """UserError where the last `layers` blocks of a GPT are asked for and it has fewer; None asks for all."""
    if layers is not None and not 0 <= layers <= len(gpt.blocks):
        raise UserError(f"--train-layers {layers}: the model has {len(gpt.blocks)} layers")


def train_last(model: nn.Module, layers: int | None, dtype: torch.dtype) -> None:
    """Train only the last `layers` blocks of every GPT in `model`, and what follows them; None trains all."""
    if layers is None:
        return
    for gpt in gpts_in(model):
        refuse_missing_layers(gpt, layers)
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


def store(model: nn.Module, dtype: torch.dtype) -> None:
    """Store all matrices of the GPTs in `model` in `dtype`, but for adapters."""
    _store(gpts_in(model), dtype)


def share_frozen(models: Iterable[nn.Module]) -> None:
    """Hold frozen weights that are equal once: of models that grew from one base, there is one trunk."""
    kept: dict[str, list[nn.Parameter]] = {}
    for gpt in [gpt for model in models for gpt in gpts_in(model)]:
        for prefix, module in gpt.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    continue
                others = kept.setdefault(f"{prefix}.{name}", [])
                same = next((q for q in others if _equal(p, q)), None)
                if same is None:
                    others.append(p)
                else:
                    setattr(module, name, same)


def _equal(p: nn.Parameter, q: nn.Parameter) -> bool:
    same_kind = p.shape == q.shape and p.dtype == q.dtype and p.device == q.device
    return p is q or same_kind and torch.equal(p, q)


def run_blocks(models: Iterable[nn.Module], recompute: bool, compiled: bool) -> None:
    """Recompute every GPT's activations in backward; compile its blocks, and on a GPU its decode step."""
    for gpt in {gpt for model in models for gpt in gpts_in(model)}:
        gpt.recompute = recompute
        for block in gpt.blocks if compiled else []:
            block.compile(dynamic=True)
        if compiled and gpt.wte.weight.device.type != "cpu":
            gpt.decoder = decode.Decoder(gpt)


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
        for name, p in module.named_parameters():
            if p.dim() == 2 and ".lora_" not in name:
                p.data = p.data.to(dtype)


def set_up(model: nn.Module, config: Any, run: Any) -> None:
    """Move a model that is to be trained to the device, and do to it what the options say."""
    prepare(config, run, [model], [], keep_dropout=True)


def prepare(
    config: Any, run: Any, trained: list[nn.Module], frozen: list[nn.Module], keep_dropout: bool = False
) -> None:
    """Move all models to the device, without dropout [D5]; freeze what is not trained, and hold it once.

    With --shard each rank keeps its part of every model; what two models share is then held twice."""
    dtype, place = run.frozen_dtype, "cpu" if config.shard else run.device
    for model in trained:
        choose_trained((model if keep_dropout else disable_dropout(model)).to(place), config, dtype)
    for model in frozen:
        disable_dropout(model.to(place)).requires_grad_(False)
        if config.lora:
            store(model, dtype)
        elif config.train_layers is not None:
            train_last(model, 0, dtype)
        store_blocks(model, dtype)
    share_frozen([*trained, *frozen])
    if config.shard:
        writes = run.stage == "ppo" or any(getattr(config, name, 0) for name in ("samples", "online"))
        shard.shard(run.machine, trained, frozen, run.precision, writes)
    run_blocks(trained, config.gradient_checkpointing, config.compile)
