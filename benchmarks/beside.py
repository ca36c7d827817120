"""What the benchmarks against other libraries share: each measurement is a process of its own, processes take turns, and
tables are printed from raw JSON."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.support import cli  # noqa: E402

PEER = "benchmarks/peers/requirements.txt"
PEER_116 = "benchmarks/peers/requirements-1.16.txt"


def child(python: str, script: str, job: dict) -> dict:
    """The last line that the process prints, which is JSON.  It does not inherit PYTHONPATH: the peer's environment has its
    own packages."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, ROOT / script, "--job", json.dumps(job)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quietly(script: str, *options: object) -> int:
    """Run a script of the repository as a process of its own, without its output; its peak memory in bytes."""
    words = [sys.executable, ROOT / script, *map(str, options)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    told = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} {' '.join(map(str, options))}\n{told[-2000:]}")
    return used.ru_maxrss * 1024


def machine(threads: int) -> dict:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
    }


def parser(description: str, results: Path, rounds: int, peer: str = PEER) -> argparse.ArgumentParser:
    made = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--peer-python",
        help=f"Python of an environment with {peer} installed. Left out, only minirlhf is measured.",
    )
    made.add_argument(
        "--rounds", type=cli.number(cli.Count), default=rounds, help="Number of processes per variant."
    )
    made.add_argument("--threads", type=cli.number(cli.Count), default=2, help="Threads per process.")
    made.add_argument("--check", action="store_true", help="Exit with 1 if a ratio is below its bound.")
    made.add_argument(
        "--tables", action="store_true", help="Measure nothing, and print the table of the results file."
    )
    made.add_argument(
        "--out", type=Path, default=results, help="File of the raw results (default: %(default)s)."
    )
    made.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return made


def collect(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], run: Callable
) -> dict:
    """The raw results of args.out, by name.  Unless --tables is given, run(args, name) measures each of `names` anew, and the
    file is written after each."""
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in [] if args.tables else names:
        known |= {name: run(args, name), "machine": machine(args.threads)}
        args.out.write_text(json.dumps(known, indent=1))
    if not known:
        parser.error(f"{args.out}: no results yet: run without --tables first")
    return known


def conclude(text: str, missed: list[str], check: bool) -> None:
    """Print the table to standard output, as docs/speed.md has it, and with --check what is below its bound to standard error."""
    print(text)
    if not check:
        return
    for what in missed:
        print(f"below its bound: {what}", file=sys.stderr)
    sys.exit(1 if missed else 0)
