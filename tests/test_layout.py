"""Conversations in a model's own layout: which ids, which of them are learnt, in every stage."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError, checkpoint, data
from minirlhf.interop import chat_template, convert
from minirlhf.model import GPT, GPTConfig
from minirlhf.rollout import Sampling, Texts, forbid, generate
from minirlhf.support import layout as layouts
from minirlhf.support import retokenize
from minirlhf.support.bpe import BYTES
from minirlhf.support.conversation import Conversation
from minirlhf.support.layout import set_layout
from minirlhf.tokenizer import Tokenizer
from tests.by_hand import unlisted
from tests.chat_kinds import CASES, ENDS, KINDS, SPECIALS, SYSTEM, TOOLS, bot, source, user

HI = user("What is it?")
WORDS = ["What is it? It is the film. \n\nSo ASSISTANT: USER: [INST] [/INST]"] * 3
R1 = """{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|start_header|>' + m.content }}
{%- elif m.role == 'assistant' %}{{- '<|end_header|>' + m.content.split('</think>')[-1] + '<|eot|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|end_header|><think>\\n' }}{%- endif %}"""


def tokenizer_of(
    template: str | None, layout: str = "auto", end: str = "</s>", eos="</s>", bos="<s>", ranks=None, **more
):
    ranks = ranks or {byte: i for i, byte in enumerate(BYTES)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    hf = {"chat_template": template, "ends": [specials[end]]} if template else {}
    found = Tokenizer(
        ranks,
        specials=specials,
        eot=specials[eos],
        bos=specials[bos],
        pad=specials[SPECIALS[0]],
        hf=hf,
        **more,
    )
    set_layout(found, layout)
    return found


def of_kind(kind: str, marked: bool = False, words: bool = True) -> Tokenizer:
    ranks = Tokenizer.train(WORDS, 300).ranks if words else None
    return tokenizer_of(source(kind, marked), "template", ENDS.get(kind, "</s>"), ranks=ranks)


CHATML = of_kind("chatml", words=False)
TRANSCRIPTS = tokenizer_of(None)


def spelled(tokenizer: Tokenizer, ids: list[int], learnt: list) -> str:
    """The text of ids, with ⟦ and ⟧ around what is learnt."""
    text, inside = "", False
    for token, now in zip([*ids, None], [*learnt, False], strict=True):
        text += "⟦" * (now and not inside) + "⟧" * (inside and not now)
        text, inside = text + (tokenizer.encoding.decode([token]) if token is not None else ""), now
    return text


def rows(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load(path).records


def learnt(tokenizer, tmp_path, *given, learn="auto", **more) -> list[str]:
    examples = data.encode_examples(tokenizer, rows(tmp_path, *given), 999, learn=learn, **more)
    return [spelled(tokenizer, ids, mask) for ids, mask in examples]


# ---------------------------------------------------------------- the eight kinds, without another library

TALK = [user("What is it?"), bot("The film."), user(" Why? "), bot("So.")]
GOLDEN = {
    "chatml": "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦The film.<|im_end|>⟧\n"
    "<|im_start|>user\n Why? <|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n",
    "headers": "<|begin|><|start_header|>user<|end_header|>\n\nWhat is it?<|eot|>"
    "<|start_header|>assistant<|end_header|>\n\n⟦The film.<|eot|>⟧<|start_header|>user<|end_header|>\n\nWhy?<|eot|>"
    "<|start_header|>assistant<|end_header|>\n\n⟦So.<|eot|>⟧",
    "zephyr": "<|user|>\nWhat is it?</s>\n\n<|assistant|>\n⟦The film.</s>⟧\n\n<|user|>\n Why? </s>\n\n"
    "<|assistant|>\n⟦So.</s>⟧\n\n",
    "inst": "<s>[INST] What is it? [/INST]⟦The film.</s>⟧[INST]  Why?  [/INST]⟦So.</s>⟧",
    "gemma": "<s><start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n⟦The film.<end_of_turn>⟧\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n⟦So.<end_of_turn>⟧\n",
    "words": "USER: What is it?\nASSISTANT:⟦ The film.</s>⟧\nUSER:  Why? \nASSISTANT:⟦ So.</s>⟧\n",
    "thoughts": "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦The film.<|im_end|>⟧\n"
    "<|im_start|>user\n Why? <|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n",
    "folded": "<s>[INST] What is it? [/INST]⟦ The film.</s>⟧[INST] Why? [/INST]⟦ So.</s>⟧",
}
MORE = {  # kind, case: the text
    ("chatml", "tools"): "<|im_start|>system\n# Tools\n" + json.dumps(TOOLS[0]) + "<|im_end|>\n"
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦\n<call>look "
    '{"at": "the film", "n": 2}</call><|im_end|>⟧\n<|im_start|>user\n<response>a film</response><|im_end|>\n'
    "<|im_start|>assistant\n⟦A film.<|im_end|>⟧\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n",
    ("folded", "system"): "<s>[INST] What is it? [/INST]⟦ The film.</s>⟧[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? "
    "[/INST]⟦ So.</s>⟧",
    ("thoughts", "thoughts"): "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦The film.<|im_end|>⟧\n"
    "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nIt is.<|im_end|>⟧\n",
    ("thoughts", "reasons"): "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦The film.<|im_end|>⟧\n"
    "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nIt is.<|im_end|>⟧\n",
}  # fmt: skip
GOLDENS = [(kind, TALK, text, {}) for kind, text in GOLDEN.items()]
GOLDENS += [
    (k, CASES[case], text, {"tools": TOOLS} if case == "tools" else {}) for (k, case), text in MORE.items()
]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind, messages, text, beside", GOLDENS)
def test_a_template_s_text_and_what_is_the_assistant_s(kind, messages, text, beside, marked):
    tokenizer = of_kind(kind, marked)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids, said = chat_template.encode_turns(tokenizer, messages, turns, beside)
    assert spelled(tokenizer, ids, [number >= 0 for number in said]) == text
    assert list(dict.fromkeys(n for n in said if n >= 0)) == turns
    last, _ = chat_template.encode_turns(tokenizer, messages, turns[-1:], beside)
    assert last == ids
    opened = chat_template.encode(tokenizer, messages[: turns[-1]], True, beside)
    assert tokenizer.encoding.decode(opened) == text.rpartition("⟦")[0].replace("⟦", "").replace("⟧", "")


def test_all_kinds_are_pinned():
    assert {kind for kind, *_ in GOLDENS} == {*KINDS} and len(KINDS) == 8


def test_marks_that_leave_out_the_end_are_obeyed_and_the_text_still_has_it():
    """The end of turn is then not learnt, as the template's author wrote it, but a judged text ends with it."""
    bare = "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = tokenizer_of(
        bare + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}", "template", "<|im_end|>"
    )
    laid = layouts.lay_out(tokenizer, Conversation("p", [HI]), Conversation("t", [bot("So.")]))
    assert (
        spelled(tokenizer, laid.ids, laid.learnt)
        == "<|im_start|>What is it?<|im_end|>\n<|im_start|>⟦So.⟧<|im_end|>"
    )


