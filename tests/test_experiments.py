"""The experiments with simulated raters and independent readers (benchmarks/rounds.py, gaming.py), on the smoke models."""

import json
import math
import random

import pytest
import torch

from benchmarks import gaming, rounds
from benchmarks.readers import Fluency, Judge, rows_of
from minirlhf import checkpoint, data
from minirlhf.feedback.store import Policy, Store
from minirlhf.rollout import Sampling, Texts, response_logprobs
from minirlhf.support.context import fit
from tests.feedback.conftest import make_items

pytestmark = pytest.mark.long

ROWS = [
    {"prompt": "The cast", "response": " is good."},
    {"prompt": "A", "response": " film of great, great charm"},
]


def test_judge_and_fluency_are_the_models_own_numbers(smoke):
    model, tokenizer = checkpoint.load_reward(smoke / "judge")
    for row, score in zip(ROWS, Judge(smoke / "judge")(ROWS), strict=True):
        (ids,) = fit(tokenizer, row["prompt"], [row["response"]], 64, "error").sequences
        alone = model.eval()(*data.collate([ids], tokenizer.pad))[0].item()
        assert score == pytest.approx(alone, abs=0.02)  # bf16 where the machine has it
    policy, nats, count = checkpoint.load_gpt(smoke / "sft").eval(), 0.0, 0
    for row in ROWS:
        head = [tokenizer.bos, *tokenizer.encode(row["prompt"])]
        body = tokenizer.encode(row["response"])
        everything = [torch.ones(1, len(ids), dtype=torch.bool) for ids in (head, body)]
        texts = Texts(torch.tensor([head]), everything[0], torch.tensor([body]), everything[1])
        with torch.no_grad():
            logprobs, _ = response_logprobs(policy, texts, Sampling(99, 1.0, tokenizer.eot, tokenizer.pad))
        nats, count = nats - logprobs.sum().item(), count + len(body)
    assert Fluency(smoke / "sft")([*ROWS, {"prompt": "p", "response": " "}]) == pytest.approx(
        math.exp(nats / count), rel=0.02
    )


def test_simulated_raters_err_by_their_noise(tmp_path):
    """Texts one point apart: noise of .5, 1 and 2 points is right in 97.7, 84.1 and 69.1 % (the normal distribution's Phi)."""
    store = Store(tmp_path / "f.db", create=True, seed=1)
    store.add(make_items(pairs=400))
    gold = lambda rows: [1.0 if "first" in row["response"] else 0.0 for row in rows]
    assert rounds.judge(tmp_path / "f.db", gold, seed=1) == 1200
    votes = Store(tmp_path / "f.db", Policy()).judgements()
    right = {who: sum(v["choice"] == "a" for v in votes if v["rater"] == who) / 400 for who in rounds.NOISE}
    for who, share in {"ann": 0.977, "bob": 0.841, "cid": 0.691}.items():
        assert right[who] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 400)), who
    assert rounds.judge(tmp_path / "f.db", gold, seed=1) == 0


def test_gold_at_a_kl():
    curve = [
        {"kl": 0.5, "gold": 0.0},
        {"kl": 2.5, "gold": 1.0},
        {"kl": 2.0, "gold": 9.0},
        {"kl": 4.0, "gold": 2.0},
    ]
    assert rounds.at_kl(curve, 1.0) == 0.25 and rounds.at_kl(curve, 2.5) == 1.0
    assert rounds.at_kl(curve, 0.1) is None and rounds.at_kl(curve, 4.1) is None


def test_gain_over_round_0_is_paired_by_seed():
    curve = lambda gold: {"pairs": 3, "curve": [{"kl": 0.0, "gold": 0.0}, {"kl": 2.0, "gold": gold}]}
    seeds = {"1": {"round 0": curve(1), "control": curve(2)}, "2": {"round 0": curve(3), "control": curve(5)}}
    rows = rounds.table(seeds, [1.0, 2.0, 3.0]).splitlines()[2:]
    assert rows == [
        "| round 0 | 3 | +1.00 | +2.00 | - |",
        "| control | 3 | +1.75, +0.75 (0.25) | +3.50, +1.50 (0.50) | - |",
    ]


