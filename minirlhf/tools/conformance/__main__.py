"""Is this right? Ask our properties of anyone's RLHF function.

    python -m minirlhf.conformance minirlhf.ppo:kl_estimates --as kl
    python -m minirlhf.conformance mypackage.module:function --as policy_loss --rename old_logprobs=logprobs
    python -m minirlhf.conformance --list

One line per property: holds; FAILS, with the smallest example that was found, what came, what is right, what
that does to training and where it was seen; or -, and why it was not asked. A property has the number of a
pitfall (P) or of a detail (D). The function is called by name with float64 tensors on the CPU, [B, R] unless
said otherwise; masks are bool, True = counts. Exit code: 0; 1 if a property fails; 2 for a wrong command.

Signatures (KIND). What follows the mask may be missing, and then is not asked:

"""

from __future__ import annotations

import argparse
import ast
import importlib
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any

from minirlhf import UserError
from minirlhf.support import cli
from minirlhf.support.text import one_line
from minirlhf.tools.conformance.kinds import KINDS, PROPERTIES
from minirlhf.tools.conformance.subject import Subject, check

__doc__ += "\n".join(f"  {name:18}{kind.about}" for name, kind in KINDS.items())
OUTPUTS = ("mean", "sum", "tensor", "k1", "k2", "k3")


def find(target: str) -> Callable[..., Any]:
    """The function that package.module:function names; the current folder counts."""
    module, _, path = target.partition(":")
    if not module or not path:
        raise UserError(f"{one_line(target, 60)}: want package.module:function")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it loads
        reason = one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise UserError(f"cannot import {one_line(module, 60)}: {reason}; is it on PYTHONPATH?") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise UserError(f"{module} has no {one_line(path, 60)}: check the spelling")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"{target} is no function")
    return found


def pairs(words: list[str], option: str) -> dict[str, str]:
    """{left: right} of the words left=right."""
    for word in words:
        if not all(part.strip() for part in word.partition("=")):
            raise UserError(f"{option} {one_line(word, 60)}: want NAME=VALUE")
    return {left: right for left, _, right in (word.partition("=") for word in words)}


def value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def table() -> str:
    """Every property, by kind, as a table of Markdown."""
    rows = ["| KIND | | property | where it does not hold | seen in |", "|---|---|---|---|---|"]
    for kind, asked in PROPERTIES.items():
        rows += [f"| `{kind}` | {p.number} | {p.title} | {p.consequence} | {p.seen} |" for p in asked]
    return "\n".join(row.replace("||", "\\|\\|") for row in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m minirlhf.conformance", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("target", nargs="?", metavar="module:function", help="function to ask")
    add("--as", dest="kind", choices=KINDS, metavar="KIND", help="what it is: one of the names above")
    add("--rename", action="append", default=[], metavar="THEIRS=OURS",
        help="its parameter THEIRS is OURS of the signature above; clip_range.low and clip_range.high are the "
        "two halves of clip_range; may be given several times")  # fmt: skip
    add("--set", action="append", default=[], metavar="THEIRS=VALUE",
        help="give its parameter THEIRS this number or word in every call; may be given several times")  # fmt: skip
    add("--mask", choices=["bool", "float", "inverted", "inverted-float"], default="bool",
        help="what it takes for a mask; inverted: True = padding (default: bool, True = counts)")  # fmt: skip
    add("--output", action="append", default=[], metavar="WHAT",
        help="what it returns: tuple:N or key:NAME picks a part; mean (default), sum over tokens or tensor "
        "[B, R] tells a loss; k1, k2 or k3 a KL; may be given several times")  # fmt: skip
    add("--accept", action="append", default=[], metavar="NUMBER",
        help="where properties of this number fail, such as P9, it is meant: exit code 0; may be given several "
        "times")  # fmt: skip
    add("--seed", type=cli.number(cli.Seed), help="seed of the random examples (default: a new one, printed)")
    add("--list", action="store_true", help="print every property as a table, and ask nothing")
    args = parser.parse_args(argv)
    if not args.list and not (args.target and args.kind):
        raise UserError(f"want module:function and --as KIND, one of {', '.join(KINDS)}")
    for word in args.output:
        if word not in OUTPUTS and word.partition(":")[0] not in ("tuple", "key"):
            raise UserError(
                f"--output {one_line(word, 40)}: want tuple:N, key:NAME or one of {', '.join(OUTPUTS)}"
            )
    numbers = {asked.number for properties in PROPERTIES.values() for asked in properties}
    for number in args.accept:
        if number not in numbers:
            raise UserError(f"--accept {one_line(number, 40)}: no property has this number; see --list")
    return args


def ask(subject: Subject, kind: str, accepted: Sequence[str] = ()) -> dict[str, int]:
    """Ask every property of a kind, print what is found, and return how many hold, fail and so on."""
    print(f"{subject.name} as {kind}, seed {subject.seed}", flush=True)
    count = dict.fromkeys(("holds", "FAILS", "differs", "-"), 0)
    for asked in PROPERTIES[kind]:
        outcome = check(subject, asked, accepted=asked.number in accepted)
        count[outcome.status] += 1
        print(outcome, flush=True)
    told = f"{count['holds']} hold, {count['FAILS']} fail, {count['-']} not asked"
    print(told + (f", {count['differs']} accepted" if count["differs"] else ""))
    return count


def main() -> None:
    args = parse()
    if args.list:
        print(table())
        return
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    fixed = {name: value(text) for name, text in pairs(args.set, "--set").items()}
    subject = Subject(find(args.target), KINDS[args.kind], pairs(args.rename, "--rename"), fixed, args.mask,
        tuple(args.output), seed, args.target)  # fmt: skip
    count = ask(subject, args.kind, args.accept)
    sys.exit(1 if count["FAILS"] else 0)


if __name__ == "__main__":
    cli.run_script(main)
