"""Attention on packed tokens, as a GPU takes it in bf16: with plain attention, text by text, in place of torch's kernel."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from minirlhf.model import GPT, KVCache, RewardModel, ValueModel, attend
from minirlhf.support import ragged
from tests.test_model import ENCODER, LLAMA, SHAPES, SMALL

CPU = torch.device("cpu")


def text_by_text(q, k, v, starts, starts_k, longest, longest_k, *, window_size, enable_gqa):
    """varlen_attn's contract; NaN where no text is, which the kernel leaves unwritten."""
    assert starts is starts_k and starts.dtype == torch.int32 and longest == longest_k and enable_gqa
    assert window_size in ((-1, -1), (-1, 0)) and all(x.stride(-1) == 1 for x in (q, k, v))
    edges = starts.tolist()
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[0] == 0 and min(lengths) > 0 and max(lengths) == longest and edges[-1] <= len(q)
    y = torch.full_like(q, math.nan)
    for a, b in zip(edges, edges[1:], strict=False):
        heads = (x[a:b].transpose(0, 1) for x in (q, k, v))
        text = F.scaled_dot_product_attention(*heads, is_causal=window_size == (-1, 0), enable_gqa=True)
        y = torch.cat([y[:a], text.transpose(0, 1), y[b:]])
    return y


