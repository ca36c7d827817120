"""What a GPU would refuse or wait for, on a machine without one: see fake_gpu.py.

The functions `check_...` run on the fake device, in one process of their own that this file starts (the device stays in
a process once it is known).  The stages are run as a user would, one after the other, in another process.
"""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from minirlhf.algorithms import ALGORITHMS

pytestmark = pytest.mark.long

HERE = Path(__file__).resolve().parent
LONGEST = 34  # tokens of a response in the checks: two questions "who still runs?" on a GPU


def start(*argv, timeout=1200) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )


# ------------------------------------------------------------------------- checks, on the fake device


def texts_and_models(device):
    """Prompts with padding on the CPU, a language model, a value model and three reward models on the device."""
    import torch

    from minirlhf.model import GPT, GPTConfig, RewardEnsemble, ValueModel

    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, context=64, n_layer=2, n_head=2, n_embd=16)
    prompts = torch.randint(2, 50, (6, 5))
    prompt_mask = torch.arange(5) >= torch.tensor([0, 2, 0, 1, 4, 3])[:, None]
    models = GPT(config), ValueModel(config, "last+mean"), RewardEnsemble(config, members=3)
    return prompts, prompt_mask, *(model.to(device) for model in models)


def check_mixed_devices_raise(device, waits):
    import torch

    here, there = torch.ones(3), torch.ones(3, device=device)
    index, mask = torch.tensor([0, 2]), torch.tensor([True, False, True])
    for name, mixed in {
        "add": lambda: there + here,
        "where": lambda: torch.where(mask, there, 0.0),
        "cat": lambda: torch.cat([here, there]),
        "index_select": lambda: there.index_select(0, index),
        "masked_fill": lambda: there.masked_fill(mask, 0.0),
        "a tensor on the CPU indexed from the GPU": lambda: here[index.to(device)],
        "matmul": lambda: here @ there,
    }.items():
        try:
            mixed()
        except RuntimeError as error:
            assert "fakegpu:0 and cpu" in str(error), (name, error)
        else:
            raise AssertionError(f"{name} accepted tensors of two devices")
    assert (there + torch.tensor(2.0)).tolist() == [3.0] * 3  # numbers may come from the CPU


def check_waits_are_counted(device, waits):
    import torch

    x, mask = torch.arange(6, device=device), torch.tensor([True, False] * 3).to(device, non_blocking=True)
    y, index = torch.ones(6), torch.tensor([1, 2])
    waits.clear()
    for name, wait in {
        "item": lambda: x[3].item(),
        "if": lambda: bool((x > 2).any()),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "x[mask]": lambda: x[mask],
        "masked_select": lambda: x.masked_select(mask),
        "repeats of unknown sum": lambda: x.repeat_interleave(x),
        "copy into a tensor on the CPU": lambda: y.copy_(x),
        "tensor": lambda: torch.tensor([1.0, 2.0], device=device),
        "to": lambda: y.to(device),
        "index on the CPU": lambda: x[index],
    }.items():
        wait()
        assert waits.total() == 1, (name, dict(waits))
        waits.clear()
    index = index.to(device, non_blocking=True)
    z = torch.zeros(6, device=device)
    z[mask] = 2.0
    z[index] = torch.full((2,), 3.0, device=device)
    torch.where(mask, z, 0.0).masked_fill(~mask, 1.0).cumsum(0).argsort()[:2].repeat_interleave(2)
    z.masked_scatter(mask, torch.arange(6.0, device=device)).index_put((index,), z[:2])
    assert not waits, dict(waits)


