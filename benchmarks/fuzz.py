"""Damaged and hostile inputs to everything that reads what others wrote: a UserError, or an orderly result.

    python benchmarks/fuzz.py                              # 50,000 inputs; writes benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --only tokenizer --inputs 1000    # of one kind (see benchmarks/fuzz_kinds.py)
    python benchmarks/fuzz.py --only json --at 137         # that input again, with its traceback

An input is a few files.  Input number i of a kind is a valid seed with one to four mutations, and depends on
--seed, the kind and i alone.  It fails where anything but UserError is raised, where a file outside the input's folder is written (or a file planted beside
it is read), where a process is started, a pickle read or a connection made, and where it takes more than
10 seconds of processor time or 1.5 GB of memory.  Batches run in children: a crash of an interpreter is a
failure like any other.  What fails is made smaller before it is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import selectors
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Files = dict[str, bytes]  # name in the input's folder -> content
SECONDS, MEMORY = 10.0, 1_500_000_000  # of processor time (three times as many for a bomb), and bytes
PATIENCE = 100  # seconds of processor time without a word, after which a child is killed
NO_CHANGE = (ValueError, OSError, EOFError, RecursionError, OverflowError, TypeError)  # it cannot be written
BATCH = 250  # inputs per child
CANARY = "canary.safetensors"  # lies beside the input's folder: nobody may read or write it
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
}
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
}


@dataclass
class Kind:
    """One reader.  `seeds(folder)`: valid inputs; `read(folder)`: what a command does with an input's folder.

    `repair` makes checksums right again, as whoever wants to be read would; `bombs`: inputs of their own."""

    share: int  # of all inputs, in proportion
    seeds: Callable[[Path], list[Files]]
    read: Callable[[Path], Any]
    repair: Callable[[Files], Files] | None = None
    bombs: dict[str, Callable[[], Files]] = field(default_factory=dict)
    damage: tuple[str, ...] = ()  # names of files that are mutated; (): all
    prepare: Callable[[Path], None] = lambda folder: None  # once in each child, in a folder of its own


# ---------------------------------------------------------------- mutations


NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**63,
    -(2**31),
    10**9,
    10**400,
    1e-9,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
)
TEXTS = ("", "x", "\0", "\n", "\x1b[31m", "\ud800", "<script>alert(1)</script>", "x" * 5000, "../" + CANARY)
TEXTS += ("/etc/passwd", "..", "a\r\nb", "\u202e", "{{ 1/0 }}", "__class__", "1e3", "null", "\u00e9" * 300)
TOKENS = (
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"-1",
    b"1e999",
    b'"',
    b"\\",
    b"\xff",
    b"\x00",
    b"\n",
    b"{",
    b"[",
    b"NaN",
)


def odd_value(rng: random.Random) -> Any:
    pick = rng.randrange(8)
    if pick < 2:
        return rng.choice(NUMBERS)
    if pick < 4:
        return rng.choice(TEXTS)
    plain = (None, True, False, [], {}, [[]], {"x": 1}, [None], [1, "x"], {"": {}}, [{}] * 3)
    return rng.choice(plain) if pick < 7 else nested(rng.choice((3, 50, 400)))


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def mutate_json(rng: random.Random, document: Any) -> Any:
    """The document with one of its nodes changed, or left out, doubled, renamed, exchanged."""
    places = list(_places(document))
    if not places or rng.random() < 0.03:
        return odd_value(rng)
    parent, key = rng.choice(places)
    pick = rng.randrange(10)
    if pick == 0:
        del parent[key]
    elif pick == 1 and isinstance(parent, dict):
        name = mutate_bytes(rng, key.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
        parent[name] = parent.pop(key)
    elif pick == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif pick == 3:
        other, name = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[name])) if _is_part(other, name) else None
    elif pick == 4 and isinstance(parent[key], str):
        changed = mutate_bytes(rng, parent[key].encode("utf-8", "surrogatepass"))
        parent[key] = changed.decode("utf-8", "replace")
    elif pick == 5 and type(parent[key]) in (int, float):
        parent[key] = rng.choice(
            (-parent[key], parent[key] + 1, parent[key] * 2, parent[key] * 10**6, str(parent[key]))
        )
    else:
        parent[key] = odd_value(rng)
    return document


def _is_part(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def _places(node: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every node below this one; of long lists the first entries."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(children)[:60]:
        yield node, key
        if depth < 8:
            yield from _places(child, depth + 1)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
    pick = rng.randrange(8)
    if pick == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif pick == 1:
        del data[at:end]
    elif pick == 2:
        data[at:at] = rng.choice(TOKENS) * rng.choice((1, 1, 2, 100))
    elif pick == 3:
        data[at:at] = data[at:end]
    elif pick == 4:
        del data[at:]
    elif pick == 5:
        data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
    elif pick == 6:
        data[at:end] = bytes(end - at)
    else:
        data[at:end] = rng.choice(TOKENS)
    return bytes(data)


def parts_of(content: bytes) -> tuple[bytes, Any, bytes] | None:
    """(what stands before JSON in a file, the JSON, what follows it), of a .json, .safetensors or a line."""
    if (
        len(content) > 8
        and (n := struct.unpack("<Q", content[:8])[0]) <= len(content) - 8
        and content[8:9] == b"{"
    ):
        try:
            return b"safetensors", json.loads(content[8 : 8 + n]), content[8 + n :]
        except (ValueError, RecursionError):
            return None
    try:
        return b"", json.loads(content), b""
    except (ValueError, RecursionError):
        return None


def with_parts(before: bytes, document: Any, after: bytes) -> bytes:
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + after if before else text


def mutate_file(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        inner = mutate_file(rng, name[:-3], gzip.decompress(content)) if rng.random() < 0.7 else None
        return mutate_bytes(rng, content) if inner is None else gzip.compress(inner, 1)
    if rng.random() < 0.75:
        if name.endswith(".jsonl"):
            lines = content.splitlines(keepends=True)
            k = rng.randrange(len(lines)) if lines else 0
            if lines and (found := parts_of(lines[k])):
                lines[k] = with_parts(*found[:1], mutate_json(rng, found[1]), b"") + b"\n"
                return b"".join(lines)
        elif found := parts_of(content):
            return with_parts(found[0], mutate_json(rng, found[1]), found[2])
    return mutate_bytes(rng, content)


def make_input(kind: Kind, seeds: list[Files], name: str, seed: int, i: int) -> Files:
    """Input number i of a kind."""
    rng = random.Random(f"{seed}:{name}:{i}")
    files = dict(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        target = rng.choice([file for file in files if not kind.damage or file in kind.damage])
        if rng.random() < 0.02 and len(files) > 1:
            del files[target]
            break
        for _ in range(20):  # a value too odd to be written as JSON
            try:
                files[target] = mutate_file(rng, target, files[target])
                break
            except (*NO_CHANGE, zlib.error):
                continue
    if kind.repair and rng.random() < 0.7:
        with contextlib.suppress(BaseException):  # beyond repair: as it is (Rust's panics are no Exception)
            files = kind.repair(files)
    return files


# ---------------------------------------------------------------- one input, watched


class Watched(Exception):
    """What no reader may do."""


class Watch:
    """Python's audit events while an input is read."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments[:1])[:100]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = bool((arguments[2] or 0) & WRITES)
            if os.path.basename(path) == CANARY or writes and not self._inside(path):
                self.seen.append(f"open {'to write' if writes else ''} {path}")
        elif event in CHANGES:
            paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes)]
            paths = paths[1:] if event in ("os.symlink",) else paths
            self.seen += [f"{event} {path}" for path in paths if not self._inside(os.path.abspath(path))]

    def _inside(self, path: str) -> bool:
        return path.startswith((self.folder or "") + os.sep) or path == self.folder or path == "/dev/null"


