"""How conversations become token ids: by the chat template that a model brings, or as HH-RLHF's transcripts.

The layout belongs to a checkpoint: config.json records it, and its tokenizer has it.  Only texts that were
given as messages are laid out.  A plain string stays as it is, as a prompt and as a text to learn; after a
conversation it is what the assistant answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from minirlhf import UserError
from minirlhf.support.conversation import ROLES, Conversation, Message, transcript, transcript_turns
from minirlhf.support.spans import encode_with_spans

Learn = Literal["auto", "all", "last"]
TRANSCRIPT, TEMPLATE = "transcript", "template"
RECORDED = {"hh-rlhf": TRANSCRIPT, TRANSCRIPT: TRANSCRIPT, TEMPLATE: TEMPLATE}  # the first: before templates


@dataclass
class Layout:
    """How a tokenizer lays conversations out, and the prompts that it has laid out, by their ids."""

    name: str = TRANSCRIPT
    prompts: dict[tuple[int, ...], Conversation] = field(default_factory=dict)


def layout_of(tok: Any) -> Layout:
    return getattr(tok, "layout", None) or Layout()


def recorded(about: dict, path: Any) -> str:
    """The layout that a checkpoint's config.json records.  Raises UserError for one that is not known."""
    name = about.get("layout", TRANSCRIPT)
    if not isinstance(name, str) or name not in RECORDED:
        raise UserError(f"{path}: conversations were laid out as {name!r:.40}, which is not known here")
    return RECORDED[name]


def set_layout(tok: Any, name: str) -> None:
    """Lay conversations out so; "auto" changes nothing.  UserError for a template that is not there."""
    if name == TEMPLATE and "chat_template" not in getattr(tok, "hf", {}):
        raise UserError("--layout template: the checkpoint brings no chat template: use --layout transcript")
    if name != "auto":
        tok.layout.name = name


def shown_prompt(tok: Any, ids: list[int]) -> str:
    """A prompt as people and reward functions read it: of a conversation its transcript."""
    layout = layout_of(tok)
    known = layout.prompts.get(tuple(ids)) if layout.name == TEMPLATE else None
    return tok.decode(ids) if known is None else known


def check_alike(source: Any, abouts: dict[str, dict]) -> None:
    """UserError where the data hold conversations, and checkpoints (config.json by name) of one tokenizer lay
    them out differently: then one would read what the other has never seen."""
    names = {name: (about.get("tokenizer"), recorded(about, name)) for name, about in abouts.items()}
    for name, (tokenizer, layout) in names.items():
        for other, (other_tokenizer, other_layout) in names.items():
            if tokenizer == other_tokenizer and layout != other_layout and has_conversations(source.records):
                raise UserError(
                    f"{name} lays conversations out by {_words(layout)}, {other} by {_words(other_layout)}: "
                    f"train both with the same --layout of train_sft.py"
                )


def _words(layout: str) -> str:
    return "its chat template" if layout == TEMPLATE else "transcripts"


def has_conversations(records: Iterable[Any]) -> bool:
    return any(isinstance(text, Conversation) for r in records for text in (r.prompt, *r.texts))


def plain_prompts(source: Any, path: Any, about: dict) -> str | None:
    """A remark where all prompts are plain texts, and the checkpoint (config.json: about) has a template."""
    if recorded(about, path) != TEMPLATE or has_conversations(source.records):
        return None
    if not any(record.prompt for record in source.records):
        return None
    return (
        f"note: the prompts are plain texts, which the chat template of {path} leaves as they are: "
        "messages would be laid out, and --instruction-field prompt makes each prompt a user's turn"
    )


@contextmanager
def of_row(where: str) -> Iterator[None]:
    """Errors inside name the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


# ---------------------------------------------------------------- what is learnt


def teaches(tok: Any, prompt: str, text: str, learn: Learn = "last") -> bool:
    """Whether SFT can learn anything after this prompt."""
    if not isinstance(text, Conversation):
        return bool(text.strip())
    said = [m for m in _learnt(tok, prompt, learn) if _says(m)]
    return bool(text.strip() or said)


def learns_all(tok: Any, prompt: str, learn: Learn) -> bool:
    """Whether the assistant's turns in this prompt are learnt, too."""
    everything = learn == "all" or learn == "auto" and layout_of(tok).name == TEMPLATE
    return everything and isinstance(prompt, Conversation) and prompt.learnt


def _learnt(tok: Any, prompt: str, learn: Learn) -> list[Message]:
    return [m for m in prompt.messages if is_learnt(m)] if learns_all(tok, prompt, learn) else []


