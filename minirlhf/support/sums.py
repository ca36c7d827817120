"""SHA256SUMS: the checksums of a step folder's small files, so that damage to any of them is noticed.

config.json and trainer.json are among them, and hold the checksums of the tensors.  Folders without the file
are read as they are: older checkpoints, and files that somebody put together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support import files
from minirlhf.support.files import sha256_of

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """List the files in a folder, but for tensors, as `sha256sum -c` reads them."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors")
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def agrees(file: Path) -> bool:
    """Whether a file is as it was when its folder was written, as far as anybody knows."""
    sums = file.with_name(NAME)
    try:
        lines = sums.read_bytes().splitlines() if sums.is_file() else []
        known = {name: digest for digest, _, name in (line.partition(b"  ") for line in lines)}
        digest = known.get(file.name.encode())
        return digest is None or not file.is_file() or digest == sha256_of(file).encode()
    except OSError:
        return False


def check(file: Path) -> None:
    """UserError where a file is not the one that its folder was written with."""
    if not agrees(file):
        raise UserError(
            f"{file}: damaged: its checksum is not the one in {NAME} beside it: take another step folder or "
            f"train again; if you changed the file yourself, delete {NAME}"
        )


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in one of a step folder's JSON files; UserError for a damaged or missing one."""
    check(file)
    return files.read_json(file, remedy)
