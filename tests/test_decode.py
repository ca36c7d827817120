"""The compiled decode step: its tokens, how often it is compiled, and which weights it reads."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.gpu import started_kernels
from minirlhf import UserError
from minirlhf.model import GPT
from minirlhf.rollout import Sampling, generate
from minirlhf.support import decode
from minirlhf.support.cache import KVCache, new_cache
from minirlhf.support.decode import MAX_COMPILED, Decoder
from minirlhf.support.prepare import run_blocks
from tests.test_model import LLAMA, SHAPES, SMALL

CAUSAL = [name for name, shape in SHAPES.items() if shape.reads_prefixes]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled_by(backend):
    return lambda step: torch.compile(step, backend=backend, fullgraph=True, dynamic=False)


def spread(model):
    """Random weights large enough that tokens depend on all of the past."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def rollout(model, prompts=5, rows=6, longest=12, seed=0, eos=1, temperature=1.0):
    """Texts of a batch whose prompts are padded on the left."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 50, (rows, prompts), generator=g)
    mask = torch.arange(prompts) >= torch.randint(prompts, (rows, 1), generator=g)
    return generate(model, tokens, mask, Sampling(longest, temperature, eos, 0), g)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("shape", CAUSAL)
def test_tokens_are_those_of_the_plain_step(shape, backend):
    """Some rows end early, and leave the batch."""
    torch.manual_seed(0)
    model = spread(GPT(SHAPES[shape]))
    eos = (1, 7, 13, 19, 25)
    plain = rollout(model, eos=eos)
    model.decoder = Decoder(model, compiled_by(backend))
    found = rollout(model, eos=eos)
    assert torch.equal(found.responses, plain.responses)
    assert torch.equal(found.response_mask, plain.response_mask)
    assert len(found.host_mask.sum(1).unique()) > 2 and not found.response_mask.all()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_tokens_of_inductor_are_those_of_the_plain_step():
    """The backend of a GPU, here with a C++ compiler in place of CUDA graphs."""
    torch.manual_seed(0)
    model = spread(GPT(LLAMA))
    plain = rollout(model)
    model.decoder = Decoder(model)
    assert torch.equal(rollout(model).responses, plain.responses)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_one_graph_serves_all_rollouts_that_fit():
    torch.manual_seed(0)
    model = spread(GPT(dataclasses.replace(SMALL, context=160)))
    model.decoder = Decoder(model, compiled_by("eager"))
    graphs = lambda: (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    for seed, prompts in enumerate((5, 9, 1, 30)):  # up to 42 tokens: one cache of 64
        rollout(model, prompts, seed=seed, eos=(1, 7, 13, 19, 25))
    assert graphs() == (1, {})
    rollout(model, prompts=60)
    rollout(model, prompts=5)  # in the longer cache
    assert graphs() == (2, {}) and model.decoder.cache.capacity == 128
    rollout(model, prompts=140)
    assert graphs() == (3, {}) and model.decoder.cache.capacity == 160  # the context


def test_batches_of_many_sizes_are_not_compiled_forever():
    torch.manual_seed(0)
    model = spread(GPT(SMALL))
    model.decoder = Decoder(model, compiled_by("eager"))
    plain = [rollout(model, rows=rows).responses for rows in range(1, MAX_COMPILED + 3)]
    assert counters["stats"]["unique_graphs"] == MAX_COMPILED
    model.decoder = None
    for rows, found in enumerate(plain, 1):
        assert torch.equal(found, rollout(model, rows=rows).responses)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rollout_reads_the_weights_as_they_are_now(precision):
    torch.manual_seed(0)
    model, before = spread(GPT(SMALL)), None
    decoder = Decoder(model, compiled_by("eager"))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.decoder = None
            plain = rollout(model, temperature=0.0).responses
            model.decoder = decoder
            assert torch.equal(rollout(model, temperature=0.0).responses, plain)
        assert before is None or not torch.equal(plain, before)
        before = plain
        spread(model)
    assert len(decoder.cache.rounded) == (
        8 if precision == "bf16" else 0
    )  # qkv, attn_out, fc, mlp_out of 2 layers
    assert counters["stats"]["unique_graphs"] == 1


def test_bf16_steps_are_autocasts_own_bit_for_bit():
    torch.manual_seed(0)
    model = spread(GPT(LLAMA))
    tokens, found = torch.randint(50, (3, 9)), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for decoder in (None, Decoder(model, lambda step: step)):
            model.decoder = decoder
            cache = new_cache(model, 3, 32)
            model(tokens[:, :4], None, cache)
            found.append(torch.stack([cache.step(model, tokens[:, t]) for t in range(4, 9)]))
    torch.testing.assert_close(found[1], found[0], atol=2e-2, rtol=2e-2)
    assert (found[1] - found[0]).abs().mean() < 1e-3


def test_what_does_not_fit_the_context_is_refused_as_by_a_plain_step():
    model = GPT(SMALL)
    model.decoder = Decoder(model, lambda step: step)
    assert type(new_cache(model, 2, 33)) is KVCache
    with pytest.raises(UserError, match="do not fit the model's context of 32"):
        rollout(model, prompts=22, longest=12, eos=0)


def test_a_decoder_is_made_on_a_gpu_and_with_compile_alone(monkeypatch):
    made = []
    monkeypatch.setattr(decode, "Decoder", lambda gpt: made.append(gpt) or "decoder")
    on_cpu, there = GPT(SMALL), GPT(SMALL).to("meta")
    run_blocks([on_cpu, there], recompute=False, compiled=False)
    assert made == []
    run_blocks([on_cpu, there], recompute=False, compiled=True)
    assert made == [there] and there.decoder == "decoder" and on_cpu.decoder is None


def test_a_plain_step_starts_forty_operations_per_layer():
    """What a graph saves, as docs/speed.md says."""
    count = lambda layers: started_kernels(
        GPT(dataclasses.replace(LLAMA, n_layer=layers)), {"batch": 3, "precision": "fp32"}
    )
    assert 35 <= (count(6) - count(2)) / 4 <= 45


@pytest.mark.gpu
@pytest.mark.parametrize("shape", CAUSAL)
def test_on_a_gpu_graphs_write_the_plain_steps_tokens(shape):
    """In fp32, over three rollouts whose weights differ."""
    torch.manual_seed(0)
    model = spread(GPT(SHAPES[shape])).cuda()
    decoder = Decoder(model)
    for seed in range(3):
        model.decoder = None
        plain = rollout(model, seed=seed, temperature=0.0)
        model.decoder = decoder
        assert torch.equal(rollout(model, seed=seed, temperature=0.0).responses, plain.responses)
        spread(model)
    assert counters["inductor"]["cudagraph_skips"] == 0 and counters["stats"]["unique_graphs"] == 1
