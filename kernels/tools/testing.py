"""Try to break a kernel: ask every property in properties.py of any function with an op's signature.

    python -m kernels.testing package.module:function [--op OP] [--device cpu|cuda] [--seed S]

It prints one line per property: pass; FAIL, with the smallest failing example that hypothesis finds; or -,
and why the property was not asked. The function takes the op's tensors by position and its options
(temperature, mask, ...) by name. It may lack options, and the later results; properties that need them are
not asked. Under TRITON_INTERPRET=1 Triton code runs without a GPU. Exit code: 0; 1 if a property failed; 2
for a wrong command. As a library:

    from kernels.testing import Subject, check
    print(check(Subject(function, "token_logprobs"), "agrees_with_float64"))
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.advantages import gae_reference
from kernels.kl import token_kl_reference
from kernels.linear_logprobs import linear_token_logprobs_reference
from kernels.logprobs import token_logprobs_reference

try:
    import hypothesis
except ImportError as missing:
    needs = "kernels.testing draws its examples with hypothesis: pip install hypothesis"
    if __name__ != "__main__":
        raise ImportError(needs) from missing
    print(needs, file=sys.stderr)
    sys.exit(2)

from .command import Mistake, Parser, describe, find, run, whole_number
from .properties import PROPERTIES, NotAsked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = 5 if INTERPRETED else 40  # the interpreter takes about 3 ms for each block of each row


@dataclass(frozen=True)
class Op:
    reference: Callable[..., Any]
    inputs: tuple[str, ...]  # floating point; `tokens` follows them, except for gae
    results: tuple[str, ...]
    options: tuple[str, ...]


TOKENS = ("temperature", "mask")
STEPS = ("mask", "dones", "last_values", "gamma", "lam")
OPS = {
    "token_logprobs": Op(token_logprobs_reference, ("logits",), ("logprobs", "entropy"), TOKENS),
    "token_kl": Op(
        token_kl_reference, ("logits", "ref_logits"), ("logprobs", "ref_logprobs", "entropy", "kl"), TOKENS
    ),
    "linear_token_logprobs": Op(
        linear_token_logprobs_reference, ("hidden", "weight"), ("logprobs", "entropy"), TOKENS
    ),
    "gae": Op(gae_reference, ("rewards", "values"), ("advantages", "returns"), STEPS),
}
GUESSES = {
    "gae|advantage": "gae",
    "linear": "linear_token_logprobs",
    "kl": "token_kl",
    "log_?(p|softmax)": "token_logprobs",
}


class Subject:
    """A function as the properties see it.

    Called with tensors of any device, it returns the function's results by name, and the gradients of its
    inputs ("d logits") if upstream gradients are given. `can` holds the names of its options, results and
    abilities.
    """

    def __init__(
        self, function: Callable[..., Any], op: str, device: str = "cpu", exact: bool = False
    ) -> None:
        self.function, self.op, self.device, self.exact = function, op, torch.device(device), exact
        self.inputs, self.results, self.interpreted = OPS[op].inputs, OPS[op].results, INTERPRETED
        self.can = self._options()
        self._try()
        self.oracle = self if exact else Subject(OPS[op].reference, op, exact=True)

    def _options(self) -> set[str]:
        """The op's options that the signature has. Raises Mistake for other parameters without a default."""
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # not written in Python, so its parameters are not known
            return {*OPS[self.op].options}
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return {*OPS[self.op].options}
        others = parameters[len(self.inputs) + (self.op != "gae") :]
        missing = [
            p.name
            for p in others
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if missing:
            raise Mistake(f"{self.op} gives no {', '.join(missing)}: wrap the function in one without it")
        return {p.name for p in others} & {*OPS[self.op].options}

    def _try(self) -> None:
        """Call the function with two rows of three numbers; add its results and abilities to `can`."""
        x = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], device=self.device)
        rest = [] if self.op == "gae" else [torch.tensor([0, 1], device=self.device)]
        shape = tuple((rest or [x])[0].shape)

        def call(x: Tensor) -> list[Tensor]:
            out = self.function(*(x.clone().requires_grad_() for _ in self.inputs), *rest)
            return list(out) if isinstance(out, tuple | list) else [out]

        try:
            out = call(x)
        except Exception as error:
            hint = (
                ""
                if INTERPRETED or self.device.type == "cuda"
                else " (Triton needs --device cuda or TRITON_INTERPRET=1)"
            )
            call_of = f"called as {self.op} with two rows of three numbers, it fails"
            raise Mistake(f"{call_of}: {describe(error)}{hint}") from error
        found = [tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__ for y in out]
        if found != [shape] * len(out) or len(out) > len(self.results):
            want = f"{', '.join(self.results)}, each {shape}"
            call_of = f"called as {self.op} with two rows of three numbers"
            raise Mistake(f"{call_of}, it should return {want}, not {found}: another --op?")
        self.results = self.results[: len(out)]
        self.can |= {*self.results}
        if any(y.requires_grad for y in out):
            self.can.add("gradient")
        if self._blocks():
            self.can.add("block sizes")
        for dtype, kept, ability in (
            (torch.float64, torch.float64, "float64"),
            (torch.bfloat16, torch.float32, "16 bits"),
        ):
            with contextlib.suppress(Exception):
                if all(y.dtype == kept for y in call(x.to(dtype))):
                    self.can.add(ability)

    def _blocks(self) -> list[tuple[dict[str, Any], str]]:
        """Block sizes: integers so named in the function's module, and in what it imports of its package."""
        module = getattr(self.function, "__module__", None) or ""
        names = {module} | {
            getattr(x, "__module__", None) or "" for x in vars(sys.modules.get(module, argparse)).values()
        }
        package = [
            vars(sys.modules[n])
            for n in sorted(names)
            if n.split(".")[0] == module.split(".")[0] and n in sys.modules
        ]
        named = re.compile(r"(\w+_)?(LANES|BLOCK|CHUNK|TILE|STRIDE)(_\w+)?")
        return [
            (space, key)
            for space in package
            for key, x in space.items()
            if type(x) is int and named.fullmatch(key)
        ]

    @contextlib.contextmanager
    def smaller_blocks(self, halvings: int) -> Iterator[None]:
        sizes = [(space, key, space[key]) for space, key in self._blocks()]
        try:
            for space, key, size in sizes:
                space[key] = min(size, max(32, size >> halvings))
            yield
        finally:
            for space, key, size in sizes:
                space[key] = size

    def takes(self, **options: Any) -> dict[str, Any]:
        """The given options that the function has."""
        return {name: value for name, value in options.items() if name in self.can and value is not None}

    def _here(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(self.device, torch.float64) if self.exact and x.is_floating_point() else x.to(self.device)

    def __call__(
        self, *tensors: Tensor, upstream: dict[str, Tensor] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        leaves = [self._here(x) for x in tensors]
        if upstream is not None:  # detach() keeps strides and addresses, which clone() would not
            leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in leaves]
        out = self.function(*leaves, **{name: self._here(x) for name, x in options.items()})
        out = dict(zip(self.results, out if isinstance(out, tuple | list) else (out,), strict=True))
        if upstream is None:
            return out
        pairs = [
            (out[name], u.to(out[name]))
            for name, u in upstream.items()
            if name in out and out[name].requires_grad
        ]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        grads = {
            f"d {name}": x * 0 if x.grad is None else x.grad
            for name, x in zip(self.inputs, leaves, strict=False)
        }
        return {name: x.detach() for name, x in (out | grads).items()}


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # pass, FAIL or -
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name}{': ' if self.detail else ''}{self.detail}"


