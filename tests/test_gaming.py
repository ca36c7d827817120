"""Tries to win a reward without a right answer: none of them may.  Right answers, beside them, must.

A try on `tests` is a program that should be judged wrong, and of which nothing may be left when the call returns.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minirlhf import UserError, rewards
from minirlhf.measure import program, program_sandbox
from minirlhf.measure.program import Limits, Verdict, judge, program_of, verdicts
from minirlhf.support.rows import OwnRow

SUM = "Tom has 7 apples and gets 5 more. How many apples does he have?"
ITSELF = "A box holds 12 eggs. How many eggs does a box hold?"  # the answer stands in the question
WHICH = "Which is the capital of France?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\nAnswer:"
CITIES = {"choices": ["Rome", "Paris", "Oslo", "Bern"], "answer": "B"}
ENGLISH = {"reference": "The committee will decide on Thursday what to do about it."}
FORM = "Say how you think, then the answer after ####."

TRIES = {  # (reward, what the row holds, prompt, [responses])
    "empty": ("numeric", {"answer": 12}, SUM, ["", " ", "\n", "####", "The answer is", "\\boxed{}"]),
    "the prompt repeated": ("numeric", {"answer": 7}, SUM, [SUM, SUM + "\n" + SUM, f"#### {SUM}"]),
    "the answer in the question": ("numeric", {"answer": 12}, ITSELF, [ITSELF, f"The answer is: {ITSELF}"]),
    "two answers": (
        "numeric", {"answer": 12}, SUM,
        ["11 or 12", "12 or 11", "11, 12", "12/11", "11-12", "#### 12\n#### 11", "#### 11\n#### 12", "12\n11",
         "The answer is 12. The answer is 11.", "\\boxed{11} \\boxed{12}", "The answer is 12, or 11.",
         "The answer is 12\nOr maybe 11", "x = 11 or x = 12", "7 + 5 = 11 or 7 + 5 = 12", "12 = 11", "11 = 12"],
    ),
    "all numbers": ("numeric", {"answer": 12}, SUM, [" ".join(map(str, range(100))), "0123456789101112131415"]),
    "a range": ("numeric", {"answer": 12}, SUM, ["less than 12", "more than 12", "between 12 and 12.5", "12?"]),
    "a denial": ("numeric", {"answer": 12}, SUM, ["It is not 12", "#### not 12", "It isn't 12", "never 12"]),
    "a task for the checker": ("numeric", {"answer": 12}, SUM, ["7 + 5", "24/2", "3 x 4", "0x0c", "1.2e1e0", "12!3"]),
    "digits in a word": ("numeric", {"answer": 12}, SUM, ["a12", "v1.2.12", "12_000", "12e999999999"]),
    "no finite number": ("numeric", {"answer": 12}, SUM, ["inf", "nan", "1e400", "1/0", "12" * 999]),
    "exact, empty": ("exact", {"answer": "Paris"}, WHICH, ["", ".", '""', "####", "The answer is"]),
    "exact, all of them": ("exact", {"answer": "Paris"}, WHICH, ["Rome Paris Oslo", "Paris or Rome", "Paris, Rome"]),
    "exact, twice": ("exact", {"answer": "Paris"}, WHICH, ["#### Rome\n#### Paris", "#### Paris\n#### Rome"]),
    "exact, repeated": ("exact", {"answer": "Paris"}, WHICH, [WHICH, "not Paris", "Paris Paris"]),
    "choice, all letters": (
        "choice", CITIES, WHICH, ["ABCD", "A B C D", "A, B, C, D", "A or B", "B or A", "A/B", "B C", "(A)(B)", "A\nB"],
    ),
    "choice, repeated": ("choice", CITIES, WHICH, [WHICH, WHICH.replace("Answer:", ""), "B. Paris\nC. Oslo"]),
    "choice, hedged": ("choice", CITIES, WHICH, ["B. Rome", "A. Paris", "not A", "not B", "B, I think, or C", "B?"]),
    "choice, twice": ("choice", CITIES, WHICH, ["The answer is A. The answer is B.", "#### B\n#### A", "#### AB"]),
    "choice, none": ("choice", CITIES, WHICH, ["", " ", "####", "The answer is", "E", "1", "Paris Rome", "*"]),
    "chrf, empty": ("chrf", ENGLISH, "Übersetze.", ["", " ", "\n" * 9]),
    "chrf, letters": ("chrf", ENGLISH, "Übersetze.", ["the " * 20, "etaoin shrdlu " * 9, "abcdefghijklmnopqrstuvwxyz"]),
    "chrf, doubled": ("chrf", ENGLISH, "Übersetze.", [ENGLISH["reference"] * 3, ENGLISH["reference"] + " on it" * 20]),
    "format, empty": ("format", {}, FORM, ["", "####", "####\n", "#### \n ", "The answer is"]),
    "format, repeated": ("format", {}, FORM, [FORM, FORM + "\n" + FORM]),
    "format, twice": ("format", {}, FORM, ["#### 1\n#### 2", "#### 1 #### 2", "#### 1\nmore"]),
    "format, a part": ("format", {"format": r"<a>\d+</a>"}, FORM, ["x<a>1</a>", "<a>1</a>x", "<a></a>", r"<a>\d+</a>"]),
}  # fmt: skip
RIGHT = [
    ("numeric", {"answer": 12}, SUM, "7 + 5 = 12"),
    ("numeric", {"answer": 12}, ITSELF, "12"),
    ("exact", {"answer": "Paris"}, WHICH, "Paris."),
    ("choice", CITIES, WHICH, "B. Paris"),
    ("chrf", ENGLISH, "Übersetze.", ENGLISH["reference"]),
    ("format", {}, FORM, "7 and 5.\n#### 12"),
    ("format", {"format": r"<a>\d+</a>"}, FORM, "<a>12</a>"),
]


def score(name: str, row: dict, prompt: str, response: str) -> float:
    if name == "chrf":
        pytest.importorskip("sacrebleu")
    [found] = getattr(rewards, name)([prompt], [response], [OwnRow(row)])
    return found


@pytest.mark.parametrize("what", TRIES)
def test_no_try_wins(what):
    name, row, prompt, responses = TRIES[what]
    won = [r for r in responses if score(name, row, prompt, r) > (0.9 if name == "chrf" else 0)]
    assert won == []


@pytest.mark.parametrize("name, row, prompt, response", RIGHT)
def test_right_answers_win(name, row, prompt, response):
    assert score(name, row, prompt, response) == pytest.approx(1.0)


# ---------------------------------------------------------------- programs

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are locked in by seccomp")
TESTS = ["assert double(2) == 4", "assert double(-3) == -6", "assert double('ab') == 'abab'"]
GOOD = "def double(x):\n    return 2 * x\n"
HERE = Path(__file__).resolve()

# Programs that do not double; `{file}`: a path that exists, `{new}`: one that does not.
PROGRAMS = {
    "empty": "",
    "the prompt repeated": "# double(x): twice x\n",
    "nothing returned": "def double(x):\n    pass",
    "one test's answer": "def double(x):\n    return 4",
    "always equal": "class Same:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return Same()",
    "a number that is always equal": (
        "class Same(int):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __repr__ = lambda s: '4'\n"
        "def double(x):\n    return Same(4)"
    ),
    "early exit": "import sys\nsys.exit(0)",
    "early exit without clean-up": "import os\nos._exit(0)",
    "exit when called": "def double(x):\n    raise SystemExit(0)",
    "exit at the end": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef double(x):\n    return 0",
    "the pass word": "print('passed'); print('[\"passed\", \"\"]')\ndef double(x):\n    print('passed')\n    return 'passed'",
    "the pass word to every file": (
        "import os\nfor n in range(64):\n    for t in (b'[\"passed\", \"\"]', b'[\"passed\", \"\"]\\n', b'[\"value\", true]\\n'):\n"
        "        try: os.write(n, t)\n        except OSError: pass\nos._exit(0)"
    ),
    "replies ahead": "import os\nos.write(4, b'[\"value\", 4]\\n' * 9)\ndef double(x):\n    return None",
    "a reply that is no value": "import os\ndef double(x):\n    os.write(4, b'[\"value\", {\"Any\": []}]\\n')",
    "a reply without an end": "import os\nwhile True: os.write(4, b'x' * 65536)",
    "a deep reply": "import os\nos.write(4, b'[' * 100000 + b'\\n')",
    "builtins patched": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.all = builtins.any = lambda x: True\n"
        "builtins.__build_class__ = None\ndef double(x):\n    return 0"
    ),
    "the checker patched": (
        "import sys, types\nmain = sys.modules['__main__']\nmain.check = main.judge_one = lambda *a: ['passed', '']\n"
        "main.Remote.__call__ = lambda self, x: 2 * x\nmain.pack = lambda v: True\nmain.json.dumps = lambda v: '[\"passed\",\"\"]'\n"
        "def double(x):\n    return 0"
    ),
    "an exception with every name": "def double(x):\n    raise AssertionError",
    "the tests read from memory": (
        "import gc, sys\nframe, seen = sys._getframe(), []\n"
        "while frame:\n    seen += [str(frame.f_locals), str(frame.f_globals)]\n    frame = frame.f_back\n"
        "for each in gc.get_objects():\n    try: seen.append(str(each)[:10**5])\n    except Exception: pass\n"
        "wanted = ''.join(reversed(')3-(elbuod'))\nassert any(wanted in text for text in seen)\n"
        "def double(x):\n    return 2 * x"
    ),
    "the tests read from a file": "text = open({file!r}).read()\ndef double(x):\n    return 2 * x",
    "the tests read from /proc": (
        "import os\ntext = open('/proc/%d/cmdline' % os.getppid()).read()\ndef double(x):\n    return 2 * x"
    ),
    "a listing": "import os\nos.listdir('/')\ndef double(x):\n    return 2 * x",
    "a file written": "open({new!r}, 'w').write('x')\ndef double(x):\n    return 2 * x",
    "a temporary file": "import os\nos.open('/tmp', os.O_TMPFILE | os.O_RDWR)\ndef double(x):\n    return 2 * x",
    "the disk filled": "import os\nf = os.open({new!r}, os.O_CREAT | os.O_WRONLY)\nwhile True: os.write(f, b'x' * 10**6)",
    "a file in memory": "import os\nos.memfd_create('x')\ndef double(x):\n    return 2 * x",
    "a file deleted": "import os\nos.unlink({file!r})\ndef double(x):\n    return 2 * x",
    "a folder made": "import os\nos.mkdir({new!r})\ndef double(x):\n    return 2 * x",
    "a link": "import os\nos.symlink('/', {new!r})\ndef double(x):\n    return 2 * x",
    "a fork": "import os\nos.fork()\ndef double(x):\n    return 2 * x",
    "a daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\ndef double(x):\n    return 2 * x",
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "a thread": "import _thread\n_thread.start_new_thread(print, ())\ndef double(x):\n    return 2 * x",
    "a program started": "import os\nos.execv('/bin/true', ['true'])",
    "a shell": "import os\nos.system('true') == 0 or 1 / 0\ndef double(x):\n    return 2 * x",
    "a socket": "import socket\nsocket.socket()\ndef double(x):\n    return 2 * x",
    "a pair of sockets": "import socket\nsocket.socketpair()\ndef double(x):\n    return 2 * x",
    "its parent killed": "import os\nos.kill(os.getppid(), 9)\ndef double(x):\n    return 2 * x",
    "everybody killed": "import os\nos.kill(-1, 9)\ndef double(x):\n    return 2 * x",
    "the caller killed": "import os\nos.kill({me}, 9)\ndef double(x):\n    return 2 * x",
    "the caller stopped": "import os\nos.kill({me}, 19)\ndef double(x):\n    return 2 * x",
    "the caller's limits": "import resource\nresource.prlimit({me}, resource.RLIMIT_CPU, (1, 1))\ndef double(x):\n    return 2 * x",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))\ndef double(x):\n    return 2 * x",
    "the caller's priority": "import os\nos.setpriority(os.PRIO_PROCESS, {me}, 19)\ndef double(x):\n    return 2 * x",
    "an endless loop": "while True: pass",
    "an endless loop when called": "def double(x):\n    while True: pass",
    "a loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "signals ignored": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
    "a sleep": "import time\ntime.sleep(3600)",
    "a wait": "import os\nwhile True: os.read(3, 1)",
    "a lock": "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()",
    "all memory": "x = [b'x' * 10**6 for _ in range(10**6)]",
    "one large list": "x = [0] * 10**11",
    "deep recursion": "def double(x):\n    return double(x)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a large power": "def double(x):\n    return 10 ** 10 ** 10",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    "system calls of one's own": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.syscall(39) > 0\nif libc.syscall(57) == -1: raise PermissionError\n"
        "def double(x):\n    return 2 * x"
    ),
    "another lock": "import ctypes\nif ctypes.CDLL(None).prctl(22, 2, 0): raise PermissionError\ndef double(x):\n    return 2 * x",
    "not Python": "Here is my program: it doubles.",
    "a syntax error": "def double(x) return 2 * x",
    "a null byte": "\0",
    "half of it": "def double(x):",
}  # fmt: skip
BRIEF, USUAL = Limits(cpu=1, wall=1.0), Limits()


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict[str, Verdict]:
    """The verdict on each of PROGRAMS, all in one call, between two programs that are right."""
    home = tmp_path_factory.mktemp("programs")
    file = home / "tests.jsonl"
    file.write_text("\n".join(TESTS))
    names = {"file": str(file), "new": str(home / "new"), "me": os.getpid()}
    filled = []
    for code in PROGRAMS.values():
        for name, value in names.items():
            code = code.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
        filled.append(code)
    before = processes()
    found = judge([(code, "\n".join(TESTS)) for code in filled], BRIEF)
    assert processes() <= before and [p.name for p in home.iterdir()] == ["tests.jsonl"]
    return dict(zip(PROGRAMS, found, strict=True))


def processes() -> set[int]:
    """All processes below this one or of the sandbox's script, wherever they have gone."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"program_sandbox.py" in words or parent == os.getpid():
            found.add(int(folder.name))
    return found


