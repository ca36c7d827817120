"""DPO and IPO: their equations, their pairs, train_dpo.py, and the reward that its policies imply."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_dpo
from minirlhf import UserError, checkpoint, data, preference
from minirlhf.model import GPT, GPTConfig
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling, Texts, response_logprobs
from minirlhf.support import implicit, origin
from minirlhf.support import pairs as pair_sources
from minirlhf.support.hardware import Machine
from minirlhf.tokenizer import Tokenizer
from tests.by_hand import unlisted
from tests.gradients import agree, gradients

SMALL = ["--preset", "smoke", "--precision", "fp32"]
TINY = GPTConfig(vocab_size=50, context=32, n_layer=2, n_head=2, n_embd=16)
LOSSES = {"dpo": preference.dpo_loss, "ipo": preference.ipo_loss}


def t(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, requires_grad=grad)


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------- equations


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_D25_p26_dpo_at_the_reference_is_ln_2_with_slope_minus_half_beta(beta):
    chosen, rejected = t(0.0, grad=True), t(0.0, grad=True)
    loss = preference.dpo_loss(chosen, rejected, beta)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) == pytest.approx(0.6931, abs=1e-4)
    assert chosen.grad.item() == pytest.approx(-beta / 2) and rejected.grad.item() == pytest.approx(beta / 2)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_D25_p26_ipo_is_least_at_a_margin_of_half_over_beta(beta):
    margin = t(1 / (2 * beta), grad=True)
    loss = preference.ipo_loss(margin, t(0.0), beta)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9) and margin.grad.item() == pytest.approx(0, abs=1e-6)
    assert preference.ipo_loss(t(0.0), t(0.0), beta).item() == pytest.approx(1 / (2 * beta) ** 2)


def test_D25_p26_dpo_sums_and_ipo_means_over_the_tokens():
    """Ten tokens of .1 more each: 1 nat in DPO, .1 in IPO; twice as long a response is 2 nats, and .1."""
    ref, lengths = t(-30.0, -60.0), t(10.0, 20.0)
    logps = ref + 0.1 * lengths
    torch.testing.assert_close(preference.sequence_log_ratios(logps, ref, lengths, "dpo"), t(1.0, 2.0))
    torch.testing.assert_close(preference.sequence_log_ratios(logps, ref, lengths, "ipo"), t(0.1, 0.1))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_D25_gradients_by_hand(loss, share):
    """Per pair: beta (sigmoid(beta m) - s) / B; 2 (m - (2 s - 1) / (2 beta)) / B."""
    beta, B = 0.3, 7
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(B, generator=generator).requires_grad_() for _ in range(2))
    LOSSES[loss](chosen, rejected, beta, share).backward()
    m = (chosen - rejected).detach()
    by_hand = {
        "dpo": beta * (torch.sigmoid(beta * m) - share) / B,
        "ipo": 2 * (m - (2 * share - 1) / (2 * beta)) / B,
    }[loss]
    torch.testing.assert_close(chosen.grad, by_hand, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rejected.grad, -by_hand, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_D25_a_share_is_the_mean_over_its_voters_and_a_tie_pulls_to_no_margin(loss):
    function, chosen, rejected = LOSSES[loss], t(0.8), t(-0.3)
    votes = [function(chosen, rejected, 0.5)] * 7 + [function(rejected, chosen, 0.5)] * 3
    shares = function(chosen, rejected, 0.5, t(0.7))
    assert shares.item() == pytest.approx(sum(x.item() for x in votes) / 10)
    margin = t(0.0, grad=True)
    function(margin, t(0.0), 0.5, 0.5).backward()
    assert margin.grad.item() == 0.0
    best = min(np.linspace(-3, 3, 601), key=lambda m: function(t(float(m)), t(0.0), 0.5, 0.7).item())
    wanted = {"dpo": math.log(0.7 / 0.3) / 0.5, "ipo": (2 * 0.7 - 1) / (2 * 0.5)}[loss]
    assert best == pytest.approx(wanted, abs=0.01)


def test_D25_dpo_is_the_reward_models_loss_on_implicit_rewards_and_holds_at_the_extremes():
    a, b, share = torch.randn(9), torch.randn(9), torch.rand(9)
    assert preference.dpo_loss(a, b, 0.2, share).equal(preference.pairwise_loss(0.2 * a, 0.2 * b, share))
    assert preference.dpo_loss(t(-1e6), t(1e6), 0.1).item() == pytest.approx(2e5)
    assert preference.dpo_loss(t(1e6), t(-1e6), 0.1).item() == 0.0


def test_D25_dpo_finds_the_reward_that_made_the_choices_up_to_a_constant():
    """Tabular: 5 answers to one prompt, all pairs with Bradley-Terry's own shares.  r = beta log p / ref + constant."""
    reward, beta = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3], dtype=torch.float64), 0.5
    ref = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0, -1.0, 0.2], dtype=torch.float64), 0)
    a, b = torch.triu_indices(5, 5, 1)
    share = torch.sigmoid(reward[a] - reward[b])
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-9, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        log_ratios = torch.log_softmax(logits, 0) - ref
        loss = preference.dpo_loss(log_ratios[a], log_ratios[b], beta, share)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = beta * (torch.log_softmax(logits.detach(), 0) - ref)
    assert (found - found.mean() - (reward - reward.mean())).abs().max() < 1e-3
    best = torch.softmax(ref + reward / beta, 0)  # what maximises reward - beta KL
    assert (torch.softmax(logits.detach(), 0) - best).abs().max() < 1e-3


