"""The comparison of the tuned policy with the SFT model: its pieces, and what a smoke run's table must satisfy."""

import json
import math

import pytest
import torch

from minirlhf import checkpoint, data, ppo
from minirlhf.measure import stats
from minirlhf.support import hardware
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import evaluate

EOS, PAD = 8, 9


def texts(rows: list[list[int]], width: int = 4, junk: int = PAD) -> evaluate.Texts:
    responses = torch.full((len(rows), width), junk)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        responses[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    prompt = torch.zeros(len(rows), 2, dtype=torch.long)
    whole = torch.cat([prompt, responses], 1), torch.cat([torch.ones_like(prompt, dtype=torch.bool), mask], 1)
    return evaluate.Texts(*whole, responses, mask)


@pytest.mark.parametrize("junk", [PAD, EOS, 3])
def test_looks(junk):
    """Lengths count the EOS and n-grams do not; nothing counts what stands in the padding."""
    found = evaluate.looks(texts([[1, 2, EOS], [1, 2, 1, 2], [EOS]], junk=junk), EOS)
    assert found["mean_length"] == pytest.approx(8 / 3) and found["eos_rate"] == pytest.approx(2 / 3)
    assert found["distinct_1"] == pytest.approx(2 / 6)
    assert found["distinct_2"] == pytest.approx(2 / 4)  # 12 12 21 12
    assert found["distinct_3"] == pytest.approx(2 / 2)


def test_looks_at_responses_that_hold_nothing():
    found = evaluate.looks(texts([[EOS], [EOS]]), EOS)
    assert found == {"distinct_1": 0, "distinct_2": 0, "distinct_3": 0, "mean_length": 1, "eos_rate": 1}


def test_D24_compare():
    base = {"score": [0.0, 0.0, 1.0, 5.0], "judge": [1.0, 1.0, 1.0, 1.0]}
    row = evaluate.compare({"score": [1.0, 0.0, 0.0, 9.0], "judge": [1.0, 2.0, 2.0, 3.0]}, base)
    assert row["score"] == 2.5 and row["score_win_rate"] == 2.5 / 4  # the tie counts a half
    assert row["judge"] == 2.0 and row["judge_win_rate"] == 3.5 / 4
    assert row["judge_win_rate_interval"] == pytest.approx(stats.wilson(3.5, 4))
    assert evaluate.compare(base, base)["score_win_rate"] == 0.5


def test_rows_of_texts_stay_together():
    t = texts([[1, EOS], [2, 3], [4]])
    picked = t[torch.tensor([2, 0])]
    assert picked.responses[:, 0].tolist() == [4, 1] and picked.mask.sum(1).tolist() == [3, 4]


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
    """(model, prompts of the test split, the settings of the policy, tokenizer)"""
    tokenizer, setting = Tokenizer.load(smoke / "ppo"), checkpoint.load_config(smoke / "ppo")["training"]
    prompts = data.prompts_of(data.load("toy").select("test").records, tokenizer, setting["prompt_tokens"])
    return checkpoint.load_gpt(smoke / "ppo").eval(), prompts, setting, tokenizer


def test_a_writer_is_a_function_of_its_seed(writer):
    gpt, prompts, setting, tokenizer = writer
    machine = hardware.Machine(torch.device("cpu"))
    first, again, other = (
        evaluate.write(gpt, prompts[:10], setting, tokenizer, machine, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.mask, again.mask)
    assert not torch.equal(first.responses, other.responses)
    assert first.responses.shape[1] == setting["response_tokens"]
    endless = evaluate.write(gpt, prompts[:10], setting | {"stop": False}, tokenizer, machine, 1)
    assert endless.response_mask.all() and not (endless.responses == tokenizer.eot).any()


def test_D1_kl_of_a_policy_to_itself_is_zero(smoke, writer):
    gpt, prompts, setting, tokenizer = writer
    written = evaluate.write(gpt, prompts[:70], setting, tokenizer, hardware.Machine(torch.device("cpu")), 1)
    kl, entropy, surprise = evaluate.under_both(written, gpt, gpt, setting, tokenizer.eot)
    assert torch.equal(kl, torch.zeros_like(kl)) and kl.shape == entropy.shape == (len(written.responses),)
    assert (entropy > 0).all() and (
        entropy <= math.log(tokenizer.vocab_size) * written.response_mask.sum(1)
    ).all()
    sft = checkpoint.load_gpt(smoke / "sft").eval()
    away, _, surprise_away = evaluate.under_both(written, gpt, sft, setting, tokenizer.eot)
    assert away.mean() > 0  # the policy's own samples are likelier to the policy
    torch.testing.assert_close(surprise_away - surprise, away, atol=1e-3, rtol=1e-3)
