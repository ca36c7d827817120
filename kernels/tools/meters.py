"""Three meters for Triton kernels on a machine without a GPU; kernels/tools/audit.py applies them.

`capture` watches calls whose tensors are on the `meta` device, which gives them a shape but no memory.
Triton's own launcher then specialises and compiles each kernel, and starts none: so the code is what would
run, at sizes that no test could hold. `Buffers` counts the bytes of the tensors made meanwhile. `read` finds
in the machine code the registers, the stack, the spills, and for each innermost loop what one thread does in
one trip: the width of its accesses, barriers and shuffles, instructions per byte of global memory.
`byte_trace` counts the bytes that kernels ask for when Triton's interpreter runs them (TRITON_INTERPRET=1).
"""

import re
import subprocess
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Buffers(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def _watch(self, values: Any, new: bool) -> None:
        for storage in (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)):
            if storage._cdata not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._watch((args, kwargs), new=False)  # what a view or an update in place returns is no new buffer
        custom = OPDEFS.get(func.name().split(".")[0])
        if custom is None:
            result = func(*args, **(kwargs or {}))
        else:  # an operator written in Python: look inside it
            with self:
                result = custom._init_fn(*args, **(kwargs or {}))
        self._watch(result, new=True)
        return result


@contextmanager
def capture(target: str) -> Iterator[tuple[list[tuple[str, Any]], Buffers]]:
    """Yields a list of (name, compiled kernel or exception), one per launch, and the buffers made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kind, arch = target.split(":")
    gpu = GPUTarget(kind, int(arch), 32) if kind == "cuda" else GPUTarget(kind, arch, 64)
    made: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> None:
        try:
            made.append((kernel.__name__, launch(kernel, *args, **kwargs | {"warmup": True})))
        except Exception as error:  # that it does not compile is a finding too
            made.append((kernel.__name__, error))

    driver.set_active(
        SimpleNamespace(  # Triton caches what it compiled by device
            get_current_target=lambda: gpu,
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
        )
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        for name, module in list(sys.modules.items()):
            if name.startswith("kernels.") and hasattr(module, "use_triton"):
                stack.enter_context(patch.object(module, "use_triton", lambda *tensors: True))
        yield made, stack.enter_context(Buffers())


KINDS = {  # opcodes of NVIDIA's SASS and of AMD's assembly
    "load": r"LDG|(global|buffer|flat)_load",
    "store": r"STG|(global|buffer|flat)_store",
    "spill": r"LDL|STL|scratch_",
    "barrier": r"BAR\b|s_barrier",
    "shuffle": r"SHFL|C?REDUX|ds_(b?permute|swizzle)|v_readlane|v_permlane|\w+_dpp",
}
WIDTHS = [(r"\.256", 256), (r"\.128\b|dwordx4|b128", 128), (r"dwordx3|b96", 96), (r"\.64\b|dwordx2|b64", 64)]
WIDTHS += [(r"[US]16|short|b16", 16), (r"[US]8|byte|b8", 8), (r"", 32)]


def parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """SASS or AMD assembly -> instructions (opcode, operands), and the index of each label."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+(?:/\*\w+\*/\s+)?(@!?U?P\w+\s+)?([A-Za-z][\w.]*)(.*)", line):
            code.append((found[2], (found[1] or "") + found[3]))
    return code, labels


