"""Reading the files of a checkpoint: its folder, config.json and tensors, whose checksums are compared."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minirlhf import UserError
from minirlhf.support import origin, steps
from minirlhf.support.files import sha256_of
from minirlhf.support.fit import DAMAGED, head_of
from minirlhf.support.sums import read_json


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
    if found := steps.whole_steps(Path(path)):
        raise UserError(
            f"{path}: holds {found[-1]} but no link `latest`: name {path}/{found[-1]}, or make the link"
        )
    raise UserError(f"{path}: no checkpoint here (no config.json, no latest): {remedy}")


def load_config(path: str | Path) -> dict:
    """config.json of the checkpoint at `path`: a run's folder, a step folder or a link to one."""
    return read_json(resolve(path) / "config.json", DAMAGED)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of the checkpoint at `path`, on the CPU, after their checksum was compared.

    Beside adapters they are those of the base, which the checkpoint names by its checksum."""
    folder = resolve(path)
    config = load_config(folder)
    state = _tensors(folder / "model.safetensors", config.get("sha256"))
    base = resolve(base_of(folder))
    if base == folder:
        return state
    weights = _tensors(base / "model.safetensors", load_config(base).get("sha256"))
    return {f"{place}{name}": weight for place in _trunks(config) for name, weight in weights.items()} | state


def base_of(path: str | Path) -> Path:
    """The checkpoint whose weights stay as they are where adapters are trained beside those of `path`."""
    folder = resolve(path)
    if not origin.names(load_config(folder), "base"):
        return folder
    return origin.find(folder, "base", fingerprint, "its adapters fit no other weights: put it back")


def _trunks(config: dict) -> list[str]:
    """The names of the GPTs in a checkpoint's model, as prefixes of their weights."""
    members = head_of(config, "")["members"] if "head" in config else 0
    return [f"members.{k}.backbone." for k in range(members)] or [""]


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
