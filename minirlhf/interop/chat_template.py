"""Conversations in a model's own chat template, as the ids that transformers' `apply_chat_template` gives.

transformers fills in the template and then encodes the whole text at once, so that a space which the template
puts before a message joins its first word. So do `encode` and `encode_turns`, with one difference: special
tokens come from the template alone. A message that contains '<|im_end|>' does not end its turn; to the model
it is plain characters, wherever in a message or among the tools it stands.

A template is code written by whoever made the model. It runs in a sandbox within limits (sandbox.py), and
whatever it raises becomes a UserError.
"""

from __future__ import annotations

import functools
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from minirlhf import UserError
from minirlhf.interop import sandbox
from minirlhf.support import added
from minirlhf.support.conversation import ROLES, TURN, Message
from minirlhf.support.layout import TEMPLATE
from minirlhf.support.spans import Part, Span, encode_with_spans
from minirlhf.support.text import one_line
from minirlhf.tokenizer import Tokenizer

Messages = Sequence[Message]
Beside = Mapping[str, list] | None  # tools and documents
PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]  # characters that stand for others for a while
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names under which templates look for them


def encode(tokenizer: Tokenizer, messages: Messages, answer: bool, beside: Beside = None) -> list[int]:
    """Ids of a conversation; `answer`: followed by what opens the assistant's next turn.

    Raises UserError where the template fails or does not accept these messages."""
    return encode_with_spans(tokenizer, fill_in(tokenizer, messages, answer, beside).parts, [])[0]


def encode_turns(
    tokenizer: Tokenizer, messages: Messages, wanted: Sequence[int], beside: Beside = None
) -> tuple[list[int], list[int]]:
    """(ids, said) of a whole conversation: said[i] is the number of the message that token i belongs to, of
    those that are wanted and are the assistant's, or else -1.

    A turn is what the template marks as generated, where it marks anything; otherwise what it writes after
    opening the turn, up to the first token that ends one. A token that holds characters of a turn belongs to
    it. Raises UserError where the template fails, or does not let these turns be told apart."""
    written = fill_in(tokenizer, messages, False, beside)
    turns = Turns(tokenizer, messages, beside, written)
    numbers = [i for i in turns.numbers if i in wanted]
    spans = turns.of_marks(numbers) if written.marks else [(i, turns.span(i)) for i in numbers]
    ids, places = encode_with_spans(tokenizer, written.parts, [span for _, span in spans])
    said = [-1] * len(ids)
    for (number, _), found in zip(spans, places, strict=True):
        for i in found:
            said[i] = number
    return ids, said


def end_of_turn(source: str, specials: Mapping[str, int], named: Mapping[str, str | None]) -> int | None:
    """The special token that a template writes after the assistant's last message; None if there is none."""
    content = chr(PRIVATE[0])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    try:
        text = _render(source, named, messages, False, None)
    except UserError:
        return None
    found = added.cut([text.partition(content)[2]], specials)
    return next((i for i in found if isinstance(i, int)), None)


