"""Byte-level BPE: tiktoken encodes; training, saving and loading the ranks is done here.

A tokenizer is three things: `ranks` (byte string -> id; encoding joins the adjacent pair whose concatenation
has the lowest id, until none has one), `pattern` (the regex that first cuts text into words), `specials`.
BERT's WordPiece stands behind the same names: `Tokenizer.load` returns it for a folder that has one.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import os
import sys
import unicodedata
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
BYTES = [bytes([b]) for b in range(256)]


class Tokenizer:
    """Text <-> ids. `bos` opens a text, `eot` ends it, `pad` fills batches; `vocab_size` is the model's.

    Trained here: two specials after the ranks, and bos is eot. Imported: any ids whose order is that of the
    merges, the model's own specials, perhaps more rows in the model than there are tokens, `normalize`
    ("NFC") before encoding; `hf` is what only an export needs (Hugging Face's chat_template, pad_token,
    add_bos_token)."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN, specials: dict[str, int] | None = None,
                 eot: int | None = None, bos: int | None = None, pad: int | None = None, vocab_size: int | None = None,
                 normalize: str | None = None, hf: dict | None = None):  # fmt: skip
        self.ranks, self.pattern, self.normalize, self.hf, n = ranks, pattern, normalize, hf or {}, len(ranks)
        self.specials = {"<|endoftext|>": n, "<|pad|>": n + 1} if specials is None else specials
        self.eot = n if eot is None else eot
        self.bos = self.eot if bos is None else bos
        # [D6] Two ids: were pad eot, masking by id would mask the end and the model never learn to stop.
        # Where a model has no id to spare, pad is eot all the same: masks here come from lengths.
        spare = [i for i in self.specials.values() if i not in (self.eot, self.bos)] or [self.eot]
        self.pad = spare[0] if pad is None else pad
        tokens = {*ranks.values(), *self.specials.values()}
        self.vocab_size = max(tokens) + 1 if vocab_size is None else vocab_size
        self.about = {name: getattr(self, name) for name in ("eot", "bos", "pad", "vocab_size", "normalize")}
        trained = {"eot": n, "bos": n, "pad": n + 1, "vocab_size": n + 2, "normalize": None}
        identity = [pattern, self.specials] + [self.about] * (self.about != trained)
        self.hash = hashlib.sha256(_lines(ranks) + json.dumps(identity).encode()).hexdigest()
        # A vocabulary may lack bytes that its corpus never had. tiktoken wants all 256: these get ids beyond
        # the model's.
        absent = [byte for byte in BYTES if byte not in ranks]
        whole = ranks | {byte: self.vocab_size + i for i, byte in enumerate(absent)}
        self.encoding = tiktoken.Encoding(
            self.hash[:8], pat_str=pattern, mergeable_ranks=whole, special_tokens=self.specials
        )
        self.absent, self._silent = bool(absent), {self.pad, self.eot, self.bos}
        self._tokens = tokens

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one: a '<|pad|>' in it is plain characters. A lone surrogate, which
        UTF-8 cannot hold, becomes U+FFFD; any other text comes back from `decode` unchanged (from an imported
        tokenizer: less the bytes that it has no token for, and normalised if it says so)."""
        text = unicodedata.normalize(self.normalize, text) if self.normalize else text
        return self._drop_absent(text, self.encoding.encode_ordinary(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads."""
        texts = [unicodedata.normalize(self.normalize, text) for text in texts] if self.normalize else texts
        found = self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return (
            [self._drop_absent(text, ids) for text, ids in zip(texts, found, strict=True)]
            if self.absent
            else found
        )

    def _drop_absent(self, text: str, ids: list[int]) -> list[int]:
        """As Hugging Face does: what has no token leaves its word before anything is merged."""
        if not self.absent or max(ids, default=0) < self.vocab_size:
            return ids
        words = (found.group().encode() for found in regex.finditer(self.pattern, _utf8(text)))
        parts = (merge([BYTES[b] for b in word if BYTES[b] in self.ranks], self.ranks) for word in words)
        return [self.ranks[part] for word in parts for part in word]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without pad, bos, eot and the model's unused rows; bytes that are not UTF-8 (half a
        character) show as U+FFFD."""
        return self.encoding.decode([i for i in ids if i in self._tokens and i not in self._silent])

    def token_str(self, token: int) -> str:
        """One token for the eye: control characters and broken UTF-8 as escapes, special tokens by name."""
        if token not in self._tokens:
            return f"<unused {token}>"
        text = self.encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> Tokenizer:
        """Learn BPE ranks; `vocab_size` counts 256 bytes, the merges and 2 specials. Deterministic: the most
        frequent adjacent concatenation is the next token, ties go to the smaller byte string. Once every word
        is one token it stops early and says so on stderr."""
        if vocab_size < 258:
            raise UserError(f"vocab_size {vocab_size}: too small; 256 bytes and 2 special tokens need 258")
        ranks = {byte: b for b, byte in enumerate(BYTES)}
        seen = Counter(found.group() for text in texts for found in regex.finditer(pattern, _utf8(text)))
        words, times = [[BYTES[b] for b in word.encode()] for word in seen], list(seen.values())
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
        meta |= self.about | {"hf": self.hf}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for suffix, data in (".tiktoken", _lines(self.ranks)), (".json", json.dumps(meta, indent=1).encode()):
            temporary = Path(folder, f"tokenizer.{os.getpid()}")
            temporary.write_bytes(data)
            os.replace(temporary, temporary.with_suffix(suffix))

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer | WordPiece:
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
        if Path(source).is_dir() and meta.is_file() and not file.is_file():
            return WordPiece(meta)
        for needed in [file, meta] if Path(source).is_dir() else [file]:
            if not needed.is_file():
                raise UserError(f"{needed}: no such file; give a tokenizer folder, a .tiktoken file or gpt2")
        ranks = _read(file, dense=not meta.is_file())
        if not meta.is_file():
            return cls(ranks)
        try:
            saved = json.loads(meta.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            more = {
                key: saved[key]
                for key in ("eot", "bos", "pad", "vocab_size", "normalize", "hf")
                if key in saved
            }
            tokenizer = cls(ranks, saved["pattern"], saved["specials"], **more)
            if saved["hash"] != tokenizer.hash:
                raise ValueError(f"its hash is not that of {file.name}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{meta}:1: {error!r}; restore it and {file.name} from the same save") from error
        return tokenizer


class WordPiece:
    """BERT's tokenizer behind the same names: the `tokenizers` package runs the tokenizer.json that came with
    the weights. [CLS] opens a text, [SEP] ends it. What it drops (case, spacing) does not come back from
    `decode`."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise UserError(f"{file}: needs the tokenizers package: pip install 'minirlhf[minilm]'") from None
        try:
            self.json = file.read_text(encoding="utf-8")
            self.encoding = Reader.from_str(self.json)
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(
                f"{file}: {str(error).partition(chr(10))[0]}: restore tokenizer.tiktoken or this file"
            ) from error
        if missing := [t for t in ("[CLS]", "[SEP]", "[PAD]") if self.encoding.token_to_id(t) is None]:
            raise UserError(
                f"{file}: no token {missing[0]}: only BERT's WordPiece is read so; restore the file"
            )
        self.encoding.no_truncation()
        self.encoding.no_padding()
        self.encoding.encode_special_tokens = True  # a '[SEP]' in a text is plain characters
        self.bos, self.eot, self.pad = map(self.encoding.token_to_id, ("[CLS]", "[SEP]", "[PAD]"))
        self.specials = {
            t.content: i for i, t in self.encoding.get_added_tokens_decoder().items() if t.special
        }
        self.vocab_size, self.hash = (
            self.encoding.get_vocab_size(),
            hashlib.sha256(self.json.encode()).hexdigest(),
        )

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self.encoding.encode_batch([_utf8(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_str(self, token: int) -> str:
        return self.encoding.id_to_token(token) or f"<unused {token}>"

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        temporary = Path(folder, f"tokenizer.{os.getpid()}")
        temporary.write_text(self.json, encoding="utf-8")
        os.replace(temporary, temporary.with_suffix(".json"))


def _utf8(text: str) -> str:
    """As tiktoken treats what UTF-8 cannot hold: surrogate pairs join, lone surrogates become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """BPE: join the adjacent pair of lowest rank, leftmost of equals, until no concatenation is a token."""
    while found := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        i = min(found)[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def _lines(ranks: dict[bytes, int]) -> bytes:
    """The public .tiktoken format: `base64(token) rank` a line, in the order of the ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), ranks[t]) for t in sorted(ranks, key=ranks.get))


def _read(file: Path, dense: bool) -> dict[bytes, int]:
    """Parse .tiktoken; UserError unless the ranks rise, each token once. `dense`: 0..n-1, with all 256 single
    bytes."""
    ranks: dict[bytes, int] = {}
    last = -1
    for number, line in enumerate(file.read_bytes().splitlines() or [b""], 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(f"{file}:{number}: not 'base64 rank': {line[:40]!r}; restore the file") from None
        if token in ranks or rank <= last or dense and rank != last + 1:
            raise UserError(f"{file}:{number}: expected a new token, rank {last + 1}; restore the file")
        ranks[token] = last = rank
    if dense and (missing := {*BYTES} - ranks.keys()):
        raise UserError(f"{file}:{number}: no token for the byte {min(missing)!r}; restore the file")
    return ranks
