"""Rows to records: what the keys of a row say that it is.

    kind         keys of a row
    text         {text, genre?}, or each line of a .txt file
    completion   {prompt, completion}, {prompt, response}, {messages}
    labelled     {prompt, completion or response, label}
    preference   {prompt, chosen, rejected}, {chosen, rejected}, {prompt, response_a, response_b, votes}
    rated        {prompt?, response or text, rating or ratings, scale?, genre?}
    prompt       {prompt}

`ratings` is a list, or an object {rater: score}.  `votes` holds counts {a, b, tie}, or it is a list or an
object {rater: "a", "b" or "tie"}.  In a list the places are people: the first entry of every row is from one
rater.  A text may be a list of {role, content} messages: a Conversation, which the checkpoint's chat template
lays out, or else a transcript as in HH-RLHF.  A column whose value is null counts as absent.

Other people's rows (ShareGPT's conversations, Alpaca's instructions, UltraFeedback's completions, columns
with other names) become these first: see shapes.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from minirlhf import UserError
from minirlhf.support.conversation import (
    TURN,
    Conversation,
    conversation,
    shared_messages,
    tables_beside,
)

Scale = tuple[float, float]
Fields = dict[str, Any]  # of a Response or a Preference in data.py
VOTES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # what each vote is worth to the first text
SURROGATE = re.compile("[\ud800-\udfff]")
# Columns that hold content in one format or another.  Where a row has one that is not read, a remark says so.
CONTENT = {"answer", "chosen", "completion", "completions", "content", "context", "conversation", "history"}
CONTENT |= {"conversations", "input", "instruction", "label", "messages", "output", "prompt", "question"}
CONTENT |= {"rating", "ratings", "rejected", "response", "response_a", "response_b", "summary", "system"}
CONTENT |= {"target", "text", "votes"}
SCORES = ("score_chosen", "score_rejected")
COLUMNS = CONTENT | {"genre", "scale", "tools", "documents", *SCORES}  # all that is ever read


def check(ok: object, message: str) -> None:
    if not ok:
        raise UserError(message)


class Row:
    """The columns of a row that are not null.  It remembers which of them were read.

    `origin` says which columns of the file a column was made of, where that is not the one of its name.
    `hidden` are columns that others were named in place of; `remarks` is what is to be said of the row.
    """

    def __init__(
        self,
        columns: dict[str, Any],
        origin: dict[str, tuple[str, ...]] | None = None,
        hidden: Collection[str] = (),
        remarks: Sequence[str] = (),
    ):
        self.columns = {key: value for key, value in columns.items() if value is not None}
        self.nulls = columns.keys() - self.columns.keys()
        self.origin, self.hidden, self.remarks = origin or {}, hidden, remarks
        self.read: set[str] = set()

    def __contains__(self, field: str) -> bool:
        return field in self.columns

    def __getitem__(self, field: str) -> Any:
        """The value of a column.  Raises UserError where there is none."""
        if field not in self.columns:
            raise UserError(f"{field}: missing")
        self.read.add(field)
        return self.columns[field]

    def text(self, field: str) -> str:
        """The text of a column; of messages a Conversation."""
        value = self[field]
        if isinstance(value, list):
            _check_characters(json.dumps(value, ensure_ascii=False, default=str), field)
            beside = tables_beside(self.columns)
            return conversation(value, field, beside, answer=field == "prompt")
        if not isinstance(value, str):
            raise UserError(f"{field}: expected text, got {value!r:.40}")
        _check_characters(value, field)
        return value

    def optional_text(self, field: str) -> str:
        return self.text(field) if field in self else ""

    def by_rater(self, field: str) -> tuple[tuple[str, ...], Any]:
        """(raters, values) of a column {rater: value}, without nulls; ((), the column) if it is none."""
        value = self[field]
        if not isinstance(value, dict):
            return (), value
        given = {rater: v for rater, v in value.items() if v is not None}
        for rater in given:
            _check_characters(rater, f"{field}: the name of a rater")
        return tuple(given), [*given.values()]

    def unused(self) -> list[str]:
        """Columns of the file that look like content, hold something and were not read."""
        left = CONTENT & self.columns.keys() - self.read
        left = {field for field in left if self.columns[field] not in ("", [])}
        names = {name for field in left for name in self.origin.get(field, (field,))}
        return sorted(names | CONTENT & {*self.hidden})

    def used(self) -> tuple[str, ...]:
        """The columns that were read, as the file names them: ("helpfulness as rating", "text")."""
        there = sorted(self.read & self.columns.keys())
        return tuple(self._name(field) for field in there if self.origin.get(field) != ())

    def _name(self, field: str) -> str:
        names = " + ".join(self.origin.get(field, (field,)))
        return names if names == field else f"{names} as {field}"

    def in_the_files_words(self, message: str) -> str:
        """ "field: reason" with the file's name of the column."""
        field, colon, reason = message.partition(":")
        return f"{self._name(field)}{colon}{reason}"


def _check_characters(text: str, field: str) -> None:
    if not text.isascii() and SURROGATE.search(text):  # JSON can spell it
        raise UserError(f"{field}: half a surrogate pair")


def _are_numbers(values: object) -> bool:
    """Is it a list of finite numbers?  NaN fails any comparison; a bool is no number here."""
    return isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)


