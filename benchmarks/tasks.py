"""A task from its data to its table: what the SFT model can do, and what it can do after practice.

    python benchmarks/tasks.py arithmetic --seeds 1 2 3   # sums from scratch, rewarded for the right number
    python benchmarks/tasks.py words --seeds 1 2 3        # word problems, SmolLM2, for the number
    python benchmarks/tasks.py code --seeds 1 2 3         # one-line functions from scratch, rewarded by their tests
    python benchmarks/tasks.py interface --seeds 1 2 3    # interface texts from scratch, rewarded by chrF
    python benchmarks/tasks.py instructions --data testset-v1.json --seeds 1 2 3     # reads data of others
    python benchmarks/tasks.py safety --data test.jsonl.gz --seeds 1 2 3             # reads data of others
    python benchmarks/tasks.py arithmetic --smoke         # seconds, to see that it runs; writes no results
    python benchmarks/tasks.py arithmetic --tables        # trains nothing: prints the tables of the committed results

Each recipe is a file in benchmarks/recipes/, and docs/tasks.md has a section for it.  Writes runs/tasks/NAME-SEED and
benchmarks/results/tasks_NAME.json, after each seed.  Finished stages are not run again.
"""

import argparse
import importlib
import json
import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.beside import machine  # noqa: E402
from minirlhf.support import cli  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402

RECIPES = sorted(
    file.stem
    for file in (ROOT / "benchmarks/recipes").glob("*.py")
    if file.stem not in ("__init__", "assistant", "common", "frozen", "judged")
)


def results_of(name: str) -> Path:
    return ROOT / f"benchmarks/results/tasks_{name}.json"


def known_results(target: Path) -> dict:
    return json.loads(target.read_text()) if target.exists() else {"seeds": {}}


def peak_memory() -> float:
    """The peak memory of this process and of its largest stage, together, in GB: those of all seeds so far."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return round(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024 / 1e9, 2)  # KiB on Linux


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("name", choices=RECIPES, help="The task.")
    add("--seeds", type=cli.number(cli.Seed), nargs="+", default=[1], help="Seeds to run (%(default)s).")
    add("--home", type=Path, default=ROOT / "runs/tasks", help="Folder of the runs (%(default)s).")
    add("--smoke", action="store_true", help="Run everything on next to nothing, and write no results.")
    add(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="Files that the recipe reads, as docs/tasks.md names them.",
    )
    add("--tables", action="store_true", help="Train nothing: print the tables of the committed results.")
    args = parser.parse_args()
    recipe = importlib.import_module(f"benchmarks.recipes.{args.name}")
    wanted = [] if args.tables or args.smoke else getattr(recipe, "DATA", [])
    if len(args.data) != len(wanted):
        needs = "; ".join(wanted) or "no file here"
        parser.error(f"--data: {args.name} needs {needs}: see docs/tasks.md")
    target = results_of(args.name)
    known = known_results(target)
    if args.tables and not known["seeds"]:
        parser.error(f"{target}: no results yet: run without --tables first")
    home = args.home.resolve()
    if args.smoke:
        known = {"seeds": {}}
    for seed in [] if args.tables else args.seeds:
        here = home / f"{args.name}-{'smoke' if args.smoke else seed}"
        files = recipe.made_up(here) if args.smoke and hasattr(recipe, "DATA") else args.data
        found = recipe.run(here, seed, args.smoke, *files) | {"peak, GB": peak_memory()}
        if not args.smoke:  # another process may have added a seed
            known = known_results(target)
        known["seeds"] = dict(sorted((known["seeds"] | {str(seed): found}).items()))
        known["machine"] = machine(int(os.environ.get("OMP_NUM_THREADS", 2)))
        if not args.smoke:
            write_atomically(target, json.dumps(known, indent=1))
    print("\n" + "\n\n".join(recipe.tables(known)))


if __name__ == "__main__":
    cli.run_script(main)