def test_several_marks_in_a_turn_and_none():
    parts = (
        "{% for m in messages %}{{ '<s>' if m.role == 'user' else '<|eot|>' }}{% if m.role == 'assistant' %}"
    )
    parts += "{% for p in m.content.split('|') %}{% generation %}{{ p }}{% endgeneration %}-{% endfor %}{% else %}{{ m.content }}{% endif %}"
    tokenizer = tokenizer_of(
        parts + "{% endfor %}{% if add_generation_prompt %}<|eot|>{% endif %}", "template", "</s>"
    )
    messages = [user("u"), bot("a|b"), user("v"), bot(""), user("w"), bot("c")]
    ids, said = chat_template.encode_turns(tokenizer, messages, [1, 5])
    assert spelled(tokenizer, ids, [n >= 0 for n in said]) == "<s>u<|eot|>⟦a⟧-⟦b⟧-<s>v<|eot|>-<s>w<|eot|>⟦c⟧-"
    assert [n for n in said if n >= 0] == [1, 1, 5]


def test_a_turn_that_is_opened_with_thoughts_and_written_without_them():
    """R1's kind: what opens a turn is no prefix of what is written; the place of the content is found all the same."""
    tokenizer = tokenizer_of(R1, "template", "<|eot|>")
    messages = [user("a"), bot("<think>x</think>b"), user("c"), bot("d")]
    prompt, text = Conversation("p", messages[:3], learnt=True), Conversation("t", messages[3:])
    laid = layouts.lay_out(tokenizer, prompt, text, "last")
    assert (
        spelled(tokenizer, laid.ids, laid.learnt)
        == "<|start_header|>a<|end_header|>b<|eot|><|start_header|>c<|end_header|>⟦d<|eot|>⟧"
    )
    assert tokenizer.encoding.decode(laid.ids[: laid.n_prompt]).endswith("c<|end_header|>")
    both = layouts.lay_out(tokenizer, prompt, text, "all")
    assert (
        both.ids == laid.ids
        and spelled(tokenizer, both.ids, both.learnt).count("⟦b<|eot|>⟧<|start_header|>c") == 1
    )
    counting = tokenizer_of("{{ messages[1].content | length }}" + R1, "template", "<|eot|>")
    with pytest.raises(UserError, match="where it begins message 2 cannot be told"):
        layouts.lay_out(counting, prompt, text, "all")


