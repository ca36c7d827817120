"""A GPU that is not there: tensors that live on the device `fakegpu:0` and are computed on the CPU.

    python tests/fake_gpu.py REPORT.json train_sft.py --preset smoke ++ -m minirlhf.chat runs/smoke/sft

runs commands one after the other (separated by ++) and writes what happened to REPORT.json.  Under torchrun each process
has a device of its own, models may be split over them (--shard), and the first one writes the report.  Two faults that no
test on a CPU notices are noticed here:

- an operation on tensors of different devices raises RuntimeError, as it does on a GPU;
- whenever the host waits for the device, the wait is counted, with the line that asked for it.  That is every copy to
  the host (.item(), .tolist(), .cpu(), if tensor), every result whose size depends on values (nonzero, x[mask]), and
  every copy from the host that is not marked non_blocking (torch.tensor(..., device=), indices on the CPU).

How it works: PyTorch keeps a spare device for hardware it does not know, and lets Python implement it.  Here a tensor of
that device holds a CPU tensor, and a dispatch mode unwraps arguments, checks them, calls the CPU's operation and wraps the
result.  Attention takes the path of packed tokens, as on a GPU in bf16, with plain PyTorch in place of the kernel;
`padded()` takes the other path.  Autocast does nothing, and speed means nothing.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parents[1]
NAME = "fakegpu"
DEVICE = torch.device("privateuseone", 0)  # renamed by install()

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
SIZE_DEPENDS_ON_VALUES = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
READS_VALUES = {"_local_scalar_dense", "is_nonzero", "equal", "multinomial"}

waits: collections.Counter[str] = collections.Counter()  # "kind file:line" -> how often
counts: collections.Counter[str] = collections.Counter()  # forwards, steps, rollouts, packed attention


class OnGpu(Tensor):
    """A tensor on the fake device; `cpu_copy` holds its values."""

    cpu_copy: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        with _disable_current_modes():
            meta = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        wrapper = Tensor._make_subclass(
            cls, meta, False, dispatch_device=True, device_for_backend_keys=DEVICE
        )
        wrapper.cpu_copy = values
        return wrapper

    @property
    def data(self) -> OnGpu:
        return self.detach()

    @data.setter
    def data(self, new: OnGpu) -> None:
        Tensor.data.__set__(self, new)
        self.cpu_copy = new.cpu_copy

    def tolist(self) -> list:
        count_wait("to host")
        return self.cpu_copy.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.cpu_copy!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a sharded tensor: it comes back with this rank's piece
        return dispatch(function, args, kwargs or {})


class FakeGpuMode(TorchDispatchMode):
    """Sees the operations that have no tensor among their arguments, such as torch.zeros(3, device='fakegpu')."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a sharded tensor: it comes back with this rank's piece
        return dispatch(function, args, kwargs or {})


def dispatch(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, after its devices are checked and its waits are counted."""
    if function is torch.ops.prim.device.default:
        return DEVICE
    name = function._schema.name.split("::")[1]
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == NAME
    to_host = device is not None and torch.device(device).type == "cpu"
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGpu)]
    on_host = [x for x in tensors if not isinstance(x, OnGpu)]
    if on_gpu and on_host:
        check_devices(name, args, on_host)
    if on_gpu or to_gpu:
        kind = wait_of(name, args, kwargs, to_host, bool(on_host))
        if kind:
            count_wait(kind)

    kwargs = {**kwargs, "device": torch.device("cpu")} if to_gpu else kwargs
    kwargs = {**kwargs, "generator": None} if "generator" in kwargs and (on_gpu or to_gpu) else kwargs
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if to_host or not (on_gpu or to_gpu) or name == "copy_" and not isinstance(args[0], OnGpu):
        return result
    known = {id(x.cpu_copy): x for x in on_gpu}  # in-place operations return what they were given

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGpu(x)

    return tree_map(wrap, result)


def unwrap(x: Any) -> Any:
    return x.cpu_copy if isinstance(x, OnGpu) else x


def check_devices(name: str, args: tuple, on_host: list[Tensor]) -> None:
    """Raise where a GPU would: it takes numbers (0-dim tensors), copies and indices from the host, nothing else."""
    indexing = name in INDEXING
    if name in ("copy_", "_to_copy") or indexing and isinstance(args[0], OnGpu):
        return
    if indexing or any(x.dim() > 0 for x in on_host):
        shape = tuple(on_host[0].shape)
        raise RuntimeError(f"{name}: tensors on {NAME}:0 and cpu (of shape {shape}), at {where()}")


def wait_of(name: str, args: tuple, kwargs: dict[str, Any], to_host: bool, mixed: bool) -> str | None:
    """What the host would wait for in this operation, or None."""
    if name in READS_VALUES or to_host:
        return "to host"
    if name in SIZE_DEPENDS_ON_VALUES or name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "size"
    if name == "_to_copy":
        from_host = not isinstance(args[0], OnGpu)
        return "from host" if from_host and not kwargs.get("non_blocking") else None
    if name == "copy_":
        if not isinstance(args[0], OnGpu):
            return "to host"
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        return "from host" if not isinstance(args[1], OnGpu) and not non_blocking else None
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if any(not isinstance(x, OnGpu) and x.dim() > 0 for x in indices):
            return "from host"
        fills = len(args) > 2 and args[2].numel() == 1  # x[mask] = 0 is masked_fill
        if any(x.dtype == torch.bool for x in indices) and not fills:
            return "size"
    return None


def count_wait(kind: str) -> None:
    waits[f"{kind}  {where()}"] += 1


def where() -> str:
    """file:line of the innermost frame in the repository, this file aside; the backward pass has none of its own."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(str(ROOT)) and "site-packages" not in path:
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward:0"


@contextlib.contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Makes the device known to PyTorch and to minirlhf, whose models then live there.  Once per process: it stays."""
    global DEVICE
    _setup_privateuseone_for_python_backend(NAME)
    DEVICE = torch.device(NAME, 0)
    backend = getattr(torch, NAME)
    for attribute, value in {
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
    }.items():
        if not hasattr(backend, attribute):
            setattr(backend, attribute, value)
    for attribute in (
        "Stream",
        "Event",
        "current_stream",
        "stream",
    ):  # FSDP has several; here nothing overlaps
        setattr(backend, attribute, getattr(torch.cpu, attribute))
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .to() keeps the class of parameters
    torch.tensor, torch.as_tensor = through_dispatch(torch.tensor), through_dispatch(torch.as_tensor)
    use_in_minirlhf()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FakeGpuMode():
        yield DEVICE


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int, longest_k: int,
    *, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn in plain PyTorch, without a wait; what no text covers is NaN."""
    assert starts.dtype == torch.int32 and starts_k is starts and longest_k == longest and enable_gqa
    counts["packed"] += 1
    token = torch.arange(len(q), device=q.device, dtype=torch.int32)
    text = torch.searchsorted(starts, token, right=True)
    seen = text[:, None] == text
    if window_size == (-1, 0):
        seen = seen & (token <= token[:, None])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)
    return torch.where((token < starts[-1])[:, None, None], y, torch.nan)


