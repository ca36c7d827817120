"""What the commands of this folder share: a mistake of the user's, and Ctrl-C, end in one line."""

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
    """A mistake of the user's: one line, with the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse's parser whose mistakes are a Mistake; an empty argument is one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *args], args, strict=False):
            if not word or word.startswith("--") and word.partition("=")[1:] == ("=", ""):
                raise Mistake(f"{word.strip('=') or before}: its value is empty; is a shell variable unset?")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (--help lists every option)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for add_argument: a whole number from low to high."""

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


def find(target: str, what: str = "name") -> Any:
    """What `package.module:name` names.  Raises Mistake where it names nothing."""
    module, _, path = target.partition(":")
    if not module or not path:
        raise Mistake(f"{target!r} is not of the form package.module:{what}")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Mistake(f"cannot import {module} ({reason}): run this where it lies, or install it") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise Mistake(f"{module} has no {path}: is it spelled so?")
        found = getattr(found, name)
    return found


def run(name: str, main: Callable[[], int]) -> int:
    """main() -> its exit code; 2 for a mistake of the user's, in one line on stderr."""
    try:
        return main()
    except Mistake as mistake:
        line = " ".join(str(mistake).split())
        print(f"{name}: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
        return 2


def run_module(name: str) -> None:
    """Run a module of this folder as the command that its front is."""
    end_on_ctrl_c()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def end_on_ctrl_c() -> None:
    """From here on Ctrl-C ends the process at once, with one line and exit code 130.

    An exception would be lost where it is raised while a module is imported, or in a function under test.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(signum: int, frame: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)
