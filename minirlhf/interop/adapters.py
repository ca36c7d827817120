"""Adapters as the `peft` library stores them: a small folder that goes with the base model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from minirlhf import UserError, checkpoint
from minirlhf.interop.convert import family_of, layout, new_folder
from minirlhf.interop.families import BERT


def export(source: Path, out: Path) -> str:
    """Write OUT, a folder for peft, from a language model's checkpoint with adapters -> what it holds.

    Where several matrices of theirs are one of ours (q, k and v), theirs get equal A and their rows of B.
    """
    about, config = checkpoint.load_config(source), checkpoint.shape_of(source)
    family = family_of(source, about, config)
    if not config.lora_rank:
        raise UserError(f"{source}: has no adapters: export it without --adapters")
    if "head" in about or family is BERT:
        raise UserError(f"{source}: --adapters is for language models: without it, adapters are merged")
    base, state = checkpoint.base_of(source), checkpoint.load_state(source)
    tensors, modules = {}, set()
    for ours, parts in layout(config, family.tensors).items():
        module, _, kind = ours.rpartition(".")
        if kind != "weight" or f"{module}.lora_a" not in state:
            continue
        rows = state[f"{module}.lora_b"].split([out_features for _, (out_features, _) in parts])
        for (theirs, _), b in zip(parts, rows, strict=True):
            name = theirs.removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            full = f"base_model.model.{family.prefix}{name}"
            tensors[f"{full}.lora_A.weight"] = state[f"{module}.lora_a"].clone()
            tensors[f"{full}.lora_B.weight"] = b.contiguous().clone()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family.transposed,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    if config.lora_layers:
        settings["layers_to_transform"] = [*range(config.n_layer - config.lora_layers, config.n_layer)]
    with new_folder(out) as new:
        new.mkdir()
        (new / "adapter_config.json").write_text(json.dumps(settings, indent=1))
        save_file(tensors, new / "adapter_model.safetensors", {"format": "pt"})
    return f"adapters of rank {config.lora_rank}, for a {family.classes[0]} such as an export of {base}"