@pytest.fixture
def in_process(monkeypatch, run, tmp_path):
    def command(*words):
        script, rest = (
            (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        )
        script = {"minirlhf.feedback": "minirlhf.feedback.__main__"}.get(script, script)
        assert run(script, *rest) == 0, words

    for module in (rounds, gaming):
        monkeypatch.setattr(module, "command", command)
        monkeypatch.setattr(module, "RESULTS", tmp_path / f"{module.__name__}.json")
        monkeypatch.setattr(module, "EVERY", 1)


@pytest.mark.usefixtures("in_process")
def test_rounds_learn_from_all_judgements_so_far(smoke, tmp_path):
    sizes = [
        "--preset",
        "smoke",
        "--prompts",
        "toy",
        "--pairs",
        24,
        "--rounds",
        1,
        "--iterations",
        2,
        "--epochs",
        1,
    ]
    args = rounds.parse(
        list(map(str, [*sizes, "--init", smoke / "sft", "--gold", smoke / "judge", "--out", tmp_path]))
    )
    found = {}
    rounds.run(args, 1, lambda rows: [random.random() for _ in rows], found.update)
    assert list(found) == ["round 0", "round 1", "control"]
    before, after, control = (found[name]["pairs"] for name in found)
    assert before <= 24 < after <= 48 and control > before
    for policy in found.values():
        assert [point["step"] for point in policy["curve"]] == [1, 2] and all(
            math.isfinite(p["kl"]) for p in policy["curve"]
        )
    sources = [
        json.loads(r["source"]) for r in Store(tmp_path / "seed-1/rounds.db").rows("SELECT source FROM items")
    ]
    assert sum("chosen" in source for source in sources) == after - before
    pairs = tmp_path / "seed-1/round-0/feedback/preferences.jsonl"
    assert {len(r.votes) for r in data.load(pairs).records} == {3}


def test_gaming_compares_the_end_with_the_peak_of_the_mean_over_rollouts_and_seeds():
    says = {"kl": 2.0, "proxy": 1.0, "judge": 1.0, "fluency": 90.0, "distinct_2": 0.5}
    one, other = (
        [says | {"strong": s} for s in strong] for strong in ([0, 2, 4, 4, 1, 1], [0, 2, 2, 4, 2, 4])
    )
    strong = lambda *curves: [p["strong"] for p in gaming.points(curves)]
    assert strong(one) == [1, 4, 1] and strong(other) == [1, 3, 3] and strong(one, other) == [1, 3.5, 2]
    row = gaming.table({"arm": {"1": one, "2": other}}).splitlines()[-1]
    assert row == "| arm | 2.0 | +1.00 | +1.00 | +2.00 | 1.50 (3.00, 0.00) | 90 | 0.50 |"
    row = gaming.table({"SFT": {"1": one[:1], "2": other[:1]}}).splitlines()[-1]  # a single point has no peak
    assert row == "| SFT | 2.0 | +1.00 | +1.00 | +0.00 | | 90 | 0.50 |"


@pytest.mark.usefixtures("in_process")
def test_gaming_reads_every_arm(smoke, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    models = ["--run", smoke, "--strong", smoke / "rm", "--fluency", smoke / "sft", "--out", tmp_path]
    sizes = ["--preset", "smoke", "--iterations", 2, "--arms", "kl_coef 0", "kl_coef 0, defences"]
    args = gaming.parse(list(map(str, [*models, *sizes])))
    monkeypatch.setattr(gaming, "parse", lambda: args)
    gaming.main()
    found = json.loads(gaming.RESULTS.read_text())
    assert (
        list(found) == ["kl_coef 0", "kl_coef 0, defences"] and gaming.RESULTS.with_suffix(".png").is_file()
    )
    for arm in found.values():
        assert [point["step"] for point in arm["1"]] == [1, 2]
        assert all(math.isfinite(value) for point in arm["1"] for value in point.values())
    assert "| kl_coef 0, defences |" in capsys.readouterr().out
    rows = rows_of(tmp_path / "kl_coef-0-defences-1/samples.jsonl")[1]
    assert all(row["score"] < row["rm"] for row in rows)  # the members never quite agree
