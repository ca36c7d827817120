"""RUN/why.json, as python -m minirlhf.why wrote it, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.tools.report.checked import list_of, number_of, object_of, parse, read, refuse, text_of

VERSION = 1  # of the file's format
WRITERS = ("sft", "ppo")
SCORES = ("score", "judge", "kl")
COLUMNS = (
    "replaced",
    "judge_replaced",
    "added",
    "nats",
    "advantage",
    "value",
    "entropy",
    "probability",
)
TEXTS = ("policy", "reward", "split", "left_out")
NUMBERS = ("seed", "prompts", "replacements")
MAX_CHARACTERS = 900_000  # of JSON on the page: what exceeds it is left out


def load(file: Path) -> dict[str, Any] | None:
    """What the page shows of why.json; None where there is no such file.

    Raises UserError, with the field, for a damaged file.
    """
    if not (text := read(file)):
        return None
    given = parse(text, str(file))
    if given.get("version") != VERSION:
        raise UserError(
            f"{file}: version: of another minirlhf: run python -m minirlhf.why {file.parent} again"
        )
    found: dict[str, Any] = {name: text_of(given.get(name), f"{file}: {name}") for name in TEXTS}
    found |= {name: number_of(given.get(name), f"{file}: {name}") for name in NUMBERS}
    for name in ("kl_coef", "beta"):
        if given.get(name) is not None:
            found[name] = number_of(given[name], f"{file}: {name}")
    samples = list_of(given.get("samples"), f"{file}: samples")
    found["samples"], size = [], 0
    for i, sample in enumerate(samples):
        row = _sample(sample, f"{file}: samples[{i}]")
        size += len(str(row))
        if size > MAX_CHARACTERS and found["samples"]:
            break
        found["samples"].append(row)
    found["left"] = len(samples) - len(found["samples"])
    return found


def _sample(value: Any, where: str) -> dict[str, Any]:
    given = object_of(value, where)
    row: dict[str, Any] = {"prompt": text_of(given.get("prompt"), f"{where}.prompt")}
    return row | {name: _text(given.get(name), f"{where}.{name}") for name in WRITERS}


def _text(value: Any, where: str) -> dict[str, Any]:
    """One text: n tokens, and lists of as many numbers."""
    given = object_of(value, where)
    tokens = [text_of(t, f"{where}.tokens") for t in list_of(given.get("tokens"), f"{where}.tokens")]
    n = len(tokens)
    columns = object_of(given.get("columns"), f"{where}.columns")
    found: dict[str, Any] = {"tokens": tokens, "ended": given.get("ended") is True, "columns": {}}
    found |= {
        name: number_of(given[name], f"{where}.{name}") for name in SCORES if given.get(name) is not None
    }
    for name in COLUMNS:
        if name in columns:
            at = f"{where}.columns.{name}"
            numbers = list_of(columns[name], at)
            if len(numbers) != n:
                refuse(at, f"{n} numbers, one per token", f"{len(numbers)}")
            found["columns"][name] = [None if x is None else number_of(x, at) for x in numbers]
    at = f"{where}.decisive"
    found["decisive"] = [number_of(i, at) for i in list_of(given.get("decisive"), at)]
    at = f"{where}.others"
    rows = list_of(given.get("others"), at)
    if len(rows) != n:
        refuse(at, f"{n} lists, one per token", f"{len(rows)}")
    found["others"] = [[_other(pair, at) for pair in list_of(row, at)] for row in rows]
    return found


def _other(value: Any, where: str) -> list[Any]:
    pair = list_of(value, where)
    if len(pair) != 2:
        refuse(where, "a token and its probability", pair)
    return [text_of(pair[0], where), number_of(pair[1], where)]
