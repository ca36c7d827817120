"""Atomic, pickle-free checkpoints and exact resume [D21]. A run's folder OUT holds:

step-000120/   model.safetensors, config.json, tokenizer.*, metrics.jsonl so far; to resume: trainer.safetensors, .json
latest, best   relative symlinks to whole step folders, so that OUT can be moved; `latest` is flipped last
config.json …  links through `latest`: OUT itself reads as a checkpoint folder

    python -m minirlhf.checkpoint import SRC OUT     real weights become a checkpoint: see minirlhf.interop.convert
    python -m minirlhf.checkpoint export CKPT OUT    a checkpoint becomes a folder that transformers loads"""

import argparse
import json
import os
import shutil
import uuid
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from minirlhf import UserError
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.support.files import fsync
from minirlhf.tokenizer import Tokenizer


def save(out: Path, step: int, state: dict[str, Tensor], config: dict, tokenizer: Tokenizer,
         trainer: dict | None = None, keep: int = 1) -> Path:  # fmt: skip
    """Write OUT/step-XXXXXX, flip `latest`, then remove all but `keep` steps and the one `best` leads to. Killed at any
    moment it leaves the old checkpoint or the new one, whole. `trainer`: {'tensors': dict, 'state': for JSON}."""
    out, name = Path(out), f"step-{step:06d}"
    final, new = out / name, out / f".{name}.{uuid.uuid4().hex[:8]}"
    new.mkdir(parents=True)
    parts = [("model.safetensors", state, "config.json", config)]
    parts += (
        [("trainer.safetensors", trainer["tensors"], "trainer.json", trainer["state"])] if trainer else []
    )
    for tensor_file, tensors, json_file, document in parts:
        save_file(
            _apart(tensors), new / tensor_file, {"format": "pt"}
        )  # the tag is what transformers looks for
        (new / json_file).write_text(json.dumps(document, indent=1))
    tokenizer.save(new)
    if (out / "metrics.jsonl").is_file():
        shutil.copyfile(out / "metrics.jsonl", new / "metrics.jsonl")
    for path in [*new.iterdir(), new]:
        fsync(path)
    followers = [link for link in ("best", "latest") if name in (out / link).resolve().name]
    if final.exists():  # one folder cannot replace another at once: its links lead to hard links meanwhile
        shutil.copytree(final, f"{new}.old", copy_function=os.link)
        for link in followers:
            point(out, link, f"{new.name}.old")
        os.rename(final, f"{new}.gone")
    os.rename(new, final)
    for file in ("model.safetensors", "config.json", "tokenizer.tiktoken", "tokenizer.json"):
        if (final / file).exists():  # WordPiece has no ranks
            point(out, file, f"latest/{file}")
    for link in [*followers, "latest"]:
        point(out, link, name)
    older = sorted((path.name for path in out.glob("step-*") if path.name < name), reverse=True)
    kept = {
        name,
        (out / "best").resolve().name,
        *older[: keep - 1],
    }  # not the later steps of an abandoned run
    for path in [path for path in out.glob("*step-*") if path.name not in kept]:
        shutil.rmtree(
            path.rename(f"{new}.{path.name}")
        )  # renamed first: whatever bears a step's name is whole
    return final


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and copied only where memory is shared, which safetensors refuses: a copy of all optimisers
    would be the peak of a run."""
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        found[name] = (
            value.clone() if storage.data_ptr() in seen or storage.nbytes() != value.nbytes else value
        )
        seen.add(storage.data_ptr())
    return found


def point(out: Path, name: str, step: int | str) -> None:
    """Make the symlink OUT/`name` ('best' or 'latest') lead to the saved `step`, or to a relative path, at once."""
    temporary = Path(out, f".{name}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(f"step-{step:06d}" if isinstance(step, int) else step, temporary)
    os.replace(temporary, Path(out, name))
    fsync(Path(out))


def resolve(path: str | Path, remedy: str = "train that stage first or fix the path") -> Path:
    """The real folder of one checkpoint: where `latest` leads if `path` is a run folder, else `path` itself."""
    for folder in Path(path) / "latest", Path(path):
        if (folder / "config.json").is_file():
            folder = folder.resolve()
            if "model_type" in _read(folder / "config.json"):
                raise UserError(
                    f"{path}: a Hugging Face folder: python -m minirlhf.checkpoint import {path} OUT"
                )
            return folder
    raise UserError(f"{path}: no checkpoint here (no config.json, no latest): {remedy}")


def load_config(path: str | Path) -> dict:
    """config.json of the checkpoint at `path`: a run folder, a step folder or a link to one."""
    return _read(resolve(path) / "config.json")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of the checkpoint at `path`, on the CPU."""
    return _read(resolve(path) / "model.safetensors")


