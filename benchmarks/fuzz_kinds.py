"""What benchmarks/fuzz.py damages: for each kind valid seeds, what reads them, and inputs made to hurt."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sqlite3
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train_sft
from benchmarks.fuzz import CANARY, Files, Kind, nested
from minirlhf import UserError, checkpoint, data
from minirlhf.interop import chat_template, convert
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, SMOLLM_PATTERN
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.support import functions
from minirlhf.support.folder import Folder
from minirlhf.support.hardware import Machine
from minirlhf.support.state import pack_optimizer
from minirlhf.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat, the cat's hat", "naïve café 1234 567", "  def f(x):\n    return x\n\n"]
SHAPE = {"context": 32, "n_layer": 1, "n_head": 2, "n_embd": 8}
LLAMA = SHAPE | {
    "n_kv_head": 1,
    "n_inner": 24,
    "norm": "rms",
    "positions": "rotary",
    "mlp": "swiglu",
    "bias": False,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MEGA = 1 << 20


def tokenizer() -> Tokenizer:
    if not hasattr(tokenizer, "made"):
        tokenizer.made = Tokenizer.train(TEXTS, 290)
    return Tokenizer(tokenizer.made.ranks)


def files_in(folder: Path) -> Files:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


# ---------------------------------------------------------------- data


ROWS = [
    {"text": "A film that I liked.", "genre": "movies"},
    {"prompt": "Say it:", "completion": " at once"},
    {"prompt": "Say it:", "response": " at once", "label": True},
    {"prompt": "Which?", "chosen": " this", "rejected": " that"},
    {"prompt": "Which?", "response_a": " this", "response_b": " that", "votes": {"a": 2, "b": 1, "tie": 0}},
    {"prompt": "Which?", "response_a": " this", "response_b": " that", "votes": {"ann": "a", "bob": "tie"}},
    {"text": "Not bad.", "rating": 3, "scale": [1, 5]},
    {"text": "Not bad.", "ratings": {"ann": 4, "bob": 2}, "scale": [1, 5]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Ho"}], "rejected": " no"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "tools": []},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "Add", "completions": [{"response": "3", "overall_score": 4}, {"response": "4", "overall_score": 1}]},
    {"prompt": "Only this"},
]  # fmt: skip


def rows_as(suffix: str) -> Callable[[Path], list[Files]]:
    def seeds(folder: Path) -> list[Files]:
        found = []
        for i, row in enumerate(ROWS):
            rows = [
                {
                    k: f"{v} {n}" if k in ("text", "prompt") and isinstance(v, str) else v
                    for k, v in row.items()
                }
                for n in range(5)
            ]
            lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
            content = (
                json.dumps(rows if i % 2 else {"data": rows}).encode()
                if "json" in suffix and "l" not in suffix
                else lines
            )
            content = b"A line.\nAnother one.\n\nA third.\n" if suffix == ".txt" else content
            found.append({f"rows{suffix}": gzip.compress(content) if suffix.endswith(".gz") else content})
        return found

    return seeds


def read_data(folder: Path) -> None:
    """Load, count, encode for every stage that can learn from such rows, and describe."""
    source = data.load(folder, skip_bad=len(os.listdir(folder)) % 2 == 0)
    source.describe()
    tok, records = tokenizer(), [r for r in source.records[:50] if len(r.texts[0]) < MEGA]
    for encode in (
        lambda: data.encode_examples(tok, records, 48, "cut"),
        lambda: data.encode_prompts(tok, records, 4, 24, "cut"),
        lambda: data.encode_judged(tok, records, 48, "cut"),
    ):
        with contextlib.suppress(UserError):
            encode()  # in time that grows with the text: long ones are left out here


def gzip_bomb(content: bytes, times: int) -> bytes:
    """The content many times over, compressed, without being in memory."""
    out, block = io.BytesIO(), content * 1000
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6) as file:
        for _ in range(times // 1000):
            file.write(block)
    return out.getvalue()


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


DATA_BOMBS = {
    "a line of 200 MB": lambda: {"rows.jsonl": line(text="x y " * 50 * MEGA)},
    "a line of 200 MB without quotes": lambda: {"rows.jsonl": b"[" * 200 * MEGA},
    "a million keys": lambda: {"rows.jsonl": json.dumps({f"k{i}": i for i in range(10**6)}).encode()},
    "a million ratings": lambda: {"rows.jsonl": line(text="x", ratings={f"r{i}": 3 for i in range(10**6)}, scale=[1, 5])},
    "nested brackets": lambda: {"rows.jsonl": b'{"text": ' + b"[" * 10**6 + b"]" * 10**6 + b"}"},
    "a million rows": lambda: {"rows.jsonl": line(text="odd plot") * 10**6},
    "new lines": lambda: {"rows.jsonl": b"\n" * 20 * MEGA + line(text="x")},
    "a number of a million digits": lambda: {"rows.jsonl": b'{"text": "x", "rating": ' + b"9" * 10**6 + b"}\n"},
}  # fmt: skip


# ---------------------------------------------------------------- checkpoints


def make_checkpoint(out: Path, stage: str, shape: dict, head: dict | None = None, **about: Any) -> None:
    torch.manual_seed(0)
    tok = tokenizer()
    if "template" in about:
        about.pop("template")
        tok.hf = {"chat_template": "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"}
    config = GPTConfig(vocab_size=tok.vocab_size, **shape)
    model = RewardEnsemble(config, **head) if head else GPT(config)
    settings = train_sft.Config(preset="smoke", out=out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    tensors, packed = pack_optimizer(optimizer, "optimizer.")
    state = {"step": 3, "seconds": 1.5, "counters": {"best": 1.0, "best_step": 1, "best_epoch": 0}}
    trainer = {"tensors": tensors, "state": state | {"optimizers": {"optimizer": packed}}}
    out.mkdir(parents=True)
    lines = [{"step": i, "train/loss": 1.0} for i in (1, 2, 3)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (out / "samples.jsonl").write_text(
        "".join(json.dumps({"step": 1, "prompt": "a", "response": "b"}) + "\n" for _ in "ab")
    )
    more = {"head": head} if head else {}
    described = checkpoint.describe(
        stage, config, settings, 3, False, tok, world=1, inputs={"data": "x" * 64}, **more, **about
    )
    checkpoint.save(out, 3, model.state_dict(), described, tok, trainer)


def checkpoints(folder: Path) -> list[Files]:
    shapes = [
        ("sft", SHAPE, None),
        ("sft", LLAMA | {"tied": False, "rope_scaling": SCALING, "nope_layers": [0]}, None),
        ("rm", SHAPE, {"members": 2, "pooling": "last", "mlp": True}),
        ("ppo", LLAMA | {"qk_norm": True, "lora_rank": 2}, None),
        (
            "rm",
            SHAPE | {"causal": False, "pre_norm": False},
            {"members": 1, "pooling": "last+mean", "mlp": False},
        ),
    ]
    for i, (stage, shape, head) in enumerate(shapes):
        make_checkpoint(folder / str(i), stage, shape, head)
    return [files_in((folder / str(i) / "latest").resolve()) for i in range(len(shapes))]


def sound_again(files: Files) -> Files:
    """The checksums in config.json, trainer.json and SHA256SUMS made those of the files beside them."""
    found = dict(files)
    found.pop("SHA256SUMS", None)
    for name in ("model", "trainer"):
        about = f"{'config' if name == 'model' else name}.json"
        document = json.loads(found[about])
        document["sha256"] = hashlib.sha256(found[f"{name}.safetensors"]).hexdigest()
        found[about] = json.dumps(document).encode()
    return found


def read_checkpoint(folder: Path) -> None:
    """What chat, the stages, evaluate and export do with a checkpoint that they are given."""
    with contextlib.suppress(UserError):
        from minirlhf.tools.chat import Speaker

        Speaker(folder, response_tokens=2).answer("the cat")
    with contextlib.suppress(UserError):
        from minirlhf.rewards import RewardReader

        RewardReader.load(folder, "x")
    with contextlib.suppress(UserError):
        from minirlhf.tools import evaluate

        evaluate.settings_of(checkpoint.load_config(folder), folder, evaluate.SETTINGS)
        evaluate.maximised_model(checkpoint.load_config(folder), folder)
        evaluate.trusted_rewards(checkpoint.load_config(folder))
    with contextlib.suppress(UserError):
        checkpoint.base_of(folder)
    for backbone in (True, False):
        with contextlib.suppress(UserError):
            convert.export_model(folder, folder / f"out {backbone}", backbone)
    checkpoint.shape_of(folder)
    checkpoint.load_state(folder)
    checkpoint.tokenizer_of(folder)


def config_bomb(change: Callable[[dict], None]) -> Callable[[], Files]:
    """The checkpoint of a reward model whose config.json was changed."""

    def make() -> Files:
        files = dict(KINDS["checkpoint"].made[2])
        document = json.loads(files["config.json"])
        change(document)
        return files | {"config.json": json.dumps(document).encode()}

    return make


CHECKPOINT_BOMBS = {
    "n_layer 1e9": config_bomb(lambda c: c["model"].update(n_layer=10**9)),
    "n_layer 1000, members 100": config_bomb(lambda c: (c["model"].update(n_layer=1000), c["head"].update(members=100))),
    "n_embd 100000": config_bomb(lambda c: c["model"].update(n_embd=100_000, n_head=1)),
    "members 1e6": config_bomb(lambda c: c["head"].update(members=10**6)),
    "members 1e6 beside a base": config_bomb(lambda c: (c["head"].update(members=10**6), c["inputs"].update(
        base="0" * 64, base_path="x", base_relative_path="."))),
    "vocab_size 2e9": config_bomb(lambda c: c["model"].update(vocab_size=2 * 10**9)),
    "context 2e9": config_bomb(lambda c: c["model"].update(context=2 * 10**9)),
    "lora_rank 2e9": config_bomb(lambda c: c["model"].update(lora_rank=2 * 10**9)),
    "head as keywords": config_bomb(lambda c: c["head"].update({"self": 1, "config": 2})),
    "nested brackets": lambda: KINDS["checkpoint"].made[0] | {"config.json": b"[" * 10**6},
    "a million keys": config_bomb(lambda c: c.update({f"k{i}": i for i in range(10**6)})),
    "a base outside": config_bomb(lambda c: c["inputs"].update(base="0" * 64, base_path="/etc", base_relative_path="../" * 9)),
    "a pattern that backtracks": lambda: KINDS["checkpoint"].made[0] | {"tokenizer.json": json.dumps(
        json.loads(KINDS["checkpoint"].made[0]["tokenizer.json"]) | {"pattern": "(a+)+$"}).encode()},
}  # fmt: skip


# ---------------------------------------------------------------- a run that is resumed


def runs(folder: Path) -> list[Files]:
    make_checkpoint(folder / "sft", "sft", SHAPE)
    return [
        files_in((folder / "sft" / "latest").resolve())
        | {"samples.jsonl": (folder / "sft/samples.jsonl").read_bytes()}
    ]


def read_run(folder: Path) -> None:
    """What train_sft.py --resume does with a run's folder."""
    out = folder / "run"
    (out / "step-000003").mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / ("" if path.name == "samples.jsonl" else "step-000003") / path.name)
    with contextlib.suppress(OSError):
        shutil.copyfile(folder / "metrics.jsonl", out / "metrics.jsonl")
    os.symlink("step-000003", out / "latest")
    saved = out / "latest" / "config.json"
    settings = train_sft.Config(preset="smoke", out=out, resume=True)
    machine = Machine(torch.device("cpu"))
    run = Folder("sft", settings, machine)
    try:
        run.print = lambda text: None
        source = types.SimpleNamespace(name="x", sha256="x" * 64, records=[], describe=lambda: "x")
        if not run.begin(source):
            return
        tok, model = checkpoint.tokenizer_of(out), checkpoint.load_gpt(out)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run.resume(tok, model, {"best": 1.0, "best_step": 0, "best_epoch": 0}, optimizer=optimizer)
        model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        optimizer.step()
        range(run.step), float(run.seconds), run.counters["best"] < 1.0, run.counters["best_epoch"] + 1
        assert saved.exists()
    finally:
        if run.lock:
            run.lock.release()


