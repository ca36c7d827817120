"""Chat templates run in jinja2's sandbox, set up as transformers sets it up, and within limits.

A template is code written by whoever made the model.  The sandbox keeps it from files and from Python's
insides; the limits keep it from running for ever and from filling the memory.  Whatever it raises becomes a
TemplateFailed of one line.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minirlhf.support.text import one_line

LONGEST = 1_000_000  # characters that a template may add to its messages, and of a text that it computes
LONGEST_SOURCE = 200_000  # characters of the template itself: compiling takes longer than running
BITS = 100_000  # of the largest number that a template may compute
STEPS, SECONDS = 300_000, 10.0  # rounds of loops, calls of macros and filters; processor time
Marks = tuple[str, str]  # what stands before and after a {% generation %} block


class TemplateFailed(Exception):
    """Why a template wrote nothing, in one line."""


@dataclass
class Filling:
    """The limits of one run of a template, and the marks that it leaves."""

    longest: int
    marks: Marks = ("", "")
    steps: int = 0
    weights: dict[int, tuple[int, Any]] = field(default_factory=dict)  # of lists, which are kept alive
    ends: float = field(default_factory=lambda: time.thread_time() + SECONDS)

    def step(self) -> str:
        self.steps += 1
        if self.steps > STEPS:
            raise TemplateError(f"it loops more than {STEPS:,} times")
        if time.thread_time() > self.ends:
            raise TemplateError(f"it computes for more than {SECONDS:.0f} seconds")
        return ""

    def bounded(self, x: Any) -> Any:
        """x, unless it is a text or a list beyond the limit."""
        if self.weight(x) > self.longest:
            raise TemplateError(f"it makes a text or a list longer than {LONGEST:,}")
        return x

    def weight(self, x: Any) -> int:
        """How long x is when it is written out: what is in a list twice counts twice.

        Sixty lists, each of which holds the one before twice, are small, and their text fills no memory."""
        if isinstance(x, str):
            return len(x)
        if not isinstance(x, list | tuple | dict):
            return 1
        if id(x) not in self.weights:
            parts = [*x, *x.values()] if isinstance(x, dict) else x
            self.weights[id(x)] = 1 + sum(map(self.weight, parts)), x
        return self.weights[id(x)][0]

    def refuse_wide(self, *arguments: Any) -> None:
        """UserError for the width of a text (center, indent, format) beyond the limit, before it is made."""
        if any(isinstance(x, int) and abs(x) > self.longest for x in arguments):
            raise TemplateError(f"it asks for a text longer than {LONGEST:,} characters")


FILLING: ContextVar[Filling] = ContextVar("the template that is filled in")


def render(source: str, variables: dict[str, Any], size: int, marks: Marks = ("", "")) -> str:
    """What the template writes; `size`: characters of its variables.  Raises TemplateFailed."""
    if len(source) > LONGEST_SOURCE:
        raise TemplateFailed(f"its source is longer than {LONGEST_SOURCE:,} characters")
    filling = Filling(LONGEST + size, marks)
    token = FILLING.set(filling)
    found, length = [], 0
    try:
        for piece in _compiled(source).generate(**variables):
            found.append(piece)
            length += len(piece)
            if length > filling.longest:
                raise TemplateError(f"it writes more than {LONGEST:,} characters")
    except TemplateError as error:
        raise TemplateFailed(one_line(str(error))) from None
    except Exception as error:  # foreign code may divide by zero, or call itself for ever
        raise TemplateFailed(one_line(f"{type(error).__name__}: {error}")) from None
    finally:
        FILLING.reset(token)
    return "".join(found)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with limits on loops, calls, filters and what they make."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return Limits().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        filling = FILLING.get()
        numbers = [x for x in (left, right) if isinstance(x, int)]
        texts = [x for x in (left, right) if hasattr(x, "__len__")]
        if operator == "*" and texts and numbers and len(texts[0]) * numbers[0] > filling.longest:
            raise TemplateError(f"it repeats a text beyond {LONGEST:,} characters")
        bits = [abs(x).bit_length() for x in numbers]
        if len(bits) == 2 and (bits[0] * abs(right) if operator == "**" else sum(bits)) > BITS:
            raise TemplateError(f"it computes a number of more than {BITS:,} bits")
        if operator == "%" and isinstance(left, str) and re.search(r"\*|\d{6}", left):
            raise TemplateError("it formats a text with a width that is not allowed")
        return filling.bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        filling = FILLING.get()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        if isinstance(text := getattr(method, "__self__", None), str):
            filling.refuse_wide(*args, *kwargs.values())
            if method.__name__ in ("format", "format_map") and re.search(r"\d{6}|\{[^}]*\{", text):
                raise TemplateError("it formats a text with a width that is not allowed")
        return filling.bounded(super().call(__context, __obj, *args, **kwargs))

    def step(self) -> str:
        return FILLING.get().step()

    def opening(self) -> str:
        return FILLING.get().marks[0]

    def closing(self) -> str:
        return FILLING.get().marks[1]

    def made(self, x: Any) -> Any:
        return x  # call() has limited it

    def joined(self, *parts: Any) -> str:
        return "".join(map(str, parts))


class Limits(NodeTransformer):
    """Counts rounds of loops and calls of macros, and limits what `~`, brackets and {% set %} make."""

    def _counted(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_method("step"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _method("joined", *node.nodes).set_lineno(node.lineno)

    def _limited(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the names in {% for key, value in ... %}
            return node
        return _method("made", node).set_lineno(node.lineno)

    visit_List = visit_Tuple = visit_Dict = _limited

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "bounded", [], [], None, None, lineno=node.lineno)
        return node.set_environment(node.environment)


def _method(name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of the Sandbox."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class Generation(Extension):
    """{% generation %} and {% endgeneration %} around what the assistant says: some templates have them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
        mark = lambda name: nodes.Output([_method(name)], lineno=line)
        return [mark("opening"), body, mark("closing")]


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.filters = {name: _limited(function, counted=True) for name, function in sandbox.filters.items()}
    # Ours stands around the template's expressions, which did not call it.
    sandbox.filters["bounded"] = _limited(lambda x: x, counted=False)
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": PlainNamespace}
    del sandbox.globals["lipsum"]
    return sandbox.from_string(source)


def _limited(function: Callable, counted: bool) -> Callable:
    """A filter with limits on the widths it is given and on what it makes; `map` calls one for each item."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        filling = FILLING.get()
        if counted:
            filling.step()
        filling.refuse_wide(*args[1:], *kwargs.values())
        return filling.bounded(function(*args, **kwargs))

    return limited


class PlainNamespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __repr__(self) -> str:
        return "<Namespace>"  # what is in it may change, and would have to be limited again

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise TemplateError(f"{name}: no name of a namespace begins with an underscore")
        super().__setitem__(name, value)


def _tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(reason: str) -> None:
    raise TemplateError(reason)


def _now(form: str) -> str:
    """The time, or that of the variable SOURCE_DATE_EPOCH, with which a resumed run reads the same date."""
    with contextlib.suppress(KeyError, ValueError, OverflowError, OSError):
        moment = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.UTC)
        return moment.strftime(form)
    return datetime.datetime.now().strftime(form)