def test_a_template_without_an_end_of_turn_learns_what_it_writes():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.role[:1] + ':' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
        "template",
    )
    ids, said = chat_template.encode_turns(tokenizer, TALK, [1, 3])
    assert (
        spelled(tokenizer, ids, [n >= 0 for n in said]) == "u:What is it?\na:⟦The film.\n⟧u: Why? \na:⟦So.\n⟧"
    )


SPECIAL = "<|im_end|>"


@pytest.mark.parametrize("kind", ["chatml", "headers"])
@pytest.mark.parametrize("where", ["content", "call", "key", "name", "tool", "answer"])
def test_content_in_any_field_is_text(kind, where):
    end = ENDS[kind]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    tools = json.loads(json.dumps(TOOLS))
    messages = [
        user("u"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "t"},
        bot("b"),
    ]
    plain = chat_template.encode(of_kind(kind, words=False), messages, True, {"tools": tools})
    if where == "content":
        messages[0]["content"] = f"u{end}{SPECIAL}"
    elif where == "call":
        call["function"]["arguments"]["at"] = end
    elif where == "key":
        call["function"]["arguments"] = {end: 1}
    elif where == "name":
        call["function"]["name"] = end
    elif where == "tool":
        tools[0]["function"]["description"] = end
    else:
        messages[3]["content"] = f"{end}<s>"
    tokenizer = of_kind(kind, words=False)
    ids = chat_template.encode(tokenizer, messages, True, {"tools": tools})
    special = lambda ids: [i for i in ids if i in tokenizer.specials.values()]
    assert special(ids) == special(plain)
    text = chat_template.render(tokenizer, messages, True, {"tools": tools})
    assert tokenizer.encoding.decode(ids) == text
    assert text.count(end) > [*plain].count(tokenizer.specials[end]) == [*ids].count(tokenizer.specials[end])


def test_special_names_of_more_than_ascii_and_in_escaped_json():
    tokenizer = tokenizer_of(
        "{{ messages | tojson(ensure_ascii=true) }}{{ messages[0].content }}", "template"
    )
    specials = {"<｜end｜>": 256, "<s>": 257, "</s>": 258}
    tokenizer = Tokenizer(
        tokenizer.ranks, specials=specials, eot=258, bos=257, hf=tokenizer.hf | {"ends": [258]}
    )
    ids = chat_template.encode(tokenizer, [user("a<｜end｜><s><s>")], False)
    assert not {*ids} & {*specials.values()}
    assert tokenizer.decode(ids) == json.dumps([user("a<｜end｜><s><s>")]) + "a<｜end｜><s><s>"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["<", "|", "im_end", ">", "<|im_end|>", "</s>", " ", "a"]), max_size=5).map("".join),
                min_size=2, max_size=5))  # fmt: skip
def test_only_the_template_writes_special_tokens(contents):
    messages = [(user, bot)[i % 2](text) for i, text in enumerate(contents)]
    ids = chat_template.encode(CHATML, messages, False)
    found = [i for i in ids if i in CHATML.specials.values()]
    start, end = CHATML.specials["<|im_start|>"], CHATML.specials["<|im_end|>"]
    assert found == [start, end] * len(messages)
    assert CHATML.encoding.decode(ids) == chat_template.render(CHATML, messages, False)


# ---------------------------------------------------------------- rows of data: what is learnt

LONG = [SYSTEM, user("a"), bot("b"), user("c"), bot("d")]
START = "<|im_start|>{}\n{}<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"


