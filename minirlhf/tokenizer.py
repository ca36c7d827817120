"""Byte-level BPE: tiktoken encodes; training, saving and loading the ranks is done here.

A tokenizer is three things: `ranks` (byte string -> id; encoding joins the adjacent pair whose concatenation
has the lowest id, until none has one), `pattern` (the regex that first cuts text into words), two specials.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from minirlhf import UserError

# GPT-2's split as tiktoken writes it today: the original's words, with possessive quantifiers for speed.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
FORMAT = "minirlhf.tokenizer/1"


class Tokenizer:
    """Text <-> ids. `eot` ends a text, `pad` fills batches; `vocab_size` is the highest id + 1."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN):
        self.ranks, self.pattern = ranks, pattern
        # [D6] Two ids: were pad eot, masking padding would mask the end and the model never learn to stop.
        self.eot, self.pad, self.vocab_size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.specials = {"<|endoftext|>": self.eot, "<|pad|>": self.pad}
        self.hash = hashlib.sha256(_lines(ranks) + json.dumps([pattern, self.specials]).encode()).hexdigest()
        parts = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": self.specials}
        self.encoding = tiktoken.Encoding(self.hash[:8], **parts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one: a '<|pad|>' in it is plain characters. A lone surrogate, which
        UTF-8 cannot hold, becomes U+FFFD; any other text comes back from `decode` unchanged."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads."""
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without pad and eot; bytes that are not UTF-8 (half a character) show as U+FFFD."""
        return self.encoding.decode([i for i in ids if i not in (self.pad, self.eot)])

    def token_str(self, token: int) -> str:
        """One token for the eye: control characters and broken UTF-8 as escapes, special tokens by name."""
        text = self.encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> Tokenizer:
        """Learn BPE ranks; `vocab_size` counts 256 bytes, the merges and 2 specials. Deterministic: the most
        frequent adjacent concatenation is the next token, ties go to the smaller byte string. Once every word
        is one token it stops early and says so on stderr."""
        if vocab_size < 258:
            raise UserError(f"vocab_size {vocab_size}: too small; 256 bytes and 2 special tokens need 258")
        ranks = {bytes([b]): b for b in range(256)}
        # As tiktoken treats what UTF-8 cannot hold: surrogate pairs join, lone surrogates become U+FFFD.
        texts = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
        seen = Counter(found.group() for text in texts for found in regex.finditer(pattern, text))
        words, times = [[bytes([b]) for b in word.encode()] for word in seen], list(seen.values())
        # Counted by concatenation, not by pair: (a, bc) and (ab, c) are the same token to tiktoken.
        counts: Counter[bytes] = Counter()
        where: defaultdict[bytes, set[int]] = defaultdict(set)  # candidate -> words that have it, or had it
        for w, parts in enumerate(words):
            for a, b in pairwise(parts):
                counts[a + b] += times[w]
                where[a + b].add(w)
        heap = [(-n, candidate) for candidate, n in counts.items()]
        heapq.heapify(heap)
        while heap and len(ranks) < vocab_size - 2:
            n, token = heapq.heappop(heap)
            if -n != counts[token]:  # stale: a rise pushed its own entry, a fall is put back here
                if 0 < counts[token] < -n:
                    heapq.heappush(heap, (-counts[token], token))
                continue
            ranks[token] = len(ranks)
            risen = set()
            for w in where.pop(token):
                for a, b in pairwise(words[w]):
                    counts[a + b] -= times[w]
                words[w] = merge(words[w], ranks)
                for a, b in pairwise(words[w]):
                    counts[a + b] += times[w]
                    where[a + b].add(w)
                    risen.add(a + b)
            for candidate in risen:
                heapq.heappush(heap, (-counts[candidate], candidate))
        if len(ranks) < vocab_size - 2:
            print(f"tokenizer: no pairs left: {len(ranks) + 2} tokens, not {vocab_size}", file=sys.stderr)
        return cls(ranks, pattern)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.tiktoken and .json, each atomically; a mix of two saves fails `load`'s hash."""
        meta = {"format": FORMAT, "pattern": self.pattern, "specials": self.specials, "hash": self.hash}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for suffix, data in (".tiktoken", _lines(self.ranks)), (".json", json.dumps(meta, indent=1).encode()):
            temporary = Path(folder, f"tokenizer.{os.getpid()}")
            temporary.write_bytes(data)
            os.replace(temporary, temporary.with_suffix(suffix))

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """`source`: a folder that `save` wrote; a .tiktoken file (with the regex of our JSON beside it,
        else GPT-2's; the specials follow the ranks); or 'gpt2', which tiktoken fetches once and caches."""
        if str(source) == "gpt2":
            try:
                gpt2 = tiktoken.get_encoding("gpt2")
            except (OSError, ImportError, ValueError) as error:
                remedy = "go online once, set TIKTOKEN_CACHE_DIR to a filled cache, or give a .tiktoken file"
                raise UserError(f"tokenizer gpt2: not fetched ({type(error).__name__}); {remedy}") from error
            return cls(gpt2._mergeable_ranks, gpt2._pat_str)
        file = Path(source, "tokenizer.tiktoken") if Path(source).is_dir() else Path(source)
        meta = file.with_suffix(".json")
        for needed in [file, meta] if Path(source).is_dir() else [file]:
            if not needed.is_file():
                raise UserError(f"{needed}: no such file; give a tokenizer folder, a .tiktoken file or gpt2")
        ranks = _read(file)
        if not meta.is_file():
            return cls(ranks)
        try:
            saved = json.loads(meta.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            tokenizer = cls(ranks, saved["pattern"])
            if saved["hash"] != tokenizer.hash:
                raise ValueError(f"its hash is not that of {file.name}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta}:1: {error!r}; restore it and {file.name} from the same save") from error
        return tokenizer


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """BPE: join the adjacent pair of lowest rank, leftmost of equals, until no concatenation is a token."""
    while found := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        i = min(found)[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def _lines(ranks: dict[bytes, int]) -> bytes:
    """The public .tiktoken format: `base64(token) rank` a line, in the order of the ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), ranks[t]) for t in sorted(ranks, key=ranks.get))


def _read(file: Path) -> dict[bytes, int]:
    """Parse .tiktoken; UserError unless the ranks are 0..n-1, each once, with all 256 single bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines() or [b""], 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(f"{file}:{number}: not 'base64 rank': {line[:40]!r}; restore the file") from None
        if token in ranks or rank != len(ranks):
            raise UserError(f"{file}:{number}: expected a new token, rank {len(ranks)}; restore the file")
        ranks[token] = rank
    if missing := {bytes([b]) for b in range(256)} - ranks.keys():
        raise UserError(f"{file}:{number}: no token for the byte {min(missing)!r}; restore the file")
    return ranks
