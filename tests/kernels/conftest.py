"""Under TRITON_INTERPRET=1 the interpreter is repaired before any kernel runs; without it, it runs beside the other tests."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED, HAS_TRITON = (
    os.environ.get("TRITON_INTERPRET") == "1",
    importlib.util.find_spec("triton") is not None,
)
OPS = ["linear_token_logprobs", "token_kl", "token_logprobs", "gae"]
FILES = ["kernel_numbers", "kernel_arguments", "kernel_library", "interpreter"]
RUNS = {op: ["kernels.testing", f"kernels:{op}"] for op in OPS}
RUNS["files"] = ["pytest", "-p", "no:cacheprovider", *(f"tests/kernels/test_{name}.py" for name in FILES)]


def pytest_configure(config):
    if INTERPRETED and HAS_TRITON:
        from kernels.tools.interpreter import repair

        repair()
        # numpy speaks up where a kernel computes inf - inf, as it may; pytest would record each of a hundred thousand times.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(scope="session", autouse=True)
def runs(request):
    """What tests want to know of the interpreter, as futures: the first test of this folder starts the processes, one after
    the other, on a core of their own. (They are processes because triton reads the variable when it is imported.)"""

    def run(module):
        environment, command = os.environ | {"TRITON_INTERPRET": "1"}, [sys.executable, "-m", *module]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    asked = any("interpreted" in getattr(item, "fixturenames", ()) for item in request.session.items)
    pool = ThreadPoolExecutor(1)
    yield {
        name: pool.submit(run, module)
        for name, module in RUNS.items()
        if asked and not INTERPRETED and HAS_TRITON
    }
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def interpreted(runs):
    if not runs:
        pytest.skip(
            "this is the interpreter's run"
            if INTERPRETED
            else "triton is not installed: nothing to interpret"
        )
    return runs
