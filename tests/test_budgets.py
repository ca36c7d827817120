"""How much there is to read.  `pytest tests/test_budgets.py -s` prints the table.

A budget is met by moving or deleting code, never by denser lines: that is why the shape of lines is counted too.
"""

import ast
import dataclasses
import importlib
import inspect
import typing
from pathlib import Path

import pytest

from minirlhf.support import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / f"train_{stage}.py" for stage in ("sft", "rm", "ppo", "dpo")]
PATH = [*SCRIPTS, *sorted((ROOT / "minirlhf").glob("*.py"))]
PRODUCT = [*SCRIPTS, *(f for room in ("minirlhf", "kernels") for f in sorted((ROOT / room).rglob("*.py")))]
WITH_CONFIG = ["train_sft", "train_rm", "train_ppo", "train_dpo", "minirlhf.tools.evaluate"]
DEEPER = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def main_loop(file: Path) -> ast.For:
    """The longest `for` of main() that is in no other `for`: the loop over iterations."""
    main = next(n for n in ast.parse(file.read_text()).body if getattr(n, "name", "") == "main")
    loops, todo = [], [*main.body]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.For):
            loops.append(node)
        elif not isinstance(node, ast.FunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return max(loops, key=lambda loop: loop.end_lineno - loop.lineno)


def depth(statement: ast.stmt) -> int:
    """Levels of nesting that a statement opens, itself included; an `elif` is no level deeper than its `if`."""
    if not isinstance(statement, DEEPER):
        return 0
    inner = [0]
    for name in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(statement, name, []):
            if isinstance(child, ast.ExceptHandler):
                inner += [depth(s) for s in child.body]
            elif name == "orelse" and isinstance(statement, ast.If) and isinstance(child, ast.If):
                inner.append(depth(child) - 1)
            else:
                inner.append(depth(child))
    return 1 + max(inner)


def numbers() -> dict[str, tuple[float, float]]:
    """{what is counted: (how much there is, budget)}."""
    loop = main_loop(ROOT / "train_ppo.py")
    text = {file: file.read_text() for file in PRODUCT}
    return {
        "lines of the reading path": (sum(map(lines, PATH)), 3300),
        "lines of its longest file": (max(map(lines, PATH)), 400),
        "lines of train_ppo.py": (lines(ROOT / "train_ppo.py"), 350),
        "lines of its loop": (loop.end_lineno - loop.lineno + 1, 110),
        "levels of its loop": (depth(loop), 4),
        "lines of the kernels' op files": (sum(map(lines, (ROOT / "kernels").glob("*.py"))), 1400),
        "longest line of product code": (max(len(s) for t in text.values() for s in t.splitlines()), 110),
        "`# fmt: skip` in product code": (sum(t.count("# fmt: skip") for t in text.values()), 10),
        "lines of README.md": (lines(ROOT / "README.md"), 200),
        "bytes of README.md": ((ROOT / "README.md").stat().st_size, 14 * 1024),
    }


NUMBERS = numbers()


def test_print_the_table():
    for file in PATH:
        print(f"{lines(file):7,}  {file.relative_to(ROOT)}")
    print("\n    count   budget")
    for what, (count, budget) in NUMBERS.items():
        print(f"{count:9,}{budget:9,}  {what}{'  OVER' if count > budget else ''}")
    assert len(PATH) >= 15


@pytest.mark.parametrize("what", NUMBERS)
def test_budget(what):
    count, budget = NUMBERS[what]
    assert count <= budget


def test_loops_and_levels_are_counted():
    code = "for a in b:\n  if a:\n    c()\n  elif d:\n    with e:\n      f()\n  else:\n    g()\n"
    assert depth(ast.parse(code).body[0]) == 3
    assert depth(ast.parse("for a in b:\n  c()").body[0]) == 1
    assert depth(ast.parse("a = 1").body[0]) == 0
    assert main_loop(ROOT / "train_ppo.py").end_lineno > 200


def kinds(hint) -> set:
    """The plain types in an option's type: {int, NoneType} of Annotated[int, Range] | None."""
    inner = typing.get_args(hint)
    if not inner or typing.get_origin(hint) is typing.Literal:
        return {hint}
    inner = inner[:1] if typing.get_origin(hint) is typing.Annotated else inner
    return set().union(*map(kinds, inner))


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_number_has_a_range(name):
    """0, negatives, nan and infinity are refused by an option's type, in one place (support/cli.py)."""
    config = importlib.import_module(name).Config
    hints = typing.get_type_hints(config, include_extras=True)
    of_numbers = [f.name for f in dataclasses.fields(config) if kinds(hints[f.name]) & {int, float}]
    assert len(of_numbers) >= 3
    assert [field for field in of_numbers if cli._range_of(hints[field]) is None] == []


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_option_has_a_help_text_that_is_a_sentence(name):
    """The string under each field, its own and inherited: it begins with a capital and ends with a full stop."""
    texts = {}
    for kind in importlib.import_module(name).Config.__mro__[:-1]:
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, after in zip(body, [*body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = after.value.value if isinstance(after, ast.Expr) else ""
                texts.setdefault(field.target.id, said.strip())
    assert {f.name for f in dataclasses.fields(importlib.import_module(name).Config)} == set(texts)
    assert [field for field, text in texts.items() if not (text[:1].isupper() and text.endswith("."))] == []
