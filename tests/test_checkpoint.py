"""Checkpoints: whole or absent at every moment; exact resume; links that survive a move; faults told in one line."""

import json
import os
import pickle
import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minirlhf import UserError, checkpoint
from minirlhf.model import GPT, GPTConfig, RewardEnsemble
from minirlhf.support import files, steps, trainer
from minirlhf.support.claims import compare_inputs
from minirlhf.support.folder import refuse_stale
from minirlhf.support.hardware import seed_everything
from minirlhf.support.state import pack_optimizer, unpack_optimizer
from minirlhf.tokenizer import Tokenizer
from tests.by_hand import unlisted

OLD, NEW = Tokenizer({bytes([b]): b for b in range(256)}), Tokenizer.train(["abc abd"], 260)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting for the disk: a killed process loses no writes, only a power cut would."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(out, step, tokenizer, **more):
    """A checkpoint whose every file bears the tokenizer's vocab size, so that a mix of two shows."""
    mark = tokenizer.vocab_size
    config = {"mark": mark, "tokenizer": {"hash": tokenizer.hash}}
    trainer = {"tensors": {"mark": torch.tensor(mark)}, "state": {"mark": mark}}
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").write_text(f"{mark}\n")
    return checkpoint.save(
        out, step, {"w": torch.full((3, 2), float(mark))}, config, tokenizer, trainer, **more
    )


def read(path):
    """The one mark that all files of a checkpoint bear."""
    config, (tensors, state) = checkpoint.load_config(path), checkpoint.load_trainer(path)
    tokenizer = Tokenizer.load(checkpoint.resolve(path))
    checkpoint.check_tokenizer(config, tokenizer)
    marks = {config["mark"], tensors["mark"].item(), state["mark"], tokenizer.vocab_size}
    marks |= set(checkpoint.load_state(path)["w"].flatten().tolist())
    marks.add(int((checkpoint.resolve(path) / "metrics.jsonl").read_text()))
    (mark,) = marks
    return mark


def listing(out):
    return sorted(p.name for p in out.iterdir())


RUN = [
    "best",
    "config.json",
    "latest",
    "metrics.jsonl",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.tiktoken",
]


def test_save_and_load(tmp_path):
    out = tmp_path / "runs" / "demo"
    (tmp_path / "runs").mkdir()
    assert write(out, 120, OLD) == out / "step-000120"
    assert listing(out) == sorted([*RUN[1:], "step-000120"])
    assert listing(out / "step-000120") == sorted(
        ["SHA256SUMS", "trainer.json", "trainer.safetensors", *RUN[1:2], *RUN[3:]]
    )
    for path in (out, str(out), out / "latest", out / "step-000120"):
        assert read(path) == OLD.vocab_size
        assert checkpoint.resolve(path) == (out / "step-000120").resolve()
    assert json.loads((out / "config.json").read_text()) == checkpoint.load_config(
        out
    )  # OUT reads as a checkpoint


def test_without_a_trainer_there_is_nothing_to_resume(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(1)}, {}, OLD)
    assert checkpoint.load_trainer(tmp_path) is None


def test_tensors_that_share_memory_or_are_not_contiguous_come_back(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {
        "a": base,
        "tied": base,
        "transposed": base.T,
        "part": base[1:],
        "half": base.bfloat16(),
        "n": torch.tensor(7),
    }
    checkpoint.save(tmp_path, 1, state | {"grad": base.clone().requires_grad_()}, {}, OLD)
    loaded = checkpoint.load_state(tmp_path)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state.items())


class Crash(BaseException):
    """Not an Exception: like a kill, nothing may catch it."""


