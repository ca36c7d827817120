"""A run's folder: what it holds, what the run in it started from, and how its state is saved and resumed."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minirlhf import UserError, checkpoint, data
from minirlhf.rollout import Texts
from minirlhf.support import (
    adapters,
    claims,
    elastic,
    ledger,
    logs,
    shard,
    shard_files,
    steps,
    track,
    trainer,
)
from minirlhf.support.files import Lock, refuse_unwritable
from minirlhf.support.hardware import Machine
from minirlhf.support.layout import check_alike, plain_prompts
from minirlhf.support.logs import MetricLogger
from minirlhf.support.origin import inputs_of
from minirlhf.support.state import pack_optimizer, unpack_optimizer
from minirlhf.support.text import visible

TOO_LARGE = 1e18  # the square of such a weight is infinite in fp32
LOWER_LR = "lower the learning rate, or train in --precision fp32"


class Folder:
    """OUT, as one stage uses it.  Rank 0 alone writes."""

    def __init__(self, stage: str, config: Any, machine: Machine):
        """Locks OUT and decides whether to start, to resume, or that there is nothing to do: `state`.

        Raises UserError where OUT holds another run, cannot be resumed, or is in use.
        """
        self.stage, self.config, self.out = stage, config, config.out
        self.machine, self.rank, self.world = machine, machine.rank, machine.world
        elastic.refuse_overwrite(config.overwrite)
        self.goes_on = config.resume or elastic.restarted(machine)
        self.lock: Lock | None = None
        if self.rank == 0:
            refuse_unwritable(self.out)
            claims.refuse_foreign(self.out)
            self.lock = Lock(self.out) if self.out.exists() else None
        self.state = self._claim()
        self.step, self.saved_step = 0, 0  # how many steps are done, and how many the last checkpoint holds
        self.seconds, self.started = 0.0, None
        self.inputs: dict[str, Any] = {}
        self.about: dict[str, Any] = {}  # what config.json says beside the usual

    def _claim(self) -> str:
        """'start', 'resume' or 'complete'."""
        self.saved, overwrite = None, self.config.overwrite
        if (self.out / "latest" / "config.json").is_file():
            try:
                self.saved = checkpoint.load_config(self.out)
            except UserError:
                if not overwrite:  # a damaged run may be replaced
                    raise
        settings = checkpoint.settings_of(self.config)
        state = claims.claim(self.out, self.saved, self.stage, settings, self.goes_on, overwrite)
        if state == "resume" and self.saved.get("world", self.world) != self.world:
            self.print(
                f"{self.out}: begun with {self.saved['world']} processes, now {self.world}: other draws"
            )
        return state

    def begin(self, source: data.Dataset, **checkpoints: Path | None) -> bool:
        """Whether there is work to do.  Records the data and the checkpoints that this run starts from.

        Raises UserError where the run in OUT was made from others.
        """
        self.inputs, abouts = {"data": source.sha256}, {}
        if self.config.lora and checkpoints["init"] is None:
            raise UserError("--lora trains adapters beside the weights of a model: name it with --init")
        if self.config.rating_scale and source.kind != "rated":
            raise UserError(f"--rating-scale is for ratings, and {source.name} holds none: drop it")
        if self.config.lora:
            checkpoints |= {"base": checkpoint.base_of(checkpoints["init"])}
        for name, path in checkpoints.items():
            if path is not None:
                claims.refuse_inside(self.out, name, checkpoint.resolve(path))
                refuse_stale(path, "init", checkpoints["init"])
                abouts[str(path)] = checkpoint.load_config(path)
                if name == "init":
                    remark = claims.demo_settings(self.config, path, abouts[str(path)])
                    if remark:
                        self.print(remark)
                from_here = os.path.relpath(checkpoint.resolve(path), self.out.resolve())
                self.inputs |= {name: checkpoint.fingerprint(path)}
                self.inputs |= {f"{name}_path": str(path), f"{name}_relative_path": from_here}
        check_alike(source, abouts)
        self.about["data"] = {"name": source.name, "sha256": source.sha256}
        self.print(source.describe())
        init, by_itself = str(checkpoints.get("init")), getattr(self.config, "layout", "auto") == "auto"
        if by_itself and init in abouts and (remark := plain_prompts(source, init, abouts[init])):
            self.print(remark)
        if self.state != "start":
            claims.compare_inputs(self.out, self.saved, self.inputs)
        if self.state == "complete":
            if self.rank == 0:
                steps.sweep(self.out)
            self.print(f"{self.out} is complete: nothing to do (--overwrite to run it again)")
        return self.state != "complete"

    def account(self, what: str, counts: Counter[str]) -> None:
        """Print what became of every row, and record it in config.json."""
        self.about.setdefault("rows", {})[what] = dict(counts)
        self.print(f"{what}: {ledger.account(counts)}")

    def resume(self, tokenizer, model: nn.Module, counters: dict | None = None, **parts: Any) -> dict:
        """Load the last checkpoint, if the run goes on, and open the logs -> the counters.

        `model` is what the next stage will read; `parts` are the other modules and optimizers that training
        changes."""
        if self.rank == 0 and self.lock is None:
            self.lock = Lock(self.out)
            if self._claim() != self.state:
                raise UserError(f"{self.out}: another process has begun a run here: choose another --out")
        self.tokenizer, self.model, self.parts, self.counters = tokenizer, model, parts, counters or {}
        if self.machine.sharded:
            shard.agree(self.machine, lambda: None)  # until rank 0 has made the folder
            shard.agree(self.machine, self._require_shared_folder)
        if self.state == "resume":
            with trainer.damage_is_one_line(self.out):
                self._load()
        elif self.rank == 0:
            steps.forget(self.out)
        tracker = None
        if self.rank == 0:
            settings = checkpoint.settings_of(self.config)
            tracker = track.start(self.config.track, self.out, settings, self.step > 0)
        self.logger = MetricLogger(self.out, self.rank, self.step, tracker)
        return self.counters

    def _load(self) -> None:
        """The state of the last checkpoint into the models, the optimizers and the counters."""
        tensors, state = shard_files.read(self.out, self.machine)
        trainer.check_state(state, self.counters, self.saved["step"])
        shard.load(self.model, checkpoint.load_state(self.out))
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                prefix, (_, of_base) = f"{name}.", adapters.split_state(part)
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                shard.load(part, of_base | own)
            else:
                unpack_optimizer(part, tensors, state["optimizers"][name], f"{name}.")
        self.counters |= state["counters"]
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]

    def save(self, step: int, complete: bool = False, best: bool = False, **about: Any) -> None:
        """Write the checkpoint of `step`, the best so far or not; `about` goes into its config.json.

        Raises UserError, and writes nothing, where a weight is not finite.
        """
        self._require_finite_weights()
        tensors: dict[str, Tensor] = {}
        optimizers: dict[str, dict] = {}
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                tensors |= {f"{name}.{k}": v for k, v in adapters.split_state(part)[0].items()}
            else:
                packed, optimizers[name] = pack_optimizer(part, f"{name}.")
                tensors |= packed
        state = {"step": step, "seconds": self.elapsed, "counters": self.counters, "optimizers": optimizers}
        own, _ = adapters.split_state(self.model)
        files: list[Path] = []
        if self.machine.sharded:
            own = shard.gather(own, self.machine)
            tensors, state["shards"], files = shard_files.write(self.out, step, tensors, self.machine)
        shape = self.model.config if hasattr(self.model, "config") else self.model.members[0].backbone.config
        more = {"inputs": self.inputs, "world": self.world} | self.about | about
        described = checkpoint.describe(
            self.stage, shape, self.config, step, complete, self.tokenizer, **more
        )
        resumed = {"tensors": tensors, "state": state, "files": files}

        def write() -> None:
            if self.rank == 0:
                checkpoint.save(self.out, step, own, described, self.tokenizer, resumed, best)

        if self.machine.sharded:  # all go on when the checkpoint is whole, or none
            shard.agree(self.machine, write)
        else:
            write()
        if self.rank == 0 and complete:
            self.logger.finish(about.get("results", {}))
        self.saved_step = step

    def record_texts(
        self,
        step: int,
        texts: Texts,
        per_text: dict[str, Tensor],
        kl_coef: float,
        show: bool,
        every: int | None,
    ) -> None:
        """Append the texts to OUT/samples.jsonl at every `every`-th step, and print three of them if asked
        to."""
        write = bool(every) and step % every == 0
        if self.rank == 0 and (show or write):
            rows = logs.sample_rows(*texts.decode(self.tokenizer), per_text)
            if write:
                self.logger.samples(step, rows)
            if show:
                self.print(logs.show_rows(rows[:3], kl_coef))

    def _require_finite_weights(self) -> None:
        """The last step may have been too large, and no loss has been computed since.  All ranks agree."""
        changing = {"model": self.model} | self.parts
        for name, part in changing.items():
            weights = part.state_dict().values() if isinstance(part, nn.Module) else []
            small = [(shard.local(x).abs() < TOO_LARGE).all() for x in weights]
            bad = bool(small) and not torch.stack(small).all()  # one wait for a GPU
            if self.machine.any(bad) if self.machine.sharded else bad:
                raise UserError(
                    f"weights of the {name}: too large, or not finite: {LOWER_LR} ({self._progress()})"
                )

    def _require_shared_folder(self) -> None:
        if not self.out.is_dir():
            raise UserError(f"{self.out}: not on a disk that all machines share, which --shard needs")

    def _progress(self) -> str:
        """Which step this is, and which checkpoint there is to go back to."""
        saved = f"the last checkpoint is that of step {self.saved_step}"
        return f"{self.stage}, step {self.step + 1}; {saved if self.saved_step else 'no checkpoint yet'}"

    @property
    def elapsed(self) -> float:
        """Seconds spent in the loop, those before a resume included."""
        return self.seconds + (time.perf_counter() - self.started if self.started else 0.0)

    def print(self, text: str) -> None:
        """Print on rank 0 alone, above the progress bar.  No model's text can steer the terminal."""
        if self.rank == 0:
            tqdm.write(visible(text))


def refuse_stale(path: str | Path, name: str, source: str | Path) -> None:
    """UserError where the checkpoint at `path` started from the folder `source`, which was trained again
    since."""
    inputs = inputs_of(checkpoint.load_config(path), path)
    before, now = inputs.get(name), checkpoint.fingerprint(source)
    places = [Path(inputs[f"{name}_path"])] if f"{name}_path" in inputs else []
    if f"{name}_relative_path" in inputs:  # runs that were copied or moved together
        places.append(checkpoint.resolve(path).parent / inputs[f"{name}_relative_path"])
    folder = checkpoint.resolve(source).parent
    if before in (None, now) or folder not in [place.resolve().parent for place in places]:
        return
    raise UserError(
        f"{path} was trained from {source} as it was before (sha256 {before[:12]}, now {now[:12]}): "
        f"train it again, or give another checkpoint"
    )
