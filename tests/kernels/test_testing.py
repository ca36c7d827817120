"""The tool: what it prints, its exit codes, and that functions of others neither crash it nor slip through."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken import healthy_logprobs

from kernels.tools.properties import PROPERTIES
from kernels.tools.testing import Subject, check, main

ROOT = Path(__file__).resolve().parents[2]


def selective_log_softmax(logits, index):
    """One result, no options, 16 bits stay 16 bits: the signature of a third party."""
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def needs_more(logits, tokens, labels):
    return logits


def fails_on_cpu(logits, tokens):
    raise RuntimeError("Pointer argument cannot be accessed from Triton (cpu tensor?)")


def scalar_loss_kl(logits, ref_logits, tokens):
    return logits.sum()


def flaky_logprobs(logits, tokens, calls=iter(range(10**9))):  # noqa: B008
    return tuple(x - float(next(calls) % 7 == 0) for x in healthy_logprobs(logits, tokens))


def lines(text):
    """status -> {property: detail}"""
    found = {"pass": {}, "FAIL": {}, "-": {}}
    for line in text.splitlines()[1:-1]:
        status, name = line.split()[:2]
        found[status][name.rstrip(":")] = line.partition(": ")[2]
    return found


def test_of_a_third_party(capsys):
    assert main(["test_testing:selective_log_softmax", "--max-examples", "10"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("test_testing:selective_log_softmax as token_logprobs on cpu")
    found = lines(out)
    assert {*found["pass"], *found["FAIL"], *found["-"]} == {*PROPERTIES["token_logprobs"]}
    assert found["-"] == {
        "entropy_lies_between_0_and_log_V": "not asked: no result entropy",
        "temperature_equals_prescaled_logits": "not asked: no parameter temperature",
        "masked_rows_give_0_and_are_never_looked_at": "not asked: no parameter mask",
        "nothing_but_masked_rows_gives_0": "not asked: no parameter mask",
        "block_sizes_do_not_matter": "not asked: no block sizes",
    }
    detail = (
        "logprobs: expected torch.float32, got torch.bfloat16; smallest: seed=0, size=7, dtype=torch.bfloat16"
    )
    assert found["FAIL"] == {"half_precision_inputs_give_fp32_results": detail}
    assert out.splitlines()[-1].startswith("20 passed, 1 failed, 5 not asked")


def test_of_ours():
    command = [sys.executable, "-m", "kernels.testing", "kernels:gae", "--max-examples", "2", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not lines(done.stdout)["FAIL"] and not lines(done.stdout)["-"], (
        done.stdout + done.stderr
    )


MISTAKES = {
    "no module": (["nowhere:gae"], "cannot import nowhere"),
    "no colon": (["kernels.gae"], "not of the form package.module:function"),
    "no function": (["kernels:gea"], "kernels has no gea"),
    "not callable": (["kernels:__all__", "--op", "gae"], "name a function"),
    "unknown op": (["kernels:gae", "--op", "ppo"], "there is no op ppo: choose from token_logprobs, "),
    "unguessable": (["test_testing:needs_more"], "add --op token_logprobs|"),
    "more parameters": (
        ["test_testing:needs_more", "--op", "token_logprobs"],
        "gives no labels: wrap the function",
    ),
    "crashes": (["test_testing:fails_on_cpu", "--op", "token_logprobs"], "cpu tensor?)"),
    "a scalar": (["test_testing:scalar_loss_kl"], "each (2,), not [()]"),
    "no examples": (["kernels:gae", "--max-examples", "0"], "must be at least 1, not 0"),
    "examples in words": (["kernels:gae", "--max-examples", "many"], "must be a whole number, not 'many'"),
    "a negative seed": (["kernels:gae", "--seed", "-1"], "must be at least 0, not -1"),
    "no such option": (
        ["kernels:gae", "--examples", "3"],
        "unrecognized arguments: --examples 3 (--help lists",
    ),
    "an empty option": (["kernels:gae", "--op", ""], "--op: its value is empty"),
    "no target": ([], "the following arguments are required: package.module:function"),
}


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_take_one_line(capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and words in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert main(["kernels:gae", "--device", "cuda"]) == 2
    assert "torch sees no GPU: leave --device out" in capsys.readouterr().err


def test_failures_that_come_and_go_are_failures():
    outcome = check(Subject(flaky_logprobs, "token_logprobs"), "agrees_with_float64", max_examples=100)
    assert outcome.status == "FAIL"


def test_failures_are_small_and_the_same_for_the_same_seed():
    first = Subject(lambda logits, tokens: logits[..., 0], "token_logprobs")
    details = {check(first, "agrees_with_float64", 50, seed=3).detail for _ in range(2)}
    assert len(details) == 1 and "rows=1, scale=3.0, temperature=1.0, masked=False" in details.pop()
