"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), without which a CPU test says little about a GPU.

1. tl.dot multiplies the bit patterns of bf16 operands as integers (triton #11584). Here they are converted
first. 2. A conversion from fp32 to bf16 truncates. GPUs round to the nearest, ties to even. 3.
tl.associative_scan goes from element to element, at 120 us each, and in this order a combine function that is
not
   associative looks right. Here it combines in a tree (Hillis & Steele 1986), as GPUs do, in log2(n) calls.

`repair()` is called by tests/kernels/conftest.py, kernels.testing and benchmarks/gpu.py. A GPU needs none of
it.
"""

import numpy as np


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + 0x7FFF + even) >> 16).astype(np.uint16))


def repair() -> None:
    """Patch triton.runtime.interpreter. A second call changes nothing."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ScanOps, TensorHandle

    if hasattr(ScanOps, "repaired"):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *rest):
        wide = (
            TensorHandle(_from_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, *wide, d, *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_to_bf16(source.data), tl.bfloat16)
        return cast(self, source, to)

    def generic_scan(self, inputs):
        now = [x.handle.data for x in inputs]
        tensors = lambda arrays: [self.to_tensor(a, x.dtype) for a, x in zip(arrays, inputs, strict=True)]
        length, index = now[0].shape[self.axis], np.indices(now[0].shape)[self.axis]
        step = 1
        while (
            step < length
        ):  # element i holds the scan of i - step + 1 .. i, and takes in as many before them
            before = [np.roll(a, step, self.axis) for a in now]
            out = self.combine_fn.fn(*tensors(before), *tensors(now))
            out = out if isinstance(out, tuple | list | tl.tuple) else (out,)
            now = [
                np.where(index < step, a, o.handle.data).astype(a.dtype)
                for a, o in zip(now, out, strict=True)
            ]
            step *= 2
        return tensors(now)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    ScanOps.generic_scan, ScanOps.repaired = generic_scan, True
