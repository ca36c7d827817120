"""Command lines: a dataclass of options with the command line on top, and one line for every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import tyro

from minirlhf import UserError

Config = TypeVar("Config")


def parse_config(presets: dict[str, Config], description: str, argv: list[str] | None = None) -> Config:
    """The preset's dataclass with the command line on top.  An option that does not exist is one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]
    chosen = next((b for a, b in zip(argv, [*argv[1:], ""], strict=False) if a == "--preset"), "demo")
    if chosen not in presets:
        raise UserError(f"--preset {chosen!r} is not one of {', '.join(presets)}")
    default = presets[chosen]
    for field in dataclasses.fields(default):  # tyro would keep the last of --reward a --reward b, and drop a
        if isinstance(getattr(default, field.name), tuple):
            argv = join_repeated(argv, "--" + field.name.replace("_", "-"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                type(default), default=default, args=argv, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[^\x20-\x7e]+", " ", said.getvalue())  # tyro draws a box around what it says
        raise UserError(re.sub(r"\s+", " ", words).strip(" -") + " (--help lists every option)") from None
    if unknown:
        options = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(default)]
        near = difflib.get_close_matches(unknown[0], options, n=1)
        raise UserError(f"unknown option {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help"))
    return config


def check_positive(config: Any, *names: str) -> None:
    """Refuse a config whose named numbers are not above 0 (nan included); None is no number and passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def join_repeated(argv: list[str], option: str) -> list[str]:
    """--reward a --lr 1 --reward b  ->  --lr 1 --reward a b"""
    rest, values, taking = [], [], False
    for word in argv:
        taking = word == option if word.startswith("--") else taking
        (values if taking else rest).append(word)
    return rest + values[:1] + [v for v in values if v != option]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
