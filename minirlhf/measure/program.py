"""The reward `minirlhf.rewards:tests`: a response is a Python program, and its row's tests judge it.

How programs are locked in, and what is promised of it: program_sandbox.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf import UserError
from minirlhf.measure import program_sandbox
from minirlhf.support.text import one_line

FENCE = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.M | re.S | re.I)
SHARE = 16  # programs for which another judge, on another core, is worth its start


@dataclass(frozen=True)
class Limits:
    """What one program may use, and its tests again as much."""

    cpu: int = 1  # seconds of computing
    wall: float = 10.0  # seconds, for what waits without computing
    memory: int = 256 << 20  # bytes of address space, Python's own 30 MiB included


class Verdict(NamedTuple):
    verdict: str  # passed, wrong, error, exit, time, or refused: it asked the system for what it may not have
    why: str = ""  # the exception's name


def tests(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 where the response is a Python program that passes the row's `tests`, else 0.

    tests: Python statements, or a list of them, such as "assert add(1, 2) == 3".  They call functions of the
    program, with built-in values and for built-in values (numbers, texts, lists, tuples, dicts, sets);
    objects of the program's own, and changes of what it was given, do not come back.  The program is the
    first fenced block of the response, or else all of it; a row's `prefix` is put before it.  It may import
    what needs no files (math, re, itertools ...).  Needs Linux on x86-64 or aarch64.
    """
    return [float(found.verdict == "passed") for found in verdicts(responses, rows)]


def statements(given: Any) -> str:
    """A row's `tests` as one text.  Raises ValueError where they could judge nothing."""
    lines = given if isinstance(given, list) else [given]
    if not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"expected Python statements, or a list of them, got {given!r:.40}")
    text = "\n".join(lines)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            called = program_sandbox.names_called(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {error!s:.60}") from None
    if not called:
        raise ValueError("call no function of the program")
    return text


tests.fields = {"tests": statements}


def verdicts(
    responses: Sequence[str], rows: Sequence[dict[str, Any]], limits: Limits | None = None
) -> list[Verdict]:
    """What became of each response as a program."""
    pairs = []
    for response, row in zip(responses, rows, strict=True):
        pairs.append((row.get("prefix", "") + program_of(response), statements(row["tests"])))
    return judge(pairs, limits or Limits())


def program_of(response: str) -> str:
    """The first fenced block of a response, or else all of it."""
    fenced = FENCE.search(response)
    return fenced[1] if fenced else response


def judge(pairs: Sequence[tuple[str, str]], limits: Limits) -> list[Verdict]:
    """The verdicts on (program, tests) pairs.  When it returns or raises, no process of theirs is left.

    Raises UserError where this system cannot lock programs in: then none has been run.
    """
    if sys.platform != "linux":
        raise UserError("programs are run where Linux can lock them in, and this is another system")
    workers = max(1, min(len(os.sched_getaffinity(0)), len(pairs) // SHARE))
    shares = [pairs[i::workers] for i in range(workers)]
    if workers == 1:
        found = [_judge(shares[0], limits)]
    else:
        with ThreadPoolExecutor(workers) as pool:
            found = [*pool.map(_judge, shares, [limits] * workers)]
    return [found[i % workers][i // workers] for i in range(len(pairs))]


def _judge(pairs: Sequence[tuple[str, str]], limits: Limits) -> list[Verdict]:
    if not pairs:
        return []
    script = Path(program_sandbox.__file__)
    command = [sys.executable, "-P", "-S", "-s", str(script), json.dumps(asdict(limits)), str(os.getpid())]
    patience = 30 + len(pairs) * (limits.wall + 1)
    try:
        done = subprocess.run(
            command,
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            timeout=patience,
            env={"PYTHONHASHSEED": "0"},  # the order of sets is the same in every run
            cwd="/",
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"programs could not be judged: {one_line(error)}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"programs could not be locked in, so none was run: {one_line(reason)}")
    return [Verdict(*found) for found in json.loads(done.stdout)]
