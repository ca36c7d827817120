"""What benchmarks beside a peer share: a measurement is a process of its own, all take turns, tables come from raw JSON."""

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
PEER = "benchmarks/peers/requirements.txt"


def child(python: str, script: str, job: dict) -> dict:
    """The last line of JSON that a process prints.  PYTHONPATH stays here: packages of ours are none of the peer's."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, ROOT / script, "--job", json.dumps(job)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(threads: int) -> dict:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
    }


def parser(description: str, results: Path, rounds: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--peer-python", help=f"the python of an environment with {PEER}; left out: ours alone")
    made.add_argument("--rounds", type=int, default=rounds, help="processes of each")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    made.add_argument(
        "--tables", action="store_true", help="only print the table of the results that are there"
    )
    made.add_argument("--out", type=Path, default=results, help="raw results (default: %(default)s)")
    made.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return made


def collect(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], run: Callable
) -> dict:
    """The raw results that are there, with those of `names` measured anew by run(args, name), unless only tables are asked for;
    written after each."""
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in [] if args.tables else names:
        known |= {name: run(args, name), "machine": machine(args.threads)}
        args.out.write_text(json.dumps(known, indent=1))
    if not known:
        parser.error(f"{args.out}: no results yet: run without --tables first")
    return known


def conclude(text: str, missed: list[str], check: bool) -> None:
    """The table alone goes to standard output, as the README has it."""
    print(text)
    for what in missed:
        print(f"missed: {what}", file=sys.stderr)
    if check and missed:
        sys.exit(1)
