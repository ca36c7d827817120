"""Conversations: texts that were given as messages, and that remember them.

A Conversation is a str, the transcript of its messages in the layout of HH-RLHF.  Splits, reports and people
see that text.  Where a checkpoint lays conversations out by its chat template, the messages are what is
encoded (layout.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minirlhf import UserError

Message = dict[str, Any]  # {role, content, ...}: whatever else the model's chat template reads
ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
TEMPLATE_ROLES = ("developer", "tool", "function")  # a chat template may have a place for them
TURN = "\n\nAssistant:"  # ends a transcript's prompt; the completion keeps its leading space
BESIDE = ("tools", "documents")  # columns that belong to all messages of their row


class Conversation(str):
    """Messages, or the part of a conversation that is a prompt or a response, as their transcript."""

    messages: tuple[Message, ...]
    beside: dict[str, list]  # the row's tools and documents
    learnt: bool  # whether its assistant turns are to be learnt: not those of a `prompt` column

    def __new__(
        cls, text: str, messages: Sequence[Message] = (), beside: dict | None = None, learnt: bool = False
    ) -> Conversation:
        new = super().__new__(cls, text)
        new.messages, new.beside, new.learnt = tuple(messages), beside or {}, learnt
        return new

    def parted(self, first: int, learnt: bool = False) -> tuple[Conversation, Conversation]:
        """(the messages before number `first` as a prompt, the others): `first` is an assistant's."""
        before, after = self.messages[:first], self.messages[first:]
        prompt = transcript(before, answer=True) if before else ""
        of_row = (self.beside, learnt)
        return Conversation(prompt, before, *of_row), Conversation(self[len(prompt) :], after, *of_row)

    def lower(self) -> Conversation:
        """The conversation in lower case."""
        low = [m | ({"content": m["content"].lower()} if "content" in m else {}) for m in self.messages]
        return Conversation(str(self).lower(), low, self.beside, self.learnt)


def transcript(messages: Sequence[Message], answer: bool) -> str:
    """The text of messages in the layout of HH-RLHF.

    An assistant turn that opens it has no header.  With `answer` the header of a turn to come ends it.
    """
    return "".join(map(_turn, messages)).removeprefix(TURN) + TURN * answer


def transcript_turns(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """The characters of each message in a transcript, from its header's last space on."""
    found, at = [], 0
    for i, message in enumerate(messages):
        text, header = _turn(message), len(TURN) * (message["role"] == "assistant")
        at -= header * (i == 0)  # the turn that opens a transcript has none
        found.append((at + header, at + len(text)))
        at += len(text)
    return found


def _turn(message: Message) -> str:
    """A message under its header; what only chat templates know is shown as well as it can be."""
    role, content = message["role"], message.get("content", "")
    header = ROLES.get(role) or f"\n\n{role.capitalize()}: "
    calls = message.get("tool_calls")
    return header + content + (json.dumps(calls, ensure_ascii=False) if calls else "")


def conversation(entries: list, field: str, beside: dict[str, list], answer: bool) -> Conversation:
    """The Conversation of a column's messages.  Raises UserError('field: reason').

    Null fields of a message count as absent, as in transformers' apply_chat_template.  Content may be a list
    of text parts, {type: "text", text}, which are joined.
    """
    entries = [_in_one_piece(entry, field) for entry in entries]
    if not entries or not all(map(_is_message, entries)) or not _is_flat(entries):
        raise UserError(f"{field}: expected messages [{{role, content}}], roles {[*ROLES, *TEMPLATE_ROLES]}")
    messages = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    return Conversation(transcript(messages, answer), messages, beside)


def _in_one_piece(entry: Any, field: str) -> Any:
    """A message whose content is a list of text parts, with one text in its place."""
    parts = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return entry
    for part in parts:
        if part.get("type") != "text" or type(part.get("text")) is not str:
            raise UserError(
                f"{field}: a message has a part of type {part.get('type')!r:.40}: only text is read"
            )
    return entry | {"content": "".join(part["text"] for part in parts)}


def _is_flat(value: object, levels: int = 64) -> bool:
    """Whether lists and objects are nested in fewer levels: templates and we walk through them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(entry, levels - 1) for entry in inner)


def _is_message(entry: object) -> bool:
    if not isinstance(entry, dict) or str(entry.get("role")) not in (*ROLES, *TEMPLATE_ROLES):
        return False
    content, calls = entry.get("content"), entry.get("tool_calls")
    if calls and entry["role"] == "assistant" and content is None:
        return isinstance(calls, list)
    return type(content) is str


def tables_beside(columns: dict[str, Any]) -> dict[str, list]:
    """{tools, documents} of a row, where it has them: lists of objects, or the JSON of one."""
    found = {}
    for name in BESIDE:
        value = columns.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise UserError(f"{name}: expected a list of objects, got {value!r:.40}") from None
        objects = isinstance(value, list) and all(isinstance(x, dict) for x in value) and _is_flat(value)
        if value is not None and not objects:
            raise UserError(f"{name}: expected a list of objects, got {value!r:.40}")
        if value:
            found[name] = value
    return found


def shared_messages(a: Conversation, b: Conversation) -> int:
    """How many messages open both conversations before the assistant's turns that may differ; 0: none."""
    pairs = list(zip(a.messages, b.messages, strict=False))
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    turns = [i for i, (x, y) in enumerate(pairs) if i <= same and x["role"] == y["role"] == "assistant"]
    return max(turns, default=0)
