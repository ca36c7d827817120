"""Atomic, pickle-free checkpoints with checksums, and exact resume [D21].  A run's folder OUT holds:

step-000120/   model.safetensors, config.json, tokenizer.*, metrics.jsonl so far; to resume: trainer.safetensors, .json
latest, best   relative symlinks to whole step folders, so that OUT can be moved; `latest` is flipped last
config.json …  links through `latest`: OUT itself reads as a checkpoint folder

    python -m minirlhf.checkpoint import SRC OUT     real weights become a checkpoint
    python -m minirlhf.checkpoint export CKPT OUT    a checkpoint becomes a folder that transformers loads
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from minirlhf import UserError
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.support.files import fsync, read_json, sha256_of
from minirlhf.support.hardware import versions
from minirlhf.tokenizer import Tokenizer

LAYOUT = "hh-rlhf"  # how conversations become text; recorded, so that a later stage can refuse another one
DAMAGED = "take another step folder or train again"


def describe(
    stage: str, shape: GPTConfig, config: Any, step: int, complete: bool, tokenizer: Tokenizer, **more: Any
) -> dict:
    """A checkpoint's config.json: everything that is needed to load the model and to know where it came from."""
    return {
        "stage": stage,
        "model": dataclasses.asdict(shape),
        "training": settings_of(config),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "layout": LAYOUT,
        "step": step,
        "complete": complete,
        "versions": versions(),
    } | more


def settings_of(config: Any) -> dict[str, Any]:
    """A dataclass of options as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


# ------------------------------------------------------------------------------------------------- writing


def save(
    out: Path,
    step: int,
    state: dict[str, Tensor],
    config: dict,
    tokenizer: Tokenizer,
    trainer: dict | None = None,
    best: bool = False,
) -> Path:
    """Write OUT/step-XXXXXX, flip `best` (if it is the best) and `latest`, then remove the other steps -> the folder.

    Killed at any moment it leaves the old checkpoint or the new one, whole; where the disk is full it leaves the old one
    and raises UserError.  `trainer`: {'tensors': dict, 'state': for JSON}.
    """
    out, name = Path(out), f"step-{step:06d}"
    new = out / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        new.mkdir(parents=True)
        _write(new, state, config, tokenizer, trainer)
        if (out / "metrics.jsonl").is_file():
            shutil.copyfile(out / "metrics.jsonl", new / "metrics.jsonl")
        for path in [*new.iterdir(), new]:
            fsync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{out}: the checkpoint of step {step} cannot be written ({reason}): make room"
        ) from None
    _replace(out, name, new)
    if best:
        point(out, "best", name)
    for file in ("model.safetensors", "config.json", "tokenizer.tiktoken", "tokenizer.json"):
        if (out / name / file).exists():  # WordPiece has no ranks
            point(out, file, f"latest/{file}")
    point(out, "latest", name)
    sweep(out)
    return out / name


def _write(new: Path, state: dict, config: dict, tokenizer: Tokenizer, trainer: dict | None) -> None:
    """The files of one checkpoint; each JSON file holds the checksum of the tensors beside it."""
    parts = [("model.safetensors", state, "config.json", config)]
    if trainer:
        parts.append(("trainer.safetensors", trainer["tensors"], "trainer.json", trainer["state"]))
    for tensor_file, tensors, json_file, document in parts:
        save_file(_apart(tensors), new / tensor_file, {"format": "pt"})  # transformers looks for this tag
        document = document | {"sha256": sha256_of(new / tensor_file)}
        (new / json_file).write_text(json.dumps(document, indent=1), encoding="utf-8")
    tokenizer.save(new)


def _replace(out: Path, name: str, new: Path) -> None:
    """Make `new` the folder OUT/name.  Links that lead to an old folder of that name never lead nowhere."""
    final = out / name
    if not final.exists():
        os.rename(new, final)
        return
    # One folder cannot replace another at once: the links lead to a copy made of hard links meanwhile.
    followers = [
        link for link in ("best", "latest") if (out / link).is_symlink() and _step_of(out, link) == name
    ]
    shutil.copytree(final, f"{new}.old", copy_function=os.link)
    for link in followers:
        point(out, link, f"{new.name}.old")
    os.rename(final, f"{new}.gone")
    os.rename(new, final)
    for link in followers:
        point(out, link, name)


def _step_of(out: Path, link: str) -> str:
    """'step-000120' for a link that leads to that folder, or to a stand-in for it such as .step-000120.1a2b3c4d.old."""
    return (out / link).resolve().name.removeprefix(".").partition(".")[0]


def sweep(out: Path) -> None:
    """Remove every step folder that no link leads to, and what killed saves left behind."""
    linked = {(out / link).resolve().name for link in ("best", "latest")}
    for path in [path for path in out.glob("*step-*") if path.is_dir() and path.name not in linked]:
        # Renamed first: a folder that bears a step's name is whole.
        shutil.rmtree(path.rename(out / f".gone-step-{uuid.uuid4().hex[:8]}"), ignore_errors=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and on the CPU; copied only where memory is shared, which safetensors refuses.

    A copy of all optimisers' states would be a run's peak of memory.
    """
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.nbytes
        found[name] = value.clone() if shared else value
        seen.add(storage.data_ptr())
    return found


