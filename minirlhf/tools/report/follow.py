"""Files of JSON lines that grow while a run goes: only what was added is read, and only so much is kept.

A line is whole once its newline is written; half a line is waited for.  A file that was replaced, as by a
resumed run, is read from its start again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.tools.report.checked import number_of, parse, text_of

Row = dict[str, Any]

JUDGE_METRIC = "objective/judge"
REWARD_METRICS = ("objective/rm_scores", "objective/scores")  # the second where no reward model was used
STRIPS = {
    "kl": ("objective/kl", "KL, nats per sequence"),
    "entropy": ("policy/entropy_avg", "entropy, nats per token"),
    "mean_length": ("val/response_length", "length, tokens"),
}
WANTED = {"step", "train/loss", JUDGE_METRIC, *REWARD_METRICS, *(metric for metric, _ in STRIPS.values())}
MAX_ROWS = 1200  # of a stage's metrics: more than a curve has pixels
MAX_SAMPLES = 1_600_000  # characters of JSON: the page stays below 3 MB
LONGEST_TEXT = 4000  # characters of one text on the page
SAMPLE_NUMBERS = ("score", "rm", "judge", "kl", "length", "disagreement")
RARE = ("val/bits_per_byte", "val/pearson", "val/accuracy", "val/auc")  # validation, once per epoch
HEAD = 256  # bytes at the start of a file by which it is known again


class Lines:
    """The whole lines of a file, as they come."""

    def __init__(self, file: Path):
        self.file, self.offset, self.number, self.head = file, 0, 0, b""

    def new(self) -> tuple[bool, list[tuple[int, str]]]:
        """Whether the file was replaced or removed since, and the (number, line) that are new."""
        try:
            with open(self.file, "rb") as file:
                head = file.read(HEAD)
                again = file.seek(0, 2) < self.offset or head[: len(self.head)] != self.head
                if again:
                    self.offset, self.number = 0, 0
                file.seek(self.offset)
                found = file.read()
        except FileNotFoundError:
            again = self.offset > 0
            self.offset, self.number, self.head = 0, 0, b""
            return again, []
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error}") from None
        whole, newline, _ = found.rpartition(b"\n")
        if not newline:
            return again, []
        self.offset += len(whole) + 1
        self.head = head[: self.offset]
        lines = whole.decode("utf-8", "replace").split("\n")
        numbered = list(enumerate(lines, self.number + 1))
        self.number += len(lines)
        return again, numbered


class Rows:
    """The checked rows of a file of JSON lines; evenly thinned once they exceed a limit.

    rows         those that are kept, in order
    left         how many were left out to stay below the limit
    generation   grows whenever `rows` is no longer the old list with rows added at its end
    damaged      of a file that is still written to: the first line that could not be read, and their number
    """

    def __init__(
        self,
        file: Path,
        check: Callable[[str, str], Row],
        limit: int,
        size: Callable[[Row], int] = lambda row: 1,
        strict: bool = True,
    ):
        """check(line, where) -> row, or UserError, which ends the reading if `strict`.

        Rows with one of the RARE numbers are kept longest."""
        self.lines, self.check, self.limit, self.size_of, self.strict = (
            Lines(file),
            check,
            limit,
            size,
            strict,
        )
        self.generation = 0
        self._start()

    def _start(self) -> None:
        self.rows: list[Row] = []
        self.places: list[int] = []  # of the kept rows among all
        self.taken, self.size, self.every = 0, 0, 1
        self.damaged, self.damages = "", 0

    @property
    def left(self) -> int:
        return self.taken - len(self.rows)

    def update(self) -> Rows:
        """Read what was added -> self."""
        again, lines = self.lines.new()
        if again:
            self._start()
            self.generation += 1
        for number, line in lines:
            try:
                row = self.check(line, f"{self.lines.file}:{number}")
            except UserError as error:
                if self.strict:
                    raise
                self.damaged, self.damages = self.damaged or str(error), self.damages + 1
                continue
            self._take(row)
        return self

    def _take(self, row: Row) -> None:
        place = self.taken
        self.taken += 1
        if not self._kept(row, place):
            return
        self.rows.append(row)
        self.places.append(place)
        self.size += self.size_of(row)
        while self.size > self.limit and len(self.rows) > 1:
            self.every *= 2
            pairs = [(r, p) for r, p in zip(self.rows, self.places, strict=True) if self._kept(r, p)]
            self.rows, self.places = [r for r, _ in pairs], [p for _, p in pairs]
            self.size = sum(map(self.size_of, self.rows))
            self.generation += 1

    def _kept(self, row: Row, place: int) -> bool:
        rare = any(name in row for name in RARE) and self.every < 1 << 20
        return rare or place % self.every == 0


def metric_row(line: str, where: str) -> Row:
    """A line of metrics.jsonl: the numbers that the page shows."""
    row = parse(line, where)
    names = [name for name in row if name in WANTED or name.startswith("val/")]
    return {name: number_of(row[name], f"{where}: {name!r:.60}") for name in names}


def sample_row(line: str, where: str) -> Row:
    """A line of samples.jsonl: two texts, and what was said of them."""
    given = parse(line, where)
    row: Row = {"step": number_of(given.get("step"), f"{where}: step")}
    for name in ("prompt", "response"):
        text = text_of(given.get(name), f"{where}: {name}")
        row[name] = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "\u2026"
    for name in SAMPLE_NUMBERS:
        if given.get(name) is not None:
            row[name] = float(f"{number_of(given[name], f'{where}: {name}'):.4g}")
    return row


def metrics_of(file: Path, strict: bool = True) -> Rows:
    return Rows(file, metric_row, MAX_ROWS, strict=strict)


def samples_of(file: Path, strict: bool = True) -> Rows:
    size = lambda row: len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    return Rows(file, sample_row, MAX_SAMPLES, size, strict)


class Followed:
    """Everything of a run that grows: the metrics of its stages, and the texts that were recorded."""

    def __init__(self, run: Path, strict: bool = True):
        """run: the folder of a run, or that of its last stage."""
        self.run = run
        self.policy = run if (run / "metrics.jsonl").is_file() else run / "ppo"
        folders = {"sft": run / "sft", "rm": run / "rm", "ppo": self.policy}
        self.metrics = {
            stage: metrics_of(folder / "metrics.jsonl", strict) for stage, folder in folders.items()
        }
        self.samples = samples_of(self.policy / "samples.jsonl", strict)

    def update(self) -> Followed:
        """Read what was added to any of the files -> self."""
        for rows in (*self.metrics.values(), self.samples):
            rows.update()
        return self