def test_conversations_keep_their_messages_and_are_their_transcripts(tmp_path):
    [row, prompt, pair] = (
        rows(tmp_path, given)[0]
        for given in (
            {"messages": LONG},
            {"prompt": LONG[:2], "documents": [{"text": "x"}], "tools": json.dumps(TOOLS)},
            {"chosen": LONG, "rejected": [*LONG[:4], bot("e")], "tools": TOOLS},
        )
    )
    transcript = "\n\nSystem: Be brief.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert (row.prompt, row.response) == (transcript, " d") == (pair.prompt, pair.chosen)
    assert [*row.prompt.messages] == LONG[:4] == [*pair.prompt.messages] and [*row.response.messages] == LONG[
        4:
    ]
    assert row.prompt.learnt and not pair.prompt.learnt and not prompt.prompt.learnt
    assert (
        pair.rejected == " e"
        and pair.rejected.messages == (bot("e"),)
        and pair.prompt.beside == {"tools": TOOLS}
    )
    assert prompt.prompt.beside == {"tools": TOOLS, "documents": [{"text": "x"}]}
    assert data.split_of(row.prompt) == data.split_of(transcript)


def test_learn_all_and_last_in_a_template(tmp_path):
    begun = START.format("system", "Be brief.") + START.format("user", "a") + OPEN
    everything = begun + "⟦b<|im_end|>⟧\n" + START.format("user", "c") + OPEN + "⟦d<|im_end|>⟧"
    last = begun + "b<|im_end|>\n" + START.format("user", "c") + OPEN + "⟦d<|im_end|>⟧"
    row = {"messages": LONG}
    assert learnt(CHATML, tmp_path, row) == learnt(CHATML, tmp_path, row, learn="all") == [everything]
    assert learnt(CHATML, tmp_path, row, learn="last") == [last]
    split = {"prompt": LONG[:4], "completion": LONG[4:]}
    pair = {"prompt": LONG[:4], "chosen": LONG[4:], "rejected": [bot("e")]}
    assert (
        learnt(CHATML, tmp_path, split, learn="all") == learnt(CHATML, tmp_path, pair, learn="all") == [last]
    )


def test_learn_all_and_last_in_transcripts(tmp_path):
    row, open = {"messages": LONG}, "</s>"
    tokenizer = tokenizer_of(None, bos="</s>")
    last = open + "\n\nSystem: Be brief.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:⟦ d</s>⟧"
    assert learnt(tokenizer, tmp_path, row) == learnt(tokenizer, tmp_path, row, learn="last") == [last]
    assert learnt(tokenizer, tmp_path, row, learn="all") == [last.replace(" b\n", "⟦ b⟧\n")]
    opened = [bot("hello"), user("a"), bot("b")]
    assert learnt(tokenizer, tmp_path, {"messages": opened}, learn="all") == [
        "</s>⟦ hello⟧\n\nHuman: a\n\nAssistant:⟦ b</s>⟧"
    ]


@pytest.mark.parametrize("tokenizer", [CHATML, TRANSCRIPTS], ids=["template", "transcript"])
def test_turns_of_weight_0_are_read_and_not_learnt(tmp_path, tokenizer):
    weighed = lambda *weights: [
        m | ({"weight": w} if w is not None else {}) for m, w in zip(LONG, weights, strict=True)
    ]
    given = [{"messages": weighed(None, None, first, None, last)} for first, last in ((0, 1), (1, 0), (0, 0))]
    for learn in "all", "last":
        ledger = Counter()
        found = learnt(tokenizer, tmp_path, *given, learn=learn, ledger=ledger)
        wanted = [["d"], ["b"]] if learn == "all" else [["d"]]
        pieces = [[p.partition("⟧")[0] for p in text.split("⟦")[1:]] for text in found]
        assert [
            [p.replace("<|im_end|>", "").replace("</s>", "").strip() for p in row] for row in pieces
        ] == wanted
        assert ledger["dropped: nothing to learn"] == 3 - len(wanted)