def is_learnt(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _says(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


# ---------------------------------------------------------------- ids


@dataclass(frozen=True)
class LaidOut:
    """A text after its prompt, in token ids."""

    ids: list[int]
    n_prompt: int  # how many of them are the prompt
    learnt: list[bool]  # True = SFT learns this token


def by_template(tok: Any, prompt: str, text: str = "") -> bool:
    """Whether these texts are a conversation for the tokenizer's chat template."""
    there = isinstance(prompt, Conversation) or not prompt and isinstance(text, Conversation)
    return there and layout_of(tok).name == TEMPLATE


def prompt_ids(tok: Any, prompt: str) -> list[int]:
    """The ids that a model reads before it answers: what opens the text, and the prompt.

    Raises UserError for messages for which the layout has no place.
    """
    if by_template(tok, prompt):
        return _template().encode(tok, prompt.messages, True, prompt.beside)
    _refuse_in_transcripts(prompt)
    return [tok.bos, *tok.encode(prompt)]


def first_prompts(tok: Any, records: Sequence[Any], n: int, room: int) -> list[list[int]]:
    """n prompts to show what a model has learnt: <bos>, or where a template lays them out, conversations."""
    prompts = [record.prompt for record in records if record.prompt and by_template(tok, record.prompt)]
    fitting = (ids for prompt in prompts if len(ids := prompt_ids(tok, prompt)) <= room)
    return [*islice(fitting, n)] or [[tok.bos]] * n


def lay_out(tok: Any, prompt: str, text: str, learn: Learn = "last", eos: bool = True) -> LaidOut:
    """A prompt and a text in the ids that models train on and judge, and which of them SFT learns [D19].

    By a template these are the template's own, up to the end of the assistant's last turn.  Otherwise they
    are `<bos> prompt text <eot>`, where prompt and text are encoded apart, so that the prompt's ids are a
    prefix.  Raises UserError for messages for which the layout has no place.
    """
    if by_template(tok, prompt, text):
        return _by_template(tok, prompt, text, learn)
    _refuse_in_transcripts(prompt, text)
    body = [*tok.encode(text), *[tok.eot] * eos]
    if not learns_all(tok, prompt, learn):
        head = [tok.bos, *tok.encode(prompt)]
        return LaidOut(head + body, len(head), [False] * len(head) + [True] * len(body))
    turns = zip(prompt.messages, transcript_turns(prompt.messages), strict=True)
    spans = [span for message, span in turns if is_learnt(message)]
    ids, places = encode_with_spans(tok, [(prompt, None)], spans)
    learnt = [False] * (1 + len(ids)) + [bool(text.strip())] * len(body)
    for i in (i for found in places for i in found):
        learnt[1 + i] = True
    return LaidOut([tok.bos, *ids, *body], 1 + len(ids), learnt)


def _by_template(tok: Any, prompt: str, text: str, learn: Learn) -> LaidOut:
    """Prompt and text by the template; ids end with the last turn."""
    if not prompt:  # a whole conversation: what stands before its last answer is the prompt
        prompt, text = answered(text)
    before = len(prompt.messages)
    messages = [*prompt.messages, *answer_messages(text)]
    after = [i for i in range(before, len(messages)) if messages[i]["role"] == "assistant"]
    learnt = {i for i in after if is_learnt(messages[i])}
    if learns_all(tok, prompt, learn):
        learnt |= {i for i in range(before) if is_learnt(messages[i])}
    ids, said = _template().encode_turns(tok, messages, [*learnt, *after], prompt.beside)
    opened = _template().encode(tok, prompt.messages, True, prompt.beside) if before else []
    n_prompt = len(opened)
    if ids[:n_prompt] != opened:  # the text's first characters joined the prompt's last token, say
        n_prompt = next((i for i, number in enumerate(said) if number >= before), len(ids))
    last = max((i for i, number in enumerate(said) if number >= before), default=len(ids) - 1)
    end = next((i for i in range(last, len(ids)) if ids[i] in tok.ends), last)
    return LaidOut(ids[: end + 1], n_prompt, [number in learnt for number in said[: end + 1]])


def answered(text: Conversation) -> tuple[Conversation, Conversation]:
    """A whole conversation as (what stands before its last answer, the answer)."""
    answers = [i for i, message in enumerate(text.messages) if message["role"] == "assistant"]
    return text.parted(answers[-1] if answers else len(text.messages), learnt=True)


def answer_messages(text: str) -> list[Message]:
    """The messages that follow a prompt: a plain text is what the assistant says."""
    if isinstance(text, Conversation):
        return list(text.messages)
    return [{"role": "assistant", "content": text.removeprefix(" ")}]


def without_oldest_turn(prompt: Conversation) -> Conversation | None:
    """A prompt without its first question and what was answered; None where only one question is left.

    The system message stays.
    """
    questions = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    messages = [*prompt.messages[: questions[0]], *prompt.messages[questions[1] :]]
    return Conversation(transcript(messages, answer=True), messages, prompt.beside, prompt.learnt)


def _refuse_in_transcripts(*texts: str) -> None:
    for message in (m for text in texts if isinstance(text, Conversation) for m in text.messages):
        what = "tool calls" if message.get("tool_calls") else f"the role {message['role']}"
        if message["role"] not in ROLES or message.get("tool_calls"):
            remedy = "use a checkpoint that has a chat template, or drop the row"
            raise UserError(f"a transcript has no place for {what}: {remedy}")


def _template() -> Any:
    return importlib.import_module("minirlhf.interop.chat_template")
