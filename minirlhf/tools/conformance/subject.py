"""A function under test as the properties see it: called by our names, whatever its own signature is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minirlhf import UserError
from minirlhf.support.text import one_line

MASKS = ("mask", "response_mask")
SIZES = (
    (1, 1),
    (1, 2),
    (2, 2),
    (2, 3),
    (3, 5),
    (4, 8),
)  # of random examples, so that the first to fail is small
ESTIMATORS = ("k1", "k2", "k3")


class Broken(Exception):
    """A property that does not hold: Broken(example, got, right)."""


class NotAsked(Exception):
    """The function cannot be asked a property, and why."""


@dataclass(frozen=True)
class Kind:
    """A function that RLHF needs, by its signature."""

    about: str  # one line of --help
    inputs: tuple[str, ...]  # what every such function takes; masks may be missing
    # What it may lack: then only this value is asked, or any (...). None: the value is left out of the call.
    neutral: dict[str, Any] = field(default_factory=dict)
    returns: str = "tensor"  # "loss": a mean over tokens; "estimates": k1, k2, k3; "pair": two tensors
    first: Callable[[], dict[str, Any]] = dict  # arguments of the first call, which tells a wrong signature


@dataclass(frozen=True)
class Property:
    """What must hold of every function of a kind."""

    number: str  # P1..P30 of docs/conformance.md, or D1.. of docs/details.md
    title: str
    check: Callable[[Subject], str | None]  # raises Broken or NotAsked; may return a remark
    consequence: str  # what training does where it does not hold
    seen: str = ""  # public projects that had it, most of them repaired since
    choice: str = ""  # why a function may differ on purpose


@dataclass(frozen=True)
class Outcome:
    """What one property found: `holds`, `FAILS`, `differs` (accepted by the user) or `-` (not asked)."""

    asked: Property
    status: str
    remark: str = ""
    lines: tuple[tuple[str, str], ...] = ()  # of a failure: example, got, right, effect, seen in, choice

    def __str__(self) -> str:
        head = f"{self.status:7} {self.asked.number:4} {self.asked.title}"
        head += f": {self.remark}" if self.remark else ""
        return "\n".join([head, *(f"{'':13}{name:9}{text}" for name, text in self.lines)])


class Subject:
    """Calls `function` by our names. Its own names, masks and results are adapted as the user said.

    `rename` maps the function's names to ours, and `fixed` its names to values. `mask` is one of bool, float,
    inverted, inverted-float. `output` says what it returns: tuple:N or key:NAME, then mean, sum or tensor of
    a loss, or k1, k2, k3 of a KL.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        kind: Kind,
        rename: dict[str, str] | None = None,
        fixed: dict[str, Any] | None = None,
        mask: str = "bool",
        output: tuple[str, ...] = (),
        seed: int = 0,
        name: str = "the function",
    ):
        self.function, self.kind, self.name = function, kind, name
        self.rename, self.fixed, self.mask, self.output, self.seed = (
            rename or {},
            fixed or {},
            mask,
            output,
            seed,
        )
        self.required: set[str] = set()  # its parameters without a default
        self.takes = self._parameters()
        self._try()

    def _parameters(self) -> dict[str, str] | None:
        """{our name: its name} of what the function takes; None where its signature says nothing."""
        ours = {*self.kind.inputs, *self.kind.neutral}
        ours |= {f"clip_range.{side}" for side in ("low", "high") if "clip_range" in ours}
        unknown = [name for name in self.rename.values() if name not in ours]
        if unknown:
            raise UserError(f"--rename to {unknown[0]}: our names are {', '.join(sorted(ours))}")
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = [p.name for p in named]
        any_name = any(p.kind == p.VAR_KEYWORD for p in parameters)
        for name in (*self.rename, *self.fixed):
            if name not in names and not any_name:
                raise UserError(
                    f"{self.name} has no parameter {one_line(name, 40)}; it has {', '.join(names)}"
                )
        takes = {self.rename.get(name, name): name for name in names}
        takes |= {ours: theirs for theirs, ours in self.rename.items()}
        missing = [name for name in self.kind.inputs if name not in takes and name not in MASKS]
        if missing and not any_name:
            told = f"it has {', '.join(names)}" if names else "it has none"
            raise UserError(
                f"{self.name} has no parameter {missing[0]} ({told}): add --rename THEIRS={missing[0]}"
            )
        self.required = {p.name for p in named if p.default is p.empty}
        for p in named:
            if (
                p.default is p.empty
                and self.rename.get(p.name, p.name) not in ours
                and p.name not in self.fixed
            ):
                names = ", ".join(name for name in sorted(ours) if name not in takes)
                remedy = f"--set {p.name}=VALUE" + (
                    f", or --rename {p.name}= one of {names}" if names else ""
                )
                raise UserError(f"{self.name} needs {p.name}, which is none of our names: add {remedy}")
        return None if any_name else {k: v for k, v in takes.items() if v not in self.fixed}

    def _try(self) -> None:
        """The first call: what goes wrong here is a wrong signature, and no property."""
        try:
            self(**self.kind.first())
        except NotAsked:
            pass
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            reason = one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise UserError(f"called for the first time, {self.name} fails: {reason}") from error

    def has(self, name: str) -> bool:
        """Whether the function takes an argument of ours."""
        return self.takes is None or name in self.takes or f"{name}.high" in self.takes

    def __call__(self, **given: Any) -> Any:
        """The function's result: a scalar, a tensor, a pair, or a dict of estimates, by its kind.

        Raises NotAsked where an argument matters and the function does not take it.
        """
        usual = {
            name: value
            for name, value in self.kind.neutral.items()
            if value not in (None, ...) and self.has(name)
        }
        arguments, given = {}, usual | given
        summed = {"sum", "tensor"} & {*self.output}  # then we divide, and the function need not know by what
        mask, total, weights = (given.get(name) for name in ("response_mask", "denominator", "weights"))
        if "denominator" in self.required and total is None and mask is not None:
            given["denominator"] = mask.sum()
        if summed and self.kind.returns == "loss":
            given.pop("denominator", None)
            if "tensor" in self.output:
                given.pop("weights", None)
        if self.takes and "clip_range" not in self.takes and self.has("clip_range") and "clip_range" in given:
            clip = given.pop("clip_range")
            given["clip_range.low"], given["clip_range.high"] = (
                clip if isinstance(clip, tuple) else (clip, clip)
            )
        for ours, value in given.items():
            theirs = ours if self.takes is None else self.takes.get(ours)
            if self.takes is None:
                theirs = next((t for t, o in self.rename.items() if o == ours), ours)
            if theirs is None:
                if not self._is_neutral(ours, value, given):
                    raise NotAsked(f"it takes no {ours}")
            elif theirs not in self.fixed and (
                value is not None or theirs in self.required or ours == "clip_range_value"
            ):
                arguments[theirs] = self._masked(value) if ours in MASKS else value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._read(self.function(**arguments, **self.fixed), mask, total, weights)

    def _is_neutral(self, ours: str, value: Any, given: dict[str, Any]) -> bool:
        if ours in MASKS:
            return bool(value.all())
        if ours == "group":
            return value == len(given["rewards"])
        return ours in self.kind.neutral and self.kind.neutral[ours] in (..., value)

    def _masked(self, mask: Tensor) -> Tensor:
        mask = ~mask if self.mask.startswith("inverted") else mask
        return mask.double() if self.mask.endswith("float") else mask

    def _read(self, out: Any, mask: Tensor | None, total: Any, weights: Tensor | None) -> Any:
        for word in self.output:
            place, _, key = word.partition(":")
            try:
                out = out[int(key)] if place == "tuple" else out[key] if place == "key" else out
            except (IndexError, KeyError, TypeError, ValueError):
                raise UserError(
                    f"--output {word}: there is no such part in what {self.name} returns"
                ) from None
        returns = self.kind.returns
        if returns == "estimates":
            one = next((word for word in self.output if word in ESTIMATORS), None)
            out = (
                {one: out}
                if one
                else dict(zip(ESTIMATORS, out, strict=False))
                if isinstance(out, tuple | list)
                else out
            )
            if not isinstance(out, dict):
                raise UserError(
                    f"{self.name} returns no tuple of k1, k2 and k3: say which one, as --output k3"
                )
            return out
        if returns == "pair":
            return tuple(out[:2]) if isinstance(out, tuple | list) else (out, None)
        if isinstance(out, tuple | list):
            out = out[0]  # (loss, statistics)
        if not isinstance(out, Tensor):
            if returns == "number":
                return out
            raise UserError(
                f"{self.name} returns a {type(out).__name__}: choose a part by --output tuple:N or key:NAME"
            )
        if returns == "loss":
            out = self._mean(out, mask, total, weights)
        return out

    def _mean(self, out: Tensor, mask: Tensor | None, total: Any, weights: Tensor | None) -> Tensor:
        """The mean over tokens that a summed loss, or losses of tokens, come to."""
        if "tensor" in self.output:
            out = out if weights is None else out * weights
            out = out if mask is None else torch.where(mask, out, 0.0)
            out = out.sum()
        if out.numel() != 1:
            raise UserError(f"{self.name} returns a tensor of shape {tuple(out.shape)}: add --output tensor")
        if {"sum", "tensor"} & {*self.output}:
            out = out / (total if total is not None else 1 if mask is None else mask.sum().clamp(min=1))
        return out.reshape(())

    def gradient(self, of: str, **given: Any) -> tuple[Tensor, Tensor]:
        """(loss, its gradient) in one argument."""
        leaf = given[of].detach().clone().requires_grad_()
        loss = self(**given | {of: leaf})
        if not loss.requires_grad:
            return loss, torch.zeros_like(leaf)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return loss.detach(), torch.zeros_like(leaf) if grad is None else grad

    def cases(self) -> Iterator[tuple[torch.Generator, int, int]]:
        """(generator, B, R) of random examples, the smallest first."""
        generator = torch.Generator().manual_seed(self.seed)
        for B, R in SIZES:
            for _ in range(3):
                yield generator, B, R