def load_trainer(path: str | Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and the state that `save` was given as `trainer`; None if it was given none."""
    file = resolve(path) / "trainer.json"
    return (_read(file.with_suffix(".safetensors")), _read(file)) if file.exists() else None


def check_tokenizer(config: dict, tokenizer: Tokenizer) -> None:
    """UserError unless `tokenizer` is the one that the checkpoint with this config was trained with."""
    if config.get("tokenizer", {}).get("hash") != tokenizer.hash:
        raise UserError("tokenizer does not match the checkpoint: use the one in the checkpoint's own folder")


def pack_optimizer(opt: Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """State of `opt` (AdamW: step, exp_avg, exp_avg_sq) as tensors '{prefix}{index}.{key}', all else for JSON."""
    state, groups = opt.state_dict()["state"], opt.state_dict()["param_groups"]
    tensors = {f"{prefix}{i}.{key}": value for i, slots in state.items() for key, value in slots.items()}
    return tensors, {"groups": groups, "keys": {i: list(slots) for i, slots in state.items()}}


def unpack_optimizer(opt: Optimizer, tensors: dict[str, Tensor], saved: dict, prefix: str) -> None:
    """Undo `pack_optimizer`, in an optimizer over the same parameters in the same order."""
    state = {int(i): {k: tensors[f"{prefix}{i}.{k}"] for k in keys} for i, keys in saved["keys"].items()}
    opt.load_state_dict({"state": state, "param_groups": saved["groups"]})


def load_gpt(path: str | Path, **changes: float) -> GPT:
    """The language model of an SFT or PPO checkpoint, on the CPU, with changes to its GPTConfig (dropout, say)."""
    return _fill(GPT(GPTConfig(**load_config(path)["model"] | changes)), path)


def writer(path: str | Path) -> tuple[Path, dict, Tokenizer]:
    """(folder, config.json, tokenizer) of a checkpoint that can write text; UserError of any other."""
    folder = resolve(path)
    config = load_config(folder)
    if "head" in config or not GPTConfig(**config["model"]).reads_prefixes:
        raise UserError(
            f"{path}: a {config['stage']} checkpoint writes no text: name one of train_sft.py or train_ppo.py"
        )
    tokenizer = Tokenizer.load(folder)
    check_tokenizer(config, tokenizer)
    return folder, config, tokenizer


def load_reward(path: str | Path) -> tuple[RewardEnsemble, Tokenizer]:
    """The reward model of a checkpoint, on the CPU, and the tokenizer that it reads with."""
    config = load_config(path)
    if "head" not in config:
        raise UserError(
            f"{path}: a {config.get('stage')} checkpoint, not a reward model: name one made by train_rm.py"
        )
    tokenizer = Tokenizer.load(resolve(path))
    check_tokenizer(config, tokenizer)
    return _fill(RewardEnsemble(GPTConfig(**config["model"]), **config["head"]), path), tokenizer


def _fill(model: Module, path: str | Path) -> Module:
    try:
        model.load_state_dict(load_state(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: weights do not fit config.json: {str(error).splitlines()[1].strip()}"
        ) from None
    return model


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes()) if file.suffix == ".json" else load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        reason = (
            str(error).splitlines()[0] if file.exists() else "missing (a pickle, .bin or .pt, is never read)"
        )
        raise UserError(f"{file}: {reason}: take another step folder or train again") from error


def main() -> None:
    parser = argparse.ArgumentParser("python -m minirlhf.checkpoint", description="Real models in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser(
        "import", help="a Hugging Face folder or a .gguf file becomes a checkpoint"
    )
    importing.add_argument(
        "source", help="folder, .gguf file, smollm2 or minilm (inside the packages of those extras)"
    )
    importing.add_argument("out", type=Path)
    exporting = commands.add_parser("export", help="a checkpoint becomes a folder that transformers loads")
    exporting.add_argument("source", type=Path, metavar="checkpoint")
    exporting.add_argument("out", type=Path)
    exporting.add_argument(
        "--backbone", action="store_true", help="of a reward model: the model under its head"
    )
    args = parser.parse_args()
    from minirlhf.interop import convert

    if args.command == "import":
        print(f"{args.out}: {convert.import_model(args.source, args.out)}")
    else:
        print(f"{args.out}: loads as {convert.export_model(args.source, args.out, args.backbone)}")


if __name__ == "__main__":
    from minirlhf.support.cli import run_script

    run_script(main)
