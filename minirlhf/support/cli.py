"""Command lines: options whose ranges are checked when they are parsed, and one line for every mistake.

A number's range is part of its type, so that no script has to check it again:

    lr: Above0 = 1e-3          # Annotated[float, Range(above=0)]
    epochs: Count = 6          # Annotated[int, Range(1, 10**9)]

`parse_config` reads a dataclass of such options from the command line; `Parser` is argparse's, for the tools.
Both refuse a bad value with a UserError before anything is read or written.

Exit codes: 0 done; 2 a mistake of the user's; 130 stopped by Ctrl-C and 143 by SIGTERM; 1 a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import math
import re
import signal
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro

from minirlhf import Stopped, UserError

Config = TypeVar("Config")
HUGE = 10**9  # no count is larger: a list of so many entries would not fit in memory


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers an option accepts: low <= x <= high, and above < x, x < below where given.  Never nan or
    infinite."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, x: float) -> bool:
        return math.isfinite(x) and self.low <= x <= self.high and self.above < x < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(said) or "a finite number"


Count = Annotated[int, Range(1, HUGE)]
CountOr0 = Annotated[int, Range(0, HUGE)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Real = Annotated[float, Range(-1e30, 1e30)]
Above0 = Annotated[float, Range(above=0, high=1e30)]
AtLeast0 = Annotated[float, Range(0, 1e30)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, below=1)]


def number(kind: Any) -> Callable[[str], float]:
    """A type for Parser.add_argument from one of the annotated types above: number(Count)."""
    base, accepted = typing.get_args(kind)

    def parse(text: str) -> float:
        try:
            value = base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {_noun(base)}, not {text!r}") from None
        if value not in accepted:
            raise argparse.ArgumentTypeError(f"must be {accepted}, not {text}")
        return value

    return parse


def _noun(base: type) -> str:
    return "a whole number" if base is int else "a number"


class Parser(argparse.ArgumentParser):
    """argparse's parser whose mistakes are a UserError, so one line, and which accepts no abbreviated
    option."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help lists every option)")


def check_ranges(config: Any) -> None:
    """Refuse a config with a number outside the range in its field's type; None passes, tuples are checked
    entry by entry."""
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        accepted = _range_of(kind)
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if accepted is not None and x is not None and x not in accepted:
                raise UserError(f"--{name.replace('_', '-')} must be {accepted}, not {x}")


def check_positive(config: Any, *names: str) -> None:
    """Refuse a config whose named numbers are not above 0 (nan included); None is no number and passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def _range_of(kind: Any) -> Range | None:
    """The Range inside a type: Annotated[int, Range], Annotated[...] | None, tuple[Annotated[...], ...]."""
    if typing.get_origin(kind) is Annotated:
        return next((m for m in typing.get_args(kind)[1:] if isinstance(m, Range)), None)
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        return next((r for r in map(_range_of, typing.get_args(kind)) if r is not None), None)
    return None


def parse_config(presets: dict[str, Config], description: str, argv: list[str] | None = None) -> Config:
    """The preset's dataclass with the command line on top, its numbers within their ranges.

    Raises UserError for an unknown option (with the nearest known one), an unreadable value or a value out of
    range."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]
    chosen = next((b for a, b in zip(argv, [*argv[1:], ""], strict=False) if a == "--preset"), "demo")
    if chosen not in presets:
        raise UserError(f"--preset {chosen!r} is not one of {', '.join(presets)}")
    default = presets[chosen]
    for field in dataclasses.fields(default):  # tyro would keep the last of --reward a --reward b, and drop a
        if isinstance(getattr(default, field.name), tuple):
            argv = join_repeated(argv, "--" + field.name.replace("_", "-"))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                type(default), default=default, args=argv, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[^\x21-\x7e]+", " ", complaint.getvalue())  # tyro draws a box around its message,
        words = re.sub(r"^[ -]*(Value error|Missing argument|Invalid choice)", "", words)  # with a title
        words = re.split(r"Got errors:|Argument helptext:|For full helptext", words)[0]  # and an appendix
        raise UserError(words.strip(" -.") + " (--help lists every option)") from None
    if unknown:
        options = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(default)]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        raise UserError(
            f"unknown option {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help")
        )
    check_ranges(config)
    return config


def given(argv: list[str] | None = None) -> set[str]:
    """Names of the options that stand on the command line, as fields: {'n_layer', 'vocab'}."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = (a.split("=", 1)[0].removeprefix("--") for a in argv if a.startswith("--"))
    return {word.removeprefix("no-").replace("-", "_") for word in words}


def join_repeated(argv: list[str], option: str) -> list[str]:
    """--reward a --lr 1 --reward b  ->  --lr 1 --reward a b"""
    rest, values, taking = [], [], False
    for word in argv:
        taking = word == option if word.startswith("--") else taking
        (values if taking else rest).append(word)
    return rest + values[:1] + [v for v in values if v != option]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main and end the process with the exit code of what happened (see above)."""
    try:
        main()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        if "torch" in sys.modules:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