# ---------------------------------------------------------------- tokenizers


def tokenizers(folder: Path) -> list[Files]:
    plain = tokenizer()
    n = len(plain.ranks)
    specials = {"<|endoftext|>": n, "<|pad|>": n + 1, "<think>": n + 2, "<|im_end|>": n + 3}
    rich = Tokenizer(
        plain.ranks, SMOLLM_PATTERN, specials, normalize="NFC", added={"<think>": False}, flags={"<think>": ["lstrip"]},
        hf={"ends": [n + 3], "chat_template": "{{ messages[0]['content'] }}", "bos_token": "<|endoftext|>", "unreached": []},
    )  # fmt: skip
    plain.save(folder / "plain")
    rich.save(folder / "rich")
    return [files_in(folder / "plain"), files_in(folder / "rich")]


def read_tokenizer(folder: Path) -> None:
    found = Tokenizer.load(folder)
    for text in HARD_TEXTS[:20]:
        found.decode(found.encode(text))
    found.token_str(found.pad)
    found.save(folder / "again")


def hashed_again(files: Files) -> Files:
    """tokenizer.json with the hash of what it holds, as whoever changed it would write it."""
    from minirlhf.support import bpe, vocabulary

    saved = json.loads(files["tokenizer.json"])
    ranks = {
        base64.b64decode(t): int(r)
        for t, r in (row.split() for row in files["tokenizer.tiktoken"].splitlines())
    }
    kind = type("Unchecked", (Tokenizer,), {})
    check, vocabulary.check = vocabulary.check, lambda tokenizer, ids: None
    try:
        found = kind(ranks, **{k: v for k, v in saved.items() if k not in ("format", "hash")})
    finally:
        vocabulary.check = check
    assert bpe.dump(ranks)
    return files | {"tokenizer.json": json.dumps(saved | {"hash": found.hash}).encode()}


