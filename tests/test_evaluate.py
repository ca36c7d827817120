"""The comparison of the tuned policy with the SFT model: its pieces, and what a smoke run's table must satisfy."""

import copy
import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch

from minirlhf import UserError, checkpoint, data, ppo
from minirlhf.measure import stats
from minirlhf.rollout import Texts
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import evaluate
from tests.by_hand import unlisted

EOS, PAD = 8, 9


def texts(rows: list[list[int]], width: int = 4, junk: int = PAD) -> Texts:
    responses = torch.full((len(rows), width), junk)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        responses[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    prompts = torch.zeros(len(rows), 2, dtype=torch.long)
    return Texts(prompts, torch.ones_like(prompts, dtype=torch.bool), responses, mask)


@pytest.mark.parametrize("junk", [PAD, EOS, 3])
def test_measures_of_texts(junk):
    """Lengths count the EOS and n-grams do not; nothing counts what stands in the padding."""
    found = evaluate.text_measures(texts([[1, 2, EOS], [1, 2, 1, 2], [EOS]], junk=junk), EOS)
    assert found["mean_length"] == pytest.approx(8 / 3) and found["eos_rate"] == pytest.approx(2 / 3)
    assert found["distinct_1"] == pytest.approx(2 / 6)
    assert found["distinct_2"] == pytest.approx(2 / 4)  # 12 12 21 12
    assert found["distinct_3"] == pytest.approx(2 / 2)


def test_measures_of_responses_that_hold_nothing():
    found = evaluate.text_measures(texts([[EOS], [EOS]]), EOS)
    assert found == {"distinct_1": 0, "distinct_2": 0, "distinct_3": 0, "mean_length": 1, "eos_rate": 1}


def test_D24_compare():
    base = {"score": [0.0, 0.0, 1.0, 5.0], "judge": [1.0, 1.0, 1.0, 1.0]}
    row = evaluate.compare({"score": [1.0, 0.0, 0.0, 9.0], "judge": [1.0, 2.0, 2.0, 3.0]}, base)
    assert row["score"] == 2.5 and row["score_win_rate"] == 2.5 / 4  # the tie counts a half
    assert row["judge"] == 2.0 and row["judge_win_rate"] == 3.5 / 4
    assert row["judge_win_rate_interval"] == pytest.approx(stats.wilson(3.5, 4))
    assert evaluate.compare(base, base)["score_win_rate"] == 0.5


@pytest.fixture(scope="module")
def results(smoke):
    return json.loads((smoke / "results.json").read_text())


def test_D20_best_of_n_is_better_and_its_kl_is_known(results):
    """The score that picks rises with n, on average and (the draws are nested) never falls from 4 to 16."""
    four, sixteen, sft = results["best_of_n"]["4"], results["best_of_n"]["16"], results["sft_samples"]
    assert sixteen["score"] >= four["score"] > sft["score"]
    assert sixteen["score_win_rate"] >= four["score_win_rate"] > 0.6
    assert (four["kl"], sixteen["kl"]) == (ppo.best_of_n_kl(4), ppo.best_of_n_kl(16))
    assert four["kl"] == pytest.approx(0.6363, abs=1e-4) and sixteen["kl"] == pytest.approx(1.8351, abs=1e-4)


def test_rows_have_the_same_columns_and_finite_numbers(results):
    rows = [results["sft_samples"], results["ppo"], *results["best_of_n"].values()]
    assert len({frozenset(row) - {"seconds"} for row in rows}) == 1
    for row in rows:
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            assert all(
                v is None and name in ("entropy", "sft_perplexity") or math.isfinite(v) for v in values
            ), name
        for reader in ("score", "judge", "lexicon"):
            low, high = row[f"{reader}_win_rate_interval"]
            assert 0 <= low <= row[f"{reader}_win_rate"] <= high + 1e-12 <= 1 + 1e-12
        assert 1 <= row["mean_length"] <= 12 and 0 <= row["eos_rate"] <= 1
    sft = results["sft_samples"]
    assert sft["kl"] == 0 and {sft[f"{reader}_win_rate"] for reader in ("score", "judge", "lexicon")} == {0.5}


def test_samples_are_shown_with_what_was_measured(results):
    assert len(results["samples"]) == 8 <= results["prompts"]
    for sample in results["samples"]:
        assert set(sample) == {"prompt", "sft", "ppo", "kl", "score_sft", "score_ppo"}
        assert "<|endoftext|>" not in sample["prompt"] + sample["sft"] + sample["ppo"]


def test_deterministic(smoke):
    config = evaluate.Config(run=smoke, prompts=6, best_of=(2,), samples=1)
    first, second = (evaluate.evaluate(config) for _ in range(2))
    assert first == second
    assert first["prompts"] == 6 and [*first["best_of_n"]] == ["2"] and len(first["samples"]) == 1
    other = evaluate.evaluate(evaluate.Config(run=smoke, prompts=6, best_of=(2,), samples=1, seed=5))
    assert other["sft_samples"] != first["sft_samples"]


@pytest.fixture(scope="module")
def writer(smoke):
    """(model, prompts of the test split, the policy's sampling, tokenizer)"""
    tokenizer, about = Tokenizer.load(smoke / "ppo"), checkpoint.load_config(smoke / "ppo")
    settings = evaluate.settings_of(about, smoke / "ppo", evaluate.SETTINGS)
    records = data.load("toy").select("test").records
    prompts = data.encode_prompts(tokenizer, records, settings["prompt_tokens"], room=99)
    return (
        checkpoint.load_gpt(smoke / "ppo").eval(),
        prompts,
        evaluate.sampling_of(settings, tokenizer),
        tokenizer,
    )


def test_a_writer_is_a_function_of_its_seed(writer):
    gpt, prompts, sampling, tokenizer = writer
    first, again, other = (evaluate.write(gpt, prompts[:10], sampling, seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.mask, again.mask)
    assert not torch.equal(first.responses, other.responses)
    assert first.responses.shape[1] == sampling.max_new
    endless = evaluate.write(gpt, prompts[:10], dataclasses.replace(sampling, forbidden=tokenizer.eot), 1)
    assert endless.response_mask.all() and not (endless.responses == tokenizer.eot).any()


def test_texts_of_many_chunks_stay_in_order(writer, monkeypatch):
    gpt, prompts, sampling, tokenizer = writer
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    written = evaluate.write(gpt, prompts[:10], sampling, 1)
    assert written.decode(tokenizer)[0] == [tokenizer.decode(ids) for ids in prompts[:10]]
    parts = torch.stack(evaluate.nats(written, gpt, gpt, sampling))
    monkeypatch.undo()
    torch.testing.assert_close(parts, torch.stack(evaluate.nats(written, gpt, gpt, sampling)))


def test_D1_kl_of_a_policy_to_itself_is_zero(smoke, writer):
    gpt, prompts, sampling, tokenizer = writer
    written = evaluate.write(gpt, prompts[:70], sampling, 1)
    kl, entropy, surprise = evaluate.nats(written, gpt, gpt, sampling)
    assert torch.equal(kl, torch.zeros_like(kl)) and kl.shape == entropy.shape == (len(written),)
    most = math.log(tokenizer.vocab_size) * written.response_mask.sum(1)
    assert (entropy > 0).all() and (entropy <= most).all()
    sft = checkpoint.load_gpt(smoke / "sft").eval()
    away, _, surprise_away = evaluate.nats(written, gpt, sft, sampling)
    torch.testing.assert_close(surprise_away - surprise, away, atol=1e-3, rtol=1e-3)


def test_D1_samples_of_a_policy_that_moved_are_likelier_to_it(smoke, writer):
    """KL is positive whichever of two different models writes.  Five standard errors above 0: a false alarm in 3 million."""
    gpt, prompts, sampling, _ = writer
    moved = copy.deepcopy(gpt)
    with torch.no_grad():  # tied to the head: other logits everywhere
        noise = torch.randn(moved.wte.weight.shape, generator=torch.Generator().manual_seed(0))
        moved.wte.weight += 5 * moved.wte.weight.std() * noise
    for policy, ref in ((moved, gpt), (gpt, moved)):
        written = evaluate.write(policy, prompts, sampling, 1)
        kl, _, _ = evaluate.nats(written, policy, ref, sampling)
        assert kl.mean() > 5 * kl.std() / math.sqrt(len(kl)) > 0


# ----------------------------------------------------------------------------- what the policy maximised


def copied(smoke, tmp_path, **changes):
    """A copy of the smoke run whose policy's config.json has other entries; None removes one."""
    run = tmp_path / "copy"
    shutil.copytree(smoke, run, symlinks=True)
    file = unlisted(run / "ppo" / "latest" / "config.json")
    about = json.loads(file.read_text())
    for name, value in changes.items():
        at = about["training"] if name in about["training"] and name != "reward_model" else about
        at[name] = value
        if value is None:
            del at[name]
    file.write_text(json.dumps(about))
    return run


def scores_as(run, **options):
    config = evaluate.Config(run=run, prompts=6, best_of=(2,), samples=1, **options)
    return evaluate.evaluate(config)


def test_a_policy_without_a_reward_model_is_scored_by_its_functions(smoke, tmp_path):
    run = copied(smoke, tmp_path, inputs={}, reward_model=None, reward=["minirlhf.rewards:length:2"])
    shutil.rmtree(run / "rm")
    found = scores_as(run)
    for sample, name in ((found["samples"][0], "sft"), (found["samples"][0], "ppo")):
        assert sample[f"score_{name}"] == pytest.approx(len(sample[name].split()) / 50)
    assert found["best_of_n"]["2"]["score"] >= found["sft_samples"]["score"] > 0
    assert found["ppo"]["judge"] is not None  # the judge is still asked


def test_code_that_a_checkpoint_names_is_not_run_unasked(smoke, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('run')")
    (tmp_path / "mine.py").write_text("score = lambda prompts, responses: [float(len(r)) for r in responses]")
    monkeypatch.syspath_prepend(tmp_path)
    run = copied(smoke, tmp_path, inputs={}, reward_model=None, reward=["trap:score"])
    with pytest.raises(UserError, match="trap:score.*is not run unasked: name the functions with --reward"):
        scores_as(run)
    assert "trap" not in sys.modules
    found = scores_as(run, reward=("mine:score",))["samples"][0]
    assert found["score_ppo"] == len(found["ppo"])
    with pytest.raises(UserError, match="--reward and --reward-model both say"):
        scores_as(run, reward=("mine:score",), reward_model=smoke / "rm")


def test_a_copied_run_finds_its_own_reward_model(smoke, tmp_path):
    """Whether the original is still there or not, and never one that was trained again."""
    checksum = checkpoint.fingerprint(smoke / "rm")
    gone = {"reward_model": checksum, "reward_model_path": str(tmp_path / "gone" / "rm")}
    run = copied(smoke, tmp_path, inputs=gone)
    about = checkpoint.load_config(run / "ppo")
    assert evaluate.maximised_model(about, run) == run / "rm"
    about["inputs"] = gone | {"reward_model_path": str(smoke / "rm")}
    assert evaluate.maximised_model(about, tmp_path / "elsewhere") == smoke / "rm"
    about["inputs"] = gone | {"reward_model": "0" * 64}
    with pytest.raises(UserError, match="was trained again since, or replaced: name it with --reward-model"):
        evaluate.maximised_model(about, run)
    for missing in ("nowhere/rm", 5, "x\0y", "n" * 5000):
        about["inputs"] = gone | {"reward_model_path": missing}
        with pytest.raises(UserError, match="is not here: name it with --reward-model"):
            evaluate.maximised_model(about, tmp_path / "elsewhere")


@pytest.mark.parametrize("name, value, message", [
    ("prompt_tokens", None, "training.prompt_tokens: expected int at least 1.*found nothing"),
    ("response_tokens", 0, "training.response_tokens: expected int at least 1.*found 0"),
    ("temperature", "hot", "training.temperature: expected float.*found 'hot'"),
    ("seed", True, "training.seed: expected int"), ("data", ["toy"], "training.data: expected str, found"),
])  # fmt: skip
def test_damaged_settings_are_one_line(smoke, tmp_path, name, value, message):
    with pytest.raises(UserError, match=message) as error:
        scores_as(copied(smoke, tmp_path, **{name: value}))
    assert "\n" not in str(error.value)


def test_prompts_that_the_policy_practised_on_are_told(smoke, capsys):
    scores_as(smoke)
    assert "practised" not in capsys.readouterr().out
    scores_as(smoke, split="val")
    assert "note: the policy practised on these prompts (the val split)" in capsys.readouterr().out


@pytest.mark.parametrize("stage, settings, split", [
    ("ppo", {"data": "toy", "split": "auto"}, "val"), ("ppo", {"data": "my.jsonl", "split": "auto"}, "all"),
    ("ppo", {"data": "my.jsonl", "split": "test"}, "test"), ("ppo", {"data": "toy"}, "val"),
    ("dpo", {"data": "my.jsonl", "split": "auto", "online": False}, "train"),
    ("dpo", {"data": "my.jsonl", "split": "auto", "online": True}, "all"),
])  # fmt: skip
def test_the_split_that_a_policy_was_trained_on(stage, settings, split):
    """DPO on a file of judged pairs was said to have practised on all of its prompts."""
    assert evaluate.practised_split({"stage": stage, "training": settings}) == split


@pytest.mark.parametrize("reward, told", [
    (["rm"], False), (["rm:0.5"], False), (["rm", "minirlhf.rewards:length:-1"], True), (["mine:score"], True),
])  # fmt: skip
def test_rewards_beside_the_reward_model_are_told(smoke, tmp_path, capsys, reward, told):
    """`score` was the reward model's, and nothing said that the policy had maximised another number."""
    scores_as(copied(smoke, tmp_path, reward=reward))
    note = f"note: the policy maximised {reward!r}: `score` is the reward model's alone"
    assert (note in capsys.readouterr().out) == told


def test_seconds_are_those_of_the_policy_that_is_compared(smoke, tmp_path):
    """They were those of RUN/ppo, whichever policy was compared."""
    run = copied(smoke, tmp_path, results={"seconds": 5})
    (run / "ppo").rename(run / "other")
    shutil.copytree(smoke / "ppo", run / "ppo", symlinks=True)
    found = evaluate.collect(run, {"ppo": {"kl": 1.0}}, run / "rm", run / "other")
    assert found["ppo"] == {"kl": 1.0, "seconds": 5}


def test_results_of_another_policy_are_not_replaced(run, smoke, tmp_path, capsys):
    """They were, without a word, and the report of the run then showed the other policy."""
    copied(smoke, tmp_path).rename(tmp_path / "run")
    brief = ("--run", tmp_path / "run", "--prompts", 4, "--best-of", 2)
    file = tmp_path / "run" / "results.json"
    file.unlink(missing_ok=True)
    assert (
        run("minirlhf.evaluate", *brief) == run("minirlhf.evaluate", *brief) == 0
    )  # its own: measured again
    before, other = file.read_bytes(), tmp_path / "other" / "ppo"
    shutil.copytree(smoke / "ppo", other, symlinks=True)
    shutil.copytree(smoke / "sft", tmp_path / "other" / "sft", symlinks=True)
    capsys.readouterr()
    assert run("minirlhf.evaluate", *brief, "--policy", other) == 2
    error = capsys.readouterr().err
    assert (
        f"holds the results of {tmp_path / 'run' / 'ppo'}, and this would be of {other}: give --results"
        in error
    )
    assert file.read_bytes() == before
    assert run("minirlhf.evaluate", *brief, "--policy", other, "--results", tmp_path / "other.json") == 0


@pytest.mark.parametrize("option", ["--sft", "--policy"])
def test_models_that_cannot_continue_the_same_prompts_are_refused(run, smoke, tmp_path, capsys, option):
    """With another tokenizer the SFT model's texts were nonsense, or an id had no row: a traceback."""
    other = [
        "--preset",
        "smoke",
        "--vocab",
        300,
        "--epochs",
        1,
        "--samples",
        0,
        "--out",
        tmp_path / "other" / "sft",
    ]
    assert run("train_sft", *other) == 0
    capsys.readouterr()
    assert run("minirlhf.evaluate", "--run", smoke, "--sft", tmp_path / "other" / "sft") == 2
    assert "its tokenizer is not that of" in capsys.readouterr().err
    mine = ("--results", tmp_path / "results.json")
    assert run("minirlhf.evaluate", "--run", smoke, option, smoke / "rm", *mine) == 2
    assert "a rm checkpoint writes no text: name one of train_sft.py" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--prompts", "0"], "--prompts must be at least 1"), (["--best-of", "4", "-1"], "--best-of must be at least 1"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--samples", "x"], "--samples"),
    (["--results", "no/such/folder/x.json"], "there is no folder no/such/folder"), (["--results", "/"], "is a folder"),
    (["--reward", "rm"], "--reward names functions here"), (["--reward", "os:system"], "want a function of (prompts, responses)"),
])  # fmt: skip
def test_mistakes_are_one_line(run, smoke, capsys, options, message):
    assert run("minirlhf.evaluate", "--run", smoke, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