def check(subject: Subject, asked: Property, accepted: bool = False) -> Outcome:
    """Ask one property."""
    try:
        return Outcome(asked, "holds", asked.check(subject) or "")
    except NotAsked as reason:
        return Outcome(asked, "-", str(reason))
    except Broken as broken:
        example, got, right = broken.args
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        example, right = "a valid call", "no exception"
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = {"example": example, "got": got, "right": right, "effect": asked.consequence}
    lines |= {"seen in": asked.seen, "choice": asked.choice}
    shown = tuple((name, one_line(text, 300)) for name, text in lines.items() if text)
    return Outcome(asked, "differs" if accepted else "FAILS", "accepted" if accepted else "", shown)


def shown(x: Any) -> str:
    """A number or tensor in a few characters: 6 digits, no spaces that say nothing."""
    if isinstance(x, Tensor):
        x = x.detach().tolist()
    if isinstance(x, bool | str):
        return str(x)
    if isinstance(x, float | int):
        return f"{x:.6g}"
    if isinstance(x, dict):
        return ", ".join(f"{name} {shown(value)}" for name, value in x.items())
    return f"[{', '.join(map(shown, x))}]"


def same(
    example: str | dict[str, Any], got: Any, right: Any, tolerance: float = 2e-6, hint: str = ""
) -> None:
    """Require numbers within `tolerance` times max(1, |right|), or raise Broken. `hint` explains `got`."""
    got = got.detach().double() if isinstance(got, Tensor) else torch.tensor(float(got), dtype=torch.float64)
    right = torch.as_tensor(right, dtype=torch.float64)
    if got.shape != right.shape:
        raise Broken(told(example), f"shape {tuple(got.shape)}", f"shape {tuple(right.shape)}")
    if not ((got - right).abs() <= tolerance * right.abs().clamp(min=1)).all():  # false for NaN as well
        raise Broken(told(example), shown(got) + hint, shown(right))


def told(example: str | dict[str, Any]) -> str:
    return example if isinstance(example, str) else shown({k: v for k, v in example.items() if v is not None})
