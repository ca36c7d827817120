"""Stage 3: tune the language model with PPO against the reward model.

    python train_ppo.py                                   # after train_sft.py and train_rm.py
    python train_ppo.py --preset smoke                    # seconds, to see that it runs
    python train_ppo.py --reward rm --reward minirlhf.rewards:repetition:-0.5
    torchrun --nproc-per-node 8 train_ppo.py --out runs/big/ppo --init runs/big/sft --reward-model runs/big/rm

PPO as in Ziegler et al. 2019 and Stiennon et al. 2020: a response is an episode, a token is a step, the reward model's score
arrives at the last token and a penalty for leaving the reference model arrives at every one.  Deliberate departures:
- the value model is a model of its own, started from the reward model (Stiennon), not a head on the policy (Ziegler), unless
  --shared-trunk asks for one;
- gradients of policy and value model are clipped apart, so that a large value loss cannot slow the policy down;
- the sampler draws from the whole distribution; there is no top-k or top-p to switch on [D2];
- every step's randomness is a function of (seed, iteration, rank), so a resumed run is the same run [D21].

Numbers in brackets are the README's register of implementation details.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from kernels import gae
from minirlhf import UserError, checkpoint, data, optim, ppo, rewards, run
from minirlhf.masked import whiten
from minirlhf.model import ValueModel, critic_from, disable_dropout, run_blocks, store_blocks, train_last
from minirlhf.rollout import Rollout, generate, read, read_before, response_logprobs, response_values
from minirlhf.support import cli, hardware
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import estimate


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["smoke", "demo", "gpt2", "smollm2"] = "demo"
    """Named settings; any option given beside it wins."""
    out: Path = Path("runs/demo/ppo")
    """Where checkpoints and metrics go.  Earlier stages are looked for beside it (sft, rm)."""
    init: Path | None = None
    """SFT checkpoint: the policy's start and the frozen reference.  Default: OUT/../sft."""
    reward_model: Path | None = None
    """Reward-model checkpoint.  Default: OUT/../rm."""
    monitor: Path | None = None
    """A second reward model that is only logged, never optimised: the judge."""
    reward: tuple[str, ...] = ("rm",)
    """rm, or package.module:function, each with an optional :WEIGHT; the score is their weighted sum."""
    data: str = "vader"
    """Where prompts come from: vader (built in), toy, or a file or folder (.jsonl, .jsonl.gz, .txt)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset."""
    genre: str = "movies"
    """Which sentences of a dataset with genres become prompts."""
    skip_bad: bool = False
    """Count and skip malformed rows instead of stopping."""
    resume: bool = False
    """Go on from OUT's newest checkpoint, bit for bit [D21]."""
    overwrite: bool = False
    """Start again even if OUT holds a run."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    save_samples: int | None = None
    """Every so many iterations, write the rollout's texts and their scores to OUT/samples.jsonl (rank 0's share)."""
    seed: int = 1
    """Of everything random; 0 or more."""

    # Rollout
    iterations: int = 72
    """PPO updates: one rollout and its epochs each."""
    batch: int = 128
    """Responses a rollout, over all ranks (Ziegler: 512)."""
    prompt_tokens: int = 4
    """A text without a prompt of its own is cut after this many tokens."""
    response_tokens: int = 24
    """Longest response (Ziegler: 24)."""
    temperature: float = 1.0
    """Of the sampler and of every log-probability [D3] (Ziegler: .7, whose texts are safer and less varied)."""
    stop: bool = True
    """--no-stop takes the end-of-text token out of policy and reference: every response has full length."""

    # Reward
    disagreement_coef: float = 0.0
    """rm is the mean of its members' scores minus this times their standard deviation: what only some of them like is likely
    their mistake (Coste et al. 2024; needs a reward model trained with --members 2 or more)."""
    kl_coef: float = 0.1
    """Reward points a nat (Ziegler: .15)."""
    kl_target: float | None = None
    """Nats a sequence that an adaptive kl_coef steers to [D11]; None keeps it fixed (Ziegler: 6)."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive kl_coef moves (Ziegler)."""
    missing_eos: Literal["none", "replace", "subtract"] = "subtract"
    """A response without EOS: its score is replaced by the penalty (Ziegler), or lowered by it (TRL) [D9].  With none, a policy
    may learn never to stop, as one seed of three did here: few texts end that way, so it costs nats and wins little."""
    missing_eos_penalty: float = 1.0
    """Replaced by minus this, or lowered by this."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation, mean kept [D10] (Ziegler: yes; with a critic from the reward model, no)."""

    # Update
    train_layers: int | None = None
    """Train only the last so many blocks and what follows them, of policy and value model; None: everything.  All that is not
    trained, the other models too, is then kept in --precision."""
    epochs: int = 1
    """Passes over a rollout (Ziegler: 4).  Samples are cheap here, and new ones stray less, per nat, than old ones reused."""
    minibatch: int = 32
    """Responses an optimiser step, over all ranks."""
    microbatch: int | None = None
    """Responses a forward pass, a rank; smaller saves memory and changes nothing else [D17]."""
    tokens_per_microbatch: int | None = None
    """As many responses a forward pass as make up to this many tokens, prompts included: a bound on memory, not on rows."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: a fraction of the memory, a third more time."""
    lr: float = 2e-4
    """Learning rate, linear to 0 over the iterations [D16]."""
    value_lr: float = 4e-4
    """The value model's, decayed alike."""
    adam_eps: float = 1e-5
    """Adam's epsilon, larger than its default [D16]."""
    clip_range: float = 0.2
    """Of the ratio (Schulman et al. 2017)."""
    clip_range_value: float | None = 0.2
    """Of the value around the rollout's [D12]; None: unclipped."""
    ent_coef: float = 0.0
    """Entropy bonus."""
    gamma: float = 1.0
    """Discount (1: an episode is short)."""
    lam: float = 0.95
    """Of generalised advantage estimation (Schulman et al. 2016)."""
    whiten_advantages: bool = True
    """Centre and scale over the rollout [D10]."""
    value_init: Literal["auto", "reward", "sft"] = "auto"
    """The value model starts as the reward model (Stiennon), or as the SFT model with a zero head (Ziegler) [D13].  auto: as
    the reward model where that can score a prefix: where it reads from left to right, and the policy's own tokens."""
    shared_trunk: bool = False
    """The critic is a head on the policy (Ziegler), from zero, not a model of its own: half the work of an update.  It wants a
    higher --lr: the demo learns as fast at 3.5e-4."""
    vf_coef: float = 0.1
    """Weight of the value loss where it trains the policy's trunk too; between two models, it would not change a thing."""
    max_grad_norm: float = 1.0
    """Of policy and value model, each."""
    max_approxkl: float | None = None
    """Leave the remaining minibatches of a rollout when one's approxkl passes this."""
    fused_head: Literal["auto", "on", "off"] = "auto"
    """Never hold the logits of a microbatch, at the price of computing them twice.  auto: where they would pass 128 MiB."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """torch.compile the blocks of policy and value model; worth it in long runs."""
    dry_run: bool = False
    """Print parameters, bytes and operations, and leave."""
    profile: bool = False
    """Trace the second iteration to OUT/trace.json (chrome://tracing, perfetto.dev)."""
    save_every: int = 18
    """Iterations between checkpoints."""

    def __post_init__(self):
        if self.fused_head == "on" and not self.stop:
            raise UserError(
                "--no-stop takes a token out of the logits, which --fused-head on never holds: drop one of them"
            )
        cli.check_positive(
            self, "iterations", "epochs", "batch", "minibatch", "microbatch", "prompt_tokens", "response_tokens", "temperature",
            "lr", "value_lr", "save_every", "save_samples", "train_layers", "tokens_per_microbatch",
        )  # fmt: skip
        for big, small in (("batch", "minibatch"), ("minibatch", "microbatch")):
            b, s = getattr(self, big), getattr(self, small)
            if s is not None and b % s:
                raise UserError(f"--{big} {b} does not divide by --{small} {s}")
        if not self.stop and self.missing_eos != "none":
            raise UserError(
                f"--no-stop leaves no end of text for --missing-eos {self.missing_eos}: add --missing-eos none"
            )


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/ppo"), data="toy", iterations=4, batch=16, minibatch=8, epochs=2,
                    response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/ppo"), iterations=40, batch=64, minibatch=32, train_layers=14,
                      lr=1e-4, value_lr=1e-4, save_every=20),
    "gpt2": Config(preset="gpt2", out=Path("runs/gpt2/ppo"), iterations=1000, epochs=4, batch=512, minibatch=64, microbatch=16,
                   lr=1e-5, value_lr=1e-5, kl_target=6.0, response_tokens=48),
}  # fmt: skip