WATCH: Watch | None = None


def judge(kind: Kind, files: Files, folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """(outcome, detail) of one input: accepted, refused, or what is wrong."""
    from minirlhf import UserError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert WATCH is not None
    WATCH.seen, WATCH.folder = [], str(folder)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, detail = "accepted", ""
    try:
        kind.read(folder)
    except UserError as error:
        outcome, detail = "refused", str(error)
    except BaseException as error:  # whatever it is, it is foreign
        outcome, detail = "foreign", signature(error)
    WATCH.folder = None
    took = time.process_time() - began
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if WATCH.seen:
        return "forbidden", WATCH.seen[0]
    if took > seconds:
        return "slow", f"{took:.0f} s of processor time; {detail[:100]}"
    if grown > MEMORY:
        return "memory", f"{grown / 1e9:.1f} GB; {detail[:100]}"
    return outcome, detail


def signature(error: BaseException) -> str:
    """The error's type and the last of our own lines that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    ours = [f for f in frames if "/benchmarks/" not in f.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {where}: {str(error)[:120]}"


def group_of(detail: str) -> str:
    """Failures that are alike: the same error from the same line."""
    return re.sub(r"0x[0-9a-f]+|\d{3,}|/\S+", "*", detail.split(": ")[0])


# ---------------------------------------------------------------- many inputs, in children


def in_child(kind: Kind, home: Path, work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """What `work(send)` sends from a process of its own; ends with None if it ended well, or with a text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if not os.environ.get("FUZZ_STDERR"):
                os.dup2(quiet, 2)
            kind.prepare(home / "prepared" / str(os.getpid()))
            global WATCH
            WATCH = Watch()
            # Threads of libraries and torch's arenas take address space, not memory: judge() looks at memory.
            limit = 1024 * int(Path("/proc/self/statm").read_text().split()[0]) * 4 + 6 * MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            work(lambda message: os.write(writing, (json.dumps(message) + "\n").encode()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    selector, rest = selectors.DefaultSelector(), b""
    selector.register(reading, selectors.EVENT_READ)
    reason, heard = None, processor_time(child)
    try:
        while reason is None:
            if not selector.select(1.0):
                if processor_time(child) - heard > PATIENCE:
                    reason = f"no answer within {PATIENCE} s of processor time"
                continue
            block = os.read(reading, 1 << 16)
            if not block:
                break
            heard = processor_time(child)
            *lines, rest = (rest + block).split(b"\n")
            yield from map(json.loads, lines)
    finally:
        selector.close()
        os.close(reading)
        if reason:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    yield reason or (None if code == 0 else f"the process ended with code {code}")


def warm_up(kind: Kind, files: Files, folder: Path) -> None:
    """Read a seed unwatched: libraries are imported, and make folders for what they keep."""
    shutil.rmtree(folder, ignore_errors=True)
    kind.prepare(folder.with_name("prepared"))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()):
        kind.read(folder)


def processor_time(process: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_kind(name: str, kind: Kind, seeds: list[Files], n: int, seed: int, home: Path) -> dict[str, Any]:
    """{outcomes: {word: count}, failures: [{group, at, detail, files}], slowest}"""
    counts: dict[str, int] = {}
    failures: dict[str, dict] = {}
    inputs: list[int | str] = [*kind.bombs, *range(n)]
    make = lambda at: kind.bombs[at]() if isinstance(at, str) else make_input(kind, seeds, name, seed, at)
    warm_up(kind, seeds[0], home / "in" / "warm")
    good = judged(kind, seeds, home)
    for outcome, detail in good:
        if outcome != "accepted":
            raise SystemExit(f"{name}: a seed is not read: {outcome} {detail}")
    done, slowest = 0, 0.0
    while done < len(inputs):
        batch, begun = inputs[done : done + BATCH], 0

        def work(send: Callable, batch: list = batch) -> None:
            for at in batch:
                began = time.process_time()
                seconds = 3 * SECONDS if isinstance(at, str) else SECONDS
                send([*judge(kind, make(at), home / "in" / name, seconds), time.process_time() - began])

        for message in in_child(kind, home, work):
            if isinstance(message, list):
                outcome, detail, took = message
                slowest = max(slowest, took)
            elif message is None:
                break
            else:
                outcome, detail = "died", message
            at = batch[begun]
            begun += 1
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome not in ("accepted", "refused"):
                group = f"{outcome}: {group_of(detail)}"
                known = failures.setdefault(group, {"group": group, "at": at, "detail": detail, "count": 0})
                known["count"] += 1
        done += begun
        if begun == 0:
            raise SystemExit(f"{name}: a child ends before its first input")
    for found in failures.values():
        outcome = found["group"].partition(":")[0]
        found["least"] = shown(shrink(kind, make(found["at"]), outcome, home), seeds)
    return {"outcomes": counts, "failures": list(failures.values()), "slowest_seconds": round(slowest, 2)}


def judged(kind: Kind, inputs: list[Files], home: Path) -> list[tuple[str, str]]:
    def work(send: Callable) -> None:
        for files in inputs:
            send(list(judge(kind, files, home / "in" / "one")))

    return [
        ("died", m) if isinstance(m, str) else tuple(m) for m in in_child(kind, home, work) if m is not None
    ]


def shrink(kind: Kind, files: Files, outcome: str, home: Path, tries: int = 150) -> Files:
    """A smaller input with the same outcome: parts are left out as long as it stays."""
    if sum(map(len, files.values())) > 1 << 20 or outcome in ("slow", "died", "memory"):
        return files
    best = dict(files)
    for name in list(files):
        for smaller in _smaller(best[name]):
            if tries <= 0:
                return best
            tries -= 1
            candidate = best | {name: smaller}
            if kind.repair:
                try:
                    candidate = kind.repair(candidate)
                except BaseException:
                    continue
            found = judged(kind, [candidate], home)
            if found and found[0][0] == outcome and len(smaller) < len(best[name]):
                best = candidate
    return best


def _smaller(content: bytes) -> Iterator[bytes]:
    if found := parts_of(content):
        for parent, key in list(_places(found[1]))[:80]:
            if _is_part(parent, key):
                kept = parent.pop(key)
                yield with_parts(found[0], found[1], found[2])
                parent.insert(key, kept) if isinstance(parent, list) else parent.update({key: kept})
        return
    lines = content.splitlines(keepends=True)
    for i in range(min(len(lines), 40)):
        yield b"".join(lines[:i] + lines[i + 1 :])
    for size in (len(content) // 2, len(content) // 4, len(content) // 16):
        for start in range(0, len(content), max(size, 1)) if size else ():
            yield content[:start] + content[start + size :]


def shown(files: Files, seeds: list[Files]) -> dict[str, str]:
    """Where an input differs from the seed that is nearest to it."""
    alike = lambda seed: sum(seed.get(name) == content for name, content in files.items())
    seed = max(seeds, key=alike)
    return {
        name: "missing" if name not in files else _difference(seed.get(name, b""), files[name])
        for name in {**seed, **files}
        if seed.get(name) != files.get(name)
    }


def _difference(a: bytes, b: bytes) -> str:
    """'{"n_head": <2 -> 0>, ...' of two contents."""
    start = len(os.path.commonprefix([a, b]))
    end = len(os.path.commonprefix([a[start:][::-1], b[start:][::-1]]))
    text = lambda x: repr(x)[2:-1]
    was, now = a[start : len(a) - end], b[start : len(b) - end]
    return f"{text(b[max(0, start - 60) : start])}<{text(was[:150])} -> {text(now[:300])}>{text(b[len(b) - end :][:30])}"


# ---------------------------------------------------------------- the command


def main() -> None:
    from benchmarks.fuzz_kinds import KINDS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=50_000, help="Number of inputs over all kinds.")
    parser.add_argument("--only", choices=KINDS, help="One kind of input.")
    parser.add_argument("--at", help="Only this input of --only: its number, or the name of a bomb.")
    parser.add_argument("--seed", type=int, default=1, help="Random seed.")
    parser.add_argument("--check", action="store_true", help="Exit with code 1 where an input failed.")
    parser.add_argument("--out", type=Path, default=None, help="File to write.")
    args = parser.parse_args()
    kinds = {args.only: KINDS[args.only]} if args.only else KINDS
    shares, found = sum(kind.share for kind in kinds.values()), {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        (home / "in").mkdir()
        (home / "in" / CANARY).write_bytes(b"not yours")
        os.chdir(home / "in")
        for name, kind in kinds.items():
            seeds = kind.seeds(home / "seeds" / name)
            if args.at is not None:
                show_one(name, kind, seeds, args, home)
                return
            n = max(1, args.inputs * kind.share // shares - len(kind.bombs))
            found[name] = run_kind(name, kind, seeds, n, args.seed, home)
            counts = ", ".join(f"{count:,} {word}" for word, count in sorted(found[name]["outcomes"].items()))
            print(f"{name:12s} {counts}; slowest {found[name]['slowest_seconds']} s", flush=True)
            for failure in found[name]["failures"]:
                print(f"    {failure['count']} x {failure['group']}\n        {failure['detail']}")
                print(
                    f"        --only {name} --at {failure['at']} --seed {args.seed}: {failure['least']}",
                    flush=True,
                )
    failed = sum(f["count"] for result in found.values() for f in result["failures"])
    total = sum(sum(result["outcomes"].values()) for result in found.values())
    print(f"{total:,} inputs, {failed:,} failures")
    report = {
        "seed": args.seed,
        "inputs": total,
        "failures": failed,
        "seconds": round(time.monotonic() - began),
    }
    out = args.out or (None if args.only or args.inputs < 50_000 else ROOT / "benchmarks/results/fuzz.json")
    if out:
        out.write_text(json.dumps(report | {"kinds": found}, indent=1) + "\n")
    sys.exit(int(args.check and failed > 0))


def show_one(name: str, kind: Kind, seeds: list[Files], args: argparse.Namespace, home: Path) -> None:
    global WATCH
    bomb = kind.bombs.get(args.at)
    files = bomb() if bomb else make_input(kind, seeds, name, args.seed, int(args.at))
    print(shown(files, seeds))
    kind.prepare(home / "prepared")
    WATCH = Watch()
    print(*judge(kind, files, home / "in" / name))
    try:
        kind.read(home / "in" / name)
    except Exception:
        traceback.print_exc()


if __name__ == "__main__":
    main()
