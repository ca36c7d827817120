"""Added tokens against `tokenizers` itself: what texts with them are in ids, and ids with them in text, in and out."""

import json
import unicodedata

import pytest

pytestmark = pytest.mark.models
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from minirlhf import UserError  # noqa: E402
from minirlhf.interop import chat_template, convert_tokenizer  # noqa: E402
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, QWEN2_PATTERN  # noqa: E402
from minirlhf.support.added import SPACES, WORD  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402

pre = tokenizers.pre_tokenizers
TEXTS = ["the tool calls a tool, the tools call the film", "I think, you think <think> tool_call \n\n x1"]


def token(content, **flags):
    return tokenizers.AddedToken(content, **{"normalized": False, "special": False} | flags)


def folder_with(folder, added, specials=(), normalizer="NFC"):
    """A tokenizer.json of the package's own making, and the tokenizer in it, special tokens being text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizer and getattr(tokenizers.normalizers, normalizer)()
    split = pre.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated")
    made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 3 + HARD_TEXTS, trainer)
    made.add_special_tokens(["<s>", "</s>", *specials])
    made.add_tokens([*added])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    made.encode_special_tokens = True
    return made


def imported(folder):
    return convert_tokenizer.from_folder(folder, {"vocab_size": 700, "model_type": "llama"})


KINDS = {
    "inside words": [token("oqz"), token("zoqz"), token("\u00e9q", normalized=True)],
    "single words": [
        token("toolz", single_word=True),
        token("<t>", single_word=True),
        token("\u0151", single_word=True),
    ],
    "normalised single words": [
        token("caf\u00e9", normalized=True, single_word=True),
        token("toolz", single_word=True),
    ],
    "prefixes": [token("<think"), token("<think>"), token("<thinker>"), token("<th", normalized=True)],
    "one is a word, its prefix is not": [
        token("toolz", single_word=True),
        token("tooq"),
        token("toq", lstrip=True),
    ],
    "white space before": [token("<l>", lstrip=True), token("<m>", lstrip=True, normalized=True)],
    "white space after": [token("<r>", rstrip=True), token("<q>", rstrip=True, normalized=True), token("  ")],
    "all flags": [token("<x>", lstrip=True, rstrip=True, single_word=True), token("\n\n"), token("x_1")],
    "beside special ones": [token("<|im"), token("end|>", rstrip=True), token("|>")],
}
SPECIALS = [
    token("<|im_start|>", special=True),
    token("<|assistant|>", special=True, rstrip=True),
    token("<|mask|>", special=True, lstrip=True),
    token("<|NORM é|>", special=True, normalized=True),
    token("<|word|>", special=True, single_word=True),
]  # fmt: skip
PIECES = ["tool", "toolz", "oqz", "zoqz", "tooq", "toq", "caf\u00e9", "cafe\u0301", "\u00e9q", "e\u0301q", "\u0151", "o\u030b", "<t>", "<th", "<think", "<think>",
          "<thinker>", "<l>", "<m>", "<r>", "<q>", "<x>", "x_1", "_", "1", "\u0301", "你", "\u200d", "-", " ", "  ", "\n\n", "\t",
          "\u00a0", "\u2003", "\x1c", "\x85", "the film", "<|im_start|>", "<|im", "end|>", "|>", "<|assistant|>", "<|mask|>",
          "<|NORM é|>", "<|word|>", "<s>", "</s>"]  # fmt: skip
JUMBLES = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """(the package's tokenizer, ours of the same file, its folder)"""
    folder = tmp_path_factory.mktemp("added") / "hf"
    theirs = folder_with(folder, KINDS[request.param], SPECIALS)
    return theirs, imported(folder), folder


def test_ids_of_texts_are_those_of_the_package(both, tmp_path):
    theirs, ours, _ = both
    assert len(ours.added) == len([i for i in theirs.get_added_tokens_decoder().values() if not i.special])
    ours.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.flags) == (ours.hash, ours.flags)

    @settings(max_examples=400, deadline=None)
    @given(JUMBLES)
    def compare(text):
        ids = theirs.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
        assert ours.encode(text) == ids == loaded.encode(text)

    compare()
    for a in PIECES:
        for b in PIECES:
            for text in (a + b, f"a{b}{a}", f"{a} {b} ", f"{a}  {b}\n{a}"):
                assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_ids_are_decoded_as_the_package_decodes_them(both):
    theirs, ours, _ = both
    ids = st.lists(
        st.integers(0, ours.vocab_size - 1) | st.sampled_from([*ours.specials.values()]), max_size=9
    )
    quirks = {i for name, i in ours.specials.items() if not name.isascii()}  # it takes an é for a byte

    @settings(max_examples=300, deadline=None)
    @given(ids, st.booleans())
    def compare(ids, skip):
        ids = [i for i in ids if i not in quirks]
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    compare()
    for name, i in ours.specials.items():
        assert ours.decode([i], skip_special_tokens=False) == name
        assert ours.decode([i]) == (name if name in ours.added else "")