# ----------------------------------------------------------------------------- texts


def random_pairs(B: int = 6, seed: int = 0) -> pair_sources.Pairs:
    rng = np.random.default_rng(seed)
    rows = [
        ([int(x) for x in rng.integers(2, 50, n)], int(p))
        for n, p in zip(rng.integers(6, 20, 2 * B), rng.integers(1, 5, 2 * B), strict=True)
    ]
    texts = pair_sources.collate(rows, 0, torch.device("cpu"))
    return pair_sources.Pairs(texts, torch.linspace(0.5, 1, B), torch.full((2 * B,), -30.0), B)


@dataclasses.dataclass
class OneRank:
    """What train_dpo.read asks of a run."""

    machine: Machine = dataclasses.field(default_factory=lambda: Machine(torch.device("cpu")))
    device: torch.device = torch.device("cpu")

    def autocast(self, whole=None):
        return self.machine.autocast("fp32")


SAMPLING = Sampling(8, 1.0, eos=1, pad=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_D17_p1_any_partition_into_microbatches_gives_the_same_gradient(loss):
    torch.manual_seed(0)
    policy, batch = GPT(TINY), random_pairs()
    config, found = train_dpo.Config(loss=loss, label_smoothing=0.1), []
    for size in (None, 1, 2, 4, 5):
        policy.zero_grad()
        for part in batch.split(size):
            train_dpo.measure(config, OneRank(), policy, part, SAMPLING)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    agree(found[1:], found[:1] * 4)


def test_D25_p22_the_eos_has_a_gradient_and_padding_has_none():
    """Also where the padding holds the EOS, or the response the padding token: lengths tell them apart."""
    torch.manual_seed(0)
    policy = GPT(TINY)
    config = train_dpo.Config()
    rows = [([7, 8, 9, 0, 1], 2), ([7, 8, 3, 1], 2)]  # a response with a pad token in it, then a shorter one
    texts = pair_sources.collate(rows, 0, torch.device("cpu"))
    assert texts.response_mask.tolist() == [[True] * 3, [True, True, False]]

    def loss_and_gradient(texts: Texts, logprobs: list) -> float:
        batch = pair_sources.Pairs(texts, torch.ones(1), torch.zeros(2), 1)

        def keep(*args):
            found = response_logprobs(*args)
            found[0].retain_grad()
            logprobs.append(found[0])
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pair_sources, "response_logprobs", keep)
            loss = train_dpo.measure(config, OneRank(), policy, batch, SAMPLING)[0]
        loss.backward()
        return loss.item()

    kept = []
    value = loss_and_gradient(texts, kept)
    grad = kept[0].grad
    assert (grad[0] < 0).all() and (grad[1, :2] > 0).all()  # the EOS of both, and the pad token within one
    torch.testing.assert_close(grad[0], grad[0, :1].expand(3))  # a sum: all tokens alike
    texts.responses[1, 2] = 1  # an EOS that does not count
    assert loss_and_gradient(texts, kept) == value