def test_a_plain_string_is_never_laid_out_and_after_a_conversation_it_is_the_answer(tmp_path):
    [text] = learnt(CHATML, tmp_path, {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b"})
    assert text == "<s>\n\nHuman: a\n\nAssistant:⟦ b</s>⟧"
    [mixed] = learnt(CHATML, tmp_path, {"prompt": [user("a")], "completion": " b"})
    assert mixed == START.format("user", "a") + OPEN + "⟦b<|im_end|>⟧"
    [whole] = learnt(CHATML, tmp_path, {"text": LONG[1:]})
    assert whole.count("⟦") == 2 and whole.endswith("⟦d<|im_end|>⟧")


def test_tool_calls_go_through_a_template_and_no_transcript(tmp_path):
    row = {"messages": CASES["tools"], "tools": TOOLS}
    assert learnt(CHATML, tmp_path, row) == [MORE["chatml", "tools"].removesuffix("\n")]
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: a transcript has no place for tool calls: use a checkpoint"
    ):
        learnt(TRANSCRIPTS, tmp_path, row)
    with pytest.raises(UserError, match=r"rows.jsonl:1: a transcript has no place for the role developer"):
        learnt(TRANSCRIPTS, tmp_path, {"messages": [{"role": "developer", "content": "x"}, *LONG[1:]]})


@pytest.mark.parametrize("kind", ["inst", "gemma"])
def test_roles_that_a_template_refuses_name_the_row(tmp_path, kind):
    given = {"messages": LONG[1:]}, {"messages": LONG}
    for encode in (
        lambda records: data.encode_examples(of_kind(kind), records, 99),
        lambda records: data.encode_prompts(of_kind(kind), records, 4, 99),
        lambda records: data.encode_judged(of_kind(kind), records, 99),
    ):
        with pytest.raises(
            UserError, match=r"rows.jsonl:2: the model's chat template: .*(alternate|not supported)"
        ) as e:
            encode(rows(tmp_path, *given))
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- the context


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(tmp_path):
    talk = [SYSTEM, user("a" * 30), bot("b" * 30), user("c"), bot("d")]
    short = [SYSTEM, user("c"), bot("d")]
    [row], [wanted] = rows(tmp_path, {"messages": talk}), rows(tmp_path, {"messages": short})
    ledger = Counter()
    [found] = data.encode_examples(CHATML, [row], 120, "cut", ledger, "last")
    [whole] = data.encode_examples(CHATML, [wanted], 999, learn="last")
    assert found == whole and ledger == {"used": 1, "cut: the beginning of the prompt": 1}
    ledger = Counter()
    [prompt] = data.encode_prompts(CHATML, [row], 4, 100, "cut", ledger)
    assert layouts.shown_prompt(CHATML, prompt) == "\n\nSystem: Be brief.\n\nHuman: c\n\nAssistant:"
    assert prompt == data.encode_prompts(CHATML, [wanted], 4, 999)[0]
    assert ledger == {"used": 1, "cut: the beginning of the prompt": 1}
    for too_long, message in (
        ("drop", "nothing to learn in 1 row"),
        ("error", "rows.jsonl:1: prompt: 1[0-9]+ tokens"),
    ):
        with pytest.raises(UserError, match=message):
            data.encode_examples(CHATML, [row], 120, too_long, learn="last")
    with pytest.raises(UserError, match="no prompt in 1 row"):
        data.encode_prompts(CHATML, [row], 4, 20, "cut")


def test_of_several_turns_those_that_fit_are_learnt(tmp_path):
    row = {"messages": [user("a"), bot("b"), user("c" * 99), bot("d")]}
    for tokenizer, end in (CHATML, "⟦b<|im_end|>⟧"), (TRANSCRIPTS, "⟦ b⟧"):
        ledger = Counter()
        [(ids, mask)] = data.encode_examples(tokenizer, rows(tmp_path, row), 70, ledger=ledger, learn="all")
        text = spelled(tokenizer, ids, mask)
        assert len(ids) == 70 and text.count("⟦") == 1 and end in text
        assert ledger == {"used": 1, "cut: the end of the text": 1}
        with pytest.raises(UserError, match="nothing to learn"):
            data.encode_examples(tokenizer, rows(tmp_path, row), 70, learn="last")


def test_an_answer_that_is_too_long_is_cut(tmp_path):
    row = {"messages": [user("a"), bot("b"), user("c"), bot("d" * 99)]}
    [(ids, mask)] = data.encode_examples(CHATML, rows(tmp_path, row), 80, "cut", learn="last")
    assert len(ids) == 80 and ids[-1] == CHATML.encode("d")[0] and mask[-1]


# ---------------------------------------------------------------- pairs and prompts


def test_pairs_follow_the_same_prompt_and_end_with_their_turn(tmp_path):
    chosen, rejected = [*LONG[:4], bot("\nd")], [*LONG[:4], bot("e e")]
    [item] = data.encode_judged(CHATML, rows(tmp_path, {"chosen": chosen, "rejected": rejected}), 999)
    prompt = chat_template.encode(CHATML, LONG[:4], True)
    assert item.ids[: item.n_prompt] == prompt == item.ids_b[: item.n_prompt]
    assert CHATML.encoding.decode(item.ids[item.n_prompt :]) == "\nd<|im_end|>"
    assert CHATML.encoding.decode(item.ids_b[item.n_prompt :]) == "e e<|im_end|>"


def test_a_boundary_inside_a_token_moves_to_the_token_before(tmp_path):
    """'\\n' opens the answer, and '\\n\\n' is one token: then the prompt ends before it, for both texts."""
    ranks = {byte: i for i, byte in enumerate(BYTES)} | {b"\n\n": 256}
    tokenizer = tokenizer_of(source("chatml"), "template", "<|im_end|>", ranks=ranks, pattern=r"\s+|\S+")
    pair = {"prompt": [user("a")], "chosen": [bot("\nb")], "rejected": [bot("c")]}
    [item] = data.encode_judged(tokenizer, rows(tmp_path, pair), 999)
    assert item.ids[: item.n_prompt] == item.ids_b[: item.n_prompt]
    assert tokenizer.encoding.decode(item.ids[item.n_prompt :]) == "\n\nb<|im_end|>"
    assert tokenizer.encoding.decode(item.ids_b[item.n_prompt :]) == "\nc<|im_end|>"
    [(ids, mask)] = data.encode_examples(tokenizer, rows(tmp_path, pair), 999)
    assert spelled(tokenizer, ids, mask).endswith("assistant⟦\n\nb<|im_end|>⟧")


def test_ratings_of_a_conversation_in_lower_case():
    from minirlhf.support.judgements import lower

    talk = Conversation("\n\nHuman: A\n\nAssistant:", [user("A")])
    record = data.Response(talk, Conversation(" B", [bot("B")]), 1.0, (1.0,))
    item, low = (data.encode_pair(CHATML, r, 999) for r in (record, lower(record)))
    assert CHATML.encoding.decode(item.ids).endswith("user\nA<|im_end|>\n" + OPEN + "B<|im_end|>")
    assert CHATML.encoding.decode(low.ids).endswith("user\nA<|im_end|>\n" + OPEN + "b<|im_end|>")
    assert lower(record).response == " b"


def test_a_conversation_is_a_text_like_any_other():
    """A reward function gets one as its prompt, and may do with it what strings can: no method is another's."""
    text = "\n\nHuman: An apple\n\nAssistant:"
    talk = Conversation(text, [user("An apple")])
    assert talk.split() == text.split() and talk.split(":", 1) == text.split(":", 1)
    assert talk.lower() == text.lower()
    overridden = set(vars(Conversation)) & set(vars(str)) - {"__new__", "__doc__"}
    assert overridden == {"lower"}


def test_prompts_open_the_assistant_s_turn_and_are_shown_as_turns(tmp_path):
    given = (
        {"prompt": LONG[:4]},
        {"messages": [*LONG[:4], bot("z")]},
        {"chosen": LONG, "rejected": [*LONG[:4], bot("")]},
    )
    for row in given:
        [ids] = data.encode_prompts(CHATML, rows(tmp_path, row), 4, 999)
        assert ids == chat_template.encode(CHATML, LONG[:4], True)
    texts = Texts(
        *data.collate([ids, CHATML.encode("plain")], CHATML.pad, "left"),
        *data.collate([[65], [66]], CHATML.pad),
    )
    prompts, responses = texts.decode(CHATML)
    assert prompts[0].messages == tuple(LONG[:4]) and prompts[0].endswith("\n\nHuman: c\n\nAssistant:")
    assert (prompts[1], responses) == ("plain", ["A", "B"])


def test_a_whole_conversation_without_a_prompt_is_a_prompt_up_to_its_last_answer(tmp_path):
    [ids] = data.encode_prompts(CHATML, rows(tmp_path, {"text": LONG, "rating": 1}), 4, 999)
    assert ids == chat_template.encode(CHATML, LONG[:4], True)
    with pytest.raises(UserError, match="too short to cut a prompt from"):
        data.encode_prompts(CHATML, rows(tmp_path, {"text": [bot("b")], "rating": 1}), 4, 999)


# ---------------------------------------------------------------- several ends


def test_generation_ends_at_any_of_the_ends():
    torch.manual_seed(0)
    model = GPT(GPTConfig(12, 40, 1, 2, 8)).eval()
    prompts = torch.tensor([[1, 2]] * 64)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    seeded = lambda: torch.Generator().manual_seed(1)
    run = lambda eos, **more: generate(model, prompts, mask, Sampling(20, 1.0, eos, 0, **more), seeded())
    one, several = run(3), run((3, 5))
    assert torch.equal(run((3,)).tokens, one.tokens) and torch.equal(run((3,)).mask, one.mask)
    ended = several.ended((3, 5))
    assert ended.sum() > 40 > 20 < several.ended(5).sum() and not torch.equal(ended, several.ended(3))
    for row, real in zip(several.responses, several.response_mask, strict=True):
        ids = row[real].tolist()
        assert not {3, 5} & {*ids[:-1]} and (ids[-1] in (3, 5) or len(ids) == 20)
    never = run((3, 5), forbidden=(3, 5))
    assert never.response_mask.all() and not {3, 5} & {*never.responses.flatten().tolist()}
    logits = torch.randn(2, 12)
    assert (forbid(logits, (3, 5)) == float("-inf")).sum(1).tolist() == [2, 2]
    assert torch.equal(forbid(forbid(logits, 3), 5), forbid(logits, (3, 5)))


def test_ends_are_saved_checked_and_silent(tmp_path):
    tokenizer = tokenizer_of(source("chatml"), "template", "<|im_end|>")
    assert tokenizer.ends == (tokenizer.eot, tokenizer.specials["<|im_end|>"])
    assert tokenizer.decode([65, *tokenizer.ends, 66]) == "AB"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ends == tokenizer.ends and again.hash == tokenizer.hash
    word = Tokenizer(tokenizer.ranks, specials=tokenizer.specials, eot=tokenizer.eot, hf={"ends": [10]})
    assert word.decode([65, 10, 66]) == "A\nB" and word.ends == (
        tokenizer.eot,
        10,
    )  # a word that ends is still shown
    meta = json.loads((tmp_path / "tokenizer.json").read_text())
    for odd in [999], ["x"], 5, [True], [None]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(meta | {"hf": meta["hf"] | {"ends": odd}}))
        with pytest.raises(UserError, match="ends|iterable|hashable"):
            Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- checkpoints