# ---------------------------------------------------------------- imported models


def hf_folders(folder: Path) -> list[Files]:
    found = []
    shapes = {
        "gpt2": SHAPE,
        "llama": LLAMA | {"tied": False, "rope_scaling": SCALING},
        "qwen": LLAMA | {"qkv_bias": True, "tied": False},
    }
    for name, shape in shapes.items():
        make_checkpoint(folder / f"{name} ours", "sft", shape)
        convert.export_model(folder / f"{name} ours", folder / name, backbone=False)
        found.append(files_in(folder / name))
    weights = found[1]["model.safetensors"]
    index = {
        "metadata": {},
        "weight_map": {key: "model.safetensors" for key in ("model.norm.weight", "lm_head.weight")},
    }
    found.append(
        found[1] | {"model.safetensors.index.json": json.dumps(index).encode(), "model.safetensors": weights}
    )
    return found


def read_hf(folder: Path) -> None:
    convert.import_model(str(folder), folder / "ours")
    checkpoint.load_gpt(folder / "ours")
    checkpoint.tokenizer_of(folder / "ours")


def hf_bomb(file: str, change: Callable[[dict], None]) -> Callable[[], Files]:
    def make() -> Files:
        files = dict(KINDS["hf"].made[3])
        document = json.loads(files[file])
        change(document)
        return files | {file: json.dumps(document).encode()}

    return make


