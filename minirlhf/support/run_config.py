"""The options that all stages share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from minirlhf import UserError
from minirlhf.support.cli import Above0, Count, Real, Seed, check_ranges, refuse_unread
from minirlhf.support.shapes import names_of
from minirlhf.support.track import Track


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options that all stages share."""

    out: Path = Path("runs/demo/stage")
    """Folder for checkpoints and metrics.  Earlier stages are looked for beside it (sft, rm)."""
    data: str = "vader"
    """Source of the texts: vader (built in), toy (generated), or a file or folder (.jsonl, .json, .parquet,
    .txt)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset.  Default: the user's cache."""
    fields: tuple[str, ...] = ()
    """Names of the columns, where they are not ours, as OURS=THEIRS: rating=helpfulness chosen=answer_a.
    --rating-field helpfulness, --chosen-field answer_a and so on say the same."""
    rating_scale: tuple[Real, ...] = ()
    """Lowest and highest rating possible, of data whose rows have no `scale`.  Default: the first usual scale
    that holds all ratings."""
    skip_bad: bool = False
    """Skip and count malformed rows instead of stopping at the first."""
    too_long: Literal["error", "drop", "cut"] = "drop"
    """What happens to a prompt that does not fit the context: stop, drop and count the row, or cut its
    beginning."""
    resume: bool = False
    """Continue from the newest checkpoint in OUT, bit for bit [D21]; start where there is none."""
    overwrite: bool = False
    """Start again even if OUT holds a run, which is lost."""
    track: Track = "none"
    """Show metrics, samples and results in TensorBoard (files in OUT) or Weights & Biases, too."""
    seed: Seed = 1
    """Random seed, 0 or larger."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products.  auto: bf16 where the hardware multiplies it natively."""
    train_layers: Count | None = None
    """Train only this many last blocks and what follows them.  Default: everything.  What is frozen is kept
    in --precision and has no dropout."""
    lora: Count | None = None
    """Train adapters of this rank beside the blocks' linear layers (of the last --train-layers blocks), and
    heads, not the weights.  They want about ten times the learning rate."""
    lora_alpha: Above0 = 32.0
    """Adapters are scaled by this over their rank."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: far less memory, a third more
    time."""
    compile: bool = False
    """Compile the blocks with torch.compile, and on a GPU the rollout's step into a CUDA graph; worth it in
    long runs only."""
    shard: bool = False
    """Split every model over the processes that torchrun starts (FSDP2), instead of replicating it."""

    def __post_init__(self) -> None:
        check_ranges(self)  # first: the checks of a script divide by its numbers
        if len(self.rating_scale) not in (0, 2) or sorted(set(self.rating_scale)) != [*self.rating_scale]:
            raise UserError("--rating-scale takes the lowest and the highest rating, such as 0 4")
        names_of(self.fields)
        if (self.fields or self.rating_scale) and self.data in ("vader", "toy"):
            raise UserError(f"--fields and --rating-scale are for files: {self.data} needs neither")
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite replaces it: give one of them")


def refuse_unread_options(config: RunConfig) -> None:
    """UserError for an option on the command line that --lora or --train-layers leaves without effect."""
    adapters, frozen = config.lora is not None, config.train_layers is not None
    refuse_unread(["--lora-alpha"], "without --lora", not adapters)
    refuse_unread(["--embedding-lr"], "with --lora", adapters)
    refuse_unread(["--embedding-lr"], "with --train-layers, which freezes the embeddings", frozen)
    refuse_unread(["--dropout"], "with --lora", adapters and getattr(config, "dropout", 0.0) > 0)


def all_warmup(config: RunConfig, total: int) -> str | None:
    """What to say where a run of `total` steps ends before its warm-up does; None elsewhere."""
    warmup, steps = getattr(config, "warmup", 0), total // getattr(config, "members", 1)
    if warmup < steps:
        return None
    never = f"the learning rate never reaches --lr {config.lr:g}"
    return f"warning: --warmup {warmup} is as long as the run, {steps} steps, or longer: {never}"
