"""Faults that were found once, each tried again as a user would meet it, and with another example of its kind.

H faults came from trying what people report of other projects, F from kills, damage and fuzz, R from reading.
A test is named by its fault.  This is where each is pinned; the first file named holds most of it.

    H1   test_data: thumbs down are not learnt; here: train_rm.py says what a thumb is
    H2   here
    H3   test_data; here: train_rm.py refuses a file of nothing else
    H4   test_chat_template
    H5   test_convert, test_chat_template
    H6   here; test_checkpoint: refuse_stale
    H7   test_data; here: train_sft.py on bare prompts
    H8   test_convert
    H9   here, as F6
    H10  here; test_data
    H11  test_agreement, test_reward_report, test_data
    H12  here, as F20
    H13  here; test_rewards
    H14  here; test_data
    H15  here; test_data
    H16  here; test_rewards
    H17  test_tokenizer
    H18  tests/feedback
    H19  test_agreement, test_preference, test_data
    H20  here; test_options
    H21  test_data
    M2   here
    R1   test_masked, as F7        R2  test_rollout          R3  here            R4  test_model
    R5   here                      R6  test_ranks            R7  here, as F1     R8  test_convert, as H8
    R9   no test: the demo's peak of memory is measured by hand (docs/speed.md)
    F1   here; test_checkpoint
    F2   here
    F3   here: every command; test_checkpoint: every damage
    F4   here
    F5   here; test_model
    F6   here
    F7   test_masked
    F8   here
    F9   test_checkpoint, test_chat; test_torture: fuzz of everything that is read
    F10  test_checkpoint; test_torture
    F11  tests/feedback: test_server
    F12  tests/feedback: test_server
    F13  here; test_checkpoint
    F14  here; test_checkpoint
    F15  test_options
    F16  test_chat_template, test_layout_stages
    F17  tests/feedback: test_commands
    F18  tests/feedback: test_server
    F19  test_report; test_torture
    F20  here
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf import checkpoint
from minirlhf.measure import baselines
from minirlhf.support import functions, hardware
from minirlhf.support.files import Lock
from tests.by_hand import unlisted

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--preset", "smoke", "--precision", "fp32"]
SFT = [*SMALL, "--n-layer", 1, "--n-embd", 16, "--batch", 104, "--samples", 0]  # 3 steps per epoch, 2 epochs
RM = [*SMALL, "--batch", 78, "--epochs", 1, "--normalise-samples", 8]  # 4 steps
PPO = [*SMALL, "--iterations", 2, "--epochs", 1]
DPO = [*SMALL, "--pairs", 1, "--batch", 78]  # 4 steps
NAMES = ["train_sft", "train_rm", "train_ppo", "train_dpo"]


@pytest.fixture(scope="module", autouse=True)
def no_baselines():
    """The report at the end of train_rm.py is not the subject, and takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "tfidf_ridge", lambda *args, **options: None)
        patch.setattr(baselines, "vader_lexicon", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def home(run, tmp_path_factory) -> Path:
    """A folder with a finished sft and rm.  Read it, do not write to it."""
    home = tmp_path_factory.mktemp("faults") / "home"
    assert run("train_sft", *SFT, "--out", home / "sft") == 0
    assert run("train_rm", *RM, "--out", home / "rm") == 0
    return home


@pytest.fixture
def mine(home, tmp_path) -> Path:
    """The same to write to."""
    return shutil.copytree(home, tmp_path / "mine", symlinks=True)


@pytest.fixture
def stages(home):
    """stages(script) -> (its options, how many steps they take)."""
    inputs = ["--init", home / "sft"]
    return {
        "train_sft": (SFT, 6),
        "train_rm": ([*RM, *inputs], 4),
        "train_dpo": ([*DPO, *inputs], 4),
        "train_ppo": ([*PPO, *inputs, "--reward-model", home / "rm", "--iterations", 3], 3),
    }.__getitem__


@pytest.fixture
def refused(run, capsys):
    """refused(script, *options) -> the one line in which it ends with exit code 2, at whatever moment."""

    def call(script: str, *options) -> str:
        capsys.readouterr()
        assert run(script, *options) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        *before, last = said.splitlines()
        assert last.startswith("error: ") and not any(line.startswith("error: ") for line in before), said
        return last

    return call


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def content(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder but its lock."""
    paths = [p for p in sorted(folder.rglob("*")) if p.name != ".lock"]
    kind = lambda p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
    return {str(p.relative_to(folder)): kind(p) for p in paths}


# ----------------------------------------------------------------------------- options that change what is learnt


@pytest.mark.parametrize("script", NAMES)
def test_H2_no_norm_to_clip_to_is_no_clipping(run, stages, tmp_path, script):
    """--max-grad-norm 0 once trained nothing, and -1 trained backwards."""
    options, _ = stages(script)
    for name, norm in (("none", 0), ("never", 1e9), ("small", 1e-3)):
        assert run(script, *options, "--max-grad-norm", norm, "--out", tmp_path / name) == 0
    assert equal(final(tmp_path / "none"), final(tmp_path / "never"))
    assert not equal(final(tmp_path / "none"), final(tmp_path / "small"))
    assert run(script, *options, "--max-grad-norm", -1, "--out", tmp_path / "backwards") == 2


def test_R3_bf16_that_is_emulated_is_not_chosen(monkeypatch):
    """torch says by default that a GPU of 2017 supports bf16: it emulates it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    emulates = lambda including_emulation=True: asked.append(including_emulation) or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    assert hardware.pick_precision("auto") == "fp32" and asked == [False]
    assert hardware.pick_precision("bf16") == "bf16"


# ----------------------------------------------------------------------------- data


def test_H1_thumbs_are_learnt_as_thumbs_or_as_a_rating_that_is_written_as_one(run, capsys, home, tmp_path):
    rows = [{"prompt": f"Review {i}:", "completion": f" fun {i}", "label": i % 2 == 0} for i in range(60)]
    options = ["--init", home / "sft", "--data", jsonl(tmp_path / "t.jsonl", rows), "--out", tmp_path / "rm"]
    assert run("train_rm", *RM, *options, "--loss", "regression") == 2
    assert "--loss regression needs ratings" in capsys.readouterr().err
    assert run("train_rm", *RM, *options) == 0
    assert "binary loss" in capsys.readouterr().out
    rows = [
        {"prompt": r["prompt"], "response": r["completion"], "rating": int(r["label"]), "scale": [0, 1]}
        for r in rows
    ]
    file = jsonl(tmp_path / "ratings.jsonl", rows)
    options = ["--init", home / "sft", "--data", file, "--out", tmp_path / "rm-ratings"]
    assert run("train_rm", *RM, *options) == 0


def test_H3_a_reward_model_that_could_learn_nothing_is_none(refused, home, tmp_path):
    long = " the plot is odd" * 60
    rows = [
        {"prompt": f"Review {i}:", "chosen": long + " I smiled", "rejected": long + " I slept"}
        for i in range(60)
    ]
    file = jsonl(tmp_path / "late.jsonl", rows)
    told = refused("train_rm", *RM, "--init", home / "sft", "--data", file, "--out", tmp_path / "rm")
    assert "pairs that the cut makes equal" in told and "--context" in told
    assert not (tmp_path / "rm").exists()


@pytest.mark.parametrize(
    "row", [{"prompt": "Question {}?"}, {"prompt": "Question {}?", "completion": " "}], ids=["bare", "empty"]
)
def test_H7_nothing_to_learn_is_said_first(refused, tmp_path, row):
    rows = [{k: v.format(i) for k, v in row.items()} for i in range(80)]
    told = refused("train_sft", *SFT, "--data", jsonl(tmp_path / "p.jsonl", rows), "--out", tmp_path / "sft")
    assert "nothing to learn in " in told and "`completion`" in told and not (tmp_path / "sft").exists()


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_H10_R5_what_became_of_the_prompts_is_said(run, capsys, home, tmp_path, suffix):
    """Prompts in a .txt were cut to four tokens, and a tenth of them was practised on, both unsaid."""
    lines = [f"Please write a long and careful review of film {i}" for i in range(30)]
    file = tmp_path / f"prompts.{suffix}"
    file.write_text(
        "".join((line if suffix == "txt" else json.dumps({"prompt": line})) + "\n" for line in lines)
    )
    options = [
        *PPO,
        "--iterations",
        1,
        "--init",
        home / "sft",
        "--reward-model",
        home / "rm",
        "--save-samples",
        1,
    ]
    assert run("train_ppo", *options, "--data", file, "--out", tmp_path / "ppo") == 0
    cut = " (30 cut: texts to their first 4 tokens)" if suffix == "txt" else ""
    assert f"prompts, all split: 30 rows: 30 used{cut}\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert all(any(line.startswith(row["prompt"]) for line in lines) for row in rows)
    assert all((row["prompt"] in lines) == (suffix == "jsonl") for row in rows)
    assert checkpoint.load_config(tmp_path / "ppo")["rows"]["prompts, all split"]["used"] == 30


def test_R5_of_the_built_in_data_the_validation_split_becomes_prompts(run, capsys, home, tmp_path):
    options = [*PPO, "--iterations", 1, "--init", home / "sft", "--reward-model", home / "rm"]
    assert run("train_ppo", *options, "--out", tmp_path / "val") == 0
    assert "prompts, val split: 400 rows: 37 used" in capsys.readouterr().out
    assert run("train_ppo", *options, "--split", "train", "--out", tmp_path / "train") == 0
    assert "prompts, train split: 400 rows: 312 used" in capsys.readouterr().out


ROWS = {
    "train_sft": {"completion": " great fun"},
    "train_rm": {"chosen": " great", "rejected": " awful"},
    "train_ppo": {},
    "train_dpo": {"chosen": " great", "rejected": " awful"},
}


@pytest.mark.parametrize("script", NAMES)
def test_H14_a_prompt_that_does_not_fit(run, refused, capsys, stages, tmp_path, script):
    """It once ended every stage with advice that could not be followed: three answers, in every script."""
    rows = [{"prompt": f"Review {i}: " + "odd plot " * 300 * (i == 7)} | ROWS[script] for i in range(60)]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    options = [*stages(script)[0], "--data", file]
    told = refused(script, *options, "--too-long", "error", "--out", tmp_path / "error")
    assert f"{file}:8: prompt: " in told and "--too-long drop or cut" in told and "--context" in told
    for name, count in (
        ("drop", ", 1 dropped (prompt "),
        ("cut", " used (1 cut: the beginning of the prompt)"),
    ):
        capsys.readouterr()
        assert run(script, *options, "--too-long", name, "--out", tmp_path / name) == 0
        assert count in capsys.readouterr().out
    assert not equal(final(tmp_path / "drop"), final(tmp_path / "cut"))


@pytest.mark.parametrize(
    "options", [["--context", 1024], ["--vocab", 300], ["--n-layer", 3], ["--tokenizer", "gpt2"]], ids=str
)
def test_H14_what_init_overrides_is_refused(refused, home, tmp_path, options):
    told = refused("train_sft", *SMALL, "--init", home / "sft", *options, "--out", tmp_path / "sft")
    assert f"{options[0]} has no effect with --init" in told


@pytest.mark.parametrize("script", ["train_sft", "train_rm"])
@pytest.mark.parametrize("n", [1, 2, 6, 20])
def test_H15_few_rows(refused, home, tmp_path, script, n):
    """Not "none of 6 rows has split val and one of the genres None"."""
    rows = [{"text": f"The plot number {i} is odd", "rating": 1 + i % 5} for i in range(n)]
    options = [*SFT] if script == "train_sft" else [*RM, "--init", home / "sft"]
    told = refused(script, *options, "--data", jsonl(tmp_path / "few.jsonl", rows), "--out", tmp_path / "out")
    assert f"of {n} rows there are" in told and "A hash of a row's prompt" in told and "None" not in told
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- models, rewards


def test_H16_a_reward_model_with_another_tokenizer_and_a_shorter_context(
    run, refused, metrics, home, tmp_path
):
    """Texts are cut for it and counted; the run once ended in the middle, without a checkpoint."""
    other = ["--vocab", 258, "--context", 30]  # bytes: about three times as many tokens
    assert run("train_sft", *SFT, *other, "--epochs", 1, "--out", tmp_path / "sft") == 0
    assert run("train_rm", *RM, "--response-tokens", 12, "--out", tmp_path / "rm") == 0
    options = [*PPO, "--init", home / "sft", "--reward-model", tmp_path / "rm"]
    assert run("train_ppo", *options, "--out", tmp_path / "ppo") == 0
    assert all(0 < line["objective/rm_cut"] <= 1 for line in metrics(tmp_path / "ppo"))

    same = ["--tokenizer", home / "sft", "--context", 20]  # the policy's tokens: prompt and response must fit
    assert run("train_sft", *SFT, *same, "--epochs", 1, "--out", tmp_path / "short" / "sft") == 0
    short = ["--response-tokens", 4, "--out", tmp_path / "short" / "rm"]
    assert run("train_rm", *RM, *short) == 0
    options = [
        *PPO,
        "--init",
        home / "sft",
        "--reward-model",
        tmp_path / "short" / "rm",
        "--out",
        tmp_path / "no",
    ]
    told = refused("train_ppo", *options, "--response-tokens", 18)
    assert "prompt leaves no room for the response" in told and not (tmp_path / "no").exists()


def test_M2_a_function_alone_needs_no_reward_model(run, refused, metrics, home, tmp_path):
    options = [*PPO, "--init", home / "sft", "--reward", "minirlhf.rewards:length:0.1"]
    assert run("train_ppo", *options, "--out", tmp_path / "ppo") == 0
    for line in metrics(tmp_path / "ppo"):
        assert "objective/rm_scores" not in line and line["objective/scores"] < 2
    for more in (["--reward-model", home / "rm"], ["--disagreement-coef", 1], ["--value-init", "reward"]):
        assert "need --reward rm" in refused("train_ppo", *options, *more, "--out", tmp_path / "no")


BROKEN = {
    "raise": 'raise ConnectionError("judge: reset")',
    "exit": "import sys; sys.exit(0)",
    "text": 'return "great"',
    "count": "return [0.0] * (len(responses) + 1)",
    "nan": 'return [float("nan")] * len(responses)',
    "set": "return set(range(len(responses)))",
    "lazy": "return (1 / 0 for r in responses)",
    "endless": "import itertools; return itertools.repeat(1.0)",
    "odd": "return [type('Odd', (), {'__float__': lambda self: 1 / 0, '__repr__': lambda self: 1 / 0})()] * len(responses)",
}


@pytest.mark.parametrize("how", BROKEN)
def test_H13_a_function_that_fails_late_costs_its_iteration(
    run, refused, stages, metrics, monkeypatch, tmp_path, how
):
    """What is finished is saved, one line names function and iteration, and --resume does that rollout again."""
    code = f"calls = 0\ndef f(prompts, responses):\n    global calls\n    calls += 1\n    if calls == FAIL:\n        {BROKEN[how]}\n"
    (tmp_path / "late_rule.py").write_text(f"FAIL = 2\n{code}    return [0.1 * len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_rule", raising=False)
    options = [*stages("train_ppo")[0], "--reward", "rm", "--reward", "late_rule:f"]
    told = refused("train_ppo", *options, "--out", tmp_path / "ppo")
    assert told.startswith("error: --reward late_rule:f") and "(ppo, step 2; " in told and "--resume" in told
    assert "reset" in told or how != "raise"
    about = checkpoint.load_config(tmp_path / "ppo")
    assert about["step"] == 1 and not about["complete"]
    if how == "raise":
        assert run("train_ppo", *options, "--out", tmp_path / "ppo", "--resume") == 0
        sys.modules["late_rule"].FAIL = None
        assert run("train_ppo", *options, "--out", tmp_path / "whole") == 0
        assert equal(final(tmp_path / "ppo"), final(tmp_path / "whole"))
        assert metrics(tmp_path / "ppo") == metrics(tmp_path / "whole")


def test_H13_what_a_function_does_to_its_arguments_later_changes_nothing(run, stages, monkeypatch, tmp_path):
    code = (
        "kept = []\ndef f(prompts, responses):\n    for old in kept: old.clear()\n    kept.extend([prompts, responses])\n"
        "    return [0.1 * len(r) for r in responses]\n"
        "def g(prompts, responses):\n    found = [0.1 * len(r) for r in responses]\n    responses.clear(); prompts.append('')\n    return found\n"
        "def h(prompts, responses):\n    return [0.1 * len(r) for r in responses]\n"
    )
    (tmp_path / "greedy_rule.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "greedy_rule", raising=False)
    for name in "fgh":
        options = [
            *stages("train_ppo")[0],
            "--reward",
            f"greedy_rule:{name}",
            "--reward",
            "minirlhf.rewards:repetition",
        ]
        options = [w for w in options if not str(w).endswith("/rm") and w != "--reward-model"]
        assert run("train_ppo", *options, "--save-samples", 1, "--out", tmp_path / name) == 0
    assert equal(final(tmp_path / "f"), final(tmp_path / "h")) and equal(
        final(tmp_path / "g"), final(tmp_path / "h")
    )
    assert (tmp_path / "f/samples.jsonl").read_text() == (tmp_path / "h/samples.jsonl").read_text()


# ----------------------------------------------------------------------------- numbers that are no numbers


@pytest.mark.parametrize(
    ("script", "options", "named"),
    [
        ("train_sft", ["--lr", 1e9], "gradient norm is nan"),
        ("train_sft", ["--lr", 1e9, "--batch", 1000, "--epochs", 1], "validation_loss: not finite"),
        ("train_rm", ["--lr", 1e9], "not finite|gradient norm is nan"),
        ("train_rm", ["--lr", 1e9, "--batch", 1000, "--epochs", 1], "scores: not finite"),
        ("train_ppo", ["--lr", 1e4, "--value-lr", 1e4, "--iterations", 8], "is nan|not finite"),
        ("train_ppo", ["--value-lr", 1e9], "is nan|is inf|not finite"),
    ],
    ids=str,
)
def test_F20_H12_what_diverged_is_no_checkpoint(refused, stages, tmp_path, script, options, named):
    """It once was a bare IndexError of the sampler, or a complete checkpoint that holds nan."""
    told = refused(script, *stages(script)[0], *options, "--out", tmp_path / "out")
    assert any(word in told for word in named.split("|")), told
    assert "lower" in told and "step " in told and "no checkpoint yet" in told
    assert not (tmp_path / "out" / "latest").exists()


def test_F20_the_last_good_checkpoint_stays(refused, monkeypatch, stages, tmp_path):
    """Scores turn to nan in iteration 3 of a run that saved iteration 2, and a weight in the last step of another."""
    (tmp_path / "nan_rule.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls = []

    def poisoned(*args):
        calls.append(1)
        return [float("nan" if len(calls) == 3 else 1)] * len(args[1])

    monkeypatch.setattr(
        functions, "call", lambda function, prompts, responses, *rest: poisoned(prompts, responses)
    )
    options = [
        *stages("train_ppo")[0],
        "--save-every",
        1,
        "--reward",
        "nan_rule:f",
        "--out",
        tmp_path / "ppo",
    ]
    options = [w for w in options if not str(w).endswith("/rm") and w != "--reward-model"]
    told = refused("train_ppo", *options)
    assert "scores: not finite" in told and "the last checkpoint is that of step 2" in told
    assert checkpoint.load_config(tmp_path / "ppo")["step"] == 2
    assert all(w.isfinite().all() for w in final(tmp_path / "ppo").values())


def test_F20_weights_are_looked_at_before_they_are_saved(refused, monkeypatch, stages, tmp_path):
    """The last step may be the one that is too large, and no loss is computed after it."""
    step = torch.optim.AdamW.step

    def too_large(self, *args, **options):
        step(self, *args, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", too_large)
    options, _ = stages("train_ppo")
    told = refused("train_ppo", *options, "--iterations", 1, "--minibatch", 16, "--out", tmp_path / "ppo")
    assert "weights of the model: too large, or not finite" in told and "no checkpoint yet" in told
    assert not (tmp_path / "ppo" / "latest").exists()


# ----------------------------------------------------------------------------- what a run starts from


def test_H6_a_finished_stage_compares_what_it_was_made_from(run, refused, capsys, mine, tmp_path):
    """It once said "is complete: nothing to do" though the data, or the model below, was another."""
    rows = [{"prompt": f"Review {i}:", "chosen": " great fun", "rejected": " awful mess"} for i in range(120)]
    options = [
        *RM,
        "--init",
        mine / "sft",
        "--data",
        jsonl(tmp_path / "c.jsonl", rows),
        "--out",
        tmp_path / "rm",
    ]
    assert run("train_rm", *options) == 0
    assert run("train_rm", *options) == 0 and "complete: nothing to do" in capsys.readouterr().out
    before = content(tmp_path / "rm")
    turned = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    jsonl(tmp_path / "c.jsonl", turned)
    for more in ([], ["--resume"]):
        assert "was made from another data (sha256 " in refused("train_rm", *options, *more)
    assert content(tmp_path / "rm") == before
    assert run("train_rm", *options, "--overwrite") == 0


def test_H6_F4_a_model_below_is_trained_again(run, refused, home, mine):
    """Under a finished reward model, and under a policy that was interrupted: of all three checkpoints it reads."""
    shutil.copytree(mine / "rm", mine / "judge", symlinks=True)
    inputs = ["--init", mine / "sft", "--reward-model", mine / "rm", "--monitor", mine / "judge"]
    ppo = [*PPO, *inputs, "--iterations", 3, "--save-every", 1, "--out", mine / "ppo"]
    assert run("train_ppo", *ppo, stop_at=1) == 130
    before = content(mine / "ppo")
    for stage, name in (("judge", "monitor"), ("rm", "reward model")):
        assert (
            run("train_rm", *RM, "--seed", 9, "--init", mine / "sft", "--out", mine / stage, "--overwrite")
            == 0
        )
        assert f"was made from another {name} (sha256 " in refused("train_ppo", *ppo, "--resume")
        shutil.rmtree(mine / stage)
        shutil.copytree(home / "rm", mine / stage, symlinks=True)
    assert run("train_sft", *SFT, "--seed", 9, "--vocab", 300, "--out", mine / "sft", "--overwrite") == 0
    assert f"{mine / 'rm'} was trained from " in refused("train_ppo", *ppo, "--resume")
    assert "was made from another init (sha256 " in refused("train_rm", *RM, "--out", mine / "rm")
    told = refused("train_ppo", *PPO, "--out", mine / "fresh")
    assert f"{mine / 'rm'} was trained from {mine / 'sft'}" in told and "as it was before" in told
    assert content(mine / "ppo") == before and not (mine / "fresh").exists()


@pytest.mark.parametrize("change", ["replaced", "one more file"])
def test_F4_data_that_changed_under_resume(run, refused, tmp_path, change):
    rows = [{"text": f"The plot of film {i} is {('odd', 'great')[i % 2]}."} for i in range(200)]
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "a.jsonl", rows)
    options = [*SFT, "--batch", 50, "--data", tmp_path / "data", "--out", tmp_path / "sft"]
    assert run("train_sft", *options, stop_at=2) == 130
    before = content(tmp_path / "sft")
    jsonl(tmp_path / "data" / ("a.jsonl" if change == "replaced" else "b.jsonl"), rows[:-1])
    assert "was made from another data" in refused("train_sft", *options, "--resume")
    assert content(tmp_path / "sft") == before


# ----------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def stopped(run, home, tmp_path_factory):
    """stopped(script) -> (options, OUT stopped before its end, OUT of the same run that was not stopped)."""
    done = {}
    inputs = ["--init", home / "sft"]
    options = {
        "train_sft": SFT,
        "train_rm": [*RM, *inputs],
        "train_dpo": [*DPO, *inputs],
        "train_ppo": [*PPO, *inputs, "--reward-model", home / "rm", "--iterations", 3, "--save-samples", 1],
    }

    def once(script: str):
        if script not in done:
            folder = tmp_path_factory.mktemp("stopped")
            assert run(script, *options[script], "--out", folder / "whole") == 0
            assert run(script, *options[script], "--out", folder / "stopped", stop_at=2) == 130
            done[script] = options[script], folder / "stopped", folder / "whole"
        return done[script]

    return once


def lose_link(out: Path) -> None:
    (out / "latest").unlink()


def lose_step(out: Path) -> None:
    (out / "latest").unlink()
    (out / "latest").symlink_to("step-000099")


def link_to_itself(out: Path) -> None:
    (out / "latest").unlink()
    (out / "latest").symlink_to("latest")


def link_as_a_file(out: Path) -> None:
    (out / "latest").unlink()
    (out / "latest").write_text("step-000002")


@pytest.mark.parametrize(
    "damage", [lose_link, lose_step, link_to_itself, link_as_a_file], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("script", NAMES)
def test_F1_R7_a_lost_link_is_no_reason_to_start_again(refused, stopped, tmp_path, script, damage):
    """zip, object storage, rsync without -l and FAT lose links: the run once started again and deleted the checkpoint."""
    options, folder, _ = stopped(script)
    out = shutil.copytree(folder, tmp_path / "out", symlinks=True)
    damage(out)
    before = content(out)
    for more in (["--resume"], []):
        told = refused(script, *options, "--out", out, *more)
        assert "holds step-000002" in told and "latest" in told and "--resume goes on" in told
        assert content(out) == before


@pytest.mark.parametrize("name", ["trainer.json", "trainer.safetensors"])
@pytest.mark.parametrize("script", NAMES)
def test_F1_R7_without_its_trainer_files_a_run_is_not_done_again(refused, stopped, tmp_path, script, name):
    options, folder, _ = stopped(script)
    out = shutil.copytree(folder, tmp_path / "out", symlinks=True)
    (out / "latest" / name).unlink()
    before = content(out)
    told = refused(script, *options, "--out", out, "--resume")
    assert name in told and content(out) == before


def test_F1_the_advice_is_right(run, refused, stopped, tmp_path):
    options, folder, whole = stopped("train_sft")
    out = shutil.copytree(folder, tmp_path / "out", symlinks=True)
    lose_link(out)
    told = refused("train_sft", *options, "--out", out, "--resume")
    command = told.partition("checkpoint: ")[2].partition(" and ")[0]
    subprocess.run(command, shell=True, check=True, cwd=ROOT)
    assert run("train_sft", *options, "--out", out, "--resume") == 0
    assert equal(final(out), final(whole))


@pytest.mark.parametrize("script", NAMES)
def test_F2_F13_no_room_at_a_resume_costs_no_history(run, refused, metrics, stopped, tmp_path, script):
    """metrics.jsonl was cut in place; now it is replaced.  Then there is room again, and the run is whole."""
    options, folder, whole = stopped(script)
    out = shutil.copytree(folder, tmp_path / "out", symlinks=True)
    before = content(out)
    for limit in (0, 100, 20_000):  # bytes per file
        with room_for(limit):
            told = refused(script, *options, "--out", out, "--resume")
        assert "File too large" in told and "make room" in told, told
        assert metrics(out)[:2] == metrics(whole)[:2]
        kept = content(out)
        assert {k: v for k, v in kept.items() if k.startswith(("latest", "step"))} == {
            k: v for k, v in before.items() if k.startswith(("latest", "step"))
        }
    assert run(script, *options, "--out", out, "--resume") == 0
    assert equal(final(out), final(whole)) and metrics(out) == metrics(whole)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]


class room_for:
    """No file may grow beyond so many bytes, as on a full disk."""

    def __init__(self, limit: int):
        self.limit = limit

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_F13_a_disk_that_is_full_from_the_start(refused, tmp_path):
    for _ in range(2):
        with room_for(10_000):
            told = refused("train_sft", *SFT, "--out", tmp_path / "sft")
        assert "cannot be written" in told and "make room" in told
        assert {p.name for p in (tmp_path / "sft").iterdir()} == {".lock", "metrics.jsonl"}


@pytest.mark.parametrize("script", NAMES)
def test_F14_a_run_copied_with_its_links_followed_goes_on(run, metrics, stopped, tmp_path, script):
    options, folder, whole = stopped(script)
    out = shutil.copytree(folder, tmp_path / "out", symlinks=False)
    assert not (out / "latest").is_symlink()
    assert run(script, *options, "--out", out, "--resume") == 0
    assert equal(final(out), final(whole)) and metrics(out) == metrics(whole)
    assert (out / "latest").is_symlink() and not (out / "step-000002").exists()


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 64
    file.write_bytes(damaged)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
@pytest.mark.parametrize("script", NAMES)
def test_F3_a_flipped_bit_is_not_resumed_on(refused, stopped, tmp_path, script, name):
    options, folder, _ = stopped(script)
    out = shutil.copytree(folder, tmp_path / "out", symlinks=True)
    flip(out / "latest" / name)
    before = content(out)
    told = refused(script, *options, "--out", out, "--resume")
    assert f"{name}: damaged: its checksum" in told and content(out) == before


def test_F3_F5_no_command_takes_a_damaged_checkpoint(run, refused, mine, monkeypatch, tmp_path):
    """A flipped bit of the weights; and settings that fit a part of them, or none."""
    assert run("train_ppo", *PPO, "--out", mine / "ppo") == 0
    commands = {
        "export": ("minirlhf.interop.command", "export", mine / "sft", tmp_path / "hf"),
        "chat": ("minirlhf.chat", mine / "sft"),
        "evaluate": ("minirlhf.evaluate", "--run", mine),
        "sft": ("train_sft", *SMALL, "--init", mine / "sft", "--out", tmp_path / "sft"),
        "rm": ("train_rm", *RM, "--init", mine / "sft", "--out", tmp_path / "rm"),
        "ppo": (
            "train_ppo",
            *PPO,
            "--init",
            mine / "sft",
            "--reward-model",
            mine / "rm",
            "--out",
            tmp_path / "ppo",
        ),
    }
    weights, about = mine / "sft" / "latest" / "model.safetensors", mine / "sft" / "latest" / "config.json"
    good = weights.read_bytes(), about.read_text()
    about.write_text(good[1].replace('"norm_eps": 1e-05', '"norm_eps": 1e-02'))
    for name, command in commands.items():
        assert "config.json: damaged: its checksum" in (told := refused(*command)), (name, told)
    unlisted(about)  # whoever changes the file on purpose is told to do so

    def changed(**fields) -> None:
        config = json.loads(good[1])
        about.write_text(json.dumps(config | {"model": config["model"] | fields}))

    for damage, named in (
        (lambda: flip(weights), "checksum"),
        (lambda: changed(n_layer=0), "n_layer"),
        (lambda: changed(n_layer=2), "weights do not fit|missing"),
        (lambda: changed(vocab_size=10), "weights do not fit|vocab"),
        (lambda: changed(norm_eps=float("nan")), "norm_eps"),
        (lambda: changed(mlp="relu"), "mlp"),
    ):
        damage()
        for name, command in commands.items():
            told = refused(*command)
            assert any(word in told for word in named.split("|")), (name, told)
        weights.write_bytes(good[0])
        about.write_text(good[1])
    assert not any(tmp_path.glob("[hsrp]*")) and run(*commands["export"]) == 0

    flip(mine / "rm" / "latest" / "model.safetensors")
    for name in ("evaluate", "ppo"):
        assert "checksum" in refused(*commands[name])


# ----------------------------------------------------------------------------- --out


def test_H20_an_out_that_cannot_be_is_refused_before_anything_runs(refused, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for script in NAMES:
        for out in (
            tmp_path / "file",
            tmp_path / "file" / "x",
            "/proc/x/sft",
            "/dev/null",
            tmp_path / ("x" * 300),
        ):
            told = refused(script, *SMALL, "--out", out)
            assert f"{out}: cannot be made or written (" in told and told.endswith("choose another --out")
            assert capsys.readouterr().out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=str)
def test_H20_an_out_with_files_of_others_is_refused(refused, home, tmp_path, more):
    """A downloaded model named by --out instead of --init lost its weights at the first save."""
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        told = refused("train_rm", *RM, "--init", home / "sft", "--out", tmp_path / name, *more)
        assert f"holds a {name} that is no run's" in told
        assert content(tmp_path / name) == {name: b"mine"}


def test_H20_overwrite_replaces_runs_of_its_stage_alone(run, refused, mine):
    """--out runs/demo/sft, mistyped, once replaced the model that the run started from."""
    before = content(mine)
    for script, out in (("train_rm", "sft"), ("train_ppo", "rm"), ("train_ppo", "sft")):
        told = refused(script, *SMALL, "--init", mine / "sft", "--overwrite", "--out", mine / out)
        assert f"holds a checkpoint of stage {out}: choose another --out" in told
    told = refused("train_sft", *SMALL, "--init", mine / "sft", "--overwrite", "--out", mine / "sft")
    assert "where this run would replace it" in told
    told = refused(
        "train_sft", *SMALL, "--init", mine / "sft" / "latest", "--overwrite", "--out", mine / "sft"
    )
    assert "where this run would replace it" in told
    assert content(mine) == before


def test_H20_folders_beside_a_run_are_kept(run, tmp_path):
    for name in ("two-step-training", "step-by-step", "step-notes", ".step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = content(tmp_path)
    assert run("train_sft", *SFT, "--epochs", 1, "--out", tmp_path) == 0
    assert before.items() <= content(tmp_path).items()


# ----------------------------------------------------------------------------- processes


def test_F8_a_signal_while_ranks_agree_is_not_forgotten(run, stages, monkeypatch, tmp_path):
    """It arrives after this rank has said that nobody asked to stop: the run stops one step later."""
    agree, calls = hardware.Machine.any, []

    def interrupted(self, condition):
        found = agree(self, condition)
        calls.append(found)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(hardware.Machine, "any", interrupted)
    options, _ = stages("train_sft")
    assert run("train_sft", *options, "--out", tmp_path) == 143
    assert calls == [False, True] and checkpoint.load_config(tmp_path)["step"] == 2


def test_F6_H9_two_runs_in_one_folder(run, refused, capsys, stages, metrics, tmp_path):
    """The second is refused; the first is told to end and ends in one line; a killed one holds no lock."""
    options, _ = stages("train_ppo")
    options = [*options, "--iterations", 10_000, "--save-every", 1]
    command = [sys.executable, ROOT / "train_ppo.py", *options, "--out", tmp_path / "out"]
    first = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        file, patience = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
        while (
            not (file.exists() and file.stat().st_size)
            and time.monotonic() < patience
            and first.poll() is None
        ):
            time.sleep(0.05)
        for more in (["--resume"], ["--overwrite"], [], ["--seed", 2]):
            told = refused("train_ppo", *options, *more, "--out", tmp_path / "out")
            assert "another process is at work here: wait for it, or choose another --out" in told
        first.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=120)[1]
        assert first.returncode == 143 and "Traceback" not in said, said[-2000:]
        assert said.splitlines()[-1].startswith("stopped at step ") and "--resume" in said.splitlines()[-1]
        steps = [line["step"] for line in metrics(tmp_path / "out")]
        assert (
            steps
            == [*range(1, len(steps) + 1)]
            == [*range(1, checkpoint.load_config(tmp_path / "out")["step"] + 1)]
        )
        Lock(tmp_path / "out").release()
    finally:
        if first.poll() is None:
            first.kill()
            first.wait()


def test_F6_a_lock_dies_with_its_process(tmp_path):
    code = f"from pathlib import Path; from minirlhf.support.files import Lock; lock = Lock(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout.read(1) == b"1"
    with pytest.raises(Exception, match="another process is at work here"):
        Lock(tmp_path)
    holder.kill()
    holder.wait()
    Lock(tmp_path).release()


# ----------------------------------------------------------------------------- this page


def test_every_fault_is_in_the_index():
    ids = {
        word
        for line in __doc__.splitlines()
        for word in line.split()
        if word[0] in "HRFM" and word[1:].isdigit()
    }
    wanted = {*(f"H{i}" for i in range(1, 22)), *(f"R{i}" for i in range(1, 10)), "M2"}
    assert {*wanted, *(f"F{i}" for i in range(1, 21))} <= ids
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    found = {word for name in tests.split("def test_")[1:] for word in name.split("(")[0].split("_")}
    elsewhere = {"H8", "H18", "R6", "R8", "R9", "R1", "F7"}  # named in a docstring, or measured by hand
    assert {i for i in wanted - found} <= elsewhere
