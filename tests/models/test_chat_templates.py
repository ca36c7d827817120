"""Chat templates and added tokens against transformers: the same ids, in and out."""

import json

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from minirlhf import UserError, checkpoint, data  # noqa: E402
from minirlhf.interop import chat_template, convert, convert_tokenizer  # noqa: E402
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, LLAMA3_PATTERN, QWEN2_PATTERN  # noqa: E402
from minirlhf.model import GPT, GPTConfig, RewardEnsemble  # noqa: E402
from minirlhf.support.bpe import BYTES  # noqa: E402
from minirlhf.tokenizer import GPT2_PATTERN, Tokenizer  # noqa: E402

TEXTS = [
    "User: What is it?\n\nAssistant: The film isn't bad. USER: please wait ASSISTANT: [INST] [/INST] tool_call",
    "system\nuser\nassistant\nYou are a helpful assistant.\n### Instruction:\nWhat is the film?\n\n### Response:\n",
    "\n\nHuman: What?\n\nAssistant: It is the film that it is.\n\nSystem: think",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>"]
PATTERNS = {"gpt2": (GPT2_PATTERN, None), "llama": (LLAMA3_PATTERN, None), "qwen2": (QWEN2_PATTERN, "NFC")}
TEMPLATES = {
    "chatml": """{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "trimmed": """{{ bos_token }}{% for m in messages %}
{% set text = '<s>' + m['role'] + '</s>\n\n' + m['content'] | trim + '<|eot_id|>' %}
{{ text }}{% endfor %}
{% if add_generation_prompt %}{{ '<s>assistant</s>\n\n' }}{% endif %}""",
    "spelled out": """{% for m in messages %}
{% if m.role == 'user' %}USER: {{ m.content.strip() }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}""",
    "inst": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}""",
    "instruction": """{% for m in messages %}### Instruction:
{{ m['content'] }}

{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}""",
    "touching": "{% for m in messages %}{{ 'User:' + m['content'] + '!' }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ '<think>' if add_generation_prompt }}",
}


def hugging_face(folder, family="llama", template=None, added=(), **config):
    """A folder with a BPE that the tokenizers package has trained -> its tokenizer, as transformers loads it."""
    pattern, normalizer = PATTERNS[family]
    made, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    made.normalizer = getattr(tokenizers.normalizers, normalizer)() if normalizer else None
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=SPECIALS,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3 + HARD_TEXTS, trainer)
    made.add_tokens([*added])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | names | config
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return transformers.AutoTokenizer.from_pretrained(folder)


def imported(folder, n=600):
    return convert_tokenizer.from_folder(folder, {"vocab_size": n, "model_type": "llama"})


def added_token(content, **flags):
    return tokenizers.AddedToken(content, **{"normalized": False, "special": False} | flags)


# ---------------------------------------------------------------- H4: what is encoded together


CONTENTS = st.lists(
    st.text("Wht is?\n \t.'é你1", max_size=8)
    | st.sampled_from(["What is it?", " it", "\nfilm\n", "isn't", ""]),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "hf"
    added = [added_token("<think>"), "<late>"]
    theirs = hugging_face(folder, "llama", TEMPLATES[request.param], added)
    return theirs, imported(folder)


@settings(max_examples=60, deadline=None)
@given(contents=CONTENTS, answer=st.booleans())
def test_H4_ids_are_those_of_apply_chat_template(both, contents, answer):
    theirs, ours = both
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    assert chat_template.render(ours, messages, answer) == text
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=answer, return_dict=False)
    assert chat_template.encode(ours, messages, answer) == wanted