def parse(row: Row, scale: Scale | None = None) -> tuple[str, Fields, list[str]]:
    """(kind, fields of the record, remarks about what is not used) of a row.

    `scale` is that of ratings which record none.  Raises UserError("field: reason").
    """
    remarks = [*row.remarks]
    if "chosen" in row or "rejected" in row:
        kind, fields = "preference", _pair(row) | _tie(row, remarks)
    elif "votes" in row or "response_a" in row:
        kind, fields = "preference", _votes(row)
    elif "rating" in row or "ratings" in row:
        kind, fields = "rated", _rated(row, scale)
    elif "messages" in row:
        kind, fields = "completion", _conversation(row, remarks)
    elif "completion" in row or "label" in row or ("prompt" in row and "response" in row):
        kind, fields = _completion(row)
    elif "text" in row:
        text, genre = row.text("text"), row.optional_text("genre")
        kind, fields = "text", {"prompt": "", "response": text, "genre": genre}
    else:
        keys = f"{sorted(row.columns)}"
        remedy = "see python -m minirlhf.data --help, or name columns with --fields OURS=THEIRS"
        check("prompt" in row, f"keys: {keys:.200} match no format: {remedy}")
        kind, fields = "prompt", {"prompt": row.text("prompt"), "response": ""}
    return kind, fields, remarks + [f"column `{field}` is not used" for field in row.unused()]


def _pair(row: Row) -> Fields:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    # Messages that open with the user's turn hold the whole conversation, whatever `prompt` repeats of it.
    whole = isinstance(row["chosen"], list) and chosen.startswith("\n\n")
    if "prompt" in row and not whole:
        return {"prompt": row.text("prompt"), "chosen": chosen, "rejected": rejected}
    row.read.add("prompt")
    nothing_shared = f"prompt: missing, and chosen and rejected share no {TURN!r} to split at"
    if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
        check(first := shared_messages(chosen, rejected), nothing_shared)
        (prompt, chosen), (_, rejected) = chosen.parted(first), rejected.parted(first)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    cut = os.path.commonprefix([chosen, rejected]).rfind(TURN) + len(TURN)
    check(cut >= len(TURN), nothing_shared)
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _tie(row: Row, remarks: list[str]) -> Fields:
    """{share: 0.5} where both texts have the same score: such a pair prefers neither."""
    if not all(field in row and _are_numbers([row.columns[field]]) for field in SCORES):
        return {}
    chosen, rejected = (row[field] for field in SCORES)
    if chosen < rejected:
        remarks.append("the chosen text has the lower score, and counts as chosen all the same")
    return {"share": 0.5} if chosen == rejected else {}


def _votes(row: Row) -> Fields:
    prompt, a, b = (row.text(field) for field in ("prompt", "response_a", "response_b"))
    raters, values = row.by_rater("votes") if "votes" in row else ((), None)
    if isinstance(values, list) and values and all(isinstance(v, str) and v in VOTES for v in values):
        votes = tuple(VOTES[v] for v in values)
        share = sum(votes) / len(votes)
    else:
        counts = dict(zip(raters, values, strict=True)) if raters else {}
        good = set(counts) <= set(VOTES) and all(type(n) is int and 0 <= n < 1e9 for n in counts.values())
        wanted = '{"a": 2, "b": 1, "tie": 0}, or {rater: "a", "b" or "tie"}'
        got = f"{row.columns.get('votes')!r:.40}"
        check(good and any(counts.values()), f"votes: expected counts such as {wanted}, got {got}")
        votes, raters = (), ()
        share = sum(VOTES[v] * n for v, n in counts.items()) / sum(counts.values())
    fields = {"prompt": prompt, "chosen": a, "rejected": b, "share": share, "votes": votes, "raters": raters}
    if share < 0.5:
        turned = tuple(1 - v for v in votes)
        fields |= {"chosen": b, "rejected": a, "share": 1 - share, "votes": turned}
    return fields


def _rated(row: Row, scale: Scale | None) -> Fields:
    field = "ratings" if "ratings" in row else "rating"
    raters, values = row.by_rater(field) if field == "ratings" else ((), [row[field]])
    if not values or not _are_numbers(values):
        raise UserError(f"{field}: expected finite numbers, got {row[field]!r:.40}")
    if "scale" in row:
        ends = row["scale"]
        good = _are_numbers(ends) and len(ends) == 2 and ends[0] < ends[1]
        check(good, f"scale: expected [low, high], got {ends!r:.40}")
        scale = tuple(ends)
    if scale and not (scale[0] <= min(values) and max(values) <= scale[1]):
        raise UserError(f"{field}: {row[field]!r:.40} is outside the scale {scale}")
    return {
        "prompt": row.optional_text("prompt"),
        "response": row.text("response" if "response" in row else "text"),
        "rating": sum(values) / len(values),
        "ratings": tuple(values),
        "scale": scale,
        "genre": row.optional_text("genre"),
        "raters": raters,
    }


def _conversation(row: Row, remarks: list[str]) -> Fields:
    messages = row["messages"]
    if not isinstance(messages, list):
        raise UserError(f"messages: expected a list, got {messages!r:.40}")
    whole, last = row.text("messages"), messages[-1]
    check(last["role"] == "assistant", "messages: the last turn must be the assistant's")
    for message in messages:
        weight = message.get("weight")
        check(weight in (None, 0, 1), f"messages: weight: expected 0 or 1, got {weight!r:.40}")
    prompt, response = whole.parted(len(messages) - 1, learnt=True)
    if sum(message["role"] == "assistant" for message in messages) > 1:
        remarks.append("earlier assistant turns: --learn says whether SFT learns them")
    if last.get("weight") == 0:
        remarks.append("the last turn has weight 0: it is not learnt")
        response = Conversation("", response.messages, response.beside)
    return {"prompt": prompt, "response": response}


def _completion(row: Row) -> tuple[str, Fields]:
    answer = "response" if "response" in row and "completion" not in row else "completion"
    fields = {"prompt": row.text("prompt"), "response": row.text(answer)}
    if "label" not in row:
        return "completion", fields
    label = row["label"]
    check(label in (False, True), f"label: expected true or false, got {label!r:.40}")
    return "labelled", fields | {"label": bool(label)}
