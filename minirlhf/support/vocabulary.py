"""A tokenizer's files, and what they must hold: everything that a damaged or hostile one may get wrong."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import regex
import tiktoken

from minirlhf import UserError
from minirlhf.support import bpe, sums
from minirlhf.support.added import FLAGS
from minirlhf.support.files import write_atomically

if TYPE_CHECKING:
    from minirlhf.tokenizer import Tokenizer


FORMAT = "minirlhf.tokenizer/1"


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenizer.save."""
    meta = {"format": FORMAT, "pattern": tokenizer.pattern, "specials": tokenizer.specials}
    meta |= {"hash": tokenizer.hash} | tokenizer.about
    meta |= {"added": tokenizer.added, "flags": tokenizer.flags, "hf": tokenizer.hf}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.tiktoken", bpe.dump(tokenizer.ranks))
    write_atomically(folder / "tokenizer.json", json.dumps(meta, indent=1))


def load(kind: type[Tokenizer], source: str | Path) -> Tokenizer:
    """Tokenizer.load; `kind` is the class to make."""
    if str(source) == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ImportError, ValueError) as error:
            remedy = "go online once, set TIKTOKEN_CACHE_DIR to a filled cache, or give a .tiktoken file"
            raise UserError(f"tokenizer gpt2: not fetched ({type(error).__name__}); {remedy}") from error
        return kind(gpt2._mergeable_ranks, gpt2._pat_str)
    file, meta = files_of(source)
    for each in filter(None, (file, meta)):
        sums.check(each)
    if file is None:
        return importlib.import_module("minirlhf.interop.wordpiece").WordPiece(meta)
    if not meta.is_file():
        return kind(bpe.read(file, dense=True))
    ranks = bpe.read(file, dense=False)
    with damage_is_one_line(meta, file):
        saved = json.loads(meta.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tokenizer = kind(ranks, **{k: v for k, v in saved.items() if k not in ("format", "hash")})
        if saved["hash"] != tokenizer.hash:
            raise ValueError(f"its hash is not that of {file.name}")
    return tokenizer


def files_of(source: str | Path) -> tuple[Path | None, Path]:
    """(ranks, JSON) of a tokenizer folder or .tiktoken file; no ranks where a folder is BERT's.

    The JSON beside a .tiktoken file may be missing.  Raises UserError where another file is.
    """
    folder = os.path.isdir(source)  # False where Path.is_dir raises: the name is too long
    file = Path(source, "tokenizer.tiktoken") if folder else Path(source)
    meta = file.with_suffix(".json")
    if folder and meta.is_file() and not file.is_file():
        return None, meta
    for needed in [file, meta] if folder else [file]:
        if not os.path.isfile(needed):
            raise UserError(f"{needed}: no such file; give a tokenizer folder, a .tiktoken file or gpt2")
    return file, meta


@contextmanager
def damage_is_one_line(meta: Path, file: Path) -> Iterator[None]:
    """Whatever damaged JSON leads to in the block becomes a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, regex.error) as error:
        raise UserError(f"{meta}:1: {error!r}; restore it and {file.name} from the same save") from error


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Raise ValueError for what tiktoken does not refuse by itself in one line."""
    whole = lambda x: type(x) is int and x >= 0
    if not whole(tokenizer.vocab_size) or tokenizer.vocab_size >= 2**31:
        raise ValueError(f"vocab_size is {tokenizer.vocab_size!r:.40}")
    if wrong := [i for i in ids if not whole(i) or i >= tokenizer.vocab_size]:
        raise ValueError(f"id {wrong[0]!r:.40}, but vocab_size is {tokenizer.vocab_size}")
    if len({*ids}) < len(ids):
        raise ValueError("two tokens have the same id")
    if not {tokenizer.eot, tokenizer.bos, tokenizer.pad} <= {*tokenizer.specials.values()}:
        raise ValueError("eot, bos or pad is no special token")
    if "" in tokenizer.specials or not tokenizer.added.keys() <= tokenizer.specials.keys():
        raise ValueError("a special token has no name, or an added one no id")
    flags = tokenizer.flags
    lists = isinstance(flags, dict) and all(isinstance(value, list) for value in flags.values())
    if (
        not lists
        or not {*flags} <= {*tokenizer.specials}
        or any(flag not in FLAGS for value in flags.values() for flag in value)
    ):
        raise ValueError(f"flags is {flags!r:.40}")
    hf = tokenizer.hf
    if not isinstance(hf, dict) or not isinstance(hf.get("unreached", []), list):
        raise ValueError(f"hf is {hf!r:.40}")
    ends = hf.get("ends", [])
    if not isinstance(ends, list) or not all(type(i) is int and i in ids for i in ends):
        raise ValueError(f"hf: ends is {ends!r:.40}")
    if any(hf.get(key) not in (None, *tokenizer.specials) for key in ("bos_token", "pad_token")):
        raise ValueError("hf names a special token that is none")
    if tokenizer.normalize not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"normalize is {tokenizer.normalize!r:.40}")
    if regex.fullmatch(tokenizer.pattern, ""):
        raise ValueError(f"the pattern {tokenizer.pattern!r:.40} takes nothing for a word")
