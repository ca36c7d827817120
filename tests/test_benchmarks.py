"""Benchmarks beside a peer: the work that they set up, and that --check says what is below its bound.  Nothing is timed."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ppo
from benchmarks import dpo, estimate, frontier, ppo, rollout, scaling, sft, variants
from minirlhf import algorithms, checkpoint, data
from minirlhf.model import GPT, GPTConfig
from minirlhf.tokenizer import Tokenizer

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
TINY = ppo.SMALL | {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "vocab": 600,
    "batch": 8,
    "minibatch": 4,
    "response": 12,
}


@pytest.mark.parametrize("probability", [0.0, 0.038, 0.5])
def test_the_end_of_text_is_as_likely_everywhere(probability):
    torch.manual_seed(0)
    model = GPT(GPTConfig(600, 64, 2, 2, 32))
    ppo.end_everywhere(model, 599, probability)
    with torch.no_grad():
        found = model.logits(model(torch.randint(600, (8, 20)))).softmax(-1)[..., 599]
    assert found.max() < 1e-9 if not probability else (found / probability - 1).abs().max() < 0.05


def test_lengths_have_the_mean_that_is_promised():
    q, longest = ppo.WORK["lengths"]["end"], ppo.WORK["lengths"]["response"]
    assert (1 - (1 - q) ** longest) / q == pytest.approx(24, abs=0.5)


def test_the_work_of_ppo(tmp_path, metrics):
    """Prompts of 16 tokens, all responses full; optimiser steps and tokens as asserted in `measure`."""
    ppo.prepare(TINY, tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "sft")
    assert tokenizer.vocab_size == 600
    source = data.load(str(tmp_path / "texts.jsonl"), False)
    prompts = data.encode_prompts(tokenizer, source.select("val").records, 15, 99)
    assert len(prompts) > 100 and {len(p) for p in prompts} == {16}
    job = {
        "work": TINY,
        "threads": 1,
        "iterations": 3,
        "folder": str(tmp_path),
        "out": str(tmp_path / "out"),
        "options": [],
    }
    found = ppo.measure(sys.executable, "benchmarks/ppo.py", job)
    assert len(found["iterations"]) == 1 and found["optimizer_steps"] == 3 * 4 * 2 and found["peak_mb"] > 50
    assert checkpoint.load_config(tmp_path / "out")["training"]["lr"] == 1e-5
    with pytest.raises(AssertionError):
        ppo.measure(
            sys.executable,
            "benchmarks/ppo.py",
            job | {"work": TINY | {"end": 0.5}, "out": str(tmp_path / "other")},
        )


def test_the_work_of_grpo(tmp_path, metrics):
    """Two groups of four full responses, a free reward; and no critic or reward model that could cost anything."""
    work = TINY | ppo.GRPO | {"group": 4}
    ppo.prepare(work, tmp_path)
    job = {
        "work": work,
        "threads": 1,
        "iterations": 3,
        "folder": str(tmp_path),
        "out": str(tmp_path / "out"),
        "options": ppo.OURS["fp32"],
    }
    found = ppo.measure(sys.executable, "benchmarks/ppo.py", job)
    assert len(found["iterations"]) == 1 and found["optimizer_steps"] == 3 * 2
    assert found["rows"] == {"read": 3 * 2 * 8, "trained": 3 * 8}
    for line in metrics(tmp_path / "out"):
        assert line["frac_reward_zero_std"] < 1 and "objective/rm_scores" not in line
    chosen = checkpoint.load_config(tmp_path / "out")["algorithm"]
    assert chosen == dataclasses.asdict(algorithms.ALGORITHMS["grpo"]) | {"group": 4}


def test_the_peer_of_grpo(tmp_path):
    """Where an environment with TRL 1.16 is named, it does the work that is asserted."""
    python = os.environ.get("MINIRLHF_PEER_116")
    if not python:
        pytest.skip("set MINIRLHF_PEER_116 to the Python of an environment with requirements-1.16.txt")
    job = {"work": TINY | ppo.GRPO | {"group": 4}, "threads": 1, "iterations": 3, "bf16": False}
    found = ppo.measure(python, ppo.PEERS["grpo"][0], job | {"folder": "", "out": str(tmp_path / "out")})
    assert found["versions"]["trl"] == "1.16.0" and found["rows"] == {"read": 3 * 2 * 8, "trained": 3 * 8}


def test_the_work_of_dpo(tmp_path):
    """All texts have the promised number of tokens, and each step all of its pairs; or `measure` says so."""
    work = {key: TINY[key] for key in dpo.KEYS} | {"pairs": 4}
    dpo.prepare(work, tmp_path, 5)
    job = {
        "work": work,
        "threads": 1,
        "steps": 5,
        "folder": str(tmp_path),
        "out": str(tmp_path / "out"),
        "options": [],
    }
    found = dpo.measure(sys.executable, "benchmarks/dpo.py", job)
    assert len(found["steps"]) == 5 - dpo.WARM_UP and found["steps"][0]["reference"] > 0
    runs = {"TRL": [found], "fp32": [found]}
    text, missed = dpo.report({"small": runs})
    assert missed == [] and text.splitlines()[-1].count("| 1.00 |") == 2
    with pytest.raises(AssertionError):
        other = job | {"work": work | {"response": 13}, "out": str(tmp_path / "other")}
        dpo.measure(sys.executable, "benchmarks/dpo.py", other)


def row(seconds: float, peak: float) -> list[dict]:
    parts = {"rollout": seconds / 4, "score": seconds / 4, "update": seconds / 2, "seconds": seconds}
    return [{"iterations": [parts | {"tokens": 100}], "peak_mb": peak, "cpu_seconds": 9.0}]


def test_ppo_says_what_is_below_its_bound():
    """Bounds are on ratios to the peer of the same run, never on seconds."""
    slow = {"TRL": row(60.0, 1000), "fp32": row(40.0, 500), "bf16": row(25.0, 900)}
    for factor in (1, 10):
        scaled = {
            "small": {
                k: row(v[0]["iterations"][0]["seconds"] * factor, v[0]["peak_mb"]) for k, v in slow.items()
            }
        }
        assert ppo.report(scaled)[1] == []
    # What was tried has no bound.
    assert ppo.report({"small": slow | {"fp32, compiled": row(90.0, 2000)}})[1] == []
    text, missed = ppo.report({"small": slow | {"fp32": row(41.0, 600)}})
    assert "| 1.46 |" in text
    expected = ["small, fp32: seconds 1.46 x, bound 1.5 x", "small, fp32: peak_mb 1.67 x, bound 1.7 x"]
    assert missed == expected


def test_grpo_in_bf16_stands_beside_the_better_peer():
    known = {"TRL, fp32": row(60.0, 900), "TRL, bf16": row(90.0, 800), "fp32": row(30.0, 600)}
    _, missed = ppo.report({"small": known | {"bf16": row(22.0, 400)}}, "grpo")
    assert missed == ["small, bf16: seconds 2.73 x, bound 2.8 x"]
    assert (
        ppo.report({"small": known | {"fp32": row(30.0, 500), "TRL, bf16": row(10.0, 100)}}, "grpo")[1] == []
    )


def test_tables_leave_out_variants_that_exist_no_more():
    """Their raw results stay in the file, as history, and the table is of what a user can run today."""
    known = {"small": {"TRL": row(60.0, 1000), "fp32": row(40.0, 500), "shared trunk, bf16": row(15.0, 400)}}
    assert ppo.report(known)[0] == ppo.report({"small": {k: known["small"][k] for k in ("TRL", "fp32")}})[0]
    curve = {"1": {measure: [1.0] * variants.LAST for measure in variants.MEASURES}}
    kept = {"four models, fp32": curve}
    assert variants.rows_of(kept | {"shared trunk, bf16": curve}) == variants.rows_of(kept)


def test_rollout_and_sft_say_what_is_below_its_bound():
    of = lambda seconds: [{"seconds": [seconds], "tokens": 90}]
    _, missed = rollout.report(
        {"small": {rollout.BASE: of(2.0), "ours, fp32": of(1.0), "ours, bf16": of(0.9)}}
    )
    assert missed == ["small, ours, bf16: 2.22 x, bound 2.3 x"]
    of = lambda median, loss: [{"median": median, "tokens": 90, "loss": loss}]
    _, missed = sft.report(
        {"nanoGPT, fp32": of(1.0, 1.5), "ours, fp32": of(1.1, 1.5), "ours, bf16": of(0.5, 1.6)}
    )
    assert [m.split(":")[0] for m in missed] == ["ours, fp32", "ours, bf16"]


def test_scaling_changes_one_number_at_a_time():
    assert all(ppo.SMALL[axis] in values for axis, values in scaling.AXES.items())
    table = scaling.rows_of("vocab", {"1024": row(2.0, 100)[0], "4096": row(3.0, 100)[0]})
    assert table.startswith("| vocabulary |") and len(table.splitlines()) == 4


def test_the_page_on_scaling_holds_what_its_command_prints(monkeypatch):
    raw = (ROOT / "benchmarks/results/estimate_shard.txt").read_text().strip()
    page = (ROOT / "docs/scaling.md").read_text()
    assert f"\n\n{raw}\n\n" in page
    words = re.search(r"`python (benchmarks/estimate.py --shard .*?)`", page)[1].split()
    monkeypatch.setattr(sys, "argv", words)
    printed = []
    monkeypatch.setattr(estimate, "LARGE", dict([next(iter(estimate.LARGE.items()))]))
    monkeypatch.setattr("builtins.print", lambda text: printed.append(text))
    estimate.main()
    assert printed[0].splitlines() == raw.splitlines()[:6]


def test_estimates_of_larger_models():
    block = estimate.block_bytes(GPTConfig(50, 64, 12, 4, 64), False) / 64
    assert 25 < block < 50  # bf16: 16 numbers a channel, and attention's
    assert (
        2 * 64 < estimate.block_bytes(GPTConfig(50, 64, 12, 4, 64), True) < 5 * 64
    )  # its input, and the last norm's
    parser = {"batch": 64, "minibatch": 16, "microbatch": 4, "prompt": 16, "response": 16, "epochs": 1, "share": 0.4,
              "gpu_tflop_s": 989, "gpu_tb_s": 3.35, "link_gb_s": 100}  # fmt: skip
    args = type("Args", (), parser)
    shape = estimate.SHAPES["124M (GPT-2)"]
    whole, again, few, lora, lora_again = (
        estimate.needs(shape, variant, args, 1) for variant in estimate.VARIANTS.values()
    )
    n = 124_439_808  # GPT-2's parameters
    assert 2 * n * 16 < whole[0] < 2 * n * 16 + 2e9
    assert few[0] < again[0] <= whole[0] and 0 < few[1] < whole[1] < again[1]


def test_raw_results_are_of_these_workloads():
    known = json.loads(ppo.RESULTS.read_text())
    for name in ppo.WORK:
        full = ppo.WORK[name]["batch"] * ppo.WORK[name]["response"]
        for runs in known[name].values():
            found = [i for run in runs for i in run["iterations"]]
            assert len(runs) >= 2 and all(math.isfinite(i["seconds"]) and i["tokens"] <= full for i in found)


def test_options_of_train_ppo_that_benchmarks_use_exist():
    used = [*(ppo.OURS | ppo.TRIED).values(), *variants.VARIANTS.values()]
    options = {word.lstrip("-").replace("-", "_") for words in used for word in words if word[0] == "-"}
    assert options <= {f for f in train_ppo.Config.__dataclass_fields__}


def test_tables_without_results_say_so(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/ppo.py", "--tables", "--out", tmp_path / "none.json"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "no results yet" in done.stderr


@pytest.mark.parametrize("best_of_n", [True, False])
def test_the_forms_of_gao_are_found_again(best_of_n):
    kls = [0.3, 1.0, 2.5, 4.0, 9.0]
    d = [math.sqrt(kl) for kl in kls]
    gains = [x * (0.8 - 0.1 * (x if best_of_n else math.log(x))) for x in d]
    assert frontier.fit(kls, gains, best_of_n) == pytest.approx((0.8, 0.1, 0), abs=1e-9)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    scores = {"score": rng.normal(size=(6, 2)), "judge": rng.normal(size=(6, 2))}
    for n in (1, 2, 4, 6):
        want = {name: [] for name in scores}
        for subset in itertools.combinations(range(6), n):
            for prompt in range(2):
                best = max(subset, key=lambda i, prompt=prompt: scores["score"][i, prompt])
                for name, values in scores.items():
                    want[name].append(values[best, prompt])
        found = frontier.best_of(scores, n)
        assert all(found[name] == pytest.approx(np.mean(values)) for name, values in want.items())