@contextlib.contextmanager
def padded() -> Iterator[None]:
    """Attention on padded rows, as a GPU takes it in fp32."""
    from minirlhf.support import ragged

    packs, ragged.attends_packed = ragged.attends_packed, lambda device, head_dim: False
    try:
        yield
    finally:
        ragged.attends_packed = packs


def through_dispatch(make: Any) -> Any:
    """torch.tensor that copies to its device in a step that the dispatch mode sees; the original one bypasses it."""

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        x = data if isinstance(data, Tensor) else make(data, *args, **kwargs)
        return x.to(device=x.device if device is None else device, dtype=kwargs.get("dtype") or x.dtype)

    return tensor


def use_in_minirlhf() -> None:
    """Let minirlhf compute on the fake device in fp32, and count its forward passes, optimiser steps and rollouts."""
    from torch.nn.attention import varlen

    from minirlhf import model, rollout
    from minirlhf.support import elastic, hardware, ragged, shard

    setup_machine, shard_root = hardware.setup_machine, shard._shard_root

    def setup(*args: Any, **kwargs: Any) -> hardware.Machine:
        machine = setup_machine(*args, **kwargs)
        return hardware.Machine(DEVICE, machine.rank, machine.world)

    hardware.setup_machine = setup
    hardware.pick_precision = lambda wish: "fp32"
    # FSDP would move a parameter by its `.data`, which may not change its class.
    shard._shard_root = lambda root, *rest: shard_root(root.to(DEVICE), *rest)
    elastic.leave_group = lambda error: None  # it would end the process, and more commands may follow
    varlen.varlen_attn = varlen_attn
    ragged.attends_packed = lambda device, head_dim: device.type == NAME
    model.GPT.forward = counted("forwards", model.GPT.forward)
    rollout.generate = counted("rollouts", rollout.generate)
    torch.optim.AdamW.step = counted("steps", torch.optim.AdamW.step)


def counted(name: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def run_command(words: list[str]) -> dict[str, Any]:
    """Run `script.py options` or `-m module options` -> exit code, error, counts and waits.

    `loop`: the waits between the first optimiser step and the last.
    """
    waits.clear()
    counts.clear()
    seen: list[collections.Counter[str]] = []  # waits before each optimiser step
    step = torch.optim.AdamW.step

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(waits.copy())
        return step(*args, **kwargs)

    torch.optim.AdamW.step = note
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"a line\nand another\n"))
    code, error = 0, None
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as stop:
        code, error = 1, f"{type(stop).__name__}: {stop}"
    finally:
        torch.optim.AdamW.step = step
    loop = dict(seen[-1] - seen[0]) if seen else {}
    return {"code": code, "error": error, "counts": dict(counts), "waits": dict(waits), "loop": loop}


def main() -> None:
    report, commands = Path(sys.argv[1]), [[]]
    for word in sys.argv[2:]:
        if word == "++":
            commands.append([])
        else:
            commands[-1].append(word)
    sys.path.insert(0, str(ROOT))
    with fake_gpu():
        results = [run_command(words) for words in commands]
    if int(os.environ.get("RANK", 0)) == 0:
        report.write_text(json.dumps(results, indent=1))
    for words, result in zip(commands, results, strict=True):
        print(f"\n{' '.join(words)}: exit {result['code']} {result['error'] or ''} {result['counts']}")
        for line, n in sorted(result["waits"].items(), key=lambda item: -item[1]):
            print(f"{n:7d}  {line}  (in the loop: {result['loop'].get(line, 0)})")
    sys.stdout.flush()
    os._exit(0)  # see elastic.leave_group


if __name__ == "__main__":
    main()
