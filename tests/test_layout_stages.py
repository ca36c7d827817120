"""Conversations from import to export: the template's layout in every stage, in chat, feedback and evaluation."""

import json

import pytest

import train_dpo
import train_ppo
import train_sft
from minirlhf import checkpoint, data
from minirlhf.feedback.export import tables
from minirlhf.feedback.store import Store
from minirlhf.interop import chat_template, sandbox
from minirlhf.rewards import RewardReader
from minirlhf.support import pairs as pair_sources
from minirlhf.support.conversation import Conversation
from minirlhf.tools import chat, inspect
from tests.by_hand import unlisted
from tests.chat_kinds import bot, source, user
from tests.test_layout import CHATML, saved, spelled, tokenizer_of

SMALL = ["--preset", "smoke", "--precision", "fp32"]
FILMS = [f"film {i}" for i in range(60)]
SEEN: list = []  # prompts that the reward function was given


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(film):
    return [user(f"Hello, {film}"), bot("Hi."), user(f"Is {film} good?"), bot(f"Yes, {film}!")]


def liked(prompts, responses):
    SEEN.extend(prompts)
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def home(tmp_path_factory, run):
    """A folder with a random Llama in ChatML, and what each stage made of it with conversations."""
    home = tmp_path_factory.mktemp("runs")
    saved(home / "base", CHATML, context=256)
    lines(home / "talks.jsonl", [{"messages": talk(film)} for film in FILMS])
    choices = [{"chosen": talk(f), "rejected": [*talk(f)[:-1], bot("No.")]} for f in FILMS]
    lines(home / "pairs.jsonl", choices)
    lines(home / "prompts.jsonl", [{"prompt": talk(film)[:3]} for film in FILMS])
    sft = [*SMALL, "--data", home / "talks.jsonl", "--init", home / "base", "--samples", 2, "--epochs", 1]
    assert run("train_sft", *sft, "--final-epochs", 1, "--out", home / "sft") == 0
    rm = [*SMALL, "--data", home / "pairs.jsonl", "--epochs", 1, "--normalise-samples", 4]
    assert run("train_rm", *rm, "--init", home / "sft", "--out", home / "rm") == 0
    return home


@pytest.fixture
def texts(monkeypatch):
    """The texts that the stages sample."""
    found = []
    for module in train_ppo, pair_sources:
        generate = module.generate
        monkeypatch.setattr(
            module, "generate", lambda *args, generate=generate: found.append(generate(*args)) or found[-1]
        )
    return found


def all_begin_a_turn(texts) -> bool:
    """Whether the prompts are the template's, of rows of talk(), up to what opens the assistant's turn."""
    allowed = [chat_template.encode(CHATML, talk(film)[:3], True) for film in FILMS]
    return all(
        row[real].tolist() in allowed for row, real in zip(texts.prompts, texts.prompt_mask, strict=True)
    )


def layout(folder) -> str:
    return checkpoint.load_config(folder)["layout"]


def test_sft_and_the_reward_model_record_the_layout(home):
    assert [layout(home / name) for name in ("base", "sft", "rm")] == ["template"] * 3
    assert RewardReader.load(home / "rm", "").tokenizer.layout.name == "template"
    assert checkpoint.load_config(home / "sft")["training"]["learn"] == "auto"


def test_sft_reads_the_template_s_ids_and_learns_every_turn(home, run, tmp_path, monkeypatch):
    batches, loss_sum = [], train_sft.loss_sum
    monkeypatch.setattr(
        train_sft,
        "loss_sum",
        lambda model, examples, *rest: batches.append(examples) or loss_sum(model, examples, *rest),
    )
    for learn, turns in ("auto", 2), ("last", 1):
        batches.clear()
        sft = [*SMALL, "--data", home / "talks.jsonl", "--init", home / "base", "--samples", 0, "--epochs", 1]
        assert run("train_sft", *sft, "--learn", learn, "--final-epochs", 1, "--out", tmp_path / learn) == 0
        ids, mask = batches[0][0]
        assert ids in [chat_template.encode(CHATML, talk(film), False)[:-1] for film in FILMS]
        text = spelled(CHATML, ids, mask)
        assert text.count("⟦") == turns and text.count("⟦Hi.<|im_end|>⟧") == turns - 1
        assert text.endswith("!<|im_end|>⟧") and "assistant\n⟦Yes, film " in text


def test_ppo_asks_and_scores_in_the_template_and_shows_transcripts(home, run, tmp_path, texts):
    ppo = [*SMALL, "--data", home / "prompts.jsonl", "--init", home / "sft", "--reward-model", home / "rm"]
    ppo += ["--iterations", 1, "--save-samples", 1, "--monitor", home / "rm"]
    ppo += ["--reward", "rm", "--reward", "tests.test_layout_stages:liked:0.1"]
    from tests.test_layout_stages import SEEN  # as the command line finds it: another copy of this file

    SEEN.clear()
    assert run("train_ppo", *ppo, "--out", tmp_path / "ppo") == 0
    assert layout(tmp_path / "ppo") == "template" and texts and all(map(all_begin_a_turn, texts))
    shown = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    begun = "\n\nHuman: Hello, film "
    assert shown and all(row["prompt"].startswith(begun) and "<|" not in row["prompt"] for row in shown)
    assert SEEN and all(isinstance(p, Conversation) and p.messages[0]["content"] in p for p in SEEN)


