"""Reward functions by name, called with care: they are other people's code, and may do anything.

A function of (prompts, responses) gets texts; one of (prompts, responses, rows) gets the data's own rows,
too.  Its attribute `fields`, such as ("answer",), says which fields of a row it reads: then a row without
them is refused before the run begins.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from minirlhf import UserError
from minirlhf.support.rows import MissingField, Needs, Reads, rows_of
from minirlhf.support.text import one_line

FOREIGN = (Exception, SystemExit, GeneratorExit)  # what code of others may raise; not Ctrl-C
Reward = Callable[..., list[float]]  # of (prompts, responses) or of (prompts, responses, rows)
SPEC = re.compile(r"(rm|(?!rm:)[\w.]+:\w+)(?::([-+]?(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?))?")


def load_rewards(specs: list[str]) -> list[tuple[str, Reward | None, float]]:
    """[(name, function, weight)] of `rm`, `rm:0.5`, `package.module:function`,
    `package.module:function:-0.5`.

    The weight is 1 unless given.  The function of `rm` is None: Scorer has the model.
    """
    rewards: list[tuple[str, Reward | None, float]] = []
    for spec in specs:
        if not (match := SPEC.fullmatch(spec)):
            form = "rm[:WEIGHT] or package.module:function[:WEIGHT], WEIGHT a number such as -0.5"
            raise UserError(f"--reward {one_line(spec, 60)}: want {form}")
        name, weight = match.groups(default="1")
        if abs(float(weight)) > 1e9:
            raise UserError(f"--reward {one_line(spec, 60)}: its weight must be at most 1e+09 in size")
        rewards.append((name, None if name == "rm" else find(name), float(weight)))
    return rewards


def find(name: str) -> Reward:
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except FOREIGN as error:  # whatever the user's module raises while it loads
        raise UserError(f"--reward {name}: {_reason(error)}; is {module} on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"--reward {name}: no such function in {module}; check the spelling")
    try:
        inspect.signature(found).bind([], [], *[[]] * takes_rows(found))
    except TypeError as error:
        wanted = "want a function of (prompts, responses) or of (prompts, responses, rows)"
        raise UserError(f"--reward {name}: {error}: {wanted}") from None
    except ValueError:  # some built-in functions have no signature to check
        pass
    return found


def takes_rows(function: Reward) -> bool:
    """Whether a function wants a third argument: it requires one, or names its third parameter `rows`."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return any(p.default is p.empty or p.name == "rows" for p in third)


def fields_read(rewards: list[tuple[str, Reward | None, float]]) -> Reads:
    """What the functions that take rows read of them: for data.load().  () where none of them does."""
    return tuple(Needs.of(name, f) for name, f, _ in rewards if f is not None and takes_rows(f))


def call(
    function: Reward,
    prompts: list[str],
    responses: list[str],
    name: str = "",
    records: Sequence[Any] | None = None,
) -> list[float]:
    """The function's rewards, checked: one finite number per response, else a UserError that names function
    and row.

    records: those of the prompts, for a function that takes rows.  The function gets copies: what it does to
    its arguments, now or later, changes nothing here.
    """
    name = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
    rows = [rows_of(records, name, len(prompts))] if takes_rows(function) else []
    try:
        result = function(list(prompts), list(responses), *rows)
    except MissingField as error:
        raise UserError(f"{error}, which --reward {name} reads") from error
    except UserError as error:
        raise UserError(f"--reward {name}: {error}") from error
    except FOREIGN as error:
        raise UserError(f"--reward {name} failed: {_reason(error)}") from error
    if isinstance(result, str | bytes | dict | set | frozenset):
        raise UserError(
            f"--reward {name}: returned {type(result).__name__}, not a list of {len(responses)} numbers"
        )
    try:
        numbers = iter(result)
    except FOREIGN:
        raise UserError(f"--reward {name}: returned {type(result).__name__}, not a list of numbers") from None
    try:
        values = list(itertools.islice(numbers, len(responses) + 1))  # a generator may have no end
    except FOREIGN as error:
        raise UserError(f"--reward {name} failed: {_reason(error)}") from error
    if len(values) != len(responses):
        count = len(values) if len(values) < len(responses) else f"more than {len(responses)}"
        raise UserError(f"--reward {name}: returned {count} numbers for {len(responses)} responses")
    return [_finite(value, name, row, responses[row]) for row, value in enumerate(values)]


def _finite(value: object, name: str, row: int, response: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # whatever the user's own type of number raises
        number = math.nan
    if not math.isfinite(number):
        got, text = _shown(value), _shown(response)
        raise UserError(f"--reward {name}: row {row}: {got} is not a finite number (response {text})")
    return number


def _shown(value: object) -> str:
    try:
        return one_line(f"{value!r:.40}")
    except Exception:
        return type(value).__name__


def _reason(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())
    except FOREIGN:  # an error whose text cannot be made
        words = "no reason given"
    return one_line(f"{type(error).__name__}: {words}")
