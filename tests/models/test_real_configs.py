"""The config.json of well-known models, as their repositories have them but for their widths: the same logits as transformers'."""

import json

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from minirlhf import UserError, checkpoint  # noqa: E402
from minirlhf.interop import convert, convert_tokenizer  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402

TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "vocab_size": 300}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MISTRAL_7B_V0_3 = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True,
    "vocab_size": 32768,
}  # fmt: skip
MISTRAL_NEMO = MISTRAL_7B_V0_3 | {
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 1024000,
    "vocab_size": 131072,
}
MISTRAL_7B_V0_1 = MISTRAL_7B_V0_3 | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
# As transformers 5 writes them: rotary parameters in one object, `dtype`, kinds of layers.
NEW_QWEN3 = {k: v for k, v in QWEN3_0_6B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 28, "transformers_version": "5.0.0"}  # fmt: skip
NEW_LLAMA = {k: v for k, v in LLAMA_3_2_1B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
    "rope_parameters": LLAMA_3_2_1B["rope_scaling"] | {"rope_theta": 500000.0}, "dtype": "bfloat16"}  # fmt: skip
MODELS = {"Llama-3.2-1B-Instruct": LLAMA_3_2_1B, "Qwen3-0.6B": QWEN3_0_6B, "Qwen2.5-0.5B-Instruct": QWEN2_5_0_5B,
          "Mistral-7B-Instruct-v0.3": MISTRAL_7B_V0_3, "Mistral-Nemo-Instruct-2407": MISTRAL_NEMO, "SmolLM3-3B": SMOLLM3_3B,
          "Qwen3-0.6B, saved by transformers 5": NEW_QWEN3, "Llama-3.2-1B, saved by transformers 5": NEW_LLAMA}  # fmt: skip


def folder_of(folder, config):
    """A Hugging Face folder of random bfloat16 weights with this config.json, shrunk, and transformers' model of it."""
    small = config | TINY | {"head_dim": 16} if "head_dim" in config else config | TINY
    small["num_attention_heads"], small["num_key_value_heads"] = 6, 2
    for key in "layer_types", "no_rope_layers":
        if key in small:
            small[key] = small[key][:4]
    small |= {key: min(small[key], 299) if isinstance(small[key], int) else small[key]
              for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in small}  # fmt: skip
    folder.mkdir()
    tokenizer = Tokenizer.train(["the film is good, the film is bad"], 290)
    convert_tokenizer.write(tokenizer, folder, 64)
    (folder / "config.json").write_text(json.dumps(small))
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class.from_pretrained(folder)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2).copy_(p.bfloat16().float())
    state = {name: t.bfloat16() for name, t in model.state_dict().items()}
    if small.get("tie_word_embeddings", model.config.tie_word_embeddings):
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_config_as_its_repository_has_it(name, tmp_path):
    model = folder_of(tmp_path / "hf", MODELS[name])
    convert.import_model(str(tmp_path / "hf"), tmp_path / "ours")
    ours = checkpoint.load_gpt(tmp_path / "ours").eval()
    assert ours.config.context == MODELS[name]["max_position_embeddings"]
    tokens = torch.randint(300, (2, 80))
    with torch.no_grad():
        expected = model(tokens).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-4, rtol=0)
        convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-4, rtol=0)


def test_mistral_7b_v0_1_within_its_window(tmp_path):
    """Refused with its context of 32,768; with the context that the message names, exact."""
    model = folder_of(tmp_path / "hf", MISTRAL_7B_V0_1)
    with pytest.raises(
        UserError, match="sliding_window = 4096, but .* with max_position_embeddings = 4096 in this"
    ):
        convert.import_model(str(tmp_path / "hf"), tmp_path / "ours")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 4096}))
    convert.import_model(str(tmp_path / "hf"), tmp_path / "ours")
    ours, tokens = checkpoint.load_gpt(tmp_path / "ours").eval(), torch.randint(300, (1, 80))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), model(tokens).logits, atol=1e-4, rtol=0)