def check(
    subject: Subject, name: str, max_examples: int = EXAMPLES, seed: int = 0, shrink: bool = True
) -> Outcome:
    """Ask one property. A failure's detail is its message and the smallest example found."""
    asked, op = PROPERTIES[subject.op][name], OPS[subject.op]
    for need in asked.needs:
        if need not in subject.can:
            kind = "parameter " if need in op.options else "result " if need in op.results else ""
            return Outcome(name, "-", f"not asked: no {kind}{need}")
    last: tuple[dict[str, Any], BaseException] | None = None

    def run(**drawn: Any) -> None:
        nonlocal last
        try:
            asked.check(subject, **drawn)
        except Exception as error:
            last = drawn, error  # hypothesis runs the smallest example last
            raise

    if asked.draws:
        options = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
        options |= {
            "verbosity": hypothesis.Verbosity.quiet,
            "report_multiple_bugs": False,
            "print_blob": False,
        }
        options |= {"max_examples": min(max_examples, asked.most)}
        options |= {"phases": [hypothesis.Phase.generate, hypothesis.Phase.shrink][: 1 + shrink]}
        run = hypothesis.seed(seed)(hypothesis.settings(**options)(hypothesis.given(**asked.draws)(run)))
    try:
        run()
    except NotAsked as reason:
        return Outcome(name, "-", f"not asked: {reason}")
    except Exception as error:
        drawn, cause = last or ({}, error)
        sometimes = "only sometimes: " if isinstance(error, hypothesis.errors.Flaky) else ""
        smallest = f"; smallest: {', '.join(f'{k}={v!r}' for k, v in drawn.items())}" if drawn else ""
        return Outcome(name, "FAIL", sometimes + describe(cause) + smallest)
    return Outcome(name, "pass")


