"""The audit's meters, on kernels whose answers are known; and that our kernels keep their bounds.

Everything that needs the compiler runs in a child process, which imports the small kernels below from this file: pytest's
own process may have imported triton as an interpreter.
"""

import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.tools.audit import BOUNDS, Case, main, missed, nbytes
from kernels.tools.meters import Buffers, count, inner_loops, parse

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

if triton:

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

    @triton.jit
    def twice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        first = tl.load(x_ptr + i, mask=i < n)
        tl.debug_barrier()
        tl.store(y_ptr + i, first + tl.load(x_ptr + i, mask=i < n), mask=i < n)

    @triton.jit
    def sums_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # reduces across the threads in every trip
        total = 0.0
        for start in range(0, n, BLOCK):
            total += tl.sum(tl.load(x_ptr + start + tl.arange(0, BLOCK)))
        tl.store(y_ptr, total)

    @triton.jit
    def strided_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(y_ptr + i, tl.load(x_ptr + i * stride))

    @triton.jit
    def spilling_kernel(
        x_ptr, y_ptr, BLOCK: tl.constexpr
    ):  # 1024 values in each thread of an NVIDIA warp, 512 in AMD's
        x = tl.load(x_ptr + tl.arange(0, BLOCK))
        tl.store(y_ptr + tl.arange(0, BLOCK), x / tl.sum(x))

    @triton.jit
    def outside_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i + BLOCK // 2))

    @triton.jit
    def refused_kernel(x_ptr, y_ptr, n, REFUSED: tl.constexpr):
        tl.static_assert(not REFUSED, "no kernel")


def launches(kernel: str, *args, outputs: int | None = None, **options):
    """A function of one tensor that launches a kernel of this file."""

    def call(x):
        y = torch.empty(len(x) if outputs is None else outputs, device=x.device)
        globals()[kernel][(1,)](x, y, *args, **options)
        return y

    return call


def only_interpreted(call):
    """`call` in the interpreter, nothing where it is compiled."""
    return lambda x: torch.empty(0, device=x.device) if x.device.type == "meta" else call(x)


def only_compiled(call):
    return lambda x: call(x) if x.device.type == "meta" else torch.empty(0)


def floats(n: int):
    return lambda device: [torch.zeros(n, device=device)]


CASES = [
    Case("copy", launches("copy_kernel", 100, BLOCK=64), floats(100)),
    Case("aligned", launches("copy_kernel", 8192, BLOCK=2048), floats(8192)),
    Case("twice", launches("twice_kernel", 100, BLOCK=128), floats(100)),
    Case("sums", launches("sums_kernel", 4096, BLOCK=1024, outputs=1), floats(4096)),
    Case("strided", launches("strided_kernel", 4096, 3, BLOCK=1024, outputs=4096), floats(3 * 4096)),
    Case("spilling", only_compiled(launches("spilling_kernel", BLOCK=32768, num_warps=1)), floats(32768)),
    Case("refused", only_compiled(launches("refused_kernel", 1, True)), floats(1)),
]
OUTSIDE = [Case("outside", only_interpreted(launches("outside_kernel", BLOCK=64)), floats(64))]


def audit(*arguments) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "kernels.audit", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """The report on CASES: {"kernels": {(case, target): row}, "calls": {case: row}}."""
    file = tmp_path_factory.mktemp("audit") / "small.json"
    done = audit("test_audit:CASES", "--targets", "cuda:90,hip:gfx942", "--json", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    kernels = {(call.split()[0], row["target"]): row for row in report["kernels"] for call in row["calls"]}
    return {"kernels": kernels, "calls": {call.split()[0]: row for call, row in report["calls"].items()}}


both = pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])


@needs_triton
def test_bytes_are_counted_exactly(small):
    copied, twice, sums = (small["calls"][name] for name in ("copy", "twice", "sums"))
    assert (copied["requested"], copied["distinct"], copied["minimum"]) == (
        800,
        800,
        800,
    )  # masked lanes cost nothing
    assert copied["by_argument"]["copy_kernel.x_ptr"] == {"load": 400}
    assert copied["by_argument"]["copy_kernel.y_ptr"] == {"store": 400}
    assert (twice["requested"], twice["distinct"], twice["minimum"]) == (1200, 800, 800)
    assert (sums["requested"], sums["distinct"], sums["minimum"]) == (4 * 4097,) * 3


@needs_triton
def test_an_access_out_of_bounds_is_an_error():
    done = audit("test_audit:OUTSIDE", "--trace")
    assert done.returncode != 0 and "32 lanes load outside every argument's memory" in done.stderr


