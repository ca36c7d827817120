"""Why a token was written: minirlhf/measure/attribution.py and minirlhf/tools/why.py."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minirlhf import UserError, checkpoint
from minirlhf.measure import attribution
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling, Texts, response_logprobs
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import evaluate, why
from minirlhf.tools.report import facts

V, EOS, PAD = 12, 10, 11
SAMPLING = Sampling(max_new=6, temperature=1.0, eos=(EOS,), pad=PAD)


class Next(nn.Module):
    """A language model to which one token, the one after the last, is a hundred nats likelier than all others."""

    def forward(self, tokens, mask=None, wanted=None):
        return nn.functional.one_hot((tokens + 1) % V, V).float()

    def logits(self, hidden):
        return 100 * hidden


class Uneven(Next):
    """One that writes 1, 2, 3 and EOS with these odds, whatever came before."""

    odds = torch.tensor([0.0, 1, 2, 5, 0, 0, 0, 0, 0, 0, 2, 0])

    def logits(self, hidden):
        return self.odds.log().expand(*hidden.shape[:-1], V)


def texts_of(*rows: list[int], prompt=(4,)) -> Texts:
    R = max(map(len, rows))
    responses = torch.tensor([row + [PAD] * (R - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (R - len(row)) for row in rows])
    prompts = torch.tensor([list(prompt)] * len(rows))
    return Texts(prompts, torch.ones_like(prompts, dtype=torch.bool), responses, mask)


WEIGHTS = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])


def linear(texts: Texts) -> torch.Tensor:
    """A score that is a sum over tokens, so that every share is known."""
    return (WEIGHTS[texts.tokens] * texts.mask).sum(1)


def test_what_a_token_added_is_its_weight():
    text = texts_of([1, 3, 9, EOS])
    assert attribution.added(linear, text).tolist() == [1, 4, 256, 512]
    assert len(attribution.cut_after(text)) == 5  # the prompt alone is the first
    assert attribution.added(linear, texts_of([2, 2], prompt=(4, 5))).tolist() == [2, 2]


def test_what_a_replaced_token_held_up():
    text, others = texts_of([1, 3, 9, EOS]), torch.tensor([[2, 4], [5, 5], [1, 2], [0, 0]])
    where = attribution.replaceable(text, SAMPLING)[0]
    assert where.tolist() == [True, True, True, False]
    found = attribution.replaced({"a": linear, "b": lambda t: -linear(t)}, text, others, where)
    shares = found["a"].tolist()
    assert shares[:3] == [1 - (2 + 8) / 2, 4 - 16, 256 - (1 + 2) / 2] and math.isnan(shares[3])
    assert found["b"][:3].tolist() == [-share for share in shares[:3]]
    alone = texts_of([EOS])
    nothing = attribution.replaced(
        {"a": linear}, alone, torch.zeros(1, 2, dtype=torch.long), torch.tensor([False])
    )
    assert nothing["a"].isnan().all()


def test_alternatives_are_the_references_draws_but_neither_the_token_nor_an_end():
    text = texts_of([1, 3, 9], [2, EOS])
    drawn = attribution.alternatives(Uneven(), text, SAMPLING, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3, 4000)
    shares = lambda place: [(drawn[place] == token).float().mean().item() for token in (1, 2, 3, EOS)]
    # Without the token itself and the end, what remains of 1 : 2 : 5.  Four standard errors are .032.
    assert shares((0, 0)) == pytest.approx([0, 2 / 7, 5 / 7, 0], abs=0.03)
    assert shares((0, 1)) == pytest.approx([1 / 3, 2 / 3, 0, 0], abs=0.03)
    assert shares((0, 2)) == pytest.approx([1 / 8, 2 / 8, 5 / 8, 0], abs=0.03)


def test_a_text_is_rewritten_from_left_to_right():
    text = texts_of([7, 0, 0, 3, EOS], [1, 6, 6])
    chosen = torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    new = attribution.rewritten(Next(), text, chosen, SAMPLING, torch.Generator().manual_seed(0))
    # 5 after the prompt's 4, 6 after that 5, 1 after the 0 that stays; 2 after 1, and 3 after that 2.
    assert new.responses.tolist() == [[5, 6, 0, 1, EOS], [1, 2, 3, PAD, PAD]]
    assert torch.equal(new.response_mask, text.response_mask)
    assert text.responses[0, 0] == 7  # the text itself is as it was


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_rewriting_changes_the_chosen_tokens_and_no_others(rows, seed):
    text = texts_of(*rows)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(text.responses.shape, generator=generator) < 0.4
    chosen &= attribution.replaceable(text, SAMPLING)
    new = attribution.rewritten(Uneven(), text, chosen, SAMPLING, generator)
    assert torch.equal(new.responses != text.responses, chosen)
    assert not (new.responses[chosen] == EOS).any()


def test_the_decisive_fifth():
    nan = float("nan")
    shares = torch.tensor([0.1, 0.9, -2.0, 0.5, nan, 0.2, 0.3, 0.0, 0.1, 0.1, 0.05])
    assert attribution.decisive(shares) == [1, 3]  # of ten that are numbers
    assert attribution.decisive(torch.tensor([-0.5, nan])) == [0]
    assert attribution.decisive(torch.tensor([nan])) == []


def test_added_is_what_a_reward_model_says_by_token(smoke):
    reader = RewardReader.load(smoke / "rm", "")
    reader.model.eval()
    ids = reader.tokenizer.encode(" a great film that is not dull")
    text = texts_of(ids, prompt=(reader.tokenizer.bos,))
    score = lambda t: reader.scores(t, reader.tokenizer)[0]
    with torch.no_grad():
        want = reader.by_token(text)[0]
    torch.testing.assert_close(attribution.added(score, text), want, atol=2e-5, rtol=0)


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=100)
def test_pieces_are_the_text(text):
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})  # a token per byte
    ids = tokenizer.encode(text)
    found = why.pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids) and len(found) == len(ids)


def test_a_character_of_several_tokens_stands_at_its_last():
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    assert why.pieces(tokenizer, tokenizer.encode("aé€")) == ["a", "", "é", "", "", "€"]
    assert why.pieces(tokenizer, [0x61, 0xC3]) == ["a", "\ufffd"]  # cut off within a character


@pytest.fixture(scope="module")
def explained(smoke, run, tmp_path_factory):
    """A copy of the smoke run with why.json of PPO."""
    home = tmp_path_factory.mktemp("why") / "run"
    shutil.copytree(smoke, home, symlinks=True)
    assert run("minirlhf.why", home, "--samples", 3, "--replacements", 2) == 0
    return home


def test_why_explains_the_texts_of_results_json(explained):
    found, results = facts.load(explained / "why.json"), json.loads((explained / "results.json").read_text())
    assert found["policy"] == "PPO" and found["left_out"] == "" and len(found["samples"]) == 3
    for sample, row in zip(found["samples"], results["samples"], strict=False):
        assert sample["prompt"] == row["prompt"]
        for who in ("sft", "ppo"):
            text = sample[who]
            assert "".join(text["tokens"]) == row[who]
            assert text["score"] == pytest.approx(row[f"score_{who}"], abs=1e-3)
            assert all(len(column) == len(text["tokens"]) for column in text["columns"].values())
            assert {*text["columns"]} == {*facts.COLUMNS}
            assert sum(text["columns"]["nats"]) == pytest.approx(text["kl"], abs=0.01)
            ended = text["columns"]["replaced"][-1] is None
            assert ended == text["ended"] and set(text["decisive"]) <= {*range(len(text["tokens"]) - ended)}
        assert sample["ppo"]["kl"] == pytest.approx(row["kl"], abs=1e-3)


def test_the_same_seed_explains_alike(explained, run):
    before = (explained / "why.json").read_bytes()
    assert run("minirlhf.why", explained, "--samples", 3, "--replacements", 2) == 0
    assert (explained / "why.json").read_bytes() == before


def test_value_and_advantage_are_those_of_the_trained_critic(explained):
    """At the last token the advantage is what was paid there, less what was forecast."""
    config = evaluate.Config(run=explained)
    setting = evaluate.load(config)
    explainer = why.Explainer(setting, explained / "rm", 1, 1)
    kept = checkpoint.load_trainer(explained / "ppo")[0]
    for name, tensor in explainer.critic.state_dict().items():
        assert torch.equal(tensor.cpu(), kept[f"value.{name}"]), name
    texts = evaluate.write(setting.policy, setting.prompts[:4], setting.sampling, 1)
    scores = setting.scorers["score"](texts, []).detach()
    values, advantages = why.of_critic(explainer.critic, setting, texts, scores, kl_coef=0.5)
    with torch.no_grad():
        ours, theirs = (
            response_logprobs(m, texts, setting.sampling)[0] for m in (setting.policy, setting.sft)
        )
    last = texts.response_mask.sum(1) - 1
    at = lambda x: x.gather(1, last[:, None])[:, 0]
    paid = scores - 0.5 * at(ours - theirs) - torch.where(texts.ended(setting.sampling.eos), 0.0, 1.0)
    torch.testing.assert_close(at(advantages), paid - at(values), atol=1e-5, rtol=0)


def test_what_is_left_out_is_told(explained, run, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(explained, home, symlinks=True)
    assert run("minirlhf.why", home, "--samples", 1, "--replacements", 1, "--policy", home / "dpo") == 0
    found = facts.load(home / "why.json")
    assert found["policy"] == "DPO" and found["left_out"] == "DPO has no critic" and found["beta"] == 0.1
    assert not {"value", "advantage"} & {*found["samples"][0]["ppo"]["columns"]}
    for file in ("trainer.json", "trainer.safetensors"):
        (home / "ppo" / "latest" / file).unlink()
    assert run("minirlhf.why", home, "--samples", 1, "--replacements", 1) == 0
    assert facts.load(home / "why.json")["left_out"].endswith("holds no critic")


def knows_its_row(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward that needs the data's own row of each prompt."""
    assert all(row["prompt"] in ("", prompt) for row, prompt in zip(rows, prompts, strict=True))
    return [float(len(response)) for response in responses]


