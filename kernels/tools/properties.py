"""What must hold of the four ops, whoever wrote them, and which public bug broke it. `kernels.testing` asks.

A property takes the function under test (f, a kernels.testing.Subject: results and gradients by name) and a
few small values that hypothesis draws and shrinks. The data follow from the drawn seed. f.oracle is the op's
reference in float64. A result may differ from it by 2e-6 max(1, |value|), a gradient by 1.5 eps of its dtype
times its magnitude: see `slack`.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.logprobs import token_logprobs_reference

INF, NAN = math.inf, math.nan
LOGITS = ("token_logprobs", "token_kl")
VOCABULARY = (*LOGITS, "linear_token_logprobs")
GAE = ("gae",)
ALL = (*VOCABULARY, *GAE)


class NotAsked(Exception):
    """The function or the machine cannot be asked this property."""


@dataclass(frozen=True)
class Property:
    check: Callable[..., None]
    needs: tuple[str, ...]  # options, results and abilities; a function without them is not asked
    draws: dict[str, Any]
    most: int  # examples at most: few where each is large


PROPERTIES: dict[str, dict[str, Property]] = {op: {} for op in ALL}


def prop(ops: tuple[str, ...], *needs: str, most: int = 10**6, **draws: Any) -> Callable:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        for op in ops:
            PROPERTIES[op][check.__name__] = Property(check, needs, draws, most)
        return check

    return register


# What is drawn. The first of a list is the simplest; failing examples shrink towards it.
SEED = {"seed": st.integers(0, 2**20)}
DATA = SEED | {
    "vocab": st.sampled_from([7, 1, 2, 64, 1031])
}  # 1031 is prime, and more than a block of most kernels
SCALE = st.sampled_from([3.0, 0.1, 50.0, 1000.0])
TEMPERATURE = st.sampled_from([1.0, 0.3, 1.7])
DTYPE = st.sampled_from([torch.bfloat16, torch.float16])
EPISODES = SEED | {"steps": st.sampled_from([3, 1, 2, 7, 33])}
FRACTION = st.sampled_from([1.0, 0.95, 0.5, 0.0]) | st.floats(0, 1)


def require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def zero(name: str, x: Tensor) -> None:
    require((x == 0).all(), f"{name}: expected 0 everywhere, got {x[x != 0].flatten()[:3].tolist()}")


def finite(name: str, x: Tensor) -> None:
    require(
        x.isfinite().all(), f"{name}: expected finite numbers, got {x[~x.isfinite()].flatten()[:3].tolist()}"
    )


def close(name: str, got: Tensor, want: Tensor, allowed: Tensor | float | None = None) -> None:
    """Require `got` within `allowed` of `want`, with the same NaN and infinities; show the worst."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    require(got.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
    if got.numel() == 0:
        return
    allowed = torch.as_tensor(2e-6 * want.abs().clamp(min=1) if allowed is None else allowed).expand_as(want)
    error = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs()).nan_to_num(
        INF, INF
    )
    excess = torch.where(allowed == INF, error.isinf() * INF, error / allowed.clamp(min=1e-30)).nan_to_num(
        0.0, INF
    )
    at = tuple(map(int, torch.unravel_index(excess.argmax(), excess.shape)))
    numbers = (
        f"expected {want[at]:.9g}, got {got[at]:.9g} (off by {error[at]:.1e}, allowed {allowed[at]:.1e})"
    )
    require(excess[at] <= 1, f"{name}{list(at) if at else ''}: {numbers}")


