"""torchrun's side of a run: processes that it starts again, and what it says of one that failed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

from minirlhf import UserError

# What a rank sees of another one that has ended: from gloo, NCCL, and the store through which ranks meet.
ENDED = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|Connection (closed|reset) by peer|Broken pipe")


def restarted() -> bool:
    """Whether torchrun has started this run again, after a process failed: it then goes on from `latest`."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def refuse_overwrite(overwrite: bool) -> None:
    """UserError for --overwrite under --max-restarts: every restart would begin again, and lose the run."""
    if overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0:
        raise UserError(
            "--overwrite under torchrun --max-restarts would replace the run at every restart: drop one"
        )


def tell(message: str) -> None:
    """Let torchrun's summary name why this process ends; nothing without torchrun."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(place).write_text(json.dumps({"message": details}))


def ended_elsewhere(error: Exception) -> str | None:
    """What to say where this process fails because another one of its run has ended; None for other errors."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and ENDED.search(f"{type(error).__name__}: {error}"):
        return "another process of this run has ended, see its message: so does this one"
    return None
