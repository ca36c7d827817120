"""The GPT and the scalar models: padding, cache, dropout, initialisation."""

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf import UserError
from minirlhf.measure.scoring import score_sequences
from minirlhf.model import (
    GPT,
    POOLINGS,
    GPTConfig,
    KVCache,
    RewardEnsemble,
    RewardModel,
    ValueModel,
    attend,
    critic_from,
    last_real,
    rotary,
    rotate,
    zero_critic,
)
from minirlhf.support import ragged
from minirlhf.support.prepare import disable_dropout, run_blocks, store_blocks, train_last
from minirlhf.support.ragged import fill_up, is_short, pack, places, position_ids, send
from minirlhf.support.shape import MAX_LAYERS, MAX_MEMBERS, ROPE_SCALING

SMALL = GPTConfig(vocab_size=50, context=32, n_layer=2, n_head=2, n_embd=16)
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA = GPTConfig(50, 32, 2, 4, 16, n_kv_head=2, n_inner=24, norm="rms", positions="rotary", rope_scaling=SCALING, mlp="swiglu",
                  bias=False, qkv_bias=True, tied=False)  # fmt: skip
ENCODER = GPTConfig(50, 32, 2, 2, 16, mlp="gelu", causal=False, pre_norm=False)
SHAPES = {
    "gpt2": SMALL,
    "llama": LLAMA,
    "encoder": ENCODER,
    "upper": dataclasses.replace(LLAMA, n_bidirectional=1),
    "qwen3": dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=False, qk_norm=True, head_dim=6),
    "smollm3": dataclasses.replace(LLAMA, qkv_bias=False, nope_layers=[1]),
}


def mask_of(rows):
    return torch.tensor(rows, dtype=torch.bool)