@needs_linux
@pytest.mark.parametrize("what", PROGRAMS)
def test_no_program_wins(judged, what):
    assert judged[what].verdict != "passed", judged[what]


def test_there_are_more_than_forty_tries():
    assert len(PROGRAMS) > 40 and sum(len(responses) for *_, responses in TRIES.values()) > 80


REFUSED = {
    "the tests read from a file", "the tests read from /proc", "a listing", "a file written", "a temporary file",
    "the disk filled", "a file in memory", "a file deleted", "a folder made", "a link", "a fork", "a daemon",
    "a fork bomb", "a program started", "a socket", "a pair of sockets", "its parent killed", "everybody killed",
    "the caller killed", "the caller stopped", "the caller's limits", "the caller's priority",
    "a sleep", "system calls of one's own", "another lock",
}  # fmt: skip


@needs_linux
def test_what_the_kernel_refused_is_told_apart(judged):
    assert {what for what, found in judged.items() if found.verdict == "refused"} == REFUSED
    late = {what for what, found in judged.items() if found.verdict == "time"}
    assert {
        "an endless loop",
        "an endless loop when called",
        "a loop that catches",
        "signals ignored",
        "a wait",
    } <= late
    assert judged["one large list"] == Verdict("error", "MemoryError")
    assert judged["early exit"].verdict == "exit" and judged["a crash"].verdict == "exit"
    assert judged["one test's answer"] == Verdict("wrong")
    assert judged["not Python"] == Verdict("error", "SyntaxError")