def find_function(target: str) -> Callable[..., Any]:
    function = find(target, "function")
    if not callable(function):
        raise Mistake(f"{target} is of type {type(function).__name__}: name a function")
    return function


def guess(target: str) -> str:
    for pattern, op in GUESSES.items():
        if re.search(pattern, target.partition(":")[2].lower()):
            return op
    raise Mistake(f"the name does not say which op {target} is: add --op {'|'.join(OPS)}")


def ask(argv: list[str] | None) -> int:
    """Print one line per property, and return the exit code. Raises Mistake."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m kernels.testing", description=__doc__, formatter_class=formatter)
    add, most = parser.add_argument, 2**31 - 1
    add("target", metavar="package.module:function", help="function to test")
    add("--op", help=f"operation that it implements: {', '.join(OPS)} (default: guessed from its name)")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="device of its tensors (default: %(default)s)",
    )
    add(
        "--max-examples",
        type=whole_number(1, most),
        default=EXAMPLES,
        metavar="N",
        help="most examples per property, at least 1 (default: %(default)s)",
    )
    add(
        "--seed",
        type=whole_number(0, most),
        default=0,
        help="seed of the examples, 0 or larger (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if INTERPRETED and importlib.util.find_spec("triton"):
        importlib.import_module("kernels.tools.interpreter").repair()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("torch sees no GPU: leave --device out, and set TRITON_INTERPRET=1 for Triton code")
    function, op = find_function(args.target), args.op or guess(args.target)
    if op not in OPS:
        raise Mistake(f"there is no op {op}: choose from {', '.join(OPS)}")
    subject = Subject(function, op, args.device)
    where = f"{args.device}{' (interpreter)' if INTERPRETED else ''}"
    limits = f"at most {args.max_examples} examples per property, seed {args.seed}"
    print(f"{args.target} as {op} on {where}: {limits}", flush=True)
    start, count = time.perf_counter(), {"pass": 0, "FAIL": 0, "-": 0}
    for name in PROPERTIES[op]:
        outcome = check(subject, name, args.max_examples, args.seed)
        count[outcome.status] += 1
        print(outcome, flush=True)
    seconds = time.perf_counter() - start
    print(f"{count['pass']} passed, {count['FAIL']} failed, {count['-']} not asked ({seconds:.1f} s)")
    return 1 if count["FAIL"] else 0


def main(argv: list[str] | None = None) -> int:
    return run("kernels.testing", lambda: ask(argv))


if __name__ == "__main__":
    sys.exit(main())