def saved(folder, tokenizer, stage="import", context=160, **about):
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, context, 1, 2, 16, **LLAMA)
    described = checkpoint.describe(stage, config, convert.Import("x"), 1, True, tokenizer) | about
    checkpoint.save(folder, 1, GPT(config).state_dict(), described, tokenizer)
    return folder


LLAMA = {"n_inner": 32, "norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False}


@pytest.mark.parametrize(
    "recorded, found", [("hh-rlhf", "transcript"), (None, "transcript"), ("template", "template")]
)
def test_the_layout_that_config_json_records_is_the_tokenizer_s(tmp_path, recorded, found):
    folder = saved(tmp_path / "a", CHATML, layout=recorded) if recorded else saved(tmp_path / "a", CHATML)
    if recorded is None:
        file = unlisted(folder / "latest" / "config.json")
        config = json.loads(file.read_text())
        assert config.pop("layout") == "template"
        file.write_text(json.dumps(config))
    assert checkpoint.writer(folder)[2].layout.name == checkpoint.tokenizer_of(folder).layout.name == found


@pytest.mark.parametrize("odd", ["chatml", 5, ["template"]])
def test_a_layout_that_is_not_known_is_one_line(tmp_path, odd):
    with pytest.raises(UserError, match="conversations were laid out as .*, which is not known here"):
        checkpoint.writer(saved(tmp_path / "a", CHATML, layout=odd))


def test_a_template_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="brings no chat template"):
        checkpoint.writer(saved(tmp_path / "a", TRANSCRIPTS, layout="template"))