def after_last_end(tokenizer: Tokenizer) -> str:
    """What the template writes after the end of the assistant's last turn, such as ChatML's line break.

    Texts are learnt and judged up to that end.  "" where nothing follows, and for the layout `transcript`.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if tokenizer.layout.name != TEMPLATE:
        return ""
    try:
        ids, said = encode_turns(tokenizer, messages, [1])
    except UserError:
        return ""
    last = max((i for i, number in enumerate(said) if number >= 0), default=len(ids))
    end = next((i for i in range(last, len(ids)) if ids[i] in tokenizer.ends), len(ids))
    return tokenizer.decode(ids[end + 1 :], False)


# ---------------------------------------------------------------- filling in a template


@dataclass(frozen=True)
class Written:
    """What a template wrote."""

    text: str
    parts: list[Part]  # of the text in order
    marks: list[Span]  # what stands in {% generation %} blocks


def render(
    tokenizer: Tokenizer, messages: Messages, answer: bool, beside: Beside = None, marks=("", "")
) -> str:
    """The text of a conversation in the tokenizer's chat template; `marks`: put around what is generated.

    Raises UserError where the template fails or does not accept these messages."""
    names = {i: name for name, i in tokenizer.specials.items()}
    named = {"bos_token": names[tokenizer.bos], "eos_token": names[tokenizer.eot]} | tokenizer.hf
    return _render(tokenizer.hf["chat_template"], named, messages, answer, beside, marks)


def _render(
    source: Any, named: Mapping, messages: Messages, answer: bool, beside: Beside, marks=("", "")
) -> str:
    if not isinstance(source, str):
        raise _refusal("it is not a string")
    variables = {key: named[key] for key in ("bos_token", "eos_token", "pad_token") if named.get(key)}
    variables |= {"tools": None, "documents": None} | dict(beside or {})
    variables |= {"messages": [*map(_as_given, messages)], "add_generation_prompt": answer}
    size = sum(map(len, _texts(variables["messages"], beside)))
    try:
        return sandbox.render(source, variables, size, marks)
    except sandbox.TemplateFailed as failed:
        raise _refusal(str(failed)) from None


def _as_given(message: Message) -> Message:
    """A message as transformers hands it to a template: without nulls, and thoughts under each of their
    names."""
    given = {key: value for key, value in message.items() if value is not None and key != "weight"}
    thoughts = next((given[name] for name in THOUGHTS if name in given), None)
    return given if thoughts is None else {"thinking": thoughts} | given | {"reasoning_content": thoughts}


def fill_in(tokenizer: Tokenizer, messages: Messages, answer: bool, beside: Beside = None) -> Written:
    """A conversation filled into the template, and cut at the template's own special tokens.

    Where a message spells out a special token, or half of one at its end, the template is filled in a second
    time, with stand-ins of the same length for these characters. Raises UserError where that changes more."""
    reached = _reached(tokenizer)
    texts = [*_texts(messages, beside)]
    source = tokenizer.hf["chat_template"]
    held = {*chain(str(source), *texts)}
    free = (chr(c) for c in PRIVATE if chr(c) not in held)
    marks = (next(free), next(free)) if "generation" in str(source) else ("", "")
    text, spans = _take_out(render(tokenizer, messages, answer, beside, marks), marks)
    if not text:
        raise _refusal("it writes nothing")
    hidden, show = text, lambda text: text
    stand_ins = reached.stand_ins(texts, free)
    if stand_ins:
        hide = lambda text: reached.hide(text, stand_ins)
        there = ([_changed(m, hide) for m in messages], {k: _map(v, hide) for k, v in (beside or {}).items()})
        hidden, _ = _take_out(render(tokenizer, there[0], answer, there[1], marks), marks)
        back = {hidden: name for name, hidden in stand_ins.items()}
        back |= {json.dumps(hidden)[1:-1]: json.dumps(name)[1:-1] for hidden, name in back.items()}
        pattern = re.compile("|".join(map(re.escape, back)))
        show = lambda text: pattern.sub(lambda found: back[found[0]], text)
        if show(hidden) != text:
            raise _refusal("it changes a message that contains the name of a special token")
    there = {name: i for name, i in reached.specials.items() if name in hidden}
    names = {i: name for name, i in there.items()}
    parts: list[Part] = []
    at = 0
    for piece in added.cut([hidden], there, tokenizer.flags):
        if isinstance(piece, str):
            parts.append((show(piece), None))
            at += len(piece)
            continue
        name = names[piece]
        end = max(at, hidden.find(name, at)) + len(name)
        if "rstrip" in tokenizer.flags.get(name, ()):
            end = added.SPACES.match(hidden, end).end()
        parts.append((hidden[at:end], piece))  # with the white space that belongs to the name
        at = end
    return Written(text, parts, spans)


def _take_out(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """A text without the marks in it, and what stood between an opening and a closing one.

    Nothing, where the template has moved them about: then its marks tell nothing."""
    if not marks[0]:
        return text, []
    pieces = re.split(f"([{''.join(marks)}])", text)
    at, places = 0, []
    for i, piece in enumerate(pieces):
        if i % 2:
            places.append((piece, at))
        else:
            at += len(piece)
    pairs = list(zip(places[::2], places[1::2], strict=False))
    paired = len(places) % 2 == 0 and all((a[0], b[0]) == marks for a, b in pairs)
    return "".join(pieces[::2]), [(a[1], b[1]) for a, b in pairs if a[1] < b[1]] if paired else []


# ---------------------------------------------------------------- special tokens that messages spell out


@dataclass(frozen=True)
class Reached:
    """The special tokens that a template can write, and what of them a message must not turn into."""

    specials: dict[str, int]
    names: re.Pattern | None  # any of those that no text contains
    beginnings: tuple[str, ...]  # proper beginnings of these names, the longest first
    endings: tuple[str, ...]

    def stand_ins(self, texts: Sequence[str], free: Iterator[str]) -> dict[str, str]:
        """A stand-in of the same length for each special token, or end of one, that the texts spell out."""
        found = [name for text in texts for name in self._spelled(text)]
        return {name: next(free) * len(name) for name in dict.fromkeys(found)}

    def hide(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """A text with its stand-ins."""
        return "".join(stand_ins.get(piece, piece) for piece in self._pieces(text))

    def _spelled(self, text: str) -> list[str]:
        pieces = self._pieces(text)
        inside = [piece for piece in pieces[1:-1] if self.names and self.names.fullmatch(piece)]
        return [piece for piece in (pieces[0], *inside, pieces[-1]) if piece]

    def _pieces(self, text: str) -> list[str]:
        """[the end of a name that opens the text, or "", ...text, name, text..., the beginning of a name that
        ends it]"""
        if self.names is None:
            return ["", text, ""]
        middle = self.names.split(text)
        first = last = ""
        if middle[0].startswith(self.endings):
            first = next(ending for ending in self.endings if middle[0].startswith(ending))
            middle[0] = middle[0].removeprefix(first)
        if middle[-1].endswith(self.beginnings):
            last = next(beginning for beginning in self.beginnings if middle[-1].endswith(beginning))
            middle[-1] = middle[-1].removesuffix(last)
        return [first, *middle, last]


@functools.lru_cache(maxsize=8)
def _reached(tokenizer: Tokenizer) -> Reached:
    unreached = {*tokenizer.hf.get("unreached", ())}
    specials = {
        name: i
        for name, i in tokenizer.specials.items()
        if name not in unreached and not tokenizer.added.get(name)
    }
    lookalikes = sorted(specials.keys() - tokenizer.added.keys(), key=len, reverse=True)
    names = re.compile(f"({'|'.join(map(re.escape, lookalikes))})") if lookalikes else None
    parts = lambda cut: tuple(
        sorted({cut(name, k) for name in lookalikes for k in range(1, len(name))}, key=len, reverse=True)
    )
    return Reached(specials, names, parts(lambda name, k: name[:k]), parts(lambda name, k: name[k:]))


def _texts(messages: Messages, beside: Beside) -> Iterator[str]:
    """All texts that stand in messages and beside them, but for roles."""
    for message in messages:
        yield from chain.from_iterable(_leaves(value) for key, value in message.items() if key != "role")
    yield from _leaves([*(beside or {}).values()])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain(value, *map(_leaves, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_leaves, value))


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    """A message with changed texts; its role and the names of its fields stay."""
    return {key: value if key == "role" else _map(value, change) for key, value in message.items()}


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map(entry, change) for key, entry in value.items()}
    return [_map(entry, change) for entry in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------- which part of a text is whose


class Turns:
    """The assistant's turns in what a template wrote of a conversation."""

    def __init__(self, tokenizer: Tokenizer, messages: Messages, beside: Beside, whole: Written):
        self.tokenizer, self.messages, self.beside, self.whole = tokenizer, messages, beside, whole
        self.numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self.starts: dict[int, int] = {}

    def of_marks(self, wanted: Sequence[int]) -> list[tuple[int, Span]]:
        """(message, span) of each marked span of the messages that are wanted."""
        marks, numbers = self.whole.marks, self.numbers
        if len(numbers) == 1:
            return [(i, span) for i in wanted for span in marks]
        try:
            starts = [self.start(i) for i in numbers]
        except UserError:
            if len(marks) != len(numbers):
                raise
            starts = [mark[0] for mark in marks]
        found = list(zip(numbers, marks, strict=False))
        turns = zip(starts, [*starts[1:], len(self.whole.text)], marks, strict=False)
        if len(marks) != len(numbers) or not all(a <= mark[1] and mark[0] < b for a, b, mark in turns):
            # Several in one turn, or none: the turn that was opened last before a mark has it.
            found = [(numbers[max(0, bisect_right(starts, mark[0]) - 1)], mark) for mark in marks]
        return [(i, span) for i, span in found if i in wanted]

    def span(self, i: int) -> Span:
        """Message number i as the template writes it, up to the token that ends a turn."""
        text, start = self.whole.text, self.start(i)
        through = self._prefix(i + 1, answer=False)
        after = [self.start(k) for k in self.numbers if k > i][:1]
        limit = through if through is not None else min(after, default=len(text))
        at = 0
        for part, special in self.whole.parts:
            at += len(part)
            if special in self.tokenizer.ends and start < at <= limit:
                return start, at
        if through is None and after:
            raise _refusal(f"where it ends message {i + 1} cannot be told")
        return start, limit

    def start(self, i: int) -> int:
        """Where what the assistant says in message number i begins: after what opens its turn."""
        if i not in self.starts:
            start = self._prefix(i, answer=True)
            self.starts[i] = self._place_of_content(i) if start is None else start
        return self.starts[i]

    def _prefix(self, n: int, answer: bool) -> int | None:
        """How long the text of the first n messages is, if it is what the whole text begins with."""
        if n == len(self.messages) and not answer:
            return len(self.whole.text)
        text = self._begun(n, answer)
        return len(text) if text is not None and self.whole.text.startswith(text) else None

    def _begun(self, n: int, answer: bool) -> str | None:
        """The text of the first n messages; None where the template refuses half a conversation."""
        try:
            return render(self.tokenizer, self.messages[:n], answer, self.beside)
        except UserError:
            return None

    def _place_of_content(self, i: int) -> int:
        """The same where the template opens a turn in another way than it writes one: with thoughts, say."""
        held = {*chain(self.whole.text, str(self.tokenizer.hf["chat_template"]))}
        mark = next(chr(c) for c in PRIVATE if chr(c) not in held)
        marked = [*self.messages]
        marked[i] = marked[i] | {"content": mark}
        text, found, _ = render(self.tokenizer, marked, False, self.beside).partition(mark)
        if not found or not self.whole.text.startswith(text):
            raise _refusal(f"where it begins message {i + 1} cannot be told")
        # Spaces before the content are the turn's, unless what opens a turn ends with them, too.
        opened = (self._begun(i, True) or "")[::-1]
        alike = lambda end: len(os.path.commonprefix([opened, text[:end][::-1]]))
        return max(range(len(text), len(text.rstrip()) - 1, -1), key=alike)


def of_transcripts(tokenizer: Tokenizer) -> str:
    """The chat template of HH-RLHF's transcripts: the layout in which this project's stages see
    conversations.

    It writes what SFT learns from: <bos>, the transcript, and <eot> after the last turn if it is the
    assistant's."""
    names = {i: json.dumps(name, ensure_ascii=False) for name, i in tokenizer.specials.items()}
    return f"""{{%- set headers = {json.dumps(ROLES)} -%}}
{{{{- {names[tokenizer.bos]} -}}}}
{{%- for message in messages -%}}
{{%- if message['role'] not in headers -%}}
{{{{- raise_exception('the roles are {", ".join(ROLES)}') -}}}}
{{%- elif loop.first and message['role'] == 'assistant' -%}}
{{{{- ' ' + message['content'] -}}}}
{{%- else -%}}
{{{{- headers[message['role']] + message['content'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- {json.dumps(TURN)} -}}}}
{{%- elif messages and messages[-1]['role'] == 'assistant' -%}}
{{{{- {names[tokenizer.eot]} -}}}}
{{%- endif -%}}"""


def _refusal(reason: str) -> UserError:
    return UserError(f"the model's chat template: {one_line(reason)}")
