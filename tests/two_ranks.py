"""Stages on several processes, as torchrun would start them.

    WORLD_SIZE=2 RANK=0 ... python tests/two_ranks.py '[["sft", "train_sft", ["--out", "x"]]]'

runs the stages one after the other, and leaves in the working directory what each rank saw: gradients in grads.RANK,
messages, and the bytes of all tensors after the last optimiser step in said.RANK.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]


def start(
    home: Path, runs: list, world: int = 2, timeout: float = 900, **more: str
) -> list[tuple[dict, dict]]:
    """(gradients, messages) of each rank, after all runs (name, script, options) in `home`."""
    home.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                "PYTHONPATH": f"{ROOT}{os.pathsep}{home}"} | more  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__, json.dumps(runs)], cwd=home, env=environment | {"RANK": str(rank)},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process in processes:
            process.wait(timeout=timeout)
        failed = [p.stderr.read()[-2000:] for p in processes if p.returncode]
        assert not failed, "\n".join(failed)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    read = lambda rank: (load_file(home / f"grads.{rank}"), json.loads((home / f"said.{rank}").read_text()))
    return [read(rank) for rank in range(world)]


def steps(grads: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The gradients of a run's optimiser steps, in order."""
    return [grads[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in grads))]


def live_bytes() -> int:
    """Bytes of all tensors of this process: of memory that several look at, once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x).__name__ != "DTensor"]
    tensors += [x.to_local() for x in gc.get_objects() if type(x).__name__ == "DTensor"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@contextlib.contextmanager
def bytes_after_steps(found: list[int]):
    """A list that fills with live_bytes() after each of the first three optimiser steps, gradients included."""
    step = torch.optim.AdamW.step

    def step_and_count(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if len(found) < 3:
            found.append(live_bytes())
        return result

    torch.optim.AdamW.step = step_and_count
    try:
        yield
    finally:
        torch.optim.AdamW.step = step


def main() -> None:
    from minirlhf import Stopped, UserError
    from minirlhf.measure import baselines
    from minirlhf.support import hardware
    from minirlhf.support.logs import MetricLogger
    from tests.gradients import gradients
    from tests.test_ranks import same_tokens

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found, said, log = {}, {}, MetricLogger.log
    baselines.tfidf_ridge = baselines.vader_lexicon = lambda *args, **options: None
    for name, script, argv in json.loads(sys.argv[1]):
        if name == "copy":  # script: a folder; argv: where to
            if rank == 0:
                shutil.copytree(script, argv, symlinks=True)
            hardware.setup_machine().any(False)  # until it is there
            continue
        stop_at = {"stopped": 1, "half": 2}.get(name.split(",")[0])  # on the last rank alone

        def log_and_stop(self, step, metrics, stop_at=stop_at):
            log(self, step, metrics)
            if rank == world - 1 and step == stop_at:
                signal.raise_signal(signal.SIGINT)

        MetricLogger.log = log_and_stop
        sys.argv = [script, *argv]
        drawn = contextlib.nullcontext() if "sampled" in name else same_tokens(world)
        held = []
        counting = bytes_after_steps(held) if "memory" in name else contextlib.nullcontext()
        caught = contextlib.nullcontext([]) if "memory" in name else gradients()
        with caught as grads, drawn, counting:
            try:
                importlib.import_module(script).main()
            except (UserError, Stopped) as mistake:
                said[name] = str(mistake)
        if held:
            said[name] = held[-1]
        found |= {f"{name}.{i}": g for i, g in enumerate(grads)}
    view = torch.arange(12.0).view(3, 4).T[1:, :2]
    hardware.setup_machine().sum_([view])
    said["view"] = view.tolist()
    save_file(found, f"grads.{rank}")
    Path(f"said.{rank}").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