HF_BOMBS = {
    "layers 1e9": hf_bomb("config.json", lambda c: c.update(num_hidden_layers=10**9)),
    "hidden 1e6": hf_bomb("config.json", lambda c: c.update(hidden_size=10**6, head_dim=8)),
    "weight_map outside": hf_bomb("model.safetensors.index.json", lambda c: c["weight_map"].update(x=f"../{CANARY}")),
    "weight_map absolute": hf_bomb("model.safetensors.index.json", lambda c: c["weight_map"].update(x="/etc/passwd")),
    "a million weights": hf_bomb("model.safetensors.index.json", lambda c: c["weight_map"].update({f"w{i}": f"f{i}" for i in range(10**6)})),
    "a million added tokens": hf_bomb("tokenizer.json", lambda c: c["added_tokens"].extend(
        {"id": i, "content": f"<{i}>", "special": True} for i in range(300, 10**6))),
    "a token of a million letters": hf_bomb("tokenizer.json", lambda c: c["model"]["vocab"].update({"x" * 10**6: 5000})),
    "a name of a thousand added tokens": hf_bomb("tokenizer.json", lambda c: c["added_tokens"].extend(
        {"id": 300 + i, "content": "a" * i + "b", "special": False, "normalized": False, "lstrip": True, "rstrip": True, "single_word": False}
        for i in range(1000))),
}  # fmt: skip


