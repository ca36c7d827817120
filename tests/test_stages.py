"""The three stages as a user runs them: what they write, what they learn, what they refuse.  Resuming: test_resume.py."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_ppo
import train_rm
import train_sft
from minirlhf import checkpoint, data, model, rewards
from minirlhf.measure import stats
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Texts
from minirlhf.support import claims, cli
from minirlhf.tokenizer import Tokenizer
from tests.by_hand import unlisted

MODULES = {"train_sft": train_sft, "train_rm": train_rm, "train_ppo": train_ppo}
CHECKPOINT = ["config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer.tiktoken"]
SMALL = ["--preset", "smoke", "--precision", "fp32"]
SFT = [*SMALL, "--n-layer", 1, "--n-embd", 16, "--batch", 104, "--samples", 0]  # 3 steps an epoch


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("stage", ["sft", "rm", "judge", "ppo", "dpo"])
def test_smoke_leaves_whole_checkpoints(smoke, stage, metrics):
    for folder in (smoke / stage, smoke / stage / "latest"):
        assert all((folder / name).is_file() for name in CHECKPOINT)
    assert all(
        (smoke / stage / "latest" / name).is_file() for name in ("trainer.safetensors", "trainer.json")
    )
    about = json.loads((smoke / stage / "config.json").read_text())
    assert about["complete"] and about["stage"] == ("rm" if stage == "judge" else stage)
    assert about["training"]["preset"] == "smoke" and {"torch", "numpy", "minirlhf"} <= set(about["versions"])
    assert about["tokenizer"]["hash"] == Tokenizer.load(smoke / stage).hash
    lines = metrics(smoke / stage)
    assert [line["step"] for line in lines] == [*range(1, about["step"] + 1)]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert metrics(smoke / stage / "latest") == lines


def test_results_hold_what_they_must(smoke):
    found = json.loads((smoke / "results.json").read_text())
    assert {"val_bits_per_byte", "seconds"} <= set(found["sft"])
    measures = {"pearson", "spearman", "pair_accuracy", "pair_accuracy_1"}
    assert {"test", "baselines", "humans", "seconds"} <= set(found["rm"]) and measures <= set(
        found["rm"]["test"]
    )
    columns = {f"judge_{x}" for x in ("win_rate", "win_rate_interval")} | {
        "lexicon_win_rate",
        "kl",
        "score",
        "distinct_2",
    }
    columns |= {"mean_length", "eos_rate"}
    for row in (found["ppo"], found["sft_samples"], *found["best_of_n"].values()):
        assert columns <= set(row)
        for reader in ("score", "judge", "lexicon"):
            low, high = row[f"{reader}_interval"]
            assert low < row[reader] < high
    assert "seconds" in found["ppo"] and found["seed"] == 1 and "torch" in found["versions"]


def test_report(smoke, run, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(smoke, tmp_path / "run", symlinks=True)
    assert run("minirlhf.report", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_learning_happened(smoke, metrics):
    losses = [line["train/loss"] for line in metrics(smoke / "sft")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    bits = [line["val/bits_per_byte"] for line in metrics(smoke / "sft") if "val/bits_per_byte" in line]
    assert len(bits) == 2 and bits[1] < bits[0]
    assert bits[1] == checkpoint.load_config(smoke / "sft")["results"]["val_bits_per_byte"]


# ----------------------------------------------------------------------------- what train_ppo does with its models


@pytest.fixture(scope="module")
def ppo_run(smoke, run, tmp_path_factory):
    """(OUT, {role: the models that train_ppo.py held}) after two iterations on a checkpoint with dropout."""
    out, held = tmp_path_factory.mktemp("ppo") / "ppo", {"gpt": [], "reward": [], "value": []}
    with pytest.MonkeyPatch.context() as patch:

        def watch(where, name: str, role: str) -> None:
            original = getattr(where, name)
            patch.setattr(where, name, lambda *args: held[role].append(original(*args)) or held[role][-1])

        watch(checkpoint, "load_gpt", "gpt")
        watch(checkpoint, "load_reward", "reward")
        watch(rewards, "critic_from", "value")
        options = [
            *SMALL,
            "--init",
            smoke / "sft",
            "--reward-model",
            smoke / "rm",
            "--monitor",
            smoke / "judge",
        ]
        assert run("train_ppo", *options, "--iterations", 2, "--out", out) == 0
    assert {role: len(models) for role, models in held.items()} == {"gpt": 2, "reward": 2, "value": 1}
    return out, held


def test_D5_no_dropout_whatever_the_checkpoint_says(smoke, ppo_run):
    for stage in ("sft", "rm"):
        assert checkpoint.load_config(smoke / stage)["model"]["dropout"] > 0
    for held in (x[0] if isinstance(x, tuple) else x for x in sum(ppo_run[1].values(), [])):
        found = [m.dropout for m in held.modules() if hasattr(m, "dropout")]
        assert found and set(found) == {0.0}
        assert not any(isinstance(m, torch.nn.Dropout) for m in held.modules())
        held.train()
        tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
        first, second = held(tokens, mask), held(tokens, mask)
        assert all(map(torch.equal, *((x if isinstance(x, tuple) else (x,)) for x in (first, second))))


def test_D12_actor_and_critic_both_move_and_nothing_else(smoke, ppo_run):
    out, held = ppo_run
    before, after = final(smoke / "sft"), final(out)
    assert all(not torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))
    tensors, _ = checkpoint.load_trainer(out)
    values = {k.removeprefix("value."): v for k, v in tensors.items() if k.startswith("value.")}
    start = model.critic_from(checkpoint.load_reward(smoke / "rm")[0].members[0]).state_dict()
    assert values.keys() == start.keys()
    assert all(not torch.equal(values[k], start[k]) for k in start if k.endswith("weight"))
    (policy, ref), ((reward, _), (judge, _)), (value,) = held["gpt"], held["reward"], held["value"]
    assert equal(policy.state_dict(), after) and equal(ref.state_dict(), before)
    assert equal(reward.state_dict(), final(smoke / "rm")) and equal(
        judge.state_dict(), final(smoke / "judge")
    )
    frozen = lambda m: not any(p.requires_grad or p.grad is not None for p in m.parameters())
    assert frozen(ref) and frozen(reward) and frozen(judge)
    assert all(p.requires_grad for m in (policy, value) for p in m.parameters())


@pytest.mark.usefixtures("no_baselines")
def test_what_the_members_disagree_on_costs_score(smoke, run, metrics, tmp_path, capsys):
    """And samples.jsonl holds the texts with what was said of them."""
    ensemble = [*SMALL, "--init", smoke / "sft", "--members", 3, "--epochs", 1, "--out", tmp_path / "rm"]
    assert run("train_rm", *ensemble) == 0
    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--missing-eos",
        "none",
        "--iterations",
        4,
        "--save-samples",
        2,
    ]
    options += ["--disagreement-coef", 2]
    assert run("train_ppo", *options, "--reward-model", smoke / "rm", "--out", tmp_path / "one") == 2
    assert "--members" in capsys.readouterr().err
    assert run("train_ppo", *options, "--reward-model", tmp_path / "rm", "--out", tmp_path / "ppo") == 0
    rows = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in rows] == [2] * 16 + [4] * 16
    assert all(
        row["disagreement"] > 0 and isinstance(row["response"], str) and "judge" not in row for row in rows
    )
    assert [row["score"] for row in rows] == pytest.approx(
        [row["rm"] - 2 * row["disagreement"] for row in rows], abs=1e-5
    )
    last = metrics(tmp_path / "ppo")[-1]
    assert last["objective/kl"] == pytest.approx(sum(row["kl"] for row in rows[16:]) / 16, abs=1e-4)


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_layers_alone_through_all_stages(smoke, run, tmp_path, precision):
    """From a trained model on: what is frozen never changes, and the linear head's critic starts as its reward model."""
    options = ["--preset", "smoke", "--precision", precision, "--train-layers", 1]
    assert (
        run(
            "train_sft",
            *options,
            "--init",
            smoke / "sft",
            "--batch",
            208,
            "--samples",
            2,
            "--out",
            tmp_path / "sft",
        )
        == 0
    )
    head = ["--head", "linear", "--pooling", "last", "--epochs", 1]
    assert run("train_rm", *options, *head, "--out", tmp_path / "rm") == 0
    assert run("train_ppo", *options, "--iterations", 1, "--out", tmp_path / "ppo") == 0
    before = {
        k: v.to(torch.bfloat16 if precision == "bf16" and v.dim() == 2 else v.dtype)
        for k, v in final(smoke / "sft").items()
    }
    reward = {k.removeprefix("members.0.backbone."): v for k, v in final(tmp_path / "rm").items()}
    for after in final(tmp_path / "sft"), reward, final(tmp_path / "ppo"):
        for name, value in before.items():
            if name.startswith(("wte", "wpe", "blocks.0")):
                assert torch.equal(after[name], value), name
            elif name.endswith("weight"):
                assert not torch.equal(after[name].float(), value.float()), name


