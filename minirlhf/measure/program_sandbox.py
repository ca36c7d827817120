"""Runs programs that nobody trusts, and tests them: a script for a Python of its own; program.py starts it.

Four kinds of processes, each with nothing but what it needs:

    judge     this script.  It reads (program, tests) pairs from stdin and writes verdicts to stdout.
    runner    forked from the judge before the judge has read anything; forks a worker for each program.
    worker    runs one program and answers calls of its functions.  It has two pipes, and no tests in memory.
    checker   runs the tests of one program, which call the worker's functions through the pipes, and writes
              the verdict to a pipe that only it and the judge have.

So a program cannot say that it passed: it can only return values, built-in ones, and the checker compares
them in another process.  It cannot read its tests: they were never in its memory.

Workers and checkers are locked by seccomp, in the kernel, which needs no privilege: of some 350 system calls
they may make the 24 of CALLS, and all others fail with PermissionError.  Hence no file can be opened, neither
to read nor to write, a temporary one included; no socket, no fork, thread or program, no signal to anybody,
no sleep, no change of limits.  What a program may import was imported before.  Limits of CPU time, wall time
and memory end the rest; a parent's end is the end of all below it.  Random numbers are the same in every run,
and so is the order of sets.

What is not promised: it is the same kernel (a hole in these 24 calls is a hole here), the same CPU caches,
and a clock that can be read.  On systems without seccomp nothing is run: the judge tries the lock first.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import fcntl
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time

# What programs may import.
MODULES = """abc array base64 binascii bisect calendar cmath collections collections.abc contextlib copy
dataclasses datetime decimal difflib enum fractions functools hashlib heapq html itertools math numbers
operator pprint queue re statistics string textwrap types typing unicodedata warnings zlib"""
DENIED = 1  # EPERM, which Python raises as PermissionError
# The system calls that remain, by name: (x86-64, aarch64).  Numbers are from Linux's unistd.h.
CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "exit_group": (231, 94),
}
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_..., place in CALLS
LONGEST = 1 << 20  # characters of a reply
PROBE = (
    """
import os
def opens():
    try:
        os.listdir("/")
    except PermissionError:
        return False
    return True
""",
    "assert opens() is False",
)


class Broken(BaseException):
    """The program has ended, or does not keep to the protocol: whatever the tests catch, it has failed."""


# ---------------------------------------------------------------- locks


def _prctl(option: int, argument: int, more: object = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), more, 0, 0) != 0:
        os._exit(3)


def end_with(parent: int) -> None:
    """This process is killed when its parent ends, whatever ends it."""
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it had ended before
        os._exit(3)


def lock(limits: dict) -> None:
    """From here on, this process may only compute, and talk through the files that it has open."""
    hard = {
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 16,
    }
    for what, most in hard.items():
        resource.setrlimit(what, (most, most))
    architecture, place = MACHINES[os.uname().machine]
    numbers = [call[place] for call in CALLS.values()]
    code = [
        (0x20, 0, 0, 4),
        (0x15, 1, 0, architecture),
        (0x06, 0, 0, 0x80000000),
    ]  # else the process is killed
    code += [(0x20, 0, 0, 0)]  # the number of the call; each comparison jumps to the last line
    code += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    code += [(0x06, 0, 0, 0x00050000 | DENIED), (0x06, 0, 0, 0x7FFF0000)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(filters)))
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    _prctl(22, 2, program)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def keep_only(*files: int) -> list[int]:
    """Close all files but these and 0 to 2, which lead nowhere; the others' new numbers."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 32) for file in (nowhere, nowhere, nowhere, *files)]
    for number, file in enumerate(high):
        os.dup2(file, number)
    os.closerange(len(high), 4096)
    return [*range(3, len(high))]


# ---------------------------------------------------------------- values