def test_import_takes_all_ends_and_the_template_and_export_writes_them_back(tmp_path, capsys):
    tokenizer = tokenizer_of(source("chatml"), "template", "<|im_end|>")
    convert.export_model(saved(tmp_path / "a", tokenizer, "sft"), tmp_path / "hf", False)
    assert not capsys.readouterr().out
    about = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert about["chat_template"] == source("chatml") and generation["eos_token_id"] == list(tokenizer.ends)
    (tmp_path / "hf" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.specials["<|eot|>"], 9999]})
    )
    convert.import_model(str(tmp_path / "hf"), tmp_path / "b")
    again = checkpoint.writer(tmp_path / "b")[2]
    ends = {tokenizer.eot, tokenizer.specials["<|eot|>"], tokenizer.specials["<|im_end|>"]}
    assert {
        *again.ends
    } == ends and again.layout.name == "template"  # an id that is no token cannot be written
    assert checkpoint.load_config(tmp_path / "b")["layout"] == "template"


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_turn_is_read_off_the_template(kind):
    specials = {name: i for i, name in enumerate(SPECIALS) if name != "<s>"}
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    found = chat_template.end_of_turn(source(kind), specials, named)
    assert found == specials[ENDS.get(kind, "</s>")]
    assert chat_template.end_of_turn("{{ 1 / 0 }}", specials, named) is None


