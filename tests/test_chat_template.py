"""Conversations in a model's own chat template: what is encoded together, what is special, what is refused."""

import pytest

from minirlhf import UserError
from minirlhf.interop import chat_template, sandbox
from minirlhf.tokenizer import Tokenizer

TEXTS = [
    "User: What is it? Assistant: It is the film.\n\n### Instruction:\nWhat film is it?\n[INST] What [/INST]"
] * 3
SPECIALS = ["<|end|>", "<|start|>", "<s>"]
CHATML = """{%- for m in messages %}
{{- '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
PLAIN = {
    "User: ": "{% for m in messages %}{{ 'User: ' + m['content'] + '\\n\\n' }}{% endfor %}",
    "### Instruction:": "{% for m in messages %}### Instruction:\n{{ m['content'] }}\n\n{% endfor %}",
    "[INST]": "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}",
}


def tokenizer_of(template, added=None, **hf):
    ranks = Tokenizer.train(TEXTS, 320).ranks
    specials = {name: len(ranks) + i for i, name in enumerate([*SPECIALS, *(added or {})])}
    end, start = specials["<|end|>"], specials["<|start|>"]
    return Tokenizer(
        ranks, specials=specials, eot=end, bos=start, hf={"chat_template": template} | hf, added=added
    )


def user(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("content", ["What is it?", "\nWhat\n", " film", "it's", ""])
def test_H4_text_of_the_template_and_of_the_message_are_encoded_together(name, content):
    tokenizer = tokenizer_of(PLAIN[name], bos_token=None)
    messages = user(content, "It is the film.", "What film")
    text = chat_template.render(tokenizer, messages, answer=True)
    assert content.strip() in text and text.count(name) == 3
    assert chat_template.encode(tokenizer, messages, answer=True) == tokenizer.encode(text)


def test_H4_the_first_word_of_a_message_takes_the_space_before_it():
    tokenizer = tokenizer_of(PLAIN["User: "])
    ids = chat_template.encode(tokenizer, user("What is it?"), answer=True)
    assert [tokenizer.token_str(i) for i in ids][:3] == ["User", ":", " What"]


def test_H4_a_message_with_the_name_of_a_special_token_joins_the_text_around_it_all_the_same():
    """Then the template is filled in twice, to tell its own special tokens from the message's characters."""
    tokenizer = tokenizer_of("<|start|>User: {{ messages[0]['content'] | trim }} [/INST]<|end|>")
    ids = chat_template.encode(tokenizer, user("What<|end|> film \n"), answer=True)
    inside = tokenizer.encode("User: What<|end|> film [/INST]")
    assert ids == [tokenizer.bos, *inside, tokenizer.eot] and tokenizer.eot not in inside


def test_special_tokens_come_from_the_template_alone():
    tokenizer = tokenizer_of(CHATML)
    start, end = tokenizer.bos, tokenizer.eot
    turn = lambda role, text: [start, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]
    found = chat_template.encode(tokenizer, user("a<|end|>", "b<s>", "{{ 1 }}"), answer=True)
    opening = [start, *tokenizer.encode("assistant\n")]
    assert found == [
        *turn("user", "a<|end|>"),
        *turn("assistant", "b<s>"),
        *turn("user", "{{ 1 }}"),
        *opening,
    ]
    without = chat_template.encode(tokenizer, user("a<|end|>", "b<s>", "{{ 1 }}"), answer=False)
    assert without == found[: -len(opening)]


def test_a_special_token_that_the_template_and_a_message_make_together_is_none():
    tokenizer = tokenizer_of("{{ messages[0]['content'] }}|end|>")
    assert tokenizer.eot not in chat_template.encode(tokenizer, user("<s><"), answer=True)


def test_H5_added_tokens_are_recognised_in_messages_and_in_the_template():
    tokenizer = tokenizer_of("<|start|>User: {{ messages[0]['content'] }}<tool>", {"<tool>": False})
    tool = tokenizer.specials["<tool>"]
    found = chat_template.encode(tokenizer, user("What <tool> is <|end|>"), answer=True)
    assert found == [tokenizer.bos, *tokenizer.encode("User: What <tool> is <|end|>"), tool]
    assert found.count(tool) == 2 and tokenizer.eot not in found


def test_what_no_merge_makes_is_no_special_token_of_a_template():
    tokenizer = tokenizer_of("User: {{ messages[0]['content'] }}", unreached=["<s>"])
    assert tokenizer.specials["<s>"] not in chat_template.encode(tokenizer, user("<s>"), answer=True)
    tokenizer = tokenizer_of("<s>", unreached=["<s>"])
    assert chat_template.encode(tokenizer, user("x"), answer=True) == tokenizer.encode("<s>")


def test_what_transformers_gives_to_a_template_is_there():
    template = """{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m | tojson }}{% endgeneration %}
    {% endfor %}{{ strftime_now('%%') }}{{ eos_token }}{{ unk_token is defined }}{{ tools is defined }}"""
    text = chat_template.render(tokenizer_of(template), user("<&>", "b"), answer=True)
    assert text == '{"role": "user", "content": "<&>"}%<|end|>FalseTrue'


