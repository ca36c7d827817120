"""Conversations in a model's own chat template, as the ids that transformers' `apply_chat_template` gives.

transformers fills in the template and then encodes the whole text at once, so that a space which the template
puts before a message joins its first word. So does `encode`, with one difference: special tokens come from
the template alone. A message that contains '<|im_end|>' does not end its turn; to the model it is plain
characters.

A template is code written by whoever made the model. It runs in jinja2's sandbox, and whatever it raises
becomes a UserError.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minirlhf import UserError
from minirlhf.support import added
from minirlhf.support.formats import ROLES, TURN
from minirlhf.support.text import one_line
from minirlhf.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]  # {role, content} each
Parts = list[tuple[str, bool]]  # (text, whether the template wrote it)

MARK = "\ue000{}\ue001"  # private use characters: they stand for a message while its template is filled in
LONGEST = 1_000_000  # characters that a template may add to its messages, and of a product inside it
BITS = 100_000  # of the largest power that a template may compute


def encode(tokenizer: Tokenizer, messages: Messages, answer: bool) -> list[int]:
    """Ids of a conversation; `answer`: followed by what opens the assistant's next turn.

    Raises UserError where the template fails or does not accept these messages."""
    specials = {
        name: i
        for name, i in tokenizer.specials.items()
        if name not in tokenizer.hf.get("unreached", ()) and not tokenizer.added.get(name)
    }
    text = render(tokenizer, messages, answer)
    parts: Parts = [(text, True)]
    lookalikes = specials.keys() - tokenizer.added.keys()
    if any(name in message["content"] for name in lookalikes for message in messages):
        parts = _tell_apart(text, tokenizer, messages, answer)

    pieces: list[str | int] = []
    for text, by_template in parts:
        for piece in added.cut([text], specials, tokenizer.flags) if by_template else [text]:
            if pieces and isinstance(piece, str) and isinstance(pieces[-1], str):
                pieces[-1] += piece  # no special token stands between the two: they are encoded together
            else:
                pieces.append(piece)
    if not pieces or pieces == [""]:
        raise _refusal("it writes nothing")
    encoded = ([piece] if isinstance(piece, int) else tokenizer.encode(piece) for piece in pieces)
    return [i for ids in encoded for i in ids]


def render(tokenizer: Tokenizer, messages: Messages, answer: bool) -> str:
    """The text of a conversation in the tokenizer's chat template."""
    names = {i: name for name, i in tokenizer.specials.items()}
    known = {"bos_token": names[tokenizer.bos], "eos_token": names[tokenizer.eot]} | tokenizer.hf
    known = {key: known[key] for key in ("bos_token", "eos_token", "pad_token") if known.get(key)}
    most = LONGEST + sum(len(message["content"]) for message in messages)
    found, length = [], 0
    source = tokenizer.hf["chat_template"]
    if not isinstance(source, str):
        raise _refusal("it is not a string")
    try:
        template = _compiled(source)
        for piece in template.generate(messages=list(messages), add_generation_prompt=answer, **known):
            found.append(piece)
            length += len(piece)
            if length > most:
                raise TemplateError(f"it writes more than {LONGEST:,} characters")
    except TemplateError as error:
        raise _refusal(str(error)) from None
    except Exception as error:  # foreign code may divide by zero, or call itself for ever
        raise _refusal(f"{type(error).__name__}: {error}") from None
    return "".join(found)


def _tell_apart(text: str, tokenizer: Tokenizer, messages: Messages, answer: bool) -> Parts:
    """The text of a conversation in parts: filling in the template again, with marks, tells which is
    which."""
    marked = [message | {"content": MARK.format(i)} for i, message in enumerate(messages)]
    pieces = re.split(MARK.format("([0-9]{1,9})"), render(tokenizer, marked, answer))
    if any(int(number) >= len(messages) for number in pieces[1::2]):
        raise _refusal("it contains the characters that stand for a message")
    parts: Parts = [(pieces[0], True)]
    at = len(pieces[0])
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        content = messages[int(number)]["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())  # templates do this
        content = next((form for form in forms if text.startswith(form + after, at)), content)
        parts += [(content, False), (after, True)]
        at += len(content) + len(after)
    if "".join(part for part, _ in parts) != text:
        raise _refusal("it changes a message that contains the name of a special token")
    return parts


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
    return UserError(f"the model's chat template: {one_line(reason)}: use --layout text or dialogue")


# ---------------------------------------------------------------- jinja2 as transformers sets it up


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also refuses products and powers that would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = [x for x in (left, right) if isinstance(x, int)]
        texts = [x for x in (left, right) if hasattr(x, "__len__")]
        if operator == "*" and texts and numbers and len(texts[0]) * numbers[0] > LONGEST:
            raise TemplateError(f"it repeats a text beyond {LONGEST:,} characters")
        bits = [abs(x).bit_length() for x in numbers]
        if len(bits) == 2 and (bits[0] * abs(right) if operator == "**" else sum(bits)) > BITS:
            raise TemplateError(f"it computes a number of more than {BITS:,} bits")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """{% generation %} and {% endgeneration %} around what the assistant says: some templates have them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return sandbox.from_string(source)


def _tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(reason: str) -> None:
    raise TemplateError(reason)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