def count(code: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The number of instructions of each kind; of loads and stores, the number of each width in bits."""
    ops = {kind: [op for op, _ in code if re.match(pattern, op)] for kind, pattern in KINDS.items()}
    width = lambda op: next(bits for pattern, bits in WIDTHS if re.search(pattern, op))
    return {
        kind: dict(Counter(map(width, ops[kind]))) if kind in ("load", "store") else len(ops[kind])
        for kind in ops
    }


def inner_loops(code: Sequence[tuple[str, str]], labels: dict[str, int]) -> list[dict[str, Any]]:
    """One trip of each innermost loop that touches global memory. (Loops that only wait may be inside of it.)

    A loop has a head, through which every path from the kernel's start goes, and consists of what leads back
    to it.
    """
    before: dict[int, list[int]] = defaultdict(list)  # the instructions that control may come from
    for i, (op, operands) in enumerate(code):
        jump = re.match(r"BRA|CALL|EXIT|s_c?branch|s_endpgm", op)
        label = re.search(r"\.L\w+", operands)
        target = (
            labels.get(label[0]) if jump and label else None
        )  # a CALL of a label is a jump, of a function it returns
        if target is not None:
            before[target].append(i)
        conditional = op.startswith("s_cbranch") or operands.startswith("@") or "," in operands
        if not jump or conditional or (op.startswith("CALL") and target is None):
            before[i + 1].append(i)
    bodies: dict[int, set[int]] = {}
    for head in set(labels.values()):
        for latch in before[head]:
            path, todo, closed = {head}, [latch], False
            while todo:
                i = todo.pop()
                closed |= i == head
                if i not in path:
                    path.add(i)
                    todo += before[i]
            if closed and 0 not in path - {head}:
                bodies[head] = bodies.get(head, set()) | path
    loops = {}
    for head in sorted(bodies):
        trip = [code[i] for i in sorted(bodies[head])]
        loop = {"instructions": len(trip), **count(trip)}
        if moved := sum(bits // 8 * n for kind in ("load", "store") for bits, n in loop[kind].items()):
            narrow = sum(n for kind in ("load", "store") for bits, n in loop[kind].items() if bits < 128)
            loops[head] = loop | {"narrow": narrow, "instructions_per_byte": loop["instructions"] / moved}
    return [
        loop
        for head, loop in loops.items()
        if not any(inner in bodies[head] for inner in loops if inner != head)
    ]


NUMBERS = ("registers", "stack", "spills", "shared")


def read(made: Any) -> dict[str, Any]:
    """The numbers of a compiled kernel, or {"error": ...} where the compiler failed."""
    if isinstance(made, Exception):
        return {
            "error": re.sub(r"(/[\w.+-]+)+/", "", f"{type(made).__name__}: {made}"[:400])
        }  # less this machine's paths
    if "cubin" in made.asm:  # the code that would run, not a second run of the assembler
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tools = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin"
            run = lambda tool, flag: (
                subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True).stdout
            )
            usage, listing = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")
        registers, stack = (int(n) for n in re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups())
        spilled = 0
    else:
        listing = made.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", listing)[1])
        registers, stack = field("vgpr_count"), field("private_segment_fixed_size")
        spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
    code, labels = parse(listing)
    total = count(code)
    numbers = dict(
        zip(NUMBERS, (registers, stack, total["spill"] + spilled, made.metadata.shared), strict=True)
    )
    return numbers | {"load": total["load"], "store": total["store"], "loops": inner_loops(code, labels)}


@contextmanager
def byte_trace() -> Iterator[tuple[dict[str, Counter[str]], dict[str, list]]]:
    """Yields the number of bytes that interpreted kernels ask for, and the addresses of these bytes.

    The numbers go by "kernel.argument" and by kind (load, store, atomic), the addresses by kind. A masked
    lane costs nothing. An access outside every argument's memory raises IndexError, before the interpreter
    could crash on it.
    """
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    asked, touched = defaultdict(Counter), defaultdict(list)
    memory: dict[int, tuple[int, str]] = {}  # start -> end and name, of the running kernel's arguments
    start_kernel = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        memory.clear()
        for name, x in (dict(zip(executor.arg_names, args, strict=False)) | kwargs).items():
            if isinstance(x, Tensor):
                start = x.untyped_storage().data_ptr()
                memory[start] = start + x.untyped_storage().nbytes(), f"{executor.fn.__name__}.{name}"
        start_kernel(executor, *args, **kwargs)

    def traced(method: Callable, kind: str, where: int, mask: int) -> Callable:
        def access(builder: Any, *args: Any, **kwargs: Any) -> Any:
            pointers = np.asarray(args[where].data)
            asked_for = np.asarray(args[mask].data).astype(bool)  # a splat of a scalar mask is int8
            addresses = pointers[np.broadcast_to(asked_for, pointers.shape)]
            size = max(1, args[where].get_element_ty().primitive_bitwidth // 8)
            outside = addresses.size
            for start, (end, name) in memory.items():
                if inside := int(((start <= addresses) & (addresses + size <= end)).sum()):
                    asked[name][kind] += inside * size
                    outside -= inside
            if outside:
                raise IndexError(f"{outside} lanes {kind} outside every argument's memory")
            touched[kind].append((addresses[:, None] + np.arange(size, dtype=addresses.dtype)).ravel())
            return method(builder, *args, **kwargs)

        return access

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", launch))
        # the interpreter's method, the kind of access, and which of its arguments are the pointers and the
        # mask
        for name, *how in (
            ("masked_load", "load", 0, 1),
            ("masked_store", "store", 0, 2),
            ("atomic_rmw", "atomic", 1, 3),
        ):
            method = getattr(InterpreterBuilder, f"create_{name}")
            stack.enter_context(patch.object(InterpreterBuilder, f"create_{name}", traced(method, *how)))
        yield asked, touched
