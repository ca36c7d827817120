"""BERT's WordPiece tokenizer under the names of `minirlhf.tokenizer.Tokenizer`.

The `tokenizers` package runs the tokenizer.json that came with the weights.  `Tokenizer.load` looks this
class up by name for a folder that holds such a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from minirlhf import UserError
from minirlhf.support.files import write_atomically
from minirlhf.support.layout import Layout
from minirlhf.support.text import one_line, utf8


class WordPiece:
    """Text <-> ids. [CLS] opens a text, [SEP] ends it. `decode` brings back neither case nor spacing."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            remedy = "pip install 'minirlhf[minilm]'"
            raise UserError(f"{file}: reading it needs the tokenizers package: {remedy}") from None
        try:
            self.json = file.read_text(encoding="utf-8")
            self.encoding = Reader.from_str(self.json)
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"{file}: {one_line(error)}: restore tokenizer.tiktoken or this file") from error
        ids = {name: self.encoding.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")}
        if missing := [name for name, token in ids.items() if token is None]:
            raise UserError(f"{file}: no token {missing[0]}: only BERT's WordPiece is read; restore the file")
        self.bos, self.eot, self.pad = ids.values()
        self.ends, self.layout = (self.eot,), Layout()
        self.encoding.no_truncation()
        self.encoding.no_padding()
        self.encoding.encode_special_tokens = True  # a '[SEP]' in a text is plain characters
        added = self.encoding.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = self.encoding.get_vocab_size()
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without [CLS] and [SEP]."""
        return self.encoding.encode(utf8(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`, by default without special tokens."""
        return self.encoding.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_str(self, token: int) -> str:
        """The name of one token."""
        return self.encoding.id_to_token(token) or f"<unused {token}>"

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, as it was read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder, "tokenizer.json"), self.json)