@needs_triton
@both
def test_widths_are_seen(small, target):
    aligned, strided = (small["kernels"][name, target]["loops"] for name in ("aligned", "strided"))
    assert aligned and strided  # a compiler may make several loops of one
    assert all(set(loop["load"]) == set(loop["store"]) == {"128"} and loop["narrow"] == 0 for loop in aligned)
    assert all(set(loop["load"]) == {"32"} and loop["narrow"] >= loop["load"]["32"] for loop in strided)


@needs_triton
@both
def test_shuffles_and_barriers_in_the_loop_are_seen(small, target):
    aligned, sums = (small["kernels"][name, target]["loops"] for name in ("aligned", "sums"))
    assert sums and not any(loop["shuffle"] or loop["barrier"] for loop in aligned)
    assert all(
        loop["shuffle"] >= 5 and loop["barrier"] >= 1 for loop in sums
    )  # within each warp, and between warps


@needs_triton
@both
def test_spills_are_seen(small, target):
    clean, spilling = (small["kernels"][name, target] for name in ("aligned", "spilling"))
    assert clean["stack"] == clean["spills"] == 0
    assert spilling["stack"] > 0 and spilling["spills"] > 0 and spilling["registers"] > clean["registers"]


@needs_triton
@both
def test_a_kernel_that_does_not_compile_is_a_finding(small, target):
    assert "no kernel" in small["kernels"]["refused", target]["error"]


def test_loops_are_read_from_sass():
    """An outer loop around an inner one of ten instructions that moves 16 + 4 + 2 bytes, and itself waits in a loop."""
    code, labels = parse("""
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.LTC128B.128 R8, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E R9, desc[UR4][R4.64] ;
        /*0040*/                   SHFL.BFLY PT, R3, R0, 0x10, 0x1f ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R3 ;
        /*0070*/              @!P3 BRA `(.L_x_2) ;
        /*0080*/                   STG.E.U16 desc[UR4][R6.64], R3 ;
        /*0090*/                   STL [R1], R3 ;
        /*00a0*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00c0*/              @!P2 EXIT ;
        /*00d0*/                   CALL.REL.NOINC `($__a_function) ;
        /*00e0*/                   BRA.U UP0, `(.L_x_0) ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
""")
    assert len(code) == 17
    (loop,) = inner_loops(code, labels)
    assert loop["instructions"] == 10 and loop["instructions_per_byte"] == 10 / 22 and loop["narrow"] == 2
    assert loop["load"] == {128: 1, 32: 1} and loop["store"] == {16: 1}
    assert loop["shuffle"] == loop["barrier"] == loop["spill"] == 1
    assert count(code)["load"] == {32: 2, 128: 1}


def test_loops_are_read_from_amd_assembly():
    """The head stands behind the body, and a block behind the kernel's end jumps back: neither order makes a loop."""
    code, labels = parse("""
kernel:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	s_cbranch_scc0 .LBB0_4
	s_branch .LBB0_2
.LBB0_1:
	global_load_dwordx4 v[2:5], v[0:1], off
	buffer_load_ushort v6, v7, s[0:3], 0 offen
	v_add_f32_dpp v1, v1, v1 row_shr:8
	ds_bpermute_b32 v2, v3, v4
	s_barrier
.LBB0_2:
	global_store_short v[0:1], v2, off
	s_cbranch_scc1 .LBB0_1
.LBB0_3:
	global_store_dword v1, v0, s[4:5]
	s_endpgm
.LBB0_4:
	v_mov_b32_e32 v0, 0
	s_branch .LBB0_3
""")
    (loop,) = inner_loops(code, labels)
    assert loop["instructions"] == 7 and loop["instructions_per_byte"] == 7 / 20 and loop["narrow"] == 2
    assert loop["load"] == {128: 1, 16: 1} and loop["store"] == {16: 1}
    assert loop["shuffle"] == 2 and loop["barrier"] == 1