def slack(
    f,
    inputs: list[Tensor],
    tokens: Tensor,
    want: dict,
    up: dict,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> dict:
    """What rounding excuses in a gradient.

    That is 1.5 eps of its dtype times its magnitude (the row's largest), and 1e-7 of the upstream gradients
    times their factors in the formula. Through the linear op's products both go by absolute values, and an
    fp32 sum of n products adds sqrt(n) half-eps.
    """
    largest = want["kl" if "kl" in want else "entropy"].nan_to_num(0.0, 0.0)
    factor = (1e-7 + 1e-7 * sum(u.abs() for u in up.values()) * (1 + largest) / temperature)[
        ..., None
    ].double()
    eps = [1.5 * torch.finfo(x.dtype).eps for x in inputs]
    if "weight" not in f.inputs:
        return {
            f"d {n}": e * want[f"d {n}"].abs().amax(-1, keepdim=True) + factor
            for n, e in zip(f.inputs, eps, strict=True)
        }
    h, w = (x.detach().cpu().double().reshape(-1, x.shape[-1]) for x in inputs)
    logits, flat = (h @ w.T).requires_grad_(), None if mask is None else mask.reshape(-1)
    statistics = token_logprobs_reference(logits, tokens.reshape(-1), temperature, flat)
    sum(
        (x * up[k].reshape(-1)).sum()
        for k, x in zip(("logprobs", "entropy"), statistics, strict=True)
        if k in up
    ).backward()
    d, h, w, factor = logits.grad.abs(), h.abs(), w.abs(), factor.reshape(-1, 1)
    hidden = (eps[0] + len(w) ** 0.5 * 2**-24) * (d @ w) + factor * (1 + w.amax())
    weight = (eps[1] + len(h) ** 0.5 * 2**-24) * (d.T @ h) + (factor * (1 + h)).sum(0)
    return {"d hidden": hidden.view(inputs[0].shape), "d weight": weight}


def agree(
    f,
    arguments: list[Tensor],
    up: dict | None = None,
    only: str = "",
    wide: list | None = None,
    **options: Any,
) -> None:
    """Require the oracle's results, and its gradients for the upstream gradients `up`.

    f may get other tensors of the same numbers (`wide`) than the oracle (`arguments`).
    """
    options = f.takes(**options)
    want = f.oracle(*arguments, upstream=up, **options)
    allowed = slack(f, arguments[:-1], arguments[-1], want, up, **options) if up else {}
    if f.op == "gae":  # a sum of many terms is as exact as the largest one of its row
        allowed = {
            name: 2e-6 * x.abs().amax(-1, keepdim=True).clamp(min=1) for name, x in want.items() if x.numel()
        }
    for name, value in f(*(wide or arguments), upstream=up, **options).items():
        if name.startswith(only):
            close(name, value, want[name], allowed.get(name))


# Logits


def case(f, seed: int, lead: Any, vocab: int, scale: float = 3.0, dtype: torch.dtype = torch.float32):
    """-> inputs (logits; logits, ref_logits; or hidden, weight), tokens, upstream gradients, generator.

    hidden and weight are multiples of 1/8, so their fp32 products and sums are exact. So are the logits, and
    the linear op must be as accurate as the others.
    """
    g, lead = torch.Generator().manual_seed(seed), (lead,) if isinstance(lead, int) else lead
    tokens = torch.randint(vocab, lead, generator=g)
    if f.op == "linear_token_logprobs":
        hidden, weight = (
            torch.randint(-16, 17, (*n, 1 + seed % 24), generator=g) / 8 for n in (lead, (vocab,))
        )
        inputs = [
            hidden.to(dtype),
            (weight * (2.0 ** round(math.log2(scale / 4)) if scale else 0.0)).to(dtype),
        ]
    else:
        logits = torch.randn(2, *lead, vocab, generator=g).clamp(-3, 3) * (scale / 3)
        inputs = list(logits.to(dtype))[: len(f.inputs)]
    up = {name: torch.randn(lead, generator=g) for name in f.results} if "gradient" in f.can else None
    return inputs, tokens, up, g


def by_row(f, inputs: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Change the inputs that have a row per token: all but the weight."""
    return [x if name == "weight" else change(x) for name, x in zip(f.inputs, inputs, strict=True)]


def some(g: torch.Generator, rows: int, masked: bool = True) -> Tensor | None:
    return torch.rand(rows, generator=g) < 0.6 if masked else None


@prop(VOCABULARY, **DATA, rows=st.integers(1, 4), scale=SCALE, temperature=TEMPERATURE, masked=st.booleans())
def agrees_with_float64(f, seed, rows, vocab, scale, temperature, masked):
    inputs, tokens, _, g = case(f, seed, rows, vocab, scale)
    agree(f, [*inputs, tokens], temperature=temperature, mask=some(g, rows, masked))


@prop(
    VOCABULARY,
    "gradient",
    **DATA,
    scale=SCALE,
    temperature=TEMPERATURE,
    masked=st.booleans(),
    used=st.integers(1, 15),
)
def gradients_agree_with_float64(f, seed, vocab, scale, temperature, masked, used):
    """Every token of each result that is used has a random upstream gradient."""
    inputs, tokens, up, g = case(f, seed, 4, vocab, scale)
    names = [name for i, name in enumerate(f.results) if used >> i & 1] or f.results[:1]
    up = {name: up[name] for name in names}
    agree(f, [*inputs, tokens], up, "d ", temperature=temperature, mask=some(g, 4, masked))


@prop(VOCABULARY, **SEED, vocab=st.sampled_from([7, 1, 2, 33]), scale=SCALE)
def probabilities_are_at_most_1_and_sum_to_1(f, seed, vocab, scale):
    """verl #2656, #2899, PR 7439: phantom columns of exp(0), a running maximum that started at 0."""
    inputs, *_ = case(f, seed, 1, vocab, scale)
    for name, value in f(*by_row(f, inputs, lambda x: x.expand(vocab, -1)), torch.arange(vocab)).items():
        if "logprobs" in name:
            require((value <= 0).all(), f"{name}: expected at most 0, got {float(value.max()):.9g}")
            close(
                f"sum exp {name}",
                value.cpu().double().exp().sum(),
                torch.ones(()),
                2e-6 * (1 + math.log(vocab)),
            )


def shifted(f, inputs: list[Tensor], shift: float) -> list[Tensor]:
    """The inputs, with `shift` added to all logits exactly (through a constant feature of hidden)."""
    if "weight" not in f.inputs:
        return [(x * 64).round() / 64 + shift for x in inputs]
    return [torch.cat([x, x.new_full((len(x), 1), c)], 1) for x, c in zip(inputs, (1.0, shift), strict=True)]


@prop(
    VOCABULARY, "entropy", **DATA, scale=SCALE | st.just(0.0), shift=st.sampled_from([0.0, 1000.0, -1000.0])
)
def entropy_lies_between_0_and_log_V(f, seed, vocab, scale, shift):
    inputs, tokens, *_ = case(f, seed, 2, vocab, scale)
    entropy, most = f(*shifted(f, inputs, shift), tokens)["entropy"].cpu(), math.log(vocab)
    inside = (entropy >= -2e-6) & (entropy <= most + 2e-6 * max(1, most))
    require(inside.all(), f"entropy: expected 0 to {most:.9g}, got {entropy.tolist()}")


@prop(VOCABULARY, **DATA, shift=st.sampled_from([-1000.0, 1000.0, -30.0, 30.0]))
def shifting_all_logits_changes_nothing(f, seed, vocab, shift):
    inputs, tokens, *_ = case(f, seed, 3, vocab)
    plain = f(*shifted(f, inputs, 0.0), tokens)
    for name, value in f(*shifted(f, inputs, shift), tokens).items():
        close(name, value, plain[name])


@prop(VOCABULARY, **DATA, scale=SCALE)
def permuting_the_vocabulary_changes_nothing(f, seed, vocab, scale):
    inputs, tokens, _, g = case(f, seed, 3, vocab, scale)
    order, plain = torch.randperm(vocab, generator=g), f(*inputs, tokens)
    select = {"hidden": lambda x: x, "weight": lambda x: x[order]}
    inputs = [select.get(name, lambda x: x[:, order])(x) for name, x in zip(f.inputs, inputs, strict=True)]
    for name, value in f(*inputs, order.argsort()[tokens]).items():
        close(name, value, plain[name])


@prop(VOCABULARY, "gradient", **DATA, scale=SCALE)
def gradient_rows_sum_to_0(f, seed, vocab, scale):
    """Because shifting all logits changes nothing."""
    inputs, tokens, up, _ = case(f, seed, 3, vocab, scale)
    out = f(*shifted(f, inputs, 1.0), tokens, upstream=up)
    for name in (f"d {n}" for n in f.inputs if n != "weight"):
        x = out[name].cpu().double()
        close(f"sum of {name}", x[:, -1] if "hidden" in name else x.sum(1), torch.zeros(3), 1e-5)


@prop(VOCABULARY, "temperature", **DATA, temperature=st.sampled_from([2.0, 0.5, 0.25, 4.0]))
def temperature_equals_prescaled_logits(f, seed, vocab, temperature):
    """The temperatures are powers of two, so dividing by them rounds nothing."""
    inputs, tokens, up, _ = case(f, seed, 3, vocab)
    scaled = f(*by_row(f, inputs, lambda x: x / temperature), tokens, upstream=up)
    for name, value in f(*inputs, tokens, upstream=up, temperature=temperature).items():
        want = scaled[name] / (temperature if name.startswith("d ") and name != "d weight" else 1)
        close(name, value, want, 2e-6 * (1 + float(want.abs().amax())))


@prop(VOCABULARY, "gradient", **DATA, result=st.integers(0, 3))
def each_row_has_its_own_upstream_gradient(f, seed, vocab, result):
    """Liger #968, #678: all rows were scaled by grad_output[0]."""
    inputs, tokens, up, _ = case(f, seed, 4, vocab)
    name = f.results[result % len(f.results)]
    ones, scaled = (f(*inputs, tokens, upstream={name: u}) for u in (torch.ones(4), up[name]))
    for key in (f"d {n}" for n in f.inputs if n != "weight"):
        want = up[name][:, None] * ones[key].cpu()
        close(key, scaled[key], want, 1e-5 * (1 + float(want.abs().amax())))


@prop(
    VOCABULARY, **DATA, offset=st.integers(0, 9), gap=st.integers(0, 9), dtype=DTYPE | st.just(torch.float32)
)
def rows_may_start_at_any_address(f, seed, vocab, offset, gap, dtype):
    """At any element of 16 bytes and with any stride. NaN between the rows shows who reads too far."""
    inputs, tokens, up, _ = case(f, seed, 3, vocab, 3.0, dtype if "16 bits" in f.can else torch.float32)

    def place(x: Tensor) -> Tensor:
        stride = x.shape[1] + gap
        memory = torch.full((offset + len(x) * stride + 9,), NAN, dtype=x.dtype, device=f.device)
        return memory.as_strided(x.shape, (stride, 1), offset).copy_(x)

    agree(f, [*map(place, inputs), tokens], up)


@prop(VOCABULARY, **SEED, lead=st.sampled_from([(2, 1, 3), (1,), (1, 6), ()]))
def leading_shape_is_kept(f, seed, lead):
    inputs, tokens, up, _ = case(f, seed, lead, 7)
    agree(f, [*inputs, tokens], up)


@prop(VOCABULARY, lead=st.sampled_from([(0,), (2, 0)]))
def no_row_at_all_is_no_error(f, lead):
    inputs, tokens, up, _ = case(f, 0, lead, 7)
    for name, value in f(*inputs, tokens, upstream=up).items():
        zero(name, value)
        require(
            name.startswith("d ") or value.shape == lead,
            f"{name}: expected shape {lead}, got {tuple(value.shape)}",
        )


WHERE = st.sampled_from(["leading", "trailing", "scattered"])


@prop(
    LOGITS,
    **SEED,
    kept=st.integers(1, 40),
    gone=st.sampled_from([1, 300, 5000]),
    where=WHERE,
    in_both=st.booleans(),
)
def impossible_columns_equal_deleted_ones(f, seed, kept, gone, where, in_both):
    """-inf logits, also in a leading block (flash-attention #1930); in the policy, or the reference too."""
    inputs, tokens, up, g = case(f, seed, 3, kept)
    every, anywhere = torch.arange(kept + gone), torch.randperm(kept + gone, generator=g)
    column = {"leading": every[gone:], "trailing": every[:kept], "scattered": anywhere[:kept]}[where]
    wide = [torch.full((3, kept + gone), -INF).index_copy(1, column, x) for x in inputs]
    if f.op == "token_kl" and not in_both:  # the reference gives the tokens some probability
        wide[1] = torch.where(wide[1].isinf(), torch.randn(wide[1].shape, generator=g), wide[1])
        return agree(f, [*wide, column[tokens]], up)
    want = f.oracle(*inputs, tokens, upstream=up)
    allowed = slack(f, inputs, tokens, want, up) if up else {}
    for name, value in f(*wide, column[tokens], upstream=up).items():
        if name.startswith("d "):
            zero(f"{name} of the impossible", value.cpu()[:, ~torch.isin(every, column)])
            value = value.cpu()[:, column]
        close(name, value, want[name], allowed.get(name))


@prop(LOGITS, **SEED, vocab=st.integers(2, 9))
def an_impossible_token_has_logprob_minus_infinity(f, seed, vocab):
    inputs, tokens, up, _ = case(f, seed, 2, vocab)
    inputs[0][0, tokens[0]] = -INF
    out = f(*inputs, tokens, upstream=up)
    require(out["logprobs"][0] == -INF, f"logprobs[0]: expected -inf, got {float(out['logprobs'][0]):.9g}")
    for name, value in out.items():
        finite(name, value[1:] if name == "logprobs" else value)


@prop(("token_kl",), "kl", "gradient", **SEED, vocab=st.integers(2, 9))
def an_infinite_kl_passes_no_gradient(f, seed, vocab):
    """It is +inf where the policy allows what the reference rules out. The other results keep gradients."""
    inputs, tokens, up, _ = case(f, seed, 2, vocab)
    inputs[1][0, (tokens[0] + 1) % vocab] = -INF
    out, without = (
        f(*inputs, tokens, upstream=up | {"kl": up["kl"] * torch.tensor([x, 1.0])}) for x in (1.0, 0.0)
    )
    require(out["kl"][0] == INF, f"kl[0]: expected inf, got {float(out['kl'][0]):.9g}")
    for name, value in out.items():
        finite(name, value[1:] if name == "kl" else value)
        close(name, value, without[name])


@prop(VOCABULARY, **DATA, what=st.sampled_from([NAN, -INF]), which=st.integers(0, 1))
def a_row_without_a_distribution_gives_nan_there_only(f, seed, vocab, what, which):
    """A NaN logit, or nothing but -inf; a NaN in hidden."""
    inputs, tokens, up, _ = case(f, seed, 3, vocab)
    clean, which = f(*inputs, tokens, upstream=up), which if f.op == "token_kl" else 0
    what = NAN if "weight" in f.inputs else what
    bad = [x.clone() for x in inputs]
    bad[which][1, slice(None) if what == -INF else -1] = what
    spoilt = {"ref_logprobs", "d ref_logits"} if which else {"logprobs", "entropy", "d logits", "d hidden"}
    spoilt |= set() if which and what == -INF else {"kl"}
    for name, value in f(*bad, tokens, upstream=up).items():
        if name != "d weight":  # it is a sum over all rows
            close(name, value[::2], clean[name][::2])
            require(
                name not in spoilt or value[1].isnan().any(),
                f"{name}[1]: expected nan, got {value[1].tolist()}",
            )


@prop(VOCABULARY, **DATA, past=st.booleans())
def a_token_outside_the_vocabulary_gives_no_number(f, seed, vocab, past):
    """Refused, or NaN: never what stands there in memory, nor a padded column (ml-cross-entropy PR 59)."""
    if f.device.type == "cuda" and f.function.__module__.split(".")[0] != "kernels":
        raise NotAsked("an index assertion on the GPU would end the run")
    inputs, tokens, *_ = case(f, seed, 3, vocab)
    tokens[1] = vocab if past else -1
    sides = {name: 0 if name == "weight" else 1 for name in f.inputs}
    around = lambda x, dim: torch.cat([x, x, x], dim).narrow(dim, x.shape[dim], x.shape[dim])
    try:
        out = f(*(around(x.to(f.device), dim) for x, dim in zip(inputs, sides.values(), strict=True)), tokens)
    except (ValueError, IndexError, RuntimeError):
        return
    for name, value in out.items():
        if "logprobs" in name:
            require(
                value[1].isnan(),
                f"{name}[1]: expected an error or nan for token {tokens[1]}, got {float(value[1]):.9g}",
            )
            finite(f"{name} beside it", value[::2])


@prop(VOCABULARY, "mask", **DATA)
def masked_rows_give_0_and_are_never_looked_at(f, seed, vocab):
    """They may hold NaN, infinities, tokens that do not exist, and NaN as the upstream gradient."""
    inputs, tokens, up, _ = case(f, seed, 6, vocab)
    mask = torch.tensor([True, False, True, True, False, False])
    want = f.oracle(*inputs, tokens, upstream=up, mask=mask)
    allowed = slack(f, inputs, tokens, want, up, mask=mask) if up else {}
    poison = lambda x: x.index_copy(
        0, (~mask).nonzero()[:, 0], torch.tensor([NAN, INF, -INF])[:, None].expand(3, x.shape[1])
    )
    up = up and {name: u.masked_fill(~mask, NAN) for name, u in up.items()}
    for name, value in f(
        *by_row(f, inputs, poison), tokens.masked_fill(~mask, -(10**12)), upstream=up, mask=mask
    ).items():
        close(name, value, want[name], allowed.get(name))
        if name != "d weight":
            zero(f"{name} of masked rows", value.cpu()[~mask])


@prop(VOCABULARY, most=4, vocab=st.sampled_from([50257, 65537, 151936, 262144]))
def large_vocabularies_work(f, vocab):
    """unsloth #91: more than 65536 columns failed."""
    if f.interpreted and vocab != 65537:
        return  # the interpreter would take minutes
    rows = 1 if f.interpreted and f.op == "linear_token_logprobs" else 2
    inputs, tokens, up, _ = case(f, 2, rows, vocab, 50.0)
    tokens[-1] = vocab - 1
    agree(f, [*inputs, tokens], up)


@prop(
    ("token_kl",), "kl", **DATA, scale=SCALE, dtype=DTYPE | st.just(torch.float32), impossible=st.booleans()
)
def kl_of_equal_inputs_is_exactly_0(f, seed, vocab, scale, dtype, impossible):
    (x, _), tokens, up, g = case(f, seed, 4, vocab, scale, dtype)
    gone = (torch.rand(x.shape, generator=g) < 0.3).scatter(1, tokens[:, None], False)
    x = x.masked_fill(gone, -INF) if impossible else x
    out = f(x, x.clone(), tokens, upstream=up and {"kl": up["kl"]}, **f.takes(temperature=0.8))
    zero("kl", out["kl"])
    close("d logits", out.get("d logits", torch.zeros(x.shape)), torch.zeros(x.shape), 1e-7)


@prop(("token_kl",), "kl", **DATA, scale=SCALE, nearness=st.integers(0, 20))
def kl_is_not_negative(f, seed, vocab, scale, nearness):
    (x, y), tokens, *_ = case(f, seed, 3, vocab, scale)
    kl = f(x, x + (y - x) * 2.0**-nearness, tokens)["kl"]
    require((kl >= -2e-6).all(), f"kl: expected at least 0, got {float(kl.min()):.9g}")


@prop(VOCABULARY, "gradient", "float64", most=10, **SEED, vocab=st.integers(2, 5), temperature=TEMPERATURE)
def gradients_agree_with_differences(f, seed, vocab, temperature):
    """By torch.autograd.gradcheck, which needs no oracle."""
    inputs, tokens, *_ = case(f, seed, 2, vocab, 3.0, torch.float64)
    options = f.takes(temperature=temperature, mask=torch.tensor([True, seed % 2 == 0]))
    leaves = [x.to(f.device).requires_grad_() for x in inputs]
    torch.autograd.gradcheck(lambda *x: tuple(f(*x, tokens, **options).values()), leaves)


# GAE


def episodes(seed: int, rows: int, steps: int, dtype: torch.dtype = torch.float32):
    """([rewards, values], {mask, dones, last_values})."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, steps, generator=g).to(dtype).unbind()
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1), generator=g)
    dones, last = torch.rand(rows, steps, generator=g) < 0.2, torch.randn(rows, generator=g).to(dtype)
    return [rewards, values], {"mask": mask, "dones": dones, "last_values": last}


@prop(GAE, **EPISODES, rows=st.integers(1, 4), gamma=FRACTION, lam=FRACTION, used=st.integers(0, 7))
def equals_the_double_sum(f, seed, rows, steps, gamma, lam, used):
    inputs, given = episodes(seed, rows, steps)
    agree(
        f, inputs, gamma=gamma, lam=lam, **{k: v for i, (k, v) in enumerate(given.items()) if used >> i & 1}
    )


@prop(GAE, "gamma", "lam", **EPISODES, gamma=FRACTION)
def lam_0_is_the_td_error(f, seed, steps, gamma):
    (rewards, values), given = episodes(seed, 3, steps)
    last = f.takes(last_values=given["last_values"])
    after = torch.cat([values[:, 1:], last.get("last_values", torch.zeros(3))[:, None]], 1)
    got = f(rewards, values, gamma=gamma, lam=0.0, **last)["advantages"]
    close("advantages", got, rewards.double() + gamma * after.double() - values)


@prop(GAE, "gamma", "lam", **EPISODES)
def gamma_1_and_lam_1_is_return_minus_value(f, seed, steps):
    (rewards, values), given = episodes(seed, 3, steps)
    last = f.takes(last_values=given["last_values"])
    to_go = rewards.double().flip(1).cumsum(1).flip(1) + last.get("last_values", torch.zeros(3))[:, None]
    for name, value in f(rewards, values, gamma=1.0, lam=1.0, **last).items():
        close(name, value, to_go - values if name == "advantages" else to_go, 1e-5)


@prop(GAE, **EPISODES, gamma=FRACTION, lam=FRACTION)
def linear_in_rewards_and_values(f, seed, steps, gamma, lam):
    (one, _), (two, given) = episodes(seed, 2, steps), episodes(seed + 1, 2, steps)
    options = f.takes(gamma=gamma, lam=lam, mask=given["mask"], dones=given["dones"])
    call = lambda inputs, last: f(*inputs, **options, **f.takes(last_values=torch.full((2,), last)))
    a, b, both = (
        call(one, 1.0),
        call(two, -1.0),
        call([x + 2 * y for x, y in zip(one, two, strict=True)], -1.0),
    )
    for name, value in both.items():
        close(name, value, a[name].double() + 2 * b[name].double(), 2e-5)


@prop(GAE, "mask", **EPISODES, more=st.sampled_from([1, 4, 600]))
def what_follows_the_last_real_step_is_irrelevant(f, seed, steps, more):
    """However many steps follow, and whatever they hold: NaN, infinities, dones."""
    inputs, given = episodes(seed, 4, steps)
    pad = lambda x, fill: torch.cat([x, x.new_full((4, more), fill)], 1)
    mask = pad(given["mask"], False)
    wide = [pad(x, NAN).masked_fill(~mask, fill) for x, fill in zip(inputs, (INF, NAN), strict=True)]
    options = f.takes(**given)
    plain, padded = (
        f(*inputs, **options),
        f(*wide, **options | f.takes(mask=mask, dones=pad(given["dones"], True) | ~mask)),
    )
    for name, value in padded.items():
        close(name, value[:, :steps], plain[name])
        zero(f"{name} of masked steps", value.cpu()[~mask])


@prop(GAE, **EPISODES, row=st.integers(0, 3))
def rows_are_independent(f, seed, steps, row):
    inputs, given = episodes(seed, 4, steps)
    whole, row = f(*inputs, **f.takes(**given)), slice(row, row + 1)
    for name, value in f(
        *(x[row] for x in inputs), **f.takes(**{k: v[row] for k, v in given.items()})
    ).items():
        close(name, value, whole[name][row])


@prop(GAE, "dones", **SEED, first=st.integers(1, 9), second=st.integers(1, 9), gamma=FRACTION)
def a_done_splits_a_row_into_two_calls(f, seed, first, second, gamma):
    """No value and no advantage crosses it (tianshou #869). What would follow a done last step may be NaN."""
    inputs, _ = episodes(seed, 3, first + second)
    dones = torch.zeros(3, first + second, dtype=torch.bool).index_fill(
        1, torch.tensor([first - 1, first + second - 1]), True
    )
    whole = f(*inputs, dones=dones, **f.takes(gamma=gamma, last_values=torch.full((3,), NAN)))
    halves = [
        f(*(x[:, part] for x in inputs), **f.takes(gamma=gamma))
        for part in (slice(first), slice(first, None))
    ]
    for name, value in whole.items():
        close(name, value, torch.cat([half[name] for half in halves], 1), 1e-5)


@prop(
    GAE,
    "gamma",
    "lam",
    most=20,
    **SEED,
    steps=st.sampled_from([300, 1031, 5000]),
    gamma=FRACTION,
    lam=FRACTION,
)
def long_rows_work(f, seed, steps, gamma, lam):
    """No carry is lost between blocks, no product gamma^t underflows (trl #6626): as a float64 recursion."""
    (rewards, values), _ = episodes(seed, 2, steps)
    v = torch.cat([values.double(), torch.zeros(2, 1)], 1)
    delta = (rewards + gamma * v[:, 1:] - v[:, :-1]).unbind(1)
    advantages = [delta[-1]]
    for step in reversed(delta[:-1]):
        advantages.append(step + gamma * lam * advantages[-1])
    want = torch.stack(advantages[::-1], 1)
    for name, value in f(rewards, values, gamma=gamma, lam=lam).items():
        truth = want if name == "advantages" else want + values
        close(name, value, truth, 1e-5 * float(truth.abs().max().clamp(min=1)))


@prop(GAE, shape=st.sampled_from([(0, 3), (2, 0), (0, 0)]))
def an_empty_batch_is_no_error(f, shape):
    for name, value in f(torch.zeros(shape), torch.zeros(shape)).items():
        require(value.shape == shape, f"{name}: expected shape {shape}, got {tuple(value.shape)}")


@prop(GAE)
def targets_carry_no_gradient(f):
    ones = [torch.ones(1, 3, device=f.device, requires_grad=True) for _ in f.inputs]
    for name, value in f(*ones).items():
        require(not value.requires_grad, f"{name}: expected no gradient, got {value.grad_fn}")


# Every op


def example(f, seed: int, size: int, dtype: torch.dtype = torch.float32, lead: Any = 6, **more: Any):
    """-> arguments, options, upstream gradients. `lead` is the shape of the tokens, or how many episodes."""
    if f.op == "gae":
        inputs, given = episodes(seed, lead if isinstance(lead, int) else 6, size, dtype)
        return inputs, f.takes(**given), None
    inputs, tokens, up, _ = case(f, seed, lead, size, 3.0, dtype)
    return [*inputs, tokens], f.takes(**more), up


@prop(ALL, **SEED, size=st.sampled_from([7, 1, 33, 1031]), dtype=DTYPE)
def half_precision_inputs_give_fp32_results(f, seed, size, dtype):
    """Only the gradient is rounded to 16 bits, once, at its end."""
    arguments, options, up = example(f, seed, size if f.op != "gae" else min(size, 33), dtype)
    for name, value in f(*arguments, **options).items():
        require(value.dtype == torch.float32, f"{name}: expected torch.float32, got {value.dtype}")
    agree(f, arguments, up, **options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of a row": lambda x: torch.cat(
        [torch.full_like(x[:, :1], NAN), x, torch.full_like(x[:, :1], NAN)], 1
    )[:, 1:-1],
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "broadcast": lambda x: x[:1, :1].expand(x.shape) if x.ndim == 3 else x,
}


@prop(ALL, **SEED, size=st.sampled_from([7, 33]), layout=st.sampled_from(list(LAYOUTS)))
def inputs_may_have_any_layout(f, seed, size, layout):
    """One is that of logits[:, prompt:-1]. The weight and all of GAE's tensors are changed too."""
    arguments, options, up = example(f, seed, size, lead=(2, 3))
    change = lambda x: LAYOUTS[layout](x.to(f.device)) if x.ndim > 1 else x
    arguments = [change(x) if f.op == "gae" or x.is_floating_point() else x for x in arguments]
    agree(f, arguments, up, **{name: change(x) for name, x in options.items()})


def gap_of_2_31(f, x: Tensor) -> Tensor:
    """x [2, n] with its rows more than 2^31 elements apart: on a CPU, in a file with a hole.

    The first row is in the middle. So an offset that wraps around at 32 bits reads zeros of the same storage,
    which is a wrong number and not a crash.
    """
    n = x.shape[1]
    size = (2**32 + 2 * n) * x.element_size()
    if f.device.type == "cuda":
        if torch.cuda.mem_get_info(f.device)[0] < 4 * size:
            raise NotAsked(f"needs {4 * size >> 30} GiB of GPU memory")
        memory = torch.zeros(size // x.element_size(), dtype=x.dtype, device=f.device)
    else:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            memory = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=x.dtype)
    return memory.as_strided(x.shape, (2**31 + n, 1), 2**31).copy_(x)


@prop(ALL, most=2, **SEED)
def offsets_may_exceed_2_31(f, seed):
    """Liger #803, #1296: row * stride in 32 bits."""
    dtype = torch.bfloat16 if "16 bits" in f.can else torch.float32
    arguments, options, up = example(f, seed, 2 if "weight" in f.inputs else 33, dtype, lead=2)
    far = lambda x: gap_of_2_31(f, x) if x.ndim == 2 else x
    agree(f, arguments, up, wide=[far(x) for x in arguments], **options)


@prop(ALL, "mask", **SEED, size=st.sampled_from([7, 1, 64]))
def nothing_but_masked_rows_gives_0(f, seed, size):
    """Nothing is divided by the number of real rows (trl PR 5345)."""
    arguments, _, up = example(f, seed, size)
    mask = torch.zeros(arguments[-1].shape, dtype=torch.bool)
    poisoned = [*by_row(f, arguments[: len(f.inputs)], lambda x: x * NAN), *arguments[len(f.inputs) :]]
    for name, value in f(*poisoned, mask=mask, upstream=up).items():
        zero(name, value)


@prop(ALL, **SEED, size=st.sampled_from([7, 64, 1031]))
def repeats_bit_for_bit(f, seed, size):
    """Also when newly allocated memory holds other numbers than the last time."""
    arguments, options, up = example(f, seed, size, temperature=0.7)
    first = {name: value.clone() for name, value in f(*arguments, upstream=up, **options).items()}
    litter = [torch.full_like(value, NAN) for value in first.values() for _ in range(4)]
    del litter
    for name, value in f(*arguments, upstream=up, **options).items():
        require(torch.equal(value, first[name]), f"{name}: differs in some bit")


@prop(ALL, **SEED, size=st.sampled_from([7, 1031]))
def inputs_are_left_alone(f, seed, size):
    arguments, options, up = example(f, seed, size)
    arguments = [x.to(f.device) for x in arguments]
    copies = [x.clone() for x in arguments]
    f(*arguments, upstream=up, **options)
    for name, x, copy in zip((*f.inputs, "tokens"), arguments, copies, strict=False):
        require(torch.equal(x, copy), f"{name}: was written to")


@prop(ALL, "block sizes", **SEED, size=st.sampled_from([7, 300, 1031]), halvings=st.integers(1, 16))
def block_sizes_do_not_matter(f, seed, size, halvings):
    """The constants of the function's module are made smaller."""
    arguments, options, up = example(f, seed, size, temperature=0.7)
    plain = f(*arguments, upstream=up, **options)
    with f.smaller_blocks(halvings):
        smaller = f(*arguments, upstream=up, **options)
    for name, value in smaller.items():
        close(name, value, plain[name], 4e-6 * (1 + plain[name].abs().cpu().double()))