@pytest.mark.usefixtures("no_baselines")
def test_a_reward_model_may_read_in_both_directions(smoke, run, metrics, tmp_path, capsys):
    options = [*SMALL, "--init", smoke / "sft", "--epochs", 1]
    assert run("train_rm", *options, "--bidirectional", 1, "--out", tmp_path / "rm") == 0
    reward, _ = checkpoint.load_reward(tmp_path / "rm")
    assert [block.causal for block in reward.members[0].backbone.blocks][-2:] == [True, False]
    assert run("train_rm", *options, "--bidirectional", 99, "--out", tmp_path / "no") == 2
    assert "--bidirectional" in capsys.readouterr().err and not (tmp_path / "no" / "latest").exists()
    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--reward-model",
        tmp_path / "rm",
        "--iterations",
        1,
        "--out",
        tmp_path / "ppo",
    ]
    assert (
        run("train_ppo", *options, "--value-init", "reward") == 2
        and "--value-init sft" in capsys.readouterr().err
    )
    assert run("train_ppo", *options) == 0  # the critic starts from the SFT model instead
    assert math.isfinite(metrics(tmp_path / "ppo")[-1]["objective/rm_scores"])


@pytest.mark.usefixtures("no_baselines")
def test_a_reward_model_may_read_with_another_tokenizer(smoke, run, metrics, tmp_path, capsys):
    assert (
        run("train_sft", *SFT, "--vocab", 300, "--epochs", 1, "--final-epochs", 1, "--out", tmp_path / "sft")
        == 0
    )
    assert run("train_rm", *SMALL, "--epochs", 1, "--out", tmp_path / "rm") == 0
    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--reward-model",
        tmp_path / "rm",
        "--iterations",
        1,
        "--out",
        tmp_path / "ppo",
    ]
    assert (
        run("train_ppo", *options, "--value-init", "reward") == 2
        and "--value-init sft" in capsys.readouterr().err
    )
    assert run("train_ppo", *options) == 0
    assert math.isfinite(metrics(tmp_path / "ppo")[-1]["objective/rm_scores"])

    reward, reader = checkpoint.load_reward(tmp_path / "rm")
    writer = Tokenizer.load(smoke / "sft")
    assert reader.hash != writer.hash
    rows = [" The plot is great, I smiled.", " The cast"]
    texts = [writer.encode(rows[0]) + [writer.eot], writer.encode(rows[1])]
    opened = data.collate([[writer.bos]] * 2, writer.pad, side="left")
    reading = RewardReader(reward.eval(), reader)
    found = reading.scores(Texts(*opened, *data.collate(texts, writer.pad)), writer)[0]
    own = [[reader.bos, *reader.encode(rows[0]), reader.eot], [reader.bos, *reader.encode(rows[1])]]
    torch.testing.assert_close(found, reward(*data.collate(own, reader.pad))[0])


