"""--shard: models split over two processes compute what one process computes, save it and go on from it."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.testing._internal.distributed.fake_pg
from safetensors.torch import load_file

from benchmarks import estimate
from minirlhf import UserError, optim
from minirlhf.model import GPT, GPTConfig, RewardEnsemble, ValueModel
from minirlhf.support import elastic, hardware, shard, shard_files
from tests.gradients import agree, gradients
from tests.test_ranks import INPUTS, RM, SMALL, TINY, choices, same_tokens, that_matter
from tests.two_ranks import bytes_after_steps, start, steps

pytestmark = pytest.mark.long

TINY_GPT = GPTConfig(vocab_size=50, context=16, n_layer=2, n_head=2, n_embd=16)
ROOT = Path(__file__).resolve().parents[1]
JUDGED = ["--monitor", "{judge}"]
CASES = {
    # 311 of 312 texts a batch: the other batch holds one, so a rank has none; and validation's parts differ.
    "sft": ("train_sft", [*TINY, "--batch", "311"]),
    # 39 texts on a rank and 38 on the other: eight parts on both, of which one may be empty.
    "sft, parts": ("train_sft", [*TINY, "--batch", "77", "--microbatch", "1", "--epochs", "1", "--fused-head", "on"]),
    "rm, both": ("train_rm", [*RM, "--loss", "both", "--batch", "311", "--head", "linear"]),
    "rm, choices": ("train_rm", [*RM, "--data", "{choices}", "--batch", "49", "--members", "2", "--normalise", "bias"]),
    "rm, lora": ("train_rm", [*RM, "--batch", "100", "--lora", "4", "--members", "2"]),
    "dpo": ("train_dpo", [*SMALL, "--pairs", "1", "--batch", "311", "--epochs", "2"]),
    "dpo, parts": ("train_dpo", [*SMALL, "--pairs", "1", "--batch", "51", "--microbatch", "5"]),
    "ppo": ("train_ppo", [*SMALL, *JUDGED]),
    "ppo, whitened rewards": ("train_ppo", [*SMALL, "--whiten-rewards", "--iterations", "3", "--max-approxkl", "0.001"]),
    "ppo, lora": ("train_ppo", [*SMALL, "--iterations", "2", "--lora", "4", "--gradient-checkpointing"]),
    "ppo, last layers": ("train_ppo", [*SMALL, "--iterations", "2", "--train-layers", "1"]),
    "ppo, recomputed": ("train_ppo", [*SMALL, "--iterations", "2", "--gradient-checkpointing", "--microbatch", "4"]),
    "ppo, implicit reward": ("train_ppo", [*SMALL, "--iterations", "2", "--reward-model", "{dpo}"]),
    "grpo": ("train_ppo", [*SMALL, "--iterations", "2", "--algorithm", "grpo"]),
    "rloo": ("train_ppo", [*SMALL, "--iterations", "2", "--algorithm", "rloo"]),
}  # fmt: skip
SAMPLED = {  # by the models themselves, so on two processes both times
    "ppo, sampled": ("train_ppo", [*SMALL, "--iterations", "2"]),
    "dpo, online, sampled": (
        "train_dpo",
        ["--preset", "smoke", "--online", "--iterations", "2", "--batch", "8"],
    ),
    "sft, dropout, sampled": ("train_sft", [*SMALL, "--epochs", "1", "--samples", "3"]),
    "ppo, bf16, sampled": ("train_ppo", ["--preset", "smoke", "--precision", "bf16", "--iterations", "2"]),
}
WIDE = [
    "--preset",
    "smoke",
    "--precision",
    "fp32",
    "--n-embd",
    "128",
    "--batch",
    "104",
    "--epochs",
    "1",
    "--samples",
    "0",
]
MEMORY = {
    "memory, sft": ("train_sft", WIDE),
    "memory, ppo": ("train_ppo", [*SMALL, "--iterations", "1", "--response-tokens", "4"]),
}
HALVES = {
    "half, sft": (
        "train_sft",
        [*SMALL, "--n-embd", "16", "--dropout", "0", "--batch", "64", "--epochs", "1", "--samples", "0"],
    ),
    "half, ppo": ("train_ppo", SMALL),
    "half, rm": ("train_rm", [*RM, "--batch", "100", "--members", "2"]),
}


@pytest.fixture(scope="module")
def options_of(smoke, tmp_path_factory):
    """options_of(case, out) -> (script, options), with the folders that a case names."""
    fill = {name: smoke / name for name in ("sft", "rm", "judge", "dpo")}
    fill["choices"] = choices(tmp_path_factory.mktemp("data") / "choices.jsonl")

    def fill_in(case: tuple, out: Path, *more: str) -> tuple[str, list[str]]:
        script, options = case
        inputs = INPUTS[script] + ["--reward-model", "{rm}"] * ("--online" in options)
        words = [*options, *(inputs[:2] if "--reward-model" in options else inputs)]
        return script, [word.format(**fill) for word in words] + ["--out", str(out), *more]

    return fill_in


@pytest.fixture(scope="module")
def alone(options_of, tmp_path_factory):
    """What one process with --shard leaves half done, under torchrun, and what it makes of it: a folder."""
    home = tmp_path_factory.mktemp("alone")
    runs = [(name, *options_of(case, home / name, "--shard")) for name, case in HALVES.items()]
    start(home, runs, world=1)
    return home


@pytest.fixture(scope="module")
def two(options_of, alone, tmp_path_factory):
    """All cases on two processes: (folder, gradients and messages of each rank)."""
    home = tmp_path_factory.mktemp("two")
    runs = [
        (name, *options_of(case, home / name, "--shard")) for name, case in (CASES | SAMPLED | MEMORY).items()
    ]
    runs += [
        (f"replicated, {name}", *options_of(case, home / f"replicated, {name}"))
        for name, case in SAMPLED.items()
    ]
    for name, case in HALVES.items():
        runs.append((name, *options_of(case, home / name, "--shard")))
        runs.append(("copy", str(home / name), str(home / f"{name}, again")))
        runs.append((f"{name}, again", *options_of(case, home / f"{name}, again", "--shard", "--resume")))
        runs.append((f"whole, {name}", *options_of(case, home / f"whole, {name}", "--shard")))
        shutil.copytree(alone / name, home / f"from one, {name}", symlinks=True)
        more = ("--shard", "--resume")
        runs.append((f"from one, {name}", *options_of(case, home / f"from one, {name}", *more)))
    return home, *zip(*start(home, runs), strict=True)


def same_weights(a: Path, b: Path, tolerance: float) -> None:
    weights, expected = (that_matter(load_file(folder / "model.safetensors")) for folder in (a, b))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("case", CASES)
def test_D17_two_sharded_ranks_equal_one_process(two, options_of, run, metrics, tmp_path, case):
    """Rank for rank the same gradients; and those of one process, its weights and its metrics."""
    home, (first, second), _ = two
    grads = steps(first, case)
    assert len(grads) == len(steps(second, case)) > 0
    assert all(map(torch.equal, grads, steps(second, case)))
    script, options = options_of(CASES[case], tmp_path)
    with gradients() as alone, same_tokens(1):
        assert run(script, *options) == 0
    agree(grads[:1], alone[:1], 1e-6)
    agree(grads, alone, 1e-5)  # of weights that have been trained apart
    same_weights(home / case, tmp_path, 1e-5)
    for line, line_alone in zip(metrics(home / case), metrics(tmp_path), strict=True):
        assert line == pytest.approx(line_alone, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", SAMPLED)
def test_sharded_ranks_equal_replicated_ones(two, metrics, case):
    """The same tokens are drawn, by a policy that is whole in the rollout; bf16 is rounded at the same places."""
    home, grads, _ = two
    half = "bf16" in case
    agree(steps(grads[0], case), steps(grads[0], f"replicated, {case}"), 1e-2 if half else 1e-5)
    for line, replicated in zip(metrics(home / case), metrics(home / f"replicated, {case}"), strict=True):
        tolerance = 1e-2 if half else 1e-4
        assert line == pytest.approx(replicated, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("case", MEMORY)
def test_a_rank_of_two_holds_little_more_than_half(two, options_of, run, tmp_path, case):
    """Weights, gradients and Adam's moments, and whatever else is alive after an optimiser step."""
    _, _, said = two
    held: list[int] = []
    script, options = options_of(MEMORY[case], tmp_path)
    with bytes_after_steps(held), same_tokens(1):
        assert run(script, *options) == 0
    print([each[case] / held[-1] for each in said])
    assert all(each[case] <= 0.55 * held[-1] for each in said)


