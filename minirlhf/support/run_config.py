"""The options that all stages share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from minirlhf import UserError
from minirlhf.support.cli import Above0, Count, Seed, check_ranges
from minirlhf.support.track import Track


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options that all stages share."""

    out: Path = Path("runs/demo/stage")
    """Folder for checkpoints and metrics.  Earlier stages are looked for beside it (sft, rm)."""
    data: str = "vader"
    """Source of the texts: vader (built in), toy (generated), or a file or folder (.jsonl, .jsonl.gz,
    .txt)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset.  Default: the user's cache."""
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
    """Train adapters of this rank beside the blocks' linear layers, and heads, not the weights.  They want
    about ten times the learning rate."""
    lora_alpha: Above0 = 32.0
    """Adapters are scaled by this over their rank."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: far less memory, a third more
    time."""
    compile: bool = False
    """Compile the blocks with torch.compile; worth it in long runs only."""

    def __post_init__(self) -> None:
        check_ranges(self)  # first: the checks of a script divide by its numbers
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
