"""Adapters: what they compute, what is trained, what is held once, and what a checkpoint of them holds."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from minirlhf import UserError, checkpoint, lora
from minirlhf.model import GPT, GPTConfig, RewardEnsemble, ValueModel, critic_from, zero_critic
from minirlhf.support import adapters, prepare
from tests.by_hand import unlisted
from tests.test_resume import equal

SHAPES = {
    "gpt2": GPTConfig(50, context=16, n_layer=2, n_head=2, n_embd=16),
    "llama": GPTConfig(50, context=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, norm="rms",
                       positions="rotary", mlp="swiglu", bias=False, qkv_bias=True, tied=False),
    "bert": GPTConfig(50, context=16, n_layer=2, n_head=2, n_embd=16, causal=False, pre_norm=False),
}  # fmt: skip
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
SMALL = ["--preset", "smoke", "--precision", "fp32"]


def gpt(shape: str = "gpt2", seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SHAPES[shape]).eval()


def stir(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give the adapters weights as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.3)
    return model


def adapted(shape: str = "gpt2", rank: int = 3, alpha: float = 8.0) -> GPT:
    model = gpt(shape)
    lora.attach(model, rank, alpha)
    return model


def config(**options):
    given = {"lora": None, "lora_alpha": 32.0, "train_layers": None}
    return SimpleNamespace(
        **given | {"gradient_checkpointing": False, "compile": False, "shard": False} | options
    )


def run_on_cpu(dtype: torch.dtype = torch.float32):
    return SimpleNamespace(device=torch.device("cpu"), frozen_dtype=dtype)


# ----------------------------------------------------------------------------- what they compute


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 6), alpha=st.floats(0.1, 100), bias=st.booleans(), seed=st.integers(0, 999))
def test_a_layer_is_the_formula(rank, alpha, bias, seed):
    torch.manual_seed(seed)
    base = nn.Linear(5, 7, bias)
    layer = lora.LoRALinear(base, rank, alpha)
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), base(x))  # B is 0
    nn.init.normal_(layer.lora_b)
    weight = base.weight.double() + alpha / rank * layer.lora_b.double() @ layer.lora_a.double()
    want = x.double() @ weight.T + (base.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


def test_D31_a_is_drawn_as_uniform_as_the_width_says():
    layer = lora.LoRALinear(nn.Linear(400, 8), 50, 1.0)
    bound = 1 / 400**0.5
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_D31_new_adapters_change_no_bit_and_merged_ones_compute_the_same(shape):
    plain, model = gpt(shape), adapted(shape)
    hidden = plain(TOKENS, MASK)
    assert torch.equal(model(TOKENS, MASK), hidden)
    stir(model)
    logits = model.logits(model(TOKENS, MASK))
    assert (logits - plain.logits(hidden)).abs().max() > 0.01
    merged = GPT(SHAPES[shape]).eval()
    merged.load_state_dict(lora.merged_state(model.state_dict(), 8.0))
    torch.testing.assert_close(merged.logits(merged(TOKENS, MASK)), logits, rtol=0, atol=1e-5)
    adapters.merge(model)
    assert model.config.lora_rank == 0 and equal(model.state_dict(), merged.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_linear_layer_of_the_blocks_has_one_and_nothing_else_of_the_gpt_is_trained(shape):
    model = adapted(shape)
    layers = [m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    assert layers and all(isinstance(layer, lora.LoRALinear) for layer in layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers) and all(".lora_" in name for name in trained)
    stir(model)
    model.logits(model(TOKENS, MASK))[MASK].square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (name in trained), name


def test_the_last_layers_alone_may_have_them():
    """The blocks below are plain and frozen, so that no gradient is computed in them."""
    model = gpt()
    logits = model.logits(model(TOKENS, MASK))
    prepare.choose_trained(model, config(lora=3, train_layers=1), torch.float32)
    assert torch.equal(model.logits(model(TOKENS, MASK)), logits) and len(model.blocks) == 2
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert names and all(name.startswith("blocks.1.") for name in names)
    again = GPT(stir(model).config)
    again.load_state_dict(model.state_dict())
    prepare.choose_trained(model, config(), torch.float32)  # merged
    assert model.config == gpt().config
    torch.testing.assert_close(again.eval()(TOKENS, MASK), model.eval()(TOKENS, MASK), rtol=0, atol=1e-5)
    every = gpt()
    prepare.choose_trained(every, config(lora=3, train_layers=2), torch.float32)
    assert every.config == adapted(alpha=32.0).config


def test_a_model_built_from_the_config_has_them():
    model = stir(adapted())
    again = GPT(model.config)
    assert again.config.lora_rank == 3 and again.config.lora_alpha == 8.0
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(TOKENS, MASK), model(TOKENS, MASK))


def test_critics_start_with_the_adapters_of_their_models():
    policy = stir(adapted())
    critic = zero_critic(policy)
    assert torch.equal(critic.backbone.eval()(TOKENS, MASK), policy(TOKENS, MASK))
    reward = RewardEnsemble(policy.config)
    stir(reward)
    critic = critic_from(reward.members[0]).eval()
    want = reward.eval().members[0].values(TOKENS, MASK)
    torch.testing.assert_close(critic.values(TOKENS, MASK), want)
    assert {name for name, p in critic.named_parameters() if p.requires_grad} == {
        name for name, _ in critic.named_parameters() if ".lora_" in name or not name.startswith("backbone")
    }


# ----------------------------------------------------------------------------- one trunk


def models_of_ppo(dtype=torch.float32, **options) -> tuple[list[nn.Module], list[nn.Module]]:
    policy, ref, reward = gpt(), gpt(), RewardEnsemble(SHAPES["gpt2"])
    reward.members[0].backbone.load_state_dict(policy.state_dict())
    critic = critic_from(reward.members[0])
    trained, frozen = [policy, critic], [ref, reward]
    prepare.prepare(config(**options), run_on_cpu(dtype), trained, frozen)
    return trained, frozen


def bytes_of(models: list[nn.Module]) -> int:
    storages = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_D31_models_of_one_base_hold_its_weights_once(dtype):
    trained, frozen = models_of_ppo(dtype, lora=2)
    gpts = [g for model in (*trained, *frozen) for g in prepare.gpts_in(model)]
    assert len(gpts) == 4
    for name, p in gpts[1].named_parameters():
        if ".lora_" not in name:
            assert all(dict(g.named_parameters())[name] is p for g in gpts), name
            assert p.dtype == (dtype if p.dim() == 2 else torch.float32) and not p.requires_grad
    mine, its = ([p for n, p in m.named_parameters() if ".lora_" in n] for m in trained)
    assert mine and not {id(p) for p in mine} & {id(p) for p in its}  # each has adapters of its own
    assert all(p.dtype == torch.float32 and p.requires_grad for p in (*mine, *its))
    adapters = sum(4 * p.numel() for p in (*mine, *its))
    heads = sum(
        4 * p.numel()
        for m in (trained[1], frozen[1].members[0])
        for h in (m.fc, m.out)
        for p in h.parameters()
    )
    assert bytes_of([*trained, *frozen]) == bytes_of([gpts[2]]) + adapters + heads


def test_frozen_last_layers_are_held_once_too_and_trained_ones_are_not():
    (policy, critic), (ref, reward) = models_of_ppo(train_layers=1)
    assert policy.wte.weight is ref.wte.weight is critic.backbone.wte.weight
    assert policy.blocks[0].qkv.weight is reward.members[0].backbone.blocks[0].qkv.weight
    assert len({id(g.blocks[1].qkv.weight) for g in (policy, critic.backbone, ref)}) == 3


def test_weights_that_differ_are_not_shared():
    policy, ref = gpt(), gpt(seed=1)
    prepare.prepare(config(lora=2), run_on_cpu(), [policy], [ref])
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in ref.parameters()}
    names = {name for name, p in policy.named_parameters() if id(p) in shared}
    assert names and all("weight" not in name or "ln" in name for name in names)  # zeros and ones


def test_training_a_model_with_adapters_and_no_lora_merges_them():
    model = stir(adapted())
    logits = model.logits(model(TOKENS, MASK))
    prepare.choose_trained(model, config(), torch.float32)
    assert model.config.lora_rank == 0 and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.logits(model(TOKENS, MASK)), logits, rtol=0, atol=1e-5)


def test_other_ranks_are_refused():
    told = "has adapters of rank 3 and alpha 8 in all layers: give these, or drop --lora"
    with pytest.raises(UserError, match=told):
        prepare.choose_trained(adapted(), config(lora=4, lora_alpha=8.0), torch.float32)
    with pytest.raises(UserError, match="has adapters of rank 3 and alpha 8"):
        prepare.choose_trained(adapted(), config(lora=3), torch.float32)
    with pytest.raises(UserError, match="has adapters of rank 3 and alpha 8 in all layers: give"):
        prepare.choose_trained(adapted(), config(lora=3, lora_alpha=8.0, train_layers=1), torch.float32)
    last = gpt()
    lora.attach(last, 3, 8.0, 1)
    with pytest.raises(
        UserError, match=r"in the last 1 layers \(--train-layers 1\): give these, or drop --lora"
    ):
        prepare.choose_trained(last, config(lora=3, lora_alpha=8.0), torch.float32)
    with pytest.raises(UserError, match="--train-layers 3: the model has 2 layers"):
        prepare.choose_trained(gpt(), config(lora=3, train_layers=3), torch.float32)
    with pytest.raises(UserError, match="--lora 17: the model has 16 channels"):
        prepare.choose_trained(gpt(), config(lora=17), torch.float32)


def test_split_state_leaves_models_without_adapters_alone():
    for model in (gpt(), ValueModel(SHAPES["gpt2"])):
        own, of_base = adapters.split_state(model)
        assert not of_base and equal(own, model.state_dict())


# ----------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def tuned(smoke, run, tmp_path_factory):
    """Folders of sft, rm, ppo and dpo, each trained with adapters of rank 4 beside the weights of smoke/sft."""
    home = tmp_path_factory.mktemp("lora")
    small = [*SMALL, "--lora", 4, "--lr", 0.01]
    init = ["--init", smoke / "sft"]
    assert run("train_sft", *small, *init, "--epochs", 1, "--samples", 0, "--out", home / "sft") == 0
    assert run("train_rm", *small, *init, "--out", home / "rm") == 0
    ppo = [*small, "--iterations", 2, "--reward-model", home / "rm", "--value-lr", 0.01]
    assert run("train_ppo", *ppo, *init, "--out", home / "ppo") == 0
    dpo = [*small, "--init", home / "sft"]  # goes on from adapters
    assert run("train_dpo", *dpo, "--out", home / "dpo") == 0
    return home


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_a_checkpoint_holds_adapters_and_the_hash_of_their_base(tuned, smoke, stage):
    state = load_file(tuned / stage / "model.safetensors")
    own = [name for name in state if not name.startswith("members")]
    assert all(".lora_" in name for name in own) and bool(own) == (stage != "rm")
    if stage == "rm":
        assert {n.split(".")[2] for n in state} == {"backbone", "fc", "out", "gain", "bias"}
    about = json.loads((tuned / stage / "config.json").read_text())
    assert about["inputs"]["base"] == checkpoint.fingerprint(smoke / "sft")
    assert about["model"]["lora_rank"] == 4
    base, whole = checkpoint.load_state(smoke / "sft"), checkpoint.load_state(tuned / stage)
    prefix = "members.0.backbone." if stage == "rm" else ""
    assert all(torch.equal(whole[prefix + name], weight) for name, weight in base.items())
    if stage == "ppo":
        trainer = load_file(tuned / stage / "latest" / "trainer.safetensors")
        assert not [n for n in trainer if n.startswith("value.backbone.") and ".lora_" not in n]
    for name, b in whole.items():
        assert not name.endswith("lora_b") or b.abs().max() > 0  # it learnt


def test_everything_reads_them(tuned, smoke, run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, reconfigure=lambda **_: None))
    assert run("minirlhf.estimate", smoke / "sft", "--reward-model", tuned / "rm", "--lora", 4) == 0
    told = capsys.readouterr().out
    assert "policy" in told and "peak, about" in told
    shutil.copytree(smoke / "rm", tmp_path / "rm", symlinks=True)
    shutil.copytree(smoke / "sft", tmp_path / "sft", symlinks=True)
    shutil.copytree(tuned / "ppo", tmp_path / "ppo", symlinks=True)
    arguments = ["--run", tmp_path, "--reward-model", tuned / "rm", "--prompts", 8, "--best-of", 1]
    assert run("minirlhf.evaluate", *arguments) == 0


def test_runs_that_were_copied_together_are_found_and_a_changed_base_is_refused(tuned, smoke, tmp_path):
    shutil.copytree(smoke / "sft", tmp_path / "a" / "sft", symlinks=True)
    shutil.copytree(tuned / "dpo", tmp_path / "a" / "dpo", symlinks=True)
    file = unlisted(tmp_path / "a" / "dpo" / "latest" / "config.json")
    about = json.loads(file.read_text())
    about["inputs"]["base_path"] = "/nowhere/sft"
    file.write_text(json.dumps(about))
    assert checkpoint.base_of(tmp_path / "a" / "dpo") == tmp_path / "a" / "sft"
    want = checkpoint.load_state(tuned / "dpo")
    assert equal(checkpoint.load_state(tmp_path / "a" / "dpo"), want)
    config_file = unlisted(tmp_path / "a" / "sft" / "latest" / "config.json")
    config_file.write_text(config_file.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(
        UserError, match="trained again since, or replaced .* its adapters fit no other weights"
    ):
        checkpoint.load_state(tmp_path / "a" / "dpo")
    shutil.rmtree(tmp_path / "a" / "sft")
    with pytest.raises(UserError, match="is not here .* its adapters fit no other weights: put it back"):
        checkpoint.load_state(tmp_path / "a" / "dpo")


def test_a_damaged_record_of_the_base_is_one_line(tuned, tmp_path):
    """Missing, of another type, half of it, or the checkpoint itself."""
    shutil.copytree(tuned / "sft", tmp_path / "sft", symlinks=True)
    file = unlisted(tmp_path / "sft" / "latest" / "config.json")
    about = json.loads(file.read_text())
    own = {"base": about["sha256"], "base_path": str(tmp_path / "sft"), "base_relative_path": "."}
    for inputs in (None, [], {}, {"base": None}, {"base": "x"}, about["inputs"] | own):
        file.write_text(json.dumps(about | {"inputs": inputs}))
        with pytest.raises(UserError) as told:
            checkpoint.load_gpt(tmp_path / "sft")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("stage", ["train_rm", "train_ppo"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tuned, smoke, run, metrics, stage, tmp_path, no_baselines
):
    options = [*SMALL, "--lora", 4, "--lr", 0.01, "--init", smoke / "sft", "--out", tmp_path / "out"]
    if stage == "train_ppo":
        options += ["--iterations", 2, "--reward-model", tuned / "rm", "--value-lr", 0.01]
    assert run(stage, *options, stop_at=1) == 130
    assert run(stage, *options, "--resume") == 0
    other = tuned / stage.removeprefix("train_")
    assert metrics(tmp_path / "out") == metrics(other)
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(other / "model.safetensors"))


@pytest.mark.parametrize(
    "options, told",
    [
        (["--lora", 0], "--lora must be at least 1"),
        (["--lora", 2], "--lora trains adapters beside the weights of a model: name it with --init"),
        (["--lora-alpha", 2], "--lora-alpha has no effect without --lora"),
    ],
)
def test_mistakes(run, capsys, tmp_path, options, told):
    assert run("train_sft", *SMALL, *options, "--out", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "latest").exists()


@pytest.mark.parametrize(
    "stage, options, told",
    [
        ("train_sft", ["--lora", 2, "--dropout", 0.1], "--dropout has no effect with --lora"),
        ("train_rm", ["--lora", 2, "--dropout", 0.1], "--dropout has no effect with --lora"),
        ("train_rm", ["--lora", 2, "--embedding-lr", 2], "--embedding-lr has no effect with --lora"),
        (
            "train_rm",
            ["--train-layers", 1, "--embedding-lr", 2],
            "--embedding-lr has no effect with --train-layers",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(smoke, run, capsys, tmp_path, stage, options, told):
    """They were taken, and recorded in config.json as if they had been used."""
    out = tmp_path / "out"
    assert run(stage, *SMALL, *options, "--init", smoke / "sft", "--out", out) == 2
    assert told in capsys.readouterr().err and not out.exists()


def test_no_dropout_beside_adapters_may_be_said(smoke, run, tmp_path):
    options = ["--lora", 2, "--dropout", 0, "--init", smoke / "sft", "--epochs", 1, "--samples", 0]
    assert run("train_sft", *SMALL, *options, "--out", tmp_path / "out") == 0


def test_a_base_of_another_policy_is_no_base(tuned, smoke, run, capsys, tmp_path):
    options = [*SMALL, "--lora", 8, "--init", tuned / "sft", "--out", tmp_path / "out"]
    assert run("train_dpo", *options) == 2
    assert (
        "has adapters of rank 4 and alpha 32 in all layers: give these, or drop --lora"
        in capsys.readouterr().err
    )
