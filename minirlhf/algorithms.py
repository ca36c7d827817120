"""PPO's relatives as rows of one table: nine choices in train_ppo.py's loop, and nothing else.

Without a critic, a response is judged by its group: several responses to one prompt, drawn together. See
docs/algorithms.md for what each does, costs and is good for, and minirlhf/ppo.py for the equations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from minirlhf import UserError
from minirlhf.support.cli import Above0, Count

Name = Literal["ppo", "rloo", "grpo", "dr-grpo", "dapo", "cispo", "gspo"]
Baseline = Literal["critic", "mean", "leave-one-out"]
Scale = Literal["rollout", "std", "none"]
Objective = Literal["clip", "cispo", "sequence"]
Average = Literal["tokens", "responses", "constant"]
KL = Literal["reward", "k2", "k3", "k3-ratio", "none"]
EqualGroups = Literal["keep", "drop"]


@dataclass(frozen=True)
class Algorithm:
    """A row of the table.  `AlgorithmOptions` says what each field means."""

    group: int
    baseline: Baseline
    scale: Scale
    objective: Objective
    clip_range: float
    clip_range_high: float
    average: Average
    kl: KL
    equal_groups: EqualGroups

    def __post_init__(self) -> None:
        critic = self.baseline == "critic"
        if not critic and self.group < 2:
            raise UserError(
                f"--baseline {self.baseline} compares the answers of a group: --group must be at least 2"
            )
        if critic and (self.scale == "std" or self.equal_groups == "drop" or self.objective == "sequence"):
            raise UserError(
                "--scale std, --equal-groups drop and --objective sequence take one advantage for a whole "
                "response: choose --baseline mean or leave-one-out"
            )


#                 group   baseline         scale      objective   clip  high  average      kl        equal
ALGORITHMS = {
  "ppo":     Algorithm(1, "critic",        "rollout", "clip",     .2,   .2,   "tokens",    "reward", "keep"),
  "rloo":    Algorithm(8, "leave-one-out", "none",    "clip",     .2,   .2,   "tokens",    "reward", "keep"),
  "grpo":    Algorithm(8, "mean",          "std",     "clip",     .2,   .2,   "responses", "k3",     "keep"),
  "dr-grpo": Algorithm(8, "mean",          "none",    "clip",     .2,   .2,   "constant",  "none",   "keep"),
  "dapo":    Algorithm(8, "mean",          "std",     "clip",     .2,   .28,  "tokens",    "none",   "drop"),
  "cispo":   Algorithm(8, "mean",          "std",     "cispo",    .2,   4.0,  "tokens",    "none",   "keep"),
  "gspo":    Algorithm(8, "mean",          "std",     "sequence", 3e-4, 4e-4, "responses", "none",   "keep"),
}  # fmt: skip


@dataclass(frozen=True)
class AlgorithmOptions:
    """Options that pick a row of the table and override its cells."""

    algorithm: Name = "ppo"
    """A row of the table in minirlhf/algorithms.py.  Each of the next nine options overrides one cell."""
    group: Count | None = None
    """Responses drawn for each prompt, one after another in the batch (PPO: 1; the others: 8)."""
    baseline: Baseline | None = None
    """What a response must beat.  critic: its value of each token; mean: that of the group; leave-one-out:
    that of the others in the group [D27]."""
    scale: Scale | None = None
    """What advantages are divided by: their standard deviation over the rollout, once they are centred [D10];
    that of the group's rewards [D27]; or nothing."""
    objective: Objective | None = None
    """Clip each token's ratio (PPO), cap it as a constant weight (CISPO), or clip the response's mean ratio
    (GSPO) [D29]."""
    clip_range: Above0 | None = None
    """The probability ratio is clipped at 1 minus this (Schulman et al. 2017: 0.2)."""
    clip_range_high: Above0 | None = None
    """The probability ratio is clipped at 1 plus this (DAPO: 0.28).  Default: as --clip-range, if given."""
    average: Average | None = None
    """The loss is a mean over tokens, or over each response and then over responses, or a sum divided by the
    length limit [D28]."""
    kl: KL | None = None
    """Where the KL to the reference enters: the reward of each token, or the loss by an estimator [D30], or
    nowhere."""
    equal_groups: EqualGroups | None = None
    """Groups without differences teach nothing: keep them in the mean of the loss, or drop them (DAPO)."""

    def row(self) -> Algorithm:
        """The row, with the cells that were given; UserError where they contradict each other."""
        row = ALGORITHMS[self.algorithm]
        objective = self.objective or row.objective
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        if objective == "cispo" and self.clip_range is not None:
            raise UserError(
                "--objective cispo caps ratios from above alone: give --clip-range-high, not --clip-range"
            )
        needed, range_ = ("-high", high) if objective == "cispo" else ("", self.clip_range)
        if objective != row.objective and range_ is None:  # the row's is made for another kind of ratio
            raise UserError(f"--objective {objective} needs a range of its own: give --clip-range{needed}")
        cells = {f.name: getattr(self, f.name) for f in fields(Algorithm)} | {"clip_range_high": high}
        given = {name: value for name, value in cells.items() if value is not None}
        return replace(row, **given)
