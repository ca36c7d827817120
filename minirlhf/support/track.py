"""A run's numbers and samples in a program that people watch: TensorBoard, or Weights & Biases.

A tracker has four methods; another program is another class in TRACKERS.  Whatever it shows is also in the
run's own files, which need no program.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from pathlib import Path
from typing import Any, Literal, Protocol

from minirlhf import UserError
from minirlhf.support.text import one_line

Track = Literal["none", "tensorboard", "wandb"]
Row = dict[str, Any]


class Tracker(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: list[Row]) -> None:
        """Rows with the same keys: samples of a rollout."""

    def report(self, html: str, png: bytes) -> None:
        """What python -m minirlhf.report makes of a run."""

    def finish(self, results: Row) -> None:
        """The run is complete; `results` is what its config.json says of them."""


class TensorBoard:
    def __init__(self, out: Path, settings: Row, goes_on: bool):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--track tensorboard needs a package: pip install 'minirlhf[track]'") from None
        self.board = SummaryWriter(str(out / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def table(self, step: int, name: str, rows: list[Row]) -> None:
        line = lambda cells: (
            "| " + " | ".join(one_line(cell, 300).replace("|", "\\|") for cell in cells) + " |"
        )
        lines = [line(rows[0]), "|---" * len(rows[0]) + "|", *(line(row.values()) for row in rows)]
        self.board.add_text(name, "\n".join(lines), step)

    def report(self, html: str, png: bytes) -> None:
        import io

        import numpy as np
        from PIL import Image

        self.board.add_image(
            "report", np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), dataformats="HWC"
        )
        self.board.flush()

    def finish(self, results: Row) -> None:
        self.board.add_text("results", "\n".join(f"    {line}" for line in lines_of(results)))
        self.board.close()


class WeightsAndBiases:
    """Online, offline or off as WANDB_MODE says.  A resumed run goes on in the same run there."""

    def __init__(self, out: Path, settings: Row, goes_on: bool):
        try:
            import wandb
        except ImportError:
            raise UserError("--track wandb needs a package: pip install wandb") from None
        self.wandb, note = wandb, out / "wandb-id"
        if not goes_on or not note.is_file():
            note.write_text(uuid.uuid4().hex[:12])
        logging.getLogger("wandb").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.run = wandb.init(
                    project="minirlhf",
                    name="/".join(out.absolute().parts[-2:]),
                    id=note.read_text().strip(),
                    resume="allow",
                    dir=str(out),
                    config=settings,
                    settings=wandb.Settings(console="off", init_timeout=60),
                )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"--track wandb: {one_line(error, 200)}: run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def table(self, step: int, name: str, rows: list[Row]) -> None:
        cells = [list(row.values()) for row in rows]
        self.run.log({name: self.wandb.Table(columns=list(rows[0]), data=cells)}, step=step)

    def report(self, html: str, png: bytes) -> None:
        self.run.log({"report": self.wandb.Html(html, inject=False)})
        self.run.finish()

    def finish(self, results: Row) -> None:
        self.run.summary.update(results)
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def start(track: Track, out: Path, settings: Row, goes_on: bool) -> Tracker | None:
    """The tracker of this name for a run in `out`, which goes on or begins; None for 'none'."""
    return TRACKERS[track](out, settings, goes_on) if track != "none" else None


def lines_of(results: Row, prefix: str = "") -> list[str]:
    """{"a": {"b": 1}} -> ["a.b: 1"]"""
    lines = []
    for name, value in results.items():
        whole = f"{prefix}{name}"
        lines += (
            lines_of(value, whole + ".") if isinstance(value, dict) else [f"{whole}: {one_line(value, 200)}"]
        )
    return lines
