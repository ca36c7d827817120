"""Models that are split over the ranks (--shard), with PyTorch's own FSDP2.

    torchrun --nproc-per-node 8 train_ppo.py --out runs/big/ppo --shard

Every weight is cut along its first dimension, and each rank holds one piece, of its gradient and of Adam's
moments as well.  Before a block computes, the ranks gather its weights; after it they drop them; in backward
they gather them again and scatter the sums of the gradients.  A forward or a backward pass is therefore a
meeting of all ranks: each must make as many as the others (Machine.parts), if need be of an empty batch.

What is easily done wrong, and how it is done here:
- FSDP averages gradients.  Ours are summed, as losses are divided by the tokens of all ranks [D17].
- Embeddings, head and final norm are one group, the root's.  It stays whole from a forward to the end of its
  backward: GPT.logits and GPT.head_weight, which are not `forward`, read it between the two.
- The root's group of a model that waits for no backward is dropped when another model begins to read.
- Under autocast, backward would hold a bf16 copy of every block's weights.  Linear layers are gathered in
  bf16 instead, rounded as autocast rounds them; norms and embeddings stay fp32.
- FSDP sends all arguments of a root to the GPU.  Masks belong on the host, which would wait to get them back.
- A rollout asks for one forward per token, and ranks stop at different ones: `whole` gathers a model first.
- Optimisers are made after this, of the pieces; a root's group that is whole then would be trained as a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minirlhf import UserError
from minirlhf.support import elastic
from minirlhf.support.hardware import Machine

WHOLE = "the policy, whole, in a rollout"
COMMAND = "torchrun --nproc-per-node 8 train_ppo.py ... --shard"
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of this process


def on(machine: Machine, config: Any) -> Machine:
    """The machine, whose models are sharded if the options say so; UserError where they cannot be."""
    if not config.shard:
        return machine
    if "RANK" not in os.environ:
        raise UserError(f"--shard splits models over the processes of torchrun, and this is one: {COMMAND}")
    if config.compile:
        raise UserError("--shard and --compile do not go together: drop one of them")
    from torch.distributed.fsdp import FSDPModule  # seconds to import

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"--shard needs a newer torch than {torch.__version__}: 2.13.0 is the one that is tested"
        )
    if not dist.is_initialized():  # one process of torchrun: a world of 1
        elastic.join_group("nccl" if machine.device.type == "cuda" else "gloo")
    return dataclasses.replace(machine, sharded=True)


def shard(
    machine: Machine,
    trained: list[nn.Module],
    frozen: list[nn.Module],
    precision: str,
    writes: bool = True,
) -> None:
    """Split all models, which are on the CPU, over the ranks; each piece goes to its rank's device.

    Raises UserError, on all ranks, where the pieces of all models, and the whole of the first one if it
    `writes` text, do not fit the memory that is free."""
    half = precision == "bf16"
    agree(machine, refuse_unfit, machine, trained, frozen, half, writes)
    mesh = dist.init_device_mesh(machine.device.type, (machine.world,))
    for root in [root for model in (*trained, *frozen) for root in roots_in(model)]:
        _shard_root(root, mesh, half)


def _shard_root(root: nn.Module, mesh: Any, half: bool) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in [block for module in root.modules() for block in getattr(module, "blocks", [])]:
        linear = [layer for layer in block.children() if isinstance(layer, nn.Linear)]
        if half and all(layer.weight.requires_grad for layer in linear):
            fully_shard(linear, mesh=mesh, mp_policy=in_bf16)
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    root.awaits_backward = False
    root.register_forward_pre_hook(_drop_others)
    root.register_forward_pre_hook(_hide_masks, prepend=True, with_kwargs=True)  # before FSDP's own
    root.register_forward_pre_hook(_show_masks, with_kwargs=True)  # after it
    _roots.add(root)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into it


def _drop_others(root: nn.Module, _: Any) -> None:
    for other in _roots:
        if other is not root and not other.awaits_backward:
            other.reshard()
    root.awaits_backward = torch.is_grad_enabled() and any(p.requires_grad for p in root.parameters())


@dataclasses.dataclass
class _Hidden:
    """A mask on the CPU, which FSDP does not see and so leaves there."""

    mask: Tensor


def _hide_masks(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    of_host = lambda x: isinstance(x, Tensor) and x.dtype == torch.bool and x.device.type == "cpu"
    hide = lambda x: _Hidden(x) if of_host(x) else x
    return tuple(map(hide, args)), {name: hide(x) for name, x in kwargs.items()}


def _show_masks(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    show = lambda x: x.mask if isinstance(x, _Hidden) else x
    return tuple(map(show, args)), {name: show(x) for name, x in kwargs.items()}


def drop(models: Iterable[nn.Module]) -> None:
    """Let go of the weights that a forward has gathered; models that are not sharded stay as they are."""
    for root in [root for model in models for root in roots_in(model)]:
        if root in _roots:
            root.reshard()


def roots_in(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are called: an ensemble's members, a policy and its reference, or it."""
    if hasattr(model, "blocks") or hasattr(model, "backbone"):
        return [model]
    return [root for child in model.children() for root in roots_in(child)]


