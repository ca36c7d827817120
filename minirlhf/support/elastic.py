"""torchrun's side of a run: processes that it starts again, and what it says of one that failed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support.files import write_atomically

# What a rank sees of another one that has ended: from gloo, NCCL, and the store through which ranks meet.
ENDED = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|Connection (closed|reset) by peer|Broken pipe")

PAUSE = 0.02  # seconds between looks into the store


def _restarts() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


def restarted(machine: Any) -> bool:
    """Whether torchrun has started this run again: it then goes on from `latest`.

    Of several machines only those where a process failed count a restart, so the ranks ask each other."""
    return _restarts() and machine.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0)


def join_group(backend: str) -> None:
    """Meet the other ranks, as torch.distributed.init_process_group does.

    Ranks tell each other their addresses through a store of torchrun's, which outlives restarts.  There,
    ranks that were started again find addresses of those that have ended, and wait for them (torch 2.13.0).
    So where restarts are allowed, each start writes under a name of its own."""
    import torch.distributed as dist  # not above: command lines are read without torch

    if not _restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, world, is_master=False)
    own = dist.PrefixStore(common_name(store, rank, world), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def leave_group(error: BaseException | None) -> None:
    """Part from the other ranks and end this process, with `error`'s exit code; nothing where it is alone.

    gloo's threads live on while a device mesh refers to their group.  One that lets go of a tensor while
    Python is taken down aborts the process (torch 2.13.0), and torchrun takes a finished run for a failed
    one.  So what is registered for the end runs here, and Python is not taken down.  An `error` that nobody
    expected is left to Python, for its traceback."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    dist.destroy_process_group()
    if error is None or isinstance(error, SystemExit):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit((error.code if error else None) or 0)


def common_name(store: Any, rank: int, world: int) -> str:
    """A name that these ranks agree on, and no earlier ones, whatever those have left in the store.

    Each rank greets with a number of its own.  Rank 0 answers every greeting until it has been heard; answers
    to earlier greetings are not for us.  torchrun ends all earlier ranks before it starts new ones."""
    mine = uuid.uuid4().hex
    get = lambda key: store.get(key).decode() if store.check([key]) else ""
    if rank:
        store.set(f"greeting-{rank}", mine)
        while not (answer := get(f"answer-{rank}")).startswith(mine):
            time.sleep(PAUSE)
        name = answer.removeprefix(mine)
        store.set(f"heard-{rank}", name)
        return name
    waiting = set(range(1, world))
    while waiting:
        for other in waiting:
            if greeting := get(f"greeting-{other}"):
                store.set(f"answer-{other}", greeting + mine)
        time.sleep(PAUSE)
        waiting = {other for other in waiting if get(f"heard-{other}") != mine}
    return mine


def refuse_overwrite(overwrite: bool) -> None:
    """UserError for --overwrite under --max-restarts: every restart would begin again, and lose the run."""
    if overwrite and _restarts():
        raise UserError(
            "--overwrite under torchrun --max-restarts would replace the run at every restart: drop one"
        )


def tell(message: str) -> None:
    """Let torchrun's summary name why this process ends; nothing without torchrun.

    The file is there whole or not at all: torchrun stops all processes when one has failed, at any moment,
    and its own summary fails with an empty file (torch 2.13.0)."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            write_atomically(Path(place), json.dumps({"message": details}))


def ended_elsewhere(error: Exception) -> str | None:
    """What to say where this process fails because another one of its run has ended; None otherwise."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and ENDED.search(f"{type(error).__name__}: {error}"):
        return "another process of this run has ended, see its message: so does this one"
    return None