def check_forward_waits_once_for_each_mask_on_the_gpu(device, waits):
    import torch

    tokens, mask, gpt, critic, ensemble = texts_and_models(device)
    tokens, wanted = tokens.to(device), mask & (torch.arange(5) > 2)
    on_gpu, wanted_on_gpu = mask.to(device), wanted.to(device)
    waits.clear()
    hidden = gpt(tokens, mask, wanted=wanted)
    values = critic(tokens, mask)
    scores, disagreement = ensemble(tokens, mask)
    (hidden.sum() + values.sum() + scores.sum() + disagreement.sum()).backward()
    assert not waits, dict(waits)
    for forward, n in (
        (lambda: gpt(tokens, on_gpu), 1),
        (lambda: gpt(tokens, on_gpu, wanted=wanted_on_gpu), 2),
        (lambda: gpt(tokens), 0),
        (lambda: critic(tokens, on_gpu), 1),
        (lambda: ensemble(tokens, on_gpu), 1),
    ):
        again = forward()
        assert waits.total() == n, (n, dict(waits))
        waits.clear()
    assert torch.equal(again[0].cpu(), scores.cpu())


def check_attention_reads_packed_tokens_without_a_wait(device, waits):
    """In every layer, forward and backward; hidden states and gradients are those of padded rows."""
    import fake_gpu

    tokens, mask, gpt, *_ = texts_and_models(device)
    tokens, found = tokens.to(device), {}
    for path in ("packed", "padded"):
        gpt.zero_grad()
        waits.clear(), fake_gpu.counts.clear()
        with fake_gpu.padded() if path == "padded" else contextlib.nullcontext():
            hidden = gpt(tokens, mask)
            hidden.sin().sum().backward()
        assert not waits, dict(waits)
        assert fake_gpu.counts["packed"] == (2 if path == "packed" else 0)  # layers
        found[path] = [hidden.cpu(), *(p.grad.cpu() for p in gpt.parameters() if p.grad is not None)]
    for packed, padded in zip(found["packed"], found["padded"], strict=True):
        assert (packed - padded).norm() <= 1e-6 * (padded.norm() + 1)
    fake_gpu.counts.clear()
    gpt(tokens)  # no padding: torch's own attention
    assert fake_gpu.counts["packed"] == 0


def check_sampling_waits_for_no_single_token(device, waits):
    import torch

    from minirlhf.rollout import Sampling, generate

    prompts, mask, gpt, *_ = texts_and_models(device)
    sampling = Sampling(LONGEST, 1.0, eos=1, pad=0, forbidden=1)
    prompts_on_gpu, mask_on_gpu = prompts.to(device), mask.to(device)
    waits.clear()
    texts = generate(gpt, prompts, mask, sampling)
    assert waits.total() == LONGEST // 16, dict(waits)
    waits.clear()
    generate(gpt, prompts_on_gpu, mask_on_gpu, sampling)
    assert waits.total() == 1 + LONGEST // 16, dict(waits)
    assert texts.response_mask.all() and not (texts.responses == 1).any()  # 1 is forbidden
    assert texts.responses.device == texts.prompt_mask.device == device
    ending = generate(gpt, prompts, mask, Sampling(LONGEST, 1.0, eos=int(texts.responses[0, 3]), pad=0))
    assert not ending.response_mask.all()
    greedy = generate(gpt, prompts, mask, Sampling(6, 0.0, eos=1, pad=0))
    on_cpu = generate(gpt.cpu(), prompts, mask, Sampling(6, 0.0, eos=1, pad=0))
    assert torch.equal(greedy.responses.cpu(), on_cpu.responses)


def check_a_step_of_fixed_shape_waits_for_nothing(device, waits):
    """What --compile compiles: rows that ended stay in the cache, and the tokens are the plain step's."""
    import torch

    from minirlhf.rollout import Sampling, generate
    from minirlhf.support.decode import Decoder

    prompts, mask, gpt, *_ = texts_and_models(device)
    greedy = Sampling(LONGEST, 0.0, eos=tuple(range(1, 6)), pad=0)
    plain = generate(gpt, prompts, mask, greedy)
    gpt.decoder = Decoder(gpt, lambda step: step)
    for _ in range(2):
        waits.clear()
        found = generate(gpt, prompts, mask, greedy)
        assert waits.total() <= LONGEST // 16, dict(waits)
        assert torch.equal(found.responses.cpu(), plain.responses.cpu())
    assert gpt.decoder.compiled == 1


