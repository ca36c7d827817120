"""Atomic, pickle-free checkpoints with checksums, and exact resume [D21].  A run's folder OUT holds:

step-000120/    model.safetensors, config.json, tokenizer.*, metrics.jsonl so far;
                to resume: trainer.safetensors, trainer.json; SHA256SUMS of what is small
latest, best    links to whole step folders; `latest` is flipped last
config.json ... links through `latest`: OUT itself reads as a checkpoint folder

support/weights.py reads these files.  With adapters (lora.py) a checkpoint holds what is not its base's.

python -m minirlhf.checkpoint import SRC OUT     real weights become a checkpoint
python -m minirlhf.checkpoint export CKPT OUT    a checkpoint becomes a folder that transformers loads
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from minirlhf import UserError
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.support import fit, steps
from minirlhf.support.about import describe, settings_of  # noqa: F401
from minirlhf.support.layout import recorded, set_layout
from minirlhf.support.weights import (  # noqa: F401
    DAMAGED,
    base_of,
    fingerprint,
    load_config,
    load_state,
    load_trainer,
    resolve,
)
from minirlhf.tokenizer import Tokenizer


def save(
    out: Path,
    step: int,
    state: dict[str, Tensor],
    config: dict,
    tokenizer: Tokenizer,
    trainer: dict | None = None,
    best: bool = False,
) -> Path:
    """Write OUT/step-XXXXXX, make `latest` (and `best`) lead there, remove other steps -> the folder.

    Killed at any moment it leaves the old checkpoint or the new one, whole; where the disk is full it leaves
    the old one and raises UserError.  `trainer`: {'tensors': dict, 'state': for JSON, 'files': to move here}.
    """

    def write(new: Path) -> None:
        parts = [("model", state, "config.json", config)]
        if trainer:
            parts.append(("trainer", trainer["tensors"], "trainer.json", trainer["state"]))
        for name, tensors, json_file, document in parts:
            digest = steps.write_tensors(tensors, new / f"{name}.safetensors")
            (new / json_file).write_text(
                json.dumps(document | {"sha256": digest}, indent=1), encoding="utf-8"
            )
        for file in trainer.get("files", []) if trainer else []:
            os.replace(file, new / file.name)
        tokenizer.save(new)
        if (Path(out) / "metrics.jsonl").is_file():
            shutil.copyfile(Path(out) / "metrics.jsonl", new / "metrics.jsonl")

    return steps.write_step(Path(out), step, write, best)


def check_tokenizer(config: dict, tokenizer: Tokenizer) -> None:
    """UserError unless `tokenizer` is the one that the checkpoint with this config was trained with."""
    recorded = config.get("tokenizer")
    if not isinstance(recorded, dict) or recorded.get("hash") != tokenizer.hash:
        raise UserError("tokenizer does not match the checkpoint: use the one in the checkpoint's own folder")


def tokenizer_of(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which lays conversations out as its config.json records."""
    config, tokenizer = load_config(path), Tokenizer.load(resolve(path))
    check_tokenizer(config, tokenizer)
    set_layout(tokenizer, recorded(config, path))
    return tokenizer


def shape_of(path: str | Path) -> GPTConfig:
    """The GPTConfig of a checkpoint; UserError for a damaged one."""
    shape = load_config(path).get("model")
    try:
        return GPTConfig(**shape)
    except (TypeError, UserError) as error:
        reason = str(error).replace("GPTConfig.__init__() ", "").removeprefix("model: ")
        raise UserError(f"{path}/config.json: model: {reason}: {DAMAGED}") from None


def load_gpt(path: str | Path, **changes: Any) -> GPT:
    """The language model of a checkpoint, on the CPU, with changes to its GPTConfig (dropout, say)."""
    if "head" in load_config(path):
        raise UserError(f"{path}: a reward model: name a language model, or an imported encoder")
    config = dataclasses.replace(shape_of(path), **changes)
    return fit.filled(lambda: GPT(config), config.n_layer, load_state(path), path)


def writer(path: str | Path) -> tuple[Path, dict, Tokenizer]:
    """(folder, config.json, tokenizer) of a checkpoint that can write text; UserError for any other."""
    folder = resolve(path)
    config = load_config(folder)
    if "head" in config or not shape_of(folder).reads_prefixes:
        stage = config.get("stage")
        raise UserError(
            f"{path}: a {stage} checkpoint writes no text: "
            f"name one of train_sft.py, train_ppo.py or train_dpo.py"
        )
    return folder, config, tokenizer_of(folder)


def load_reward(path: str | Path) -> tuple[RewardEnsemble, Tokenizer]:
    """The reward model of a checkpoint, on the CPU and without dropout, and its tokenizer."""
    about = load_config(path)
    if "head" not in about:
        named = f"{path}: a {about.get('stage')} checkpoint, not a reward model"
        raise UserError(f"{named}: name one of train_rm.py or train_dpo.py")
    head, config = fit.head_of(about, path), shape_of(path)
    build = lambda: RewardEnsemble(config, **head)
    model = fit.filled(build, config.n_layer * head["members"], load_state(path), path)
    return model.eval(), tokenizer_of(path)


if __name__ == "__main__":
    runpy.run_module("minirlhf.interop.command", run_name="__main__", alter_sys=True)