def test_D26_p27_the_first_log_ratio_is_0_bit_for_bit(run, smoke, tmp_path, metrics):
    """In every microbatch, those of a single pair of a few tokens included, with and without a fused head."""
    words = ["good", "bad", "ok", "I smiled", "no", "a dull plot"]
    rows = [{"prompt": f"{i}:", "chosen": words[i % 6], "rejected": words[(i + 1) % 6]} for i in range(90)]
    file = jsonl(tmp_path / "short.jsonl", rows)
    options = [*SMALL, "--init", smoke / "sft", "--data", file, "--lr", 1e-30, "--batch", 24]
    for more in ([], ["--microbatch", 1], ["--microbatch", 7, "--fused-head", "on"], ["--loss", "ipo"]):
        out = tmp_path / "-".join(map(str, more))
        assert run("train_dpo", *options, *more, "--out", out) == 0
        for line in metrics(out):  # a policy that cannot move is its reference in every step of the epoch
            assert line["rewards/chosen"] == line["rewards/rejected"] == line["rewards/margins"] == 0
            assert line["rewards/accuracies"] == pytest.approx(0.5)
            if "ipo" not in more:
                assert line["train/loss"] == pytest.approx(math.log(2))


def test_D26_reference_log_probabilities_do_not_depend_on_the_rank_that_read_them(smoke):
    policy, tokenizer = checkpoint.load_gpt(smoke / "sft", dropout=0.0), Tokenizer.load(smoke / "sft")
    source = data.load("toy")
    records, _ = pair_sources.pairs_of_ratings(source.select("val").records, 1, np.random.default_rng(0))
    items = data.encode_judged(tokenizer, records, 64)
    logps = lambda texts: pair_sources.response_logps(policy, texts, SAMPLING, "off")
    found = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        stub = OneRank(Machine(torch.device("cpu"), rank, world))
        stub.rank, stub.world, stub.config = rank, world, train_dpo.Config()
        stub.sum_, stub.require_finite = lambda x: x, lambda **named: None
        source_of_pairs = pair_sources.JudgedPairs(stub, items, 9, 2, tokenizer.pad)
        source_of_pairs.remember(logps, None)
        found[rank, world] = source_of_pairs.ref_logps
    assert (found[0, 1] < 0).all()
    torch.testing.assert_close(found[0, 2] + found[1, 2], found[0, 1], atol=1e-4, rtol=1e-5)
    assert ((found[0, 2] == 0) ^ (found[1, 2] == 0)).all()


# ----------------------------------------------------------------------------- pairs


def test_pairs_of_ratings_are_of_one_prompt_the_better_one_first():
    rated = lambda prompt, text, *ratings: data.Response(prompt, text, float(np.mean(ratings)), ratings)
    records = [rated("a", " x", 1), rated("a", " y", 5, 3), rated("b", " z", 2), rated("a", " w", 3)]
    found, counts = pair_sources.pairs_of_ratings(records, 5, np.random.default_rng(0))
    assert counts == {"used": 3, "dropped: no second response to the prompt": 1}
    assert {(p.prompt, p.chosen, p.rejected, p.share) for p in found} == {
        ("a", " y", " x", 1.0),
        ("a", " w", " x", 1.0),
        ("a", " y", " w", 0.75),
    }
    texts = [rated("", f"t{i}", i % 5) for i in range(40)]
    found, counts = pair_sources.pairs_of_ratings(texts, 2, np.random.default_rng(0))
    assert len(found) == 80 and counts == {"used": 40} and all(p.share >= 0.5 for p in found)


