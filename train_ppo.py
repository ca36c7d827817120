"""Stage 3: tune the language model with PPO, or a relative of it, against the reward model.

    python train_ppo.py                                   # after train_sft.py and train_rm.py
    python train_ppo.py --preset smoke                    # seconds, to see that it runs
    python train_ppo.py --reward rm --reward minirlhf.rewards:repetition:-0.5
    python train_ppo.py --algorithm rloo --kl-coef 0.2    # or grpo, dr-grpo, dapo, cispo, gspo
    torchrun --nproc-per-node 8 train_ppo.py --out runs/big/ppo --init runs/big/sft --reward-model runs/big/rm

PPO as in Ziegler et al. 2019 and Stiennon et al. 2020: a response is an episode, a token is a step, the
reward model's score arrives at the last token, and a penalty for leaving the reference model arrives at every
token. As in Stiennon et al., the value model (the critic) is a model of its own, started from the reward
model. Deliberate departures:
- gradients of policy and value model are clipped apart: a large value loss cannot slow the policy down;
- the sampler draws from the whole distribution; there is no top-k or top-p to switch on [D2];
- every step's randomness is a function of (seed, stage, step, rank), so a resumed run is the same run [D21].

PPO's relatives (--algorithm) are rows of the table in minirlhf/algorithms.py; `algorithm` below is a row.
Numbers in brackets are implementation details: docs/details.md names each one's source and test.
"""

from __future__ import annotations

import minirlhf.support.ctrl_c  # noqa: F401  (before torch: Ctrl-C during the slow imports prints one line)

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from kernels import gae
from minirlhf import UserError, checkpoint, data, optim, ppo
from minirlhf.algorithms import AlgorithmOptions
from minirlhf.masked import whiten
from minirlhf.rewards import RewardReader, Scorer, fields_read, load_rewards, make_critic
from minirlhf.rollout import Sampling, by_microbatch, generate, response_logprobs, response_values
from minirlhf.run import Run, RunConfig
from minirlhf.support import cli
from minirlhf.support.cli import Above0, AtLeast0, Count, Epsilon, Real, Share, Temperature
from minirlhf.support.history import History
from minirlhf.support.prepare import prepare
from minirlhf.support.ragged import send