def test_D4_ratio_is_one_while_nothing_is_learnt(smoke, run, metrics, tmp_path):
    """All epochs and minibatches of a run that cannot move, split unlike the rollout was scored; prompts are padded."""
    short = [
        {"prompt": text}
        for text in ("The plot", "The cast is very", "The music is not very odd", "I smiled at")
    ]
    file = jsonl(tmp_path / "p.jsonl", [{"prompt": f"{r['prompt']} {i}"} for r in short for i in range(25)])
    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--reward-model",
        smoke / "rm",
        "--iterations",
        1,
        "--epochs",
        2,
    ]
    assert (
        run(
            "train_ppo",
            *options,
            "--data",
            file,
            "--lr",
            1e-30,
            "--value-lr",
            1e-30,
            "--out",
            tmp_path / "ppo",
        )
        == 0
    )
    (line,) = metrics(tmp_path / "ppo")
    assert line["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert line["policy/clipfrac_avg"] == 0 and line["policy/approxkl_avg"] < 1e-12
    assert line["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy still is the reference


def test_D16_learning_rate_falls_linearly(smoke, metrics):
    start, n = train_ppo.PRESETS["smoke"].lr, train_ppo.PRESETS["smoke"].iterations
    assert [line["lr"] for line in metrics(smoke / "ppo")] == pytest.approx(
        [start * (n - i) / n for i in range(n)]
    )


def test_D22_metrics_do_not_see_what_stands_in_padding(smoke, run, metrics, monkeypatch, tmp_path):
    generate = train_ppo.generate

    def cut(junk: bool):
        def generate_and_cut(policy, queries, mask, sampling):
            texts = generate(policy, queries, mask, sampling)
            responses, max_new = texts.responses, sampling.max_new
            lengths = 1 + torch.arange(len(responses)) * 5 % max_new
            keep = torch.arange(max_new) < lengths[:, None]
            responses[torch.arange(len(responses)), lengths - 1] = sampling.eos[0]
            junk_tokens = torch.arange(responses.numel()).view_as(responses) % 300
            junk_tokens[:, -1] = sampling.eos[0]  # an EOS that does not count
            off = junk_tokens if junk else torch.full_like(responses, sampling.pad)
            return Texts(texts.prompts, texts.prompt_mask, torch.where(keep, responses, off), keep)

        return generate_and_cut

    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--reward-model",
        smoke / "rm",
        "--iterations",
        2,
        "--whiten-rewards",
    ]
    for name in ("pad", "junk"):
        monkeypatch.setattr(train_ppo, "generate", cut(name == "junk"))
        assert run("train_ppo", *options, "--out", tmp_path / name) == 0
    clean, poisoned = metrics(tmp_path / "pad"), metrics(tmp_path / "junk")
    assert len(clean) == 2 and clean[0]["val/eos_rate"] == 1 and clean[0]["val/response_length"] < 8
    for a, b in zip(clean, poisoned, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("mode", "sign"), [("replace", 0), ("subtract", 1)])
def test_D9_missing_eos_lowers_the_score(smoke, run, metrics, tmp_path, mode, sign):
    """Two tokens of an untrained policy: hardly a response ends."""
    options = [
        *SMALL,
        "--init",
        smoke / "sft",
        "--reward-model",
        smoke / "rm",
        "--iterations",
        1,
        "--response-tokens",
        2,
    ]
    assert (
        run(
            "train_ppo",
            *options,
            "--missing-eos",
            mode,
            "--missing-eos-penalty",
            50,
            "--out",
            tmp_path / "ppo",
        )
        == 0
    )
    (line,) = metrics(tmp_path / "ppo")
    assert line["val/eos_rate"] < 0.2
    expected = sign * line["objective/rm_scores"] - 50 * (1 - line["val/eos_rate"])
    assert line["objective/scores"] == pytest.approx(expected, abs=2 * (line["val/eos_rate"] > 0) + 1e-3)


def test_other_ways_to_run_ppo(smoke, run, metrics, tmp_path):
    """Without an end, with a critic from the SFT model, and left early: the minibatch that went too far is not learnt."""
    options = [
        "--no-stop",
        "--missing-eos",
        "none",
        "--value-init",
        "sft",
        "--clip-range-value",
        "None",
        "--scale",
        "none",
        "--max-approxkl",
        1e-9,
    ]
    inputs = ["--init", smoke / "sft", "--reward-model", smoke / "rm", "--iterations", 2, "--ent-coef", 0.01]
    assert run("train_ppo", *SMALL, *inputs, *options, "--out", tmp_path) == 0
    for line in metrics(tmp_path):
        assert line["val/eos_rate"] == 0 and line["val/response_length"] == 12
        assert line["optimizer_steps"] == 1  # of 4: the second minibatch finds the policy moved
        assert all(math.isfinite(v) for v in line.values())
        assert line["val/clipfrac_avg"] == 0


def test_weighted_rewards_add_up(smoke, run, metrics, tmp_path):
    """As the docstring of train_ppo.py shows it: --reward, repeated."""
    options = [*SMALL, "--init", smoke / "sft", "--reward-model", smoke / "rm", "--iterations", 1]
    more = ["--reward", "rm:2", "--reward", "minirlhf.rewards:length:-3", "--missing-eos", "none"]
    assert run("train_ppo", *options, *more, "--out", tmp_path / "ppo") == 0
    (line,) = metrics(tmp_path / "ppo")
    words = (2 * line["objective/rm_scores"] - line["objective/scores"]) / 3 * 100
    assert 0.5 < words < 13  # a response's mean number of words, of 12 tokens


def test_preferences_train_a_reward_model(smoke, run, tmp_path, metrics, no_baselines):
    texts = [r.response for r in data.load("toy").records]
    rows = [{"prompt": f"{i}:", "chosen": texts[i], "rejected": texts[i + 7]} for i in range(150)]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    assert (
        run(
            "train_rm",
            *SMALL,
            "--data",
            file,
            "--init",
            smoke / "sft",
            "--epochs",
            1,
            "--out",
            tmp_path / "rm",
        )
        == 0
    )
    about = checkpoint.load_config(tmp_path / "rm")
    assert about["normalise"]["mode"] == "scale" and 0 <= about["results"]["test"]["accuracy"] <= 1
    assert "val/accuracy" in metrics(tmp_path / "rm")[-1]


def test_thumbs_train_a_reward_model(smoke, run, tmp_path, metrics, monkeypatch):
    rated = [(r.response, r.rating > 0) for r in data.load("toy").records[::2]]
    rows = [{"prompt": f"{i}:", "completion": f" {text}", "label": up} for i, (text, up) in enumerate(rated)]
    file = jsonl(tmp_path / "thumbs.jsonl", rows)
    options = ["--data", file, "--init", smoke / "sft", "--epochs", 1, "--out", tmp_path / "rm"]
    assert run("train_rm", *SMALL, *options) == 0
    about = checkpoint.load_config(tmp_path / "rm")
    assert about["normalise"] == {"mode": "scale", "scale": None}
    assert 0 <= about["results"]["test"]["auc"] <= 1 and {"accuracy", "auc"} < {*about["results"]["test"]}
    assert {"val/accuracy", "val/auc"} < {*metrics(tmp_path / "rm")[-1]}
    first = metrics(tmp_path / "rm")[0]["train/loss"]
    up = sum(up for _, up in rated) / len(rated)
    entropy = -up * math.log(up) - (1 - up) * math.log(1 - up)
    assert first == pytest.approx(entropy, abs=0.15)  # it starts at the log-odds of all thumbs


def test_names_of_columns_are_recorded_compared_and_read_again(smoke, run, tmp_path, capsys, no_baselines):
    rows = [
        {"q": f"{i}:", "a": r.response, "help": r.rating, "other": 0}
        for i, r in enumerate(data.load("toy").records)
    ]
    file = jsonl(tmp_path / "rated.jsonl", rows[:150])
    options = [*SMALL, "--data", file, "--epochs", 1]
    named = [
        "--prompt-field",
        "q",
        "--response-field",
        "a",
        "--rating-field=help",
        "--rating-scale",
        "-4",
        "4",
    ]
    rm = [*options, *named, "--init", smoke / "sft", "--out", tmp_path / "rm"]
    assert run("train_rm", *rm) == 0
    settings = checkpoint.load_config(tmp_path / "rm")["training"]
    assert settings["fields"] == ["prompt=q", "response=a", "rating=help"]
    assert (
        settings["rating_scale"] == [-4, 4] == checkpoint.load_config(tmp_path / "rm")["normalise"]["scale"]
    )
    assert run("train_rm", *rm) == 0 and "is complete: nothing to do" in capsys.readouterr().out
    unread = [*options, "--rating-scale", 0, 4, "--text-field", "a", "--out", tmp_path / "sft"]
    assert run("train_sft", *unread) == 2
    assert "--rating-scale is for ratings, and" in capsys.readouterr().err
    assert run("train_rm", *rm, "--fields", "genre=other") == 2
    assert "holds a run with another fields" in capsys.readouterr().err
    ppo = [
        *SMALL,
        "--data",
        file,
        *named,
        "--init",
        smoke / "sft",
        "--reward-model",
        smoke / "rm",
        "--iterations",
        1,
    ]
    assert run("train_ppo", *ppo, "--out", tmp_path / "ppo") == 0
    options = [
        "--run",
        tmp_path,
        "--sft",
        smoke / "sft",
        "--policy",
        tmp_path / "ppo",
        "--prompts",
        5,
        "--best-of",
        2,
    ]
    assert run("minirlhf.evaluate", *options) == 0
    dpo = ["--preset", "smoke", "--data", file, *named, "--init", smoke / "sft", "--out", tmp_path / "dpo"]
    assert run("train_dpo", *dpo) == 2  # ratings of one response to each prompt make no pair
    assert "no second response to the prompt" in capsys.readouterr().err


def seen_targets(monkeypatch) -> list[list[float]]:
    """What train_rm.py learns from: the targets of the items that it encodes (train, val, test)."""
    seen, encode = [], data.encode_judged

    def watch(*args):
        items = encode(*args)
        seen.append([train_rm.judgements.target_of(item) for item in items])
        return items

    monkeypatch.setattr(data, "encode_judged", watch)
    return seen


@pytest.mark.parametrize("how", ["mean", "majority", "model"])
def test_votes_by_rater_become_targets(smoke, run, tmp_path, no_baselines, monkeypatch, how):
    """One of three votes for the worse text every time: the model turns them round, and held-out targets stay shares."""
    texts = [r.response for r in data.load("toy").records]
    rows = [{"prompt": f"{i}:", "response_a": texts[i], "response_b": texts[i + 7],
             "votes": {"ann": "ab"[i % 2], "bob": "ab"[i % 2], "eve": "ba"[i % 2]}} for i in range(150)]  # fmt: skip
    file, seen = jsonl(tmp_path / "pairs.jsonl", rows), seen_targets(monkeypatch)
    options = ["--data", file, "--init", smoke / "sft", "--epochs", 1, "--raters", how, "--normalise", "none"]
    assert run("train_rm", *SMALL, *options, "--out", tmp_path / "rm") == 0
    train, val, test = seen
    low, high = {"mean": (0.66, 0.67), "majority": (1, 1), "model": (0.99, 1)}[how]
    assert low <= min(train) and max(train) <= high
    assert [*val, *test] == pytest.approx([2 / 3] * len([*val, *test]))
    found = checkpoint.load_config(tmp_path / "rm")["results"].get("raters", {})
    assert {who: r["reliability"] > 0.5 for who, r in found.items()} == (
        {"ann": True, "bob": True, "eve": False} if how == "model" else {}
    )


def test_ratings_by_rater_become_targets(smoke, run, tmp_path, no_baselines, monkeypatch):
    """The raters of the training items carry the fit; pairs of items of one number each are not limited in levels."""
    rows = [{"text": r.response, "ratings": dict(zip("abcde", [*r.ratings[:4], -r.ratings[4]], strict=True)), "scale": [-4, 4]}
            for r in data.load("toy").records]  # fmt: skip
    file, seen = jsonl(tmp_path / "rated.jsonl", rows), seen_targets(monkeypatch)
    options = [
        "--data",
        file,
        "--init",
        smoke / "sft",
        "--epochs",
        1,
        "--raters",
        "model",
        "--loss",
        "both",
        "--batch",
        312,
    ]
    assert run("train_rm", *SMALL, *options, "--normalise", "none", "--out", tmp_path / "rm") == 0
    records = {split: data.load(file).select(split).records for split in ("train", "val", "test")}
    assert seen[1:] == [[r.rating for r in records[split]] for split in ("val", "test")]
    clean = {r.response: r.rating for r in data.load("toy").records}
    truth = [clean[r.response] for r in records["train"]]
    assert stats.pearson(seen[0], truth) > 0.99 > stats.pearson([r.rating for r in records["train"]], truth)
    slopes = {
        who: r["slope"] for who, r in checkpoint.load_config(tmp_path / "rm")["results"]["raters"].items()
    }
    assert slopes.pop("e") < -0.8 and all(0.8 < slope < 1.2 for slope in slopes.values())


@pytest.mark.parametrize(
    "options", [["--loss", "pairwise", "--batch", 311], ["--warmup", 0, "--batch", 312]], ids=str
)
def test_reward_model_at_the_edges(smoke, run, tmp_path, metrics, no_baselines, options):
    """A last batch of one text makes no pair; no warm-up is a warm-up."""
    out = tmp_path / "rm"
    assert run("train_rm", *SMALL, "--init", smoke / "sft", "--epochs", 1, *options, "--out", out) == 0
    assert all(math.isfinite(v) for line in metrics(out) for v in line.values())


def test_patience(run, metrics, tmp_path):
    """Nothing can get better: the first epoch is the best, and `patience` more are granted."""
    options = ["--lr", 1e-30, "--weight-decay", 0, "--epochs", 6, "--patience", 2, "--out", tmp_path]
    assert run("train_sft", *SFT, *options) == 0
    assert [line["epoch"] for line in metrics(tmp_path)][-1] == 3
    assert checkpoint.load_config(tmp_path)["results"]["best_step"] == 3


def test_going_on_from_a_checkpoint(smoke, run, tmp_path):
    """--init brings weights, shape and tokenizer; what is no part of the shape is still an option."""
    options = [
        "--preset",
        "smoke",
        "--init",
        smoke / "sft",
        "--epochs",
        1,
        "--lr",
        1e-30,
        "--dropout",
        0,
        "--batch",
        312,
    ]
    assert run("train_sft", *options, "--weight-decay", 0, "--samples", 0, "--out", tmp_path) == 0
    assert equal(final(tmp_path), final(smoke / "sft"))
    about, before = (checkpoint.load_config(p) for p in (tmp_path, smoke / "sft"))
    assert about["tokenizer"] == before["tokenizer"]
    assert about["model"] == before["model"] | {"dropout": 0.0}


def test_validation_counts_the_bytes_it_reads(run, tmp_path):
    """A context that cuts every text in half halves the loss and the bytes: bits per byte stay what they are."""
    bits = []
    for context in (16, 64):
        out = tmp_path / str(context)
        assert (
            run(
                "train_sft",
                *SFT,
                "--epochs",
                1,
                "--lr",
                1e-30,
                "--vocab",
                258,
                "--context",
                context,
                "--out",
                out,
            )
            == 0
        )
        bits.append(checkpoint.load_config(out)["results"]["val_bits_per_byte"])
    assert bits[0] == pytest.approx(8, rel=0.1) and bits[1] == pytest.approx(
        8, rel=0.1
    )  # a fresh model knows nothing


# ----------------------------------------------------------------------------- command line


@pytest.mark.parametrize("script", MODULES)
@pytest.mark.parametrize("preset", ["smoke", "demo", "pretrained"])
def test_presets_parse_and_help_lists_every_option(run, capsys, script, preset):
    config = MODULES[script].PRESETS[preset]
    assert config.preset == preset
    assert run(script, "--preset", preset, "--help") == 0
    said = capsys.readouterr().out
    for name in vars(config):
        assert f"--{name.replace('_', '-')}" in said


def test_the_demos_settings_for_a_model_of_others_are_remarked_on():
    config = train_sft.Config()
    remark = claims.demo_settings(config, Path("runs/qwen/base"), {"model": {"n_embd": 1024}})
    assert remark == (
        "note: --lr 0.0012 and the rest of --preset demo are for a small model from scratch, and "
        "runs/qwen/base has 1024 channels: --preset pretrained is for such a model"
    )
    quiet = (
        dataclasses.replace(config, lr=1e-5),
        train_sft.PRESETS["pretrained"],
        train_sft.PRESETS["smollm2"],
    )
    assert not any(claims.demo_settings(c, Path("base"), {"model": {"n_embd": 1024}}) for c in quiet)
    for about in ({"model": {"n_embd": 192}}, {"model": {"n_embd": "192"}}, {"model": None}, {}):
        assert claims.demo_settings(config, Path("base"), about) is None


@pytest.mark.parametrize("script", MODULES)
def test_no_options_mean_the_demo(script):
    module = MODULES[script]
    assert cli.parse_config(module.PRESETS, "", []) == module.PRESETS["demo"] == module.Config()
    smoke = module.PRESETS["smoke"]
    assert cli.parse_config(module.PRESETS, "", ["--preset=smoke"]) == smoke
    changed = cli.parse_config(module.PRESETS, "", ["--seed", "7", "--preset", "smoke"])
    assert changed.seed == 7 and changed.data == "toy"


@pytest.fixture(scope="module")
def mistakes(smoke, tmp_path_factory):
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("mistakes")
    texts = [{"text": f"The plot is odd, {i}."} for i in range(40)]
    jsonl(folder / "bad.jsonl", [texts[0], {"text": 3}, *texts])
    jsonl(folder / "rated.jsonl", [{"text": "a", "rating": 2}, {"text": "b", "rating": "high"}])
    jsonl(folder / "texts.jsonl", texts)
    jsonl(folder / "long.jsonl", [{"prompt": f"{i} " * 200, "completion": "yes"} for i in range(40)])
    jsonl(folder / "pairs.jsonl", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(40)])
    (folder / "empty.jsonl").write_text("")
    for stage in ("sft", "rm"):
        shutil.copytree(smoke / stage, folder / stage, symlinks=True)
        unlisted(folder / stage / "latest" / "config.json")
    Tokenizer.train(["abc abd"], 260).save(
        folder / "sft" / "latest"
    )  # not the one that its weights were trained with
    about = checkpoint.load_config(smoke / "rm")
    (folder / "rm" / "latest" / "config.json").write_text(
        json.dumps(about | {"tokenizer": {"hash": "of another"}})
    )
    return folder


