"""The machine: device, ranks, precision, seeds and memory.

Distributed runs (`torchrun`) replicate the models, or split them (--shard, support/shard.py), and sum
gradients.  Every loss in this project is a sum over tokens divided by the number of tokens in the whole
batch, over all ranks, so summing is all there is to do [D17]."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minirlhf.support import elastic

BUCKET = 25 * 2**20  # bytes of gradients that are summed in one call: a call per parameter waits for each


@dataclasses.dataclass(frozen=True)
class Machine:
    """One process of a run: where it computes, and which of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1
    sharded: bool = False  # each rank holds a part of every model (support/shard.py)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the ranks, in place."""
        if self.world > 1:
            for t in tensors:
                whole = t.contiguous()  # all_reduce would sum the memory under a view, not its numbers
                dist.all_reduce(whole)
                if whole is not t:
                    t.copy_(whole)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the ranks; a rank whose share had no token takes part with zeros [D17].

        Those of sharded models were summed in backward."""
        if self.world == 1 or self.sharded:
            return
        trained = [p for p in parameters if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in in_buckets([p.grad for p in trained], BUCKET):
            flat = torch.cat([grad.flatten() for grad in bucket])
            self.sum_([flat])
            for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(total.view_as(grad))

    @torch.no_grad()
    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale gradients down to the norm `max_norm`, taken over all of them and all shards -> the norm."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, max_norm).item()
        shards = [p.grad.to_local() for p in parameters if p.grad is not None]
        square = nn.utils.get_total_norm(shards).square()
        self.sum_([square])
        norm = square.sqrt()
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()

    def parts(self, items: Sequence, size: int | None) -> list[Sequence]:
        """This rank's share of the items, every world-th, in lists of at most `size` (None: all in one).

        A forward pass of a sharded model is a meeting of all ranks, so there all get as many lists as the
        rank with most items: some may be empty, and are to be computed like others."""
        mine = items[self.rank :: self.world]
        most = -(-len(items) // self.world) if self.sharded else len(mine)
        step = size or max(1, most)
        return [mine[i : i + step] for i in range(0, most, step)]

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any rank: all ranks get the same answer, and decide alike."""
        if self.world == 1:
            return condition
        count = torch.full((), float(condition), device=self.device)  # tensor() would copy it, and wait
        self.sum_([count])
        return bool(count)

    def autocast(self, precision: str):
        """precision 'fp32' or 'bf16'.  Master weights stay fp32; log-softmax is fp32 in any case [D18]."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def in_buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one dtype and of at most `size` bytes; a larger tensor is alone."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or sum(b.nbytes for b in bucket) + t.nbytes > size):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


def setup_machine() -> Machine:
    """The device, and the process group where torchrun started this process."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # fp32 products may use TF32
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        elastic.join_group("nccl" if device.type == "cuda" else "gloo")
    return Machine(device, rank, world)


def seed_everything(*parts: int) -> None:
    """Seed all generators from numbers such as (seed, step, rank).

    Done at each step, it makes that step's randomness a function of these numbers, so that no generator's
    state has to be saved for an exact resume [D21]."""
    state = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: new pages for each logits tensor cost more than the arithmetic on it
    (1.5 x)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)


def trim_freed_memory(step: int, every: int = 50) -> None:
    """Every so many steps, give back what no longer fits anything: batches of many widths leave holes in the
    kept memory."""
    if step % every == 0 and not torch.cuda.is_available():
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def has_fast_bf16() -> bool:
    """Whether the hardware multiplies bf16 natively.  Where it is emulated, bf16 is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        return bool(re.search(r"avx512_bf16|amx_bf16|bf16", Path("/proc/cpuinfo").read_text()))
    return False


def pick_precision(wish: str) -> str:
    """'fp32' or 'bf16': the wish, or for 'auto' bf16 where it is fast."""
    return ("bf16" if has_fast_bf16() else "fp32") if wish == "auto" else wish


def frozen_dtype(precision: str) -> torch.dtype:
    """The dtype that frozen matrices are stored in: autocast to bf16 would round them to it at every use."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def versions() -> dict[str, str]:
    """Versions of Python, minirlhf and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "minirlhf": metadata_version("minirlhf")}
    return found | {name: metadata_version(name) for name in ("torch", "triton", "numpy", "tiktoken")}


def metadata_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
