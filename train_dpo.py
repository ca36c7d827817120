"""Stages 2 and 3 in one: tune the language model on pairs of responses, with DPO or IPO and no reward model.

    python train_dpo.py                                   # after train_sft.py: pairs of the built-in ratings
    python train_dpo.py --preset smoke                    # seconds, to see that it runs
    python train_dpo.py --data choices.jsonl --loss ipo --out runs/mine/dpo
    python train_dpo.py --online --out runs/online/dpo --init runs/demo/sft --reward-model runs/demo/rm

DPO as in Rafailov et al. 2023: the policy is its own reward model, beta log p / p(reference), trained with
the reward model's pairwise loss.  IPO (Azar et al. 2023) pulls the margin to 1 / (2 beta) instead.  --online
lets the policy write both responses, of which a reward model prefers one (Guo et al. 2024).  Departures:
- what people said is a soft label: vote shares, or for ratings the odds that one rater scores higher;
- of judged pairs the reference's log-probabilities are computed once: the loop holds no reference [D26];
- there is no dropout [D5]: a policy that has not moved has margins of exactly 0.

Numbers in brackets are implementation details: docs/details.md names each one's source and test.
"""

from __future__ import annotations

import minirlhf.support.ctrl_c  # noqa: F401  (before torch: Ctrl-C during the slow imports prints one line)

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from minirlhf import checkpoint, data, optim, preference
from minirlhf.model import GPT
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling
from minirlhf.run import Run, RunConfig
from minirlhf.support import cli
from minirlhf.support.cli import Above0, AtLeast0, Count, CountOr0, Epsilon, Real, Temperature
from minirlhf.support.history import Sums
from minirlhf.support.pairs import JudgedPairs, Pairs, SampledPairs, judged_pairs, response_logps
from minirlhf.support.prepare import prepare
from minirlhf.support.schedule import ends_a_quarter

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGGED = ("train/loss", *REWARDS, "logps/chosen", "logps/rejected")


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: Literal["smoke", "demo", "pretrained", "smollm2"] = "demo"
    """Named settings.  Any option given beside it wins."""
    out: Path = Path("runs/demo/dpo")
    """Folder for checkpoints and metrics.  Earlier stages are looked for beside it (sft, rm)."""
    init: Path | None = None
    """SFT checkpoint from which the policy starts, and the reference.  Default: OUT/../sft."""

    # Pairs that people judged
    genres: tuple[str, ...] = ("movies",)
    """Which sentences of a dataset with genres to train on."""
    genre: str = "movies"
    """Genre to validate and test on, and of the prompts of --online."""
    part: Literal["all", "a", "b"] = "all"
    """Half of the training rows (by a hash of the prompt or text), as in train_rm.py."""
    pairs: Count = 1
    """Pairs drawn per rated text, among the texts that answer the same prompt.  Choices are pairs already."""
    epochs: Count = 1
    """Passes over the training pairs.  DPO overfits soon: more than 3 rarely help."""

    # Pairs that the policy writes
    online: bool = False
    """Let the policy write the pairs of every step, and a reward model prefer one response of each."""
    reward_model: Path | None = None
    """Reward-model checkpoint for --online.  Default: OUT/../rm."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """Split that becomes prompts for --online.  auto: val of the built-in data, and all rows of your own."""
    iterations: Count = 100
    """Optimiser steps of --online, each on fresh pairs."""
    missing_eos_penalty: Real = 1.0
    """Penalty in reward points for a response of --online without EOS [D9]."""
    prompt_tokens: Count = 4
    """Tokens of a text without a prompt that become its prompt, in --online and in evaluation."""
    response_tokens: Count = 24
    """Longest sample in tokens, in --online and in evaluation."""
    temperature: Temperature = 1.0
    """Temperature of every log-probability and of the sampler [D3]."""

    # Loss
    loss: Literal["dpo", "ipo"] = "dpo"
    """Loss.  dpo: cross-entropy of the implicit rewards.  ipo: squared distance of the margin to a target."""
    beta: Above0 = 0.1
    """Reward points per nat of log-ratio: the KL coefficient.  Smaller values let the policy move further."""
    label_smoothing: Annotated[float, cli.Range(0, below=0.5)] = 0.0
    """Share of labels taken to be wrong (conservative DPO): a share s becomes s + this times (1 - 2 s)."""

    # Optimisation
    batch: Count = 32
    """Pairs per optimiser step, over all ranks."""
    microbatch: Count | None = None
    """Most pairs per forward pass on each rank.  Fewer save memory; gradients are the same [D17]."""
    lr: Above0 = 1e-4
    """Highest learning rate: linear warm-up, then linear to 0."""
    warmup: CountOr0 = 10
    """Steps of linear warm-up."""
    adam_eps: Epsilon = 1e-8
    """Adam's epsilon."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients are scaled down to this norm.  0: no clipping."""
    fused_head: Literal["auto", "on", "off"] = "auto"
    """Compute logits in tiles, and again in backward, instead of holding them all.  auto: above 128 MiB."""


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/dpo"), data="toy", pairs=2, iterations=4, batch=64,
                    warmup=2, response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/dpo"), train_layers=14, lr=2e-5),
    "pretrained": Config(preset="pretrained", out=Path("runs/pretrained/dpo"), lr=1e-6, microbatch=4,
                         response_tokens=128),
}  # fmt: skip


