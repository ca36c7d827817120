"""What the two commands share: mistakes in one line, options, and things named as package.module:name."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, NoReturn


class Mistake(Exception):
    """The user's mistake: one line that names the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (see {self.prog} --help)")


def number(least: int, most: int = 2**31 - 1):
    """The `type` of an option that takes an integer from `least` to `most`."""

    def integer(text: str) -> int:
        value = int(text) if text.strip().lstrip("-").isdecimal() and len(text) < 20 else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {text!r}")
        return value

    return integer


def describe(error: BaseException) -> str:
    """The exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) < 300 else text[:300] + " ..."
    return text if type(error) is AssertionError else f"{type(error).__name__}: {text}"


def find(target: str) -> Any:
    """What package.module:name names. Raises Mistake if it cannot be imported."""
    module, _, path = target.partition(":")
    if not module or not path:
        raise Mistake(f"{target!r} is not of the form package.module:name")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        where = "run this command in the folder of its package, or install the package"
        raise Mistake(f"cannot import {module} ({describe(error)}): {where}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise Mistake(f"{module} has no {path}: check the spelling")
        found = getattr(found, name)
    return found
