"""Conversations in eight kinds of chat templates: ids and masks are those of transformers' apply_chat_template."""

import json

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from minirlhf.interop import chat_template, convert_tokenizer  # noqa: E402
from minirlhf.interop.convert_tokenizer import HARD_TEXTS, LLAMA3_PATTERN, QWEN2_PATTERN  # noqa: E402
from minirlhf.tokenizer import GPT2_PATTERN  # noqa: E402
from tests.chat_kinds import CASES, ENDS, KINDS, PAIRS, SPECIALS, beside, bot, every_pair, source, user  # noqa: E402

TEXTS = [
    "system\nuser\nassistant\nmodel\nUSER: What is it?\nASSISTANT: It is the film. Is it good? Why? So.\n\n",
    "[INST] [/INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<|user|>\n<|assistant|>\n<think>\nbecause\n</think>\n\n",
]
PATTERNS = {"gpt2": (GPT2_PATTERN, None), "llama": (LLAMA3_PATTERN, None), "qwen2": (QWEN2_PATTERN, "NFC")}


@pytest.fixture(scope="module", params=PATTERNS)
def loaded(request, tmp_path_factory):
    """kind, marked -> (transformers' tokenizer, ours) of one vocabulary."""
    pattern, normalizer = PATTERNS[request.param]
    made, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    made.normalizer = getattr(tokenizers.normalizers, normalizer)() if normalizer else None
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3 + HARD_TEXTS, trainer)
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    folder = tmp_path_factory.mktemp("hf")
    made.save(str(folder / "tokenizer.json"))
    found = {}

    def load(kind, marked):
        if (kind, marked) not in found:
            eos = "</s>" if ENDS.get(kind, "</s>") == "</s>" else "<|endoftext|>"
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source(kind, marked)}
            about |= {"bos_token": "<s>", "eos_token": eos, "pad_token": "<|endoftext|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(about))
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            ours = convert_tokenizer.from_folder(folder, {"vocab_size": 700, "model_type": "llama"})
            found[kind, marked] = theirs, ours
        return found[kind, marked]

    return load


def all_turns(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def compare(load, kind, messages, tools):
    """Our ids and masks, by marks and by prefixes, against theirs."""
    theirs, ours = load(kind, True)
    _, unmarked = load(kind, False)
    given = tools.get("tools")
    text = theirs.apply_chat_template(messages, tools=given, tokenize=False)
    assert chat_template.render(ours, messages, False, tools) == text
    assert chat_template.render(unmarked, messages, False, tools) == text
    wanted = theirs.apply_chat_template(
        messages, tools=given, return_dict=True, return_assistant_tokens_mask=True
    )
    for each in (ours, unmarked):
        ids, said = chat_template.encode_turns(each, messages, all_turns(messages), tools)
        assert ids == wanted["input_ids"] == chat_template.encode(each, messages, False, tools)
        assert [int(number >= 0) for number in said] == wanted["assistant_masks"], each is ours
        assert [n for n in dict.fromkeys(said) if n >= 0] == all_turns(messages)
    begun = messages[: all_turns(messages)[-1]]
    prompt = theirs.apply_chat_template(begun, tools=given, add_generation_prompt=True, return_dict=False)
    assert chat_template.encode(ours, begun, True, tools) == prompt


@every_pair
def test_ids_and_masks_are_those_of_apply_chat_template(loaded, kind, case):
    compare(loaded, kind, CASES[case], beside(case))


CONTENTS = st.lists(
    st.text("Wht is?\n \t.'é你1e\u0301", max_size=8)
    | st.sampled_from(
        ["What is it?", " it", "\nfilm\n", "isn't", "<think>a</think>b", "</think>", "[/INST]", "<", "|>"]
    ),
    min_size=2,
    max_size=7,
).map(lambda texts: texts[: len(texts) // 2 * 2])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_of_any_contents(loaded, kind):
    @settings(max_examples=40, deadline=None)
    @given(CONTENTS)
    def any_contents(texts):
        compare(loaded, kind, [(user, bot)[i % 2](text) for i, text in enumerate(texts)], {})

    any_contents()


@every_pair
@pytest.mark.parametrize("special", ["</s>", "<|im_end|>", "<start_of_turn>"])
def test_what_a_message_spells_out_is_all_that_differs(loaded, kind, case, special):
    """The ids are theirs, with plain characters in place of the special tokens of a message."""
    theirs, ours = loaded(kind, False)
    stand_in = "\u2603" * len(special)  # of the same length; no token joins it with its neighbours

    def spell(value, text):
        if isinstance(value, str):
            return value.replace("film", f"({text})")
        if isinstance(value, dict):
            return {k: v if k in ("role", "type", "name") else spell(v, text) for k, v in value.items()}
        return [spell(entry, text) for entry in value] if isinstance(value, list) else value

    messages, plain = spell(CASES[case], special), spell(CASES[case], stand_in)
    ids, said = chat_template.encode_turns(ours, messages, all_turns(messages), beside(case))
    wanted = theirs.apply_chat_template(plain, **beside(case), return_dict=False)
    kept = lambda ids: [i for i in ids if i in ours.specials.values()]
    assert kept(ids) == kept(wanted)
    text = ours.encoding.decode(ids)
    again = theirs.apply_chat_template(plain, **beside(case), tokenize=False)
    assert text.replace(f"({special})", f"({stand_in})") == ours.encoding.decode(wanted) or ours.normalize
    assert text.count(f"({special})") == again.count(f"({stand_in})")
    assert {n for n in said if n >= 0} == set(all_turns(messages))


def test_every_kind_has_every_case_that_it_knows():
    assert len(KINDS) == 8 and len(PAIRS) > 60