REFUSED = [
    ("train_sft", "--preset hug", r"--preset must be one of demo, smoke, smollm2, pretrained, not 'hug'"),
    ("train_sft", "--lrr 3", r"unknown option --lrr: did you mean --lr\?"),
    ("train_rm", "--epoch 3", r"unknown option --epoch: did you mean --epochs\?"),
    ("train_ppo", "--kl-coeff 3", r"unknown option --kl-coeff: did you mean --kl-coef\?"),
    ("train_ppo", "frobnicate", r"--preset takes one value, not 2: smoke frobnicate"),
    ("train_sft", "--lr x", r"--lr.*'x'"),
    ("train_sft", "--lr 0", r"--lr must be above 0"),
    ("train_sft", "--max-grad-norm -1", r"--max-grad-norm must be at least 0 .*, not -1"),
    ("train_rm", "--batch 30 --microbatch 0", r"--microbatch must be at least 1 .*, not 0$"),
    ("train_ppo", "--batch 10 --minibatch -3", r"--minibatch must be at least 1 .*, not -3$"),
    (
        "train_rm",
        "--resume --overwrite",
        r"--resume continues a run and --overwrite replaces it: give one of them$",
    ),
    ("train_sft", "--lr nan", r"--lr must be above 0 and at most 1e\+09, not nan"),
    ("train_sft", "--epochs", r"--epochs"),
    ("train_sft", "--precision fp8", r"--precision must be one of auto, fp32, bf16, not 'fp8'"),
    ("train_sft", "--batch 30 --microbatch 7", r"--batch 30 is not divisible by --microbatch 7"),
    ("train_sft", "--microbatch 0", r"--microbatch must be at least 1 .*, not 0$"),
    ("train_sft", "--n-head 0", r"--n-head must be at least 1 and at most 1000, not 0$"),
    ("train_sft", "--n-head 5 --vocab 300", r"--n-embd 64 is not divisible by --n-head 5"),
    ("train_sft", "--data {m}/none.jsonl", r"none\.jsonl: no such file"),
    ("train_sft", "--data {m}/bad.jsonl", r"bad\.jsonl:2: text: expected text, got 3$"),
    ("train_sft", "--data {m}/empty.jsonl", r"empty\.jsonl: no usable row"),
    (
        "train_sft",
        "--data {m}/long.jsonl --vocab 300",
        r"nothing to learn in 40 rows: .*dropped \(prompt longer than the context\), .*: use --too-long cut, or",
    ),
    ("train_sft", "--init {m}/none", r"none: no checkpoint here.*--init"),
    ("train_sft", "--init {m}/sft", r"tokenizer does not match"),
    ("train_sft", "--tokenizer {m}/none", r"none"),
    ("train_rm", "", r"run train_sft.py first, or name one with --init"),
    ("train_rm", "--init {s}/sft --members 0", r"--members must be at least 1 and at most 100, not 0$"),
    ("train_rm", "--lowercase 1.5", r"--lowercase must be at least 0 and at most 1, not 1\.5$"),
    ("train_rm", "--lowercase nan", r"--lowercase must be at least 0 and at most 1, not nan$"),
    ("train_rm", "--init {m}/sft", r"tokenizer does not match"),
    ("train_rm", "--init {s}/sft --data {m}/texts.jsonl", r"hold no judgement"),
    (
        "train_rm",
        "--init {s}/sft --data {m}/rated.jsonl",
        r"rated\.jsonl:2: rating: expected finite numbers, got .high.$",
    ),
    ("train_rm", "--init {s}/sft --data {m}/pairs.jsonl --loss both", r"--loss both needs ratings"),
    (
        "train_rm",
        "--init {s}/sft --data {m}/pairs.jsonl --raters model",
        r"needs votes by rater.*--raters mean or majority$",
    ),
    (
        "train_rm",
        "--init {s}/sft --response-tokens 200",
        r"no prompt in 3\d rows: .*leaves no room for the response\): lower --response-tokens",
    ),
    ("train_ppo", "", r"run train_sft.py first, or name one with --init"),
    ("train_ppo", "--init {s}/sft", r"run train_rm.py first, or name one with --reward-model"),
    ("train_ppo", "--init {m}/sft", r"tokenizer does not match"),
    ("train_ppo", "--init {s}/sft --reward-model {m}/rm", r"tokenizer does not match"),
    ("train_ppo", "--init {s}/sft --reward-model {s}/sft", r"a sft checkpoint, not a reward model"),
    (
        "train_ppo",
        "--init {s}/sft --reward-model {s}/rm --monitor {m}/none",
        r"none: no checkpoint.*train_rm.py",
    ),
    (
        "train_ppo",
        "--init {s}/sft --reward-model {s}/rm --data {m}/long.jsonl",
        r"no prompt in 40 rows: 40 dropped \(prompt leaves no room for the response\): .*--too-long cut$",
    ),
    ("train_ppo", "--init {s}/sft --reward-model {s}/rm --reward nope", r"--reward nope: want rm"),
    ("train_ppo", "--batch 10 --minibatch 4", r"--batch 10 is not divisible by --minibatch 4"),
    ("train_ppo", "--minibatch 8 --microbatch 3", r"--minibatch 8 is not divisible by --microbatch 3"),
    ("train_ppo", "--minibatch 0", r"--minibatch must be at least 1 .*, not 0$"),
    ("train_ppo", "--microbatch -1", r"--microbatch must be at least 1 .*, not -1$"),
    ("train_ppo", "--batch 0", r"--batch must be at least 1 .*, not 0$"),
    ("train_ppo", "--save-every 0", r"--save-every must be at least 1 .*, not 0$"),
    ("train_ppo", "--response-tokens 0", r"--response-tokens must be at least 1 .*, not 0$"),
    ("train_ppo", "--temperature 0", r"--temperature must be at least 0\.001"),
    (
        "train_ppo",
        "--no-stop --fused-head on",
        r"--fused-head on never holds the logits that --no-stop takes a token out of: drop one$",
    ),
    ("train_ppo", "--no-stop --missing-eos replace", r"--no-stop .*: add --missing-eos none"),
    ("minirlhf.evaluate", "--run {m}/none", r"none/ppo: no checkpoint here.*run train_ppo.py first"),
    ("minirlhf.evaluate", "--rum x", r"unknown option --rum: did you mean --run\?"),
]


