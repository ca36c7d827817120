"""Files that are whole or absent, their hashes, and a lock on a folder that dies with its process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minirlhf import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: readers see the old content or the new, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user asked for, whole or not at all; UserError where it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def fsync(path: Path) -> None:
    """Return once the disk has the file (or the folder's entries)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; a UserError that names the file and the remedy where there is none."""
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}): {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object: {remedy}")
    return found


def refuse_unwritable(folder: Path) -> None:
    """UserError where the folder is not there and cannot be made.  Nothing is left behind."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    for path in missing:
        with contextlib.suppress(OSError):  # another process uses it already
            path.rmdir()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be made or written ({error.strerror}): choose another --out")


LOCK = ".lock"  # in every folder that a run has used


class Lock:
    """One process per folder.  The lock is the kernel's: it goes when its process ends, however it ends."""

    def __init__(self, folder: Path):
        """Raises UserError where another process holds the folder, or where it cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / LOCK, "a")  # noqa: SIM115  (held until the process ends)
        except OSError as error:
            raise _unwritable(folder, error) from None
        with contextlib.suppress(ImportError):  # Windows has no fcntl: there the folder is not guarded
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.file.close()
                raise UserError(
                    f"{folder}: another process is at work here: wait for it, or choose another --out"
                ) from None

    def release(self) -> None:
        self.file.close()
