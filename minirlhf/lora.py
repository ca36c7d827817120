"""LoRA: two thin matrices beside every frozen one of a GPT's blocks (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + (alpha / r) B A x        A [r, in] random, B [out, r] zero at first

W and b belong to the base, the model before tuning, and stay as they are.  Only A, B and a head are trained.
A new adapter changes nothing: the base is the policy without its adapters, and so the reference [D31].
Models that grew from one base hold its weights once (support/prepare.py), and a checkpoint holds what is not
the base's.

The factor 1 / r keeps the size of an update, and so the best learning rate, about the same for every rank.
That rate is some ten times the one for training all weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import UserError


class LoRALinear(nn.Linear):
    """A linear layer whose own weights are frozen, with an adapter beside them."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.scale * self.lora_b)


def attach(gpt: nn.Module, rank: int, alpha: float, layers: int | None = None) -> None:
    """Freeze a GPT, and put new adapters beside the linear layers of its last `layers` blocks (None: all)."""
    if rank > gpt.config.n_embd:
        raise UserError(f"--lora {rank}: the model has {gpt.config.n_embd} channels: choose a smaller rank")
    gpt.requires_grad_(False)
    gpt.config = dataclasses.replace(gpt.config, lora_rank=rank, lora_alpha=alpha, lora_layers=layers)
    blocks = gpt.blocks if layers is None else gpt.blocks[-layers:]
    replace_layers(blocks, nn.Linear, lambda layer: LoRALinear(layer, rank, alpha))


def replace_layers(blocks: nn.ModuleList, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put make(layer) in the place of every layer of this kind in the blocks."""
    for block in blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, kind):
                setattr(block, name, make(layer))


def merged_state(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state of a model without adapters that computes the same: W + (alpha / r) B A for each W."""
    found = {name: weight for name, weight in state.items() if ".lora_" not in name}
    for name, b in state.items():
        if name.endswith(".lora_b"):
            layer = name.removesuffix("lora_b")
            a, weight = state[layer + "lora_a"], found[layer + "weight"]
            found[layer + "weight"] = weight.float() + alpha / len(a) * b @ a
    return found
