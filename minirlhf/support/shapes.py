"""Other people's rows to the columns that formats.py knows.

    conversations         ShareGPT's [{from, value}]: messages; beside chosen and rejected, their prompt
    instruction, input?   Alpaca's: the prompt, as the user's turn; `output` and what else answers it
                          (response, chosen, rejected ...) are the assistant's turns
    completions           UltraFeedback's [{response, overall_score}]: a rated row each
    messages with a rating or a label    the last turn is what was judged
    system                the first turn of a conversation that has no system turn

`--fields OURS=THEIRS` comes before all of these: the column THEIRS is then read as OURS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minirlhf import UserError
from minirlhf.support.formats import Row, Scale, check
from minirlhf.support.text import one_line

Columns = dict[str, Any]
Names = dict[str, str]  # ours -> theirs
PAIRED = ("chosen", "rejected", "votes", "response_a", "response_b")
RATED = ("rating", "ratings")
TALKS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "chosen", "rejected", "response_a", "response_b")
# What --fields may name, and which other columns then no longer tell what a row is.
OURS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt", "instruction", "input", "system", "scale", "genre", *PAIRED), ()),
    **dict.fromkeys(("answer", "choices", "reference", "tests"), ()),  # of reward functions
    **dict.fromkeys(("response", "completion", "output"), (*PAIRED, *TALKS, "completions")),
    **dict.fromkeys(RATED, PAIRED),
    "label": (*PAIRED, *RATED),
    "messages": (*PAIRED, *RATED, "conversations", "conversation"),
    "text": (*PAIRED, *TALKS, "completions", "completion", "response", "label", "instruction"),
}
JUDGED = (*RATED, "label", "votes")  # a row where such a column was named and is null was not judged
NOT_RATED = ("", "n/a", "na", "nan", "none", "null")  # as files write a rating that nobody gave
ROLE_OF = {"human": "user", "observation": "tool", "function_response": "tool"}
ROLE_OF |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant")


class Drop(Exception):
    """A row from which nothing can be learnt; the message is a key of the ledger."""


def names_of(fields: Sequence[str]) -> Names:
    """{ours: theirs} of the words of --fields.  Raises UserError for a word that is no OURS=THEIRS."""
    names: Names = {}
    for word in fields:
        ours, _, theirs = str(word).partition("=")
        shown = f"--fields {one_line(word, 40)}"
        check(theirs, f"{shown}: expected OURS=THEIRS, such as rating=helpfulness")
        check(ours in OURS, f"{shown}: {ours!r:.40} is no column of ours: {', '.join(OURS)}")
        check(ours not in names, f"{shown}: {ours} is {names.get(ours)} already: drop one of them")
        names[ours] = theirs
    return names


def columns_of(raw: Any, plain: bool) -> Columns:
    """The columns of a row as a file holds it: a line, an object, or what was wrong with it.

    `plain`: the line is one of a .txt file.
    """
    if isinstance(raw, UserError):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = {"text": raw.decode()} if plain else json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            form = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
            raise UserError(f"row: not {form}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"row: expected an object, got {raw!r:.40}")
    return raw


def renamed(columns: Columns, names: Names) -> Columns:
    """The columns that are not null, under our names.  Raises UserError for a name that is not there."""
    columns = dict(columns)
    _rename(columns, names, {})
    return {key: value for key, value in columns.items() if value is not None}


def rows_of(columns: Columns, names: Names, scale: Scale | None) -> list[Row | UserError | Drop]:
    """The rows that one row of a file becomes, or in a row's place what is wrong with it.

    It is one, or one for each of its rated completions.  `scale` is that of --rating-scale.
    """
    entries = columns.get("completions")
    other = columns.get("chosen") is not None or names.keys() & {"completion", "response", "output", "text"}
    if other or not isinstance(entries, list):
        return [_row(columns, names, {})]
    around = {key: value for key, value in columns.items() if key != "completions"}
    found = [_of_entry(around, entry, f"completions[{i}]", names, scale) for i, entry in enumerate(entries)]
    return found or [Drop("dropped: no response")]


def _of_entry(
    around: Columns, entry: Any, place: str, names: Names, scale: Scale | None
) -> Row | UserError | Drop:
    if not isinstance(entry, dict) or "response" not in entry:
        return UserError(f"{place}: expected {{response, overall_score}}, got {entry!r:.40}")
    if "rating" not in entry and not names.keys() & {*RATED}:
        names = names | {"rating": "overall_score"}
        around = around | ({} if scale else {"scale": [1, 10]})
    origin = {key: (f"{place}.{key}",) for key in entry} | {"scale": ()}
    return _row(around | entry, names, origin, ["each entry of `completions` is a row of its own"])


def _row(
    columns: Columns, names: Names, origin: dict[str, tuple[str, ...]], remarks: Sequence[str] = ()
) -> Row | UserError | Drop:
    """A row under our names; `origin` says what the file calls some of the columns."""
    columns, origin, hidden = dict(columns), dict(origin), {}
    try:
        if names:
            hidden = _rename(columns, names, origin)
        if any(columns[ours] is None for ours in names if ours in JUDGED):
            return Drop("dropped: not rated")
        _take_turns(columns, origin)
        if "instruction" in columns:
            _take_instruction(columns, origin)
        if "system" in columns:
            _take_system(columns, origin)
        if "messages" in columns:
            _split_judged(columns, origin)
    except UserError as error:
        return error
    return Row(columns, origin, hidden, remarks)


def _rename(columns: Columns, names: Names, origin: dict[str, tuple[str, ...]]) -> Columns:
    """Read THEIRS as OURS.  What comes back are the columns that the names push aside."""
    found = {ours: _find(columns, ours, theirs) for ours, theirs in names.items()}
    aside = {key: columns.pop(key) for ours in names for key in (ours, *OURS[ours]) if key in columns}
    made_of = {ours: origin.get(theirs, (theirs,)) for ours, theirs in names.items()}
    for theirs in names.values():
        for there in (columns, aside, origin):
            there.pop(theirs, None)
    columns |= found
    origin |= made_of
    return aside


def _find(columns: Columns, ours: str, theirs: str) -> Any:
    """The value of a column, or of a field inside one (annotations.honesty.Rating); None for null."""
    value: Any = columns
    for name in [theirs] if theirs in columns else theirs.split("."):
        if value is not None and not (isinstance(value, dict) and name in value):
            there = f"the columns are {sorted(columns)}"
            raise UserError(f"{theirs}: missing, which --fields reads as {ours}: {there:.200}")
        value = value and value[name]
    if ours not in RATED:
        return value
    if isinstance(value, str):
        value = None if value.strip().lower() in NOT_RATED else _number(value)
    return None if value != value else value  # nan


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _take_turns(columns: Columns, origin: dict[str, tuple[str, ...]]) -> None:
    """ShareGPT's turns to messages, wherever messages may stand."""
    for name in ("conversations", "conversation"):
        field = "messages" if columns.get("chosen") is None else "prompt"
        if columns.get(name) is not None and columns.get(field) is None:
            columns[field], origin[field] = columns.pop(name), origin.pop(name, (name,))
    for field in ("messages", "prompt", *ANSWERS):
        if field in columns:
            columns[field] = _messages(columns[field])


