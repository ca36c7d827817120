"""Text <-> ids with byte-level BPE. tiktoken encodes; support/bpe.py learns, writes and reads the ranks.

A tokenizer is three things. `pattern` is the regex that cuts a text into words. `ranks` maps byte strings to
ids: inside a word, the two neighbours whose concatenation has the lowest id are joined, until no
concatenation is a token. `specials` are tokens that no text contains, such as the end of a text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex
import tiktoken

from minirlhf import UserError
from minirlhf.support import bpe, vocabulary
from minirlhf.support.added import AddedTokens
from minirlhf.support.bpe import BYTES
from minirlhf.support.layout import Layout
from minirlhf.support.text import escaped, utf8

# GPT-2's split as tiktoken writes it today: the original's words, with possessive quantifiers for speed.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Text <-> ids. `bos` opens a text, `eot` ends it, `pad` fills batches; every id is below `vocab_size`.

    A tokenizer trained here has two special tokens, after its ranks, and its bos is its eot. An imported one
    keeps the ids and special tokens of its model, whose embedding may have more rows than there are tokens.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str = GPT2_PATTERN,
        specials: dict[str, int] | None = None,
        eot: int | None = None,
        bos: int | None = None,
        pad: int | None = None,
        vocab_size: int | None = None,
        normalize: str | None = None,
        hf: dict | None = None,
        added: dict[str, bool] | None = None,
        flags: dict[str, list[str]] | None = None,
    ):
        """normalize: the Unicode form ("NFC") that texts get before encoding. hf: what came with the model:
        its chat template, `ends` (ids that end a response, beside eot), and what only an export needs.
        added: those of `specials` that are recognised in texts too -> whether only after normalising.
        flags: how they are recognised, in the words of support/added.py, which finds them.
        Raises ValueError for ids, names or a pattern that make no tokenizer."""
        self.ranks, self.pattern, self.normalize, n = ranks, pattern, normalize, len(ranks)
        self.specials = {"<|endoftext|>": n, "<|pad|>": n + 1} if specials is None else specials
        self.added, self.flags, self.hf = added or {}, flags or {}, hf or {}
        self.eot = n if eot is None else eot
        self.bos = self.eot if bos is None else bos
        # [D6] Two ids: were pad eot, masking by id would mask the end, and no model would learn to stop.
        # Where a model has no id to spare, pad is eot all the same: masks here come from lengths.
        spare = [i for i in self.specials.values() if i not in (self.eot, self.bos)] or [self.eot]
        self.pad = spare[0] if pad is None else pad
        ids = [*ranks.values(), *self.specials.values()]
        self.vocab_size = max(ids) + 1 if vocab_size is None else vocab_size
        vocabulary.check(self, ids)
        self.ends = tuple(dict.fromkeys([self.eot, *self.hf.get("ends", ())]))
        self.layout = Layout()
        self._tokens, names = {*ids}, AddedTokens(self)
        self.cut, self._special = names.cut, names.special

        self.about = {name: getattr(self, name) for name in ("eot", "bos", "pad", "vocab_size", "normalize")}
        trained = {"eot": n, "bos": n, "pad": n + 1, "vocab_size": n + 2, "normalize": None}
        identity = [pattern, self.specials]
        identity += [self.about] * (self.about != trained)
        identity += [self.added] * bool(self.added) + [self.flags] * bool(self.flags)
        self.hash = hashlib.sha256(bpe.dump(ranks) + json.dumps(identity).encode()).hexdigest()
        # A vocabulary may lack bytes that its corpus never had. tiktoken wants all 256: they get unused ids.
        absent = {byte: self.vocab_size + i for i, byte in enumerate(BYTES) if byte not in ranks}
        self.encoding = tiktoken.Encoding(
            self.hash[:8], pat_str=pattern, mergeable_ranks=ranks | absent, special_tokens=self.specials
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one: a '<|pad|>' in it is plain characters. `decode` gives the text
        back, but lone surrogates become U+FFFD, and an imported tokenizer may normalise or lack bytes."""
        pieces = self.cut(text)  # names of added tokens, as ids, and the text between them
        encoded = ([piece] if isinstance(piece, int) else self._encode_words(piece) for piece in pieces)
        return [i for ids in encoded for i in ids]

    def _encode_words(self, text: str) -> list[int]:
        ids = self.encoding.encode_ordinary(text)
        if max(ids, default=0) < self.vocab_size:
            return ids
        return bpe.encode_known(text, self.pattern, self.ranks)  # some of its bytes have no token

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids` without unused ids and (by default) special ones: pad, bos, eot and their like, but
        not added tokens that texts may contain. Half a character shows as U+FFFD."""
        silent = self._special if skip_special_tokens else ()
        return self.encoding.decode([i for i in ids if i in self._tokens and i not in silent])

    def token_str(self, token: int) -> str:
        """One token to look at: control characters and broken UTF-8 as escapes, special tokens by name."""
        if token not in self._tokens:
            return f"<unused {token}>"
        return escaped(self.encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace"))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> Tokenizer:
        """A tokenizer learnt from `texts`, in any order. `vocab_size` counts bytes, merges and two specials.
        Training ends early, with a line on stderr, once every word is one token."""
        if vocab_size < 258:
            raise UserError(f"vocab_size {vocab_size}: too small; 256 bytes and 2 special tokens need 258")
        words = (word for text in texts for word in regex.finditer(pattern, utf8(text)))
        ranks = bpe.train(Counter(word.group().encode() for word in words), vocab_size - 2)
        if len(ranks) < vocab_size - 2:
            print(f"tokenizer: no pairs left: {len(ranks) + 2} tokens, not {vocab_size}", file=sys.stderr)
        return cls(ranks, pattern)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.tiktoken and tokenizer.json, each atomically. `load` refuses a mix of two saves."""
        vocabulary.save(self, Path(folder))

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """The tokenizer in a folder that `save` wrote; of a .tiktoken file, with the JSON beside it or else
        GPT-2's pattern; or 'gpt2', which tiktoken fetches once. A tokenizer.json alone in a folder is BERT's:
        interop/wordpiece.py. Raises UserError for any other source, and for damaged files."""
        return vocabulary.load(cls, source)
