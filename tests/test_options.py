"""Every option of every command, with every kind of bad value: one line and exit code 2, or the meaning of --help.

F15: values that passed parsing and then crashed, hung, or (--clip-range=-0.2, --max-grad-norm=-1) were taken.
H20: tracebacks for mistaken arguments, and for Ctrl-C before the loop.
"""

import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest

from minirlhf.measure import baselines
from minirlhf.support import cli

ROOT = Path(__file__).resolve().parents[1]
OF_CONFIGS = {
    name: importlib.import_module(name) for name in ("train_sft", "train_rm", "train_ppo", "minirlhf.tools.evaluate")
}
OF_PARSERS = [
    "minirlhf.tools.chat",
    "minirlhf.tools.estimate",
    "minirlhf.tools.report",
    "minirlhf.tools.inspect",
    "minirlhf.interop.command",
    "minirlhf.feedback.__main__",
    "kernels.tools.testing",
    "kernels.tools.audit",
]
REFUSED = object()
# Good values that a script refuses beside the defaults of others: sizes that must divide, names that must be known.
REFUSED_BESIDE = {"batch", "minibatch", "microbatch", "n_head", "n_embd", "reward"}
NUMBERS = ["0", "-1", "1", "0.5", "1e12", "1000000001", "-1000000001", "1e400", "9" * 30, "9" * 400, "9" * 5000, "1e-300"]
WORDS = ["nan", "inf", "-inf", "x", "", " ", "0x10", "1,5", "1e", "--x", "None", "true", "1\n2", "\x1b[31m", "\ud800", "é"]


@pytest.fixture(scope="module", autouse=True)
def no_baselines():
    """The report at the end of train_rm.py is not the subject, and takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "tfidf_ridge", lambda *args, **options: None)
        patch.setattr(baselines, "vader_lexicon", lambda *args: None)
        yield


def ends(main, capsys) -> tuple[int, list[str]]:
    """(exit code, lines of stderr) of a command."""
    capsys.readouterr()
    try:
        cli.run_script(main)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr().err.split("\n")[:-1]


def is_one_line(lines: list[str]) -> bool:
    return len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 400


# ----------------------------------------------------------------------------- options of a dataclass


def options_of(name: str) -> list[tuple[str, str, object]]:
    """(field, option, type) of each option of a script."""
    config = OF_CONFIGS[name].Config
    hints = typing.get_type_hints(config, include_extras=True)
    return [(f.name, "--" + f.name.replace("_", "-"), hints[f.name]) for f in dataclasses.fields(config)]


def presets_of(name: str) -> dict:
    module = OF_CONFIGS[name]
    return getattr(module, "PRESETS", None) or {"demo": module.Config()}


def wanted(kind: object, word: str) -> object:
    """What an option of this type is to make of a word, or REFUSED."""
    kinds = typing.get_args(kind)
    if type(None) in kinds:
        return None if word == "None" else wanted(next(k for k in kinds if k is not type(None)), word)
    if typing.get_origin(kind) is tuple:
        return wanted(kinds[0], word)
    if typing.get_origin(kind) is typing.Literal:
        return word if word in kinds else REFUSED
    if kind is bool or word == "" or word.startswith("--"):
        return REFUSED
    if typing.get_origin(kind) is not typing.Annotated:
        return word  # a path, a name
    try:
        value = kinds[0](word)
    except ValueError:
        return REFUSED
    return value if value in next(k for k in kinds if isinstance(k, cli.Range)) else REFUSED


@pytest.mark.parametrize("name", OF_CONFIGS)
def test_F15_every_value_is_refused_in_one_line_or_means_what_it_says(name, capsys, monkeypatch, tmp_path):
    """What an option makes of a word is told by its type alone, in both ways to write it."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    for i, word in enumerate([*NUMBERS, *WORDS]):
        taken = {}
        for field, option, kind in options_of(name):
            expected = wanted(kind, word)
            if expected is not REFUSED and field not in REFUSED_BESIDE:
                taken[field] = expected
                continue
            argv = [option, word, word][: 3 if field == "betas" else 2] if i % 2 else [f"{option}={word}"]
            code, lines, _ = parse(name, argv, capsys)
            if expected is REFUSED or code != 0:
                refused += 1
                assert code == 2 and is_one_line(lines), (argv, code, lines)
                assert re.match(f"error: ({option}|unknown option --x)", lines[0]), (argv, lines)
        argv = [part for field in taken for part in ("--" + field.replace("_", "-"), word, word)[: 3 if field == "betas" else 2]]
        code, lines, config = parse(name, argv, capsys)  # all at once: a parse takes a tenth of a second
        assert (code, lines) == (0, []), (argv, code, lines)
        for field, expected in taken.items():
            value = getattr(config, field)
            value = value[0] if isinstance(value, tuple) else value
            assert value == (Path(expected) if isinstance(value, Path) else expected), (field, word, value)
    assert refused > 200 and not any(tmp_path.iterdir())


def parse(name: str, argv: list[str], capsys) -> tuple[int, list[str], object]:
    """(exit code, lines of stderr, config) of a command line."""
    parsed, module = [None], OF_CONFIGS[name]
    code, lines = ends(lambda: parsed.append(cli.parse_config(presets_of(name), module.__doc__, argv)), capsys)
    return code, lines, parsed[-1]