FAILS = {
    "{{ raise_exception('no system role') }}": "no system role",
    "{% for %}": "Expected",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ 1/0 }}": "ZeroDivisionError: division by zero",
    "{{ 1 + 'x' }}": "TypeError",
    "{% import 'x' as y %}": "TypeError",
    "{% include 'x' %}": "TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ undefined.x }}": "undefined",
    "{{ messages[0]['content'] | nothing }}": "nothing",
    "{{ '%d' % 'x' }}": "TypeError",
    "{{ [] | first + 1 }}": "",
    "{{ 'x' * 2000000000 }}": "repeats a text",
    "{{ 2000000000 * [1] }}": "repeats a text",
    "{{ (10**100000000) | string | length }}": "computes a number",
    "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}": "writes more than 1,000,000 characters",
    "{{ range(10**9) | list }}": "Range too big",
    "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}": "loops more than",
    "{{ ('x' * 900000) | list | map('upper') | list | length }}": "loops more than",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": "loops more than",
    "{{ messages[0]['content'][:4] }}": "changes a message",
    "{% set x = namespace(x='ab') %}{% for i in range(60) %}{% set x.x = x.x ~ x.x %}{% endfor %}": "makes a text",
    "{% set x = namespace(x='ab') %}{% for i in range(60) %}{% set x.x = [x.x, x.x] | join %}{% endfor %}": "makes a text",
    "{% set x %}aa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}": "makes a text",
    **{
        "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set n.x = "
        + made
        + " %}{% endfor %}"
        "{{ n.x" + read + " }}": "makes a text or a list longer"
        for made in (
            "[n.x, n.x]",
            "(n.x, [n.x])",
            "{'a': n.x, 'b': n.x}",
            "dict(a=n.x, b=n.x)",
            "[[n.x, 1]] * 2",
        )
        for read in (" | string | length", " | tojson", " == n.x")
    },
    "{{ 'a'.center(2000000000) }}": "longer than 1,000,000",
    "{{ 'a' | center(2000000000) }}": "longer than 1,000,000",
    "{{ '{:2000000000}'.format(1) }}": "width",
    "{{ '%2000000000d' % 1 }}": "width",
    "{{ open('/etc/passwd').read() }}": "'open' is undefined",
    "{{ namespace(__class__=1) }}": "underscore",
    "{{ messages[0]['content'] | upper }}": "changes a message",
    "{{ raise_exception('a\\nb\\x1b[31m') }}": "chat template: a",
    "{{ raise_exception('x' * 5000) }}": "xxx",
    "{{ raise_exception(5) }}": "5",
    "{{ 'x' }}" * 30_000: "its source is longer than 200,000 characters",
    "": "writes nothing",
    "{% set x = messages %}": "writes nothing",
}


@pytest.mark.parametrize("template", FAILS)
def test_F16_a_template_that_fails_is_one_line(template, monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 20_000)
    with pytest.raises(UserError, match="^the model's chat template: ") as error:
        chat_template.encode(tokenizer_of(template), user("a<|end|>b"), answer=True)
    message = str(error.value)
    assert FAILS[template] in message
    assert message.isprintable() and len(message) < 300


def test_F16_lists_below_the_bound_are_what_they_are():
    """Brackets are limited by a call around them: it must not show."""
    template = """{%- for key, value in {'a': [1, (2, 'x')], 'b': []}.items() -%}
{{ key }}{{ value }}{{ 'y' in ('x', 'y') }}{{ (1, 2) == (1, 2) }}{{ [3, 4][1:] }}{{ value | tojson }};{%- endfor -%}
{%- set n = namespace(x=1) -%}{%- set l = [n, n] -%}{%- set n.x = 'x' * 900000 -%}{{ l }}"""
    made = "a[1, (2, 'x')]TrueTrue[4][1, [2, \"x\"]];b[]TrueTrue[4][];[<Namespace>, <Namespace>]"
    assert chat_template.render(tokenizer_of(template), user("a"), answer=True) == made


@pytest.mark.parametrize("template", [5, ["x"], {"default": "x"}, True])
def test_F16_a_template_that_is_no_string_is_one_line(template):
    with pytest.raises(UserError, match="chat template: it is not a string"):
        chat_template.encode(tokenizer_of(template), user("a"), answer=True)


def test_F16_a_long_message_is_not_what_the_bound_on_a_template_is_for():
    content = "What film " * 150_000
    tokenizer = tokenizer_of("User: {{ messages[0]['content'] }}")
    assert chat_template.render(tokenizer, user(content), answer=True) == "User: " + content


def test_private_use_characters_in_a_message_are_text():
    tokenizer = tokenizer_of("User: {{ messages[0]['content'] }}")
    content = "\ue0000\ue001 <|end|>"
    assert chat_template.encode(tokenizer, user(content), True) == tokenizer.encode("User: " + content)