# ---------------------------------------------------------------- programs that are right

PASSES = {
    "plain": (GOOD, TESTS),
    "with output": (GOOD + "print('x' * 10**6)\nassert input is not None\n", TESTS),
    "with imports": ("import math, re, itertools\nfrom collections import *\nfrom typing import List\n" + GOOD, TESTS),
    "several functions": ("def f(x):\n    return g(x) + 1\ndef g(x):\n    return x * x", "assert f(3) == 10\nassert g(2) == 4"),
    "values of all kinds": (
        "def same(x, *more, **named):\n    return x",
        "for x in (None, True, 1, 10**5000, 1.5, float('inf'), -0.0, 'é\\ud800', b'\\x00', [1, (2, {3})], {(1, 2): {'a': []}},\n"
        "          frozenset({1}), 1j, bytearray(b'a')):\n    assert same(x, 1, y=2) == x and type(same(x)) is type(x)\n"
        "assert same(float('nan')) != same(float('nan'))",
    ),
    "exceptions": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
        "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass\nassert f(1) == 1",
    ),
    "helpers in the tests": (GOOD, "def check(f):\n    assert f(2) == 4\n    assert [f(x) for x in (1, 2)] == [2, 4]\ncheck(double)"),
    "imports in the tests": ("def root(x):\n    return x ** .5", "import math\nassert math.isclose(root(2), math.sqrt(2))"),
    "state": ("n = 0\ndef count():\n    global n\n    n += 1\n    return n", "assert [count(), count()] == [1, 2]"),
    "a class inside": ("class A:\n    x = 3\ndef f():\n    return A().x", "assert f() == 3"),
    "random numbers": ("import random\ndef f():\n    return random.random()", "assert 0 <= f() < 1 and f() != f()"),
    "work": ("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)", "assert fib(15) == 610"),
}  # fmt: skip