def test_functions_that_read_rows_get_those_of_the_prompt(explained, run, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(explained, home, symlinks=True)
    options = ["--samples", 2, "--replacements", 1, "--reward", "test_why:knows_its_row"]
    assert run("minirlhf.why", home, *options) == 0
    text = facts.load(home / "why.json")["samples"][1]["ppo"]
    assert text["score"] == len("".join(text["tokens"]))


def test_functions_alone_are_asked(explained, run, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(explained, home, symlinks=True)
    options = ["--samples", 1, "--replacements", 1, "--reward", "minirlhf.rewards:length"]
    assert run("minirlhf.why", home, *options) == 0
    found = facts.load(home / "why.json")
    assert found["reward"] == "reward" and found["samples"][0]["ppo"]["columns"]["added"]


def test_a_folder_that_is_no_run_is_one_line(run, tmp_path, capsys):
    assert run("minirlhf.why", tmp_path / "nowhere") == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/nowhere: there is no such folder: name the folder of a run\n"
    )
    assert run("minirlhf.why", tmp_path) == 2
    assert "run train_ppo.py first, or name one with --policy" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


WRONG = [None, True, "x", [], {}, [1], -1, 10**400, math.nan, "\ud800", [[[]]]]
PLACES = [
    ("version",), ("policy",), ("seed",), ("left_out",), ("kl_coef",), ("samples",), ("samples", 0), ("samples", 0, "prompt"),
    ("samples", 0, "ppo"), ("samples", 0, "ppo", "tokens"), ("samples", 0, "ppo", "tokens", 0), ("samples", 0, "ppo", "score"),
    ("samples", 0, "ppo", "columns"), ("samples", 0, "ppo", "columns", "nats"), ("samples", 0, "ppo", "columns", "nats", 0),
    ("samples", 0, "ppo", "decisive"), ("samples", 0, "ppo", "others"), ("samples", 0, "ppo", "others", 0),
    ("samples", 0, "ppo", "others", 0, 0), ("samples", 0, "ppo", "others", 0, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: ".".join(map(str, p)))
def test_a_damaged_file_is_one_line_that_names_the_field(explained, tmp_path, place):
    whole, refused = (explained / "why.json").read_text(), 0
    for value in WRONG:
        given = at = json.loads(whole)
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        (tmp_path / "why.json").write_text(json.dumps(given))
        try:
            facts.load(tmp_path / "why.json")
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path}/why.json: ") and "\n" not in str(error)
            assert str(place[-1]).rstrip("s") in str(error) or isinstance(place[-1], int)
            assert len(str(error)) < 300
    assert refused >= len(WRONG) - 3