# ---------------------------------------------------------------- one model reads what another wrote


def written(tokenizer, prompt, answer, closed=True):
    ids = data.encode_prompts(tokenizer, [data.Response(prompt, "")], 4, 999)
    response = tokenizer.encode(answer) + [tokenizer.ends[-1]] * closed
    return Texts(*data.collate(ids, tokenizer.pad, "left"), *data.collate([response], tokenizer.pad))


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_each_model_reads_a_conversation_in_its_own_layout(closed, apart):
    prompt = Conversation("\n\nHuman: a\n\nAssistant:", [user("a")])
    gemma = of_kind("gemma")
    plain = tokenizer_of(None, ranks=gemma.ranks)
    text_of = lambda tokenizer: "b c" if tokenizer.layout.name == "template" else " b c"
    for source_, target in (CHATML, gemma), (CHATML, plain), (plain, CHATML), (gemma, plain):
        texts = written(source_, prompt, text_of(source_), closed)
        laid = layouts.lay_out(target, prompt, Conversation(" b c", [bot("b c")]))
        wanted = laid.ids if closed else laid.ids[:-1]
        if apart:
            found, cut = retokenize.apart(texts, source_, target, 999)
            assert found.prompts[0].tolist() == wanted[: laid.n_prompt]
            assert found.responses[0].tolist() == wanted[laid.n_prompt :]
        else:
            tokens, _, cut = retokenize.whole(texts, source_, target, 999)
            assert tokens[0].tolist() == wanted
        assert cut.tolist() == [0]


def test_models_of_one_tokenizer_and_two_layouts_are_refused_for_conversations(tmp_path):
    about = lambda tokenizer, layout: {"tokenizer": {"hash": tokenizer}, "layout": layout}
    conversations = data.load(_file(tmp_path, {"prompt": [user("a")]}))
    plain = data.load(_file(tmp_path, {"prompt": "a"}))
    mixed = {"sft": about(1, "template"), "rm": about(1, "hh-rlhf")}
    with pytest.raises(
        UserError, match="sft lays conversations out by its chat template, rm by transcripts: train"
    ):
        layouts.check_alike(conversations, mixed)
    layouts.check_alike(plain, mixed)
    layouts.check_alike(conversations, mixed | {"rm": about(2, "hh-rlhf")})
    layouts.check_alike(conversations, mixed | {"rm": about(1, "template")})


def _file(tmp_path, *given):
    rows(tmp_path, *given)
    return tmp_path / "rows.jsonl"


def test_content_in_parts_is_their_text(tmp_path):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    plain = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes."}]
    pieces = [{"role": "user", "content": parts}, plain[1]]
    found = []
    for name, messages in (("plain", plain), ("parts", pieces)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"messages": messages}) + "\n")
        record = data.load(file).records[0]
        found.append((record.prompt, record.prompt.messages, record.response))
    assert found[0] == found[1]
    pieces[0]["content"] = [*parts, {"type": "image", "url": "x"}]
    file.write_text(json.dumps({"messages": pieces}) + "\n")
    with pytest.raises(UserError, match=r"parts.jsonl:1: messages: a message has a part of type 'image'"):
        data.load(file)


def test_an_answer_of_which_the_template_writes_nothing_keeps_its_prompt(tmp_path):
    trims = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}a: {% generation %}{{ m.content | trim }}"
        "{% endgeneration %}{%- else %}u: {{ m.content }}{%- endif %}\n{%- endfor %}"
    )
    tokenizer, talk = tokenizer_of(trims, "template"), {"messages": [HI, bot("So."), HI, bot(" ")]}
    (written,) = learnt(tokenizer, tmp_path, talk, learn="all")
    assert written.count("⟦") == 1 and "⟦So.⟧" in written and written.count(HI["content"]) == 2
    with pytest.raises(UserError, match="nothing to learn in 1 row"):
        learnt(tokenizer, tmp_path, talk, learn="last")
