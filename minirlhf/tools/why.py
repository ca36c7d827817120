"""Why the policy wrote each token: RUN/why.json, which python -m minirlhf.report then shows as colours.

    python -m minirlhf.why runs/demo                 # 12 test prompts, SFT's answer and PPO's: under a minute
    python -m minirlhf.why runs/demo --samples 24 --replacements 16
    python -m minirlhf.why runs/demo --policy runs/demo/dpo

The prompts and both texts are the first of those in RUN/results.json: they are not chosen.  Of every token:

replaced        what it holds up: the score of the text, less the mean score with the token replaced by
                others that the reference draws in its place; `judge_replaced` the same by the judge
added           by how much it raised the score of the text that ends there
nats            log p(policy) - log p(reference)
value           the critic's forecast of what is still to come, before the token
advantage       how much better the token was than forecast (GAE), in points of the reward
entropy         of the distribution that the writer drew it from, in nats
probability     of the token, by its writer; `others`: the likeliest other tokens
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import gae
from minirlhf import UserError, checkpoint, ppo
from minirlhf.measure import attribution
from minirlhf.model import GPT, ValueModel
from minirlhf.rewards import RewardReader, make_critic
from minirlhf.rollout import Texts, forbid, read_before, response_logprobs, response_values
from minirlhf.support import adapters, cli, files, shard_files
from minirlhf.support.cli import AtLeast0, Real, Share
from minirlhf.support.ends import are_ends
from minirlhf.support.hardware import Machine
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools import evaluate
from minirlhf.tools.report.facts import VERSION

OF_CRITIC = {"kl_coef": AtLeast0, "gamma": Share, "lam": Share, "missing_eos": str}
OF_CRITIC |= {"missing_eos_penalty": Real, "value_init": str}
OTHERS = 3  # likeliest other tokens that are shown
NO_CRITIC = "the policy was trained without a critic: its advantage is one number for the whole response"


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; where several make one character, it is the last one's."""
    found, done = [], ""
    for i in range(len(ids)):
        so_far = tokenizer.decode(ids[: i + 1])
        whole = so_far if i + 1 == len(ids) else so_far.rstrip("\ufffd")
        found.append(whole[len(done) :])
        done = whole if len(whole) > len(done) else done
    return found


def load_critic(setting: evaluate.Setting, reward_dir: Path | None) -> ValueModel | str:
    """PPO's critic, from the trainer's file beside the policy; a sentence where there is none."""
    about, training = setting.about, setting.about["training"]
    algorithm = about.get("algorithm")
    if setting.name == "DPO":
        return "DPO has no critic"
    if isinstance(algorithm, dict) and algorithm.get("baseline", "critic") != "critic":
        return NO_CRITIC
    tensors, _ = shard_files.read(setting.policy_dir, Machine(torch.device("cpu")))
    own = {name.removeprefix("value."): x for name, x in tensors.items() if name.startswith("value.")}
    if not own:
        return f"{setting.policy_dir} holds no critic"
    try:
        reward = RewardReader.load(reward_dir, "train one with train_rm.py")
        critic = make_critic(setting.policy, setting.tokenizer, reward, training.get("value_init", "auto"))
        given = (training.get(name) for name in ("lora", "lora_alpha", "train_layers"))
        adapters.adapt(critic.backbone, *given)
        critic.load_state_dict(adapters.split_state(critic)[1] | own)
    except (RuntimeError, UserError, TypeError) as error:
        return f"the critic in {setting.policy_dir} cannot be read: {str(error).splitlines()[0]:.100}"
    return critic.to(setting.policy.wte.weight.device).eval()


