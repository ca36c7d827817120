"""Which tokens hold which characters of a text."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

Span = tuple[int, int]  # characters from the first up to, and without, the second
Part = tuple[str, int | None]  # a piece of text; with its id where it is a special token


def encode_with_spans(
    tok: Any, parts: Sequence[Part], spans: Sequence[Span]
) -> tuple[list[int], list[list[int]]]:
    """(ids of the parts, encoded one after the other; the places in ids of the tokens that hold characters of
    each span).

    A token that holds characters on both sides of a boundary belongs to the spans on both.
    """
    ids: list[int] = []
    places: list[list[int]] = [[] for _ in spans]
    at = 0
    for text, special in parts:
        new = tok.encode(text) if special is None else [special]
        for found, (first, end) in zip(places, spans, strict=True):
            low, high = max(first - at, 0), min(end - at, len(text))
            if low < high:
                a, b = (0, 1) if special is not None else _between(tok, text, new, low, high)
                found += range(len(ids) + a, len(ids) + b)
        ids += new
        at += len(text)
    return ids, places


def _between(tok: Any, text: str, ids: list[int], low: int, high: int) -> tuple[int, int]:
    """The first token of text[low:high], and the first one after it."""
    form = getattr(tok, "normalize", None)
    size = lambda text: len((unicodedata.normalize(form, text) if form else text).encode("utf-8", "replace"))
    ends = []
    if hasattr(tok, "encoding"):
        ends = list(accumulate(len(tok.encoding.decode_single_token_bytes(i)) for i in ids))
    if not ends or ends[-1] != size(text):  # some of its bytes have no token
        return min(len(tok.encode(text[:low])), len(ids)), min(len(tok.encode(text[:high])), len(ids))
    return bisect_right(ends, size(text[:low])), bisect_left(ends, size(text[:high])) + 1
