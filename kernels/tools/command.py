"""What the two commands share: the user's mistake and Ctrl-C end them in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Mistake(Exception):
    """The user's mistake: one line that names the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises Mistake, also for an empty argument."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *args], args, strict=False):
            if not word or word.startswith("--") and word.partition("=")[1:] == ("=", ""):
                raise Mistake(f"{word.strip('=') or before}: its value is empty; is a shell variable unset?")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (--help lists every option)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r:.40}") from None
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text:.40}")
        return value

    return parse


def describe(error: BaseException) -> str:
    """The exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) < 300 else text[:300] + " ..."
    return text if type(error) is AssertionError else f"{type(error).__name__}: {text}"


def find(target: str, what: str = "name") -> Any:
    """What package.module:name names. Raises Mistake if it names nothing."""
    module, _, path = target.partition(":")
    if not module or not path:
        raise Mistake(f"{target!r} is not of the form package.module:{what}")
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


def run(name: str, main: Callable[[], int]) -> int:
    """main()'s exit code; 2, and one line on standard error, after a Mistake."""
    try:
        return main()
    except Mistake as mistake:
        line = " ".join(str(mistake).split())
        print(f"{name}: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
        return 2


def run_module(name: str) -> None:
    """Run a module of this folder as the command of its front."""
    end_on_ctrl_c()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def end_on_ctrl_c() -> None:
    """From here on Ctrl-C ends the process at once, with one line and exit code 130.

    A KeyboardInterrupt would be swallowed by a module that is being imported, or by a function under test.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(signum: int, frame: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)