# ------------------------------------------------------------------------------------- what is gathered, and when


@pytest.fixture
def one():
    """A machine whose models are sharded over one process, this one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield hardware.Machine(torch.device("cpu"), 0, 1, True)
    torch.distributed.destroy_process_group()


@pytest.fixture
def pretended():
    """One of two ranks, of which there is no other: collectives take place and change nothing."""
    store = torch.testing._internal.distributed.fake_pg.FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    yield hardware.Machine(torch.device("cpu"), 0, 2, True)
    torch.distributed.destroy_process_group()


def pieces(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are sharded now."""
    return {name for name, p in model.named_parameters() if hasattr(p, "to_local")}


def read(model: GPT) -> torch.Tensor:
    hidden = model(torch.arange(12).view(3, 4))
    return model.logits(hidden).float().log_softmax(-1)[..., 3].sum()


def test_a_model_is_whole_from_its_forward_to_the_end_of_its_backward(one):
    torch.manual_seed(0)
    policy, ref = GPT(TINY_GPT), GPT(TINY_GPT).requires_grad_(False)
    shard.shard(one, [policy], [ref], "fp32")
    everything = {name for name, _ in policy.named_parameters()}
    in_blocks = {name for name in everything if name.startswith("blocks")}
    assert pieces(policy) == pieces(ref) == everything
    loss = read(policy)
    assert pieces(policy) == in_blocks  # embeddings and norm are whole: logits() and backward read them
    with torch.no_grad():
        read(ref)
        assert pieces(policy) == pieces(ref) == in_blocks  # the policy waits for its backward
        loss.backward()
        assert pieces(policy) == everything
        read(policy)
        assert pieces(ref) == everything  # a model that is only read is dropped by the next one
        read(ref)
        assert pieces(policy) == everything
    with shard.whole(policy, contextlib.nullcontext()):
        assert pieces(policy) == set()
        policy(torch.zeros(1, 3, dtype=torch.long))
        assert pieces(policy) == set()
    assert pieces(policy) == everything