def test_online_pairs_have_the_better_sample_first(smoke):
    """By the reward model less the penalty for no end; equal scores are a tie."""
    tokenizer = Tokenizer.load(smoke / "sft")
    policy, ref = (checkpoint.load_gpt(smoke / "sft", dropout=0.0) for _ in range(2))
    stub, config = OneRank(), train_dpo.Config(online=True, batch=8, data="toy", response_tokens=6)
    stub.rank, stub.world, stub.require_finite = 0, 1, lambda **named: None
    stub.account = stub.print = lambda *args: None

    class Reader:
        tokenizer, context = Tokenizer.load(smoke / "sft"), 64

        def scores(self, texts, tokenizer, microbatch):
            self.texts = texts
            self.given = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 5, 3, 2, 1])
            return self.given, None, None

    reader, sampling = Reader(), Sampling(6, 1.0, tokenizer.eot, tokenizer.pad)
    source = data.load("toy")
    torch.manual_seed(0)
    made = pair_sources.SampledPairs(config, stub, source, (policy, ref), reader, tokenizer, sampling)
    batch = made.batch(0)
    scores = reader.given - (~reader.texts.ended(tokenizer.eot)).float()
    a, b = scores.view(2, 8)
    first = [i if a[i] >= b[i] else i + 8 for i in range(8)]
    second = [i + 8 if a[i] >= b[i] else i for i in range(8)]
    assert batch.texts.responses.equal(reader.texts.responses[first + second])
    assert batch.texts.prompts[:8].equal(batch.texts.prompts[8:]) and len({*first}) == 8
    assert batch.share.equal(torch.where(a == b, 0.5, 1.0)) and (batch.share == 0.5).any()
    logps = response_logprobs(ref, batch.texts, sampling)[0].sum(1)
    torch.testing.assert_close(batch.ref_logps, logps, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(batch.measures["objective/scores"], (a + b) / 2)


# ----------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def trained(run, smoke, tmp_path_factory) -> Path:
    """A copy of the smoke run with a DPO policy in it."""
    home = tmp_path_factory.mktemp("dpo") / "smoke"
    shutil.copytree(smoke, home, symlinks=True)
    options = [*SMALL, "--lr", 1e-3, "--epochs", 2, "--overwrite", "--out", home / "dpo"]
    assert run("train_dpo", *options) == 0
    return home


def test_learning_happened(trained, metrics):
    lines = metrics(trained / "dpo")
    assert lines[-1]["rewards/margins"] > 0.2 > lines[0]["rewards/margins"] == 0
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    results = checkpoint.load_config(trained / "dpo")["results"]
    validated = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert len(validated) == 4 and validated[-1] == results["val"]["accuracy"]
    assert results["test"]["accuracy"] > 0.6 and results["test"]["margin"] > 0
    assert checkpoint.load_config(trained / "dpo")["stage"] == "dpo"


def test_online_learns_what_its_reward_model_likes(run, trained, metrics):
    out = trained / "online"
    options = ["--online", "--init", trained / "sft", "--reward-model", trained / "rm", "--lr", 3e-3]
    assert run("train_dpo", *SMALL, *options, "--iterations", 24, "--beta", 0.05, "--out", out) == 0
    lines = metrics(out)
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.3
    assert abs(lines[0]["objective/kl"]) < 1e-5 and lines[-1]["objective/kl"] > 0.2
    rewards = (lines[-1]["rewards/chosen"] + lines[-1]["rewards/rejected"]) / 2
    assert rewards == pytest.approx(0.05 * lines[-1]["objective/kl"], rel=1e-4)


def test_votes_are_learnt_as_shares(run, smoke, metrics, tmp_path):
    """Pairs on which raters agree get a margin; with the votes turned round, the opposite one."""
    rows = [
        {"prompt": f"{i}:", "response_a": " good film", "response_b": " bad film", "votes": {"a": 3}}
        for i in range(120)
    ]
    turned = [row | {"votes": {"b": 3}} for row in rows]
    options = [*SMALL, "--init", smoke / "sft", "--lr", 1e-3, "--batch", 16]
    for name, content in (("votes", rows), ("turned", turned)):
        file = jsonl(tmp_path / f"{name}.jsonl", content)
        assert run("train_dpo", *options, "--data", file, "--out", tmp_path / name) == 0
        assert metrics(tmp_path / name)[-1]["val/margin"] > 0.1
    texts = Texts(*data.collate([[0]], 0, "left"), *data.collate([[1, 2]], 0))
    assert len(texts) == 1


NOTHING = {
    "text": ([{"text": f"some text {i}"} for i in range(60)], "text rows hold no pair to compare"),
    "one rating per prompt": (
        [{"prompt": f"p{i}", "response": " x", "rating": i % 5} for i in range(60)],
        "no pair to learn in",
    ),
    "ties": (
        [{"prompt": f"p{i}", "response_a": " x", "response_b": " y", "votes": {"tie": 2}} for i in range(60)],
        "pairs to train on are ties",
    ),
    "equal ratings": (
        [{"prompt": f"p{i // 2}", "response": f" {i}", "rating": 3} for i in range(120)],
        "pairs to train on are ties",
    ),
    "completions": ([{"prompt": f"p{i}", "completion": " x"} for i in range(60)], "--online"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_data_without_pairs_are_refused_and_nothing_is_written(run, smoke, capsys, tmp_path, name):
    rows, said = NOTHING[name]
    file = jsonl(tmp_path / "data.jsonl", rows)
    out = tmp_path / "dpo"
    assert run("train_dpo", *SMALL, "--init", smoke / "sft", "--data", file, "--out", out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and said in last and not out.exists()


def test_a_missing_reward_model_or_sft_model_is_refused(run, smoke, capsys, tmp_path):
    assert run("train_dpo", *SMALL, "--out", tmp_path / "dpo") == 2
    assert "run train_sft.py first, or name one with --init" in capsys.readouterr().err
    assert run("train_dpo", *SMALL, "--init", smoke / "sft", "--online", "--out", tmp_path / "dpo") == 2
    assert "run train_rm.py first, or name one with --reward-model" in capsys.readouterr().err
    assert run("train_dpo", *SMALL, "--init", smoke / "rm", "--out", tmp_path / "dpo") == 2
    assert "writes no text" in capsys.readouterr().err and not (tmp_path / "dpo").exists()


def test_D17_microbatches_and_recomputed_blocks_change_nothing(run, smoke, tmp_path, metrics):
    options = [*SMALL, "--init", smoke / "sft", "--lr", 1e-12, "--pairs", 1, "--batch", 156]
    found = {}
    for name, more in {
        "whole": [],
        "parts": ["--microbatch", 40],
        "again": ["--gradient-checkpointing"],
    }.items():
        with gradients() as found[name]:
            assert run("train_dpo", *options, *more, "--out", tmp_path / name) == 0
        agree(found[name], found["whole"])
        for line, whole in zip(metrics(tmp_path / name), metrics(tmp_path / "whole"), strict=True):
            assert line == pytest.approx(whole, rel=1e-4, abs=1e-5)


# ----------------------------------------------------------------------------- the implicit reward


def test_the_implicit_reward_is_beta_times_the_log_ratio_of_the_response_alone(trained):
    reader = RewardReader.load(trained / "dpo", "")
    tokenizer, beta = reader.tokenizer, train_dpo.PRESETS["smoke"].beta
    policy, ref = (checkpoint.load_gpt(trained / name, dropout=0.0) for name in ("dpo", "sft"))
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in (" The plot", " The cast is")]
    responses = [[*tokenizer.encode(" is great."), tokenizer.eot], tokenizer.encode(" dull")]
    texts = Texts(*data.collate(prompts, tokenizer.pad, "left"), *data.collate(responses, tokenizer.pad))
    sampling = Sampling(8, 1.0, tokenizer.eot, tokenizer.pad)
    with torch.no_grad():
        scores, disagreement, cut = reader.scores(texts, tokenizer)
        ratios = response_logprobs(policy, texts, sampling)[0] - response_logprobs(ref, texts, sampling)[0]
        torch.testing.assert_close(scores, beta * ratios.sum(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reader.by_token(texts).sum(1), scores)
    assert disagreement.tolist() == cut.tolist() == [0, 0] and not reader.members
    other = Tokenizer.train(["the film is great"], 300)  # texts of another tokenizer: split at the same place
    strings = list(zip(*texts.decode(tokenizer), strict=True))
    theirs = Texts(
        *data.collate([[other.bos, *other.encode(p)] for p, _ in strings], other.pad, "left"),
        *data.collate(
            [other.encode(r) + [other.eot] * end for (_, r), end in zip(strings, (1, 0), strict=True)],
            other.pad,
        ),
    )
    with torch.no_grad():
        torch.testing.assert_close(reader.scores(theirs, other)[0], scores, atol=1e-5, rtol=1e-5)


def test_the_implicit_reward_prefers_what_people_prefer(trained):
    """On the pairs of the test split, as the results in config.json say."""
    reader = RewardReader.load(trained / "dpo", "")
    records, _ = pair_sources.pairs_of_ratings(
        data.load("toy").select("test").records, 2, np.random.default_rng([1, 2])
    )
    items = data.encode_judged(reader.tokenizer, records, reader.context)
    rows = [(item.ids, item.n_prompt) for item in items] + [(item.ids_b, item.n_prompt) for item in items]
    texts = pair_sources.collate(rows, reader.tokenizer.pad, torch.device("cpu"))
    with torch.no_grad():
        scores, _, _ = reader.scores(texts, reader.tokenizer)
    margins = (scores[: len(items)] - scores[len(items) :]).numpy()
    shares = np.array([item.record.share for item in items])
    accuracy = np.where(shares > 0.5, (np.sign(margins) + 1) / 2, 0.5).mean()
    results = checkpoint.load_config(trained / "dpo")["results"]["test"]
    assert accuracy == pytest.approx(results["accuracy"], abs=1e-6)
    assert margins.mean() == pytest.approx(results["margin"], abs=1e-4)


def test_everything_that_reads_a_reward_model_reads_a_dpo_policy(run, trained, tmp_path, metrics, capsys):
    ppo = [*SMALL, "--init", trained / "sft", "--reward-model", trained / "dpo", "--monitor", trained / "dpo"]
    assert run("train_ppo", *ppo, "--iterations", 2, "--out", tmp_path / "ppo") == 0
    line = metrics(tmp_path / "ppo")[-1]
    assert line["objective/judge"] == pytest.approx(line["objective/rm_scores"])
    capsys.readouterr()
    assert run("train_ppo", *ppo, "--value-init", "reward", "--out", tmp_path / "no") == 2
    assert "--value-init sft or auto" in capsys.readouterr().err
    assert run("train_ppo", *ppo, "--disagreement-coef", 1, "--out", tmp_path / "no") == 2
    assert "--members 3" in capsys.readouterr().err
    sample = ["sample", trained / "dpo", "--prompts", "toy", "--limit", 4, "--store", tmp_path / "f.db"]
    sample += ["--reward-model", trained / "dpo", "--keep", 2]
    assert run("minirlhf.feedback.__main__", *sample) == 2 and "--by score" in capsys.readouterr().err
    assert run("minirlhf.feedback.__main__", *sample, "--by", "score") == 0
    assert run("minirlhf.estimate", trained / "sft", "--reward-model", trained / "dpo") == 0
    assert run("train_dpo", *SMALL, "--online", "--init", trained / "sft", "--reward-model", trained / "dpo",
               "--iterations", 1, "--out", tmp_path / "online") == 0  # fmt: skip


def test_a_dpo_policy_is_evaluated_talks_and_is_exported(run, trained, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results.json"
    options = ["--run", trained, "--policy", trained / "dpo", "--best-of", 2, "--results", results]
    assert run("minirlhf.evaluate", *options) == 0
    shown, found = capsys.readouterr().out, json.loads(results.read_text())
    assert "\nDPO " in shown and "\n   DPO " in shown and found["policy"] == "DPO"
    assert found["ppo"]["kl"] > 0 and 0 <= found["ppo"]["judge_win_rate"] <= 1
    assert run("minirlhf.evaluate", *options, "--judge", trained / "dpo") == 0
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the film\n")))
    chat = [trained / "dpo", "--explain", "--reference", trained / "sft", "--reward-model", trained / "dpo"]
    capsys.readouterr()
    assert run("minirlhf.chat", *chat, "--response-tokens", 6) == 0
    assert "[score " in capsys.readouterr().out
    assert run("minirlhf.interop.command", "export", trained / "dpo", tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_without_its_reference_a_policy_cannot_score(trained, tmp_path):
    """Missing, trained again since, or moved along with the policy."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved, symlinks=True)
    about_of = lambda: checkpoint.resolve(moved / "dpo") / "config.json"
    about = json.loads(unlisted(about_of()).read_text())
    gone = {"init_path": str(tmp_path / "gone" / "sft")}
    about_of().write_text(json.dumps(about | {"inputs": about["inputs"] | gone}))
    found = origin.find(checkpoint.resolve(moved / "dpo"), "init", checkpoint.fingerprint, "")
    assert found.resolve().parent == (moved / "sft").resolve()
    RewardReader.load(moved / "dpo", "")
    weights = load_file(checkpoint.resolve(moved / "sft") / "model.safetensors")
    config = checkpoint.load_config(moved / "sft")
    tokenizer = Tokenizer.load(moved / "sft")
    shutil.rmtree(found)  # `best` would keep the step that is wanted
    (moved / "sft" / "best").unlink()
    checkpoint.save(moved / "sft", 999, {k: v + 1e-3 for k, v in weights.items()}, config, tokenizer)
    with pytest.raises(
        UserError, match="trained again since, or replaced .* a policy's score is relative to its reference"
    ):
        RewardReader.load(moved / "dpo", "")
    shutil.rmtree(moved / "sft")
    with pytest.raises(UserError, match="is not here .* relative to its reference: put it back"):
        RewardReader.load(moved / "dpo", "")
    for damage in ({"inputs": {}}, {"inputs": None}, {"training": {"beta": "x"}}, {"training": None}):
        about_of().write_text(json.dumps(about | damage))
        with pytest.raises(UserError, match="config.json"):
            RewardReader.load(moved / "dpo", "")
    for path, match in ((trained / "sft", "not a reward model"), (trained / "ppo", "not a reward model")):
        with pytest.raises(UserError, match=match):
            RewardReader.load(path, "")


def test_the_implicit_reward_of_ipo_is_a_mean():
    torch.manual_seed(0)
    policy, ref = GPT(TINY), GPT(TINY)
    texts = random_pairs(3).texts
    total, mean = (
        implicit.ImplicitReward(policy, ref, 0.3, loss, SAMPLING)(texts) for loss in ("dpo", "ipo")
    )
    torch.testing.assert_close(total / texts.response_mask.sum(1), mean)
    assert F.cosine_similarity(total, mean, 0) < 1