@pytest.mark.parametrize("online", [True, False])
def test_dpo_learns_pairs_and_its_own_in_the_template(home, run, tmp_path, texts, online):
    dpo = [*SMALL, "--init", home / "sft", "--out", tmp_path / "dpo"]
    if online:
        dpo += [
            "--online",
            "--data",
            home / "prompts.jsonl",
            "--reward-model",
            home / "rm",
            "--iterations",
            1,
            "--batch",
            8,
        ]
    else:
        dpo += ["--data", home / "pairs.jsonl", "--epochs", 1]
    assert run("train_dpo", *dpo) == 0
    assert layout(tmp_path / "dpo") == "template"
    assert all(map(all_begin_a_turn, texts)) and bool(texts) == online
    config = train_dpo.Config(data=str(home / "pairs.jsonl"))
    [item] = data.encode_judged(CHATML, data.load(config.data).records[:1], 256)
    assert item.n_prompt == len(chat_template.encode(CHATML, talk(FILMS[0])[:3], True))
    speaker = chat.Speaker(tmp_path / "dpo")
    assert speaker.layout == "template"


def test_chat_speaks_the_layout_of_the_checkpoint(home, run, tmp_path):
    speaker = chat.Speaker(home / "sft", response_tokens=4)
    assert speaker.layout == "template" and speaker.sampling.eos == CHATML.ends
    found, _ = speaker.answer("Hello")
    assert found.prompts[0].tolist() == chat_template.encode(CHATML, [user("Hello")], True)


def test_feedback_shows_turns_and_gives_messages_back(home, run, tmp_path):
    sampled = [
        "sample",
        home / "sft",
        "--prompts",
        home / "prompts.jsonl",
        "--limit",
        4,
        "--store",
        tmp_path / "s.db",
    ]
    assert run("minirlhf.feedback.__main__", *sampled, "--response-tokens", 6) == 0
    store = Store(tmp_path / "s.db")
    for _ in range(3):
        item = store.next("ann")
        assert item["prompt"].startswith("\n\nHuman: Hello, film ") and item["prompt"].endswith(
            "\n\nAssistant:"
        )
        store.vote("ann", item["item"], item["lease"], {"choice": "left", "strength": 1})
    found = tables(store)
    assert len(found["preferences"]) == len(found["pairs"]) == 3
    for name in "preferences", "pairs":
        [record, *_] = data.load(lines(tmp_path / f"{name}.jsonl", found[name])).records
        assert isinstance(record.prompt, Conversation) and record.prompt.messages[0]["role"] == "user"
        [judged] = data.encode_judged(CHATML, [record], 256)
        assert judged.ids[: judged.n_prompt] == chat_template.encode(CHATML, record.prompt.messages, True)


def test_evaluation_reads_conversations(home, run, tmp_path):
    ppo = [*SMALL, "--data", home / "prompts.jsonl", "--init", home / "sft", "--reward-model", home / "rm"]
    assert run("train_ppo", *ppo, "--iterations", 1, "--out", tmp_path / "ppo") == 0
    options = [
        "--sft",
        home / "sft",
        "--policy",
        tmp_path / "ppo",
        "--reward-model",
        home / "rm",
        "--best-of",
        2,
    ]
    assert run("minirlhf.evaluate", "--run", tmp_path, *options, "--report-model", home / "rm") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(sample["prompt"].startswith("\n\nHuman: ") for sample in found["samples"])


def test_export_takes_the_model_s_own_template_along(home, run, tmp_path, capsys):
    assert run("minirlhf.interop.command", "export", home / "sft", tmp_path / "hf") == 0
    about = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert about["chat_template"] == source("chatml") and "replace" not in capsys.readouterr().out


@pytest.mark.parametrize("row, more, told", [
    ({"prompt": "Is it good?", "completion": "Yes."}, [], True),
    ({"prompt": "Is it good?", "completion": "Yes."}, ["--instruction-field", "prompt"], False),
    ({"prompt": "Is it good?", "completion": "Yes."}, ["--layout", "transcript"], False),
    ({"text": "It is good."}, [], False), ({"messages": talk("it")}, [], False),
])  # fmt: skip
def test_plain_prompts_beside_a_chat_template_are_told(home, run, tmp_path, capsys, row, more, told):
    """An instruct model was trained on questions without its template, and nothing said so."""
    told_apart = lambda value, film: talk(film) if isinstance(value, list) else f"{film}: {value}"
    rows = [{key: told_apart(value, film) for key, value in row.items()} for film in FILMS]
    file = lines(tmp_path / "rows.jsonl", rows)
    options = [*SMALL, "--data", file, "--init", home / "base", "--samples", 0, "--epochs", 1, "--batch", 64]
    assert run("train_sft", *options, *more, "--out", tmp_path / "sft") == 0
    note = "note: the prompts are plain texts, which the chat template of"
    assert (note in capsys.readouterr().out) == told


