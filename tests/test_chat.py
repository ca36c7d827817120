"""Talking to checkpoints: layouts, what is forgotten, what is explained."""

import io
import json

import pytest
import torch

from minirlhf import UserError, checkpoint, data
from minirlhf.model import GPT, GPTConfig
from minirlhf.rewards import RewardReader
from minirlhf.rollout import response_logprobs
from minirlhf.support.bpe import BYTES
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import chat
from tests.by_hand import unlisted

CHATML = """{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
START, END = 257, 258
SPECIALS = {"<|endoftext|>": 256, "<|im_start|>": START, "<|im_end|>": END}


def tokenizer_of(template: str | None = CHATML) -> Tokenizer:
    hf = {"chat_template": template} if template else {}
    return Tokenizer(
        {byte: i for i, byte in enumerate(BYTES)}, specials=SPECIALS, eot=END, bos=START, pad=256, hf=hf
    )


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def saved(folder, tokenizer: Tokenizer, stage: str = "import", context: int = 96, **training):
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, context, 1, 2, 8))
    about = {
        "model": vars(model.config),
        "stage": stage,
        "training": training,
        "tokenizer": {"hash": tokenizer.hash},
    }
    checkpoint.save(folder, 0, model.state_dict(), about, tokenizer)
    return folder


@pytest.fixture
def talk(run, monkeypatch, capsys):
    """talk(lines, arguments ...) -> (exit status, stdout, stderr) of the command with these lines as its standard input."""

    def call(lines: str | bytes, *arguments) -> tuple[int, str, str]:
        raw = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        status = run("minirlhf.chat", *arguments)
        return status, *capsys.readouterr()

    return call


def test_a_dialogue_is_laid_out_as_the_stages_were_trained(tmp_path):
    messages = [
        {"role": "system", "content": "Be"},
        user("Hi"),
        {"role": "assistant", "content": "Yes"},
        user("So?"),
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": messages}))
    found = data.load(str(tmp_path / "d.jsonl"))
    tokenizer = tokenizer_of()
    wanted = data.encode_prompts(tokenizer, found.records, 4, 1000)
    assert [chat.prompt_ids(tokenizer, "dialogue", messages)] == wanted
    assert chat.prompt_ids(tokenizer, "text", messages) == [START, *b"So?"]


@pytest.mark.parametrize("layout", ["dialogue", "template"])
def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not(tmp_path, layout):
    speaker = chat.Speaker(saved(tmp_path, tokenizer_of(), context=128), layout, "S", 6)
    for k in range(9):
        texts, _ = speaker.answer(f"question {k}")
        assert texts.tokens.shape[1] <= 128 and texts.prompts.shape[1] <= 122 and texts.mask.all()
    said = [m["content"] for m in speaker.messages]
    assert (
        said[0] == "S"
        and said[-2] == "question 8"
        and "question 0" not in said
        and said[1].startswith("question")
    )
    before = list(speaker.messages[-2:])
    with pytest.raises(UserError, match="do not fit the context of 128"):
        speaker.answer("x" * 200)
    assert speaker.messages[-2:] == before or speaker.messages == speaker.opening


def test_several_models_answer_and_say_why(smoke, talk):
    sft, ppo = smoke / "sft", smoke / "ppo"
    arguments = (
        sft,
        ppo,
        "--response-tokens",
        8,
        "--explain",
        "--reference",
        sft,
        "--reward-model",
        smoke / "rm",
    )
    status, out, _ = talk("the film\n\nthe film\n", *arguments)
    assert status == 0 and out.count("[score ") == 4 and out.count("likeliest others") == 4
    assert talk("the film\n\nthe film\n", *arguments)[1] == out, "the same seed, the same words"


def test_what_is_explained_adds_up(smoke):
    speaker = chat.Speaker(smoke / "ppo", response_tokens=8, temperature=0.7)
    assert speaker.layout == "text"
    reference, reader = checkpoint.load_gpt(smoke / "sft").eval(), RewardReader.load(smoke / "rm", "")
    judge = reader.model.eval()
    texts, _ = speaker.answer("the")
    columns, probabilities = chat.explain(speaker, texts, reference, reader)
    begun, written = texts.prompts.shape[1], texts.responses[0].tolist()
    with torch.no_grad():
        ours, theirs = (
            response_logprobs(m, texts, speaker.sampling)[0].sum() for m in (speaker.model, reference)
        )
        start, end = (judge(texts.tokens[:, :n], texts.mask[:, :n])[0][0] for n in (begun, None))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    close(columns["probability"].log().sum(), ours)
    close(columns["nats"].sum(), ours - theirs)
    close(columns["score"].sum(), end - start)
    close(probabilities.sum(1), torch.ones(len(written)))
    itself, _ = chat.explain(speaker, texts, speaker.model, None)
    assert (itself["nats"] == 0).all()
    lines = chat.explanation(speaker.tokenizer, written, columns, probabilities).splitlines()
    assert len(lines) == 1 + len(written) and all(
        repr(speaker.tokenizer.token_str(i)) in line for i, line in zip(written, lines[1:], strict=True)
    )


def test_control_characters_reach_no_terminal(tmp_path, talk):
    _, out, _ = talk("\x1b[31mred\n", saved(tmp_path, tokenizer_of(None)), "--response-tokens", 5)
    assert "\x1b" not in out and "\\x1b[31mred" in out


def test_a_line_that_is_not_utf8_is_read_all_the_same(tmp_path, talk):
    status, out, _ = talk(b"a\xffb\nc\n", saved(tmp_path, tokenizer_of(None)), "--response-tokens", 5)
    assert status == 0 and "> a\ufffdb" in out and "> c" in out


def test_a_text_too_long_for_the_reward_model_is_cut_and_that_is_said(tmp_path, smoke, talk):
    context = checkpoint.load_config(smoke / "rm")["model"]["context"]
    speaker = saved(tmp_path, tokenizer_of(), context=4 * context)
    arguments = (speaker, "--response-tokens", 2, "--reward-model", smoke / "rm")
    status, out, _ = talk("~" * 2 * context + "\nx\n", "--layout", "text", *arguments)
    assert status == 0 and out.count(f"of its first {context} tokens] ") == 1 and out.count("[score") == 2


def test_a_line_that_does_not_fit_loses_nothing_else(tmp_path, talk):
    status, out, _ = talk(
        f"{'x' * 100}\nyes\n", saved(tmp_path, tokenizer_of()), "--response-tokens", 4, "--layout", "text"
    )
    assert status == 0 and "do not fit the context of 96: write less" in out and "> yes\nyes" in out


NUMBERS = {"--temperature": ["-1", "nan", "inf", "1e99", "1e-20", "x", ""], "--seed": ["-1", "x", "1e3", "1" * 30],
           "--response-tokens": ["0", "-3", "nan", "1e3", "x", "9" * 20]}  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [(o, value) for o in NUMBERS for value in NUMBERS[o]])
def test_F15_a_number_out_of_range_is_one_line_before_anything_is_read(tmp_path, talk, option, value):
    status, out, err = talk("x\n", tmp_path / "nothing here", option + "=" + value)
    assert status == 2 and option in err and err.count("\n") == 1 and err.startswith("error: ") and not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "template"], "no chat template"),
        (["--system", "Be"], "--system needs --layout"),
        (["--explain", "--temperature", 0], "--temperature 0 has none"),
        (["--reference", "x"], "add it, or drop"),
        (["--explain", "--reference", "OTHER"], "its tokenizer is not the speaker's"),
        (["--reward-model", "HERE"], "not a reward model"),
        (["--explian"], "--explian"),
        (["--resp", 3], "--resp"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, talk, arguments, message):
    here = saved(tmp_path / "a", tokenizer_of(None), "sft")
    other = saved(tmp_path / "b", Tokenizer({byte: i for i, byte in enumerate(BYTES)}), "sft")
    arguments = [{"HERE": here, "OTHER": other}.get(x, x) for x in arguments]
    status, out, err = talk("", here, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_F9_a_damaged_config_and_weights_of_nan_are_one_line(tmp_path, talk):
    tokenizer = tokenizer_of()
    folder = saved(tmp_path / "a", tokenizer)
    file = unlisted(checkpoint.resolve(folder) / "config.json")
    config = json.loads(file.read_text())
    for odd in (config | {"training": 5, "stage": []}, {k: v for k, v in config.items() if k != "training"}):
        file.write_text(json.dumps(odd))
        assert talk("x\n", folder, "--response-tokens", 2)[0] == 0
    for odd in [], 5, "x", None, {}:
        file.write_text(json.dumps(config | {"tokenizer": odd}))
        status, _, err = talk("x\n", folder)
        assert status == 2 and "tokenizer does not match" in err and err.count("\n") == 1
    file.write_text(json.dumps(config))
    state = {name: t * float("nan") for name, t in checkpoint.load_state(folder).items()}
    checkpoint.save(tmp_path / "b", 0, state, config, tokenizer)
    status, _, err = talk("x\n", tmp_path / "b")
    assert status == 2 and "nan or infinite" in err and err.count("\n") == 1


def test_ctrl_c_is_one_line(tmp_path, run, monkeypatch, capsys):
    """At the prompt, and while an answer is written."""
    folder = saved(tmp_path, tokenizer_of(None))

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x\n"), "utf-8"))
    monkeypatch.setattr(chat, "generate", stop)
    assert run("minirlhf.chat", folder) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x\n"), "utf-8"))
    monkeypatch.setattr("builtins.input", stop)
    assert run("minirlhf.chat", folder) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_F16_a_template_that_fails_is_said_and_the_next_line_is_read(tmp_path, talk):
    template = "{% if messages[0]['content'] == 'bad' %}{{ 1 / 0 }}{% endif %}{{ messages[0]['content'] }}"
    folder = saved(tmp_path, tokenizer_of(template))
    status, out, err = talk("bad\ngood\n", folder, "--response-tokens", 3)
    assert status == 0 and not err
    assert out.count("chat template: ZeroDivisionError: division by zero") == 1 and "> good" in out


def test_a_reward_model_cannot_talk(smoke, talk):
    status, _, err = talk("", smoke / "rm")
    assert status != 0 and "writes no text" in err
