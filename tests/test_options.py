"""Every option of every command, with every kind of bad value: one line and exit code 2, or the meaning of --help.

F15: values that passed parsing and then crashed, hung, or (--clip-range=-0.2, --max-grad-norm=-1) were taken.
H20: tracebacks for mistaken arguments, and for Ctrl-C before the loop.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import pytest

from minirlhf.measure import baselines
from minirlhf.support import cli, ctrl_c

ROOT = Path(__file__).resolve().parents[1]
OF_CONFIGS = {
    name: importlib.import_module(name)
    for name in ("train_sft", "train_rm", "train_ppo", "train_dpo", "minirlhf.tools.evaluate")
}
OF_PARSERS = [
    "minirlhf.tools.chat",
    "minirlhf.tools.estimate",
    "minirlhf.tools.conformance.__main__",
    "minirlhf.tools.report.__main__",
    "minirlhf.tools.why",
    "minirlhf.tools.inspect",
    "minirlhf.interop.command",
    "minirlhf.feedback.__main__",
    "kernels.tools.testing",
    "kernels.tools.audit",
]
REFUSED = object()
# Good values that a script refuses beside the defaults of others: sizes that must divide, names that must be known.
REFUSED_BESIDE = {"batch", "minibatch", "microbatch", "n_head", "n_embd", "reward", "fields", "rating_scale"}
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
    assert refused > 100 and not any(tmp_path.iterdir())


def parse(name: str, argv: list[str], capsys) -> tuple[int, list[str], object]:
    """(exit code, lines of stderr, config) of a command line."""
    parsed, module = [None], OF_CONFIGS[name]
    code, lines = ends(
        lambda: parsed.append(cli.parse_config(presets_of(name), module.__doc__, argv)), capsys
    )
    return code, lines, parsed[-1]


def test_the_last_preset_counts(capsys):
    """Its settings, not those of the first with the other's name."""
    _, _, config = parse("train_sft", ["--preset", "smoke", "--preset", "pretrained"], capsys)
    assert config == OF_CONFIGS["train_sft"].PRESETS["pretrained"]


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
        "minirlhf.tools.report.__main__": 1,
        "minirlhf.interop.command": 0,
        "minirlhf.tools.conformance.__main__": 1,
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


# ----------------------------------------------------------------------------- what contradicts


CONTRADICTIONS = [
    ("train_sft", "--resume --overwrite", "--resume continues a run and --overwrite replaces it"),
    ("train_rm", "--resume --overwrite", "--resume continues a run and --overwrite replaces it"),
    ("train_ppo", "--resume --overwrite", "--resume continues a run and --overwrite replaces it"),
    ("train_sft", "--init {s}/sft --vocab 300", "--vocab has no effect with --init"),
    ("train_sft", "--init {s}/sft --n_head=4", "--n-head has no effect with --init"),
    ("train_sft", "--tokenizer gpt2 --vocab 300", "--vocab has no effect with --tokenizer"),
    ("train_sft", "--batch 30 --microbatch 7", "--batch 30 is not divisible by --microbatch 7"),
    ("train_sft", "--n-embd 64 --n-head 5", "--n-embd 64 is not divisible by --n-head 5"),
    ("train_rm", "--batch 30 --microbatch 7", "--batch 30 is not divisible by --microbatch 7"),
    ("train_rm", "--normalise none --reference {s}/sft", "--reference is read for --normalise"),
    (
        "train_rm",
        "--normalise none --normalise-samples 8",
        "--normalise-samples has no effect with --normalise none",
    ),
    ("train_rm", "--normalise none --temperature 2", "--temperature has no effect with --normalise none"),
    ("train_dpo", "--resume --overwrite", "--resume continues a run and --overwrite replaces it"),
    ("train_dpo", "--online --epochs 2", "--epochs has no effect with --online"),
    ("train_dpo", "--online --part a", "--part has no effect with --online"),
    ("train_dpo", "--online --pairs 3 --genres movies", "--genres has no effect with --online"),
    ("train_dpo", "--reward-model {s}/rm", "--reward-model has no effect without --online"),
    ("train_dpo", "--split train --iterations 3", "--split has no effect without --online"),
    ("train_dpo", "--missing-eos-penalty 2", "--missing-eos-penalty has no effect without --online"),
    ("train_dpo", "--label-smoothing 0.5", "--label-smoothing must be at least 0 and below 0.5"),
    ("train_ppo", "--no-stop", "add --missing-eos none"),
    ("train_ppo", "--no-stop --missing-eos replace", "add --missing-eos none"),
    ("train_ppo", "--no-stop --missing-eos none --fused-head on", "--fused-head on"),
    ("train_ppo", "--missing-eos none --missing-eos-penalty 2", "--missing-eos-penalty has no effect with"),
    ("train_ppo", "--kl-horizon 5", "--kl-horizon has no effect without --kl-target"),
    ("train_ppo", "--batch 10 --minibatch 4", "--batch 10 is not divisible by --minibatch 4"),
    ("train_ppo", "--minibatch 8 --microbatch 3", "--minibatch 8 is not divisible by --microbatch 3"),
    ("train_ppo", "--reward minirlhf.rewards:length --reward-model {s}/rm", "need --reward rm"),
    ("train_ppo", "--reward minirlhf.rewards:length --disagreement-coef 1", "need --reward rm"),
    ("train_ppo", "--reward minirlhf.rewards:length --value-init reward", "need --reward rm"),
    ("train_ppo", "--reward rm:1e10", "its weight must be at most 1e+09 in size"),
]


