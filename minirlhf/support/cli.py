"""Command lines: options whose ranges are checked when they are parsed, and one line for every mistake.

A number's range is part of its type, so that no script has to check it again:

    lr: Above0 = 1e-3          # Annotated[float, Range(above=0)]
    epochs: Count = 6          # Annotated[int, Range(1, 10**9)]

`parse_config` reads a dataclass of such options from the command line; `Parser` is argparse's, for the tools.
Both refuse a bad value with a UserError before anything is read or written.

Exit codes: 0 done; 2 a mistake of the user's, or a machine without room; 130 stopped by Ctrl-C and 143 by
SIGTERM; 141 nobody reads the output; 1 a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from minirlhf import Stopped, UserError
from minirlhf.support import ctrl_c, elastic
from minirlhf.support.text import as_message, one_line

Config = TypeVar("Config")
EMPTY = "its value is empty; is a shell variable unset?"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota or a limit on files is full
CRASHES = (errno.ENOENT, errno.EEXIST)  # a file that comes or goes is our mistake, or another process'
TRLS = {  # TRL's names of what our options do
    "--num-generations": "--group",
    "--loss-type": "--algorithm",
    "--scale-rewards": "--scale",
    "--importance-sampling-level": "--objective",
    "--epsilon": "--clip-range",
    "--epsilon-high": "--clip-range-high",
    "--beta": "--kl-coef",
    "--num-iterations": "--epochs",
    "--learning-rate": "--lr",
    "--max-completion-length": "--response-tokens",
}
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
        finite = -math.inf < x < math.inf  # math.isfinite cannot take a whole number of 400 digits
        return finite and self.low <= x <= self.high and self.above < x < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(said) or "a finite number"


Count = Annotated[int, Range(1, HUGE)]
CountOr0 = Annotated[int, Range(0, HUGE)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Real = Annotated[float, Range(-1e9, 1e9)]  # the square of a larger number is lost in fp32
Above0 = Annotated[float, Range(above=0, high=1e9)]
AtLeast0 = Annotated[float, Range(0, 1e9)]
Epsilon = Annotated[float, Range(1e-30, 1e9)]  # a smaller one is 0 in fp32
Temperature = Annotated[float, Range(1e-3, 1e3)]  # beyond, the likeliest token, or any token
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, below=1)]


def number(kind: Any) -> Callable[[str], float]:
    """A type for Parser.add_argument from one of the annotated types above: number(Count)."""
    base, accepted = typing.get_args(kind)

    def parse(text: str) -> float:
        try:
            value = base(text)
        except ValueError:
            noun = "a whole number" if base is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun}, not {_shown(text)}") from None
        if value not in accepted:
            raise argparse.ArgumentTypeError(f"must be {accepted}, not {one_line(text, 40)}")
        return value

    return parse


def _shown(text: str) -> str:
    return f"'{one_line(text, 40)}'"


class Parser(argparse.ArgumentParser):
    """argparse's parser whose mistakes are a UserError, so one line, and which accepts no abbreviated option
    and no empty argument."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        args = spell_fields(args) if "--fields" in self._option_string_actions else args
        for before, word in zip(["", *args], args, strict=False):
            if not word or word.partition("=")[1:] == ("=", "") and word.startswith("--"):
                raise UserError(f"{word.strip('=') or before or 'the first argument'}: {EMPTY}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help lists every option)")


def add_fields(parser: argparse.ArgumentParser) -> None:
    """The option of tools that names columns of a file; RunConfig has it for the stages."""
    parser.add_argument(
        "--fields",
        nargs="+",
        action="extend",
        default=[],
        metavar="OURS=THEIRS",
        help="Names of columns that are not ours: prompt=question; --prompt-field question is the same.",
    )


def check_ranges(config: Any) -> None:
    """Refuse a config with a number outside the range in its field's type; None passes, tuples are checked
    entry by entry."""
    for name, kind in _kinds(type(config)).items():
        accepted = _range_of(kind)
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if accepted is not None and x is not None and x not in accepted:
                raise UserError(f"{_option(name)} must be {accepted}, not {one_line(x, 40)}")


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    """The types of all fields of a dataclass, ranges included."""
    return typing.get_type_hints(config, include_extras=True)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_words(options: dict[str, Any], argv: list[str]) -> None:
    """Refuse values that cannot be read, in words of our own; `options`: the types of all options by name.

    What remains for tyro to refuse: unknown options, and words before the first option.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            groups.append((word.replace("_", "-"), []))
        elif groups:
            groups[-1][1].append(word)
    chosen: dict[str, str] = {}
    for option, words in groups:
        kind = options.get(option.replace("--no-", "--", 1)) if option not in options else options[option]
        if kind is bool and words:
            raise UserError(f"{option} takes no value, but {_shown(words[0])} follows it")
        if kind not in (bool, None):
            _check_count(option, kind, words)
        for word in words if kind is not None else []:
            _check_word(option, kind, word)
            choice = typing.get_origin(_inside(kind)) is typing.Literal and option != "--preset"
            if choice and chosen.setdefault(option, word) != word:
                raise UserError(f"{option} is both {chosen[option]} and {word}: drop one of them")


def _check_count(option: str, kind: Any, words: list[str]) -> None:
    parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    if not words:
        raise UserError(f"{option} needs a value")
    if parts[-1] is not ... and len(words) != len(parts):
        want = "one value" if len(parts) == 1 else f"{len(parts)} values"
        raise UserError(f"{option} takes {want}, not {len(words)}: {one_line(' '.join(words), 40)}")


def _check_word(option: str, kind: Any, word: str) -> None:
    if not word:
        raise UserError(f"{option}: {EMPTY}")
    if type(None) in typing.get_args(kind) and word == "None":
        return
    plain = _inside(kind)
    if typing.get_origin(plain) is typing.Literal and word not in typing.get_args(plain):
        raise UserError(f"{option} must be one of {', '.join(typing.get_args(plain))}, not {_shown(word)}")
    if typing.get_origin(plain) is Annotated:
        try:
            number(plain)(word)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{option} {error}") from None


def _inside(kind: Any) -> Any:
    """The type of one value: Count of Count | None and of tuple[Count, ...]."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        return next(_inside(k) for k in typing.get_args(kind) if k is not type(None))
    return kind


