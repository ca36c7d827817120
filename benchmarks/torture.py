"""Runs that are killed, stopped, starved of disk or damaged: what follows is the run that nothing disturbed.

    python benchmarks/torture.py                         # 100 kills, 800 damages; writes benchmarks/results/torture.txt
    python benchmarks/torture.py --kills 8 --damages 40  # a taste

Every run is a child process (forked, so that torch is imported once) at the smoke preset, one thread, fp32.

kills      SIGKILL at random moments of every stage and algorithm, a third of them inside a save: at a random
           operation on files, or at a random time; then the same command with --resume, until it is complete
signals    SIGTERM or Ctrl-C once, and twice, at random moments
disk       a limit on the size of files, for a full disk; a folder that the process may not write to
clock      time.time() jumps by up to a year at every call
damages    a file of a checkpoint is missing, emptied, cut, flipped in one bit, or another's; then a command

After each of the first four, weights, optimizer, metrics.jsonl, samples.jsonl and config.json must equal
those of an undisturbed run, bit for bit but for seconds and paths.  After a damage the command must end with
exit code 2 and one line, or with exactly the result of the whole checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = ["--preset", "smoke", "--precision", "fp32"]
TINY = [*SMALL, "--n-layer", 1, "--n-embd", 16, "--batch", 104, "--epochs", 3, "--samples", 0]
PPO = ["--init", "sft", "--reward-model", "rm", "--save-every", 1, "--save-samples", 1]
RUNS: dict[str, tuple[str, list]] = {  # name -> script, options; names of runs stand for their folders
    "sft": ("train_sft", TINY),
    "rm": ("train_rm", [*SMALL, "--batch", 78, "--epochs", 1, "--members", 2, "--normalise-samples", 8, "--init", "sft"]),
    "ppo": ("train_ppo", [*SMALL, *PPO, "--kl-target", 0.01, "--kl-horizon", 50]),
    "grpo": ("train_ppo", [*SMALL, *PPO, "--algorithm", "grpo"]),
    "dpo": ("train_dpo", [*SMALL, "--pairs", 1, "--batch", 78, "--init", "sft"]),
    "online": ("train_dpo", [*SMALL, "--online", "--batch", 16, "--init", "sft", "--reward-model", "rm"]),
    "lora": ("train_sft", [*SMALL, "--batch", 104, "--epochs", 2, "--samples", 0, "--lora", 4, "--init", "sft"]),
    "lora-ppo": ("train_ppo", [*SMALL, *PPO, "--lora", 4]),
}  # fmt: skip
FRONTS = {"chat": "minirlhf.tools.chat", "evaluate": "minirlhf.tools.evaluate"}
FRONTS |= {"export": "minirlhf.interop.command"}
PATIENCE = 600.0  # seconds that a child may take, on a busy machine
CHANGES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "shutil.copyfile",
    "os.rmdir",
)


@dataclass
class Ended:
    """How a child ended: its exit code (negative: by a signal), what it printed, and for how long it ran."""

    code: int
    out: str
    err: str
    seconds: float
    saves: list[int]  # operations on files in each save

    @property
    def is_one_line(self) -> bool:
        """Whether it ended as the user's mistakes do: exit code 2, its last line an error, no traceback."""
        lines = self.err.strip().splitlines()
        return (
            self.code == 2 and "Traceback" not in self.err and bool(lines) and lines[-1].startswith("error: ")
        )


