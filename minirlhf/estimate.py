"""What training will need, before it starts, and how close to the machine's limit it runs: bytes and operations.

Bytes that autograd keeps are not a formula here: a trial forward of one row and of two says what a row costs, for every
architecture and option there is.  Operations are counted as they must be done: two for a multiply-add of a matrix product,
once, whatever is computed a second time to save memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from minirlhf.model import GPT, GPTConfig, ValueModel
from minirlhf.rollout import response_both


def parameters(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Of all models, each once."""
    return list({id(p): p for model in models for p in model.parameters()}.values())


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(tensors: Iterable[nn.Parameter]) -> int:
    """Gradients and Adam's two moments, of what is trained."""
    return 3 * stored_bytes(p for p in tensors if p.requires_grad)


def cache_bytes(config: GPTConfig, batch: int, length: int, width: int = 4) -> int:
    """Keys and values of `length` tokens a row, `width` bytes a number."""
    return 2 * width * config.n_layer * config.kv_heads * config.head_dim * batch * length


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """What autograd keeps for the backward of forward(), besides the `known` tensors (the weights)."""
    known, seen, held = {t.untyped_storage().data_ptr() for t in known}, {}, []

    def keep(t: Tensor) -> Tensor:
        held.append(t)  # or its memory could be taken by the next
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(size for place, size in seen.items() if place not in known)


def activation_bytes(forward: Callable[[int], object], rows: int, known: Iterable[Tensor]) -> int:
    """What autograd keeps for forward(rows), from trials with one row and with two."""
    known = list(known)
    one, two = (saved_bytes(lambda n=n: forward(n), known) for n in (1, 2))
    return one + (rows - 1) * (two - one)


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def block_operations(gpt: GPT, lengths: Tensor) -> float:
    """Of one block's forward over texts of these lengths: its matrices, and attention to what stands before a token."""
    lengths = lengths.double()
    seen = lengths * (lengths + 1) / 2 if gpt.config.causal else lengths**2
    matrices = sum(p.numel() for p in gpt.blocks[0].parameters() if p.dim() == 2)
    return float(2 * matrices * lengths.sum() + 4 * gpt.config.n_embd * seen.sum())


def forward_operations(gpt: GPT, lengths: Tensor, predicted: float = 0) -> float:
    """Of all blocks over texts of these lengths, and of the language-model head at `predicted` places."""
    return len(gpt.blocks) * block_operations(gpt, lengths) + 2 * gpt.head_weight.numel() * predicted


def training_operations(gpt: GPT, lengths: Tensor, predicted: float = 0) -> float:
    """Forward and backward: twice as much again for what is trained, for the head as much again for what it read."""
    trained = sum(next(block.parameters()).requires_grad for block in gpt.blocks)
    head = 1 + int(gpt.head_weight.requires_grad)
    back = 2 * trained * block_operations(gpt, lengths) + 2 * head * gpt.head_weight.numel() * predicted
    return forward_operations(gpt, lengths, predicted) + back


def update_operations(policy: GPT, critic: ValueModel, lengths: Tensor, predicted: float) -> float:
    """Of one pass of PPO's update over texts of these lengths, with `predicted` response tokens."""
    own = training_operations(critic.backbone, lengths) if critic.backbone is not policy else 0.0
    return training_operations(policy, lengths, predicted) + own


def gemm_rate(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Operations a second of [rows, columns] @ [columns, 4 columns], the largest product of a block: the machine's limit for
    this work, the median over some tenths of a second."""
    a = torch.randn(rows, columns, device=device, dtype=dtype)
    b = torch.randn(4 * columns, columns, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found, until = [], time.perf_counter() + seconds
    while len(found) < 4 or time.perf_counter() < until:
        start = time.perf_counter()
        a @ b.T
        wait()
        found.append(time.perf_counter() - start)
    return 8 * rows * columns**2 / median(found[1:])


def size(n: float, unit: str) -> str:
    """1234567, "B" -> 1.2 MB"""
    for prefix in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.{int(prefix > '')}f} {prefix}{unit}"
        n /= 1000
    return f"{n:.1f} T{unit}"


def show(models: dict[str, ValueModel | GPT], longest: int, response: int, rows: int, batch: int, fused: bool) -> None:
    """Print what PPO will hold and do: `rows` texts of `longest` tokens a microbatch, `batch` a rollout, on this rank."""
    policy, critic = models["policy"], models["value model"]
    device, known = policy.wte.weight.device, parameters(models.values())
    for name, model in models.items():
        own = parameters([model])
        trained = sum(p.numel() for p in own if p.requires_grad)
        print(f"{name:14s}{sum(p.numel() for p in own):>15,} parameters, {trained:,} trained")

    def forward(n: int) -> tuple[Tensor, ...]:
        tokens = torch.zeros(n, longest, dtype=torch.long, device=device)
        return response_both(policy, critic, tokens, tokens == 0, longest - response, 1.0, None, fused)

    optimizer, activations = optimizer_bytes(known), activation_bytes(forward, rows, known)
    cache = cache_bytes(policy.config, batch, longest)
    logits = 0 if fused else 4 * rows * response * policy.config.vocab_size  # their gradient
    before = resident_bytes() if device.type == "cpu" else stored_bytes(known)
    for name, n in {
        "weights": stored_bytes(known), "gradients and Adam's moments": optimizer, "activations of a microbatch": activations,
        "keys and values of a rollout": cache, "peak, about": before + optimizer + max(activations + logits, cache),
    }.items():  # fmt: skip
        print(f"{name:30s}{size(n, 'B'):>10s}")
    work = update_operations(policy, critic, torch.full((batch,), longest - 1), batch * response)
    print(f"a rollout: up to {batch * longest:,} tokens, {batch * response:,} of them responses; "
          f"an epoch over it: {size(work, 'FLOP')}")  # fmt: skip