def _range_of(kind: Any) -> Range | None:
    """The Range inside a type: Annotated[int, Range], Annotated[...] | None, tuple[Annotated[...], ...]."""
    plain = _inside(kind)
    return next((m for m in typing.get_args(plain)[1:] if isinstance(m, Range)), None)


def parse_config(presets: dict[str, Config], description: str, argv: list[str] | None = None) -> Config:
    """The preset's dataclass with the command line on top, its numbers within their ranges.

    Raises UserError for an unknown option (with the nearest known one), an unreadable value or a value out of
    range."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]
    argv = spell_fields(argv)
    chosen = [b for a, b in zip(argv, [*argv[1:], ""], strict=False) if a == "--preset"][-1:] or ["demo"]
    if chosen[0] not in presets:
        raise UserError(f"--preset must be one of {', '.join(presets)}, not {_shown(chosen[0])}")
    default = presets[chosen[0]]
    _check_words({_option(name): kind for name, kind in _kinds(type(default)).items()}, argv)
    for field in dataclasses.fields(default):  # tyro would keep the last of --reward a --reward b, and drop a
        if isinstance(getattr(default, field.name), tuple):
            argv = join_repeated(argv, _option(field.name))
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
        options = [_option(field.name) for field in dataclasses.fields(default)]
        near = nearest(unknown[0], options)
        raise UserError(
            f"unknown option {unknown[0]}" + (f": did you mean {near}?" if near else ": see --help")
        )
    check_ranges(config)
    return config


def nearest(unknown: str, options: Sequence[str]) -> str | None:
    """The option that somebody may have meant: TRL's name of it, its beginning, or nearly its letters."""
    word = unknown.lower().replace("_", "-")
    begun = [option for option in options if len(word) > 3 and option.startswith(word)]
    known = [option for option in [TRLS.get(word), *begun] if option in options]
    return next(iter(known or difflib.get_close_matches(word, options, n=1)), None)


def given(argv: list[str] | None = None) -> set[str]:
    """Names of the options that stand on the command line, as fields: {'n_layer', 'vocab'}."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = (a.split("=", 1)[0].removeprefix("--") for a in argv if a.startswith("--"))
    return {word.removeprefix("no-").replace("-", "_") for word in words}


def refuse_unread(options: Sequence[str], why: str, unread: bool = True) -> None:
    """UserError where one of the options is on the command line though nothing reads it: "with --init"."""
    for option in options if unread else []:
        if option.removeprefix("--").replace("-", "_") in given():
            raise UserError(f"{option} has no effect {why}: drop one of them")


def join_repeated(argv: list[str], option: str) -> list[str]:
    """--reward a --lr 1 --reward b  ->  --lr 1 --reward a b"""
    rest, values, taking = [], [], False
    for word in argv:
        taking = word == option if word.startswith("--") else taking
        (values if taking else rest).append(word)
    return rest + values[:1] + [v for v in values if v != option]


def spell_fields(argv: list[str]) -> list[str]:
    """--rating-field helpfulness  ->  --fields rating=helpfulness"""
    found, words = [], iter(argv)
    for word in words:
        option, _, value = word.partition("=")
        ours = re.fullmatch(r"--(\w+(?:[-_]\w+)*)[-_]field", option)
        if ours is None:
            found.append(word)
            continue
        value = value or next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"{option} needs a value: the name of a column")
        found += ["--fields", f"{ours[1].replace('-', '_')}={value}"]
    return found


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main and end the process with the exit code of what happened (see above)."""
    try:
        ctrl_c.raises()
        main()
        sys.stdout.flush()
    except UserError as mistake:
        _end(f"error: {mistake}", 2)
    except Stopped as stopped:
        _end(str(stopped), 128 + stopped.signum)
    except KeyboardInterrupt:
        _end(ctrl_c.MESSAGE, ctrl_c.EXIT_CODE)
    except BrokenPipeError:  # `... | head`: nobody reads on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes once more at its end)
        sys.exit(141)
    except (MemoryError, OSError, RuntimeError) as error:
        if lost := elastic.ended_elsewhere(error):
            _end(f"error: {lost}", 1)
        reason = _refusal_of_machine(error)
        if reason is None:
            raise
        _end(f"error: {reason}", 2)
    finally:
        ctrl_c.ends_command()
        elastic.leave_group(sys.exc_info()[1])


def _end(message: str, code: int) -> typing.NoReturn:
    """One line, whatever names of files and texts of others stand in the message."""
    line = as_message(message)
    print(line, file=sys.stderr)
    elastic.tell(line)
    sys.exit(code)


def _refusal_of_machine(error: Exception) -> str | None:
    """What the machine does not give, a file or memory, and what helps; None for any other error."""
    text = one_line(error)
    if isinstance(error, OSError):
        if error.errno in (None, *CRASHES):
            return None
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}" + ": make room" * (error.errno in NO_ROOM)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        remedy = "use a smaller model, --batch or --microbatch, or --gradient-checkpointing"
        return f"out of memory ({text or type(error).__name__}): {remedy}"
    return None
