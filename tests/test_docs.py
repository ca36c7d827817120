"""Every command, link, option and number in README.md, docs/ and the scripts' docstrings: does it exist, and does it run?

Commands are collected from fenced blocks, from inline code and from launch lines in docstrings.  All are parsed by the script's
own parser, without running it.  Those of README.md and docs/troubleshooting.md are run as they stand, in a folder where
runs/demo is a small run.
"""

import argparse
import ast
import dataclasses
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from benchmarks import demo
from minirlhf import UserError
from minirlhf.support import cli, shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["train_sft.py", "train_rm.py", "train_ppo.py", "train_dpo.py"]
MODULES = [
    *(ROOT / name for name in SCRIPTS),
    *(f for room in ("minirlhf", "kernels", "benchmarks") for f in sorted((ROOT / room).rglob("*.py"))),
]
PROGRAMS = ("python", "make", "torchrun", "pytest", "pip")


# ------------------------------------------------------------------------------------------------ collecting


def split_commands(line: str) -> list[list[str]]:
    """`a --x 1 | b && c  # why` -> [[a, --x, 1], [b], [c]], only commands of PROGRAMS, without redirections and '...'."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a sentence: no command
        return []
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";"):
            commands.append([])
        elif word not in ("...", "…"):
            commands[-1].append(word)
    found = []
    for command in commands:
        while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):  # OMP_NUM_THREADS=1 python ...
            command = command[1:]
        if command and command[0].rpartition("/")[2] in PROGRAMS:
            found.append([command[0].rpartition("/")[2], *command[1:]])
    return found


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """[(language, text)] of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def commands_of_page(page: Path) -> list[list[str]]:
    text = page.read_text()
    blocks = "\n".join(block for language, block in fenced_blocks(text) if language in ("", "sh", "bash"))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [command for line in lines for command in split_commands(line)]


def launch_lines(module: Path) -> list[list[str]]:
    """Commands in the docstring of a module: its indented lines, without what explains them and without [--optional words]."""
    found = []
    for line in (ast.get_docstring(ast.parse(module.read_text()), clean=False) or "").splitlines():
        if line.startswith("    "):
            command = re.split(r"\s{2,}", line.strip())[0]
            found += split_commands(re.sub(r" \[[^]]*\]", "", command))
    return found


def in_text(sources: list[Path], collect) -> list:
    """Parameters (where, command) without repetition; a command's own words are its test's name."""
    found = {}
    for source in sources:
        for command in collect(source):
            found.setdefault((source.name, " ".join(command)), (source, command))
    return [pytest.param(*value, id=f"{name}: {text}"[:150]) for (name, text), value in found.items()]


def test_commands_are_found():
    """Against a collector that finds nothing, which would let everything pass."""
    assert split_commands(
        "OMP_NUM_THREADS=1 .venv/bin/python a.py --x 1 | make b && git c  # python d.py"
    ) == [
        ["python", "a.py", "--x", "1"],
        ["make", "b"],
    ]
    everything = [" ".join(c) for page in PAGES for c in commands_of_page(page)]
    assert len(everything) > 60
    assert {"make demo", "make test", "python train_ppo.py"} <= set(everything)
    assert ["python", "train_ppo.py"] in launch_lines(ROOT / "train_ppo.py")
    assert launch_lines(ROOT / "train_ppo.py")[-1][:3] == ["torchrun", "--nproc-per-node", "8"]


# ------------------------------------------------------------------------------------------------ parsing


class Parsed(BaseException):
    """The command line was accepted.  Raised in place of going on; no handler of a script's catches it."""


def parse(target: str, argv: list[str], patch: pytest.MonkeyPatch) -> None:
    """Raise what the script `target` (a file, or a module) says to its command line; nothing if that is accepted."""
    parse_args, parse_config = argparse.ArgumentParser.parse_args, cli.parse_config

    def then_stop(function):
        def call(*args, **kwargs):
            raise Parsed(function(*args, **kwargs))

        return call

    patch.setattr(argparse.ArgumentParser, "parse_args", then_stop(parse_args))
    patch.setattr(cli, "parse_config", then_stop(parse_config))
    patch.setattr(sys, "argv", [target, *argv])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module was imported before
        try:
            if target.endswith(".py"):
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        except Parsed:
            return
    raise AssertionError(f"{target} read no command line")


