"""What training will need, before it starts, and how close to the machine's limit it runs: bytes and operations.

Bytes that autograd keeps are not a formula here: trial forwards of a few rows say what a row costs, for every
architecture and option there is.  Operations are counted as they must be done: two for a multiply-add of a matrix product,
once, whatever is computed a second time to save memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minirlhf.model import GPT, GPTConfig, ValueModel
from minirlhf.rollout import read_before, response_logprobs, response_values


def parameters(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Of all models, each once."""
    return list({id(p): p for model in models for p in model.parameters()}.values())


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trained_bytes(tensors: Iterable[nn.Parameter]) -> int:
    """Of what is trained: as much are its gradients, and twice as much Adam's moments."""
    return stored_bytes(p for p in tensors if p.requires_grad)


def cache_bytes(config: GPTConfig, batch: int, length: int, width: int = 4) -> int:
    """Keys and values of `length` tokens a row, `width` bytes a number."""
    return 2 * width * config.n_layer * config.kv_heads * config.head_dim * batch * length


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """What autograd keeps for the backward of forward(), besides the `known` tensors (the weights)."""
    known, seen, held = {t.untyped_storage()._cdata for t in known}, {}, []

    def keep(t: Tensor) -> Tensor:
        held.append(t)  # or its memory could be taken by the next
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(size for place, size in seen.items() if place not in known)


def activation_bytes(forward: Callable[[int], object], rows: int, known: Iterable[Tensor]) -> int:
    """What autograd keeps for forward(rows), from trials with two rows and with four (one alone would copy less)."""
    known = list(known)
    two, four = (saved_bytes(lambda n=n: forward(n), known) for n in (2, 4))
    return two + (rows - 2) * (four - two) // 2


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def forward_operations(gpt: GPT, lengths: Tensor, wanted: float, head: bool) -> tuple[float, float, float]:
    """Of a block but the last, of the last, whose results are wanted at so many places, and of the language-model head there;
    texts are of these lengths.  Two a weight and token of matrices, four a channel and pair of tokens that attention joins."""
    lengths, block = lengths.double(), gpt.blocks[-1]
    back = sum(b.causal for b in gpt.blocks) / len(gpt.blocks)
    joined = back * lengths * (lengths + 1) / 2 + (1 - back) * lengths**2
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    whole = float(2 * matrices * lengths.sum() + 4 * gpt.config.n_embd * joined.sum())
    spared = float(2 * (matrices - block.qkv.weight.numel()) * (lengths.sum() - wanted))
    return whole, whole - spared, 2 * gpt.head_weight.numel() * wanted * head


def training_operations(gpt: GPT, lengths: Tensor, wanted: float, head: bool) -> float:
    """Forward and backward: twice as much again for blocks that are trained, once or twice for the head."""
    block, last, logits = forward_operations(gpt, lengths, wanted, head)
    trained = sum(b.qkv.weight.requires_grad for b in gpt.blocks)
    blocks = (len(gpt.blocks) - 1 + 2 * max(0, trained - 1)) * block + (1 + 2 * (trained > 0)) * last
    return blocks + (2 + gpt.head_weight.requires_grad) * logits


def update_operations(policy: GPT, critic: ValueModel, lengths: Tensor, predicted: float) -> float:
    """Of one pass of PPO's update over texts of these lengths, with `predicted` response tokens."""
    own = (
        training_operations(critic.backbone, lengths, predicted, False)
        if critic.backbone is not policy
        else 0.0
    )
    return training_operations(policy, lengths, predicted, True) + own


def gemm_rate(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.2
) -> float:
    """Operations a second of [rows, columns] @ [columns, 4 columns], the largest product of a block: the machine's limit for
    this work, so the fastest within some tenths of a second."""
    a = torch.randn(rows, columns, device=device, dtype=dtype)
    b = torch.randn(4 * columns, columns, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found, until = [], time.perf_counter() + seconds
    while len(found) < 4 or time.perf_counter() < until:
        start = time.perf_counter()
        a @ b.T
        wait()
        found.append(time.perf_counter() - start)
    return 8 * rows * columns**2 / min(found)


def size(n: float, unit: str) -> str:
    """1234567, "B" -> 1.2 MB"""
    for prefix in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.{int(prefix > '')}f} {prefix}{unit}"
        n /= 1000
    return f"{n:.1f} T{unit}"


def show(
    models: dict[str, nn.Module], turns: list, longest: int, response: int, rows: int, batch: int, fused: bool
) -> None:  # fmt: skip
    """Print what PPO will hold and do: `rows` texts of `longest` tokens a microbatch, `batch` a rollout, on this rank; `turns`:
    which models are trained together."""
    policy, critic = models["policy"], models["critic"]
    device, known = policy.wte.weight.device, parameters(models.values())
    for name, model in models.items():
        own = parameters([model])
        trained = sum(p.numel() for p in own if p.requires_grad)
        print(f"{name:14s}{sum(p.numel() for p in own):>15,} parameters, {trained:,} trained")

    def forward(n: int, parts: Sequence[str]) -> tuple:
        tokens, prompt = torch.zeros(n, longest, dtype=torch.long, device=device), longest - response
        hidden = read_before(policy, tokens, tokens == 0, prompt) if len(parts) == 2 else None
        how = (prompt, 1.0, None, fused, hidden)
        return (
            response_logprobs(policy, tokens, tokens == 0, *how) if "policy" in parts else None,
            response_values(critic, tokens, tokens == 0, prompt, hidden) if "critic" in parts else None,
        )

    logits = 0 if fused else 4 * rows * response * policy.config.vocab_size  # their gradient
    activations = (
        max(activation_bytes(lambda n, parts=parts: forward(n, parts), rows, known) for parts in turns)
        + logits
    )
    moments, cache = 2 * trained_bytes(known), cache_bytes(policy.config, batch, longest)
    gradients = max(trained_bytes(parameters([models[part] for part in parts])) for parts in turns)
    before = resident_bytes() if device.type == "cpu" else stored_bytes(known)
    for name, n in {
        "weights": stored_bytes(known), "Adam's moments": moments, "gradients": gradients, "a microbatch": activations,
        "keys and values of a rollout": cache, "peak, about": before + moments + max(gradients + activations, cache),
    }.items():  # fmt: skip
        print(f"{name:30s}{size(n, 'B'):>10s}")
    work = update_operations(policy, critic, torch.full((batch,), longest - 1), batch * response)
    print(f"a rollout: up to {batch * longest:,} tokens, {batch * response:,} of them responses; "
          f"an epoch over it: {size(work, 'FLOP')}")  # fmt: skip