def test_layout_transcript_is_obeyed_and_never_mixed(home, run, tmp_path, capsys):
    sft = [*SMALL, "--data", home / "talks.jsonl", "--init", home / "base", "--samples", 0, "--epochs", 1]
    sft += ["--final-epochs", 1, "--layout", "transcript"]
    assert run("train_sft", *sft, "--out", tmp_path / "sft") == 0
    rm = [*SMALL, "--data", home / "pairs.jsonl", "--epochs", 1, "--normalise", "none"]
    assert run("train_rm", *rm, "--init", tmp_path / "sft", "--out", tmp_path / "rm") == 0
    assert layout(tmp_path / "sft") == layout(tmp_path / "rm") == "transcript"
    [ids] = data.encode_prompts(
        checkpoint.tokenizer_of(tmp_path / "rm"), data.load(home / "prompts.jsonl").records[:1], 4, 256
    )
    assert CHATML.encoding.decode(ids).startswith("<s>\n\nHuman: Hello, film 0\n\nAssistant: Hi.")
    assert chat.Speaker(tmp_path / "sft").layout == "text"
    capsys.readouterr()
    ppo = [
        *SMALL,
        "--data",
        home / "prompts.jsonl",
        "--init",
        home / "sft",
        "--reward-model",
        tmp_path / "rm",
    ]
    assert run("train_ppo", *ppo, "--out", tmp_path / "ppo") == 2
    error = capsys.readouterr().err
    assert "lays conversations out by its chat template" in error and error.count("\n") == 1
    assert not (tmp_path / "ppo" / "latest").exists()
    assert (
        run("train_ppo", *SMALL, *ppo[4:], "--data", "toy", "--iterations", 1, "--out", tmp_path / "ppo") == 0
    )


BAD = {
    "{{ raise_exception('no such role') }}": "no such role",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "loops more than",
    "{% include '/etc/passwd' %}": "TypeError",
    "{% for i in range(999) %}{{ 'x' * 9000 }}{% endfor %}": "writes more than",
    "{{ messages[0]['content'] ": "unexpected end of template",
}


@pytest.mark.parametrize("template", BAD)
@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_ppo", "train_dpo"])
def test_a_bad_template_is_one_line_with_the_row_in_every_stage(
    home, run, tmp_path, capsys, monkeypatch, template, script
):
    monkeypatch.setattr(sandbox, "STEPS", 1000)
    folder = saved(tmp_path / "base", CHATML, context=256)
    file = unlisted(folder / "latest" / "tokenizer.json")
    about = json.loads(file.read_text())
    about["hf"]["chat_template"] = template
    file.write_text(json.dumps(about))
    rows = "talks" if script == "train_sft" else "pairs"
    options = [*SMALL, "--data", home / f"{rows}.jsonl", "--init", folder, "--out", tmp_path / "out"]
    options += ["--reward", "minirlhf.rewards:length"] if script == "train_ppo" else []
    assert run(script, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and BAD[template] in error
    assert f"{rows}.jsonl:" in error and "the model's chat template: " in error
    assert not (tmp_path / "out" / "latest").exists()


def test_a_row_that_a_template_refuses_is_named_and_half_a_layout_is_not_taken(home, run, tmp_path, capsys):
    rows = [{"messages": talk(film)} for film in FILMS]
    rows[7]["messages"] = [bot("a"), user("b"), bot("c")]
    template = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    )
    folder = saved(
        tmp_path / "base", tokenizer_of(template + source("chatml"), "template", "<|im_end|>"), context=256
    )
    sft = [*SMALL, "--data", lines(tmp_path / "t.jsonl", rows), "--init", folder, "--out", tmp_path / "out"]
    assert run("train_sft", *sft) == 2
    error = capsys.readouterr().err
    assert "t.jsonl:8: the model's chat template: the user speaks first" in error and error.count("\n") == 1
    plain = saved(tmp_path / "plain", tokenizer_of(None), context=256)
    sft = [*SMALL, "--data", home / "talks.jsonl", "--init", plain, "--out", tmp_path / "out"]
    assert run("train_sft", *sft, "--layout", "template") == 2
    assert "brings no chat template" in capsys.readouterr().err


def test_inspect_shows_the_layout_and_what_is_learnt(home, monkeypatch, capsys):
    options = [
        "inspect",
        str(home / "talks.jsonl"),
        "--tokenizer",
        str(home / "sft"),
        "--context",
        "256",
        "-n",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["data", *options])
    inspect.main()
    out = capsys.readouterr().out
    learnt = lambda out: [line for line in out.splitlines() if line.startswith("  learnt ")]
    assert "<|im_start|>|u|s|e|r|\\n|H|e|l|l|o" in out and "60 used" in out
    assert [line.split("|", 1)[1] for line in learnt(out)] == [
        "H|i|.|<|im_end|>",
        "Y|e|s|,| |f|i|l|m| |0|!|<|im_end|>",
    ]
    monkeypatch.setattr("sys.argv", ["data", *options, "--learn", "last"])
    inspect.main()
    assert len(learnt(capsys.readouterr().out)) == 1
