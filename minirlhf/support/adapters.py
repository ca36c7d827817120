"""What stages and checkpoints do with the adapters of lora.py: make, merge, and tell them from their base."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from minirlhf import UserError, lora


def adapt(gpt: nn.Module, rank: int | None, alpha: float, layers: int | None) -> None:
    """Give the last `layers` blocks (None: all) of a GPT that is to be trained new adapters, keep those that
    it has, or for rank None merge them."""
    config, layers = gpt.config, None if layers == len(gpt.blocks) else layers
    has, last = config.lora_rank, config.lora_layers
    if has and rank and (has, config.lora_alpha, last) != (rank, alpha, layers):
        where = f"the last {last} layers (--train-layers {last})" if last else "all layers"
        raise UserError(
            f"--lora {rank} --lora-alpha {alpha:g}: the model has adapters of rank {has} and alpha "
            f"{config.lora_alpha:g} in {where}: give these, or drop --lora, which merges them into the "
            "weights"
        )
    if has and not rank:
        merge(gpt)
    elif rank and not has:
        lora.attach(gpt, rank, alpha, layers)


def merge(gpt: nn.Module) -> None:
    """Turn a GPT with adapters into one without, which computes the same; all its weights are trained."""
    state = lora.merged_state(gpt.state_dict(), gpt.config.lora_alpha)
    gpt.config = dataclasses.replace(gpt.config, lora_rank=0, lora_layers=None)
    lora.replace_layers(gpt.blocks, lora.LoRALinear, _plain)
    gpt.load_state_dict(state)
    gpt.requires_grad_(True)


def _plain(layer: lora.LoRALinear) -> nn.Linear:
    bias, device = layer.bias is not None, layer.weight.device
    return nn.Linear(layer.in_features, layer.out_features, bias, device=device)


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a model in two: what a checkpoint holds, and what the base of its adapters holds."""
    state, of_base = model.state_dict(), {}
    for prefix, gpt in model.named_modules():
        if hasattr(gpt, "blocks") and gpt.config.lora_rank:
            start = f"{prefix}." if prefix else ""
            names = [start + name for name in gpt.state_dict() if ".lora_" not in name]
            of_base |= {name: state.pop(name) for name in names}
    return state, of_base
