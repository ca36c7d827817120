"""What holds of the source as a whole: who may import whom, what is never used, what must agree."""

import ast
import dataclasses
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import minirlhf
from minirlhf.algorithms import AlgorithmOptions

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["train_sft", "train_rm", "train_ppo", "train_dpo"]
LIBRARY = sorted((ROOT / "minirlhf").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCE = [
    *LIBRARY,
    *KERNELS,
    *(ROOT / f"{s}.py" for s in SCRIPTS),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
PURE = ["masked", "ppo", "preference", "measure.stats"]
WITH_CONFIG = [*SCRIPTS, "minirlhf.tools.evaluate"]


def imports(file: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; `from a import b` counts as a and as a.b."""
    return imported_by(file.read_text(), file)


def imported_by(code: str, file: Path) -> set[str]:
    """The same of code that stands in `file`; what only type checkers import is left out."""
    parents, found = file.relative_to(ROOT).parent.parts, set()
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def test_imports_are_seen():
    assert {"kernels", "kernels.gae", "minirlhf.ppo", "minirlhf.run"} <= imports(ROOT / "train_ppo.py")
    assert "minirlhf.masked" in imports(ROOT / "minirlhf/ppo.py")  # a relative one
    inside = "def f():\n    from ..support import cli\n"
    assert "minirlhf.support.cli" in imported_by(inside, ROOT / "minirlhf/tools/chat.py")


@pytest.mark.parametrize("file", KERNELS, ids=lambda f: f.name)
def test_kernels_import_neither_library_nor_scripts(file):
    assert not roots(file) & {"minirlhf", *SCRIPTS}


@pytest.mark.parametrize("file", LIBRARY, ids=lambda f: f.name)
def test_library_imports_no_script(file):
    assert not roots(file) & {*SCRIPTS, "benchmarks", "tests"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_meet_only_through_checkpoints(script):
    assert not roots(ROOT / f"{script}.py") & set(SCRIPTS)


PATH = [*(ROOT / f"{s}.py" for s in SCRIPTS), *sorted((ROOT / "minirlhf").glob("*.py"))]
ROOMS = [f for room in ("support", "measure") for f in sorted((ROOT / "minirlhf" / room).glob("*.py"))]


@pytest.mark.parametrize("file", PATH + ROOMS, ids=lambda f: str(f.relative_to(ROOT)))
def test_tools_and_interop_are_imported_by_nobody_on_the_path(file):
    """Nor by what the path stands on.  Where a script needs other people's formats, it looks them up by name."""
    beside = {name for name in imports(file) if re.match(r"minirlhf\.(tools|interop)\b", name)}
    assert beside == set()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a node back to itself, both ends named; [] where there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        found = next((c for after in sorted(graph[node]) if (c := walk(after, [*way, node]))), [])
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := walk(node, []))), [])


def test_no_circle_of_imports():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in LIBRARY}
    names = {file: name.removesuffix(".__init__") for file, name in names.items()}
    graph = {name: imports(file) & set(names.values()) - {name} for file, name in names.items()}
    assert circle(graph) == []