def point(out: Path, name: str, target: int | str) -> None:
    """Make the symlink OUT/name lead to the saved step `target`, or to a relative path, at once.

    A folder in the link's place (a copy of OUT made with links followed) is moved away first.
    """
    link, temporary = Path(out, name), Path(out, f".{name}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(f"step-{target:06d}" if isinstance(target, int) else target, temporary)
    _move_away(link)
    os.replace(temporary, link)
    fsync(Path(out))


def _move_away(link: Path) -> None:
    if link.is_dir() and not link.is_symlink():
        link.rename(link.with_name(f".gone-step-{uuid.uuid4().hex[:8]}"))


def forget(out: Path) -> None:
    """A run starts again in OUT: from here on nothing of the old one can be taken for it."""
    for name in ("latest", "best"):
        _move_away(out / name)
        (out / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- reading


def resolve(path: str | Path, remedy: str = "train that stage first or fix the path") -> Path:
    """The folder of one checkpoint: where `latest` leads if `path` is a run's folder, else `path` itself."""
    for folder in Path(path) / "latest", Path(path):
        if (folder / "config.json").is_file():
            folder = folder.resolve()
            if "model_type" in read_json(folder / "config.json", DAMAGED):
                raise UserError(
                    f"{path}: a Hugging Face folder: python -m minirlhf.checkpoint import {path} OUT"
                )
            return folder
    if steps := whole_steps(Path(path)):
        raise UserError(
            f"{path}: holds {steps[-1]} but no link `latest`: name {path}/{steps[-1]}, or make the link"
        )
    raise UserError(f"{path}: no checkpoint here (no config.json, no latest): {remedy}")


def whole_steps(out: Path) -> list[str]:
    """Names of the step folders in OUT, oldest first."""
    names = [p.name for p in out.glob("step-*") if (p / "config.json").is_file() and p.name[5:].isdigit()]
    return sorted(names, key=lambda name: int(name[5:]))


def load_config(path: str | Path) -> dict:
    """config.json of the checkpoint at `path`: a run's folder, a step folder or a link to one."""
    return read_json(resolve(path) / "config.json", DAMAGED)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of the checkpoint at `path`, on the CPU, after their checksum was compared."""
    folder = resolve(path)
    return _tensors(folder / "model.safetensors", read_json(folder / "config.json", DAMAGED).get("sha256"))


def load_trainer(path: str | Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and the state that `save` was given as `trainer`; None if it was given none."""
    file = resolve(path) / "trainer.json"
    if not file.exists():
        return None
    state = read_json(file, DAMAGED)
    return _tensors(file.with_suffix(".safetensors"), state.get("sha256")), state


def _tensors(file: Path, sha256: str | None) -> dict[str, Tensor]:
    try:
        if sha256 is not None and sha256_of(file) != sha256:
            raise UserError(f"{file}: damaged: its checksum is not the one recorded beside it: {DAMAGED}")
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        reason = (
            str(error).splitlines()[0] if file.exists() else "missing (a pickle, .bin or .pt, is never read)"
        )
        raise UserError(f"{file}: {reason}: {DAMAGED}") from error


def fingerprint(path: str | Path) -> str:
    """The checksum of a checkpoint's weights, by which a later stage knows what it started from."""
    folder = resolve(path)
    return load_config(folder).get("sha256") or sha256_of(folder / "model.safetensors")


def refuse_stale(path: str | Path, name: str, source: str | Path) -> None:
    """UserError where the checkpoint at `path` started from the folder `source`, which was trained again since."""
    inputs = load_config(path).get("inputs", {})
    before, now = inputs.get(name), fingerprint(source)
    if (
        before is None
        or before == now
        or Path(inputs[f"{name}_path"]).resolve().parent != resolve(source).parent
    ):
        return
    raise UserError(
        f"{path} was trained from {source} as it was before (sha256 {before[:12]}, now {now[:12]}): "
        f"train it again, or give another checkpoint"
    )


def check_tokenizer(config: dict, tokenizer: Tokenizer) -> None:
    """UserError unless `tokenizer` is the one that the checkpoint with this config was trained with."""
    if config.get("tokenizer", {}).get("hash") != tokenizer.hash:
        raise UserError("tokenizer does not match the checkpoint: use the one in the checkpoint's own folder")


def pack_optimizer(opt: Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """State of `opt` (AdamW: step, exp_avg, exp_avg_sq) as tensors '{prefix}{index}.{key}', all else for JSON."""
    state, groups = opt.state_dict()["state"], opt.state_dict()["param_groups"]
    tensors = {f"{prefix}{i}.{key}": value for i, slots in state.items() for key, value in slots.items()}
    return tensors, {"groups": groups, "keys": {i: list(slots) for i, slots in state.items()}}


def unpack_optimizer(opt: Optimizer, tensors: dict[str, Tensor], saved: dict, prefix: str) -> None:
    """Undo `pack_optimizer`, in an optimizer over the same parameters in the same order."""
    state = {int(i): {k: tensors[f"{prefix}{i}.{k}"] for k in keys} for i, keys in saved["keys"].items()}
    opt.load_state_dict({"state": state, "param_groups": saved["groups"]})


def shape_of(path: str | Path) -> GPTConfig:
    """The GPTConfig of a checkpoint; UserError for a damaged one."""
    shape = load_config(path).get("model")
    try:
        return GPTConfig(**shape)
    except TypeError as error:
        raise UserError(
            f"{path}/config.json: model: {str(error).replace('GPTConfig.__init__() ', '')}: {DAMAGED}"
        ) from None


def load_gpt(path: str | Path, **changes: Any) -> GPT:
    """The language model of an SFT or PPO checkpoint, on the CPU, with changes to its GPTConfig (dropout, say)."""
    return _fill(GPT(dataclasses.replace(shape_of(path), **changes)), path)


def writer(path: str | Path) -> tuple[Path, dict, Tokenizer]:
    """(folder, config.json, tokenizer) of a checkpoint that can write text; UserError for any other."""
    folder = resolve(path)
    config = load_config(folder)
    if "head" in config or not shape_of(folder).reads_prefixes:
        stage = config.get("stage")
        raise UserError(
            f"{path}: a {stage} checkpoint writes no text: name one of train_sft.py or train_ppo.py"
        )
    tokenizer = Tokenizer.load(folder)
    check_tokenizer(config, tokenizer)
    return folder, config, tokenizer


def load_reward(path: str | Path) -> tuple[RewardEnsemble, Tokenizer]:
    """The reward model of a checkpoint, on the CPU, and its tokenizer."""
    config = load_config(path)
    if "head" not in config:
        raise UserError(
            f"{path}: a {config.get('stage')} checkpoint, not a reward model: name one made by train_rm.py"
        )
    tokenizer = Tokenizer.load(resolve(path))
    check_tokenizer(config, tokenizer)
    return _fill(RewardEnsemble(shape_of(path), **config["head"]), path), tokenizer


def _fill(model: Module, path: str | Path) -> Module:
    try:
        model.load_state_dict(load_state(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: weights do not fit config.json: {str(error).splitlines()[1].strip()}"
        ) from None
    return model


if __name__ == "__main__":
    runpy.run_module("minirlhf.interop.command", run_name="__main__", alter_sys=True)
