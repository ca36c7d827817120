"""Every input format in, token batches out; and the built-in dataset.

    python -m minirlhf.data inspect vader|toy|PATH [--tokenizer ...] [--skip-bad] [-n 3]

PATH is a .jsonl, .jsonl.gz or .txt file or a folder of them; the kind of its rows is told by their keys:

    text         {text, genre?}, or each line of a .txt
    completion   {prompt, completion}, {messages}
    labelled     {prompt, completion, label}
    preference   {prompt, chosen, rejected}, {chosen, rejected}, {prompt, response_a, response_b, votes}
    rated        {prompt?, response|text, rating|ratings, scale?, genre?}
    prompt       {prompt}

Ratings are a list, or an object {rater: score}; votes are counts {a, b, tie}, or a list or an object {rater: "a"|"b"|"tie"}.
In a list the places are people: the first of every row is one rater.

Any of these texts may be a list of {role, content} messages: it becomes a transcript laid out as HH-RLHF's.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from minirlhf import UserError

ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
TURN = "\n\nAssistant:"  # ends a transcript's prompt; the completion keeps its leading space
# The ratings of Hutto & Gilbert's VADER study (ICWSM 2014; MIT licence) travel in a package's source distribution.
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SDIST, MAX_MEMBER = "vaderSentiment-3.3.2.tar.gz", 16 << 20  # bytes; the largest real member has 2.3 MB
PIP = "-m pip download --no-deps --no-binary vaderSentiment --require-hashes --retries 1 --no-input"
GENRES = {"movies": "movieReviewSnippets", "products": "amazonReviewSnippets", "tweets": "tweets"}
GENRES |= {"editorials": "nytEditorialSnippets"}  # genre -> files; a fifth, "words", is the lexicon
VOTES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # what each is worth to the first text
CACHE_FORMAT = 2  # raise it whenever the cached rows change


@dataclass(frozen=True)
class Response:  # what follows a prompt, and what people said of it
    prompt: str  # "" before plain text
    response: str  # "" after a bare prompt
    rating: float | None = None  # the mean of `ratings`
    ratings: tuple[float, ...] = ()
    scale: tuple[float, float] | None = None  # the lowest and the highest score possible
    genre: str = ""
    label: bool | None = None  # thumbs up or down
    raters: tuple[str, ...] = ()  # who gave `ratings`; left out: their places in it are people


@dataclass(frozen=True)
class Preference:
    prompt: str
    chosen: str
    rejected: str
    share: float = 1.0  # of the votes, went to `chosen`: .5 to 1, a tie counts a half
    votes: tuple[
        float, ...
    ] = ()  # each rater's, 1 for `chosen`, 0 for `rejected`, .5 a tie; left out: only counts are known
    raters: tuple[str, ...] = ()  # who gave `votes`; left out: their places in it are people


def as_example(record: Response | Preference) -> tuple[str, str]:
    """(prompt, completion) as SFT sees any record: of two responses, the chosen one."""
    return record.prompt, record.chosen if isinstance(record, Preference) else record.response


def _key(prompt: str, text: str) -> str:
    """What decides where a record goes: its prompt, so that all records of one prompt stay together [D15], or the text
    where there is no prompt. Only the words count: "Enjoy!" stays with "enjoy."; an emoticon, without any, is itself."""
    return " ".join(re.findall(r"\w+", (prompt or text).casefold())) or prompt or text


def split_of(prompt: str, text: str = "") -> str:
    """'train' | 'val' | 'test' (80/10/10), by a hash."""
    return (["train"] * 8 + ["val", "test"])[
        int(hashlib.sha256(_key(prompt, text).encode()).hexdigest(), 16) % 10
    ]


def part_of(record: Response | Preference) -> str:
    """'a' | 'b': halves of any split, by another hash, for two models that share no item."""
    return "ab"[hashlib.sha256(("part " + _key(*as_example(record))).encode()).digest()[0] % 2]


@dataclass(frozen=True)
class Dataset:
    name: str
    kind: str
    records: list[Response] | list[Preference]
    sources: list[str]
    sha256: str  # of the content, decompressed
    dropped: dict[str, int]  # reason -> rows left out on purpose
    skipped: Sequence[str] = ()  # what was wrong with each row that skip_bad passed over
    note: str = ""

    def describe(self) -> str:
        """One line: what was detected, and everything that was left out."""
        parts = [f"{len(self.records):,} {self.kind} rows{self.note}"]
        parts += [f"dropped {count:,} {reason}" for reason, count in self.dropped.items()]
        parts += [f"skipped {len(self.skipped):,} bad rows, first {message}" for message in self.skipped[:1]]
        return f"{self.name}: {'; '.join(parts)}; sha256 {self.sha256[:12]}"

    def genres_among(self, wanted: Sequence[str]) -> Sequence[str] | None:
        """`wanted` where the rows have genres at all, else None: no choice to make."""
        return wanted if any(getattr(r, "genre", "") for r in self.records) else None

    def select(self, split: str | None = None, genres: Sequence[str] | None = None) -> "Dataset":
        """The records of one split and of some genres. Raises UserError where none is left."""
        kept = [r for r in self.records if genres is None or getattr(r, "genre", "") in genres]
        kept = [r for r in kept if split in (None, split_of(*as_example(r)))]
        _check(
            kept,
            f"{self.name}: none of {len(self.records)} rows has split {split} and one of the genres {genres}",
        )
        return replace(self, records=kept)


def _check(ok: object, message: str) -> None:
    if not ok:
        raise UserError(message)


def transcript(messages: Sequence[dict], answer: bool) -> str:
    """Messages {role, content} as HH-RLHF writes them, less the header of an opening assistant turn; `answer`: with that of one
    to come."""
    return "".join(ROLES[m["role"]] + m["content"] for m in messages).removeprefix(TURN) + TURN * answer


def _text(row: dict, field: str) -> str:
    """The text of a field, of messages their transcript."""
    _check(field in row, f"{field}: missing")
    value = row[field]
    if isinstance(value, list):
        good = lambda m: isinstance(m, dict) and type(m.get("content")) is str and str(m.get("role")) in ROLES
        _check(
            value and all(map(good, value)),
            f"{field}: expected messages [{{role, content}}], roles {[*ROLES]}",
        )
        value = transcript(value, answer=field == "prompt")
    _check(isinstance(value, str), f"{field}: expected text, got {value!r:.40}")
    _check(not re.search("[\ud800-\udfff]", value), f"{field}: half a surrogate pair")  # JSON can spell it
    return value


def _by_rater(given: object) -> tuple[tuple[str, ...], object]:
    """What each rater said, a list or {rater: what}, as (raters, list); () where the places of a list are people."""
    return (tuple(given), [*given.values()]) if isinstance(given, dict) else ((), given)


def _choice(row: dict) -> Preference:
    prompt, a, b = (_text(row, field) for field in ("prompt", "response_a", "response_b"))
    votes = row.get("votes")
    raters, said = _by_rater(votes)
    if isinstance(said, list) and said and all(isinstance(v, str) and v in VOTES for v in said):
        each = tuple(VOTES[v] for v in said)
        share = sum(each) / len(each)
    else:
        good = isinstance(votes, dict) and set(votes) <= set(VOTES) and any(votes.values())
        good = good and all(type(n) is int and n >= 0 for n in votes.values())
        wanted = '{"a": 2, "b": 1, "tie": 0}, or {rater: "a", "b" or "tie"}'
        _check(good, f"votes: expected counts such as {wanted}, got {votes!r:.40}")
        each, raters, share = (), (), sum(VOTES[v] * n for v, n in votes.items()) / sum(votes.values())
    if share >= 0.5:
        return Preference(prompt, a, b, share, each, raters)
    return Preference(prompt, b, a, 1 - share, tuple(1 - v for v in each), raters)


def _rated(row: dict, scale: tuple[float, float] | None) -> Response:
    # Neither NaN, which fails any comparison, nor a bool is a number here.
    numbers = lambda x: isinstance(x, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in x)
    field, ends = "ratings" if "ratings" in row else "rating", row.get("scale")
    raters, values = _by_rater(row[field]) if field == "ratings" else ((), [row[field]])
    _check(numbers(values) and values, f"{field}: expected finite numbers, got {row[field]!r:.40}")
    if ends is not None:
        _check(
            numbers(ends) and len(ends) == 2 and ends[0] < ends[1],
            f"scale: expected [low, high], got {ends!r:.40}",
        )
        scale = tuple(ends)
    inside = not scale or scale[0] <= min(values) and max(values) <= scale[1]
    _check(inside, f"{field}: {row[field]!r:.40} is outside the scale {scale}")
    prompt, genre = (_text(row, key) if key in row else "" for key in ("prompt", "genre"))
    response = _text(row, "response" if "response" in row else "text")
    return Response(prompt, response, sum(values) / len(values), tuple(values), scale, genre, raters=raters)


def _parse(line: bytes, plain: bool, scale: tuple[float, float] | None) -> tuple[str, Response | Preference]:
    """One line of a file -> its kind, told by its keys, and its record. Raises UserError('field: reason')."""
    try:
        row = {"text": line.decode()} if plain else json.loads(line.decode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"row: not {'UTF-8' if isinstance(e, UnicodeError) else 'JSON'}: {e}") from None
    _check(isinstance(row, dict), f"row: expected an object, got {row!r:.40}")
    text = lambda field: _text(row, field)
    if "chosen" in row or "rejected" in row:
        chosen, rejected = text("chosen"), text("rejected")
        # Messages that open with the user's turn hold the whole conversation, whatever `prompt` repeats of it.
        if "prompt" in row and not (isinstance(row["chosen"], list) and chosen.startswith("\n\n")):
            return "preference", Preference(text("prompt"), chosen, rejected)
        cut = os.path.commonprefix([chosen, rejected]).rfind(TURN) + len(TURN)
        _check(cut >= len(TURN), f"prompt: missing, and chosen and rejected share no {TURN!r} to split at")
        return "preference", Preference(chosen[:cut], chosen[cut:], rejected[cut:])
    if "votes" in row or "response_a" in row:
        return "preference", _choice(row)
    if "rating" in row or "ratings" in row:
        return "rated", _rated(row, scale)
    if "messages" in row:
        _check(isinstance(row["messages"], list), f"messages: expected a list, got {row['messages']!r:.40}")
        whole, last = text("messages"), row["messages"][-1]
        _check(last["role"] == "assistant", "messages: the last turn must be the assistant's")
        return "completion", Response(whole.removesuffix(" " + last["content"]), " " + last["content"])
    if "completion" in row or "label" in row:
        label = row.get("label")
        _check(label in (None, False, True), f"label: expected true or false, got {label!r:.40}")
        return "completion" if label is None else "labelled", Response(
            text("prompt"), text("completion"), label=label
        )
    if "text" in row:
        return "text", Response("", text("text"), genre=text("genre") if "genre" in row else "")
    _check("prompt" in row, f"keys: {sorted(row)} match no format: see python -m minirlhf.data --help")
    return "prompt", Response(text("prompt"), "")


def load(
    source: str | Path, skip_bad=False, scale: tuple[float, float] | None = None, data_dir=None
) -> Dataset:
    """Read 'vader', 'toy', a file or a folder. `skip_bad` counts bad rows and goes on; `scale` is that of ratings
    that record none; `data_dir` keeps 'vader'. Raises UserError('file:line: field: reason')."""
    if source in ("toy", "vader"):
        return _toy() if source == "toy" else _vader(data_dir)
    path, suffixes = Path(source), (".jsonl", ".jsonl.gz", ".txt")
    _check(path.exists(), f"{path}: no such file or folder (built in: vader, toy)")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith(suffixes))
    _check(
        files and files[0].name.endswith(suffixes),
        f"{path}: expected {', '.join(suffixes)}, or a folder of them",
    )
    seen, records, skipped, dropped, sha256 = None, [], [], Counter(), hashlib.sha256()
    for file in files:
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{file}: cannot be read: {e}") from None
        sha256.update(content)
        lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        for number, line in [(number, line) for number, line in lines if line.strip()]:
            try:
                found, record = _parse(line.rstrip(b"\r"), file.suffix == ".txt", scale)
                here = found, getattr(record, "scale", None)
                _check(
                    here == (seen or here),
                    f"keys: (kind, scale) {here} after {seen}: keep one kind to a source",
                )
            except UserError as e:
                _check(skip_bad, f"{file}:{number}: {e}")
                skipped.append(f"{file}:{number}: {e}")
                continue
            seen = here
            if found == "preference" and record.chosen.strip() == record.rejected.strip():
                dropped["identical pairs"] += 1  # they teach nothing [D15]
            elif not "".join(as_example(record)).strip():
                dropped["empty texts"] += 1
            else:
                records.append(record)
    _check(records, f"{path}: empty: no usable row ({len(skipped)} bad, {sum(dropped.values())} dropped)")
    kind, scale = seen
    note = f" on the scale {scale}" if kind == "rated" else ""
    if kind == "rated" and not scale:  # infer: the first usual scale that holds all ratings
        low, high = min(min(r.ratings) for r in records), max(max(r.ratings) for r in records)
        scale = next((s for s in ((1, 5), (0, 4), (-4, 4)) if s[0] <= low and high <= s[1]), None)
        _check(scale, f"{path}: rating: {low:g} to {high:g} is no usual scale: record `scale` on the rows")
        records, note = [replace(r, scale=scale) for r in records], f" on the scale {scale} (inferred)"
    return Dataset(
        str(path), kind, records, [*map(str, files)], sha256.hexdigest(), dict(dropped), skipped, note
    )


def _toy() -> Dataset:
    """400 sentences of a small grammar, each with five SIMULATED ratings. No network; for tests and smoke runs."""
    rng, records = random.Random(0), []
    nouns = ("plot", "cast", "script", "music", "ending", "acting", "story", "camera", "pace", "dialogue")
    valences = {"great": 2.5, "funny": 1.6, "odd": -0.2, "flat": -1.2, "awful": -2.6}
    adverbs, tails = (
        {"": 1, "very ": 1.4, "rather ": 0.7, "not ": -0.7},
        {", I smiled.": 0.8, ", I fell asleep.": -0.8},
    )
    for noun, adverb, word, tail in product(nouns, adverbs, valences, tails):
        scores = [rng.gauss(adverbs[adverb] * valences[word] + tails[tail], 0.8) for _ in range(5)]
        ratings = tuple(min(4, max(-4, round(score))) for score in scores)
        text = f"The {noun} is {adverb}{word}{tail}"
        records.append(Response("", text, sum(ratings) / 5, ratings, (-4, 4), "movies"))
    sha256 = hashlib.sha256(repr(records).encode()).hexdigest()
    return Dataset("toy", "rated", records, ["toy"], sha256, {}, note=" by SIMULATED raters")


def clean(text: str) -> str:
    """'' -> " (of \'\'\' the last two), HTML entities undone (some were escaped twice), white space collapsed."""
    return " ".join(re.sub(r"''(?!')", '"', html.unescape(html.unescape(text))).split())