def script_of(command: list[str]) -> tuple[str, list[str]]:
    """(script or module, its arguments) of `python [-m] X ...` or `torchrun --option value X ...`."""
    words = command[1:]
    if command[0] == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def check(command: list[str], patch: pytest.MonkeyPatch) -> None:
    """Whether everything that the command names is there; our own scripts parse their options."""
    program, words = command[0], command[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
        wanted = [word for word in words if "=" not in word]
        assert wanted and set(wanted) <= set(targets), f"no such target in the Makefile: {wanted}"
        return
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {name for names in named for name in names.split(",")} <= set(extras)
        files = [word for before, word in zip(words, words[1:], strict=False) if before == "-r"]
        assert all((ROOT / file).is_file() for file in files)
        return
    if program == "pytest":
        check_pytest(words)
        return
    if program == "torchrun" and not any(word.endswith(".py") for word in words):
        return  # its name in a sentence
    target, argv = script_of(command)
    if target == "pytest":
        check_pytest(argv)
    elif target.endswith(".py"):
        assert (ROOT / target).is_file(), f"no file {target}"
        parse(target, argv, patch)
    else:
        assert importlib.util.find_spec(target), f"no module {target}"
        ours = target.split(".")[0] in ("minirlhf", "kernels", "benchmarks")
        if ours and argv:  # without arguments it is a name in a sentence, and may need some
            parse(target, argv, patch)


def check_pytest(words: list[str]) -> None:
    """Each word of -k is part of the name of a test; each path exists."""
    names = "\n".join(
        re.findall(r"def (test_\w+)", "".join(f.read_text() for f in ROOT.glob("tests/**/*.py")))
    )
    pattern = words[words.index("-k") + 1] if "-k" in words else ""
    for part in re.split(r"\b(?:and|or|not)\b|[()\s]+", pattern):
        assert part in names, f"no test's name holds {part}"
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word.split("::")[0]).exists(), word