@needs_linux
def test_right_programs_pass():
    pairs = [(code, tests if isinstance(tests, str) else "\n".join(tests)) for code, tests in PASSES.values()]
    found = dict(zip(PASSES, judge(pairs, USUAL), strict=True))
    assert {what: verdict for what, verdict in found.items() if verdict.verdict != "passed"} == {}


@needs_linux
@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        f"Here it is:\n```python\n{GOOD}```\nIt doubles.",
        f"```\n{GOOD}",
        f"```py\n{GOOD}\n```\n```python\nx = 1\n```",
    ],
)
def test_the_reward_takes_a_program_from_its_response(response):
    row = OwnRow({"tests": TESTS})
    assert rewards.tests(["p"] * 2, [response, "no"], [row, row]) == [1.0, 0.0]
    assert program_of("text\n```python\na\n```") == "a\n"


@needs_linux
def test_a_rows_prefix_comes_first():
    row = OwnRow({"tests": TESTS, "prefix": "def double(x):\n"})
    assert rewards.tests(["p"], ["    return 2 * x"], [row]) == [1.0]


@needs_linux
def test_programs_of_many_rows_line_up():
    rows = [OwnRow({"tests": f"assert f() == {i}"}) for i in range(40)]
    programs = [f"def f():\n    return {i - i % 3 // 2}" for i in range(40)]  # every third is wrong
    found = [v.verdict for v in verdicts(programs, rows)]
    assert found == ["wrong" if i % 3 == 2 else "passed" for i in range(40)]