TABLES = {  # the page that holds each benchmark's tables (None: printed only), and how many there are
    "demo": ("results", 8),
    "frontier": ("algorithms", 5),
    "lora": ("models", 1),
    "gaming": ("results", 1),
    "rounds": ("feedback", 1),
    "why": ("why", 1),
    "ppo": ("speed", 1),
    "ppo --algorithm grpo": ("speed", 1),
    "dpo": ("speed", 1),
    "variants": ("speed", 1),
    "rollout": ("speed", 1),
    "sft": ("speed", 1),
    "scaling": (None, 4),
    "scaling --ranks": ("scaling", 1),
    "tasks arithmetic": ("tasks", 2),
    "tasks code": ("tasks", 3),
    "tasks instructions": ("tasks", 1),
    "tasks interface": ("tasks", 2),
    "tasks safety": ("tasks", 1),
    "tasks translation": ("tasks", 2),
    "tasks words": ("tasks", 3),
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("experiment", TABLES)
def test_docs_hold_the_tables_that_their_commands_print(experiment, monkeypatch, capsys):
    page, tables = TABLES[experiment]
    script, *options = experiment.split()
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *options, "--tables"])
    runpy.run_path(str(ROOT / f"benchmarks/{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert len(printed) == tables
    if page is not None:
        text = (ROOT / f"docs/{page}.md").read_text()
        for table in printed:
            assert f"\n\n{table}\n\n" in text, table


def test_docs_explain_a_text_as_the_command_did():
    raw = (ROOT / "benchmarks/results/chat.txt").read_text()
    _, ours, table = raw.rpartition("\n[runs/demo/ppo]")
    assert f"\n```{ours}{table}```\n" in (ROOT / "docs/chat.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_say_what_was_measured_and_not_what_was_hoped_for(page):
    found = re.search(r"set out (to|for)\b|\bgoals?\b", page.read_text(), re.I)
    assert not found, found


@pytest.mark.parametrize("name", PURE)
def test_equations_know_no_model_tokenizer_or_config(name):
    """Nor does anything that they import."""
    todo, seen = [name], set()
    while todo:
        seen.add(module := todo.pop())
        names = imports(ROOT / "minirlhf" / f"{module.replace('.', '/')}.py")
        found = {n.removeprefix("minirlhf.") for n in names if re.match(r"minirlhf\.[a-z]", n)}
        todo += {n for n in found if (ROOT / "minirlhf" / f"{n.replace('.', '/')}.py").exists()} - seen
    assert seen <= {*PURE}


def test_kernels_are_light():
    """Other libraries import any package named `kernels` that they find, and triton is not everywhere."""
    code = "import sys, torch; had = set(sys.modules); import kernels; print(*sorted(set(sys.modules) - had))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    added = {name.split(".")[0] for name in done.stdout.split()}
    assert "kernels" in added
    assert not added & {"triton", "minirlhf"}


@pytest.mark.parametrize("file", SOURCE, ids=lambda f: f.name)
def test_nothing_is_unpickled(file):
    assert not roots(file) & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, (
                f"{file.name}:{node.lineno}"
            )
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"{file.name}:{node.value.lineno}"


def test_one_version():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert written[1] == minirlhf.__version__


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_field_of_the_config_is_read(name):
    """As `config.x` or `self.config.x`, in the script or in what it hands its config to, not merely in the checks of
    __post_init__.  Files that know a model's config are left out: it has fields of the same names."""
    module = importlib.import_module(name)
    readers = [Path(module.__file__), *(f for f in LIBRARY if "GPTConfig" not in f.read_text())]
    nodes = [node for file in readers for node in ast.walk(ast.parse(file.read_text()))]
    nodes = [node for node in nodes if isinstance(node, ast.Attribute)]
    owner = lambda node: getattr(node.value, "id", None) or getattr(node.value, "attr", None)
    read = {node.attr for node in nodes if owner(node) == "config"}
    fields = {f.name for f in dataclasses.fields(module.Config)} - {
        "preset"
    }  # preset is read by parse_config
    if issubclass(module.Config, AlgorithmOptions):  # which choose() reads by the names of the table's cells
        fields -= {f.name for f in dataclasses.fields(AlgorithmOptions)}
    assert fields - read == set()


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_configs_are_frozen(name):
    config = importlib.import_module(name).Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2


def test_details_agree_in_code_tests_and_docs():
    """D1 to D32: each stands as [D7] at a line of the source, in a test_D7_ and in one row of docs/details.md."""
    code = "".join(file.read_text() for file in SOURCE)
    tests = "".join(file.read_text() for file in sorted((ROOT / "tests").rglob("*.py")))
    register = (ROOT / "docs/details.md").read_text()
    rows = re.findall(r"^\| D(\d+) \|", register, re.M)
    everything = {str(n) for n in range(1, 33)}
    assert set(re.findall(r"\[D(\d+)\]", code)) == everything
    assert set(re.findall(r"def test_D(\d+)_", tests)) == everything
    assert sorted(rows, key=int) == sorted(everything, key=int)
    assert re.findall(r"^\| D(\d+) \|.*`-k D\1_`", register, re.M) == rows


def test_functions_in_the_register_exist():
    """`ppo.shape_rewards` and its like in docs/details.md: each is found in minirlhf or in kernels."""
    cells = re.findall(r"^\| D\d+ \|[^|]*\|([^|]*)\|", (ROOT / "docs/details.md").read_text(), re.M)
    places = [name for cell in cells for name in re.findall(r"`([a-z_.]+\.\w+)`", cell)]
    assert len(places) > 24
    for place in places:
        if place.endswith(".py"):
            assert (ROOT / place).is_file(), place
            continue
        module, _, name = place.rpartition(".")
        module = module if module == "kernels" else f"minirlhf.{module}"
        assert hasattr(importlib.import_module(module), name), place
