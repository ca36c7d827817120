"""Adapters beside the `peft` library's: it loads our export, and computes what we compute."""

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from minirlhf import checkpoint  # noqa: E402
from minirlhf.interop import convert  # noqa: E402
from minirlhf.interop.command import main as command  # noqa: E402
from minirlhf.support import cli  # noqa: E402

SMALL = ["--preset", "smoke", "--precision", "fp32", "--samples", 0, "--epochs", 1]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip


def exporting(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["minirlhf.checkpoint", "export", *map(str, arguments)])
    cli.run_script(command)


@pytest.fixture(params=["gpt2", "llama", "gpt2, last layer", "llama, last layer"])
def tuned(request, smoke, run, tmp_path):
    """(the base's checkpoint, a checkpoint with trained adapters beside it)"""
    base = smoke / "sft"
    if "llama" in request.param:
        exported = tmp_path / "theirs"
        convert.export_model(base, exported, False)  # for its tokenizer
        vocab = checkpoint.shape_of(base).vocab_size
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab, **LLAMA))
        model.save_pretrained(exported)
        base = tmp_path / "base"
        convert.import_model(str(exported), base)
    layers = ["--train-layers", 1] if "last" in request.param else []
    options = [*SMALL, *layers, "--lora", 4, "--lora-alpha", 8, "--lr", 0.02, "--init", base]
    assert run("train_sft", *options, "--out", tmp_path / "sft") == 0
    return base, tmp_path / "sft"


def test_peft_loads_our_adapters(tuned, monkeypatch, tmp_path):
    base, sft = tuned
    model = checkpoint.load_gpt(sft).eval()
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.logits(model(tokens))
        plain = checkpoint.load_gpt(base).eval()
        assert (plain.logits(plain(tokens)) - want).abs().max() > 0.05

    convert.export_model(base, tmp_path / "hf-base", False)
    exporting(monkeypatch, sft, tmp_path / "adapters", "--adapters")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf-base")
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapters")).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, want, rtol=0, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, want, rtol=0, atol=1e-5)

    exporting(monkeypatch, sft, tmp_path / "merged")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, want, rtol=0, atol=1e-5)
    names = {name for name, _ in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == {n for n in names if "lora_" not in n}


def test_a_layer_trains_as_pefts(tuned):
    """The same first adapters, the same inputs: the same output and the same gradients."""
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 20)
    wrapped = torch.nn.Sequential(torch.nn.Linear(12, 20))
    wrapped[0].load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(wrapped, config)
    layer = theirs.base_model.model[0]
    from minirlhf.lora import LoRALinear

    ours = LoRALinear(base, 3, 7.0)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.normal_()
        ours.lora_a.copy_(a)
        ours.lora_b.copy_(b)
    x = torch.randn(5, 12)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.lora_a.grad, a.grad)
    torch.testing.assert_close(ours.lora_b.grad, b.grad)


def test_what_has_no_adapters_is_refused(smoke, monkeypatch, capsys, tmp_path):
    for stage, told in (("sft", "has no adapters"), ("rm", "has no adapters")):
        with pytest.raises(SystemExit) as stop:
            exporting(monkeypatch, smoke / stage, tmp_path / "out", "--adapters")
        assert stop.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