def test_what_goes_out_has_the_same_added_tokens(both, tmp_path):
    theirs, ours, folder = both
    convert_tokenizer.write(ours, tmp_path, 64)
    again = imported(tmp_path)
    assert (again.hash, again.flags, again.added) == (ours.hash, ours.flags, ours.added)
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert back.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()
    spoken, before = (transformers.AutoTokenizer.from_pretrained(f) for f in (tmp_path, folder))

    @settings(max_examples=200, deadline=None)
    @given(JUMBLES.map(lambda text: text.encode("utf-8", "replace").decode()))
    def compare(text):  # now special tokens count, too
        assert spoken(text)["input_ids"] == before(text)["input_ids"]

    compare()


TEMPLATE = "{% for m in messages %}{{ '<|assistant|>\n' + m.role + '  <|mask|>' + m.content + ' <|im_start|>' }}{% endfor %}"


@pytest.mark.parametrize("kind", ["white space after", "beside special ones"])
def test_a_template_that_writes_flagged_tokens(kind, tmp_path):
    """Phi-3's <|assistant|> takes the line break after it."""
    folder_with(tmp_path / "hf", KINDS[kind], SPECIALS)
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), imported(tmp_path / "hf")
    for contents in (["the film", " tool "], ["\n  x", ""], ["<r>  <r>", "<|im <q>\n"]):
        messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
        wanted = theirs.apply_chat_template(messages, return_dict=False)
        assert chat_template.encode(ours, messages, answer=False) == wanted


def test_white_space_and_words_are_those_of_the_package(tmp_path):
    """Every character that has been one for some years: to the newest ones Rust and Python come at different times."""
    added = [token("<l>", lstrip=True), token("<w>", single_word=True)]
    theirs = folder_with(tmp_path / "hf", added, normalizer=None)
    ours = imported(tmp_path / "hf")
    strip, word = (ours.specials[name] for name in ("<l>", "<w>"))
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    wrong = []
    for start in range(0, len(characters), 2000):
        some = characters[start : start + 2000]
        for encoded, c in zip(
            theirs.encode_batch([f"{c}<l>" for c in some], add_special_tokens=False), some, strict=True
        ):
            wrong += [c] if (encoded.ids == [strip]) != bool(SPACES.fullmatch(c)) else []
        for encoded, c in zip(
            theirs.encode_batch([f"{c}<w>" for c in some], add_special_tokens=False), some, strict=True
        ):
            wrong += [c] if (word in encoded.ids) == bool(WORD.match(c)) else []
    assert not wrong, [hex(ord(c)) for c in wrong[:50]]


@pytest.mark.parametrize("damage", ["flags", "special"])
def test_the_check_before_an_import_sees_a_difference(damage, tmp_path, monkeypatch):
    """Were flags or special tokens taken otherwise than by the package, the import would be refused."""
    folder_with(tmp_path / "hf", [token("tool", single_word=True)], [token("<|a|>", special=True)])
    if damage == "flags":
        monkeypatch.setattr(convert_tokenizer, "_flags", lambda tokens, added: {})
        message = "the ids of .*tool.* are .*not supported"
    else:
        monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, skip=True: self.encoding.decode(ids))
        message = "the text of ids .*not supported"
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "hf")