@contextlib.contextmanager
def whole(model: nn.Module, context: contextlib.AbstractContextManager) -> Iterator[None]:
    """`context`, in which every rank holds all weights of a sharded model, so that none waits for another."""
    from torch.distributed.fsdp import FSDPModule

    pieces = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in pieces:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with context:
            yield
    finally:
        for module in pieces:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


# ---------------------------------------------------------------- pieces and whole tensors


def rows(n: int, rank: int, world: int) -> tuple[int, int]:
    """Where a rank's rows of n begin and end: as torch.chunk cuts them, so the last ranks may have fewer."""
    size = -(-n // world)
    return min(n, rank * size), min(n, (rank + 1) * size)


def local(x: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def cut(x: Tensor, like: Tensor) -> Tensor:
    """The piece of x that this rank holds of `like`; x may be that piece already.

    Raises ValueError where x has another shape than `like`."""
    piece = local(like)
    if x.shape == piece.shape:
        return x
    if x.shape != like.shape:
        raise ValueError(f"a tensor has the shape {list(x.shape)}, not {list(like.shape)}")
    start, stop = rows(len(like), like.device_mesh.get_local_rank(), like.device_mesh.size())
    return x[start:stop]


def as_piece(x: Tensor, like: Tensor) -> Tensor:
    """x, cut and sharded as `like` is; x itself where `like` is not sharded, or x is one number."""
    if not hasattr(like, "to_local") or x.dim() == 0:
        return x
    piece = cut(x, like).to(local(like).device)
    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return type(like).from_local(piece, like.device_mesh, like.placements, **options)


@torch.no_grad()
def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """model.load_state_dict(state), of whole tensors or pieces, into a model that may be sharded."""
    own = model.state_dict()
    if not any(hasattr(x, "to_local") for x in own.values()):
        model.load_state_dict(state)
        return
    if different := sorted(own.keys() ^ state.keys()):
        raise UserError(f"weights of another model: {different[0]} is in one of the two alone")
    for name, x in own.items():
        local(x).copy_(cut(local(state[name]), x))


def gather(state: Mapping[str, Tensor], machine: Machine) -> dict[str, Tensor]:
    """The whole tensors on the CPU of rank 0, and nothing on the others.  All ranks take part, in order."""
    found = {}
    for name, x in state.items():
        full = x.full_tensor() if hasattr(x, "full_tensor") else x
        if machine.rank == 0:
            found[name] = full.cpu()
    return found


def agree(machine: Machine, function: Callable, *args: Any) -> Any:
    """function(*args); where it raises UserError on one rank, all raise one."""
    result, error = None, None
    try:
        result = function(*args)
    except UserError as failure:
        error = failure
    if machine.any(error is not None):
        raise error or UserError("another process failed: its own message says why")
    return result


# ---------------------------------------------------------------- does it fit?


def needs(
    trained: list[nn.Module], frozen: list[nn.Module], world: int, half: bool = False, writes: bool = True
) -> dict[str, int]:
    """{what: bytes} that each of `world` ranks holds of models that are not sharded yet, without activations.

    The first trained model is held whole if it `writes` text, then its linear layers in bf16 with `half`."""
    size = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    learnt = [size(p for p in model.parameters() if p.requires_grad) for model in trained]
    weights = sum(size(model.parameters()) for model in (*trained, *frozen))
    linear = [layer for layer in trained[0].modules() if half and type(layer) is nn.Linear]
    rounded = sum(layer.weight.numel() for layer in linear if layer.weight.dtype == torch.float32)
    return {
        "weights": weights // world,
        "gradients": max(learnt) // world,
        "Adam's moments": 2 * sum(learnt) // world,
    } | ({WHOLE: size(trained[0].parameters()) - 2 * rounded} if writes else {})


def refuse_unfit(
    machine: Machine, trained: list[nn.Module], frozen: list[nn.Module], half: bool, writes: bool
) -> None:
    """UserError with the arithmetic, where what a rank must hold is more than is free."""
    parts = needs(trained, frozen, machine.world, half, writes)
    free = free_bytes(machine.device)
    if machine.device.type == "cpu":  # where the models are now, and leave when they are sharded
        free += machine.world * parts["weights"]
    if sum(parts.values()) > free:
        said = " + ".join(f"{name} {n / 1e9:.3g} GB" for name, n in parts.items())
        raise UserError(
            f"--shard over {machine.world} processes: {said} are {sum(parts.values()) / 1e9:.3g} GB in each, "
            f"and {free / 1e9:.3g} GB are free: use more processes, --lora, or a smaller model"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its part of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # a system that does not tell
        return 2**63
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1024 * kib // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