def plain_transformer(model: GPT, tokens: list[int]) -> torch.Tensor:
    """Hidden states [T, C] of one text in float64, a token and a head at a time, from the papers' formulas."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}
    D, share = c.head_dim, c.n_head // c.kv_heads

    def norm(x, name):
        gain, bias = w[f"{name}.weight"], w.get(f"{name}.bias", 0.0)
        centred = x - x.mean() if c.norm == "layer" else x
        return centred / (centred.square().mean() + c.norm_eps).sqrt() * gain + bias

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def turned(x, position, which):
        x = norm(x, f"{name}.{which}_norm") if c.qk_norm else x
        if c.positions == "learned" or layer in (c.nope_layers or ()):
            return x
        cos, sin = (angle.double() for angle in rotary(c, torch.tensor(position)))
        return torch.cat([x[: D // 2] * cos - x[D // 2 :] * sin, x[D // 2 :] * cos + x[: D // 2] * sin])

    def gelu(x):
        if c.mlp == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def mlp(x, name):
        if c.mlp == "swiglu":
            gate = linear(x, f"{name}.gate")
            return linear(gate * gate.sigmoid() * linear(x, f"{name}.fc"), f"{name}.mlp_out")
        return linear(gelu(linear(x, f"{name}.fc")), f"{name}.mlp_out")

    xs = [w["wte.weight"][token] for token in tokens]
    if c.positions == "learned":
        xs = [x + w["wpe.weight"][t] for t, x in enumerate(xs)]
    xs = xs if c.pre_norm else [norm(x, "ln_f") for x in xs]
    for layer in range(c.n_layer):
        name = f"blocks.{layer}"
        causal = c.causal and layer < c.n_layer - c.n_bidirectional
        heads = [linear(norm(x, f"{name}.ln_1") if c.pre_norm else x, f"{name}.qkv").split(D) for x in xs]
        seen = []
        for t in range(len(xs)):
            keys = range(t + 1 if causal else len(xs))
            parts = []
            for h in range(c.n_head):
                g = c.n_head + h // share
                q = turned(heads[t][h], t, "q")
                scores = torch.stack([q @ turned(heads[s][g], s, "k") for s in keys]) / math.sqrt(D)
                values = torch.stack([heads[s][g + c.kv_heads] for s in keys])
                parts.append(scores.softmax(0) @ values)
            seen.append(linear(torch.cat(parts), f"{name}.attn_out"))
        xs = [x + y for x, y in zip(xs, seen, strict=True)]
        if c.pre_norm:
            xs = [x + mlp(norm(x, f"{name}.ln_2"), name) for x in xs]
        else:
            xs = [norm(x, f"{name}.ln_1") for x in xs]
            xs = [norm(x + mlp(x, name), f"{name}.ln_2") for x in xs]
    return torch.stack([norm(x, "ln_f") if c.pre_norm else x for x in xs])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_the_transformer_of_its_paper(shape):
    torch.manual_seed(0)
    model = GPT(SHAPES[shape]).eval()
    tokens = torch.randint(50, (7,))
    with torch.no_grad():
        for p in model.parameters():  # at first all biases are 0, and a block adds next to nothing
            p.add_(0.3 * torch.randn_like(p))
        hidden, expected = model(tokens[None])[0], plain_transformer(model, tokens.tolist())
        logits = expected @ model.head_weight.double().T
        for found, exact in ((hidden, expected), (model.logits(hidden), logits)):
            torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


def test_D6_positions_count_real_tokens():
    masks = mask_of([[0, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]])
    assert position_ids(masks[:1, :5]).tolist() == [[0, 0, 0, 1, 2]]
    assert position_ids(masks[1:]).tolist() == [[0, 1, 1, 1, 2, 3]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), left=st.integers(0, 5), right=st.integers(0, 5), n=st.integers(1, 8),
       shape=st.sampled_from(sorted(SHAPES)))  # fmt: skip
def test_D6_amount_side_and_content_of_padding_change_nothing(seed, left, right, n, shape):
    torch.manual_seed(seed)
    model = GPT(SHAPES[shape]).eval()
    text = torch.randint(50, (1, n))
    junk = torch.randint(50, (1, left + right))
    padded = torch.cat([junk[:, :left], text, junk[:, left:]], 1)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, left : left + n] = True
    got = model(padded, mask)[:, left : left + n]
    torch.testing.assert_close(got, model(text), atol=2e-6, rtol=1e-5)
    if left == 0 and model.config.reads_prefixes:  # right padding needs no mask at all
        torch.testing.assert_close(model(padded)[:, :n], model(text), atol=2e-6, rtol=1e-5)


def test_D6_poisoned_padding_reaches_no_output_and_no_gradient():
    torch.manual_seed(0)
    model = ValueModel(SMALL, "last+mean").eval()
    tokens, mask = torch.randint(1, 50, (2, 7)), mask_of([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]])
    tokens[~mask] = 0
    clean = model(tokens, mask)
    clean.sum().backward()
    gradient = model.backbone.blocks[0].qkv.weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        model.backbone.wte.weight[0] = float("nan")  # only padding has token 0
    poisoned = model(tokens, mask)
    poisoned.sum().backward()
    assert torch.equal(clean, poisoned)
    assert torch.equal(gradient, model.backbone.blocks[0].qkv.weight.grad)
    assert (poisoned[~mask] == 0).all()


def test_fill_up_gives_few_lengths_and_little_waste():
    filled = {n: len(fill_up(torch.arange(5, 5 + n))) for n in range(1, 4000)}
    assert all(n <= m <= n * 17 / 16 for n, m in filled.items())
    assert len({m for m in filled.values() if m > 100}) < 100
    assert fill_up(torch.arange(5, 42)).tolist() == [*range(5, 42), 5]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lengths", "computed"), [((7, 3, 0, 4), 14), ((29, 20, 9, 30), 88)])
def test_no_work_on_padding_and_the_same_gradients(shape, lengths, computed):
    """A padded batch against its texts one by one: outputs, gradients, and what the linear layers were given."""
    torch.manual_seed(0)
    model = GPT(SHAPES[shape]).eval()
    side = (0, 4, 2, 1)  # padding on the left
    tokens, mask = torch.randint(50, (4, 32)), torch.zeros(4, 32, dtype=torch.bool)
    for row, left, n in zip(mask, side, lengths, strict=True):
        row[left : left + n] = True
    weight = torch.randn(32, 16)
    loss = lambda hidden: (
        (hidden * weight[: hidden.shape[1]]).square().sum() / (16 * sum(lengths))
    )  # a mean over the batch
    gradients = lambda: [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for row, real in zip(tokens, mask, strict=True):
        if real.any():
            loss(model(row[real][None])).backward()
    alone = gradients()
    model.zero_grad()
    seen = []
    model.blocks[1].fc.register_forward_hook(lambda layer, given, out: seen.append(tuple(given[0].shape)))
    hidden = model(tokens, mask)
    assert seen == [(computed, 16)] and (hidden[~mask] == 0).all()
    moved = torch.zeros_like(hidden)
    for k, (left, n) in enumerate(zip(side, lengths, strict=True)):
        moved[k, :n] = hidden[k, left : left + n]
    loss(moved).backward()
    for a, b in zip(gradients(), alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_block_works_where_its_results_are_wanted(shape, full):
    torch.manual_seed(0)
    model = GPT(SHAPES[shape]).eval()
    tokens, mask, wanted = (
        torch.randint(50, (4, 9)),
        torch.ones(4, 9, dtype=torch.bool),
        torch.zeros(4, 9, dtype=torch.bool),
    )
    wanted[:2, 5:] = wanted[3, 0] = True
    if not full:
        mask[0, 7:] = mask[1, :2] = mask[2] = False
    seen = []
    model.blocks[-1].fc.register_forward_hook(lambda layer, given, out: seen.append(len(given[0])))
    everything = model(tokens, mask)
    hidden = model(tokens, mask, wanted=wanted)
    assert seen == [int(mask.sum()), int((mask & wanted).sum())] and (hidden[~(mask & wanted)] == 0).all()
    torch.testing.assert_close(hidden[mask & wanted], everything[mask & wanted], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (97, 97), (1, 20)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("where", ["causal", "everywhere", "allowed"])
def test_attention_of_short_texts_is_attention(lengths, groups, where):
    """Both ways on both sides of MAX_SHORT, against the formula in float64."""
    torch.manual_seed(0)
    (T, K), B, H, D = lengths, 3, 4, 8
    if where == "causal" and T != K:
        return
    q, k, v = (
        torch.randn(h, B, n, D, dtype=torch.float64, requires_grad=True)
        for h, n in ((H, T), (groups, K), (groups, K))
    )
    allowed = torch.rand(B, T, K) < 0.5
    allowed[..., 0] = True
    look = {
        "causal": torch.ones(1, T, K).tril() > 0,
        "everywhere": torch.ones(1, T, K) > 0,
        "allowed": allowed,
    }[where]
    keys, values = (x.repeat_interleave(H // groups, 0) for x in (k, v))
    scores = torch.where(look, q @ keys.transpose(2, 3) / D**0.5, -torch.inf)
    wanted = scores.softmax(-1) @ values
    upstream = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, (q, k, v), upstream)
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    short = is_short(q.device, T, K)
    bounds = None if where == "everywhere" or (where == "causal" and not short) else look
    bounds = (
        torch.zeros(look.shape).masked_fill(~look, -torch.inf) if short and bounds is not None else bounds
    )
    found = attend(q, k, v, bounds, where == "causal")
    for a, b in zip(
        (found, *torch.autograd.grad(found, (q, k, v), upstream.float())), (wanted, *gradients), strict=True
    ):
        torch.testing.assert_close(a, b.float(), atol=2e-6, rtol=1e-4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_packed_texts_share_rows_and_no_place(lengths):
    rows, starts = pack(lengths)
    places = [(r, s + i) for r, s, n in zip(rows, starts, lengths, strict=True) for i in range(n)]
    assert len(set(places)) == sum(lengths) and all(place < max(lengths) for _, place in places)
    full = [sum(n for r, n in zip(rows, lengths, strict=True) if r == row) for row in range(max(rows) + 1)]
    assert sum(2 * n <= max(lengths) for n in full if n) <= 1  # first fit: no two rows that would go into one


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("left", [0, 2])
def test_cached_decoding_equals_the_full_forward(left, shape):
    torch.manual_seed(0)
    model = GPT(SHAPES[shape]).eval()
    tokens = torch.randint(50, (3, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :left] = False
    full = model(tokens, mask)
    cache = KVCache(model, 3, 9)
    parts = [model(tokens[:, :4], mask[:, :4], cache)]
    parts += [model(tokens[:, t : t + 1], mask[:, t : t + 1], cache) for t in range(4, 9)]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], full[mask], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_future_can_be_seen_by_an_encoder_only(shape):
    torch.manual_seed(0)
    model = GPT(SHAPES[shape]).eval()
    tokens = torch.randint(50, (1, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    assert torch.equal(model(tokens)[:, :5], model(changed)[:, :5]) == (shape not in ("encoder", "upper"))


@pytest.mark.parametrize("shape", [SMALL, LLAMA])
def test_the_last_blocks_may_read_in_both_directions(shape):
    """The others look back only; if all do, the model is an encoder.  (129 tokens: with fused attention.)"""
    torch.manual_seed(0)
    both = GPT(dataclasses.replace(shape, context=140, n_layer=3, n_bidirectional=2)).eval()
    tokens, states = torch.randint(50, (2, 129)), []
    for block in both.blocks:
        block.register_forward_hook(lambda block, given, out: states.append(out.view(2, -1, 16)[:, 0]))
    for width in (40, 129):
        states.clear()
        for last in (7, 8):
            tokens[:, width - 1] = last
            both(tokens[:, :width])
        assert [torch.equal(states[k], states[3 + k]) for k in range(3)] == [True, False, False]
    encoder, every = (
        GPT(dataclasses.replace(both.config, n_bidirectional=n, causal=n > 0)).eval() for n in (0, 3)
    )
    every.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(tokens), every(tokens))
    with pytest.raises(UserError, match="n_bidirectional 4, but 3 layers: change --bidirectional"):
        dataclasses.replace(both.config, n_bidirectional=4)
    with pytest.raises(UserError, match="no past to keep"):
        KVCache(both, 2, 8)


@pytest.mark.parametrize("shape", ["encoder", "upper"])
def test_who_reads_in_both_directions_scores_whole_texts_alone(shape):
    torch.manual_seed(0)
    model = RewardModel(SHAPES[shape], "last+mean").eval()
    tokens, mask = torch.randint(50, (2, 8)), mask_of([[1] * 8, [1] * 5 + [0] * 3])
    torch.testing.assert_close(
        model(tokens, mask)[1:], model(tokens[1:, :5], mask[1:, :5]), atol=2e-6, rtol=1e-5
    )
    with pytest.raises(UserError, match="--value-init sft"):
        critic_from(model)


def test_rotary_products_depend_on_distance_alone_and_slow_channels_are_scaled():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, LLAMA.head_dim)
    at = lambda x, position: rotate(x, *rotary(LLAMA, torch.tensor([position])))
    torch.testing.assert_close(
        (at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 9) * at(k, 5)).sum())
    plain, scaled = (
        rotary(GPTConfig(9, n_head=1, n_embd=64, positions="rotary", rope_scaling=s), torch.tensor([1]))
        for s in (None, SCALING | {"original_max_position_embeddings": 64})
    )
    slower = torch.atan2(plain[1], plain[0])[0] / torch.atan2(scaled[1], scaled[0])[0]
    assert slower[0] == 1 and slower[-1].item() == pytest.approx(8) and (slower.diff() >= -1e-5).all()


def test_shared_key_value_heads_equal_repeated_ones():
    torch.manual_seed(0)
    grouped = GPT(LLAMA).eval()
    full = GPT(dataclasses.replace(LLAMA, n_kv_head=None)).eval()
    state, D = grouped.state_dict(), LLAMA.head_dim
    for name in [n for n in state if ".qkv." in n]:
        q, k, v = state[name].split([4 * D, 2 * D, 2 * D])
        k, v = (x.unflatten(0, (2, D)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    tokens = torch.randint(50, (2, 7))
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="is not divisible by n_kv_head 3"):
        dataclasses.replace(LLAMA, n_kv_head=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_last_layers_are_trained(dtype):
    torch.manual_seed(0)
    model = RewardEnsemble(dataclasses.replace(SMALL, dropout=0.5), "mean", 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_last(model, 1, dtype)
    tokens, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(tokens, mask)[0].sum().backward()
    for name, p in model.named_parameters():
        below = ".wte." in name or ".wpe." in name or ".blocks.0." in name
        assert (p.grad is None) == below == (not p.requires_grad)
        assert p.dtype == (dtype if below and p.dim() == 2 else torch.float32)
        assert torch.equal(p, before[name].to(p.dtype))
    gpt = model.members[1].backbone
    assert [gpt.dropout, *(block.dropout for block in gpt.blocks)] == [0.0, 0.0, 0.5]
    train_last(model, None, dtype)
    with pytest.raises(UserError, match="the model has 2 layers"):
        train_last(model, 3, dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_D4_blocks_stored_in_bf16_compute_the_same_bits_under_autocast(shape):
    """So a reference kept so has the policy's log-probabilities until the first step."""
    torch.manual_seed(0)
    model = RewardEnsemble(shape, "mean", 2)
    tokens, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(tokens, mask)[0]
        store_blocks(model, torch.bfloat16)
        assert torch.equal(model(tokens, mask)[0], before)
    block = model.members[1].backbone.blocks[1]
    assert block.qkv.weight.dtype == block.mlp_out.weight.dtype == torch.bfloat16
    assert block.ln_1.weight.dtype == model.members[0].fc.weight.dtype == torch.float32