def crash_at(monkeypatch, n):
    """Raise Crash at the n-th call, counted over all calls that change the disk, before it or (half done) in it."""
    calls = 0

    def breaking(function, partly=None):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                if partly:
                    partly(*args)
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    def remove_half(path, **kwargs):
        for file in sorted(Path(path).iterdir())[::2]:
            file.unlink()

    for name in ("replace", "rename", "fsync", "symlink", "link", "mkdir"):
        monkeypatch.setattr(os, name, breaking(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", breaking(shutil.rmtree, remove_half))
    monkeypatch.setattr(
        Path, "write_text", breaking(Path.write_text, lambda path, text: path.open("w").write(text[:5]))
    )
    monkeypatch.setattr(Path, "write_bytes", breaking(Path.write_bytes, lambda path, data: path.touch()))
    half = lambda tensors, path, metadata: Path(path).write_bytes(b"\x08\x00")  # noqa: E731
    monkeypatch.setattr(steps, "save_file", breaking(steps.save_file, half))
    torn = lambda source, target: Path(target).write_text("{")  # noqa: E731
    monkeypatch.setattr(shutil, "copyfile", breaking(shutil.copyfile, torn))


@pytest.mark.parametrize(
    "before, step, best, new_best",
    [
        (None, 2, False, False),
        (None, 2, False, True),
        (1, 2, False, False),
        (1, 2, True, False),
        (1, 2, True, True),
        (2, 2, True, False),
        (3, 2, False, False),
    ],
    ids=["first", "first-best", "next", "next-best", "new-best", "same-best", "earlier"],
)
def test_D21_a_save_killed_anywhere_leaves_the_old_or_the_new(tmp_path, before, step, best, new_best):
    old, new = OLD.vocab_size, NEW.vocab_size
    seen, n, crashed = [], 0, True
    while crashed:
        n += 1
        out = tmp_path / str(n)
        if before is not None:
            write(out, before, OLD)
            if best:
                steps.point(out, "best", before)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, n)
            try:
                write(out, step, NEW, best=new_best)
                crashed = False
            except Crash:
                pass
        if before is None and not (out / "latest").exists():
            with pytest.raises(UserError, match="no checkpoint here"):  # never a step without its links
                checkpoint.resolve(out)
            seen.append(None)
        else:
            seen.append(read(out))
        assert seen[-1] in (old if before else None, new)
        if seen[-1] and (best or new_best):
            assert read(out / "best") in ((old, new) if before == step or new_best else (old,))
        for folder in out.glob("step-*"):
            assert read(folder) in (old, new)  # whatever bears a step's name is whole
        write(out, step, NEW, best=new_best)  # works; leftovers go, unless the links led to one until now
        assert len([*out.glob(".*")]) <= (before == step)
        assert os.readlink(out / "latest") == "step-000002" and checkpoint.load_config(out)["mark"] == new
    assert n > 15 and seen[0] == (old if before else None)
    assert sorted(seen, key=lambda mark: mark == new) == seen and seen[-1] == new  # once new, always new


@pytest.mark.parametrize("same", [False, True])
def test_D21_files_reach_the_disk_before_their_name_and_the_name_before_latest(tmp_path, monkeypatch, same):
    write(tmp_path, 1, OLD)
    synced, events = set(), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    rename, replace = os.rename, os.replace

    def renaming(source, target):
        if Path(target).name.startswith("step-"):
            assert {p.stat().st_ino for p in [Path(source), *Path(source).iterdir()]} <= synced
            synced.clear()
            events.append("name")
        rename(source, target)

    def replacing(source, target):
        if Path(target).name in ("best", "latest") and "name" in events:
            assert tmp_path.stat().st_ino in synced
            events.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)
    write(tmp_path, 1 if same else 2, NEW, best=True)
    assert events[0] == "name" and events[-1] == "latest" and "best" in events


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("same", [False, True])
def test_D21_a_killed_process_leaves_a_whole_checkpoint(tmp_path, same):
    """A real SIGKILL at a random moment of saves in a loop, not an exception."""
    out = tmp_path / "run"
    write(out, 0, OLD)
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                for i in range(1, 10**6):
                    write(out, 5 if same else i, (OLD, NEW)[i % 2])
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.01, 0.15))
        os.kill(child, 9)
        os.waitpid(child, 0)
        assert read(out) in (OLD.vocab_size, NEW.vocab_size)
        for folder in out.glob("step-*"):
            read(folder)


def test_older_steps_go_but_the_linked_stay(tmp_path):
    for step in (1, 2):
        write(tmp_path, step, OLD)
    assert listing(tmp_path) == sorted([*RUN[1:], "step-000002"])
    steps.point(tmp_path, "best", 2)
    for step in (3, 4):
        write(tmp_path, step, NEW)
    assert listing(tmp_path) == sorted([*RUN, "step-000002", "step-000004"])
    assert read(tmp_path / "best") == OLD.vocab_size and read(tmp_path) == NEW.vocab_size
    steps.point(tmp_path, "best", 4)
    for step in (5, 6, 7):
        write(tmp_path, step, NEW)
    assert steps.whole_steps(tmp_path) == ["step-000004", "step-000007"]
    write(tmp_path, 5, OLD)  # a run taken up again from an earlier step: its abandoned future goes
    assert steps.whole_steps(tmp_path) == ["step-000004", "step-000005"]
    assert read(tmp_path) == OLD.vocab_size
    write(tmp_path, 6, NEW, best=True)
    assert steps.whole_steps(tmp_path) == ["step-000006"] and read(tmp_path / "best") == NEW.vocab_size


