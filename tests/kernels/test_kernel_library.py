"""The four functions inside torch.compile and torch.library, without triton, and beside libraries that look for `kernels`."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kernels
from kernels import dispatch
from kernels.tools.testing import INTERPRETED, OPS

ROOT = Path(__file__).resolve().parents[2]


def arguments(op, rows=3, seed=0):
    """Two positional leaves or one, the rest, and keyword arguments."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    if op == "gae":
        inputs = [
            draw(rows, 6),
            draw(rows, 6),
            torch.arange(6) < torch.tensor([[2], [6], [4]])[torch.arange(rows) % 3],
        ]
        return inputs + [torch.rand(rows, 6, generator=g) < 0.3, draw(rows)], {"gamma": 0.9}
    inputs = (
        [draw(rows, 7), draw(11, 7)]
        if op == "linear_token_logprobs"
        else [draw(rows, 11) for _ in OPS[op].inputs]
    )
    mask = torch.arange(rows) % 3 != 1
    return [*inputs, torch.randint(11, (rows,), generator=g)], {"temperature": 0.7, "mask": mask}


def results_and_gradients(function, op, rows):
    tensors, options = arguments(op, rows)
    leaves = [x.requires_grad_(x.is_floating_point() and op != "gae") for x in tensors]
    out = function(*leaves, **options)
    if op != "gae":
        sum((i + 1) * x.sin().sum() for i, x in enumerate(out)).backward()
    return [*(x.detach() for x in out), *(x.grad for x in leaves if x.requires_grad)]


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op):
    """Forward and backward, and shapes that change."""
    function = getattr(kernels, op)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args, **options: function(*args, **options), fullgraph=True, backend="aot_eager"
    )
    for rows in (3, 4, 6):
        want = results_and_gradients(function, op, rows)
        for a, b in zip(results_and_gradients(compiled, op, rows), want, strict=True):
            assert torch.equal(a, b)


class Calls(TorchDispatchMode):
    """Collects the calls of our own operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minirlhf":
            self.seen[func.name()] = (
                func,
                tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (args, kwargs or {})),
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    with Calls() as calls:
        calls.seen = {}
        results_and_gradients(getattr(kernels, op), op, 3)
    assert len(calls.seen) >= (1 if op == "gae" else 2)
    for name, (func, (args, options)) in calls.seen.items():
        if op != "gae" and "backward" not in name:
            args = tree_map_only(torch.Tensor, lambda x: x.requires_grad_(x.is_floating_point()), args)
        torch.library.opcheck(func, args, options)


def child(code, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)


def test_importing_the_package_imports_nothing():
    """Others look for a package called kernels (transformers does), and take ours for theirs if it says so."""
    done = child(
        "import sys, kernels; print('torch' in sys.modules, 'triton' in sys.modules, hasattr(kernels, '__version__'))"
    )
    assert done.stdout.split() == ["False"] * 3, done.stderr


def test_whoever_looks_for_another_package_of_that_name_is_told():
    with pytest.raises(ImportError):
        from kernels import get_kernel  # noqa: F401
    assert getattr(kernels, "__version__", "N/A") == "N/A"
    assert sorted(kernels.__all__) == ["gae", "linear_token_logprobs", "token_kl", "token_logprobs"]


WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to interpret without triton")
def test_works_without_triton():
    code = """
import torch
from kernels import gae, linear_token_logprobs, token_kl, token_logprobs
x, t = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, dtype=torch.int64)
results = [token_logprobs(x, t)[0], token_kl(x, x, t)[0], linear_token_logprobs(x, torch.ones(4, 4), t)[0]]
sum(y.sum() for y in results).backward()
print(*(round(float(y[0].exp()), 6) for y in results), float(gae(x.detach(), x.detach())[0].sum()), "triton" in sys.modules)
"""
    done = child(WITHOUT.format(name="triton") + code)
    assert done.stdout.split() == ["0.25", "0.25", "0.25", "0.0", "False"], done.stderr


def test_testing_without_hypothesis_says_what_to_install():
    run = "import runpy; sys.argv = ['x', 'kernels:gae']; runpy.run_module('kernels.testing', run_name='__main__')"
    done = child(WITHOUT.format(name="hypothesis") + run)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("pip install hypothesis"), (
        done.stderr
    )
    done = child(WITHOUT.format(name="hypothesis") + "import kernels.testing")
    assert "ImportError: kernels.testing draws its examples with hypothesis: pip install" in done.stderr


@pytest.mark.parametrize(("value", "triton"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_MINIRLHF_PLAIN_sends_gpu_tensors_to_plain_pytorch(monkeypatch, value, triton):
    on_gpu = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda"))
    monkeypatch.setattr(dispatch, "triton", "installed")
    monkeypatch.delenv("MINIRLHF_PLAIN", raising=False)
    if value is not None:
        monkeypatch.setenv("MINIRLHF_PLAIN", value)
    assert dispatch.use_triton(on_gpu) is triton


@pytest.mark.skipif(
    not INTERPRETED, reason="tests that the interpreter's tensors leave Triton: set TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("op", ["token_logprobs", "token_kl", "linear_token_logprobs"])
def test_MINIRLHF_PLAIN_is_read_at_every_call(monkeypatch, op):
    """Only plain PyTorch refuses a token outside the vocabulary, so the refusal shows which path was taken."""
    (*inputs, _), _ = arguments(op)
    wrong = torch.full((3,), 11)
    call = getattr(kernels, op)
    assert call(*inputs, wrong)[0].isnan().all()
    monkeypatch.setenv("MINIRLHF_PLAIN", "1")
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.10"):
        call(*inputs, wrong)
    monkeypatch.delenv("MINIRLHF_PLAIN")
    assert call(*inputs, wrong)[0].isnan().all()
