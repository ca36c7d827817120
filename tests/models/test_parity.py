"""Models that transformers builds at random, in and out: the same logits, the same greedy text. Nothing is downloaded."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from minirlhf import UserError, checkpoint  # noqa: E402
from minirlhf.data import collate  # noqa: E402
from minirlhf.interop import convert  # noqa: E402
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, LLAMA3_PATTERN, QWEN2_PATTERN  # noqa: E402
from minirlhf.model import GPTConfig, RewardEnsemble  # noqa: E402
from minirlhf.rollout import Sampling, generate  # noqa: E402
from minirlhf.tokenizer import GPT2_PATTERN, Tokenizer  # noqa: E402

SENTENCES = [f"the {a} {b} isn't {c} {n}" for a in ("old", "new", "long") for b in ("film", "scene") for c in ("good", "bad")
             for n in (1, 22, 333)]  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
}


def hugging_face_tokenizer(folder, split, specials, normalizer=None, **config):
    """A byte-level BPE trained by the tokenizers package itself; returns its vocabulary's size."""
    pre = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizer and getattr(tokenizers.normalizers, normalizer)()
    if split == "digits":
        steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    elif split == GPT2_PATTERN:
        steps = [pre.ByteLevel(add_prefix_space=False)]
    else:
        steps = [
            pre.Split(tokenizers.Regex(split), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    made.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = (
        [] if split == "digits" else pre.ByteLevel.alphabet()
    )  # SmolLM2's lacks bytes that its texts never had
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES + HARD_TEXTS, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    )
    return made.get_vocab_size()


def gpt2(folder, **changes):
    n = hugging_face_tokenizer(
        folder, GPT2_PATTERN, ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    config = {
        "vocab_size": n,
        "n_positions": 96,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes))


def llama(folder, **changes):
    names = {
        "bos_token": "<|begin|>",
        "eos_token": "<|eot|>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    n = hugging_face_tokenizer(folder, LLAMA3_PATTERN, ["<|begin|>", "<|eot|>", "<|spare|>"], **names)
    config = {"vocab_size": n + 5, "num_key_value_heads": 2, "rope_theta": 700.0} | SMALL | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def smollm(folder, **changes):
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    n = hugging_face_tokenizer(folder, "digits", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **names)
    config = {"vocab_size": n, "num_key_value_heads": 3, "tie_word_embeddings": True} | SMALL | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def qwen2(folder, **changes):
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    n = hugging_face_tokenizer(
        folder, QWEN2_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "NFC", **names
    )
    config = {"vocab_size": n, "num_key_value_heads": 2} | SMALL | changes
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))


def qwen3(folder, **changes):
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    n = hugging_face_tokenizer(
        folder, QWEN2_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "NFC", **names
    )
    config = {"vocab_size": n, "num_key_value_heads": 2, "head_dim": 20, "rope_theta": 1e6} | SMALL | changes
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))


def mistral(folder, **changes):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    n = hugging_face_tokenizer(folder, GPT2_PATTERN, ["<unk>", "<s>", "</s>"], **names)
    config = {"vocab_size": n, "num_key_value_heads": 3, "sliding_window": None, "rope_theta": 1e6} | SMALL
    return transformers.MistralForCausalLM(transformers.MistralConfig(**config | changes))


def smollm3(folder, **changes):
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    n = hugging_face_tokenizer(folder, LLAMA3_PATTERN, ["<|begin|>", "<|im_start|>", "<|im_end|>"], **names)
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
    config = {"vocab_size": n, "num_key_value_heads": 2} | SMALL | {"num_hidden_layers": 5} | tokens | changes
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**config))


