"""Chat templates of the kinds that models bring, and conversations, for the tests of their layout.

«g» and «/g» stand where {% generation %} and {% endgeneration %} go, or nothing: `source` puts in one or the other.
"""

import pytest

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin|>", "<|start_header|>",
            "<|end_header|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
KINDS = {
    "chatml": """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}«g»{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{- '\\n<call>' + call.function.name + ' ' }}{{- call.function.arguments | tojson }}{{- '</call>' }}{%- endfor %}
{{- '<|im_end|>' }}«/g»{{- '\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<response>' + m.content + '</response><|im_end|>\\n' }}
{%- elif not (loop.first and tools and m.role == 'system') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "headers": """{{- '<|begin|>' }}
{%- macro head(role) %}{{- '<|start_header|>' + role + '<|end_header|>\\n\\n' }}{%- endmacro %}
{%- if tools is not none and tools is defined %}{{- head('system') + 'Date: ' + strftime_now('%C') + '\\n' + tools | tojson(indent=1) + '<|eot|>' }}{%- endif %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' and m.tool_calls %}
{{- head('assistant') }}«g»{{- m.tool_calls[0].function | tojson + '<|eot|>' }}«/g»
{%- elif m['role'] == 'assistant' %}
{{- head('assistant') }}«g»{{- m['content'] | trim + '<|eot|>' }}«/g»
{%- else %}
{{- head('ipython' if m['role'] == 'tool' else m['role']) + m['content'] | trim + '<|eot|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}""",
    "zephyr": """{% for m in messages %}
{% if m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}«g»{{ m['content'] + eos_token }}«/g»{{ '\\n' }}
{% else %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "inst": """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}«g»{{ m['content'] + eos_token }}«/g»{% endif %}
{% endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\\n' }}{% if role == 'model' %}«g»{{ m['content'] | trim + '<end_of_turn>' }}«/g»{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "words": """{% for m in messages %}
{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}
{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}
{% else %}{{ 'ASSISTANT:' }}«g»{{ ' ' + m['content'] + eos_token }}«/g»{{ '\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    "thoughts": """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}
{%- set content, thought = m.content, m.reasoning_content or '' %}
{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}«g»
{%- if loop.index0 > ns.last and (thought | length) > 0 %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- content + '<|im_end|>' }}«/g»{{- '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "folded": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{% for m in turns %}
{% if m['role'] == 'user' and turns[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ '[INST] ' + system + m['content'] | trim + ' [/INST]' -}}
{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' -}}
{% else %}«g»{{ ' ' + m['content'] | trim + eos_token }}«/g»{% endif %}
{% endfor %}""",
}  # fmt: skip
ENDS = {
    "chatml": "<|im_end|>",
    "headers": "<|eot|>",
    "gemma": "<end_of_turn>",
    "thoughts": "<|im_end|>",
}  # or </s>

user = lambda text: {"role": "user", "content": text}
bot = lambda text, **more: {"role": "assistant", "content": text, **more}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the film", "n": 2}}}
CASES = {
    "single": [user("What is it?"), bot("It is the film.")],
    "several": [user("What is it?"), bot("The film."), user("Is it good?"), bot("It is."), user("Why?"), bot("So.")],
    "system": [SYSTEM, user("What is it?"), bot("The film."), user(" Why? "), bot("\nSo.\n")],
    "unicode": [user("Qu'est-ce que c'est, 你好? é e\u0301"), bot("C'est 你好 🙂 — naïve e\u0301.")],
    "spaces": [user("  a\n\nb \t"), bot("\n\n  c  \n d\n"), user(""), bot(" ")],
    "thoughts": [user("a"), bot("<think>\nbecause\n</think>\n\nThe film."), user("b"), bot("<think>\nso\n</think>\n\nIt is.")],
    "reasons": [user("a"), bot("The film.", reasoning_content="because"), user("b"), bot("It is.", reasoning="so")],
    "names": [user("a") | {"name": "Ann", "weight": None}, bot("b", name=None)],
    "tools": [user("What is it?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
              {"role": "tool", "name": "look", "content": "a film"}, bot("A film."), user("So?"), bot("So.")],
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}},
    }
]
REFUSED = {("inst", "system"), ("gemma", "system")} | {(kind, "tools") for kind in KINDS} - {
    ("chatml", "tools"),
    ("headers", "tools"),
}
PAIRS = [(kind, case) for kind in KINDS for case in CASES if (kind, case) not in REFUSED]


def source(kind: str, marked: bool = False) -> str:
    tags = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return KINDS[kind].replace("«g»", tags[0]).replace("«/g»", tags[1])


def beside(case: str) -> dict:
    return {"tools": TOOLS} if case == "tools" else {}


every_pair = pytest.mark.parametrize("kind, case", PAIRS)