@pytest.mark.parametrize(("script", "options", "said"), REFUSED, ids=[f"{s} {o}" for s, o, _ in REFUSED])
def test_a_mistake_is_one_line_and_leaves_nothing(
    run, capsys, smoke, mistakes, tmp_path, script, options, said
):
    words = options.format(m=mistakes, s=smoke).split()
    if script in MODULES:
        preset = [] if "--preset" in words else ["--preset", "smoke"]
        words = [*preset, *words, "--out", tmp_path / "new" / "out"]
    before = sorted(mistakes.rglob("*"))
    assert run(script, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(said, lines[0]), lines[0]
    assert not any(tmp_path.iterdir()) and sorted(mistakes.rglob("*")) == before


def test_bad_rows_may_be_skipped(run, mistakes, tmp_path):
    assert run("train_sft", *SFT, "--data", mistakes / "bad.jsonl", "--skip-bad", "--out", tmp_path) == 0


def test_the_fused_head_trains_the_same_model(run, tmp_path):
    """With the logits and without: all that differs is rounding."""
    for name in ("on", "off"):
        assert (
            run("train_sft", *SFT, "--out", tmp_path / name, "--fused-head", name, "--precision", "fp32") == 0
        )
    a, b = (checkpoint.load_config(tmp_path / name)["results"]["val_bits_per_byte"] for name in ("on", "off"))
    assert abs(a - b) < 1e-3