@torch.no_grad()
def of_critic(
    critic: ValueModel, setting: evaluate.Setting, texts: Texts, scores: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Values and advantages [B, R], as train_ppo.py had them before it whitened the advantages.

    scores [B]: what PPO maximised.
    """
    defaults = {"gamma": 1.0, "lam": 0.95, "missing_eos": "none", "missing_eos_penalty": 1.0}
    defaults |= {"kl_coef": 0.1, "value_init": "auto"}
    folder, sampling = setting.policy_dir, setting.sampling
    settings = evaluate.settings_of(setting.about, folder, OF_CRITIC, **defaults)
    in_reward = (setting.about.get("algorithm") or {}).get("kl", "reward") == "reward"
    values = response_values(critic, texts)
    logprobs, ref_logprobs = (
        response_logprobs(model, texts, sampling)[0] for model in (setting.policy, setting.sft)
    )
    penalty, mode = settings["missing_eos_penalty"], settings["missing_eos"]
    scores = ppo.apply_missing_eos(scores, texts.ended(sampling.eos), penalty, mode)
    coef = kl_coef if in_reward else 0.0
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, texts.response_mask, coef)
    advantages, _ = gae(rewards, values, texts.response_mask, gamma=settings["gamma"], lam=settings["lam"])
    return values, advantages


def last_kl_coef(setting: evaluate.Setting) -> float:
    """The KL coefficient at the end of training: an adaptive one is in the trainer's file."""
    file = checkpoint.resolve(setting.policy_dir) / "trainer.json"
    state = files.read_json(file, "train again") if file.exists() else {}
    counters = state.get("counters")
    found = counters.get("kl_coef") if isinstance(counters, dict) else None
    found = setting.about["training"].get("kl_coef", 0.1) if found is None else found
    return float(found) if isinstance(found, int | float) else 0.1


class Explainer:
    """Everything that is known of single tokens, of the texts of one setting."""

    def __init__(self, setting: evaluate.Setting, reward_dir: Path | None, replacements: int, seed: int):
        self.setting, self.replacements = setting, replacements
        self.generator = torch.Generator().manual_seed(seed)
        critic = load_critic(setting, reward_dir)
        self.critic, self.left_out = (None, critic) if isinstance(critic, str) else (critic, "")
        self.kl_coef = last_kl_coef(setting)

    @torch.no_grad()
    def explain(self, row: Texts, writer: GPT, record: Any) -> dict[str, Any]:
        """One text, and by column a number per token; None where there is none.

        record: that of the prompt, whose row reward functions may read.
        """
        setting, n = self.setting, int(row.response_mask.sum())
        row = Texts(row.prompts, row.prompt_mask, row.responses[:, :n], row.response_mask[:, :n])
        policy, ref, sampling = setting.policy, setting.sft, setting.sampling
        scorers = {
            name: lambda texts, score=score: score(texts, [record] * len(texts))
            for name, score in setting.scorers.items()
        }
        scores = {name: attribution.scored(score, row).item() for name, score in scorers.items()}
        where = attribution.replaceable(row, sampling)[0]
        others = attribution.alternatives(ref, row, sampling, self.replacements, self.generator)[0]
        shares = attribution.replaced(scorers, row, others, where)
        nats = response_logprobs(policy, row, sampling)[0] - response_logprobs(ref, row, sampling)[0]
        logprobs, entropy = response_logprobs(writer, row, sampling)
        columns = {"replaced": shares["score"]}
        if "judge" in shares:
            columns["judge_replaced"] = shares["judge"]
        columns |= {"added": attribution.added(scorers["score"], row), "nats": nats[0]}
        if self.critic is not None:
            found = torch.tensor([scores["score"]], device=row.tokens.device)
            values, advantages = of_critic(self.critic, setting, row, found, self.kl_coef)
            columns |= {"advantage": advantages[0], "value": values[0]}
        columns |= {"entropy": entropy[0], "probability": logprobs[0].exp()}
        ids = row.responses[0].tolist()
        return {
            "tokens": pieces(setting.tokenizer, ids),
            "ended": bool(are_ends(row.responses[:, -1], sampling.eos)) if n else False,
            "kl": rounded(nats.sum().item()),
            **{name: rounded(score) for name, score in scores.items()},
            "decisive": attribution.decisive(shares["score"]) if where.any() else [],
            "columns": {name: [rounded(x) for x in values.tolist()] for name, values in columns.items()},
            "others": self._likeliest_others(row, writer),
        }

    def _likeliest_others(self, row: Texts, writer: GPT) -> list[list[list[Any]]]:
        """For each token the likeliest others that the writer had: [[text, probability], ...]."""
        sampling, tokenizer = self.setting.sampling, self.setting.tokenizer
        logits = forbid(writer.logits(read_before(writer, row)[0]).float(), sampling.forbidden)
        p = (logits / sampling.temperature).softmax(-1)
        top = p.topk(min(OTHERS + 1, p.shape[1]))
        found = []
        for token, ids, shares in zip(row.responses[0].tolist(), *map(Tensor.tolist, top[::-1]), strict=True):
            pairs = [(i, share) for i, share in zip(ids, shares, strict=True) if i != token]
            named = [(i, "<end>" if i in tokenizer.ends else tokenizer.token_str(i)) for i, _ in pairs]
            found.append(
                [[name, rounded(s)] for (_, name), (_, s) in zip(named, pairs, strict=True)][:OTHERS]
            )
        return found


def rounded(x: float) -> float | None:
    """x to four digits, for a page; None for what is no number."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def explain(
    config: evaluate.Config, samples: int, replacements: int, step: Callable[[int], None] = lambda i: None
) -> dict[str, Any]:
    """What why.json holds: {version, policy, reward, judge, ..., samples: [{prompt, sft, ppo}]}."""
    setting = evaluate.load(config)
    if setting.sampling.temperature == 0:
        raise UserError(f"{setting.policy_dir}: trained at temperature 0: there are no probabilities")
    seed, prompts = config.seed, setting.prompts
    few = prompts[: evaluate.CHUNK * math.ceil(samples / evaluate.CHUNK)]  # so that the draws are evaluate's
    pairs = {
        "sft": (setting.sft, evaluate.write(setting.sft, few, setting.sampling, seed)),
        "ppo": (setting.policy, evaluate.write(setting.policy, few, setting.sampling, seed)),
    }
    of_model = not config.reward and (
        config.reward_model or evaluate.maximised_model(setting.about, config.run)
    )
    explainer = Explainer(setting, of_model or None, replacements, seed)
    rows = []
    for i in range(min(samples, len(prompts))):
        step(i)
        texts = {name: texts[i : i + 1] for name, (_, texts) in pairs.items()}
        row = {"prompt": texts["ppo"].decode(setting.tokenizer)[0][0]}
        record = setting.records[i]
        rows.append(
            row | {name: explainer.explain(text, pairs[name][0], record) for name, text in texts.items()}
        )
    about = setting.about
    return {
        "version": VERSION,
        "policy": setting.name,
        "reward": "reward model" if of_model else "reward",
        "split": config.split,
        "seed": seed,
        "prompts": len(prompts),
        "replacements": replacements,
        "left_out": explainer.left_out,
        "kl_coef": explainer.kl_coef if setting.name == "PPO" else None,
        "beta": about["training"].get("beta") if setting.name == "DPO" else None,
        "samples": rows,
    }


def parse() -> tuple[argparse.Namespace, evaluate.Config]:
    parser = cli.Parser("python -m minirlhf.why", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of a run, such as runs/demo.")
    parser.add_argument(
        "--samples",
        type=cli.number(cli.Count),
        default=12,
        help="Number of prompts that are explained; the first of those that minirlhf.evaluate uses.",
    )
    parser.add_argument(
        "--replacements",
        type=cli.number(cli.Count),
        default=8,
        help="Other tokens that are tried in each token's place: more are slower and less noisy.",
    )
    parser.add_argument("--policy", type=Path, help="Checkpoint of the tuned policy.  Default: RUN/ppo.")
    parser.add_argument("--sft", type=Path, help="Checkpoint of the SFT model.  Default: RUN/sft.")
    parser.add_argument(
        "--reward-model",
        type=Path,
        help="Reward model that is asked.  Default: the one that the policy was trained on.",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        help="Reward function, package.module:function[:WEIGHT], for a policy that was trained without a "
        "reward model.  May be repeated.",
    )
    parser.add_argument(
        "--judge", type=Path, help="A second reward model.  Default: RUN/judge, if it is there."
    )
    parser.add_argument(
        "--seed",
        type=cli.number(cli.Seed),
        default=1,
        help="Random seed, 0 or larger, as of minirlhf.evaluate.",
    )
    args = parser.parse_args()
    options = {
        name: getattr(args, name) for name in ("run", "sft", "policy", "reward_model", "judge", "seed")
    }
    return args, evaluate.Config(reward=tuple(args.reward), **options)


def main() -> None:
    args, config = parse()
    if not config.run.is_dir():
        raise UserError(f"{config.run}: there is no such folder: name the folder of a run")
    from tqdm import tqdm

    with tqdm(total=args.samples, desc="prompts", leave=False) as bar:
        found = explain(config, args.samples, args.replacements, lambda i: bar.update(i - bar.n))
    file = config.run / "why.json"
    files.write_output(file, json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    texts = 2 * len(found["samples"])
    print(f"{texts} texts explained in {file}; python -m minirlhf.report {config.run} shows them")


if __name__ == "__main__":
    cli.run_script(main)