def test_the_same_step_again_takes_its_links_along(tmp_path):
    write(tmp_path, 7, OLD)
    steps.point(tmp_path, "best", 7)
    write(tmp_path, 7, NEW)
    assert read(tmp_path) == read(tmp_path / "best") == NEW.vocab_size
    assert os.readlink(tmp_path / "best") == os.readlink(tmp_path / "latest") == "step-000007"
    assert listing(tmp_path) == sorted([*RUN, "step-000007"])


def test_a_moved_run_still_reads(tmp_path):
    write(tmp_path / "a", 3, NEW)
    steps.point(tmp_path / "a", "best", 3)
    (tmp_path / "else").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "else" / "b")
    moved = tmp_path / "else" / "b"
    assert read(moved) == read(moved / "best") == NEW.vocab_size
    assert (moved / "model.safetensors").is_file() and Tokenizer.load(moved).hash == NEW.hash
    assert read(write(moved, 4, OLD)) == OLD.vocab_size
    assert not any(os.path.isabs(os.readlink(p)) for p in moved.iterdir() if p.is_symlink())


@pytest.mark.parametrize("file, load", [
    ("model.safetensors", checkpoint.load_state), ("trainer.safetensors", checkpoint.load_trainer),
    ("trainer.json", checkpoint.load_trainer), ("config.json", checkpoint.load_config),
])  # fmt: skip
@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle"])
def test_damaged_files_are_told_in_one_line(tmp_path, file, load, damage):
    write(tmp_path, 1, OLD)
    path = (tmp_path / "step-000001" / file).resolve()
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-3], "empty": b"", "pickle": pickle.dumps({"w": 1})}[damage])
    with pytest.raises(UserError) as error:
        load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "another step folder" in message


@pytest.mark.parametrize("file, load", [
    ("model.safetensors", checkpoint.load_state), ("trainer.safetensors", checkpoint.load_trainer),
])  # fmt: skip
@pytest.mark.parametrize("damage", ["bit", "zeros", "shape", "dtype"])
def test_F3_tensors_have_a_checksum(tmp_path, file, load, damage):
    """Files that safetensors reads without a complaint: a bit, the numbers, their order, their type."""
    tensors = {"w": torch.arange(6.0).view(3, 2)}
    checkpoint.save(tmp_path, 1, tensors, {}, OLD, {"tensors": tensors, "state": {}})
    path = tmp_path.resolve() / "step-000001" / file
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, numbers = content[8:end], content[end:]
    header = {"shape": header.replace(b"[3,2]", b"[2,3]"), "dtype": header.replace(b"F32", b"I32")}.get(
        damage, header
    )
    numbers = {"bit": bytes([numbers[0] ^ 64, *numbers[1:]]), "zeros": bytes(len(numbers))}.get(
        damage, numbers
    )
    path.write_bytes(content[:8] + header + numbers)
    assert path.read_bytes() != content and not torch.equal(load_file(path)["w"], tensors["w"])
    with pytest.raises(UserError, match="damaged: its checksum is not the one recorded") as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("failing", ["save_file", "write_text", "copyfile", "rename"])
def test_F13_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, failing):
    write(tmp_path, 1, OLD)
    before = listing(tmp_path)
    full = OSError(28, "No space left on device")
    if failing == "save_file":
        full = steps.SafetensorError("I/O error: No space left on device (os error 28)")

    def fail(*args, **options):
        raise full

    where = {"save_file": steps, "write_text": Path, "copyfile": shutil, "rename": os}[failing]
    monkeypatch.setattr(where, failing, fail)
    for _ in range(2):  # a restart loop must not fill the disk
        with pytest.raises(
            UserError, match="checkpoint of step 2 cannot be written .*No space left.*: make room"
        ):
            checkpoint.save(tmp_path, 2, {"w": torch.ones(1)}, {}, NEW)
        assert listing(tmp_path) == before
    assert read(tmp_path) == OLD.vocab_size
    monkeypatch.undo()
    write(tmp_path, 2, NEW)
    assert read(tmp_path) == NEW.vocab_size