@dataclasses.dataclass(frozen=True)
class Config(AlgorithmOptions, RunConfig):  # strings are --help; more options: support/run_config.py
    preset: Literal["smoke", "demo", "pretrained", "smollm2"] = "demo"
    """Named settings.  Any option given beside it wins."""
    out: Path = Path("runs/demo/ppo")
    """Folder for checkpoints and metrics.  Earlier stages are looked for beside it (sft, rm)."""

    # Models and prompts
    init: Path | None = None
    """SFT checkpoint from which the policy starts, and the frozen reference.  Default: OUT/../sft."""
    reward_model: Path | None = None
    """Reward-model checkpoint.  Default: OUT/../rm, if --reward names rm."""
    monitor: Path | None = None
    """Second reward model whose scores are logged and never optimised: a judge."""
    genre: str = "movies"
    """Which sentences of a dataset with genres become prompts."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """Split of the data that becomes prompts.  auto: val of the built-in data, and all rows of your own."""
    value_init: Literal["auto", "reward", "sft"] = "auto"
    """Start of the value model: the reward model (Stiennon), or the SFT model with a zero head (Ziegler)
    [D13].  auto: the reward model, where it can score a prefix of the policy's own tokens."""

    # Rollout
    iterations: Count = 72
    """Number of PPO iterations: one rollout each, then --epochs passes over it."""
    batch: Count = 128
    """Responses per rollout, over all ranks (Ziegler: 512)."""
    prompt_tokens: Count = 4
    """Tokens of a text without a prompt of its own that become its prompt."""
    response_tokens: Count = 24
    """Longest response in tokens (Ziegler: 24)."""
    temperature: Temperature = 1.0
    """Temperature of the sampler and of every log-probability [D3] (Ziegler: 0.7, safer and less varied)."""
    stop: bool = True
    """Let responses end.  --no-stop takes the end-of-text token out of policy and reference."""
    save_samples: Count | None = None
    """Append the texts of every N-th rollout, with their scores, to OUT/samples.jsonl (rank 0's share)."""

    # Reward
    reward: tuple[str, ...] = ("rm",)
    """What to maximise: rm or package.module:function, with an optional :WEIGHT.  Repeat it for a sum."""
    disagreement_coef: AtLeast0 = 0.0
    """Subtract this times the standard deviation of the reward model's members (train_rm.py --members 3):
    what only some of them like is likely their mistake (Coste et al. 2024)."""
    kl_coef: AtLeast0 = 0.15
    """Penalty per nat of KL to the reference, in reward points (Ziegler: 0.15).  Where advantages are scaled
    and the KL is a term of the loss, it is in standard deviations of the reward."""
    kl_target: Above0 | None = None
    """KL in nats per sequence that kl_coef is adapted to [D11] (Ziegler: 6).  Default: a fixed kl_coef."""
    kl_horizon: Count = 10_000
    """Episodes over which the adaptive kl_coef moves (Ziegler: 10,000)."""
    missing_eos: Literal["none", "replace", "subtract"] = "subtract"
    """Score of a response without EOS [D9]: minus the penalty (Ziegler), or less the penalty (TRL).  With
    none, a policy can learn never to stop: one of our three seeds did."""
    missing_eos_penalty: Real = 1.0
    """Penalty in reward points for a response without EOS."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation and keep their mean [D10] (Ziegler: yes)."""

    # Update
    epochs: Count = 1
    """Passes over each rollout (Ziegler: 4).  Fresh samples gave more reward per nat than reused ones."""
    minibatch: Count = 32
    """Responses per optimiser step, over all ranks."""
    microbatch: Count | None = None
    """Most responses per forward pass on each rank.  Fewer save memory; gradients are the same [D17]."""
    lr: Above0 = 4e-4
    """Learning rate of the policy, linear to 0 over the iterations [D16]."""
    value_lr: Above0 = 4e-4
    """Learning rate of the value model, which decays alike."""
    adam_eps: Epsilon = 1e-5
    """Adam's epsilon, larger than PyTorch's 1e-8 [D16]."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients of policy and value model are each scaled down to this norm.  0: no clipping."""
    clip_range_value: Above0 | None = 0.2
    """Values are clipped to the rollout's plus or minus this [D12].  None: no clipping."""
    ent_coef: AtLeast0 = 0.0
    """Weight of an entropy bonus in the policy's loss."""
    gamma: Share = 1.0
    """Discount factor.  1 by default: episodes are short."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016)."""
    max_approxkl: Above0 | None = None
    """Leave the remaining minibatches of a rollout when one's approxkl passes this.  Default: never."""
    fused_head: Literal["auto", "on", "off"] = "auto"
    """Compute logits in tiles, and again in backward, instead of holding them all.  auto: above 128 MiB."""
    save_every: Count = 18
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.row().group
        sizes = ("batch", "minibatch", self.minibatch), ("batch", "group", group)
        for big, small, part in (*sizes, ("minibatch", "microbatch", self.microbatch)):
            if part and getattr(self, big) % part:
                raise UserError(f"--{big} {getattr(self, big)} is not divisible by --{small} {part}")
        if not self.stop and self.fused_head == "on":
            raise UserError(
                "--fused-head on never holds the logits that --no-stop takes a token out of: drop one"
            )
        if not self.stop and self.missing_eos != "none":
            raise UserError("--no-stop leaves no response an end of text to miss: add --missing-eos none")
        uses_rm = any(name == "rm" for name, _, _ in load_rewards(list(self.reward)))
        if not uses_rm and (self.reward_model or self.disagreement_coef or self.value_init == "reward"):
            raise UserError("--reward-model, --disagreement-coef and --value-init reward need --reward rm")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/ppo"), data="toy", iterations=4, batch=16,
                    minibatch=8, epochs=2, response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/ppo"), iterations=40, batch=64,
                      train_layers=14, kl_coef=0.1, lr=1e-4, value_lr=1e-4, save_every=20),
    "pretrained": Config(preset="pretrained", out=Path("runs/pretrained/ppo"), iterations=200, microbatch=4,
                         kl_coef=0.05, lr=3e-6, value_lr=1e-5, response_tokens=128),
}  # fmt: skip


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    cli.refuse_unread(["--kl-horizon"], "without --kl-target", config.kl_target is None)
    cli.refuse_unread(["--missing-eos-penalty"], "with --missing-eos none", config.missing_eos == "none")
    algorithm = config.row()  # PPO: groups of 1, a critic, whitened over the rollout, clip .2, KL as a reward
    of_critic = ("--value-init", "--value-lr", "--clip-range-value", "--gamma", "--lam", "--whiten-rewards")
    cli.refuse_unread(of_critic, "without a critic", algorithm.baseline != "critic")
    cli.refuse_unread(["--kl-coef", "--kl-target"], "with --kl none", algorithm.kl == "none")
    run = Run("ppo", config)

    # Setup: the policy and its frozen reference; a reward model, a judge, perhaps a value model, all without
    # dropout [D5]; prompts.
    rewards = load_rewards(list(config.reward))
    stages, uses_rm = config.out.parent, any(name == "rm" for name, _, _ in rewards)
    sft = checkpoint.resolve(config.init or stages / "sft", "run train_sft.py first, or name one with --init")
    _, _, tokenizer = checkpoint.writer(sft)
    reward_dir = (config.reward_model or stages / "rm") if uses_rm else None
    reward = RewardReader.load(reward_dir, "run train_rm.py first, or name one with --reward-model")
    judge = RewardReader.load(config.monitor, "train one with train_rm.py")
    how = (config.skip_bad, config.rating_scale, config.data_dir, config.fields)
    source = data.load(config.data, *how, fields_read(rewards))
    if not run.begin(source, init=sft, reward_model=reward_dir, monitor=config.monitor):
        return  # this run is complete
    policy, ref = checkpoint.load_gpt(sft), checkpoint.load_gpt(sft)
    with_critic = algorithm.baseline == "critic"
    critic = make_critic(policy, tokenizer, reward, config.value_init) if with_critic else None
    readers = [reader for reader in (reward, judge) if reader]
    prepare(config, run, [policy, critic] if critic else [policy], [ref, *(r.model for r in readers)])
    contexts = [policy.config.context, *(r.context for r in readers if r.tokenizer.hash == tokenizer.hash)]
    prompts, records = data.practice_prompts(config, run, source, tokenizer, min(contexts))

    # What is fixed for all iterations: this rank's share, the sampler's settings, the reward, the optimisers.
    G, world = algorithm.group, f"over {run.world} processes"
    groups = optim.exact_div(config.batch, G * run.world, f"--batch {world}, in groups of {G}")
    local_batch = groups * G
    local_minibatch = optim.exact_div(config.minibatch, run.world, f"--minibatch {world}")
    microbatch = min(config.microbatch or local_minibatch, local_minibatch)
    fused = optim.fuse_head(config.fused_head, microbatch * config.response_tokens, tokenizer.vocab_size)
    # The sampler's settings are those of all log-probabilities [D2] [D3].
    eos, pad, forbidden = tokenizer.ends, tokenizer.pad, None if config.stop else tokenizer.ends
    sampling = Sampling(config.response_tokens, config.temperature, eos, pad, forbidden, fused)
    scorer = Scorer(rewards, tokenizer, reward, judge, config.disagreement_coef, config.microbatch)
    policy_optimizer = optim.adamw([policy], config.lr, 0.0, (0.9, 0.999), config.adam_eps)  # [D16]
    learning_rates = [(policy_optimizer, config.lr)]
    changing = {"policy_optimizer": policy_optimizer}  # what a resumed run needs beside the policy
    if critic:
        value_optimizer = optim.adamw([critic], config.value_lr, 0.0, (0.9, 0.999), config.adam_eps)
        changing |= {"value": critic, "value_optimizer": value_optimizer}
        learning_rates.append((value_optimizer, config.value_lr))
    run.about["algorithm"] = dataclasses.asdict(algorithm)
    kl_coef = 0.0 if algorithm.kl == "none" else config.kl_coef
    state = run.resume(tokenizer, policy, {"kl_coef": kl_coef}, **changing)  # [D21]
    over_ranks = run.machine.sum_  # statistics are of all ranks
    clip, objective = (algorithm.clip_range, algorithm.clip_range_high), algorithm.objective
    discount = {"gamma": config.gamma, "lam": config.lam}
    run.print(f"{config.iterations} iterations of {config.batch} responses; {run.where}")

    for iteration in run.loop(config.iterations):
        kl_coef = state["kl_coef"]
        lr_factor = ppo.linear_decay(iteration, config.iterations)  # [D16]
        for optimizer, lr in learning_rates:
            optim.set_lr(optimizer, lr * lr_factor)

        # 1. Rollout: the policy continues this rank's share of a batch of prompts, each of them G times.
        run.phase("rollout")
        order = data.cursor(len(prompts), groups * run.world, config.seed, iteration)
        mine = [i for i in order[run.rank * groups : (run.rank + 1) * groups] for _ in range(G)]
        prompt_ids, prompt_mask = data.collate([prompts[i] for i in mine], pad, side="left")
        with run.autocast(whole=policy):
            texts = generate(policy, prompt_ids, prompt_mask, sampling)
        response_mask, has_eos = texts.response_mask, texts.ended(eos)  # [B, R] and [B] [D9]

        # 2. Score: all models read the texts by the update's function, so its first ratio is 1 [D4] [D18].
        run.phase("score")
        with run.autocast(), torch.no_grad():
            logprobs, _ = by_microbatch(response_logprobs, policy, texts, microbatch, sampling)  # [B, R]
            ref_logprobs, _ = by_microbatch(response_logprobs, ref, texts, microbatch, sampling)  # [B, R]
            values = by_microbatch(response_values, critic, texts, microbatch) if critic else None  # [D8]
            scores, per_text = run.together(scorer, texts, [records[i] for i in mine])  # [B]
        run.require_finite(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores)
        scores = ppo.apply_missing_eos(scores, has_eos, config.missing_eos_penalty, config.missing_eos)

        # 3. Rewards: the score at the last real token [D7]; at every token -kl_coef (log p - log p_ref) [D1].
        k1_coef = kl_coef if algorithm.kl == "reward" else 0.0
        token_rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, response_mask, k1_coef)
        if config.whiten_rewards:
            token_rewards = whiten(token_rewards, response_mask, shift_mean=False, sum_=over_ranks)  # [D10]

        # 4. Advantages.  With a critic, of each token: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t +
        #    gamma lam A_{t+1}; return_t = A_t + V_t is taken before A is whitened [D8].  Without one, of the
        #    whole response: its reward beside those of its group [D27].
        learnt = response_mask  # [B, R]: the tokens in the loss
        if critic:
            advantages, returns = gae(token_rewards, values, response_mask, **discount)
        else:
            advantages = ppo.group_advantages(token_rewards.sum(1), G, algorithm.baseline, algorithm.scale)
            advantages = advantages[:, None].expand_as(token_rewards)  # [B, R]
            equal = ppo.equal_rewards(scores, G)  # [B]: no score tells such a group's responses apart
            per_text["frac_reward_zero_std"] = equal.float()
            if algorithm.equal_groups == "drop":
                learnt = response_mask & ~equal[:, None]
        if algorithm.scale == "rollout":
            differing = True if critic else ~ppo.equal_rewards(token_rewards.sum(1), G)[:, None]
            advantages = whiten(advantages, response_mask & differing, sum_=over_ranks)  # [D10]
        weights, shares = ppo.averaging(learnt, algorithm.average, config.response_tokens)  # [D28]

        # 5. Update: epochs of minibatches.  The policy steps, then the critic, so that only one model's
        #    activations and gradients are in memory at a time.
        run.phase("update")
        history = History()
        for minibatch in optim.minibatches(local_batch, local_minibatch, config.epochs):
            here = send(minibatch, run.device)  # indices of what is on the device; texts takes the CPU's
            # Real tokens and the loss's divisor, over all ranks [D17].  In PPO they are the same number.
            tokens, divisor = run.sum_(torch.stack([learnt[here].sum(), shares[here].sum()]))
            if algorithm.equal_groups == "drop" and tokens == 0:
                continue  # on all ranks
            stats = history.new_step(tokens)

            for rows in minibatch.split(microbatch):
                here = send(rows, run.device)
                # policy_loss divides by tokens; with these weights it divides by the divisor.
                old, mask, weight = logprobs[here], learnt[here], weights[here] * (tokens / divisor)
                with run.autocast():
                    new, entropy = response_logprobs(policy, texts[rows], sampling)
                # The clipped objective [D12] [D29], and the KL where it is a term of the loss [D30].
                loss, found = ppo.policy_loss(
                    new, old, advantages[here], mask, clip, tokens, weight, objective
                )
                kl = ppo.kl_loss(new, old, ref_logprobs[here], mask, algorithm.kl, tokens, weight)
                mean_entropy = (entropy * mask).sum() / tokens  # padding holds 0 [D22]
                (loss + kl_coef * kl - config.ent_coef * mean_entropy).backward()
                stats.add({"loss/policy_avg": loss, "policy/entropy_avg": mean_entropy} | found)
            if config.max_approxkl and stats.sum(run, "policy/approxkl_avg") > config.max_approxkl:
                policy_optimizer.zero_grad(set_to_none=True)
                history.leave_step()
                break
            run.take_step(policy_optimizer, config.max_grad_norm, "policy")

            if not critic:
                continue
            for rows in minibatch.split(microbatch):
                here = send(rows, run.device)
                target, mask, clip_value = returns[here], learnt[here], config.clip_range_value
                with run.autocast():
                    new_values = response_values(critic, texts[rows])
                loss, clipped = ppo.value_loss(new_values, values[here], target, mask, clip_value, tokens)
                loss.backward()
                stats.add({"loss/value_avg": loss, "val/clipfrac_avg": clipped})
            run.take_step(value_optimizer, config.max_grad_norm, "value model")

        # 6. Metrics are means over real tokens [D22]; last, the controller sets the next kl_coef [D11].
        per_text |= ppo.rollout_metrics(scores, logprobs, ref_logprobs, response_mask, has_eos, k1_coef)
        metrics = history.means(run.machine) | run.means(per_text, config.batch)
        metrics |= {"objective/kl_coef": kl_coef, "lr": config.lr * lr_factor}
        metrics |= {"episode": (iteration + 1) * config.batch}
        if critic:
            explained = ppo.explained_variance(values, returns, response_mask, over_ranks)
            metrics["val/explained_variance"] = explained.item()
        elif metrics["frac_reward_zero_std"] > 1 - 1e-6:
            run.print(f"iteration {iteration + 1}: all scores are equal in every group: they teach nothing")
        if config.kl_target is not None:
            kl, target = metrics["objective/kl"], config.kl_target
            state["kl_coef"] = ppo.adapt_kl_coef(kl_coef, kl, target, config.batch, config.kl_horizon)
        run.log(iteration + 1, metrics, "score {objective/scores:.2f} kl {objective/kl:.1f}")
        due, last = (iteration + 1) % config.save_every == 0, iteration + 1 == config.iterations
        run.record_texts(iteration + 1, texts, per_text, k1_coef, show=due or last, every=config.save_samples)
        run.checkpoint(iteration + 1, due)

    run.save(config.iterations, complete=True, results={"seconds": run.elapsed})
    run.print(f"policy in {config.out}")


if __name__ == "__main__":
    cli.run_script(main)
