"""Byte-pair encoding: learning, writing and reading ranks, and what tiktoken lacks of encoding.

Learning and merging join neighbouring parts of a word: the pair whose concatenation has the lowest rank
first, the leftmost of equals. One join takes O(log n), so a word of n bytes takes O(n log n).
"""

from __future__ import annotations

import base64
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import regex

from minirlhf import UserError
from minirlhf.support.text import utf8

BYTES = [bytes([b]) for b in range(256)]


class Chain:
    """Words as linked lists of parts; at first every byte is a part.

    `parts[i]` is the part that starts at place i. It is None at the end of a word, and where the byte has
    been joined to the part before it. `before` and `after` are the places of a part's neighbours.
    """

    def __init__(self, words: Iterable[bytes]):
        self.parts: list[bytes | None] = []
        for word in words:
            self.parts += [BYTES[b] for b in word]
            self.parts.append(None)
        self.after = list(range(1, len(self.parts) + 1))
        self.before = list(range(-1, len(self.parts) - 1))

    def pair(self, i: int) -> bytes | None:
        """The concatenation of the part at i and the next one; None unless both exist."""
        part = self.parts[i]
        follower = self.parts[self.after[i]] if part is not None else None
        return part + follower if follower is not None else None

    def merge(self, places: Iterable[int], ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, int, int]]:
        """Join the pairs at `places` whose concatenations are tokens, then those that arise from these joins.

        Yields (pair, place, +1 for a pair that has come up or -1 for one that is gone).
        """
        heap = sorted({(ranks[pair], i) for i in places if (pair := self.pair(i)) in ranks})
        while heap:
            rank, i = heapq.heappop(heap)
            token = self.pair(i)
            if ranks.get(token) != rank:
                continue  # an earlier join took one of the two parts
            joined, left = self.after[i], self.before[i]
            around = [place for place in (left, i, joined) if place >= 0]
            for place in around:
                if (pair := self.pair(place)) is not None:
                    yield pair, place, -1
            self.parts[i], self.parts[joined] = token, None
            self.after[i] = self.after[joined]
            self.before[self.after[i]] = i
            for place in around:
                if (pair := self.pair(place)) is not None:
                    yield pair, place, +1
                    if pair in ranks:
                        heapq.heappush(heap, (ranks[pair], place))


def merge(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The tokens of one word: its bytes, joined until no concatenation of neighbours is a token."""
    chain = Chain([word])
    for _ in chain.merge(range(len(word)), ranks):
        pass
    return [part for part in chain.parts if part is not None]


def train(words: Mapping[bytes, int], size: int) -> dict[bytes, int]:
    """Up to `size` ranks: the 256 bytes, then learnt tokens. `words` says how often each word occurs.

    The most frequent concatenation of neighbours becomes the next token; of equals, the smaller byte string.
    """
    ranks = {byte: b for b, byte in enumerate(BYTES)}
    chain = Chain(words)
    times = [n for word, n in words.items() for _ in range(len(word) + 1)]  # of the word at each place
    # Counted by concatenation, not by pair: (a, bc) and (ab, c) are the same token to tiktoken.
    counts: Counter[bytes] = Counter()
    places: defaultdict[bytes, list[int]] = defaultdict(list)  # where a concatenation is, or was
    for i in range(len(chain.parts)):
        if (pair := chain.pair(i)) is not None:
            counts[pair] += times[i]
            places[pair].append(i)

    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < size:
        n, token = heapq.heappop(heap)
        if -n != counts[token]:  # counts that rose have an entry of their own, those that fell get one here
            if 0 < counts[token] < -n:
                heapq.heappush(heap, (-counts[token], token))
            continue
        ranks[token] = len(ranks)
        risen = set()
        for pair, place, change in chain.merge(places.pop(token), ranks):
            counts[pair] += change * times[place]
            if change > 0:
                places[pair].append(place)
                risen.add(pair)
        for pair in risen:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
    return ranks


def encode_known(text: str, pattern: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of a text without the bytes that have no token: they leave their word before anything is merged.

    So does Hugging Face.  tiktoken wants a token for every byte."""
    words = (found.group().encode() for found in regex.finditer(pattern, utf8(text)))
    known = (bytes(b for b in word if BYTES[b] in ranks) for word in words)
    return [ranks[part] for word in known for part in merge(word, ranks)]


def dump(ranks: Mapping[bytes, int]) -> bytes:
    """The public .tiktoken format: `base64(token) rank` on a line, in the order of the ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), ranks[t]) for t in sorted(ranks, key=ranks.get))


def read(file: Path, dense: bool) -> dict[bytes, int]:
    """The ranks in a .tiktoken file. `dense`: they must be 0 to n - 1 and include all 256 single bytes.

    Raises UserError unless the ranks rise and each token stands there once."""
    try:
        lines = file.read_bytes().splitlines() or [b""]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    ranks: dict[bytes, int] = {}
    last = -1
    for number, line in enumerate(lines, 1):
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