def _messages(value: Any) -> Any:
    """[{role, content}] of turns {from, value}, and of a single turn; everything else as it is."""
    if isinstance(value, dict) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys()):
        value = [value]
    if not isinstance(value, list):
        return value
    if not all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in value):
        return value
    rest = [{k: v for k, v in turn.items() if k not in ("from", "value")} for turn in value]
    roles = [ROLE_OF.get(str(turn["from"]), turn["from"]) for turn in value]
    turns = zip(roles, value, rest, strict=True)
    return [more | {"role": role, "content": turn["value"]} for role, turn, more in turns]


def _take_instruction(columns: Columns, origin: dict[str, tuple[str, ...]]) -> None:
    """Alpaca's rows to a conversation: instruction and input, a line each, are the user's turn."""
    if columns.get("instruction") is None or columns.get("prompt") is not None:
        return
    asked = [name for name in ("instruction", "input") if columns.get(name) not in (None, "")]
    texts = {name: columns.pop(name) for name in asked or ["instruction"]}
    for name, text in texts.items():
        check(isinstance(text, str), f"{name}: expected text, got {text!r:.40}")
    columns["prompt"] = [{"role": "user", "content": "\n".join(texts.values())}]
    origin["prompt"] = tuple(made for name in texts for made in origin.pop(name, (name,)))
    if columns.get("output") is not None and columns.get("completion") is None:
        columns["completion"], origin["completion"] = columns.pop("output"), origin.pop("output", ("output",))
    for field in ANSWERS:
        if isinstance(columns.get(field), str):
            columns[field] = [{"role": "assistant", "content": columns[field]}]


def _take_system(columns: Columns, origin: dict[str, tuple[str, ...]]) -> None:
    """A system prompt in a column of its own to the first turn of the conversation."""
    talks = [field for field in ("messages", "prompt") if isinstance(columns.get(field), list)]
    if not isinstance(columns.get("system"), str) or not columns["system"] or not talks:
        return
    turns = columns[talks[0]]
    if turns and isinstance(turns[0], dict) and turns[0].get("role") != "system":
        columns[talks[0]] = [{"role": "system", "content": columns.pop("system")}, *turns]
        made_of = (*origin.pop("system", ("system",)), *origin.get(talks[0], (talks[0],)))
        origin[talks[0]] = made_of


def _split_judged(columns: Columns, origin: dict[str, tuple[str, ...]]) -> None:
    """A conversation with a rating or a label: its last turn is what was judged."""
    there = {key for key, value in columns.items() if value is not None}
    turns = columns.get("messages")
    if not there & {*RATED, "label"} or there & {"prompt", "text", *ANSWERS} or not isinstance(turns, list):
        return
    last = turns[-1] if turns else None
    good = isinstance(last, dict) and last.get("role") == "assistant"
    check(good, "messages: the last turn, which was judged, must be the assistant's")
    del columns["messages"]
    columns |= {"prompt": turns[:-1] or "", "response": [last]}
    origin |= dict.fromkeys(("prompt", "response"), origin.pop("messages", ("messages",)))