def check_scoring_and_update_wait_once_per_rollout(device, waits):
    import torch

    from minirlhf.rollout import Sampling, by_microbatch, generate, response_logprobs, response_values

    prompts, mask, gpt, critic, _ = texts_and_models(device)
    for fused in (False, True):
        sampling = Sampling(8, 0.7, eos=1, pad=0, fused_head=fused)
        texts = generate(gpt, prompts, mask, sampling)
        waits.clear()
        with torch.no_grad():
            logprobs, entropy = by_microbatch(response_logprobs, gpt, texts, 2, sampling)
            values = by_microbatch(response_values, critic, texts, 2)
        for rows in torch.randperm(6).split(3):
            new, entropy = response_logprobs(gpt, texts[rows], sampling)
            (new.sum() + entropy.sum() + response_values(critic, texts[rows]).sum()).backward()
        assert waits.total() == 1, dict(waits)  # the copy of the mask
        assert logprobs.device == values.device == device


CHECKS = {name: check for name, check in globals().copy().items() if name.startswith("check_")}


def run_checks() -> dict[str, str]:
    """The traceback of each check, or nothing."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import fake_gpu

    failures = {}
    with fake_gpu.fake_gpu() as device:
        for name, check in CHECKS.items():
            fake_gpu.waits.clear()
            try:
                check(device, fake_gpu.waits)
                failures[name] = ""
            except Exception:
                failures[name] = traceback.format_exc()
    return failures


@pytest.fixture(scope="module")
def checked() -> dict[str, str]:
    done = start(__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_fake_gpu(checked, name):
    assert checked[name] == "", f"\n{inspect.getsource(CHECKS[name])}\n{checked[name]}"


# ------------------------------------------------------------------------- the stages, as a user runs them

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
RESPONSE = 20  # tokens at most: one question "who still runs?" on a GPU
SMOKE = ["--preset", "smoke"]
STAGES = {
    "sft": ["train_sft.py", *SMOKE, "--epochs", 1, "--out", "{run}/sft"],
    "rm": ["train_rm.py", *SMOKE, "--epochs", 1, "--batch", 16, "--out", "{run}/rm"],  # validates every 5th step
    **{name: ["train_ppo.py", *SMOKE, "--algorithm", name, "--iterations", 2, "--response-tokens", RESPONSE, "--out", f"{{run}}/{name}"]
       for name in ALGORITHMS},
    "dpo": ["train_dpo.py", *SMOKE, "--out", "{run}/dpo"],
    "online": ["train_dpo.py", *SMOKE, "--online", "--iterations", 6, "--response-tokens", RESPONSE, "--out", "{run}/online"],
    "evaluate": ["-m", "minirlhf.evaluate", "--run", "{run}", "--prompts", 4, "--best-of", 2],
    "chat": ["-m", "minirlhf.chat", "{run}/ppo", "--reward-model", "{run}/rm", "--reference", "{run}/sft", "--explain",
             "--response-tokens", RESPONSE],
    "feedback": ["-m", "minirlhf.feedback", "sample", "{run}/sft", "--store", "{run}/feedback.db", "--prompts", "toy",
                 "--limit", 4, "--response-tokens", RESPONSE, "--reward-model", "{run}/rm", "--by", "score", "--keep", 2],
}  # fmt: skip
SHARDED = {  # on two processes, from the models of the stages above
    "sft, sharded": ["train_sft.py", *SMOKE, "--epochs", 1, "--shard", "--out", "{run}/sharded/sft"],
    "dpo, sharded": ["train_dpo.py", *SMOKE, "--init", "{run}/sft", "--shard", "--out", "{run}/sharded/dpo"],
    **{f"{name}, sharded": ["train_ppo.py", *SMOKE, "--algorithm", name, "--iterations", 2, "--response-tokens", RESPONSE, "--init",
                            "{run}/sft", "--reward-model", "{run}/rm", "--shard", "--out", f"{{run}}/sharded/{name}"]
       for name in ("ppo", "grpo")},
}  # fmt: skip
# Online DPO is not among them: it takes one step per rollout, whose waits are counted above.
TRAINING = ["sft", "rm", "dpo", *ALGORITHMS]
SAVING = ("minirlhf/checkpoint.py", "minirlhf/support/steps.py", "minirlhf/support/shard")  # to the host


LONG = [pytest.param(name, marks=pytest.mark.long) for name in SHARDED]


class Reports(dict):
    """What fake_gpu.py reports of each stage. All stages of one launcher run when the first of them is asked for."""

    def __init__(self, run: Path):
        self.run = run

    def __missing__(self, stage: str) -> dict:
        if stage in SHARDED:
            assert self["rm"]["code"] == 0  # they start from these models
            return self.start(SHARDED, TORCHRUN)[stage]
        return self.start(STAGES, [])[stage]

    def start(self, commands: dict, launcher: list) -> dict:
        words: list[str] = []
        for command in commands.values():
            words += [*(str(word).format(run=self.run) for word in command), "++"]
        done = start(*launcher, HERE / "fake_gpu.py", self.run / "report.json", *words[:-1])
        assert done.returncode == 0, done.stdout + done.stderr
        for name, result in zip(commands, json.loads((self.run / "report.json").read_text()), strict=True):
            self[name] = result | {"output": done.stderr}
        return self


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Reports:
    return Reports(tmp_path_factory.mktemp("fake_gpu"))


def counted(waits: dict[str, int], *files: str) -> dict[str, int]:
    """The waits that these files ask for; no file: all of them."""
    return {line: n for line, n in waits.items() if not files or line.split()[-1].startswith(files)}


def in_training_loop(result: dict) -> dict[str, int]:
    """The waits between the first optimiser step and the last; what checkpoints copy is left out."""
    saved = counted(result["loop"], *SAVING)
    return {line: n for line, n in result["loop"].items() if line not in saved}


@pytest.mark.parametrize("stage", [*STAGES, *LONG])
def test_no_operation_mixes_devices(stages, stage):
    result = stages[stage]
    assert result["code"] == 0, f"{result['error']}\n{result['output'][-3000:]}"
    assert result["counts"].get("forwards", 0) > 5  # it did compute something here


@pytest.mark.parametrize("stage", [*TRAINING, *LONG[:3]])
def test_attention_reads_packed_tokens(stages, stage):
    assert stages[stage]["counts"].get("packed", 0) > 5


@pytest.mark.parametrize("stage", [*STAGES, *LONG])
def test_a_forward_pass_waits_once_at_most(stages, stage):
    result = stages[stage]
    waits = counted(
        result["waits"], "minirlhf/model.py", "minirlhf/support/ragged.py", "minirlhf/support/cache.py"
    )
    assert sum(waits.values()) <= result["counts"].get("forwards", 0), waits


@pytest.mark.parametrize("stage", [*STAGES, *LONG])
def test_a_rollout_waits_for_no_single_token_and_no_single_row(stages, stage):
    """Once for the prompts' mask, every 16th token, once for the texts' mask, and once to decode them."""
    result = stages[stage]
    waits = counted(result["waits"], "minirlhf/rollout.py", "minirlhf/support/draw.py")
    longest = 48 if stage.startswith("sft") else RESPONSE
    assert sum(waits.values()) <= (3 + longest // 16) * result["counts"].get("rollouts", 0), waits


@pytest.mark.parametrize("stage", [*TRAINING, *LONG])
def test_training_waits_three_times_per_optimiser_step(stages, stage):
    """And three times more where ranks agree on whether to stop, to save and to go on."""
    result = stages[stage]
    steps, waits = result["counts"]["steps"] - 1, in_training_loop(stages[stage])
    assert steps > 3
    assert sum(waits.values()) <= (6 if stage in SHARDED else 3) * steps, dict(
        sorted(waits.items(), key=lambda item: -item[1])
    )


@pytest.mark.parametrize("stage", [*TRAINING, *LONG])
def test_training_waits_for_no_copy_from_the_host(stages, stage):
    """Batches are sent with non_blocking=True, and indices into tensors on the device lie there."""
    waits = {line: n for line, n in in_training_loop(stages[stage]).items() if line.startswith("from host")}
    assert waits == {}


if __name__ == "__main__":
    print(json.dumps(run_checks()), flush=True)
    os._exit(0)  # Python's own end has aborted here, seldom: "terminate called without an active exception"
