"""A run's folder: step folders that are whole, and links that flip at once.

Killed at any moment, a folder holds the old step or the new one, and every link leads to a whole step.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minirlhf import UserError
from minirlhf.support import sums
from minirlhf.support.files import fsync, sha256_of

OURS = re.compile(r"step-\d+|\.step-\d+\.[0-9a-f]{8}(\.old|\.gone)?|\.gone-step-[0-9a-f]{8}")  # folders
LINKED = (
    "model.safetensors",
    "config.json",
    "tokenizer.tiktoken",
    "tokenizer.json",
)  # OUT reads as a checkpoint


def write_step(out: Path, step: int, write: Callable[[Path], None], best: bool = False) -> Path:
    """Make OUT/step-XXXXXX of what write(folder) writes, flip `best` and `latest`, remove the other steps ->
    the folder.

    Raises UserError, and leaves the old checkpoint whole, where the disk is full or the folder cannot be
    written.
    """
    name = f"step-{step:06d}"
    new = out / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        new.mkdir(parents=True)
        write(new)
        sums.write(new)
        for path in [*new.iterdir(), new]:
            fsync(path)
        if not os.path.lexists(out / "latest"):  # the first step: its folder and its links appear at once
            for link in ["best", "latest"] if best else ["latest"]:
                point(out, link, name)
        _replace(out, name, new)
        if best:
            point(out, "best", name)
        for file in LINKED:
            if (out / name / file).exists():  # WordPiece has no ranks
                point(out, file, f"latest/{file}")
        point(out, "latest", name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{out}: the checkpoint of step {step} cannot be written ({reason}): make room"
        ) from None
    sweep(out)
    return out / name


def write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a .safetensors file -> the sha256 of its bytes."""
    save_file(_apart(tensors), path, {"format": "pt"})  # transformers looks for this tag
    return sha256_of(path)


def _replace(out: Path, name: str, new: Path) -> None:
    """Make `new` the folder OUT/name.  Links that lead to an old folder of that name never lead nowhere."""
    final = out / name
    if not final.exists():
        os.rename(new, final)
        fsync(out)  # the name reaches the disk before a link that leads to it
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
    fsync(out)
    for link in followers:
        point(out, link, name)


def _step_of(out: Path, link: str) -> str:
    """'step-000120' for a link that leads to that folder, or to a stand-in for it such as
    .step-000120.1a2b3c4d.old."""
    return (out / link).resolve().name.removeprefix(".").partition(".")[0]


def sweep(out: Path) -> None:
    """Remove every step folder that no link leads to, and what killed saves left behind."""
    linked = {(out / link).resolve().name for link in ("best", "latest")}
    ours = [path for path in out.glob("*step-*") if OURS.fullmatch(path.name) and path.is_dir()]
    for path in [path for path in ours if path.name not in linked]:
        # Renamed first: a folder that bears a step's name is whole.
        shutil.rmtree(path.rename(out / f".gone-step-{uuid.uuid4().hex[:8]}"), ignore_errors=True)
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)


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
    sweep(out)


def whole_steps(out: Path) -> list[str]:
    """Names of the step folders in OUT, oldest first."""
    names = [p.name for p in out.glob("step-*") if (p / "config.json").is_file() and p.name[5:].isdigit()]
    return sorted(names, key=lambda name: int(name[5:]))