def pack(value: object) -> object:
    """A value of built-in types as JSON can hold it.  Raises TypeError for others, subclasses included."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [pack(v) for v in value]
    if kind in (tuple, set, frozenset, bytes, bytearray):
        return {kind.__name__: [pack(v) for v in value]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is dict:
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    raise TypeError(f"{kind.__name__} is no built-in value")


def unpack(value: object) -> object:
    if isinstance(value, list):
        return [unpack(v) for v in value]
    if isinstance(value, dict):
        [(kind, parts)] = value.items()
        parts = unpack(parts)
        if kind == "complex":
            return complex(*parts)
        makers = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes, "bytearray": bytearray}
        return dict(parts) if kind == "dict" else makers[kind](parts)
    return value


# ---------------------------------------------------------------- the program, and its tests


def work(requests: int, replies: int, limits: dict) -> None:
    """Run the program that comes first, and then answer calls of its functions."""
    requests, replies = keep_only(requests, replies)
    with open(requests, encoding="utf-8") as ask, open(replies, "w", encoding="utf-8") as answer:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        random.seed(0)
        lock(limits)
        reply = lambda *parts: (answer.write(json.dumps(parts) + "\n"), answer.flush())
        names: dict = {"__name__": "program"}
        try:
            exec(compile(json.loads(ask.readline()), "program", "exec"), names)
        except BaseException as error:
            reply("broken", type(error).__name__)
            return
        for line in ask:
            name, values, named = unpack(json.loads(line))
            try:
                if name not in names:
                    raise NameError(name)
                reply("value", pack(names[name](*values, **named)))
            except BaseException as error:
                reply("error", type(error).__name__)


class Remote:
    """A function of the program, to call from the tests: what comes back is a built-in value, or an error."""

    ask = answer = None  # files
    calls, broken = 0, ""  # how many, of all functions; why the program cannot be asked any more

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *values: object, **named: object) -> object:
        Remote.calls += 1
        try:
            Remote.ask.write(json.dumps(pack([self.name, list(values), named])) + "\n")
            Remote.ask.flush()
            line = Remote.answer.readline(LONGEST)
            kind, found = json.loads(line) if line.endswith("\n") else ("broken", "end")
        except (OSError, ValueError, TypeError, RecursionError):
            kind, found = "broken", "end"
        if kind == "value" and not Remote.broken:
            return unpack(found)
        error = getattr(builtins, str(found), None)
        if kind == "error" and isinstance(error, type) and issubclass(error, Exception):
            raise error(f"in {self.name}")
        Remote.broken = Remote.broken or str(found)[:40]
        raise Broken(Remote.broken)


def names_called(tests: str) -> set[str]:
    """The names that tests use and neither make themselves nor have built in: those of the program."""
    used, made = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return used - made


def check(ask: int, answer: int, verdicts: int, program: str, tests: str, limits: dict) -> None:
    """Run the tests, and write [verdict, why]."""
    ask, answer, verdicts = keep_only(ask, answer, verdicts)
    Remote.ask = open(ask, "w", encoding="utf-8")  # noqa: SIM115
    Remote.answer = open(answer, encoding="utf-8")  # noqa: SIM115
    lock(limits)
    try:
        Remote.ask.write(json.dumps(program) + "\n")
        exec(compile(tests, "tests", "exec"), {name: Remote(name) for name in names_called(tests)})
        said = ["passed", ""] if Remote.calls else ["wrong", "tests call no function of the program"]
    except AssertionError:
        said = ["wrong", ""]
    except BaseException as error:
        said = ["error", type(error).__name__]
    if Remote.broken:
        said = ["exit", ""] if Remote.broken in ("end", "SystemExit") else ["error", Remote.broken]
    os.write(verdicts, json.dumps(["refused", ""] if said[1] == "PermissionError" else said).encode())


# ---------------------------------------------------------------- the judge and its runner


def run(judge: socket.socket, limits: dict) -> None:
    """The runner's loop: for two pipes a worker, and on demand its end and the CPU seconds that it took."""
    keep_0_to_2 = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # the judge's stdin holds the tests
        os.dup2(keep_0_to_2, number)
    while True:
        word, files, _, _ = socket.recv_fds(judge, 1, 2)
        if not word:
            return
        me, worker = os.getpid(), os.fork()
        if not worker:
            try:
                end_with(me)
                work(*files, limits)
            finally:
                os._exit(0)
        for file in files:
            os.close(file)
        judge.recv(1)
        os.kill(worker, signal.SIGKILL)
        _, _, used = os.wait4(worker, 0)
        judge.send(struct.pack("d", used.ru_utime + used.ru_stime))


def judge_one(runner: socket.socket, program: str, tests: str, limits: dict) -> list[str]:
    """[verdict, why] of a program; nothing of its processes is left."""
    (ask_end, ask), (answer, answer_end), (told, tell) = os.pipe(), os.pipe(), os.pipe()
    socket.send_fds(runner, [b"+"], [ask_end, answer_end])
    me, checker = os.getpid(), os.fork()
    if not checker:
        try:
            runner.close()
            os.close(ask_end)
            os.close(answer_end)
            end_with(me)
            check(ask, answer, tell, program, tests, limits)
        finally:
            os._exit(0)
    for file in (ask_end, ask, answer, answer_end, tell):
        os.close(file)
    began = time.monotonic()
    ready, _, _ = select.select([told], [], [], limits["wall"])
    said = os.read(told, 4096) if ready else b""
    os.close(told)
    os.kill(checker, signal.SIGKILL)
    os.waitpid(checker, 0)
    runner.send(b"-")
    (seconds,) = struct.unpack("d", runner.recv(8))
    late = seconds > 0.9 * limits["cpu"] or time.monotonic() - began >= limits["wall"]
    verdict, why = json.loads(said) if said else ("error", "the tests ended")
    return ["time", ""] if late and verdict != "passed" else [verdict, why]


def main() -> None:
    limits, parent = json.loads(sys.argv[1]), int(sys.argv[2])
    if os.uname().machine not in MACHINES:
        raise SystemExit(f"no table of system calls for {os.uname().machine}")
    sys.set_int_max_str_digits(0)
    for module in MODULES.split():
        importlib.import_module(module)
    end_with(parent)
    runner, end = socket.socketpair()
    me = os.getpid()
    if not os.fork():
        try:
            runner.close()
            end_with(me)
            run(end, limits)
        finally:
            os._exit(0)
    end.close()
    if judge_one(runner, *PROBE, limits)[0] != "passed":
        raise SystemExit("the kernel does not lock processes (seccomp)")
    jobs = json.load(sys.stdin)
    print(json.dumps([judge_one(runner, program, tests, limits) for program, tests in jobs]))


if __name__ == "__main__":
    main()