def _vader(data_dir: str | Path | None) -> Dataset:
    folder = Path(data_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minirlhf"))
    cache, stamp = folder / "vader.jsonl", {"format": CACHE_FORMAT, "source": VADER_SHA256}
    try:
        head, body = cache.read_bytes().split(b"\n", 1)
        head = json.loads(head)
        fresh = head == head | stamp | {"body": hashlib.sha256(body).hexdigest()}
    except (OSError, ValueError, TypeError):
        fresh = False
    if not fresh:  # absent, older or damaged
        rows, dropped = _vader_rows(_tables(_sdist(folder)))
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        head = stamp | {"body": hashlib.sha256(body).hexdigest(), "dropped": dropped}
        try:  # the whole file or none: written beside its place, then renamed
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                (new := Path(beside, cache.name)).write_bytes(json.dumps(head).encode() + b"\n" + body)
                os.replace(new, cache)
        except OSError as e:
            raise UserError(f"{cache}: cannot be written: {e.strerror}: see --data-dir") from None
    rows = map(json.loads, body.splitlines())
    records = [Response("", text, sum(r) / len(r), tuple(r), (-4, 4), genre) for text, r, genre in rows]
    return Dataset(
        "vader", "rated", records, [str(cache)], head["body"], head["dropped"], note=" by human raters"
    )


def _sdist(folder: Path) -> bytes:
    """The source distribution, put into `folder` by hand or fetched by pip; its hash is verified before its use."""
    with tempfile.TemporaryDirectory() as temporary:
        path, pins, reason = folder / SDIST, Path(temporary, "pins.txt"), ""
        if not path.exists():
            path = Path(temporary, SDIST)
            pins.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{VADER_SHA256}\n")
            command = [sys.executable, *PIP.split(), "-r", str(pins), "-d", temporary]
            try:
                errors = subprocess.run(
                    command, capture_output=True, text=True, timeout=300
                ).stderr.splitlines()
                reason = ([e for e in errors if "ERROR" in e or "No module" in e] or ["pip"])[-1].strip()[
                    :200
                ]
            except (OSError, subprocess.TimeoutExpired) as e:
                reason = f"pip: {type(e).__name__}"
        _check(
            path.exists(),
            f"vader: cannot be fetched ({reason}): use --data toy, or put {SDIST} into --data-dir",
        )
        content = path.read_bytes()
    _check(
        hashlib.sha256(content).hexdigest() == VADER_SHA256,
        f"{path}: sha256 is not {VADER_SHA256}: delete it",
    )
    return content


def _tables(sdist: bytes) -> dict[str, list[list[str]]]:
    """The tables we need, name -> rows of cells. They are read in memory, by full name, and nothing is unpacked: no
    path, link or device in an archive can do harm."""
    outer = ["additional_resources/hutto_ICWSM_2014.tar.gz", "vaderSentiment/vader_lexicon.txt"]
    inner = [
        f"{stem}_{table}.txt" for stem, table in product(GENRES.values(), ("GroundTruth", "anonDataRatings"))
    ]
    found = {}
    for root, names in ("vaderSentiment-3.3.2", outer), ("hutto_ICWSM_2014", inner):
        try:
            with tarfile.open(fileobj=io.BytesIO(found.pop(outer[0], sdist))) as tar:
                for name in names:
                    member = tar.getmember(f"{root}/{name}")
                    _check(
                        member.isreg() and member.size <= MAX_MEMBER, f"{SDIST}: {name}: a link or too large"
                    )
                    found[name] = tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as e:
            raise UserError(f"{SDIST}: damaged: {e}") from None
    lines = {
        name: blob.decode("utf-8-sig").splitlines() for name, blob in found.items()
    }  # one begins with a BOM
    return {Path(name).stem: [line.split("\t") for line in rows] for name, rows in lines.items()}


def _vader_rows(
    tables: dict[str, list[list[str]]],
) -> tuple[list[tuple[str, list[int], str]], dict[str, int]]:
    """-> rows (text, scores, genre), and how many were dropped why."""
    found, dropped = [], {"mismatched": 0}
    for genre, stem in GENRES.items():
        scores = {row[0]: row for row in tables[f"{stem}_anonDataRatings"]}  # by id: one is in another order
        for key, mean, text in tables[f"{stem}_GroundTruth"]:
            same = (
                abs(float(mean) - float(scores[key][1])) < 0.01
            )  # in 196 tweets, one id names two different items
            found += [(clean(text), json.loads(scores[key][3]), genre)] * same
            dropped["mismatched"] += not same
    # A word has a space before it, as inside a sentence: to a BPE, "good" and " good" are two tokens.
    found += [(f" {word}", json.loads(scores), "words") for word, _, _, scores in tables["vader_lexicon"]]
    rows = {row[0]: row for row in reversed(found)}  # of equal texts the first stays
    return [*rows.values()][::-1], dropped | {"duplicate": len(found) - len(rows)}


def encode_example(tok, prompt: str, completion: str, context: int, eos: bool = True) -> tuple[list, list]:
    """-> ids of `<bos> prompt completion <eot>`, loss_mask (True = learn this token). Prompt and completion are encoded
    apart, so that the prompt's ids are a prefix; they are masked, the last <eot> is trained [D19]. What exceeds the
    `context` is cut on the right, the end with it. Raises UserError for a prompt that leaves no room."""
    head, body = [tok.bos, *tok.encode(prompt)], tok.encode(completion)
    _check(
        len(head) < context,
        f"prompt: {len(head)} tokens, context {context}: raise --context: {prompt[:30]!r}",
    )
    ids = (head + body + [tok.eot] * eos)[:context]
    return ids, [i >= len(head) for i in range(len(ids))]


def encode_all(
    tok, records: Sequence[Response | Preference], context: int
) -> list[tuple[list[int], list[bool]]]:
    """`encode_example` of every record that has something to train: bare prompts and empty answers drop out [D19]."""
    return [
        encode_example(tok, prompt, text, context)
        for prompt, text in map(as_example, records)
        if text.strip()
    ]


def prompts_of(records: Sequence[Response | Preference], tok, prompt_tokens: int) -> list[list[int]]:
    """Prompts as ids, each opened by the <bos> that opens every training text: a record's own prompt, or the first
    `prompt_tokens` tokens of a text without one. Texts that would leave nothing to write are passed over."""
    found = []
    for prompt, text in map(as_example, records):
        ids = tok.encode(prompt or text)
        if prompt or len(ids) > prompt_tokens:
            found.append([tok.bos, *(ids if prompt else ids[:prompt_tokens])])
    _check(found, f"no text is longer than {prompt_tokens} tokens: lower --prompt-tokens")
    return found


def translate(ids: list[int], source, target) -> list[int]:
    """The same text in another tokenizer's ids, opened as its texts are, and closed if it was closed."""
    if source.hash == target.hash:
        return ids
    closed = len(ids) > 1 and ids[-1] == source.eot
    return [target.bos, *target.encode(source.decode(ids)), *[target.eot] * closed]


def collate(rows: Sequence[Sequence[int]], pad: int, side: str = "right", width: int = 1) -> tuple:
    """-> tokens (B, T) int64, mask (B, T) bool (True = real); T is the longest row, or `width` if that is more.
    The mask comes from the lengths: a real token may equal `pad` [D6]."""
    lengths = torch.tensor([len(row) for row in rows])
    width = max(width, int(lengths.max()))
    mask = torch.arange(width) < lengths[:, None]  # (B, T)
    mask = mask.flip(1) if side == "left" else mask
    tokens = torch.full(mask.shape, pad)
    tokens[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return tokens, mask


def batches(
    n: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The indices below n, each once, the last batch perhaps short. The order depends on (seed, epoch) alone: to
    resume takes a cursor [D21]. With `lengths`, the rows of a batch are of like length."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)
    if lengths is not None:  # sorted only within windows of 16 batches: chance still decides who meets whom
        order = order[np.lexsort([np.asarray(lengths)[order], np.arange(n) // (16 * batch_size)])]
    cuts = [order[i : i + batch_size].tolist() for i in range(0, n, batch_size)]
    return cuts if lengths is None else [cuts[i] for i in rng.permutation(len(cuts))]


def cursor(n: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """Indices of batch number `iteration` in an endless walk through reshuffled epochs: a function of its arguments
    alone, so a resumed run meets the same prompts [D21]."""
    places = range(iteration * batch_size, (iteration + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(n)
        for epoch in {place // n for place in places}
    }
    return [int(orders[place // n][place % n]) for place in places]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter  # keeps the table of formats above
    parser = argparse.ArgumentParser("python -m minirlhf.data", description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("source", help="a file, a folder, vader or toy")
    parser.add_argument("--tokenizer", help="a checkpoint, gpt2 or a .tiktoken file (left out: characters)")
    parser.add_argument("--skip-bad", action="store_true", help="count bad rows and go on")
    parser.add_argument("--data-dir", help="folder of the built-in dataset (left out: the user's cache)")
    parser.add_argument("-n", type=int, default=3, help="examples shown")
    args = parser.parse_args()
    from minirlhf.measure.agreement import krippendorff_alpha
    from minirlhf.tokenizer import Tokenizer

    tok = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    data = load(args.source, args.skip_bad, data_dir=args.data_dir)
    print(data.describe())
    print("splits:", dict(Counter(split_of(*as_example(r)) for r in data.records)))
    for genre in sorted({r.genre for r in data.records}) if data.kind == "rated" else []:
        records = data.select(genres=[genre]).records
        alpha = krippendorff_alpha([list(r.ratings) for r in records], level="interval")
        raters = f"{sum(len(r.ratings) for r in records) / len(records):.1f} raters each"
        print(
            f"\n{genre or 'ratings'}: {len(records):,} items, {raters}, agreement (Krippendorff's alpha) "
            + ("-" if alpha is None else f"{alpha:.3f}")
        )
        bars = Counter(round(r.rating) for r in records)
        for value in range(round(records[0].scale[0]), round(records[0].scale[1]) + 1):
            print(f"{value:4d} {bars[value]:7,} {'#' * -(-50 * bars[value] // max(bars.values()))}")
    print("\nexamples, what is trained between [[ and ]]:")
    for prompt, completion in map(as_example, data.records[: args.n]):
        shown = [prompt, "[[", completion, "<eot>"]
        if tok:
            ids, mask = encode_example(tok, prompt, completion, sys.maxsize)
            shown = [{tok.bos: "<bos>", tok.eot: "<eot>"}.get(i) or tok.decode([i]) for i in ids]
            shown.insert(mask.index(True), "[[")
        print(
            f"{split_of(prompt, completion):6s}"
            + ("|" if tok else "").join(shown).replace("\n", "\\n")
            + "]]"
        )


if __name__ == "__main__":
    from minirlhf.support.cli import run_script

    run_script(main)
