"""Added tokens: names such as `<tool_call>` that stand for one id each, wherever a text contains them.

They are found before the text is cut into words, in the way of Hugging Face's `tokenizers`: first those that
are looked for in the text as it is, then in what is left those that are looked for after normalising.  Of two
names that start together the longer one counts.  Special tokens are not found, their names are plain
characters; but a name that overlaps with theirs is not found there either.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from minirlhf.tokenizer import Tokenizer

# lstrip, rstrip: white space before or after the name belongs to it.  single_word: not beside a letter,
# digit, mark or underscore.  normalized, of a special token: exported so; of others Tokenizer.added says it.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
Pieces = list[str | int]
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
SPACES = regex.compile(r"\p{White_Space}*")


class AddedTokens:
    """What of a tokenizer's names is found in texts, and which of its ids are special."""

    def __init__(self, tokenizer: Tokenizer):
        ids, added, flags = tokenizer.specials, tokenizer.added, tokenizer.flags
        known = [name for name in ids if name not in tokenizer.hf.get("unreached", ())]
        self.special = {ids[name] for name in known if name not in added}
        self.special |= {tokenizer.bos, tokenizer.pad, *tokenizer.ends} & {*ids.values()}
        self.form, self.passes = tokenizer.normalize, []
        for late in (False, True) if added else ():
            is_late = lambda name: added.get(name, "normalized" in flags.get(name, ()))
            names = {self.normal(name) if late else name: name for name in known if is_late(name) == late}
            found = {text: ids[name] for text, name in names.items() if name in added}
            its_flags = {text: flags[name] for text, name in names.items() if name in flags}
            self.passes.append((found, its_flags, names.keys() - found.keys()))

    def normal(self, text: str) -> str:
        """`text` in the tokenizer's Unicode form."""
        return unicodedata.normalize(self.form, text) if self.form else text

    def cut(self, text: str) -> Pieces:
        """`text` in pieces: ids of added tokens, and normalised text between them."""
        if not self.passes:
            return [self.normal(text)]
        early, late = self.passes
        pieces = cut([text], *early)
        return cut([piece if isinstance(piece, int) else self.normal(piece) for piece in pieces], *late)


def cut(
    pieces: Pieces,
    ids: Mapping[str, int],
    flags: Mapping[str, Iterable[str]] | None = None,
    plain: Iterable[str] = (),
) -> Pieces:
    """`pieces` with every name in `ids` that a text contains cut out of it and turned into its id.

    Where names overlap, the leftmost counts, and of two that start together the longer one.  Names in `plain`
    take part in this, but stay text.  flags: see FLAGS.
    """
    if not ids:
        return pieces
    found: Pieces = []
    for piece in pieces:
        found += [piece] if isinstance(piece, int) else _cut_text(piece, ids, flags or {}, plain)
    return found


def _cut_text(
    text: str, ids: Mapping[str, int], flags: Mapping[str, Iterable[str]], plain: Iterable[str]
) -> Pieces:
    found, done = [], 0  # done: up to where the text is in `found`
    for match in _any_of(frozenset(ids) | frozenset(plain)).finditer(text):
        name, (start, stop) = match.group(), match.span()
        its_flags = flags.get(name, ())
        if name not in ids:
            continue
        if "single_word" in its_flags:
            before, after = text[max(0, start - 1) : start], text[stop : stop + 1]
            if WORD.match(before) or WORD.match(after):
                continue
        if "lstrip" in its_flags:
            while start > done and SPACES.fullmatch(text[start - 1]):
                start -= 1
        if "rstrip" in its_flags:
            stop = SPACES.match(text, stop).end()
        # A name of white space may start inside the white space that the name before it took.  `tokenizers`
        # then goes on after the end of this one, and so do we: some white space counts twice.
        found += [text[done:start]] if done < start else []
        found.append(ids[name])
        done = stop
    return found + ([text[done:]] if done < len(text) else [])


@functools.lru_cache(maxsize=64)
def _any_of(names: frozenset[str]) -> regex.Pattern:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return regex.compile("|".join(map(regex.escape, longest_first)))