FAMILIES = {
    "gpt2": (gpt2, {}),
    "gpt2, untied, exact gelu, narrow": (
        gpt2,
        {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 72},
    ),
    "llama, grouped queries": (llama, {}),
    "llama, all heads, tied": (llama, {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama 3.1's rotary scaling": (llama, {"rope_parameters": LLAMA3}),
    "smollm": (smollm, {}),
    "qwen2, biases on q, k, v": (qwen2, {}),
    "qwen2, tied": (qwen2, {"tie_word_embeddings": True}),
    "llama 3.2 records its head_dim": (llama, {"head_dim": 8}),
    "llama, heads of their own width": (llama, {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3": (qwen3, {}),
    "qwen3, tied, head_dim of C / H": (qwen3, {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3, hidden size that heads do not divide": (qwen3, {"hidden_size": 50}),
    "mistral without a window": (mistral, {}),
    "mistral with a window of its context, wide heads": (mistral, {"sliding_window": 96, "head_dim": 12}),
    "smollm3": (smollm3, {}),
    "smollm3, listed layers, untied": (
        smollm3,
        {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False},
    ),
}
CLASSES = {"MistralForCausalLM": "LlamaForCausalLM"}  # what goes out under another name


def shake(model):
    """Weights far from initial ones: biases and norms that matter, logits that prefer something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, 0.25 if p.dim() == 1 else 0.15)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens))


@pytest.fixture(params=FAMILIES)
def original(request, tmp_path):
    """folder, transformers' model"""
    build, changes = FAMILIES[request.param]
    (tmp_path / "hf").mkdir()
    model = shake(build(tmp_path / "hf", **changes))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def test_in_and_out_the_logits_and_the_greedy_text_are_theirs(original, tmp_path):
    folder, model = original
    convert.import_model(str(folder), tmp_path / "ours")
    ours, tokenizer = checkpoint.load_gpt(tmp_path / "ours").eval(), Tokenizer.load(tmp_path / "ours")
    torch.manual_seed(5)
    tokens = torch.randint(ours.config.vocab_size, (3, 90))
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.3  # there is something to differ in
    torch.testing.assert_close(logits(ours, tokens), expected, atol=1e-4, rtol=0)

    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    name = type(model).__name__
    assert type(back).__name__ == CLASSES.get(name, name)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-5, rtol=0)
    theirs, again = (transformers.AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "out"))
    for name in "bos_token", "eos_token", "pad_token", "chat_template":
        assert getattr(again, name) == getattr(theirs, name), name
    for text in HARD_TEXTS + SENTENCES:
        ids = tokenizer.encode(text)
        for words in theirs, again:
            assert words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert again(text)["input_ids"] == theirs(text)["input_ids"]

    prompt = torch.tensor([tokenizer.encode("the old film isn't")])
    greedy = back.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    walk = prompt
    while walk.shape[1] < greedy.shape[1]:
        walk = torch.cat([walk, logits(ours, walk)[:, -1].argmax(-1, keepdim=True)], 1)
    assert walk.tolist() == greedy.tolist()


def test_left_padding_and_cache_give_the_same_greedy_text(original, tmp_path):
    """Prompts of different lengths in one batch, theirs and ours padded on the left, both with a cache."""
    folder, model = original
    convert.import_model(str(folder), tmp_path / "ours")
    ours, tokenizer = checkpoint.load_gpt(tmp_path / "ours").eval(), Tokenizer.load(tmp_path / "ours")
    prompts = [
        tokenizer.encode(text) for text in ("the old film isn't", "a", "the long scene is bad 333 1 22")
    ]
    width = max(map(len, prompts))
    tokens = torch.tensor([[tokenizer.pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    never = ours.config.vocab_size  # no token: both go on to the end
    model.generation_config.eos_token_id = None
    theirs = model.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=40, do_sample=False, pad_token_id=0, use_cache=True
    )
    texts = generate(ours, tokens, mask, Sampling(40, 0.0, never, tokenizer.pad))
    assert texts.responses.tolist() == theirs[:, width:].tolist()
    assert len({*texts.responses.flatten().tolist()}) > 1


def test_round_trips_keep_every_bit(original, tmp_path):
    """In, out and in again: the same weights, shape and tokenizer."""
    folder, _ = original
    convert.import_model(str(folder), tmp_path / "ours")
    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    convert.import_model(str(tmp_path / "out"), tmp_path / "again")
    first, second = (checkpoint.load_state(tmp_path / name) for name in ("ours", "again"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    assert checkpoint.shape_of(tmp_path / "ours") == checkpoint.shape_of(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "ours").hash == Tokenizer.load(tmp_path / "again").hash


def test_shards_and_half_precision(tmp_path):
    (tmp_path / "hf").mkdir()
    model = shake(llama(tmp_path / "hf")).bfloat16()
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    convert.import_model(str(tmp_path / "hf"), tmp_path / "ours")
    tokens = torch.arange(60)[None]
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = wide(tokens).logits
    torch.testing.assert_close(
        logits(checkpoint.load_gpt(tmp_path / "ours").eval(), tokens), expected, atol=1e-4, rtol=0
    )

    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such file: fetch it again"):
        convert.import_model(str(tmp_path / "hf"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def bert_folder(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "good", "bad", "##ly", "!", "é"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.normalizer, made.pre_tokenizer = (
        tokenizers.normalizers.BertNormalizer(),
        tokenizers.pre_tokenizers.BertPreTokenizer(),
    )
    made.add_special_tokens(words[:5])
    made.enable_truncation(4)
    made.enable_padding(length=16)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return len(words)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_bert_in_and_out(kind, tmp_path):
    n = bert_folder(tmp_path / "hf")
    config = transformers.BertConfig(vocab_size=n, hidden_act="gelu", **SMALL)
    model = shake(getattr(transformers, kind)(config))
    model.save_pretrained(tmp_path / "hf")
    convert.import_model(str(tmp_path / "hf"), tmp_path / "ours")
    ours, tokenizer = checkpoint.load_gpt(tmp_path / "ours").eval(), Tokenizer.load(tmp_path / "ours")
    assert not ours.config.causal and (tokenizer.bos, tokenizer.eot, tokenizer.pad) == (2, 3, 0)
    assert [tokenizer.token_str(i) for i in tokenizer.encode("The film, badly! [SEP] good")] == [
        "the", "film", "[UNK]", "bad", "##ly", "!", "[UNK]", "[UNK]", "[UNK]", "good"]  # fmt: skip
    tokens, mask = torch.randint(n, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    encoder = model.bert if kind == "BertForMaskedLM" else model
    with torch.no_grad():
        expected = encoder(tokens, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(ours(tokens, mask)[mask], expected[mask], atol=1e-4, rtol=0)
        convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
        back = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(
            back(tokens, attention_mask=mask.long()).last_hidden_state[mask],
            expected[mask],
            atol=1e-4,
            rtol=0,
        )
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the film", add_special_tokens=False)["input_ids"] == tokenizer.encode("the film")


def test_a_checkpoint_of_our_own_loads_in_transformers(smoke, tmp_path):
    """SFT and PPO of the smoke preset: GPT-2's shape, our BPE. A reward model only without its head."""
    for stage in "sft", "ppo":
        assert convert.export_model(smoke / stage, tmp_path / stage, backbone=False) == "GPT2LMHeadModel"
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / stage).eval()
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / stage)
        ours, tokenizer = checkpoint.load_gpt(smoke / stage).eval(), Tokenizer.load(smoke / stage)
        assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (
            tokenizer.bos,
            tokenizer.eot,
            tokenizer.pad,
        )
        for text in HARD_TEXTS:
            assert words(text, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ] == tokenizer.encode(text)
            assert words.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        tokens = torch.randint(ours.config.vocab_size, (2, ours.config.context))
        with torch.no_grad():
            torch.testing.assert_close(logits(ours, tokens), model(tokens).logits, atol=1e-4, rtol=0)
        prompt = torch.tensor([[tokenizer.bos, *tokenizer.encode("The film")]])
        greedy = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
        sampling = Sampling(12, 0.0, tokenizer.eot, tokenizer.pad)
        texts = generate(ours, prompt, torch.ones_like(prompt, dtype=torch.bool), sampling)
        assert texts.responses[texts.response_mask].tolist() == greedy[0, prompt.shape[1] :].tolist()
        convert.import_model(str(tmp_path / stage), tmp_path / f"{stage} again")
        again = checkpoint.load_state(tmp_path / f"{stage} again")
        assert all(torch.equal(t, again[name]) for name, t in checkpoint.load_state(smoke / stage).items())
    with pytest.raises(UserError, match="read one linear layer at the last token.*--backbone"):
        convert.export_model(smoke / "rm", tmp_path / "rm", backbone=False)
    assert not (tmp_path / "rm").exists()
    assert convert.export_model(smoke / "rm", tmp_path / "rm", backbone=True) == "GPT2LMHeadModel"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rm")


@pytest.mark.parametrize(
    "shape", [{}, {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False, "tied": False}]
)
def test_a_linear_reward_head_is_a_sequence_classifier(shape, tmp_path, capsys):
    """GPT-2's exactly; Llama's up to the constant that is printed, since neither its head nor its norm has a bias."""
    tokenizer = Tokenizer.train(SENTENCES, 300)
    config = GPTConfig(vocab_size=300, context=64, n_layer=2, n_head=4, n_embd=32, **shape)
    torch.manual_seed(7)
    model = RewardEnsemble(config, "last", 1, mlp=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        model.members[0].gain.fill_(2.5), model.members[0].bias.fill_(-0.75)
    head = {"pooling": "last", "members": 1, "mlp": False}
    about = checkpoint.describe("rm", config, convert.Import("random"), 1, True, tokenizer, head=head)
    checkpoint.save(tmp_path / "rm", 1, model.state_dict(), about, tokenizer)
    kind = convert.export_model(tmp_path / "rm", tmp_path / "out", backbone=False)
    assert kind.endswith("ForSequenceClassification")
    said = capsys.readouterr().out
    constant = float(said.split("add ")[1].split()[0]) if shape else 0.0
    assert ("add" in said) == bool(shape)
    texts = ["the film is good", "the scene", "a long one that isn't bad 333"]
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eot] for text in texts]
    tokens, mask = collate(rows, tokenizer.pad)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        scores = theirs(tokens, attention_mask=mask.long()).logits.squeeze(1)
        expected = model(tokens, mask)[0]
    assert scores.std() > 0.1
    torch.testing.assert_close(scores + constant, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "code", ["import transformers; transformers.LlamaForCausalLM", "import trl; trl.SFTTrainer"]
)
def test_other_libraries_load_beside_our_package_of_kernels(code):
    """They import any package called `kernels`, and the working directory's comes first."""
    library = code.split(";")[0].split()[1]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run([sys.executable, "-c", f"import kernels; {code}; print(kernels.__file__)"], cwd=root, text=True,
                          capture_output=True)  # fmt: skip
    assert told.returncode == 0, told.stderr[-800:]
    assert told.stdout.strip() == str(root / "kernels" / "__init__.py")
