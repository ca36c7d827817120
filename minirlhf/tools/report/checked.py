"""Files of a run that may come from somebody else: every value is checked before it is used.

A value of the wrong kind is a UserError of one line that names the file and the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from minirlhf import UserError


def read(file: Path) -> str:
    """A file's text; "" where there is no such file."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def parse(text: str, where: str) -> dict[str, Any]:
    """The object in a JSON text; UserError, with `where`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): run the command that wrote it again") from None
    return object_of(found, where)


def refuse(where: str, wanted: str, value: Any) -> NoReturn:
    found = {dict: "an object", list: "a list"}.get(type(value)) or f"{value!r:.60}"
    raise UserError(f"{where}: expected {wanted}, found {found}: run the command that wrote it again")


def object_of(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else refuse(where, "an object", value)


def list_of(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else refuse(where, "a list", value)


def text_of(value: Any, where: str) -> str:
    return value if isinstance(value, str) else refuse(where, "text", value)


def number_of(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # nan is refused, too
        refuse(where, "a number", value)
    return value