def gguf_files(folder: Path) -> list[Files]:
    import gguf
    import numpy as np

    from minirlhf.interop.convert_tokenizer import CHARACTERS

    folder.mkdir(parents=True)
    tok = Tokenizer.train(HARD_TEXTS, 300, SMOLLM_PATTERN)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    keys = {"context_length": 32, "block_count": 1, "attention.head_count": 2, "attention.head_count_kv": 1,
            "embedding_length": 8, "feed_forward_length": 24, "rope.dimension_count": 4}  # fmt: skip
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 777.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    word = lambda token: "".join(CHARACTERS[b] for b in token)
    ranks = sorted(tok.ranks, key=tok.ranks.get)
    pieces = [next(t[:i] for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks) for t in ranks[256:]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([word(t) for t in ranks] + ["<|end|>", "<|user|>"])
    writer.add_token_types([1] * len(ranks) + [3] * 2)
    writer.add_token_merges(
        [f"{word(a)} {word(t[len(a) :])}" for a, t in zip(pieces, ranks[256:], strict=True)]
    )
    writer.add_eos_token_id(len(ranks))
    writer.add_bos_token_id(len(ranks) + 1)
    shapes = {"token_embd": (300, 8), "output_norm": (8,), "output": (300, 8), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
              "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
              "blk.0.ffn_up": (24, 8), "blk.0.ffn_gate": (24, 8), "blk.0.ffn_down": (8, 24)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [files_in(folder)]


def read_gguf(folder: Path) -> None:
    convert.import_model(str(folder / "tiny.gguf"), folder / "ours")


def gguf_bomb(fields: int, tensors: int) -> Callable[[], Files]:
    return lambda: {"tiny.gguf": b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"\0" * 10_000}


# ---------------------------------------------------------------- templates, rewards


MESSAGES = [
    {"role": "user", "content": "What is it? <|endoftext|>"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "  Because "},
]
TEMPLATES = [
    "{% for m in messages %}{{ '<|endoftext|>' + m['role'] + '\n' + m['content'] + '<|pad|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|endoftext|>assistant\n' }}{% endif %}",
    "{%- for m in messages %}{%- if m.role == 'assistant' %}A: {% generation %}{{ m.content | trim }}{% endgeneration %}{%- else %}{{ loop.index ~ ': ' ~ m.content }}{%- endif %}\n{%- endfor %}",
    "{% set ns = namespace(found=false) %}{% macro show(x, depth=0) %}{{ x | tojson(indent=1) }}{% if depth < 3 %}{{ show(x, depth + 1) }}{% endif %}{% endmacro %}{% for m in messages[::-1] | reverse %}{{ show(m) | length }}{{ '%s: %d' % (m.role, loop.index) }}{{ bos_token * 2 }}{% endfor %}",
]


def templates(folder: Path) -> list[Files]:
    return [{"template": t.encode(), "messages.json": json.dumps(MESSAGES).encode()} for t in TEMPLATES]


def read_template(folder: Path) -> None:
    tok = tokenizer()
    if not (folder / "template").exists():
        return
    tok.hf = {"chat_template": (folder / "template").read_bytes().decode("utf-8", "replace")}
    tok.layout.name = "template"
    try:
        messages = json.loads((folder / "messages.json").read_bytes())
        row = json.dumps({"messages": messages}, ensure_ascii=True)
    except (OSError, ValueError, RecursionError):
        row = json.dumps({"messages": MESSAGES})
    (folder / "rows.jsonl").write_text(row + "\n")
    records = data.load(folder / "rows.jsonl").records
    with contextlib.suppress(UserError):
        chat_template.encode(tok, MESSAGES[:1], answer=True)
    with contextlib.suppress(UserError):
        chat_template.end_of_turn(tok.hf["chat_template"], tok.specials, {"bos_token": "<|endoftext|>"})
    data.encode_examples(tok, records, 64, "cut", learn="all")


def template_bomb(text: str) -> Callable[[], Files]:
    return lambda: {"template": text.encode(), "messages.json": json.dumps(MESSAGES).encode()}


TEMPLATE_BOMBS = {
    name: template_bomb(text)
    for name, text in {
        "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "two macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "a power": "{{ (10 ** 100000000) | string | length }}",
        "powers of powers": "{% set n = namespace(x=2) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "a product of texts": "{{ 'x' * 2000000000 }}",
        "a product of lists": "{{ ([1] * 2000000000) | length }}",
        "doubling": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "doubling by ~": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "doubling by join": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "doubling by replace": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
        "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "nesting lists": "{% set n = namespace(x=[1]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        "shared lists": "{% set n = namespace(x=['abcdefgh']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string | length }}",
        "shared lists as JSON": "{% set n = namespace(x=['abcdefgh']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "shared lists compared": "{% set n = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
        "width": "{{ 'x'.center(2000000000) }}{{ '%2000000000d' % 1 }}{{ '{:2000000000}'.format(1) }}",
        "width given": "{{ '%*d' % (2000000000, 1) }}",
        "format of format": "{{ ('{:' ~ 2000000000 ~ '}').format(1) }}",
        "sum": "{{ range(99999) | list | sum }}{{ range(10 ** 9) | list | length }}",
        "slices": "{{ ('x' * 900000) | list | map('upper') | list | length }}{{ range(99999) | batch(1) | list | length }}",
        "a regular expression": "{{ ('a' * 100000) | urlize }}{{ ('<' * 100000) | striptags }}{{ ('a ' * 100000) | wordwrap(2) }}",
        "a text of nesting": "{{ '[' * 100000 }}" + "(" * 5000,
        "deep source": "{% if true %}" * 2000 + "x" + "{% endif %}" * 2000,
        "a long source": "{{ 'x' }}" * 200_000,
        "insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ namespace.__init__.__globals__ }}",
        "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "import": "{% import 'x' as y %}{% include '/etc/passwd' %}",
        "dates": "{{ strftime_now('%Y' * 300000) }}{{ strftime_now('%999999999Y') }}",
        "dividing": "{{ 1 // 0 }}",
        "surrogates": "{{ '\\ud800' }}x",
    }.items()
}  # fmt: skip


REWARD = b"def reward(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"


def rewards(folder: Path) -> list[Files]:
    return [
        {"spec": spec.encode(), "mine.py": REWARD}
        for spec in ("mine:reward", "mine:reward:-0.5", "rm:2", "minirlhf.rewards:length:1e-2")
    ]


def read_reward(folder: Path) -> None:
    spec = (
        (folder / "spec").read_bytes().decode("utf-8", "replace")
        if (folder / "spec").exists()
        else "mine:reward"
    )
    sys.path.insert(0, str(folder))
    sys.modules.pop("mine", None)
    importlib.invalidate_caches()
    before = {*sys.modules}
    try:
        for name, function, _ in functions.load_rewards([spec]):
            if function is not None:
                functions.call(function, ["a", "b"], ["c", "d"], name)
    finally:
        sys.path.remove(str(folder))
        for name in {*sys.modules} - before:
            del sys.modules[name]


def reward_bomb(body: str) -> Callable[[], Files]:
    return lambda: {
        "spec": b"mine:reward",
        "mine.py": f"def reward(prompts, responses):\n    {body}\n".encode(),
    }


REWARD_BOMBS = {
    body: reward_bomb(body)
    for body in (
        "import itertools; return itertools.count()", "return [10**400] * 2", "return 5", "raise SystemExit(0)", "return [None, 1]",
        "return [1j, 1]", "return {1: 1, 2: 2}", "raise KeyError('\\x1b[31m' * 100)", "return [float('nan')] * 2", "reward()", "yield",
        "return reward(prompts, responses)", "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})()", "raise GeneratorExit",
    )
}  # fmt: skip


# ---------------------------------------------------------------- the feedback server and its store


def make_store(folder: Path) -> Path:
    from minirlhf.feedback.store import Policy, Store

    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / "store.db", Policy(), create=True, seed=1)
    items = [
        {"mode": "pair", "prompt": f"P {i}", "a": f"a {i}", "b": f"b {i}", "gold": "a" if i == 3 else None}
        for i in range(6)
    ]
    store.add(
        items
        + [
            {"mode": "rating", "prompt": f"P {i}", "a": f"a {i}", "gold": 3 if i == 2 else None}
            for i in range(6)
        ]
    )
    for rater in ("ann", "bob"):
        item = store.next(rater)
        for n in range(8):
            answer = {"choice": "left"} if item["mode"] == "pair" else {"rating": 1 + n % 5, "note": "good"}
            item = store.vote(rater, item["item"], item["lease"], answer)
        store.undo(rater)
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.db.close()
    store.reader.close()
    return folder / "store.db"


def requests(folder: Path) -> list[Files]:
    """Requests to a server with items and a session of its own; ITEM and LEASE are put in by read_requests."""
    bodies = [
        ("/api/join", {"name": "ann", "token": "t" * 20}),
        ("/api/next", {"release": True}),
        (
            "/api/vote",
            {
                "item": "ITEM",
                "lease": "LEASE",
                "answer": {"choice": "left", "strength": 2, "note": "n", "seconds": 1.5},
            },
        ),
        ("/api/vote", {"item": "ITEM", "lease": "LEASE", "answer": {"skip": True}}),
        ("/api/undo", {}),
        ("/api/edit", {"item": "ITEM", "repeat": 0}),
    ]
    headers = {"Host": "localhost", "Origin": "http://localhost", "Content-Type": "application/json"}
    return [
        {
            "request.json": json.dumps({"path": p, "body": b, "headers": headers}).encode(),
            "body": json.dumps(b).encode(),
        }
        for p, b in bodies
    ]


SERVER: dict[str, Any] = {}


def start_server(folder: Path) -> None:
    from minirlhf.feedback.server import create_app
    from minirlhf.feedback.store import Policy, Store

    SERVER["store"] = Store(make_store(folder), Policy())
    SERVER["app"] = create_app(SERVER["store"], token="t" * 20)
    SERVER["app"].logger.disabled = not os.environ.get("FUZZ_STDERR")


def read_requests(folder: Path) -> None:
    """Send the request, and its body as bytes; a bug of the server's (status 500, or an exception) is raised."""
    store, client = SERVER["store"], SERVER["app"].test_client()
    base = {"Origin": "http://localhost", "X-CSRF-Token": client.get("/api/me").json["csrf"]}
    client.post("/api/join", json={"name": "ann", "token": "t" * 20}, headers=base)
    item = store.next("ann", release=False) or {"item": "x", "lease": "y"}
    filled = lambda raw: raw.replace(b"ITEM", item["item"].encode()).replace(b"LEASE", item["lease"].encode())
    path, headers, body = "/api/vote", {}, b""
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        document = json.loads(filled((folder / "request.json").read_bytes()))
        body = json.dumps(document["body"]).encode("utf-8", "surrogatepass")
        headers = {
            k: str(v).replace("\n", " ").replace("\r", " ")
            for k, v in document["headers"].items()
            if k.isascii() and k
        }
        path = "/" + str(document["path"]).lstrip("/").encode("ascii", "replace").decode()
    raw = filled((folder / "body").read_bytes()) if (folder / "body").exists() else b""
    for sent, more in ((body, headers), (raw, {"Content-Type": "application/json"})):
        clean = {k: v for k, v in (base | more).items() if all(31 < ord(c) < 256 for c in k + v)}
        response = client.post(path, data=sent, headers=clean)
        if response.status_code >= 500:
            raise AssertionError(f"status {response.status_code}: {response.get_data()[:200]!r}")
    if client.get("/api/history").status_code != 200:
        raise AssertionError("history")


REQUEST_BOMBS = {
    name: (lambda body=body: {"body": body, "request.json": b"{}"})
    for name, body in {
        "surrogates": b'{"item": "\\ud800", "lease": "\\udfff", "answer": {}}',
        "nested": b"[" * 10**5,
        "large": b" " * 10**6 + b"{}",
        "NaN": b'{"item": "ITEM", "lease": "LEASE", "answer": {"choice": "left", "seconds": NaN}}',
        "digits": b'{"item": "ITEM", "lease": "LEASE", "answer": {"choice": "left", "seconds": ' + b"9" * 5000 + b"}}",
        "NUL": b'{"item": "\\u0000", "lease": "\\u0000"}',
    }.items()
}  # fmt: skip


COLUMNS = ("items.prompt", "items.a", "items.b", "items.gold", "items.source", "items.place", "items.votes", "items.mode", "events.at",
           "events.kind", "events.data", "events.rater", "current.repeat", "meta.value", "meta.key", "leases.expires")  # fmt: skip


def stores(folder: Path) -> list[Files]:
    """A store, and what is put into a column of it: nothing, or where this is mutated, what it then is."""
    return [{"store.db": make_store(folder).read_bytes(), "value": b"nothing"}]


def change_value(path: Path, content: bytes) -> None:
    """Put the content into a column that depends on it, as a number, a text or bytes."""
    key = hashlib.sha256(content).digest()
    table, column = COLUMNS[key[0] % len(COLUMNS)].split(".")
    value = (content, content.decode("utf-8", "replace"), key[1] - 128, key[1] / 7)[key[2] % 4]
    with contextlib.closing(sqlite3.connect(path)) as db, contextlib.suppress(sqlite3.Error, UnicodeError):
        for trigger in ("no_update", "no_delete"):
            db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute(f"UPDATE {table} SET {column} = ?", [value])
        db.commit()


def read_store(folder: Path) -> None:
    """Every subcommand on a store whose bytes, or one of whose columns, were changed."""
    from minirlhf.feedback import __main__ as feedback

    path = folder / "store.db"
    content = (folder / "value").read_bytes() if (folder / "value").exists() else b"nothing"
    if path.exists() and content != b"nothing":
        change_value(path, content)
    failed = None
    for words in (
        ["stats"],
        ["export", folder / "out"],
        ["backup", folder / "copy.db"],
        ["rate", "--rater", "eve"],
    ):
        sys.stdin = io.StringIO("1\n\n2\nq\n")
        args = feedback.parse([words[0], "--store", str(path), *map(str, words[1:])])
        try:
            feedback.guarded(args)
        except UserError as error:
            failed = error
    if failed:
        raise failed


# ---------------------------------------------------------------- results


def results(folder: Path) -> list[Files]:
    row = {"score": 0.5, "score_interval": [0.4, 0.6], "kl": 2.0, "entropy": 1.0, "distinct_2": 0.5, "mean_length": 9.0, "eos_rate": 0.9,
           "judge": 0.4, "judge_win_rate": 0.6, "judge_win_rate_interval": [0.5, 0.7], "sft_perplexity": 9.0}  # fmt: skip
    rm = {"test": {"pearson": 0.6, "spearman": 0.6, "pair_accuracy": 0.7, "calibration": {"bins": [[1.0, 2.0, 3]]}}, "seconds": 3.0,
          "baselines": {"longer text": {"pearson": 0.1}, "x": None}, "humans": {"one_pearson": 0.5, "half_pearson": 0.6}}  # fmt: skip
    document = {
        "sft_samples": row, "best_of_n": {"4": row}, "ppo": row, "policy": "PPO", "sft": {"val_bits_per_byte": 2.0, "seconds": 5.0}, "rm": rm,
        "samples": [{"prompt": "p", "sft": "s", "ppo": "q", "kl": 1.0, "score_sft": 0.1, "score_ppo": 0.2}], "versions": {"torch": "2"},
        "prompts": 4, "seed": 1, "split": "test", "reward": ["rm"],
    }  # fmt: skip
    metrics = b"".join(
        line(step=i, **{"objective/kl": 1.0, "objective/scores": 0.5, "val/bits_per_byte": 2.0})
        for i in range(1, 9)
    )
    return [
        {
            "run/results.json": json.dumps(document).encode(),
            "run/ppo/metrics.jsonl": metrics,
            "run/sft/metrics.jsonl": metrics,
        }
    ]


def read_results(folder: Path) -> None:
    from minirlhf.tools.report import __main__ as report

    before = sys.argv
    sys.argv = ["report", str(folder / "run")]
    try:
        report.main()
    finally:
        sys.argv = before
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    if "<script>alert" in page or "\x1b" in page:
        raise AssertionError("markup of a value reaches the page")


# ---------------------------------------------------------------- all of them


class Made(Kind):
    """A kind whose seeds its bombs are made of."""

    made: list[Files] = []


def kind(share: int, seeds: Callable, read: Callable, **more: Any) -> Made:
    found = Made(share, seeds, read, **more)

    def remembered(folder: Path) -> list[Files]:
        found.made = seeds(folder)
        return found.made

    found.seeds = remembered
    return found


KINDS: dict[str, Made] = {
    "jsonl": kind(14, rows_as(".jsonl"), read_data, bombs=DATA_BOMBS),
    "json": kind(6, rows_as(".json"), read_data, bombs={
        "nested": lambda: {"rows.json": b"[" * 10**6 + b"]" * 10**6}, "deep": lambda: {"rows.json": json.dumps(nested(900)).encode()}}),
    "txt": kind(2, rows_as(".txt"), read_data, bombs={"one line": lambda: {"rows.txt": b"x y " * 10 * MEGA}, "word": lambda: {"rows.txt": b"x" * MEGA}}),
    "gz": kind(4, rows_as(".jsonl.gz"), read_data, bombs={
        "new lines": lambda: {"rows.jsonl.gz": gzip_bomb(b"\n", 2 * 10**9)},
        "one text": lambda: {"rows.jsonl.gz": gzip_bomb(b"x", 10**9)}, "rows": lambda: {"rows.jsonl.gz": gzip_bomb(line(text="x"), 10**8)}}),
    "tokenizer": kind(8, tokenizers, read_tokenizer, repair=hashed_again),
    "checkpoint": kind(14, checkpoints, read_checkpoint, repair=sound_again, bombs=CHECKPOINT_BOMBS,
                       damage=("config.json", "model.safetensors", "tokenizer.json", "tokenizer.tiktoken")),
    "run": kind(10, runs, read_run, repair=sound_again),
    "hf": kind(8, hf_folders, read_hf, bombs=HF_BOMBS),
    "template": kind(10, templates, read_template, bombs=TEMPLATE_BOMBS),
    "reward": kind(4, rewards, read_reward, bombs=REWARD_BOMBS),
    "server": kind(8, requests, read_requests, bombs=REQUEST_BOMBS, prepare=start_server),
    "store": kind(4, stores, read_store),
    "results": kind(2, results, read_results),
}  # fmt: skip
if importlib.util.find_spec("gguf"):
    KINDS["gguf"] = kind(
        6, gguf_files, read_gguf, bombs={"fields": gguf_bomb(2**60, 0), "tensors": gguf_bomb(0, 2**40)}
    )
if importlib.util.find_spec("pyarrow"):

    def parquet(folder: Path) -> list[Files]:
        import pyarrow
        from pyarrow import parquet as pq

        folder.mkdir(parents=True)
        for i, row in enumerate(ROWS[:9]):
            pq.write_table(pyarrow.Table.from_pylist([row] * 5), folder / f"{i}.parquet")
        return [{"rows.parquet": (folder / f"{i}.parquet").read_bytes()} for i in range(9)]

    KINDS["parquet"] = kind(4, parquet, read_data)
