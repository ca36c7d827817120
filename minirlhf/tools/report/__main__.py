"""A run on one page, RUN/report.html, with a plot, RUN/reward_kl.png, out of what the stages measured.

    python -m minirlhf.report runs/demo
    python -m minirlhf.report runs/demo --watch                      # live, while the run goes
    python -m minirlhf.report runs/seed-1 runs/seed-2 runs/seed-3    # beside each other: runs/comparison.html

After python -m minirlhf.why RUN the page shows what pushed each token.  A run may come from somebody else:
every file is checked before it is used, and all text stays text.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minirlhf import UserError
from minirlhf.support import cli, files, track
from minirlhf.tools.report import facts, page
from minirlhf.tools.report.follow import Followed
from minirlhf.tools.report.results import load_results, stage_lines

PORT = 8020
Port = cli.Annotated[int, cli.Range(0, 65535)]


def parse() -> argparse.Namespace:
    parser = cli.Parser("python -m minirlhf.report", description="Write report.html and reward_kl.png.")
    parser.add_argument(
        "run",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="Folder of a run, such as runs/demo.  Several are drawn beside each other, on one page.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="File for the page.  Default: RUN/report.html; comparison.html beside the runs where there are "
        "several.",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="Serve the page on this machine alone, and show what is added to the run while it goes.",
    )
    parser.add_argument(
        "--port",
        type=cli.number(Port),
        default=PORT,
        help=f"Port of --watch, {PORT} by default.  0 takes any free one.",
    )
    parser.add_argument(
        "--track", choices=track.TRACKERS, help="Show it in this program, too, beside the metrics of RUN/ppo."
    )
    args = parser.parse_args()
    if len(args.run) > 1 and (args.watch or args.track):
        raise UserError(f"--{'watch' if args.watch else 'track'} takes one run: name one")
    if args.watch and (args.out or args.track):
        raise UserError(f"--watch writes nothing: drop --{'out' if args.out else 'track'}")
    cli.refuse_unread(["--port"], "without --watch", not args.watch)
    return args


def report(run: Path, out: Path | None, tracker: str | None) -> None:
    """Write the page and the plot of one run."""
    from minirlhf.tools.report import plot

    results = load_results(run / "results.json")
    explained = facts.load(run / "why.json")
    followed = Followed(run).update()
    png = plot.draw(results["writers"], followed.metrics["ppo"].rows, results["reward"])
    name = page.name_of(run)
    html = page.page(name, [page.Run(name, followed, results)], explained)
    out = out or run / "report.html"
    files.write_output(out, html.encode("utf-8", "replace"))  # half a surrogate pair becomes ?
    files.write_output(run / "reward_kl.png", png)
    if tracker:
        track.start(tracker, run / "ppo", {}, goes_on=True).report(html, png)
    for stage, number, what, time in stage_lines(results):
        print(f"{stage:22s}{number:>12s}{time:>14s}  {what}")
    print(f"written to {out} and {run}/reward_kl.png")


def compare(folders: list[Path], out: Path | None) -> None:
    """Write one page with the curves of several runs."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError("a run is named twice: name different ones")
    common = Path(os.path.commonpath([folder.parent for folder in whole]))
    runs = []
    for folder, path in zip(folders, whole, strict=True):
        followed = Followed(folder).update()
        if not followed.metrics["ppo"].rows:
            raise UserError(f"{followed.policy}/metrics.jsonl: missing or empty: name the folder of a run")
        there = (folder / "results.json").is_file()
        results = load_results(folder / "results.json") if there else None
        runs.append(page.Run(str(path.relative_to(common)), followed, results))
    out = out or common / "comparison.html"
    title = ", ".join(run.name for run in runs)
    files.write_output(out, page.page(title, runs).encode("utf-8", "replace"))
    print(f"written to {out}")


def main() -> None:
    args = parse()
    if args.watch:
        from minirlhf.tools.report import watch

        watch.serve(args.run[0], args.port)
    elif len(args.run) > 1:
        compare(args.run, args.out)
    else:
        report(args.run[0], args.out, args.track)


if __name__ == "__main__":
    cli.run_script(main)