@torch.library.custom_op("minirlhf_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(3)[: len(x)] + x


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_weigh_what_is_alive(device):
    x = torch.zeros(1000, device=device)  # made outside: costs nothing, nor do its views and updates in place
    with Buffers() as buffers:
        x.view(10, 100).add_(1)
        assert buffers.peak == 0
        a = torch.empty(1000, device=device)
        b = a[:500].float() + 1
        assert buffers.live == buffers.peak == 4000 + 2000
        del a
        assert buffers.live == 2000
        doubled(x)  # 12000 inside it, and the result
        assert buffers.live == 2000 and buffers.peak == 2000 + 12000 + 4000
        assert nbytes([b, {"x": x}, None]) == 2000 + 4000


def perfect() -> dict:
    """A report that keeps every bound exactly."""
    loop = {"narrow": 0, "barrier": 0, "shuffle": 0, "instructions_per_byte": 6.0}
    call = {"requested": 101, "distinct": 100, "minimum": 100, "extra": 10 << 20}
    names = [
        f"{op} bfloat16 V=50257 {phase}"
        for op in ("token_logprobs", "token_kl")
        for phase in ("forward", "backward")
    ]
    calls = [*names, "linear_token_logprobs forward", "linear_token_logprobs backward", "gae forward"]
    kernels = [
        {"calls": [c], "target": "cuda:90", "stack": 0, "spills": 0, "loops": [dict(loop)]} for c in calls
    ]
    return {"kernels": kernels, "calls": {c: dict(call) for c in calls}}


SPOILED = {  # what is spoiled where -> the bound that must be reported
    ("calls", "token_kl bfloat16 V=50257 backward", "requested", 102): "bytes requested",
    ("loops", 0, "narrow", 1): "load/store width",
    ("loops", 0, "instructions_per_byte", 6.01): "log-prob + entropy forward",
    ("loops", 1, "instructions_per_byte", 6.01): "in the inner loop, backward",
    ("loops", 3, "instructions_per_byte", 6.02): "in the inner loop, backward",
    ("loops", 2, "instructions_per_byte", 8.01): "KL forward",
    ("loops", 1, "shuffle", 1): "barriers + shuffles",
    ("loops", 3, "barrier", 1): "barriers + shuffles",
    ("kernels", 6, "stack", 8): "stack and spills",
    ("kernels", 5, "spills", 1): "stack and spills",
    ("calls", "linear_token_logprobs forward", "extra", 11 << 20): "linear-fused forward",
    ("calls", "linear_token_logprobs backward", "extra", 65 << 20): "linear-fused backward",
    ("calls", "gae forward", "distinct", 101): "GAE, distinct",
}


@pytest.mark.parametrize("spoiled", SPOILED, ids=lambda s: f"{s[1]}-{s[2]}")
def test_each_bound_can_be_missed(spoiled):
    report = perfect()
    assert missed(report) == []
    table, where, field, value = spoiled
    row = report["kernels"][where]["loops"][0] if table == "loops" else report[table][where]
    row[field] = value
    (line,) = missed(report)
    assert SPOILED[spoiled] in line


def test_what_was_not_measured_is_a_miss():
    assert len(missed({"kernels": [], "calls": {}})) == len(BOUNDS)
    report = perfect()
    report["kernels"][0] = {
        "calls": ["token_logprobs bfloat16 V=50257 forward"],
        "target": "cuda:90",
        "error": "broken",
    }
    assert any("broken" in line for line in missed(report))
    report = copy.deepcopy(perfect())
    report["kernels"][0]["loops"] = []  # a loop that was not recognised must not pass for a good one
    assert any(str(math.inf) in line for line in missed(report))


MISTAKES = {
    "no colon": (["test_audit"], "not of the form package.module:CASES"),
    "no module": (["nowhere:CASES"], "cannot import nowhere"),
    "no such name": (["test_audit:NONE"], "test_audit has no NONE"),
    "no cases": (["test_audit:MISTAKES"], "test_audit:MISTAKES is no list of kernels.audit.Case"),
    "a target": (["--targets", "cuda:90,sm_80"], "'sm_80' is not of the form cuda:90"),
    "a folder": (["--json", "/nowhere/x.json"], "/nowhere/x.json: there is no such folder"),
    "an option": (["--goal"], "unrecognized arguments: --goal (--help lists"),
}


@needs_triton
@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_take_one_line(monkeypatch, capsys, argv, words):
    """And are found before anything is compiled."""
    monkeypatch.setattr(sys, "argv", ["audit", *argv])
    monkeypatch.setattr("kernels.tools.audit.audit", None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main() == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.startswith("kernels.audit: ") and words in err


def test_without_triton_it_says_so():
    code = "import runpy, sys; sys.modules['triton'] = None; runpy.run_module('kernels.audit', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "triton" in done.stderr


@needs_triton
@pytest.mark.long
def test_our_kernels_keep_their_bounds(tmp_path):
    done = audit("--check", "--targets", "cuda:90,hip:gfx942", "--json", tmp_path / "ours.json")
    assert done.returncode == 0, re.findall("MISSED.*", done.stdout) or done.stderr
    text = (tmp_path / "ours.json").read_text()
    calls = json.loads(text)["calls"]
    assert {call.split()[0] for call in calls} == {
        "token_logprobs",
        "token_kl",
        "linear_token_logprobs",
        "gae",
    }
    assert not [word for word in (str(ROOT), str(Path.home()), platform.node()) if word and word in text]