def test_F14_a_run_copied_with_its_links_followed_goes_on(tmp_path):
    """cp -rL, rsync -L: folders and files stand where links were."""
    write(tmp_path / "a", 1, OLD, best=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=False)
    assert not (tmp_path / "b" / "latest").is_symlink() and read(tmp_path / "b") == OLD.vocab_size
    write(tmp_path / "b", 2, NEW)
    assert read(tmp_path / "b") == NEW.vocab_size and read(tmp_path / "b" / "best") == OLD.vocab_size
    write(tmp_path / "b", 3, OLD, best=True)
    assert listing(tmp_path / "b") == sorted([*RUN, "step-000003"])
    assert read(tmp_path / "b") == read(tmp_path / "b" / "best") == OLD.vocab_size
    steps.forget(tmp_path / "b")
    assert not {"latest", "best"} & {*listing(tmp_path / "b")}


def test_F14_killed_at_the_first_save_after_such_a_copy(tmp_path):
    """The folder in the place of `latest` stays until the new step is whole."""
    write(tmp_path / "a", 1, OLD)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_replace", lambda *args: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            write(tmp_path / "b", 2, NEW)
    (tmp_path / "b" / "metrics.jsonl").write_text(f"{OLD.vocab_size}\n")
    assert read(tmp_path / "b") == OLD.vocab_size


def test_F1_a_lost_link_is_named(tmp_path):
    """Zip files, object storage and FAT lose links: the step is there, and the message says which."""
    for step in (9, 10):
        write(tmp_path, step, OLD, best=step == 9)
    (tmp_path / "latest").unlink()
    with pytest.raises(
        UserError, match="holds step-000010 but no link `latest`: name .*/step-000010, or make the link"
    ):
        checkpoint.load_gpt(tmp_path)
    assert read(tmp_path / "step-000010") == OLD.vocab_size


def test_H6_a_checkpoint_made_from_other_weights_is_stale(tmp_path):
    """A reward model knows the weights that it started from."""

    def stage(name: str, weight: float, **inputs):
        checkpoint.save(tmp_path / name, int(weight), {"w": torch.tensor([weight])}, {"inputs": inputs}, OLD)
        return tmp_path / name

    sft = stage("sft", 1.0)
    first = checkpoint.fingerprint(sft)
    rm = stage("rm", 2.0, init=first, init_path=str(checkpoint.resolve(sft)))
    refuse_stale(rm, "init", sft)
    refuse_stale(stage("imported", 3.0), "init", sft)  # knows nothing of its origin
    refuse_stale(rm, "init", stage("another", 5.0))  # another folder was asked for
    stage("sft", 4.0)
    assert checkpoint.fingerprint(sft) != first
    with pytest.raises(
        UserError, match=f"^{rm} was trained from {sft} as it was before .*: train it again"
    ) as error:
        refuse_stale(rm, "init", sft)
    assert first[:12] in str(error.value) and checkpoint.fingerprint(sft)[:12] in str(error.value)


def test_pickles_are_never_read(tmp_path, monkeypatch):
    folder = write(tmp_path, 1, OLD)
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("pickle.load was called"))
    with pytest.raises(
        UserError, match=r"model.safetensors: missing \(a pickle, .bin or .pt, is never read\)"
    ):
        checkpoint.load_state(tmp_path)


def test_no_checkpoint_names_the_path_and_the_remedy(tmp_path):
    os.symlink("step-000009", tmp_path / "latest")
    for path in (tmp_path, tmp_path / "none", __file__):
        with pytest.raises(UserError, match="no checkpoint here .*: train that stage first") as error:
            checkpoint.load_config(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="run train_sft.py first"):
        checkpoint.resolve(tmp_path, "run train_sft.py first")


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path, 1, NEW)
    checkpoint.check_tokenizer(checkpoint.load_config(tmp_path), NEW)
    for config in (checkpoint.load_config(tmp_path), {}):
        with pytest.raises(UserError, match="tokenizer does not match the checkpoint"):
            checkpoint.check_tokenizer(config, OLD)


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() < 2]},
    ]
    groups[1]["weight_decay"] = 0.0
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1)


