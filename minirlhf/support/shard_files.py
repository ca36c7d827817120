"""The trainer's state of a sharded run: one .safetensors file per rank, and their list in trainer.json.

    trainer-0-of-2.safetensors     the rows that rank 0 of 2 holds of each tensor (optimisers, value model)
    trainer.json                   "shards": {"files": {name: sha256}, "shapes": {tensor: its whole shape}}
    trainer.safetensors            what is not cut: Adam's step counts
    model.safetensors              whole, as every later stage reads it

Rank r of n holds rows r * ceil(N / n) to (r + 1) * ceil(N / n) of N.  So any number of ranks can read what
any other number wrote: each finds the rows it needs in one file or in several.

Why not torch.distributed.checkpoint?  Its index, .metadata, is a pickle, and reading one can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minirlhf import UserError
from minirlhf.support import steps
from minirlhf.support.files import fsync, sha256_of
from minirlhf.support.hardware import Machine
from minirlhf.support.shard import agree, local, rows
from minirlhf.support.weights import DAMAGED, load_trainer, resolve


def write(
    out: Path, step: int, tensors: dict[str, Tensor], machine: Machine
) -> tuple[dict[str, Tensor], dict[str, Any], list[Path]]:
    """Write this rank's pieces beside the step's folder -> (tensors that are not cut, `shards` of
    trainer.json, the files of all ranks, which are to move into the folder).

    All ranks take part.  Raises UserError on all of them where one cannot write."""
    cut = {name: x for name, x in tensors.items() if hasattr(x, "to_local")}
    folder = out / f".step-{step:06d}.{0:08x}"  # a name that steps.sweep knows
    names = [f"trainer-{rank}-of-{machine.world}.safetensors" for rank in range(machine.world)]

    def write_mine() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            digest = steps.write_tensors({name: local(x) for name, x in cut.items()}, folder / mine)
            fsync(folder / mine)
            return digest
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / mine}: cannot be written ({reason}): make room") from None

    mine = names[machine.rank]
    digest = bytes.fromhex(agree(machine, write_mine))
    digests = torch.zeros(machine.world, len(digest), device=machine.device)
    digests[machine.rank] = torch.tensor([*digest], dtype=torch.float32)
    machine.sum_([digests])
    found = [bytes(map(int, row)).hex() for row in digests.tolist()]
    shapes = {name: list(x.shape) for name, x in cut.items()}
    whole = {name: x for name, x in tensors.items() if name not in cut}
    shards = {"files": dict(zip(names, found, strict=True)), "shapes": shapes}
    return whole, shards, [folder / name for name in names]


def read(path: str | Path, machine: Machine) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of the trainer in the checkpoint at `path`, sharded or not; empty where it has none.

    Of tensors that were cut: this rank's pieces if the machine is sharded, else whole tensors.  Raises
    UserError where a file is missing or damaged."""
    tensors, state = load_trainer(path) or ({}, {})
    if "shards" not in state:
        return tensors, state
    folder = resolve(path)
    files, shapes = _checked(state["shards"], folder / "trainer.json")
    found, opened = {}, {}
    try:
        for name, shape in shapes.items():
            start, stop = rows(shape[0], machine.rank, machine.world) if machine.sharded else (0, shape[0])
            parts = []
            for number, (file, sha256) in enumerate(files.items()):
                first, last = rows(shape[0], number, len(files))
                a, b = max(start, first), min(stop, last)
                if a < b or number == 0:  # the first file tells the dtype where no row is wanted
                    if file not in opened:
                        opened[file] = _open(folder / file, sha256)
                    parts.append(_rows_of(opened[file], name, shape, last - first, a - first, b - first))
            found[name] = torch.cat(parts)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: its trainer's files: {reason}: {DAMAGED}") from None
    return tensors | found, state


def _open(file: Path, sha256: str) -> Any:
    if sha256_of(file) != sha256:
        raise UserError(f"{file}: damaged: its checksum is not the one recorded beside it: {DAMAGED}")
    return safe_open(file, framework="pt")


def _rows_of(file: Any, name: str, shape: list[int], held: int, start: int, stop: int) -> Tensor:
    piece = file.get_slice(name)
    if piece.get_shape() != [held, *shape[1:]]:
        raise ValueError(f"{name} has the shape {piece.get_shape()}, not {[held, *shape[1:]]}")
    return piece[max(0, start) : max(0, start, stop)]


def _checked(shards: Any, where: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The lists of files and shapes in trainer.json, if they are such lists."""
    files, shapes = (shards.get(key) if isinstance(shards, dict) else None for key in ("files", "shapes"))
    good = isinstance(files, dict) and isinstance(shapes, dict) and len(files) > 0
    good = good and all(isinstance(sha256, str) for sha256 in files.values())
    expected = [f"trainer-{i}-of-{len(files)}.safetensors" for i in range(len(files))] if good else []
    numbers = lambda x: isinstance(x, list) and x and all(type(n) is int and 0 <= n < 2**48 for n in x)
    if not good or [*files] != expected or not all(map(numbers, shapes.values())):
        raise UserError(f"{where}: shards: not a list of one file per process, and shapes: {DAMAGED}")
    return files, shapes