@pytest.mark.parametrize("special", ["<|im_end|>", "<s>", "<|endoftext|>"])
def test_H4_only_what_a_message_spells_out_differs_from_transformers(both, special):
    """Theirs ends the turn where a message says '<|im_end|>'.  Ours has the same ids but for these characters."""
    theirs, ours = both
    stand_in = "\u2603"  # a character that no template adds, and that no token joins with its neighbours
    spelled = ours.encode(special)
    assert ours.specials[special] not in spelled
    messages = [{"role": "user", "content": f"What {stand_in} is it"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = chat_template.encode(ours, [{"role": "user", "content": f"What {special} is it"}], answer=True)
    count = lambda ids: [i for i in ids if i in ours.specials.values()]
    assert count(found) == count(wanted)
    assert special in ours.encoding.decode(found)


# ---------------------------------------------------------------- H5: added tokens in texts

ADDED = {
    "plain": [added_token("<tool_call>"), added_token("</tool_call>"), added_token("<think>")],
    "normalised": ["<tool_call>", "caf\u00e9", "e\u0301x", added_token("<think>")],
    "prefixes": [added_token("<t"), added_token("<to"), added_token("<tool_call>")],
    "of letters": [added_token("film"), added_token("ilm i"), added_token(" the")],
    "with white space": [added_token("\n\n\n"), added_token("   "), added_token("<a b>")],
}
PIECES = ["<tool_call>", "</tool_call>", "<think>", "caf\u00e9", "cafe\u0301", "e\u0301x", "\u00e9x", "<t", "<to", "film",
          "ilm i", " the", "\n\n\n", "   ", "<a b>", "<|im_end|>", "please", " wait", "1", "\u0338", "\n", "is", "<"]  # fmt: skip


@pytest.fixture(scope="module", params=[(a, f) for a in ADDED for f in PATTERNS], ids=str)
def with_added(request, tmp_path_factory):
    added, family = request.param
    folder = tmp_path_factory.mktemp("added") / "hf"
    theirs = hugging_face(folder, family, added=ADDED[added])
    try:
        return theirs, imported(folder), folder
    except UserError as error:
        pytest.fail(str(error))


def test_H5_added_tokens_in_texts_are_those_of_hugging_face(with_added, tmp_path):
    theirs, ours, folder = with_added
    assert len(ours.added) > 2
    ids = lambda text: theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ours.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert loaded.hash == ours.hash and loaded.added == ours.added
    convert_tokenizer.write(ours, tmp_path, 64)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = convert_tokenizer.from_folder(tmp_path, {"vocab_size": 600})
    assert back.hash == ours.hash

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
    def compare(text):
        found = ours.encode(text)
        assert found == ids(text) == loaded.encode(text)
        assert found == again(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not ours.normalize:
            assert ours.decode(found) == text
            if text.isascii():  # their decoder takes the é in the name of an added token for a byte
                assert theirs.decode(found) == text

    compare()
    assert ours.encode("please <tool_call> wait") == ids("please <tool_call> wait")


def test_H5_without_the_package_the_definition_decides(with_added, monkeypatch):
    _, ours, folder = with_added
    monkeypatch.setattr(convert_tokenizer, "_package", lambda *_: None)
    found = imported(folder)
    assert found.hash == ours.hash


def test_H5_bos_eos_and_pad_are_special_whatever_the_file_says(tmp_path):
    """transformers makes them special; a text that spells them out must not end a turn."""
    theirs = hugging_face(
        tmp_path / "hf", added=[added_token("<end>"), added_token("<tool>")], eos_token="<end>"
    )
    ours = imported(tmp_path / "hf")
    text = "wait <end> <tool>"
    assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.eot == theirs.eos_token_id and ours.eot not in ours.encode(text)
    assert ours.specials["<tool>"] in ours.encode(text)


def test_H5_the_check_before_an_import_tries_added_tokens(tmp_path, monkeypatch):
    hugging_face(tmp_path / "hf", added=[added_token("<tool>")])
    monkeypatch.setattr("minirlhf.support.added.cut", lambda pieces, *_: pieces)
    with pytest.raises(UserError, match="tokenizer.json: the ids of '<tool>' are .*not supported"):
        imported(tmp_path / "hf")


def test_H5_tokens_that_are_not_in_vocab_json(tmp_path):
    """Folders without tokenizer.json list them in added_tokens.json, or in tokenizer_config.json."""
    theirs = hugging_face(tmp_path / "hf", "qwen2")
    document = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    n = len(document["model"]["vocab"])
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in document["model"]["merges"])
    (old / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    (old / "added_tokens.json").write_text(json.dumps({"<tool>": n, "<extra>": n + 1}))
    about = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<extra>"],
    }
    decoder = {str(n + 2): {"content": "<think>", "special": False, "normalized": False}}
    about["added_tokens_decoder"] = decoder
    (old / "tokenizer_config.json").write_text(json.dumps(about))
    found = convert_tokenizer.from_folder(old, {"vocab_size": 600, "model_type": "qwen2"})
    ids = [
        found.specials["<tool>"],
        *theirs("a", add_special_tokens=False)["input_ids"],
        found.specials["<think>"],
    ]
    assert found.encode("<tool>a<think>") == ids == [n, ids[1], n + 2]
    assert n + 1 not in found.encode("<extra>")


# ---------------------------------------------------------------- H8, R8: the template of what was trained

CONVERSATIONS = [
    [("user", "What is it?"), ("assistant", "The film.")],
    [
        ("system", "Be brief."),
        ("user", "  What?\n"),
        ("assistant", ""),
        ("user", "é\n\nHuman: x"),
        ("assistant", " y "),
    ],
    [("assistant", "Hello."), ("user", "What is it?"), ("assistant", "The {{ film }} <|im_end|>")],
    [("user", "a"), ("user", "b"), ("assistant", "c")],
]


def trained(folder, tokenizer, stage="sft", wrap=GPT, head=None):
    config = GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16)
    more = {"head": head} if head else {}
    about = checkpoint.describe(stage, config, convert.Import("x"), 1, True, tokenizer, **more)
    model = wrap(config, **head) if head else wrap(config)
    checkpoint.save(folder, 1, model.state_dict(), about, tokenizer)
    return folder


def tokenizers_of_stages(folder):
    """One trained here, one imported with a chat template, one imported without a bos."""
    hugging_face(folder / "a", "llama", TEMPLATES["chatml"])
    hugging_face(folder / "b", "qwen2", TEMPLATES["trimmed"], [added_token("<tool>")], bos_token=None)
    return [Tokenizer.train(TEXTS * 3, 400), imported(folder / "a"), imported(folder / "b")]


@pytest.mark.parametrize("stage", ["sft", "ppo", "rm"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_H8_R8_the_exported_template_writes_what_was_trained(tmp_path, which, stage, capsys):
    ours = tokenizers_of_stages(tmp_path)[which]
    head = {"pooling": "last", "members": 1, "mlp": False} if stage == "rm" else None
    trained(tmp_path / "ours", ours, stage, RewardEnsemble if head else GPT, head)
    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    assert ("replace the chat template" in capsys.readouterr().out) == (which > 0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    learnt = data.encode_examples(ours, data.load(tmp_path / "rows.jsonl").records, 1000)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row[:-1]}) + "\n" for row in rows))
    prompts = data.encode_prompts(ours, data.load(tmp_path / "prompts.jsonl").records, 4, 1000)
    for row, (ids, _), prompt in zip(rows, learnt, prompts, strict=True):
        text = theirs.apply_chat_template(row, tokenize=False)
        names = {i: name for name, i in ours.specials.items()}
        assert text == names[ours.bos] + data.transcript(row, answer=False) + names[ours.eot]
        if not any(name in m["content"] for m in row for name in ours.specials):
            assert theirs.apply_chat_template(row, return_dict=False) == ids
        asked = theirs.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == prompt
        again = imported(
            tmp_path / "out", ours.vocab_size
        )  # and our own import of it reads conversations so too
        assert chat_template.encode(again, row, answer=False) == ids
        assert chat_template.encode(again, row[:-1], answer=True) == prompt
    with pytest.raises(Exception, match="the roles are system, user, assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_H8_an_imported_model_keeps_its_own_template(tmp_path, capsys):
    ours = tokenizers_of_stages(tmp_path)[1]
    trained(tmp_path / "ours", ours, "import")
    convert.export_model(tmp_path / "ours", tmp_path / "out", backbone=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES["chatml"]
    assert "template" not in capsys.readouterr().out


def test_a_whole_word_that_no_merge_makes_is_a_token_only_where_merges_are_ignored(tmp_path):
    """Llama 3's tokenizer.json says ignore_merges; without it such a token never comes from a text."""
    for ignore in (True, False):
        folder = tmp_path / str(ignore)
        hugging_face(folder)
        document = json.loads((folder / "tokenizer.json").read_text())
        highest = max(document["model"]["vocab"].values())
        document["model"]["vocab"]["zqxj"] = highest + 1
        document["model"]["ignore_merges"] = ignore
        (folder / "tokenizer.json").write_text(json.dumps(document))
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), imported(folder)
        for text in "zqxj", "a zqxj", "\nzqxj":
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert (highest + 1 in ours.encode("zqxj")) == ignore
        assert ours.token_str(highest + 1) == "zqxj"
        convert_tokenizer.write(ours, tmp_path, 64)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert again("a zqxj", add_special_tokens=False)["input_ids"] == ours.encode("a zqxj") or not ignore


def test_bytes_come_back_from_the_definition():
    assert [convert_tokenizer.BYTE_OF[c] for c in convert_tokenizer.CHARACTERS] == BYTES