def test_init_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, context=64, n_layer=4, n_head=4, n_embd=128))
    block = model.blocks[0]
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp_out.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    hidden = torch.randn(2, 3, 128)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.wte.weight.T)  # tied head


def test_D5_dropout_is_off_in_train_mode_too():
    torch.manual_seed(0)
    model = ValueModel(GPTConfig(50, 32, 2, 2, 16, dropout=0.5)).train()
    tokens, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    assert not torch.equal(model(tokens, mask), model(tokens, mask))
    disable_dropout(model)
    assert model.training
    assert torch.equal(model(tokens, mask), model(tokens, mask))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_D15_score_is_read_at_the_last_real_token(pooling):
    torch.manual_seed(0)
    model = RewardModel(SMALL, pooling).eval()
    tokens, mask = torch.randint(50, (3, 8)), mask_of([[1] * 8, [1] * 3 + [0] * 5, [0, 0, 1, 1, 1, 0, 0, 0]])
    assert last_real(mask).tolist() == [7, 2, 4]
    scores = model(tokens, mask)
    alone = [
        model(tokens[i : i + 1, m], torch.ones(1, int(m.sum()), dtype=torch.bool)) for i, m in enumerate(mask)
    ]
    torch.testing.assert_close(scores, torch.cat(alone), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_D13_a_critic_from_the_reward_model_scores_whole_texts_alike(pooling, mlp):
    torch.manual_seed(0)
    reward_model = RewardModel(SMALL, pooling, mlp).eval()
    reward_model.gain.fill_(0.7)
    reward_model.bias.fill_(-1.3)
    critic = critic_from(reward_model)
    tokens, mask = torch.randint(50, (2, 6)), mask_of([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    values = critic(tokens, mask)
    torch.testing.assert_close(
        values[[0, 1], last_real(mask)], reward_model(tokens, mask), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(values, reward_model.values(tokens, mask), atol=1e-6, rtol=1e-5)


def test_D13_head_init():
    torch.manual_seed(0)
    model = ValueModel(GPTConfig(50, 8, 1, 4, 512), "last+mean")
    assert model.out.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert model.fc.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.02)
    assert not model.out.bias.any() and not model.fc.bias.any()


def test_D14_the_affine_transform_is_applied_and_saved_with_the_model():
    torch.manual_seed(0)
    model = RewardModel(SMALL).eval()
    tokens, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    before = model(tokens, mask)
    model.gain.fill_(2.0)
    model.bias.fill_(0.5)
    torch.testing.assert_close(model(tokens, mask), 2 * before + 0.5)
    assert {"gain", "bias"} <= model.state_dict().keys()


def test_ensemble_gives_mean_and_disagreement():
    torch.manual_seed(0)
    model = RewardEnsemble(SMALL, members=3).eval()
    tokens, mask = torch.randint(50, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    each = torch.stack([m(tokens, mask) for m in model.members])
    mean, spread = model(tokens, mask)
    torch.testing.assert_close(mean, each.mean(0))
    torch.testing.assert_close(spread, ((each - each.mean(0)) ** 2).mean(0).sqrt())
    assert (RewardEnsemble(SMALL).eval()(tokens, mask)[1] == 0).all()


def test_R4_an_ensemble_scores_with_the_members_trained_so_far():
    torch.manual_seed(0)
    model = RewardEnsemble(SMALL, members=3).eval()
    tokens, mask = torch.randint(50, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    each = model.each(tokens, mask)
    run = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, autocast=nullcontext, sum_=lambda x: x)
    run.require_finite = lambda **found: None
    run.machine = SimpleNamespace(parts=lambda items, size: [items])
    for members in (1, 2, 3):
        scores = score_sequences(run, model.members[:members], tokens.tolist(), pad=0)
        torch.testing.assert_close(scores, each[:members].mean(0))


def test_D13_a_critic_without_a_reward_model_values_everything_0_and_can_learn():
    torch.manual_seed(0)
    critic = zero_critic(GPT(SMALL))
    tokens, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    values = critic(tokens, mask)
    assert (values == 0).all()
    (values - 1).square().sum().backward()
    assert critic.out.weight.grad.any() and critic.out.bias.grad.any()


def test_a_cache_goes_on_with_some_rows_one_layer_at_a_time():
    """REVIEW 7.22: beside the cache there is never more than the copy of a layer."""
    torch.manual_seed(0)
    model = GPT(LLAMA).eval()
    tokens, mask = torch.randint(50, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    mask[1, :3] = False
    full, cache, rows = model(tokens, mask), KVCache(model, 4, 9), torch.tensor([1, 3])
    model(tokens[:, :6], mask[:, :6], cache)
    stored = lambda: {x.data_ptr(): x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values)}
    before, peak = stored(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "index" in function.__name__:
                peak.append(sum(stored().values()) + result.untyped_storage().nbytes())
            return result

    with Watch():
        cache.keep(rows)
    layer = max(before.values())
    assert len(peak) >= 4 and max(peak) <= sum(before.values()) + layer
    assert sum(stored().values()) == sum(before.values()) // 2
    for t in range(6, 9):
        hidden = model(tokens[rows, t : t + 1], None, cache)[:, 0]
        torch.testing.assert_close(hidden, full[rows, t], atol=2e-6, rtol=1e-5)


def test_activations_that_are_computed_again_give_the_same_gradients():
    found, calls, tokens = [], [], torch.randint(50, (3, 7))
    for again in (False, True):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(SMALL, dropout=0.3))
        run_blocks([model], recompute=again, compiled=False)
        model.blocks[0].fc.register_forward_hook(lambda layer, given, out: calls.append(len(calls)))
        model(tokens).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert len(calls) == 1 + 2


def test_dropout_keeps_the_mean_and_drops_the_share_it_was_told():
    torch.manual_seed(0)
    x = torch.ones(1000, 333)
    for p in (0.1, 0.5, 0.9):
        y = ragged.dropout(x, p, training=True)
        assert (y == 0).float().mean() == pytest.approx(p, abs=0.004)  # p is rounded to 1/256
        assert y.mean() == pytest.approx(1, abs=0.02) and len(y.unique()) == 2
        assert not torch.equal(y, ragged.dropout(x, p, training=True))
        assert ragged.dropout(x, p, training=False) is x
    assert ragged.dropout(x, 0.9999, training=True).isfinite().all()


def test_dropout_on_a_gpu_is_pytorchs(monkeypatch):
    """REVIEW 7.26: its fused kernel is faster than bytes drawn by hand."""
    calls = []
    monkeypatch.setattr(ragged.F, "dropout", lambda *args: calls.append(args))
    x = torch.ones(3, device="meta")
    ragged.dropout(x, 0.25, training=True)
    assert len(calls) == 1 and calls[0][0] is x and calls[0][1:] == (0.25, True)
    ragged.dropout(torch.ones(3), 0.25, training=True)
    assert len(calls) == 1


@pytest.mark.parametrize(("rows", "transposed"), [(2, True), (8, True), (9, False)])
def test_few_rows_are_multiplied_by_the_transposed_product(rows, transposed):
    """Its result is no contiguous tensor.  Where a gradient is wanted, the plain product is as fast."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 16), torch.randn(50, 16, requires_grad=True)
    expected = hidden @ weight.T
    with torch.no_grad():
        found = ragged.linear(hidden, weight)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() is not transposed
    with_gradient = ragged.linear(hidden, weight)
    torch.testing.assert_close(with_gradient, expected)
    assert with_gradient.requires_grad and with_gradient.is_contiguous()


def packed(lengths, wanted=None):
    """The packing of right-padded texts of these lengths, for a model with causal blocks, on a CPU."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ragged.make_packing(mask.shape, mask, wanted, None, torch.device("cpu"), {True}, 8)


def test_short_texts_share_rows_of_attention():
    packing = packed([5, 3, 2, 2, 1])
    assert (packing.batch, packing.width, packing.n_real) == (3, 5, 13)
    assert packing.masks[True].shape == (3, 5, 5)
    rows = packing.to_rows(torch.arange(1, 14)[:, None])[..., 0]
    assert rows.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 0, 0]]
    assert (packing.masks[True][1, 4] == 0).tolist() == [
        False,
        False,
        False,
        True,
        True,
    ]  # its own text alone
    long = packed([120, 3, 2])
    assert (long.batch, long.masks[True]) == (3, None)  # fused attention: rows of their own


def test_what_the_last_block_computes_is_filled_up_too():
    wanted = torch.zeros(2, 30, dtype=torch.bool)
    wanted[0, :20] = wanted[1, :17] = True
    packing = packed([30, 30], wanted)
    assert len(packing.target) == 37 and len(packing.wanted) == 38


def test_places_are_where_the_mask_is_true():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 3), torch.rand(4, 6) < 0.5
    assert torch.equal(x[places(mask, x.device)], x[mask])
    empty = places(torch.zeros(4, 6, dtype=torch.bool), x.device)
    assert x[empty].shape == (0, 3)
    assert send(x, x.device) is x


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_text_without_a_token_makes_no_gradient_nan():
    """An encoder's fused attention over no key at all would be 0 / 0, though nobody reads it."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(ENCODER, context=100))
    tokens, mask = torch.randint(50, (3, 100)), torch.ones(3, 100, dtype=torch.bool)
    mask[1] = mask[2, 3:] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        model(tokens, mask).square().sum().backward()


def test_a_batch_without_a_real_token_has_no_hidden_states():
    tokens, mask = torch.randint(50, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    assert (GPT(SMALL)(tokens, mask) == 0).all()


DAMAGED = {
    "vocab_size": [0, -1, "9", None, 1e3, True, 2**40],
    "context": [0, "128"],
    "n_layer": [0, -2, 10**9, MAX_LAYERS + 1, None],
    "n_head": [0, -1, 2.0],
    "n_embd": [0, -64, [16]],
    "dropout": [1, 1.5, -0.1, math.nan, math.inf, "0", None, False],
    "n_kv_head": [0, -1, "2"],
    "n_inner": [0, 1.5],
    "norm": ["batch", None, 1],
    "norm_eps": [0, -1e-5, math.nan, math.inf, "x", None],
    "positions": ["sinusoidal", None],
    "rope_theta": [0, math.nan, "1e4"],
    "rope_scaling": [
        27,
        [],
        {},
        {"factor": 8.0},
        dict.fromkeys(ROPE_SCALING, 1.0),  # low and high factors must differ
        dict.fromkeys(ROPE_SCALING, "1"),
        SCALING | {"low_freq_factor": math.nan},
        SCALING | {"more": 1.0},
    ],
    "mlp": ["relu", None, "GELU"],
    "bias": [1, None, "true"],
    "qkv_bias": [0, "false"],
    "tied": [1, None],
    "causal": [0, None],
    "n_bidirectional": [-1, 0.0, None, True, 3],
    "pre_norm": ["yes", 1],
    "lora_rank": [-1, 1.0, None, True],
    "lora_alpha": [0, -1.0, math.nan, None],
    "lora_layers": [0, -1, 1.0, True],
    "head_dim": [0, -8, 8.0, True, "8", 2**31],
    "qk_norm": [1, None, "true"],
    "nope_layers": [
        [],
        [1, 0],
        [0, 0],
        [-1],
        [2],
        [True],
        [0.0],
        "0",
        0,
        {},
        [0],
    ],  # [0]: SMALL's are learned
}


@pytest.mark.parametrize("field", DAMAGED)
def test_F5_F9_F10_a_damaged_config_is_refused_in_one_line(field):
    """RELIABILITY F5: `mlp: relu` computed something else; F9: foreign errors; F10: hangs."""
    for value in DAMAGED[field]:
        with pytest.raises(UserError, match=field) as refusal:
            dataclasses.replace(SMALL, **{field: value})
        message = str(refusal.value)
        assert "\n" not in message and len(message) < 200, message


def test_F5_every_field_has_a_rule():
    assert {*DAMAGED} == {field.name for field in dataclasses.fields(GPTConfig)}


@pytest.mark.parametrize("members", [0, -1, MAX_MEMBERS + 1, 10**9, "3", None, 1.0])
def test_F10_an_ensemble_of_an_impossible_size_is_refused(members):
    with pytest.raises(UserError, match="members must be a whole number from 1 to 100"):
        RewardEnsemble(SMALL, members=members)


def test_rotary_positions_need_pairs_of_channels():
    with pytest.raises(UserError, match="even number of channels per head, not 5"):
        dataclasses.replace(LLAMA, n_embd=20, n_head=4, head_dim=None)


def test_errors_name_the_remedy():
    with pytest.raises(UserError, match="is not divisible by n_head"):
        GPTConfig(50, n_head=3, n_embd=16)
    with pytest.raises(UserError, match="context of 32.*--context"):
        GPT(SMALL)(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(UserError, match="unknown pooling"):
        ValueModel(SMALL, "first")
