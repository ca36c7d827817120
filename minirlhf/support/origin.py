"""Where the checkpoints are now that another one was made from: told by their checksums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minirlhf import UserError
from minirlhf.support.fit import DAMAGED
from minirlhf.support.sums import read_json


def inputs_of(config: dict, where: object) -> dict[str, str]:
    """What config.json says that a run was made from, checksums and paths; UserError for anything else."""
    inputs = config.get("inputs", {})
    if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        raise UserError(f"{where}/config.json: inputs: {inputs!r:.60} are no checksums and paths: {DAMAGED}")
    return inputs


def names(config: dict, name: str) -> dict[str, object]:
    """What config.json says of the input `name`: its checksum and paths by their keys; {} if it has none."""
    inputs = config.get("inputs")
    keys = (name, f"{name}_path", f"{name}_relative_path")
    return {key: inputs[key] for key in keys if key in inputs} if isinstance(inputs, dict) else {}


def find(folder: Path, name: str, fingerprint: Callable[[Path], str], remedy: str) -> Path:
    """The checkpoint that the one in the step folder `folder` names as its input `name`.

    It is where it was then, where it was as seen from the folder (runs that were copied together), or beside
    the run.  Raises UserError, with the remedy, where it is not there or was trained again since.
    """
    named = names(read_json(folder / "config.json", "train again"), name)
    checksum, recorded, relative = (named.get(f"{name}{end}") for end in ("", "_path", "_relative_path"))
    if not all(isinstance(value, str) and value for value in (checksum, recorded, relative)):
        raise UserError(f"{folder}/config.json: names no checkpoint that the policy was trained from")
    step, out = Path(recorded), folder.parent
    run = step.parent if step.name.startswith("step-") else step
    places = [step, out / relative, run, out.parent / run.name]
    there = [place for place in places if (place / "config.json").is_file()]
    same = [place for place in there if fingerprint(place) == checksum]
    if not same:
        why = "was trained again since, or replaced" if there else "is not here"
        raise UserError(
            f"{folder}: needs {recorded!r:.100}, which {why} (want sha256 {checksum[:12]}): {remedy}"
        )
    return same[0]