def show_samples(
    prompts: list[str], responses: list[str], scores: torch.Tensor, kl: torch.Tensor, kl_coef: float
) -> None:
    """Three episodes as lm-human-preferences prints them: query, response, score, KL, and what PPO maximises."""
    for prompt, response, score, nats in list(
        zip(prompts, responses, scores.tolist(), kl.tolist(), strict=True)
    )[:3]:
        tqdm.write(
            f"  {prompt!r} -> {response!r}\n    score {score:+.2f}  kl {nats:.1f}  total {score - kl_coef * nats:+.2f}"
        )


def sample_rows(prompts: list[str], responses: list[str], said: dict[str, torch.Tensor | None]) -> list[dict]:
    """The rollout's texts and what each model said of them, for samples.jsonl."""
    known = {name: values.tolist() for name, values in said.items() if values is not None}
    rows = zip(prompts, responses, *known.values(), strict=True)
    return [dict(zip(("prompt", "response", *known), row, strict=True)) for row in rows]


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    out = config.out
    todo = "start" if config.dry_run else run.claim(out, config, config.resume, config.overwrite)
    if todo == "skip":
        print(f"{out} is complete: nothing to do (--overwrite to run it again)")
        return

    # Setup: the policy and its frozen reference, the reward model and a value model started from it.
    sft_dir = checkpoint.resolve(
        config.init or out.parent / "sft", "run train_sft.py first, or name one with --init"
    )
    machine = hardware.setup_machine(config.seed)
    precision = hardware.pick_precision(config.precision)
    sft_config, tokenizer = checkpoint.load_config(sft_dir), Tokenizer.load(sft_dir)
    checkpoint.check_tokenizer(sft_config, tokenizer)
    eos, pad = tokenizer.eot, tokenizer.pad
    local_batch, local_minibatch = (optim.exact_div(n, machine.world, f"--{name} over {machine.world} processes")
                                    for name, n in (("batch", config.batch), ("minibatch", config.minibatch)))  # fmt: skip
    microbatch = config.microbatch or local_minibatch
    policy, ref = (checkpoint.load_gpt(sft_dir) for _ in range(2))

    reward_functions = rewards.load_rewards(list(config.reward))
    reward_dir = config.reward_model or out.parent / "rm"
    load_reward = lambda path, remedy: checkpoint.load_reward(checkpoint.resolve(path, remedy))
    reward_model, reader = load_reward(reward_dir, "run train_rm.py first, or name one with --reward-model")
    if config.disagreement_coef and len(reward_model.members) == 1:
        raise UserError(
            f"--disagreement-coef: {reward_dir} has one member, and nobody to disagree with: use --members 3 there"
        )
    judge, judge_reader = (
        load_reward(config.monitor, "train one with train_rm.py") if config.monitor else (None, None)
    )
    scores_prefixes = reader.hash == tokenizer.hash and reward_model.members[0].backbone.config.reads_prefixes
    if config.shared_trunk:
        value_model = ValueModel(policy.config, trunk=policy)
        torch.nn.init.zeros_(value_model.out.weight)
    elif config.value_init == "reward" or config.value_init == "auto" and scores_prefixes:
        if reader.hash != tokenizer.hash:
            raise UserError(
                f"{reward_dir} reads other tokens than the policy writes: use --value-init sft or auto"
            )
        value_model = critic_from(reward_model.members[0])  # [D13]
    else:
        value_model = ValueModel(policy.config)
        value_model.backbone.load_state_dict(policy.state_dict())
        torch.nn.init.zeros_(value_model.out.weight)
    frozen = [ref, reward_model, *([judge] if judge else [])]
    for model in (policy, value_model, *frozen):
        disable_dropout(model.to(machine.device))  # [D5]
        if config.train_layers is not None:
            train_last(model, 0 if model in frozen else config.train_layers, hardware.frozen_dtype(precision))
    for model in frozen:
        store_blocks(model.requires_grad_(False), hardware.frozen_dtype(precision))
    models = {"policy": policy, "critic": value_model, "reference": ref, "reward model": reward_model}
    models |= {"judge": judge} if judge else {}
    run_blocks(models.values(), config.gradient_checkpointing, config.compile)

    source = data.load(config.data, config.skip_bad, data_dir=config.data_dir)
    held_out = source.select(
        "val", source.genres_among([config.genre])
    ).records  # the test split is for evaluate.py
    prompts = data.prompts_of(held_out, tokenizer, config.prompt_tokens)
    longest = max(map(len, prompts)) + config.response_tokens
    readers = [("reward model", reward_model.members[0].backbone)] if reader.hash == tokenizer.hash else []
    for name, model in [("policy", policy), *readers]:
        if longest > model.config.context:
            raise UserError(
                f"{config.data}: prompt and response reach {longest} tokens, over the {name}'s context of "
                f"{model.config.context}: shorten the prompts, or lower --response-tokens or --prompt-tokens"
            )
    forbidden = None if config.stop else eos
    at_once = min(microbatch * config.response_tokens, config.tokens_per_microbatch or 10**9)
    fused = config.stop and optim.fuse_head(config.fused_head, at_once, tokenizer.vocab_size)
    policy_optimizer = optim.adamw([policy], config.lr, 0.0, (0.9, 0.999), config.adam_eps)  # [D16]
    value_parts = [value_model.fc, value_model.out] if config.shared_trunk else [value_model]
    value_optimizer = optim.adamw(value_parts, config.value_lr, 0.0, (0.9, 0.999), config.adam_eps)
    optimizers = {"policy": policy_optimizer, "critic": value_optimizer}
    # Two models take turns in a step: activations and gradients of one are gone before those of the other are made.
    turns = [("policy", "critic")] if config.shared_trunk else [("policy",), ("critic",)]
    kl_coef, first, seconds = config.kl_coef, 0, 0.0
    rows_at_once = min(
        microbatch, max(1, (config.tokens_per_microbatch or 10**9) // longest)
    )  # where all are the longest
    if config.dry_run:
        with machine.autocast(precision):
            estimate.show(models, turns, longest, config.response_tokens, rows_at_once, local_batch, fused)
        print(
            f"{config.epochs * config.batch // config.minibatch} optimiser steps an iteration, {config.iterations} of them"
        )
        return

    trainer_state = checkpoint.load_trainer(out) if todo == "resume" else None
    if trainer_state is not None:
        tensors, state = trainer_state
        policy.load_state_dict(checkpoint.load_state(out))
        value_weights = {k.removeprefix("value."): v for k, v in tensors.items() if k.startswith("value.")}
        value_model.load_state_dict(value_weights, strict=not config.shared_trunk)
        checkpoint.unpack_optimizer(policy_optimizer, tensors, state["policy_optimizer"], "policy_optimizer.")
        checkpoint.unpack_optimizer(value_optimizer, tensors, state["value_optimizer"], "value_optimizer.")
        kl_coef, first, seconds = state["kl_coef"], state["iteration"], state["seconds"]
    log = run.MetricLogger(out, machine, config.tensorboard, keep_until=first)

    def save(iteration: int, complete: bool) -> None:
        policy_tensors, policy_state = checkpoint.pack_optimizer(policy_optimizer, "policy_optimizer.")
        value_tensors, value_state = checkpoint.pack_optimizer(value_optimizer, "value_optimizer.")
        shared = "backbone." if config.shared_trunk else ()  # saved with the policy
        value_weights = {
            f"value.{k}": v for k, v in value_model.state_dict().items() if not k.startswith(shared)
        }
        if machine.rank == 0:
            checkpoint.save(
                out, iteration, policy.state_dict(),
                run.describe("ppo", policy.config, config, iteration, complete, tokenizer,
                                  reward_model=str(reward_dir), results={"seconds": seconds}),
                tokenizer,
                {"tensors": value_weights | policy_tensors | value_tensors,
                 "state": {"iteration": iteration, "kl_coef": kl_coef, "seconds": seconds, "policy_optimizer": policy_state,
                           "value_optimizer": value_state}},
            )  # fmt: skip

    if machine.rank == 0:
        print(f"{len(prompts)} prompts; {config.iterations} iterations of {config.batch} responses; {precision} on "
              f"{machine.device}")  # fmt: skip
    limit = estimate.gemm_rate(
        rows_at_once * longest, policy.config.n_embd, hardware.frozen_dtype(precision), machine.device
    )
    bar = tqdm(
        range(first, config.iterations), initial=first, total=config.iterations, disable=machine.rank > 0
    )
    with run.Interrupt() as interrupt, run.tracer(out, config.profile and machine.rank == 0) as tracer:
        for iteration in bar:
            start, times = time.perf_counter(), {}
            hardware.seed_everything(config.seed, iteration, machine.rank)  # [D21]

            # 1. Rollout: a batch of prompts, continued by the policy.
            with run.stopwatch(times, "time/rollout"), machine.autocast(precision):
                order = data.cursor(len(prompts), config.batch, config.seed, iteration)
                picks = order[machine.rank * local_batch : (machine.rank + 1) * local_batch]
                queries, query_mask = data.collate([prompts[i] for i in picks], pad, side="left")
                queries, query_mask = queries.to(machine.device), query_mask.to(machine.device)
                P = queries.shape[1]
                how = (P, config.temperature, forbidden, fused)  # the update reads as scoring does
                responses, response_mask = generate(
                    policy,
                    queries,
                    query_mask,
                    config.response_tokens,
                    config.temperature,
                    eos,
                    pad,
                    forbidden=forbidden,
                )  # responses, response_mask [B, R]
                tokens, mask = torch.cat([queries, responses], 1), torch.cat([query_mask, response_mask], 1)
                lengths = mask.sum(1).cpu()
                in_microbatches = partial(optim.split_rows, lengths, microbatch, config.tokens_per_microbatch)

            # 2. Score: each model reads what was written.  Forwards are those of the update: same shapes, same
            #    function, same precision, so the first ratio is 1 [D4] [D18].
            with run.stopwatch(times, "time/score"), machine.autocast(precision), torch.no_grad():
                logprobs, ref_logprobs, values = (
                    torch.zeros_like(response_mask, dtype=torch.float32) for _ in range(3)
                )
                for rows in in_microbatches(torch.arange(local_batch)):
                    t, m = tokens[rows], mask[rows]
                    hidden = (
                        read_before(policy, t, m, P) if config.shared_trunk else None
                    )  # one forward serves both
                    logprobs[rows], _ = response_logprobs(policy, t, m, *how, hidden)
                    values[rows] = response_values(value_model, t, m, P, hidden)
                    ref_logprobs[rows], _ = response_logprobs(ref, t, m, *how)
                texts = [
                    tokenizer.decode(row[keep].tolist())
                    for row, keep in zip(responses, response_mask, strict=True)
                ]
                prompt_texts = [
                    tokenizer.decode(row[keep].tolist())
                    for row, keep in zip(queries, query_mask, strict=True)
                ]
                rm_scores, disagreement = read(reward_model, reader, tokens, mask, tokenizer)
                cautious = rm_scores - config.disagreement_coef * disagreement
                scores = torch.zeros_like(rm_scores)
                for _, function, weight in reward_functions:
                    said = cautious if function is None else rewards.call(function, prompt_texts, texts)
                    scores = scores + weight * torch.as_tensor(said, dtype=scores.dtype, device=scores.device)
                judged = read(judge, judge_reader, tokens, mask, tokenizer)[0] if judge else None
            has_eos = ((responses == eos) & response_mask).any(1)
            penalty = config.missing_eos_penalty * (-1 if config.missing_eos == "replace" else 1)
            scores = ppo.apply_missing_eos(scores, has_eos, penalty, config.missing_eos)  # [D9]
            rollout = Rollout(
                queries, query_mask, responses, response_mask, logprobs, ref_logprobs, values, scores
            )

            # 3. Shape rewards: minus kl_coef * k1 at every token, the score at the last real one [D1] [D7].
            token_rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef)
            if config.whiten_rewards:
                token_rewards = whiten(token_rewards, response_mask, shift_mean=False)  # [D10]

            # 4. Advantages, and returns before whitening [D8].
            advantages, returns = gae(
                token_rewards, values, response_mask, gamma=config.gamma, lam=config.lam
            )
            if config.whiten_advantages:
                advantages = whiten(advantages, response_mask)  # [D10]

            # 5. Update: epochs of minibatches.
            factor = ppo.linear_decay(iteration, config.iterations)  # [D16]
            optim.set_lr(policy_optimizer, config.lr * factor)
            optim.set_lr(value_optimizer, config.value_lr * factor)
            history: list[dict[str, float]] = []
            with run.stopwatch(times, "time/update"):
                steps = (
                    p
                    for _ in range(config.epochs)
                    for p in torch.randperm(local_batch).split(local_minibatch)
                )
                for minibatch in steps:
                    count = response_mask[minibatch].sum().float()
                    machine.sum_([count])  # real tokens of the whole minibatch, over ranks [D17]
                    totals = optim.Sums()
                    for parts in turns:
                        for rows in in_microbatches(minibatch):
                            r, loss = rollout[rows], torch.zeros((), device=machine.device)
                            with machine.autocast(precision):
                                hidden = (
                                    read_before(policy, r.tokens, r.mask, P) if config.shared_trunk else None
                                )
                                if "policy" in parts:
                                    new_logprobs, entropy = response_logprobs(
                                        policy, r.tokens, r.mask, *how, hidden
                                    )
                                if "critic" in parts:
                                    new_values = response_values(value_model, r.tokens, r.mask, P, hidden)
                            if "policy" in parts:
                                policy_loss, stats = ppo.policy_loss(
                                    new_logprobs,
                                    r.logprobs,
                                    advantages[rows],
                                    r.response_mask,
                                    config.clip_range,
                                    count,
                                )  # [D12]
                                mean_entropy = entropy.sum() / count  # masked: padding holds 0 [D22]
                                loss = loss + policy_loss
                                if config.ent_coef:
                                    loss = loss - config.ent_coef * mean_entropy
                                totals.add({
                                    "loss/policy_avg": policy_loss, "policy/entropy_avg": mean_entropy,
                                    "policy/approxkl_avg": stats["approxkl"], "policy/clipfrac_avg": stats["clipfrac"],
                                    "val/ratio": stats["ratio"],
                                })  # fmt: skip
                            if "critic" in parts:
                                value_loss, value_clipfrac = ppo.value_loss(
                                    new_values,
                                    r.values,
                                    returns[rows],
                                    r.response_mask,
                                    config.clip_range_value,
                                    count,
                                )  # [D12]
                                loss = loss + (config.vf_coef if config.shared_trunk else 1.0) * value_loss
                                totals.add({"loss/value_avg": value_loss, "val/clipfrac_avg": value_clipfrac})
                            loss.backward()
                        step_stats = totals.over_ranks(machine)
                        stop = (
                            config.max_approxkl is not None
                            and step_stats["policy/approxkl_avg"] > config.max_approxkl
                        )
                        for part in parts:
                            if stop:
                                optimizers[part].zero_grad(set_to_none=True)
                            else:
                                optim.take_step(machine, optimizers[part], config.max_grad_norm)
                    history.append(step_stats)
                    if stop:
                        break

            # 6. Metrics over real tokens only [D22], then the controller moves kl_coef, after its use [D11].
            k1, _, k3 = ppo.kl_estimates(logprobs, ref_logprobs)
            kl = k1.sum(1)  # [B] nats a sequence; padding holds 0
            metrics = {name: float(np.mean([h[name] for h in history])) for name in history[0]}
            ratios = [h["val/ratio"] for h in history]
            sums = optim.Sums()
            share = lambda x: x.sum() / config.batch  # adds up over ranks to the mean over the rollout
            sums.add({
                "objective/kl": share(kl),
                "objective/kl_k3": share(k3.sum(1)),
                "objective/entropy": share(-logprobs.sum(1)),
                "objective/non_score_reward": share(-kl_coef * kl),
                "objective/rlhf_reward": share(scores - kl_coef * kl),
                "objective/scores": share(scores),
                "objective/rm_scores": share(rm_scores),
                "objective/rm_disagreement": share(disagreement),
                "val/eos_rate": share(has_eos.float()),
                "val/response_length": share(response_mask.sum(1).float()),
            } | ({"objective/judge": share(judged)} if judge else {}))  # fmt: skip
            metrics |= sums.over_ranks(machine) | {
                "val/ratio_var": float(np.var(ratios)),
                "val/explained_variance": ppo.explained_variance(values, returns, response_mask),
                "objective/kl_coef": kl_coef,
                "lr": config.lr * factor,
                "optimizer_steps": len(history) - int(stop),
                "episode": (iteration + 1) * config.batch,
            } | times  # fmt: skip
            work = estimate.update_operations(
                policy, value_model, mask[:, :-1].sum(1), response_mask.sum().item()
            )
            work *= len(history) * config.minibatch / config.batch  # epochs, unless they were cut short
            metrics["time/gemm_share"] = work / times["time/update"] / limit
            metrics["time/tokens_per_second"] = (
                metrics["val/response_length"] * config.batch / (time.perf_counter() - start)
            )
            if config.kl_target is not None:
                kl_coef = ppo.adapt_kl_coef(
                    kl_coef, metrics["objective/kl"], config.kl_target, config.batch, config.kl_horizon
                )
            seconds += time.perf_counter() - start
            log.log(iteration + 1, metrics | {"time/seconds": seconds})
            bar.set_postfix_str(
                f"score {metrics['objective/scores']:.2f} kl {metrics['objective/kl']:.1f} "
                f"len {metrics['val/response_length']:.0f} entropy {metrics['policy/entropy_avg']:.2f} "
                f"{metrics['time/tokens_per_second']:.0f} tok/s, {metrics['time/gemm_share']:.0%} of GEMM"
            )
            tracer.step()
            if config.save_samples and (iteration + 1) % config.save_samples == 0:
                said = {
                    "score": scores,
                    "rm": rm_scores,
                    "disagreement": disagreement,
                    "judge": judged,
                    "kl": kl,
                }
                log.write("samples", iteration + 1, sample_rows(prompt_texts, texts, said))
            done = iteration + 1 == config.iterations
            leave = interrupt.agreed(machine)
            if done or leave or (iteration + 1) % config.save_every == 0:
                if machine.rank == 0:
                    show_samples(prompt_texts, texts, scores, kl, metrics["objective/kl_coef"])
                save(iteration + 1, done)
            if leave and not done:
                raise UserError(f"stopped at iteration {iteration + 1}; {out} goes on with --resume")
    if machine.rank == 0:
        print(f"policy in {out}")


if __name__ == "__main__":
    cli.run_script(main)