@pytest.fixture
def on_gpu(monkeypatch):
    """Take the path of a GPU in bf16, on the CPU -> a list of its calls' numbers of tokens."""
    calls = []

    def count(q, *args, **kwargs):
        calls.append(len(q))
        return text_by_text(q, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", count)
    monkeypatch.setattr(ragged, "attends_packed", lambda device, head_dim: True)
    return calls


def batch(kind, T=9):
    """tokens, mask [5, T], with padding on the left, on the right, in between, and a text without a token."""
    tokens, mask = torch.randint(50, (5, T)), torch.ones(5, T, dtype=torch.bool)
    if kind == "left":
        mask = torch.arange(T) >= torch.tensor([0, 3, T - 1, 1, 5])[:, None]
    elif kind == "right":
        mask = torch.arange(T) < torch.tensor([T, 3, 1, 2, 5])[:, None]
    else:
        mask[0, 2:4] = mask[1, :2] = mask[1, -1:] = mask[2] = mask[4, 1:] = False
    return tokens, mask


def compared(model, compute, on_gpu, monkeypatch):
    """Results and gradients of compute(): [packed, padded]."""
    found = []
    for packs in (True, False):
        monkeypatch.setattr(ragged, "attends_packed", lambda device, head_dim, packs=packs: packs)
        model.zero_grad()
        result = compute()
        result.square().sum().backward()
        found.append([result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert on_gpu
    return found


@pytest.mark.parametrize("padding", ["left", "right", "between"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_padded_rows(shape, padding, on_gpu, monkeypatch):
    torch.manual_seed(0)
    model, (tokens, mask) = GPT(SHAPES[shape]), batch(padding)
    compute = lambda: model.logits(model(tokens, mask)[mask])
    packed, padded = compared(model, compute, on_gpu, monkeypatch)
    for a, b in zip(packed, padded, strict=True):
        assert (a - b).norm() <= 1e-6 * (b.norm() + 1)
    step = 1 << max(0, int(mask.sum()).bit_length() - 5)
    assert on_gpu == len(model.blocks) * [
        -int(mask.sum()) % step + int(mask.sum())
    ]  # no padding but fill_up's


@pytest.mark.parametrize("pooling", ["last", "last+mean"])
def test_values_and_scores_are_those_of_padded_rows(pooling, on_gpu, monkeypatch):
    torch.manual_seed(0)
    tokens, mask = batch("left")
    wanted = mask & (torch.arange(9) > 6)
    model = ValueModel(LLAMA, pooling)
    compute = lambda: model.values(tokens, mask, wanted)[wanted]
    for a, b in zip(*compared(model, compute, on_gpu, monkeypatch), strict=True):
        assert (a - b).norm() <= 1e-6 * (b.norm() + 1)
    model = RewardModel(ENCODER, pooling)
    for a, b in zip(*compared(model, lambda: model(tokens, mask), on_gpu, monkeypatch), strict=True):
        assert (a - b).norm() <= 1e-6 * (b.norm() + 1)


def test_recomputed_blocks_take_the_same_path(on_gpu, monkeypatch):
    torch.manual_seed(0)
    tokens, mask = batch("right")
    model = GPT(SMALL)
    model(tokens, mask).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.recompute = True
    model(tokens, mask).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert len(on_gpu) == 3 * 2


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_that_a_kernel_leaves_unwritten_reaches_a_gradient(on_gpu):
    """41 tokens are filled up to 42: of those, the last belongs to no text of the batch."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, context=41))
    mask = torch.arange(41) < torch.tensor([35, 6])[:, None]
    with torch.autograd.detect_anomaly(check_nan=True):
        model(torch.randint(50, (2, 41)), mask).square().sum().backward()
    assert on_gpu == [42, 42]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any), more=st.integers(0, 9))
def test_boundaries_cover_every_token_and_no_empty_text(lengths, more):
    found = ragged.find_boundaries(torch.tensor(lengths), sum(lengths) + more, CPU)
    edges = found.starts.tolist()
    sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert sizes == [n for n in [*lengths, more] if n] and found.longest == max(sizes)
    assert edges[-1] == sum(lengths) + more and found.starts.dtype == torch.int32


def test_batches_without_padding_and_caches_take_torchs_own_attention(on_gpu):
    tokens, mask = batch("left")
    model = GPT(SMALL)
    model(tokens)
    model(tokens, torch.ones_like(mask))
    model(tokens, mask, KVCache(model, 5, 12))
    single = torch.zeros_like(mask)
    single[:, 3] = True
    model(tokens, single)  # every text is one token
    assert (model(tokens, torch.zeros_like(mask)) == 0).all()  # no token at all
    assert on_gpu == []


def test_a_text_that_does_not_fit_the_context_is_told_by_its_own_length(on_gpu):
    """Not by the tokens of the whole row, which are more than a context."""
    model, mask = GPT(SMALL), torch.ones(5, 32, dtype=torch.bool)
    mask[0, 20:] = False
    model(torch.randint(50, (5, 32)), mask)
    assert on_gpu == 2 * [152]


@pytest.mark.parametrize("lacks", ["cuda", "autocast", "ampere", "eights", "width", "torch", "hip", None])
def test_where_the_kernel_runs(lacks, monkeypatch):
    """An NVIDIA GPU of capability 8.0, bf16 or fp16, D a multiple of 8 up to 192, a torch that has it."""
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if lacks == "ampere" else (8, 0)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: lacks != "autocast")
    monkeypatch.setattr(torch.version, "hip", "6.0" if lacks == "hip" else None)
    ragged._has_varlen.cache_clear()
    if lacks == "torch":  # 2.10 had it without windows and grouped heads
        monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: None)
    device = torch.device("cpu" if lacks == "cuda" else "cuda")
    width = {"eights": 36, "width": 200}.get(lacks, 64)
    assert ragged.attends_packed(device, width) == (lacks is None)
    ragged._has_varlen.cache_clear()


def test_torchs_own_function_takes_what_it_is_given():
    """The arguments by name, their shapes and types: torch's operator on tensors without data, and its backward."""
    with FakeTensorMode():
        q, k, v = (torch.empty(n, 1, 30, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
        texts = ragged.Boundaries(torch.empty(4, dtype=torch.int32), 14)
        for causal in (True, False):
            y = attend(q, k, v, texts, causal)
            assert y.shape == q.shape and y.dtype == torch.bfloat16
            dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
            assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_packed_texts_are_as_exact_as_padded_rows(shape, monkeypatch):
    """Both in bf16, against fp32: hidden states and gradients, by their relative error."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SHAPES[shape], head_dim=16, context=200)).cuda()
    mask = torch.arange(200) < torch.randint(1, 201, (16, 1))
    tokens = torch.randint(50, mask.shape).cuda()
    packs, found = ragged.attends_packed, {}
    for path in ("exact", "padded", "packed"):
        model.zero_grad()
        monkeypatch.setattr(ragged, "attends_packed", packs if path == "packed" else lambda *_: False)
        with torch.autocast("cuda", torch.bfloat16, enabled=path != "exact"):
            assert path != "packed" or ragged.attends_packed(tokens.device, 16)
            hidden = model(tokens, mask)
        hidden.square().mean().backward()
        found[path] = [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    off = lambda path: [
        float((a - b).norm() / b.norm()) for a, b in zip(found[path], found["exact"], strict=True)
    ]
    assert all(a <= 2 * b + 1e-3 for a, b in zip(off("packed"), off("padded"), strict=True)), (
        off("packed"),
        off("padded"),
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_compiled_blocks_hold_the_kernel_in_one_graph(shape, monkeypatch):
    """For batches of any size, without a graph break. The graph is not run: torch has no such kernel on a CPU."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(ragged, "attends_packed", lambda device, head_dim: True)
    model, graphs = GPT(SHAPES[shape]), []

    def stop(*given):
        raise NotImplementedError("no kernel")

    for block in model.blocks:
        block.compile(dynamic=True, backend=lambda graph, _: graphs.append(str(graph.graph)) or stop)
    for T in (9, 12, 15):
        mask = torch.arange(T) < torch.tensor([T, 3, 5])[:, None]
        with pytest.raises(NotImplementedError, match="no kernel"):
            model(torch.randint(50, (3, T)), mask)
    assert len(graphs) == 1 and "torch_attn._varlen_attn" in graphs[0] and not counters["graph_break"]
    torch.compiler.reset()