@pytest.fixture
def your_own(tmp_path, monkeypatch):
    """A folder with the files that the pages' commands name: mydata.jsonl and others, mypackage/module.py."""
    rows = [{"prompt": f"Film {i}:", "completion": f" it is {('awful', 'great')[i % 2]}"} for i in range(80)]
    rated = [
        {"text": row["prompt"] + row["completion"], "rating": 1 + 4 * (i % 2)} for i, row in enumerate(rows)
    ]
    asked = [{"prompt": row["prompt"]} for row in rows]
    for name, content in (("mydata", rows), ("myratings", rated), ("myprompts", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "mypackage").mkdir()
    code = "def function(prompts, responses):\n    return [len(text) / 10 for text in responses]\n"
    (tmp_path / "mypackage/module.py").write_text(code)
    for name in ("mypackage", "mypackage.module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("your_own")
@pytest.mark.parametrize(("page", "command"), in_text(PAGES, commands_of_page))
def test_commands_of_the_pages_are_accepted(page, command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(("module", "command"), in_text(MODULES, launch_lines))
def test_launch_lines_of_docstrings_are_accepted(module, command, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command", ["python train_ppo.py --no-such-option 1", "python -m minirlhf.chat --no-such-option"]
)
def test_wrong_commands_are_noticed(command, monkeypatch):
    with pytest.raises((UserError, SystemExit)):
        check(command.split(), monkeypatch)


# Options that are told in words: whether any script has them.
OPTION = re.compile(r"--[a-z][a-z0-9-]*")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "log.md"], ids=lambda p: p.name)
def test_options_named_in_the_text_exist(page):
    """docs/log.md is left out: it tells of options that are gone."""
    known = set(OPTION.findall("".join(module.read_text() for module in MODULES)))
    for name in ("train_sft", "train_rm", "train_ppo", "train_dpo", "minirlhf.tools.evaluate"):
        config = importlib.import_module(name).Config
        fields = [field.name.replace("_", "-") for field in dataclasses.fields(config)]
        known |= {f"--{prefix}{field}" for field in fields for prefix in ("", "no-")}
    known |= {f"--{name.replace('_', '-')}-field" for name in shapes.OURS}  # spellings of --fields
    foreign = {
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--no-deps",
        "--gold",
        "--index-url",
    }
    named = {o for code in re.findall(r"`([^`]+)`", page.read_text()) for o in OPTION.findall(code)}
    assert named <= known | foreign, sorted(named - known - foreign)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_the_pages_compiles(page):
    for language, block in fenced_blocks(page.read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert all(importlib.util.find_spec(name) for name in names)


# ------------------------------------------------------------------------------------------------ running

SKIPPED = (  # parsed, but not run: they train for minutes, wait for a browser, or need weights that are not here
    "make", "torchrun", "pip", "pytest", "python -m pytest", "python -m venv", "python -m kernels", "python benchmarks",
    "python -m minirlhf.feedback serve", "python -m minirlhf.checkpoint import", "python train_sft.py --preset pretrained",
    "python -m minirlhf.checkpoint export runs/qwen",
    "python -m minirlhf.conformance mypackage",  # which holds a reward function here
)  # fmt: skip


def module_with_main(name: str) -> str:
    """The module whose main() `python -m name` runs: a package's __main__, what a front hands over to, or itself."""
    file = Path(importlib.util.find_spec(name).origin)
    if file.name == "__init__.py":
        return f"{name}.__main__"
    handed = re.search(r'run_module\(\s*"([\w.]+)"', file.read_text())
    return module_with_main(handed[1]) if handed else name


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/troubleshooting.md"])
def test_commands_run_after_the_demo(page, smoke, run, your_own, monkeypatch):
    """In order, as they stand, but for --preset smoke and generated data in place of the downloaded."""
    shutil.copytree(smoke, your_own / "runs/demo", symlinks=True)
    failed, done = {}, set()
    for command in commands_of_page(ROOT / page):
        text = " ".join(command)
        if text.startswith(SKIPPED) or text in done:
            continue
        done.add(text)
        script, argv = script_of(command)
        argv = ["toy" if word == "vader" else word for word in argv]
        if script in SCRIPTS:
            argv += ["--preset", "smoke", "--overwrite"]
        script = module_with_main(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The film is\n")))
        try:
            code = run(script, *argv)
        except Exception as error:  # a traceback: told with the others
            code = repr(error)
        if code != 0:
            failed[text] = code
    assert len(done) >= 8
    assert not failed, "\n".join(f"{text}\n    {code}" for text, code in failed.items())


# ------------------------------------------------------------------------------------------------ links and numbers


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_readme_shows_the_demos_numbers():
    """Its table, its samples, and the number under the picture are those of the raw results."""
    text = (ROOT / "README.md").read_text()
    found = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    first = found["1"]["demo"]
    rows = {"SFT": first["sft_samples"], "best of 16": first["best_of_n"]["16"], "**PPO**": first["ppo"]}
    for name, row in rows.items():
        wins = demo.number(row.get("judge_win_rate", 0.5))
        cells = [
            wins,
            demo.number(row["kl"], 2),
            demo.number(row["distinct_2"], 2),
            demo.number(row["mean_length"], 1),
        ]
        assert f"| {name} | {' | '.join(cells)} |" in text
    shown = [
        s for s in first["samples"] if f"| {s['prompt']} | {s['sft'].strip()} | {s['ppo'].strip()} |" in text
    ]
    assert len(shown) == 2
    wins = [100 * seed["demo"]["ppo"]["judge_win_rate"] for seed in found.values()]
    mean = sum(wins) / len(wins)
    said = re.search(r"\*\*(\d+) %\*\* of the\s+time \(three seeds: (\d+) to (\d+) %\)", text)
    assert [int(n) for n in said.groups()] == [round(mean), int(min(wins)), round(max(wins))]


def test_reading_order_knows_the_files():
    """Every file of the path is in README's table, whose line counts are within a tenth."""
    rows = re.findall(r"^\| \d+ \| (.+?) \| ([\d,]+) \| \d+ \|", (ROOT / "README.md").read_text(), re.M)
    listed, wrong = set(), []
    for files, lines in rows:
        names = [
            n if n.startswith(("minirlhf/", "train_")) else f"minirlhf/{n}"
            for n in re.findall(r"`([^`]+)`", files)
        ]
        listed |= set(names)
        count = sum(len((ROOT / name).read_text().splitlines()) for name in names)
        if not 0.9 * count <= int(lines) <= 1.1 * count:
            wrong.append(f"{files}: {count} lines, README says {lines}")
    fronts = {"__init__", "chat", "evaluate", "report", "why", "estimate", "conformance"}
    path = {f"minirlhf/{f.name}" for f in (ROOT / "minirlhf").glob("*.py") if f.stem not in fronts} | set(
        SCRIPTS
    )
    assert listed == path
    assert not wrong


METRICS = {"train_ppo.py": "ppo", "train_sft.py": "sft", "train_rm.py": "rm", "train_dpo.py": "dpo"}


@pytest.mark.parametrize("script", METRICS)
def test_every_metric_is_explained(script, smoke):
    """docs/metrics.md lists what the smoke run logged, and nothing else but what needs an option or other data."""
    _, _, section = (ROOT / "docs/metrics.md").read_text().partition(f"## `{script}`")
    rows = re.findall(r"^\| (`[^|]+) \|", section.partition("\n## ")[0], re.M)
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    lines = (smoke / METRICS[script] / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step"}
    # Of choices; of thumbs; of a reward model with another tokenizer; of groups.
    other_data = {"val/accuracy", "val/auc", "objective/rm_cut", "frac_reward_zero_std"}
    if script == "train_dpo.py":  # of --online
        other_data |= {"objective/scores", "objective/kl", "val/response_length", "val/eos_rate"}
    assert logged <= explained, sorted(logged - explained)
    assert explained - logged <= other_data, sorted(explained - logged)
