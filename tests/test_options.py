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
    name: importlib.import_module(name)
    for name in ("train_sft", "train_rm", "train_ppo", "minirlhf.tools.evaluate")
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
NUMBERS = [
    "0",
    "-1",
    "1",
    "0.5",
    "1e12",
    "1000000001",
    "-1000000001",
    "1e400",
    "9" * 30,
    "9" * 400,
    "9" * 5000,
    "1e-300",
]
WORDS = [
    "nan",
    "inf",
    "-inf",
    "x",
    "",
    " ",
    "0x10",
    "1,5",
    "1e",
    "--x",
    "None",
    "true",
    "1\n2",
    "\x1b[31m",
    "\ud800",
    "é",
]

BAD = [
    "nan",
    "inf",
    "-inf",
    "x",
    "0x10",
    "1,5",
    "-1000000001",
    "1e400",
    "9" * 30,
    "9" * 400,
    "9" * 5000,
    "1\n2",
    "\x1b[31m",
]


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
        argv = [
            part
            for field in taken
            for part in ("--" + field.replace("_", "-"), word, word)[: 3 if field == "betas" else 2]
        ]
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
    code, lines = ends(
        lambda: parsed.append(cli.parse_config(presets_of(name), module.__doc__, argv)), capsys
    )
    return code, lines, parsed[-1]


def test_the_last_preset_counts(capsys):
    """Its settings, not those of the first with the other's name."""
    _, _, config = parse("train_sft", ["--preset", "smoke", "--preset", "gpt2"], capsys)
    assert config == OF_CONFIGS["train_sft"].PRESETS["gpt2"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr"],
        ["--betas", "0.9"],
        ["--betas", "0.9", "0.9", "0.9"],
        ["--reward"],
        ["--genres"],
        ["x"],
        ["--lr", "1", "2"],
        ["--lrr=1"],
    ],
    ids=str,
)
def test_too_few_or_too_many_words(argv, capsys):
    name = "train_ppo" if argv[0] == "--reward" else "train_sft"
    code, lines, _ = parse(name, argv, capsys)
    assert code == 2 and is_one_line(lines) and argv[0].partition("=")[0] in lines[0]


# ----------------------------------------------------------------------------- options of argparse


class Found(Exception):
    """The parser of a command, which parses nothing."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(module) -> the parser that its main() makes."""

    def call(name: str) -> argparse.ArgumentParser:
        def stop(parser, *args, **options):
            raise Found(parser)

        with monkeypatch.context() as patch, pytest.raises(Found) as found:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            importlib.import_module(name).main()
        return found.value.args[0]

    return call


def actions(
    parser: argparse.ArgumentParser, before: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], argparse.Action]]:
    """((names of the commands before it), option) of each option that takes a value, in all subcommands."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += actions(inner, (*before, name))
        elif action.option_strings and action.nargs != 0:
            found.append((before, action))
    return found


def needed(parser: argparse.ArgumentParser, commands: tuple[str, ...]) -> list[str]:
    """Words for everything that a command requires."""
    words = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            name, *rest = commands
            return [*words, name, *needed(action.choices[name], tuple(rest))]
        if not action.option_strings and action.nargs not in ("*", "?"):
            words.append(next(iter(action.choices)) if action.choices else "x")
        elif action.required:
            words += [action.option_strings[0], "x"]
    return words


@pytest.mark.parametrize("name", OF_PARSERS)
def test_F15_tools_refuse_in_one_line_what_is_no_number(name, parser_of, capsys, monkeypatch, tmp_path):
    """Nothing is read or written before: the command is run as a user runs it, on files that do not exist."""
    monkeypatch.chdir(tmp_path)
    module, parser, numbers = importlib.import_module(name), parser_of(name), 0
    for commands, action in actions(parser):
        option, of_number = action.option_strings[-1], action.type not in (None, str, Path)
        numbers += of_number
        for i, word in enumerate(["", *NUMBERS, *BAD] if of_number else [""]):
            if word and word not in BAD and takes(action.type, word):
                continue
            apart = i % 2 or not option.startswith("--")
            argv = [*needed(parser, commands), *([option, word] if apart else [f"{option}={word}"])]
            monkeypatch.setattr(sys, "argv", [name, *argv])
            code, lines = ends(lambda: sys.exit(module.main()), capsys)
            assert code == 2 and is_one_line(lines) and option in lines[0], (argv, code, lines)
    assert not any(tmp_path.iterdir())
    assert numbers >= {
        "minirlhf.tools.report": 0,
        "minirlhf.interop.command": 0,
        "kernels.tools.audit": 0,
    }.get(name, 2)


def takes(kind, word: str) -> bool:
    try:
        kind(word)
    except argparse.ArgumentTypeError:
        return False
    return True


@pytest.mark.parametrize("name", OF_PARSERS)
def test_every_number_of_a_tool_has_a_range(name, parser_of):
    assert not [
        action.option_strings for _, action in actions(parser_of(name)) if action.type in (int, float)
    ]
