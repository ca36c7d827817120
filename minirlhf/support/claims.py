"""May a stage use a folder?  What it holds is compared with what is asked for, so that no run is lost or
mistaken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minirlhf import UserError
from minirlhf.support import steps
from minirlhf.support.files import LOCK
from minirlhf.support.origin import inputs_of

NOT_SETTINGS = {
    "out",
    "resume",
    "overwrite",
    "track",
    "data_dir",
    "save_samples",
    "shard",
}  # they change no result


WRITTEN = (*steps.LINKED, "metrics.jsonl", "samples.jsonl")  # what a run writes into OUT and may replace


def refuse_foreign(out: Path) -> None:
    """UserError where OUT holds files that a run would replace, but no run: a downloaded model, say."""
    if (out / LOCK).exists() or (out / "latest").exists() or steps.whole_steps(out):
        return
    if found := [name for name in WRITTEN if (out / name).is_file()]:
        raise UserError(f"{out} holds a {found[0]} that is no run's, and would be lost: choose another --out")


def refuse_inside(out: Path, name: str, folder: Path) -> None:
    """UserError where a run that starts again in OUT would remove the checkpoint that it starts from."""
    if out.resolve() in (folder.resolve(), folder.resolve().parent):
        raise UserError(
            f"--{name.replace('_', '-')} {folder} lies in --out {out}, where this run would replace it: "
            f"choose another --out"
        )


DEMO_WIDTH = 192  # channels of the model that the demo's settings are for


def demo_settings(config: Any, init: Path, about: dict) -> str | None:
    """A remark where a model (config.json: about) far wider than the demo's is trained at the demo's rate."""
    shape = about.get("model")
    width = shape.get("n_embd") if isinstance(shape, dict) else None  # building the model checks it
    if not isinstance(width, int) or width < 2 * DEMO_WIDTH:
        return None
    if getattr(config, "preset", None) != "demo" or config.lr != type(config)().lr:
        return None
    return (
        f"note: --lr {config.lr:g} and the rest of --preset demo are for a small model from scratch, and "
        f"{init} has {width} channels: --preset pretrained is for such a model"
    )


def claim(
    out: Path, saved: dict | None, stage: str, settings: dict[str, Any], resume: bool, overwrite: bool
) -> str:
    """'start', 'resume' or 'complete' for a stage with these settings in the folder `out`.

    `saved` is the config.json that OUT/latest leads to, None if it leads to none.  Raises UserError where the
    folder holds another run, or one that cannot be resumed.  `overwrite` replaces runs of the same stage."""
    if saved is not None and saved.get("stage") != stage:
        raise UserError(f"{out} holds a checkpoint of stage {saved.get('stage')}: choose another --out")
    if overwrite:
        return "start"
    if saved is None:
        if found := steps.whole_steps(out):
            raise UserError(
                f"{out} holds {found[-1]}, but its link `latest` leads to no checkpoint: "
                f"ln -sfn {found[-1]} {out}/latest and --resume goes on; --overwrite starts again"
            )
        return "start"
    before = saved.get("training")
    if not isinstance(before, dict):
        raise UserError(f"{out}: its config.json is damaged (no settings): --overwrite starts again")
    other = sorted(k for k in settings.keys() - NOT_SETTINGS if before.get(k, settings[k]) != settings[k])
    if other:
        change = ", ".join(f"{k} ({before[k]}, now {settings[k]})" for k in other)
        raise UserError(f"{out} holds a run with another {change}: choose a new --out, or --overwrite")
    if saved.get("complete"):
        return "complete"
    step = saved.get("step")
    if not resume:
        raise UserError(
            f"{out} holds an unfinished run (step {step}): --resume goes on, --overwrite starts again"
        )
    if not (out / "latest" / "trainer.json").is_file():
        raise UserError(
            f"{out} holds step {step} without trainer.json, so it cannot be resumed: "
            f"give it as --init of a new run, or --overwrite"
        )
    return "resume"


def compare_inputs(out: Path, saved: dict, inputs: dict[str, str]) -> None:
    """UserError where the run in OUT was made from other data, or other checkpoints, than it would be now.

    `inputs` holds a sha256 by name; names that end in _path are only for people.
    """
    before = inputs_of(saved, out)
    for name, now in inputs.items():
        if not name.endswith("_path") and before.get(name, now) != now:
            raise UserError(
                f"{out} was made from another {name.replace('_', ' ')} "
                f"(sha256 {before[name][:12]}, now {now[:12]}): choose a new --out, or --overwrite"
            )