def train(model, opt, steps):
    """Steps that draw from every generator, seeded as the stage scripts do; the losses, exactly."""
    losses = []
    for step in steps:
        seed_everything(7, step, 0)
        x = torch.rand(5, 4) * random.random() + float(np.random.standard_normal())
        loss = model(x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        for group in opt.param_groups:
            group["lr"] *= 0.9
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("k", [0, 1, 3])
def test_D21_resume_continues_bit_for_bit(tmp_path, k):
    model, opt = build()
    train(model, opt, range(k))
    tensors, state = pack_optimizer(opt, "opt.")
    checkpoint.save(tmp_path, k, model.state_dict(), {}, OLD, {"tensors": tensors, "state": state})
    losses = train(model, opt, range(k, 6))

    again, opt_again = build()
    train(again, opt_again, range(50, 52))  # what it holds before is all replaced
    again.load_state_dict(checkpoint.load_state(tmp_path))
    unpack_optimizer(opt_again, *checkpoint.load_trainer(tmp_path), "opt.")
    assert train(again, opt_again, range(k, 6)) == losses
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [g["lr"] for g in opt_again.param_groups] == [g["lr"] for g in opt.param_groups]
    assert [g["weight_decay"] for g in opt_again.param_groups] == [0.1, 0.0]


def test_D21_two_optimizers_do_not_mix():
    (model, opt), (other, opt_other) = build(), build()
    train(model, opt, range(1)), train(other, opt_other, range(3))
    packed = {}
    states = {}
    for prefix, each in (("policy", opt), ("policy_value", opt_other)):
        tensors, states[prefix] = pack_optimizer(each, prefix)
        assert not packed.keys() & tensors.keys()
        packed |= tensors
    for prefix, each in (("policy", opt), ("policy_value", opt_other)):
        fresh = build()[1]
        unpack_optimizer(fresh, packed, json.loads(json.dumps(states[prefix])), prefix)
        for own, loaded in zip(
            each.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
        ):
            assert all(torch.equal(own[key], loaded[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


TINY = {"vocab_size": 258, "context": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}


def test_a_reward_model_that_was_trained_with_dropout_scores_a_text_once_and_for_all(tmp_path):
    shape = TINY | {"dropout": 0.5}
    reward = RewardEnsemble(GPTConfig(**shape), "last+mean", 1)
    about = {
        "model": shape,
        "tokenizer": {"hash": OLD.hash},
        "stage": "rm",
        "head": {"pooling": "last+mean", "members": 1},
    }
    checkpoint.save(tmp_path / "rm", 1, reward.state_dict(), about, OLD)
    tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    read, _ = checkpoint.load_reward(tmp_path / "rm")
    assert torch.equal(read(tokens, mask)[0], read(tokens, mask)[0])


def test_models_come_back_from_their_checkpoints(tmp_path):
    about = {"model": TINY, "tokenizer": {"hash": OLD.hash}}
    gpt, reward = GPT(GPTConfig(**TINY)), RewardEnsemble(GPTConfig(**TINY), "last+mean", 2)
    checkpoint.save(tmp_path / "sft", 1, gpt.state_dict(), about | {"stage": "sft"}, OLD)
    head = {"pooling": "last+mean", "members": 2}
    checkpoint.save(tmp_path / "rm", 1, reward.state_dict(), about | {"stage": "rm", "head": head}, OLD)
    tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(checkpoint.load_gpt(tmp_path / "sft")(tokens), gpt(tokens))
    loaded, reader = checkpoint.load_reward(tmp_path / "rm")
    assert torch.equal(loaded(tokens, mask)[0], reward(tokens, mask)[0]) and reader.hash == OLD.hash
    with pytest.raises(UserError, match="a sft checkpoint, not a reward model"):
        checkpoint.load_reward(tmp_path / "sft")
    NEW.save(tmp_path / "rm" / "latest")
    with pytest.raises(UserError, match="tokenizer.tiktoken: damaged: its checksum"):
        checkpoint.load_reward(tmp_path / "rm")
    unlisted(tmp_path / "rm" / "latest" / "config.json")
    with pytest.raises(UserError, match="tokenizer does not match"):
        checkpoint.load_reward(tmp_path / "rm")
    checkpoint.save(tmp_path / "sft", 1, gpt.state_dict(), about | {"model": TINY | {"n_embd": 16}}, OLD)
    with pytest.raises(UserError, match="weights do not fit config.json") as error:
        checkpoint.load_gpt(tmp_path / "sft")
    assert "\n" not in str(error.value)


def test_write_atomically(tmp_path):
    files.write_atomically(tmp_path / "a.json", "é")
    files.write_atomically(tmp_path / "a.json", "old")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 2)  # with the new content written, before it takes the name
        with pytest.raises(Crash):
            files.write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    files.write_atomically(tmp_path / "a.json", b"new")
    assert listing(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"new"


def test_a_hugging_face_folder_is_sent_to_import(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"python -m minirlhf\.checkpoint import .* OUT"):
        checkpoint.load_gpt(tmp_path)


@pytest.mark.parametrize("inputs", [[], 5, {"data": 5}, {"init": None}, {"init_path": ["x"]}, "x"])
def test_F9_inputs_that_are_none_are_one_line(inputs):
    with pytest.raises(UserError, match="out/config.json: inputs: .* no checksums and paths"):
        compare_inputs(Path("out"), {"inputs": inputs}, {"data": "x"})


def damaged_trainers() -> dict[str, dict]:
    """Changes to a trainer's state, by what is wrong with it."""
    state = {"step": 1, "seconds": 0.5, "counters": {"best": 1.0}}
    changes = {
        "step": [2, "1", None, True, -1],
        "seconds": ["x", None, float("nan")],
        "counters": [[], {}, {"best": "x"}, {"best": 1.0, "more": 1}, None],
    }
    return {f"{key} {value}": state | {key: value} for key, values in changes.items() for value in values}


@pytest.mark.parametrize("name", damaged_trainers())
def test_F9_a_trainer_s_state_of_another_shape_is_one_line(name):
    state = damaged_trainers()[name]
    with pytest.raises(UserError, match="^out/latest: its trainer's state is damaged") as told:  # noqa: SIM117
        with trainer.damage_is_one_line(Path("out")):
            trainer.check_state(state, {"best": 2.0}, 1)
    assert "\n" not in str(told.value)


def test_F9_an_optimizer_s_state_of_other_parameters_is_refused():
    def made(rows: int) -> torch.optim.AdamW:
        layer = torch.nn.Linear(3, rows)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        return optimizer

    tensors, saved = pack_optimizer(made(2), "o.")
    saved, same = json.loads(json.dumps(saved)), made(2)
    unpack_optimizer(same, tensors, saved | {"groups": [saved["groups"][0] | {"lr": 0.25}]}, "o.")
    assert same.param_groups[0]["lr"] == 0.25
    missing = saved["keys"] | {"0": ["step", "exp_avg"]}
    for odd in (
        saved | {"keys": missing},
        saved | {"keys": {"7": saved["keys"]["0"]}},
        saved | {"groups": []},
        saved | {"groups": [saved["groups"][0] | {"betas": [0.5, 0.5]}]},
        saved | {"groups": [saved["groups"][0] | {"lr": "x"}]},
    ):
        with pytest.raises((ValueError, KeyError)):
            unpack_optimizer(made(2), tensors, odd, "o.")
    with pytest.raises(ValueError, match="another shape"):
        unpack_optimizer(made(4), tensors, saved, "o.")


def test_F10_nothing_is_built_that_the_weights_cannot_fill(tmp_path):
    """A config of a few bytes once allocated until the machine was full."""
    about = {"model": TINY, "tokenizer": {"hash": OLD.hash}, "stage": "rm"}
    head = {"pooling": "last", "members": 2, "mlp": True}
    reward = RewardEnsemble(GPTConfig(**TINY), "last", 2)
    checkpoint.save(tmp_path / "rm", 1, reward.state_dict(), about | {"head": head}, OLD)
    file = unlisted(tmp_path / "rm" / "latest" / "config.json")
    good = json.loads(file.read_text())
    for model, more in (
        ({"n_layer": 1000}, {"members": 100}),
        ({"n_embd": 40_000_000}, {}),
        ({"vocab_size": 2**31 - 1}, {}),
        ({"context": 2**31 - 1}, {}),
        ({"n_inner": 2**31 - 1}, {}),
        ({"lora_rank": 2**31 - 1}, {}),
        ({}, {"members": 100}),
        ({}, {"members": 10**9}),
        ({}, {"pooling": "x"}),
        ({}, {"self": 1}),
        ({}, {"mlp": 1}),
    ):
        file.write_text(json.dumps(good | {"model": TINY | model, "head": head | more}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError) as told:
            checkpoint.load_reward(tmp_path / "rm")
        assert len(str(told.value)) < 600 and "\n" not in str(told.value)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