def test_an_optimiser_is_made_of_pieces_even_after_a_forward(one):
    """As train_dpo.py reads its pairs first: what the forward gathered is a copy, whose gradient is lost."""
    policy = GPT(TINY_GPT)
    shard.shard(one, [policy], [], "fp32")
    read(policy)
    optimizer = optim.adamw([policy], 1e-3, 0.0, (0.9, 0.99), 1e-8)
    assert all(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "lora"])
def test_traffic_is_that_of_the_formula(pretended, monkeypatch, shape, precision):
    """Bytes that are gathered and summed in a forward and backward; in fp32 nothing is rounded."""
    torch.manual_seed(0)
    more = {
        "llama": {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False, "tied": False},
        "lora": {"lora_rank": 2},
    }
    model = GPT(dataclasses.replace(TINY_GPT, **more.get(shape, {})))
    expected = estimate.traffic(model) if precision == "bf16" else dict.fromkeys(("forward", "backward"), 0)
    if precision == "fp32":
        expected["forward"] = sum(p.nbytes for p in model.parameters())
        expected["backward"] = sum(p.nbytes for p in model.blocks.parameters())
        expected["gradients"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    shard.shard(pretended, [model], [], precision)
    moved = Counter()
    for name, kind in {"all_gather_single": "gathered", "reduce_scatter_single": "gradients"}.items():
        real = getattr(torch.distributed, name)

        def count(output, input, *rest, kind=kind, call=real, **options):
            moved[kind] += (output if kind == "gathered" else input).nbytes
            return call(output, input, *rest, **options)

        monkeypatch.setattr(torch.distributed, name, count)
    with pretended.autocast(precision):
        loss = read(model)
    assert moved == {"gathered": expected["forward"]}
    loss.backward()
    total = {"gathered": expected["forward"] + expected["backward"], "gradients": expected["gradients"]}
    assert moved == total


# ------------------------------------------------------------------------------------- going on from a checkpoint


@pytest.mark.parametrize("name", HALVES)
def test_D21_a_sharded_run_goes_on_bit_for_bit(two, metrics, name):
    """On as many ranks as before: weights, gradients and metrics are those of a run that never stopped."""
    home, (grads, _), (said, _) = two
    assert said[name].startswith("stopped at step 2 of ")
    again, whole = steps(grads, f"{name}, again"), steps(grads, f"whole, {name}")
    assert 0 < len(again) < len(whole)
    assert all(map(torch.equal, again, whole[-len(again) :]))
    assert metrics(home / f"{name}, again") == metrics(home / f"whole, {name}")
    weights, expected = (
        load_file(home / f"{which}/model.safetensors") for which in (f"{name}, again", f"whole, {name}")
    )
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    files = sorted(path.name for path in (home / f"whole, {name}/latest").glob("trainer*"))
    assert files == [
        "trainer-0-of-2.safetensors",
        "trainer-1-of-2.safetensors",
        "trainer.json",
        "trainer.safetensors",
    ]


@pytest.mark.parametrize("name", HALVES)
def test_two_ranks_go_on_from_one(two, name):
    """The tolerance of docs/scaling.md: sums in another order, where no random draw depends on the rank."""
    same_weights(two[0] / f"from one, {name}", two[0] / f"whole, {name}", 1e-5)


@pytest.mark.usefixtures("no_baselines")
@pytest.mark.parametrize("name", HALVES)
def test_one_process_goes_on_from_two_ranks_without_shard(two, options_of, run, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(two[0] / name, out, symlinks=True)
    script, options = options_of(HALVES[name], out, "--resume")
    with same_tokens(1):
        assert run(script, *options) == 0
    same_weights(out, two[0] / f"whole, {name}", 1e-5)
    assert [path.name for path in (out / "latest").glob("trainer-*")] == []


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", HALVES)
def test_any_number_of_ranks_reads_all_rows(two, name, world):
    """What two ranks wrote, read by one and by three: the same tensors."""
    folder = two[0] / name / "latest"
    ranks = [hardware.Machine(torch.device("cpu"), rank, world, True) for rank in range(world)]
    pieces = [shard_files.read(folder, machine)[0] for machine in ranks]
    whole, state = shard_files.read(folder, hardware.Machine(torch.device("cpu")))
    shapes = state["shards"]["shapes"]
    assert len(shapes) > 20 and all(list(whole[key].shape) == shape for key, shape in shapes.items())
    for key in shapes:
        assert torch.equal(torch.cat([piece[key] for piece in pieces]), whole[key])
    files = [load_file(folder / file) for file in state["shards"]["files"]]
    assert all(torch.equal(torch.cat([file[key] for file in files]), whole[key]) for key in shapes)


DAMAGES = {
    "flipped": lambda folder, state: flip(folder / "trainer-1-of-2.safetensors"),
    "cut": lambda folder, state: os.truncate(folder / "trainer-1-of-2.safetensors", 100),
    "lost": lambda folder, state: (folder / "trainer-1-of-2.safetensors").unlink(),
    "elsewhere": lambda folder, state: rename(state, "../../trainer-1-of-2.safetensors"),
    "no list": lambda folder, state: state.update(shards=[]),
    "no files": lambda folder, state: state["shards"].update(files={}),
    "no shapes": lambda folder, state: state["shards"].update(shapes={"x": ["a"]}),
    "huge": lambda folder, state: state["shards"]["shapes"].update({next(iter(state["shards"]["shapes"])): [2**40, 4]}),
    "negative": lambda folder, state: state["shards"]["shapes"].update({next(iter(state["shards"]["shapes"])): [-1, 4]}),
    "unknown": lambda folder, state: state["shards"]["shapes"].update({"new": [4, 4]}),
}  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def rename(state: dict, name: str) -> None:
    files = state["shards"]["files"]
    files[name] = files.pop("trainer-1-of-2.safetensors")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_refused_in_a_line(two, tmp_path, damage):
    folder = tmp_path / "step"
    shutil.copytree(two[0] / "half, sft/latest", folder)
    state = json.loads((folder / "trainer.json").read_text())
    DAMAGES[damage](folder, state)
    (folder / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="take another step folder or train again") as refusal:
        shard_files.read(folder, hardware.Machine(torch.device("cpu")))
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------- what is refused, and when


def test_shard_without_torchrun_or_with_compile_is_one_sentence(run, smoke, tmp_path, capsys, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    options = ["--preset", "smoke", "--init", smoke / "sft", "--out", tmp_path / "out", "--shard"]
    assert run("train_dpo", *options) == 2
    assert capsys.readouterr().err.strip() == (
        "error: --shard splits models over the processes of torchrun, and this is one: "
        "torchrun --nproc-per-node 8 train_ppo.py ... --shard"
    )
    monkeypatch.setenv("RANK", "0")
    assert run("train_dpo", *options, "--compile") == 2
    assert (
        capsys.readouterr().err.strip() == "error: --shard and --compile do not go together: drop one of them"
    )
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused_with_the_arithmetic(monkeypatch):
    policy, ref = GPT(TINY_GPT), GPT(TINY_GPT).requires_grad_(False)
    n = sum(p.numel() for p in policy.parameters())
    parts = shard.needs([policy], [ref], 4)
    assert [*parts.values()] == [8 * n // 4, 4 * n // 4, 8 * n // 4, 4 * n]
    linear = sum(p.numel() for name, p in policy.blocks.named_parameters() if p.dim() == 2)
    assert shard.needs([policy], [ref], 4, half=True)[shard.WHOLE] == 4 * n - 2 * linear
    machine = hardware.Machine(torch.device("cpu"), 0, 4, True)
    total = sum(parts.values())
    monkeypatch.setattr(
        shard, "free_bytes", lambda device: total - 4 * (8 * n // 4)
    )  # what the models hold comes back
    shard.refuse_unfit(machine, [policy], [ref], False, True)
    monkeypatch.setattr(shard, "free_bytes", lambda device: total - 4 * (8 * n // 4) - 1)
    with pytest.raises(
        UserError, match=r"^--shard over 4 processes: weights .* \+ gradients .* GB in each, and .* free: use"
    ):
        shard.refuse_unfit(machine, [policy], [ref], False, True)
    shard.refuse_unfit(machine, [policy], [ref], False, False)  # it writes no text, and is never whole
    monkeypatch.undo()
    assert shard.free_bytes(torch.device("cpu")) > 2**20


def test_a_sharded_model_is_not_asked_for_single_tokens():
    from minirlhf.support.cache import KVCache

    model = GPT(TINY_GPT)
    model.blocks[-1].ln_1.weight.to_local = None  # as a DTensor has it
    with pytest.raises(RuntimeError, match="writes text in shard.whole"):
        KVCache(model, 1, 4)


def test_roots_are_what_is_called():
    gpt, critic, ensemble = GPT(TINY_GPT), ValueModel(TINY_GPT), RewardEnsemble(TINY_GPT, members=2)
    assert shard.roots_in(gpt) == [gpt] and shard.roots_in(critic) == [critic]
    assert shard.roots_in(ensemble) == [*ensemble.members]


# ------------------------------------------------------------------------------------- ranks that end


DIES = """
import os, signal
def die_once(prompts, responses):
    if os.environ["RANK"] == "1" and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.1 * len(r) for r in responses]
"""


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "dies.py").write_text(DIES)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=240
    )


@pytest.mark.parametrize("more", [["--shard"], []], ids=["sharded", "replicated"])
def test_a_killed_rank_is_started_again_and_goes_on(options_of, tmp_path, metrics, more):
    """`torchrun --max-restarts` needs no --resume: the result is that of a run that nobody killed."""
    case = ("train_ppo", [*SMALL, "--save-every", "1", "--reward", "rm", "--reward", "dies:die_once"])
    for name, restarts in {"killed": "1", "whole": "0"}.items():
        script, options = options_of(case, tmp_path / name, *more)
        done = torchrun(tmp_path, "--max-restarts", restarts, str(ROOT / f"{script}.py"), *options)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_dead_rank_ends_the_job_within_a_minute(options_of, tmp_path):
    case = ("train_ppo", [*SMALL, "--reward", "rm", "--reward", "dies:die_once"])
    script, options = options_of(case, tmp_path / "out", "--shard")
    began = time.monotonic()
    done = torchrun(tmp_path, str(ROOT / f"{script}.py"), *options)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "SIGKILL" in done.stderr  # torchrun's summary says how the first one ended
    # The other one sees it and says so, unless torchrun is faster and stops it.
    said = "error: another process of this run has ended, see its message: so does this one"
    before = re.split(f"{said}|closing signal SIGTERM", done.stderr)[0]
    assert before != done.stderr and "Traceback" not in before


def test_ranks_that_are_started_again_do_not_meet_those_before(monkeypatch):
    """The store keeps what earlier ranks wrote, those included that ended while they met."""
    store, names = torch.distributed.HashStore(), []
    for start_ in range(3):
        store.set("greeting-2", "of a rank that ended before it was answered")
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda rank: elastic.common_name(store, rank, 4), (3, 1, 2, 0)))
        assert len({*found}) == 1
        names.append(found[0])
        store.set("answer-1", f"{start_}{names[0]}")
    assert len({*names}) == 3


def test_restarts_resume_and_never_overwrite(monkeypatch):
    alone = hardware.Machine(torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not elastic.restarted(alone)
    elastic.refuse_overwrite(True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert elastic.restarted(alone)
    elastic.refuse_overwrite(False)
    with pytest.raises(UserError, match="at every restart: drop one"):
        elastic.refuse_overwrite(True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not elastic.restarted(alone)
    elsewhere = SimpleNamespace(any=lambda here: True)  # on another machine
    assert elastic.restarted(elsewhere)


def test_torchrun_is_told_why_a_process_ends(monkeypatch, tmp_path):
    elastic.tell("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    elastic.tell("error: no room")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: no room"
    assert [*tmp_path.iterdir()] == [tmp_path / "error.json"]
    whole = (tmp_path / "error.json").read_text()

    def stopped(self, text):
        self.open("w").close()
        raise SystemExit("stopped by torchrun, between opening the file and writing it")

    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(SystemExit):
        elastic.tell("error: another one")
    assert (tmp_path / "error.json").read_text() == whole
    monkeypatch.undo()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:46801.")
    assert elastic.ended_elsewhere(lost) is None  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process of this run has ended" in elastic.ended_elsewhere(lost)
    assert elastic.ended_elsewhere(RuntimeError("shapes cannot be multiplied")) is None