@pytest.mark.parametrize(
    ("script", "options", "said"), CONTRADICTIONS, ids=[f"{s} {o}" for s, o, _ in CONTRADICTIONS]
)
def test_options_that_contradict_are_refused_before_anything_runs(
    run, capsys, tmp_path, monkeypatch, script, options, said
):
    monkeypatch.chdir(tmp_path)
    words = options.format(s="runs").split()  # there is no such folder: nothing is read
    assert run(script, "--preset", "smoke", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and is_one_line(err.splitlines()) and said in err, err
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------- values at the edge of what is taken


SMALL = ["--preset", "smoke", "--precision", "fp32"]
SFT = [*SMALL, "--n-layer", 1, "--n-embd", 16, "--batch", 104, "--epochs", 1, "--samples", 0]  # 3 steps
RM = [*SMALL, "--batch", 156, "--epochs", 1, "--normalise-samples", 2]  # 2 steps
PPO = [*SMALL, "--iterations", 2, "--epochs", 1]
DPO = [*SMALL, "--pairs", 1, "--batch", 156]  # 2 steps
LONG = str(10**9)
EDGES = [
    (
        "train_sft",
        "--warmup 0 --weight-decay 0 --dropout 0 --final-epochs 0 --betas 0 0 --seed 0 --max-grad-norm 0",
    ),
    (
        "train_sft",
        f"--seed 4294967295 --batch {LONG} --patience {LONG} --warmup {LONG} --samples 1 --microbatch 1000",
    ),
    ("train_sft", "--context 2 --n-embd 1 --n-head 1 --vocab 258 --lr 1e-300 --adam-eps 1e9 --samples 2"),
    (
        "train_sft",
        "--dropout 0.999 --betas 0.999 0.9999 --weight-decay 1e-300 --final-epochs 1000 --train-layers 1",
    ),
    (
        "train_rm",
        "--warmup 0 --weight-decay 0 --dropout 0 --lowercase 0 --embedding-lr 0 --betas 0 0 --bidirectional 0",
    ),
    (
        "train_rm",
        "--lowercase 1 --response-tokens 1 --prompt-tokens 1 --temperature 1000 --seed 0 --max-grad-norm 0",
    ),
    (
        "train_rm",
        f"--temperature 0.001 --batch {LONG} --warmup {LONG} --max-grad-norm 1e-300 --bidirectional 1",
    ),
    (
        "train_rm",
        "--normalise none --loss both --head linear --pooling last --seed 4294967295 --train-layers 1",
    ),
    (
        "train_dpo",
        "--beta 1e-300 --warmup 0 --adam-eps 1e9 --max-grad-norm 0 --seed 0 --label-smoothing 0.499",
    ),
    (
        "train_dpo",
        f"--beta 1e3 --lr 1e-300 --warmup {LONG} --pairs 2 --batch {LONG} --microbatch {LONG}",
    ),
    ("train_dpo", "--loss ipo --beta 1e-3 --temperature 0.001 --train-layers 1 --max-grad-norm 1e-300"),
    ("train_dpo", "--loss ipo --temperature 1000 --fused-head on --gradient-checkpointing --seed 4294967295"),
    (
        "train_ppo",
        "--kl-coef 0 --ent-coef 0 --gamma 0 --lam 0 --seed 0 --missing-eos-penalty 0 --disagreement-coef 0",
    ),
    (
        "train_ppo",
        "--temperature 0.001 --kl-coef 1e6 --missing-eos-penalty -3 --response-tokens 1 --max-grad-norm 0",
    ),
    (
        "train_ppo",
        "--temperature 1000 --clip-range 1e9 --clip-range-value None --max-approxkl 1e-300 --batch 1 --minibatch 1",
    ),
    (
        "train_ppo",
        f"--kl-target 1e-300 --kl-horizon 1 --save-samples {LONG} --save-every {LONG} --whiten-rewards --epochs 3",
    ),
    (
        "train_ppo",
        "--reward rm:0 --reward rm:-1 --reward minirlhf.rewards:length:1e3 --scale none --max-approxkl None",
    ),
    (
        "train_ppo",
        "--no-stop --missing-eos none --value-init sft --clip-range 1e-300 --gamma 1 --lam 1 --microbatch 1",
    ),
]


@pytest.fixture(scope="module")
def home(run, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("options")
    assert run("train_sft", *SFT, "--out", home / "sft") == 0
    assert run("train_rm", *RM, "--init", home / "sft", "--out", home / "rm") == 0
    return home


@pytest.mark.parametrize(
    ("script", "options"), EDGES, ids=[f"{script} {options}" for script, options in EDGES]
)
def test_F15_values_at_the_edge_run(run, metrics, home, tmp_path, script, options):
    """0 where 0 is allowed, and the largest and smallest numbers: a whole run, with finite numbers."""
    inputs = {"train_sft": SFT, "train_rm": [*RM, "--init", home / "sft"]}
    inputs |= {"train_ppo": [*PPO, "--init", home / "sft", "--reward-model", home / "rm"]}
    inputs |= {"train_dpo": [*DPO, "--init", home / "sft"]}
    own = [word for word in inputs[script]]
    if "--normalise none" in options:
        own = own[: own.index("--normalise-samples")] + own[own.index("--normalise-samples") + 2 :]
    assert run(script, *own, *options.split(), "--out", tmp_path / "out") == 0
    lines = metrics(tmp_path / "out")
    assert lines and all(math.isfinite(value) for line in lines for value in line.values())


def test_0_kl_coef_is_no_penalty_and_0_dropout_none(run, metrics, home, tmp_path):
    """What --help says of 0, by what is logged."""
    options = [
        *PPO,
        "--init",
        home / "sft",
        "--reward-model",
        home / "rm",
        "--kl-coef",
        0,
        "--missing-eos",
        "none",
    ]
    assert run("train_ppo", *options, "--out", tmp_path / "ppo") == 0
    for line in metrics(tmp_path / "ppo"):
        assert line["objective/rlhf_reward"] == pytest.approx(line["objective/scores"], abs=1e-6)
    for name, microbatch in (("whole", 104), ("parts", 8)):  # with dropout, parts would draw other masks
        assert (
            run("train_sft", *SFT, "--dropout", 0, "--microbatch", microbatch, "--out", tmp_path / name) == 0
        )
    whole, parts = ([line["train/loss"] for line in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-5)


def test_no_memory_is_one_line(run, capsys, tmp_path):
    """120 GB for one matrix: refused by the machine, not by a range."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, before[1]))
    try:
        assert run("train_sft", *SFT, "--n-embd", 100_000, "--n-head", 1, "--out", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: out of memory (") and "--gradient-checkpointing" in told
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- Ctrl-C, and a reader that goes away


class Command:
    """A command in a process of its own, which is sent Ctrl-C once a line of its output holds some words."""

    def __init__(self, *words, python=()):
        self.process = subprocess.Popen(
            [sys.executable, *python, *map(str, words)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.lines = {"stdout": [], "stderr": []}
        self.readers = [threading.Thread(target=self.read, args=(name,), daemon=True) for name in self.lines]
        for reader in self.readers:
            reader.start()

    def read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self.lines[name].append(line)

    def interrupt(self, words: str, patience: float = 120) -> None:
        until = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < until:
            if any(words in line for lines in self.lines.values() for line in lines):
                self.process.send_signal(signal.SIGINT)
                return
            time.sleep(0.002)
        raise AssertionError(f"{words!r} was never printed: {self.lines}")

    def end(self) -> tuple[int, list[str]]:
        """(exit code, lines of stderr without the progress bar and the table of imports)."""
        try:
            code = self.process.wait(120)
        finally:
            self.process.kill()
        for reader in self.readers:
            reader.join(10)
        lines = [part for line in self.lines["stderr"] for part in re.split(r"[\r\n]", line) if part.strip()]
        return code, [line for line in lines if not re.search(r"^import time:|\| +\d|it/s|s/it|\d+%", line)]


def test_H20_ctrl_c_is_one_line_at_any_moment(home, tmp_path):
    """While torch is imported, in set-up, in the loop once and twice, in tools; each is a process of its own."""
    (tmp_path / "slow_rule.py").write_text(
        "import time\n"
        "def f(prompts, responses):\n"
        "    print('in the loop', flush=True)\n"
        "    time.sleep(1)\n"
        "    return [0.0] * len(prompts)\n"
    )
    ppo = ["train_ppo.py", *PPO, "--init", home / "sft", "--reward", "slow_rule:f", "--out"]
    table = ["-X", "importtime"]  # says on stderr what has been imported
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    started = {
        "import of a script": (
            Command("train_sft.py", *SFT, "--out", tmp_path / "a", python=table),
            [" torch._utils\n"],
        ),
        "import of a tool": (Command("minirlhf.data", "inspect", "toy", python=[*table, "-m"]), [" numpy\n"]),
        "import of kernels": (
            Command("kernels.testing", "kernels:gae", python=[*table, "-m"]),
            [" torch.version\n"],
        ),
        "set-up": (
            Command("train_sft.py", *SFT, "--vocab", 5000, "--out", tmp_path / "b"),
            ["400 rated rows"],
        ),
        "loop": (Command(*ppo, tmp_path / "c"), ["in the loop"]),
        "loop, twice": (Command(*ppo, tmp_path / "d"), ["in the loop", "stopping after this step"]),
    }
    for command, moments in started.values():
        for moment in moments:
            command.interrupt(moment)
    for name, (command, moments) in started.items():
        code, lines = command.end()
        if moments[0] == "in the loop":
            assert lines.pop(0) == "stopping after this step (again to stop at once)", (name, lines)
        assert code == 130 and len(lines) == 1, (name, code, lines)
        stopped = (
            "stopped at step 1 of 2; the same command with --resume goes on from"
            if name == "loop"
            else "interrupted"
        )
        assert lines[0].startswith(stopped), (name, lines)


def test_H20_ctrl_c_is_left_alone_in_programs_that_import_us():
    code = "import signal, minirlhf; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    ours = (
        ["python", "train_sft.py"],
        ["python", "-X", "importtime", "/a/train_ppo.py", "-m"],
        ["python", "-u", "-m", "minirlhf.chat"],
    )
    theirs = (
        ["python", "-c", "import minirlhf", "train_sft.py"],
        ["python", "mine.py", "-m", "minirlhf"],
        ["python"],
    )
    theirs += (
        ["python", "-m", "pytest", "train_sft.py"],
        ["python", "-m", "torch.distributed.run", "train_sft.py"],
    )
    assert all(map(ctrl_c._is_command, ours)) and not any(map(ctrl_c._is_command, theirs))


def test_nobody_reads_the_output(tmp_path):
    """`python -m minirlhf.data inspect toy | head -1` is no crash."""
    words = [sys.executable, "-m", "minirlhf.data", "inspect", "toy", "-n", "400"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(120) == 141


def test_a_message_is_one_line_whatever_it_names(capsys):
    def main():
        raise cli.UserError("a\nb\x1b[31m\ud800 é")

    assert ends(main, capsys) == (2, ["error: a b\\x1b[31m\\ud800 é"])


def test_other_errors_are_crashes(capsys):
    """They keep their traceback: a bug is no mistake of the user's."""
    for error in (RuntimeError("shapes"), FileNotFoundError(2, "gone"), KeyError("x")):
        with pytest.raises(type(error)), contextlib.suppress(SystemExit):
            cli.run_script(lambda error=error: (_ for _ in ()).throw(error))
    for error in (
        OSError(28, "No space left on device", "out/x"),
        PermissionError(13, "Permission denied", "out/x"),
    ):
        code, lines = ends(lambda error=error: (_ for _ in ()).throw(error), capsys)
        assert code == 2 and lines[0].startswith(f"error: out/x: {error.strerror}")