def measure(config: Config, run: Run, policy: GPT, pairs: Pairs, sampling: Sampling) -> tuple[Tensor, dict]:
    """Loss and measures on a part of a batch of pairs; those of all parts add up to the batch's [D17]."""
    with run.autocast():
        logps = response_logps(policy, pairs.texts, sampling, config.fused_head)  # [2 b]
    log_ratios = preference.sequence_log_ratios(logps, pairs.ref_logps, pairs.lengths, config.loss)  # [D25]
    chosen, rejected = log_ratios.chunk(2)  # [b]
    share = pairs.share + config.label_smoothing * (1 - 2 * pairs.share)
    pair_loss = preference.dpo_loss if config.loss == "dpo" else preference.ipo_loss
    loss = pair_loss(chosen, rejected, config.beta, share) * (len(pairs) / pairs.total)
    loss = loss if len(pairs) else logps.sum()  # 0, of a rank without a pair, with a backward like others'

    margins = config.beta * (chosen - rejected).detach()
    right = torch.where(pairs.share > 0.5, (margins.sign() + 1) / 2, 0.5)  # no margin, or a tie: a half
    found = dict(zip(REWARDS, (config.beta * chosen, config.beta * rejected, margins, right), strict=True))
    found |= dict(zip(("logps/chosen", "logps/rejected"), logps.chunk(2), strict=True))
    if pairs.sampled:  # the policy's own samples: their log-ratio estimates its KL to the reference [D1]
        found |= pairs.measures | {"objective/kl": (logps - pairs.ref_logps).view(2, -1).mean(0)}
    return loss, {"train/loss": loss} | {name: x.sum() / pairs.total for name, x in found.items()}


@torch.no_grad()
def validate(config: Config, run: Run, policy: GPT, pairs: JudgedPairs, sampling: Sampling) -> dict:
    """Loss, accuracy (share of pairs whose margin has the right sign) and mean margin, of all `pairs`."""
    sums = Sums(LOGGED, run.device)
    for batch in map(pairs.batch, range(len(pairs))):
        for part in batch.split(config.microbatch):
            _, found = measure(config, run, policy, part, sampling)
            sums.add({name: x * (batch.total / len(pairs.items)) for name, x in found.items()})
    found = sums.over_ranks(run.machine)
    names = {"loss": "train/loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    return {name: found[logged] for name, logged in names.items()}


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    cli.refuse_unread(("--genres", "--part", "--pairs", "--epochs"), "with --online", config.online)
    of_samples = ("--reward-model", "--split", "--iterations", "--missing-eos-penalty")
    cli.refuse_unread(of_samples, "without --online", not config.online)
    run = Run("dpo", config)

    # Setup: the policy, which still is the reference; pairs; the optimiser.
    stages, remedy = config.out.parent, "run train_sft.py first, or name one with --init"
    init = checkpoint.resolve(config.init or stages / "sft", remedy)
    tokenizer = checkpoint.writer(init)[2]
    reward_dir = (config.reward_model or stages / "rm") if config.online else None
    reader = RewardReader.load(reward_dir, "run train_rm.py first, or name one with --reward-model")
    source = data.load(config.data, config.skip_bad, config.rating_scale, config.data_dir, config.fields)
    if not run.begin(source, init=init, reward_model=reward_dir):
        return
    policy = checkpoint.load_gpt(init)
    sampling = Sampling(config.response_tokens, config.temperature, tokenizer.ends, tokenizer.pad)  # [D3]
    if config.online:
        ref, held_out = checkpoint.load_gpt(init), {}
        prepare(config, run, [policy], [ref, reader.model])
        pairs = SampledPairs(config, run, source, (policy, ref), reader, tokenizer, sampling)
    else:
        prepare(config, run, [policy], [])
        pairs, held_out = judged_pairs(config, run, source, policy, tokenizer, sampling)
    optimizer = optim.adamw([policy], config.lr, 0.0, (0.9, 0.999), config.adam_eps)
    run.resume(tokenizer, policy, optimizer=optimizer)
    run.print(f"{config.loss} loss; {len(pairs)} steps of {config.batch} pairs; {run.where}")

    # The loop: one optimiser step per iteration; four validations.
    for step in run.loop(len(pairs)):
        lr = config.lr * optim.warmup_linear(step, len(pairs), config.warmup)
        optim.set_lr(optimizer, lr)

        # 1. Pairs: this rank's share of a batch that people judged, or that the policy now writes.
        run.phase("pairs")
        batch = pairs.batch(step)

        # 2. Gradients: each part's loss is divided by the pairs of the whole batch, over all ranks [D17].
        run.phase("update")
        sums = Sums(LOGGED, run.device)  # also on a rank without a pair of a small batch
        for part in batch.split(config.microbatch):
            loss, found = measure(config, run, policy, part, sampling)
            loss.backward()
            sums.add(found)

        # 3. Step.
        norm = run.take_step(optimizer, config.max_grad_norm, "policy")
        metrics = sums.over_ranks(run.machine) | {"train/grad_norm": norm, "lr": lr}

        # 4. Validation, on pairs that people judged.
        due = ends_a_quarter(step, len(pairs))
        if due and held_out:
            run.phase("validate")
            found = validate(config, run, policy, held_out["val"], sampling)
            metrics |= {f"val/{name}": value for name, value in found.items()}
            run.print(f"step {step + 1}: " + ", ".join(f"val/{n} {value:.3f}" for n, value in found.items()))
        run.log(step + 1, metrics, "loss {train/loss:.3f} margin {rewards/margins:.2f}")
        run.checkpoint(step + 1, due)

    results = {split: validate(config, run, policy, held_out[split], sampling) for split in held_out}
    run.save(len(pairs), complete=True, results=results | {"seconds": run.elapsed})
    if held_out:
        run.print("test: " + ", ".join(f"{name} {value:.3f}" for name, value in results["test"].items()))
    run.print(f"{run.elapsed:.0f} s; policy in {config.out}")


if __name__ == "__main__":
    cli.run_script(main)
