"""Command lines: ranges, mistakes in one line, exit codes (minirlhf/support/cli.py)."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Annotated

import pytest
import torch
import torch.distributed

from minirlhf import Stopped, UserError
from minirlhf.support import cli, elastic


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "demo"
    """Named settings."""
    lr: cli.Above0 = 0.1
    """Learning rate."""
    steps: cli.Count | None = 3
    """Steps."""
    betas: tuple[cli.ShareBelow1, cli.ShareBelow1] = (0.9, 0.99)
    """Adam's betas."""
    reward: tuple[str, ...] = ("rm",)
    """Rewards."""
    depth: Annotated[int, cli.Range(1, 12)] = 2
    """Depth."""
    out: Path = Path("out")
    """Folder."""
    stop: bool = True
    """Stop."""


PRESETS = {"demo": Config(), "small": Config(preset="small", lr=0.5, steps=None)}
parse = lambda *argv: cli.parse_config(PRESETS, "", list(argv))


def test_the_command_line_wins_over_the_preset():
    assert parse() == PRESETS["demo"] and parse("--preset=small") == PRESETS["small"]
    found = parse("--steps", "7", "--preset", "small", "--no-stop", "--betas", "0", "0.5", "--lr=1e-3")
    assert found == Config("small", 1e-3, 7, (0.0, 0.5), stop=False)
    assert parse("--steps", "None").steps is None
    assert parse("--reward", "a", "--lr", "1", "--reward", "b", "c").reward == ("a", "b", "c")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--lr 0", "--lr must be above 0 and at most 1e+09, not 0"),
        ("--lr nan", "--lr must be above 0 and at most 1e+09, not nan"),
        ("--lr inf", "--lr must be above 0 and at most 1e+09, not inf"),
        ("--lr -1", "--lr must be above 0 and at most 1e+09, not -1"),
        ("--steps 0", "--steps must be at least 1 and at most 1e+09, not 0"),
        ("--steps 99999999999", "--steps must be at least 1 and at most 1e+09, not 99999999999"),
        ("--betas 0.9 1", "--betas must be at least 0 and below 1, not 1"),
        ("--depth 13", "--depth must be at least 1 and at most 12, not 13"),
        ("--preset large", "--preset must be one of demo, small, not 'large'"),
        ("--stepz 3", "unknown option --stepz: did you mean --steps?"),
        ("--zzzz 3", "unknown option --zzzz: see --help"),
        ("loose", "unknown option loose: see --help"),
    ],
)
def test_a_bad_value_is_one_line(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    "argv", ["--lr x", "--lr", "--steps 1.5", "--steps 1e3", "--betas 0.9", "--stop 3", "--depth \x1b[31m"]
)
def test_what_cannot_be_read_is_one_line(argv):
    with pytest.raises(UserError) as error:
        parse(*argv.split(" "))
    message = str(error.value)
    assert (
        argv.split()[0 if argv != "--stop 3" else 1] in message
        and message.isprintable()
        and len(message) < 130
    )


def test_a_range_says_what_it_accepts():
    assert str(cli.Range()) == "a finite number" and str(cli.Range(low=2)) == "at least 2"
    for x in (math.nan, math.inf, -math.inf):
        assert x not in cli.Range()
    share = cli.Range(0, below=1)
    assert 0 in share and 0.999 in share and 1 not in share and -1e-9 not in share


def test_numbers_of_the_tools_have_ranges_too():
    parser = cli.Parser("tool")
    parser.add_argument("--port", type=cli.number(Annotated[int, cli.Range(1, 65_535)]), default=80)
    parser.add_argument("--share", type=cli.number(cli.Share))
    assert parser.parse_args(["--port", "8080", "--share", "0.5"]).port == 8080
    for argv, words in {
        "--port 0": "must be at least 1 and at most 65535, not 0",
        "--port 99999": "must be at least 1 and at most 65535, not 99999",
        "--port 1e3": "must be a whole number, not '1e3'",
        "--share nan": "must be at least 0 and at most 1, not nan",
        "--share x": "must be a number, not 'x'",
        "--por 3": "--por",
        "extra": "extra",
    }.items():
        with pytest.raises(UserError) as error:
            parser.parse_args(argv.split())
        assert words in str(error.value) and str(error.value).endswith("(--help lists every option)")


@pytest.mark.parametrize(
    "argv, names",
    [("--lr 3 --no-stop --out=x", {"lr", "stop", "out"}), ("a -b", set()), ("--n-layer 3", {"n_layer"})],
)
def test_given_are_the_options_on_the_command_line(argv, names):
    assert cli.given(argv.split()) == names


@pytest.mark.parametrize(
    "end, code, told",
    [
        (UserError("a.jsonl:3: text: missing"), 2, "error: a.jsonl:3: text: missing"),
        (Stopped("stopped at step 3 of 9", signal.SIGINT), 130, "stopped at step 3 of 9"),
        (Stopped("stopped at step 3 of 9", signal.SIGTERM), 143, "stopped at step 3 of 9"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["mistake", "Ctrl-C", "SIGTERM", "Ctrl-C at once"],
)
def test_exit_codes_tell_a_supervisor_what_happened(capsys, end, code, told):
    """2: change the command.  130 and 143: it can be resumed."""

    def main():
        raise end

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main)
    assert stop.value.code == code
    assert capsys.readouterr().out == "" and not cli.run_script(lambda: None)
    with pytest.raises(SystemExit):
        cli.run_script(main)
    assert capsys.readouterr().err.strip() == told


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda: 1 / 0)


@pytest.mark.parametrize("error, code", [(None, 0), (SystemExit(2), 2), (SystemExit(None), 0)], ids=str)
def test_a_rank_ends_without_taking_python_down(monkeypatch, error, code):
    """After what was registered for the end, such as a tracker's last words; a crash keeps its traceback."""
    done = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("parted"))
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: done.append("told"))
    monkeypatch.setattr("os._exit", lambda code: done.append(code))
    elastic.leave_group(error)
    assert done == ["parted", "told", code]
    done.clear()
    elastic.leave_group(ValueError())
    assert done == ["parted"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    elastic.leave_group(error)
    assert done == ["parted"]