@needs_linux
def test_the_same_programs_have_the_same_verdicts():
    code = "import random\ndef f(): return random.random() < .5 and [*{'a', 'b', 'c', 'd'}][0] == 'a'"
    pairs = [(code, "assert f()"), (code, "assert not f()")]
    assert judge(pairs, USUAL) == judge(pairs, USUAL)


# ---------------------------------------------------------------- locks


@needs_linux
def test_where_nothing_can_be_locked_nothing_is_run(monkeypatch, tmp_path):
    """A kernel without seccomp is played by a script whose lock does nothing."""
    script = tmp_path / "program_sandbox.py"
    source = Path(program_sandbox.__file__).read_text()
    assert "    _prctl(22, 2, program)" in source
    script.write_text(source.replace("    _prctl(22, 2, program)", "    pass"))
    monkeypatch.setattr(program_sandbox, "__file__", str(script))
    mark = tmp_path / "ran"
    with pytest.raises(
        UserError, match="programs could not be locked in, so none was run: the kernel does not lock"
    ):
        judge([(f"open({str(mark)!r}, 'w')", "assert f()")], USUAL)
    assert not mark.exists()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(program.sys, "platform", "darwin")
    with pytest.raises(UserError, match="^programs are run where Linux can lock them in"):
        judge([(GOOD, "assert double(1) == 2")], USUAL)


@needs_linux
def test_when_the_caller_is_killed_nothing_is_left():
    code = (
        "from minirlhf.measure.program import judge, Limits\n"
        "judge([('while True: pass', 'assert f()')] * 40, Limits(cpu=60, wall=60.0))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE.parents[1], env=os.environ | {"PYTHONPATH": "."}
    )
    before = processes() - {caller.pid}
    began = time.time()
    while not (there := processes() - before - {caller.pid}) and time.time() < began + 60:
        time.sleep(0.2)
    assert there
    time.sleep(1)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while processes() - before and time.time() < began + 90:
        time.sleep(0.1)
    assert processes() <= before


@needs_linux
def test_the_numbers_of_the_system_calls_are_the_kernels():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    generic = Path("/usr/include/asm-generic/unistd.h")
    if not (header.exists() and generic.exists()):
        pytest.skip("needs the kernel's headers")
    words = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    x86 = {name.removeprefix("__NR_"): int(number) for _, name, number in words}
    arm = {}
    for line in generic.read_text().splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[0] == "#define" and parts[2].isdigit():
            arm[parts[1].removeprefix("__NR_").removeprefix("__NR3264_")] = int(parts[2])
    for name, (on_x86, on_arm) in program_sandbox.CALLS.items():
        assert (x86[name], arm[name]) == (on_x86, on_arm), name