class Child:
    """module.main() with some words, in a process of its own whose output and saves are heard through pipes.

    Pipes, since a limit on the size of files would cut the output, too."""

    def __init__(
        self,
        module: str,
        words: list,
        before: Callable[[], None] = lambda: None,
        die: tuple[int, int] | None = None,
    ):
        """die: (number of the save, number of the operation in it) at which it gets SIGKILL."""
        pipes = {name: os.pipe() for name in ("saves", "out", "err")}
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(pipes["out"][1], 1)
            os.dup2(pipes["err"][1], 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work(module, words, pipes["saves"][1], before, die)
        self.told = {name: b"" for name in pipes}
        self.pipes = {name: reading for name, (reading, _) in pipes.items()}
        for reading, writing in pipes.values():
            os.close(writing)
            os.set_blocking(reading, False)

    def hear(self) -> str:
        """What the child has told of its saves so far; its output is taken as well."""
        for name, pipe in self.pipes.items():
            with contextlib.suppress(BlockingIOError):
                while block := os.read(pipe, 1 << 16):
                    self.told[name] += block
        return self.told["saves"].decode()

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def sleep(self, seconds: float, until: Callable[[str], bool] = lambda told: False) -> None:
        """Wait so long, or until the child has told something of its saves, or has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until(self.hear()) and alive(self.pid):
            time.sleep(0.0005)

    def wait(self) -> Ended:
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.hear()
            if done:
                break
            if time.monotonic() - self.began > PATIENCE:
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        for pipe in self.pipes.values():
            os.close(pipe)
        out, err = (self.told[name].decode(errors="replace") for name in ("out", "err"))
        saves = [int(n) for n in re.findall(r"e(\d+)", self.told["saves"].decode())]
        return Ended(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - self.began, saves)


def work(
    module: str, words: list, pipe: int, before: Callable[[], None], die: tuple[int, int] | None
) -> NoReturn:
    """What a child does."""
    code = 99
    try:
        sys.argv = [module, *map(str, words)]
        watch_saves(pipe, die)
        without_baselines()
        before()
        from minirlhf.support import cli

        cli.run_script(importlib.import_module(FRONTS.get(module, module)).main)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def watch_saves(pipe: int, die: tuple[int, int] | None) -> None:
    """Write 's' to the pipe when a save begins, 'e' and the number of its operations when it ends."""
    from minirlhf.support import steps

    write_step, state = steps.write_step, {"save": 0, "operation": 0, "inside": False}

    def watched(*args: Any, **options: Any) -> Path:
        os.write(pipe, b"s")
        state.update(save=state["save"] + 1, operation=0, inside=True)
        found = write_step(*args, **options)
        state["inside"] = False
        os.write(pipe, b"e%d\n" % state["operation"])
        return found

    def count(event: str, _: tuple) -> None:
        if state["inside"] and event in CHANGES:
            state["operation"] += 1
            if (state["save"], state["operation"]) == die:
                os.kill(os.getpid(), signal.SIGKILL)

    steps.write_step = watched
    sys.addaudithook(count)


def without_baselines() -> None:
    """The report at the end of train_rm.py is not the subject, and takes longer than the training."""
    from minirlhf.measure import baselines

    baselines.tfidf_ridge = lambda *args, **options: None
    baselines.vader_lexicon = lambda *args: None


class Torture:
    """A folder with an undisturbed run of everything, and what is done to copies of it."""

    def __init__(self, home: Path, seed: int, tell: Callable[[dict], None]):
        self.home, self.rng, self.tell = home, random.Random(seed), tell
        self.whole = home / "whole"
        self.ended: dict[str, Ended] = {}

    def words(self, name: str, out: Path) -> list:
        options = [self.whole / w if w in RUNS and w != name else w for w in RUNS[name][1]]
        return [*options, "--out", out]

    def start(self, name: str, out: Path, *more: Any, **options: Any) -> Child:
        return Child(RUNS[name][0], [*self.words(name, out), *more], **options)

    def run(self, name: str, out: Path, *more: Any, **options: Any) -> Ended:
        return self.start(name, out, *more, **options).wait()

    def undisturbed(self, names: list[str]) -> None:
        for name in names:
            self.ended[name] = self.run(name, self.whole / name)
            if self.ended[name].code:
                raise SystemExit(f"{name}: {self.ended[name].err[-2000:]}")

    def resume(self, name: str, out: Path) -> str:
        """Go on to the end -> what is wrong then, or ''."""
        ended = self.run(name, out, "--resume")
        if ended.code:
            return f"--resume ends with code {ended.code}: {ended.err.strip()[-300:]}"
        return "; ".join(differences(out, self.whole / name))

    # ------------------------------------------------------------------------- kills

    def kill_until_complete(self, name: str, left: int, count: Counter) -> None:
        """Kill a run at most `left` times until it is complete; count: "kills", and how many "inside" a save."""
        out, kills, saves = self.home / "killed", [], 0
        shutil.rmtree(out, ignore_errors=True)
        usual = self.ended[name]
        while len(kills) < left:
            share, number, within = self.rng.random(), self.rng.randint(1, 2), True
            if 3 * count["inside"] > count["kills"]:
                how, within = f"after {share * usual.seconds:.2f} s", False
                child = self.start(name, out, "--resume")
                child.sleep(share * usual.seconds)
                child.kill(signal.SIGKILL)
            elif self.rng.random() < 0.5:
                operation = self.rng.randint(1, max(usual.saves))
                how = f"save {number}, operation {operation}"
                child = self.start(name, out, "--resume", die=(number, operation))
            else:
                how = f"save {number}, {share * 60:.1f} ms in"
                child = self.start(name, out, "--resume")
                child.sleep(PATIENCE, lambda told, number=number: told.count("s") >= number)
                child.sleep(share * 0.06)
                child.kill(signal.SIGKILL)
            ended = child.wait()
            within &= child.told["saves"].count(b"s") > child.told["saves"].count(b"e")
            if ended.code != -signal.SIGKILL:
                if ended.code:
                    self.tell({"kills": name, "wrong": f"code {ended.code}: {ended.err.strip()[-300:]}"})
                break
            kills.append(how)
            saves += within
            count.update(kills=1, inside=int(within))
        wrong = self.resume(name, out)
        self.tell({"kills": name, "moments": kills, "inside a save": saves, "wrong": wrong})

    def kills(self, names: list[str], n: int) -> None:
        count: Counter = Counter()
        for name in itertools.cycle(names):
            if count["kills"] >= n:
                return
            self.kill_until_complete(name, min(n - count["kills"], 6), count)

    # ------------------------------------------------------------------------- signals, disk, clock

    def signals(self, names: list[str]) -> None:
        for name in names:
            for number in (signal.SIGTERM, signal.SIGINT):
                for times in (1, 2):
                    out = self.home / "signalled"
                    shutil.rmtree(out, ignore_errors=True)
                    child, delay = self.start(name, out), self.rng.random()
                    if self.rng.random() < 0.7:  # in the loop: after its first save
                        child.sleep(PATIENCE, lambda told: "e" in told)
                    child.sleep(delay * self.ended[name].seconds / 2)
                    for _ in range(times):
                        child.kill(number)
                        child.sleep(0.02)
                    ended = child.wait()
                    fine = ended.code in (0, 128 + number, -number) and "Traceback" not in ended.err
                    wrong = "" if fine else f"code {ended.code}: {ended.err.strip()[-300:]}"
                    wrong = wrong or self.resume(name, out)
                    self.tell(
                        {
                            "signals": name,
                            "signal": number.name,
                            "times": times,
                            "code": ended.code,
                            "wrong": wrong,
                        }
                    )

    def disk(self, names: list[str]) -> None:
        for name in names:
            largest = max(p.stat().st_size for p in (self.whole / name).rglob("*") if p.is_file())
            for share in (0.0, self.rng.random() ** 3, self.rng.random()):
                out, limit = self.home / "full", int(share * largest)
                shutil.rmtree(out, ignore_errors=True)
                ended = self.run(
                    name,
                    out,
                    before=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                )
                fine = ended.code == 0 or ended.code == 2 and "Traceback" not in ended.err
                wrong = "" if fine else f"code {ended.code}: {ended.err.strip()[-300:]}"
                left = [p.name for p in out.glob(".*step-*")] if out.exists() else []
                wrong = wrong or (f"left behind: {left}" if left else self.resume(name, out))
                self.tell({"disk": name, "bytes per file": limit, "code": ended.code, "wrong": wrong})

    def read_only(self, names: list[str]) -> None:
        """Root may write everywhere: then the child becomes nobody."""
        for name in names:
            out = self.home / "read-only"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(mode=0o555)
            nobody = (lambda: os.setuid(65534)) if os.geteuid() == 0 else (lambda: None)
            ended = self.run(name, out, before=nobody)
            wrong = (
                ""
                if ended.is_one_line and not [*out.iterdir()]
                else f"code {ended.code}: {ended.err.strip()[-300:]}"
            )
            out.chmod(0o755)
            self.tell({"read-only": name, "code": ended.code, "wrong": wrong or self.resume(name, out)})

    def clock(self, names: list[str]) -> None:
        for name in names:
            out, seed = self.home / "clock", self.rng.random()
            shutil.rmtree(out, ignore_errors=True)

            def jump(seed: float = seed) -> None:
                rng, now = random.Random(seed), time.time
                time.time = lambda: now() + rng.uniform(-3e7, 3e7)

            ended = self.run(name, out, before=jump)
            wrong = f"code {ended.code}: {ended.err.strip()[-300:]}" if ended.code else ""
            self.tell({"clock": name, "wrong": wrong or "; ".join(differences(out, self.whole / name))})

    # ------------------------------------------------------------------------- damages

    def commands(self) -> dict[str, tuple[str, str, list]]:
        """name -> (the run whose files are damaged, module, words); results go to home/result."""
        runs, result = self.whole, self.home / "result"
        stage = lambda name: [*self.words(name, result)]
        rm = [
            *SMALL,
            "--batch",
            312,
            "--epochs",
            1,
            "--normalise-samples",
            8,
            "--init",
            runs / "sft",
            "--out",
            result,
        ]
        ppo = [
            *SMALL,
            "--iterations",
            1,
            "--init",
            runs / "sft",
            "--reward-model",
            runs / "rm",
            "--out",
            result,
        ]
        evaluate = ["--run", runs, "--prompts", 4, "--best-of", 2, "--samples", 1, "--results", result]
        return {
            "chat with sft": ("sft", "chat", [runs / "sft"]),
            "chat with ppo": ("ppo", "chat", [runs / "ppo"]),
            "chat with lora": ("lora", "chat", [runs / "lora"]),
            "chat with the base of lora": ("sft", "chat", [runs / "lora"]),
            "export sft": ("sft", "export", ["export", runs / "sft", result]),
            "export rm": ("rm", "export", ["export", "--backbone", runs / "rm", result]),
            "export lora": ("lora", "export", ["export", runs / "lora", result]),
            "train_rm --init": ("sft", "train_rm", rm),
            "train_ppo --init": ("sft", "train_ppo", ppo),
            "train_ppo --reward-model": ("rm", "train_ppo", ppo),
            "train_dpo --init": ("sft", "train_dpo", stage("dpo")),
            "evaluate, policy": ("ppo", "evaluate", evaluate),
            "evaluate, reward model": ("rm", "evaluate", evaluate),
            **{f"{name} --resume": (f"stopped {name}", RUNS[name][0], [*self.words(name, result), "--resume"]) for name in STOPPED},
        }  # fmt: skip

    def damages(self, n: int) -> None:
        commands, expected = self.commands(), {}
        for name in STOPPED:
            out = self.whole / f"stopped {name}"
            ended = self.run(name, out, die=None, before=stop_after_one_save)
            if ended.code not in (130, 143):
                raise SystemExit(f"{name}: {ended.code} {ended.err[-500:]}")
        for _ in range(n):
            label = self.rng.choice([*commands])
            target, module, words = commands[label]
            if label not in expected:
                expected[label] = self.result_of(label, target, module, words, None)
                if expected[label][0].code:
                    raise SystemExit(f"{label}: {expected[label][0].err[-1000:]}")
            folder = (self.whole / target / "latest").resolve()
            file = self.rng.choice(sorted(p.name for p in folder.iterdir()))
            how = self.rng.choice([*DAMAGES])
            change = lambda path, how=how: DAMAGES[how](self.rng, path)
            ended, result = self.result_of(label, target, module, words, (file, change))
            if ended.is_one_line:
                outcome = "refused"
            elif ended.code == 0 and result == expected[label][1]:
                outcome = "harmless"
            elif ended.code == 0:
                outcome = "ACCEPTED, and the result is another"
            else:
                outcome = "NOT ONE LINE"
            wrong = (
                ""
                if outcome in ("refused", "harmless")
                else f"{outcome}: code {ended.code}: {ended.err.strip()[-400:]}"
            )
            self.tell({"damages": label, "file": file, "how": how, "outcome": outcome, "wrong": wrong})

    def result_of(
        self, label: str, target: str, module: str, words: list, damage: tuple | None
    ) -> tuple[Ended, str]:
        """The command's end, and a digest of what came out, with a damage that is undone afterwards."""
        result = self.home / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.unlink(missing_ok=True)
        if target.startswith("stopped "):  # the copy is damaged, resumed and thrown away
            shutil.copytree(self.whole / target, result, symlinks=True)
            folder, kept = (result / "latest").resolve(), None
        else:
            folder = (self.whole / target / "latest").resolve()
            kept = folder.with_name("kept")
        if damage:
            if kept:
                shutil.copytree(folder, kept)
            damage[1](folder / damage[0])
        try:
            line = None if module != "chat" else (lambda: feed(b"The plot is\n"))
            ended = Child(module, words, before=line or (lambda: None)).wait()
        finally:
            if damage and kept:
                shutil.rmtree(folder)
                kept.rename(folder)
        return ended, digest_of(result) if module != "chat" else ended.out


STOPPED = ("sft", "ppo", "dpo")


def stop_after_one_save() -> None:
    """Ask the run to stop once its first checkpoint is written."""
    from minirlhf.support import logs

    log = logs.MetricLogger.log

    def log_and_stop(self: Any, step: int, metrics: dict) -> None:
        log(self, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    logs.MetricLogger.log = log_and_stop


def feed(text: bytes) -> None:
    """Make this the standard input."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdin = os.fdopen(0, "r")


def missing(rng: random.Random, path: Path) -> None:
    path.unlink()


def emptied(rng: random.Random, path: Path) -> None:
    path.write_bytes(b"")


def cut(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))] if content else b"")


def flipped(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zeros(rng: random.Random, path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def a_folder(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def anothers(rng: random.Random, path: Path) -> None:
    """The file of that name of another checkpoint."""
    others = [p for p in path.parents[2].glob(f"*/step-*/{path.name}") if p.parent != path.parent]
    others = [p for p in others if p.read_bytes() != path.read_bytes()]
    path.write_bytes(rng.choice(sorted(others)).read_bytes() if others else b"{}")


DAMAGES = {f.__name__: f for f in (missing, emptied, cut, flipped, zeros, a_folder, anothers)}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# ---------------------------------------------------------------- what must be equal


def history(file: Path) -> list[dict]:
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def plain(document: dict) -> dict:
    """config.json or trainer.json without seconds, paths and what they change: the checksum of a file with seconds."""
    found = {k: v for k, v in document.items() if k not in ("training", "seconds")}
    if isinstance(found.get("results"), dict):
        found["results"] = {k: v for k, v in found["results"].items() if k != "seconds"}
    if isinstance(found.get("inputs"), dict):
        found["inputs"] = {k: v for k, v in found["inputs"].items() if not k.endswith("_path")}
    return found


def differences(out: Path, whole: Path) -> list[str]:
    """In what the run in `out` is not the run in `whole`."""
    found, new, old = [], out / "latest", whole / "latest"
    for name in ("model.safetensors", "trainer.safetensors", "tokenizer.json", "tokenizer.tiktoken"):
        if (new / name).read_bytes() != (old / name).read_bytes():
            found.append(f"{name} differs")
    for folder, other in ((out, whole), (new, old)):
        for name in ("metrics.jsonl", "samples.jsonl"):
            if history(folder / name) != history(other / name):
                found.append(f"{folder.name}/{name} differs")
    for name in ("config.json", "trainer.json"):
        a, b = (plain(json.loads((folder / name).read_text())) for folder in (new, old))
        if a != b:
            found.append(f"{name} differs in {[k for k in {**a, **b} if a.get(k) != b.get(k)]}")
    if left := sorted({p.name for p in out.iterdir()} - {p.name for p in whole.iterdir()}):
        found.append(f"left behind: {left}")
    return found


def digest_of(result: Path) -> str:
    """A digest of a file or folder of results, without seconds."""
    if not result.exists():
        return "nothing"
    digest = hashlib.sha256()
    for path in sorted([result, *result.rglob("*")]):
        if path.is_file() and path.name not in (".lock", "SHA256SUMS"):
            content = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ""):
                content = re.sub(rb'"(time/\w+|seconds|time/seconds)": [0-9.e-]+', b"", content)
            digest.update(str(path.relative_to(result.parent)).encode() + content)
    return digest.hexdigest()


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="Number of SIGKILLs.")
    parser.add_argument("--damages", type=int, default=800, help="Number of damages to checkpoints.")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=[*RUNS], help="The runs that are disturbed."
    )
    parser.add_argument(
        "--only", nargs="+", default=["kills", "signals", "disk", "read_only", "clock", "damages"]
    )
    parser.add_argument("--seed", type=int, default=1, help="Random seed.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/torture.txt", help="File to write."
    )
    args = parser.parse_args(argv)
    for module in ("train_sft", "train_rm", "train_ppo", "train_dpo", *FRONTS.values()):
        importlib.import_module(module)
    began, lines = time.monotonic(), []

    def tell(line: dict) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # for nobody
        torture = Torture(Path(folder).resolve(), args.seed, tell)
        torture.undisturbed(
            [*RUNS] if "damages" in args.only else [name for name in RUNS if needed(name, args.runs)]
        )
        for what in args.only:
            work = getattr(torture, what)
            if what == "damages":
                work(args.damages)
            elif what == "kills":
                work(args.runs, args.kills)
            else:
                work(args.runs)
    wrong = [line for line in lines if line["wrong"]]
    outcomes = Counter(line["outcome"] for line in lines if "outcome" in line)
    total = {
        "kills": sum(len(line.get("moments", ())) for line in lines),
        "kills inside a save": sum(line.get("inside a save", 0) for line in lines),
        "killed runs": sum("moments" in line for line in lines),
        "signals": sum("signals" in line for line in lines),
        "full disks": sum("disk" in line for line in lines),
        "damages": dict(outcomes),
        "wrong": len(wrong),
        "seed": args.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(total))
    args.out.write_text("".join(json.dumps(line) + "\n" for line in [total, *lines]))
    sys.exit(int(bool(wrong)))


def needed(name: str, runs: list[str]) -> bool:
    """Whether a run is disturbed, or one of those starts from it."""
    return name in runs or any(name in map(str, RUNS[run][1]) for run in runs) or name == "sft"


if __name__ == "__main__":
    main()
