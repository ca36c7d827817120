"""The tuned policy against the SFT model, on test prompts that no stage has seen, with the same seeds.

    python -m minirlhf.evaluate --run runs/demo           # prints the table, writes runs/demo/results.json

Four writers continue the same prompts: the SFT model, best-of-4 and best-of-16 of its samples (picked by the
score that PPO maximised), and the PPO policy.  Up to three scorers compare each of them with one SFT sample:
the reward model that PPO maximised, an independent judge (other items, another seed), and the VADER lexicon.
Where the policy was trained on reward functions alone, their sum takes the reward model's place.  A policy
can win everywhere by degenerating: read KL, distinct-n, length and the samples beside the win rates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import UserError, checkpoint, data, ppo
from minirlhf.measure import baselines, stats
from minirlhf.model import GPT
from minirlhf.rewards import RewardReader, Scorer, fields_read, load_rewards
from minirlhf.rollout import Sampling, Texts, by_microbatch, generate, response_logprobs
from minirlhf.support import cli, files, hardware
from minirlhf.support.cli import AtLeast0, Count, CountOr0, Seed
from minirlhf.support.ends import Ends, are_ends
from minirlhf.support.layout import TEMPLATE
from minirlhf.support.rows import Reads
from minirlhf.tokenizer import Tokenizer

CHUNK = 128  # texts written or read at a time
SAMPLING = {"response_tokens": Count, "temperature": AtLeast0, "stop": bool}  # settings that are read back
SETTINGS = SAMPLING | {"data": str, "skip_bad": bool, "genre": str, "prompt_tokens": Count, "seed": Seed}
SETTINGS |= {"fields": list, "rating_scale": list}


@dataclasses.dataclass(frozen=True)
class Config:
    run: Path = Path("runs/demo")
    """Folder of the stages.  The options below default to folders in it."""
    sft: Path | None = None
    """Checkpoint of the SFT model.  Default: RUN/sft."""
    policy: Path | None = None
    """Checkpoint of the tuned policy.  Default: RUN/ppo."""
    reward_model: Path | None = None
    """Reward model that PPO maximised.  Default: the one that the policy's checkpoint names; RUN/rm for a
    policy of train_dpo.py without --online, which names none."""
    reward: tuple[str, ...] = ()
    """Reward functions to score with, package.module:function[:WEIGHT], for a policy trained without a reward
    model.  Default: those of minirlhf.rewards that the policy's checkpoint names."""
    judge: Path | None = None
    """Reward model that shares no training item with the first.  Default: RUN/judge, if there is one."""
    report_model: Path | None = None
    """Reward model whose test report goes into results.json.  Default: RUN/rm."""
    split: Literal["train", "val", "test"] = "test"
    """Split of the data that the prompts come from.  Tune settings on train: PPO practises on val, and test
    is for the final numbers."""
    prompts: Count = 256
    """Number of prompts; fewer if the split has not so many."""
    best_of: tuple[Count, ...] = (4, 16)
    """Each n adds a row: the best of n samples of the SFT model."""
    results: Path | None = None
    """File to write.  Default: RUN/results.json.  It must not hold the results of another policy."""
    samples: CountOr0 = 8
    """Number of prompts that are shown with both continuations."""
    seed: Seed = 1
    """Random seed, 0 or larger."""


@torch.no_grad()
def write(model: GPT, prompts: list[list[int]], sampling: Sampling, seed: int) -> Texts:
    """The prompts (token ids), each continued by the model; `seed` alone decides what is drawn."""
    width = max(map(len, prompts))
    parts = []
    for start in range(0, len(prompts), CHUNK):
        hardware.seed_everything(seed, start)
        rows = prompts[start : start + CHUNK]
        queries, query_mask = data.collate(rows, sampling.pad, side="left", width=width)
        parts.append(generate(model, queries, query_mask, sampling))
    return Texts.cat(parts)


def sampling_of(settings: dict[str, Any], tokenizer: Tokenizer) -> Sampling:
    """How a policy with these settings (response_tokens, temperature, stop) writes."""
    return Sampling(
        max_new=settings["response_tokens"],
        temperature=settings["temperature"],
        eos=tokenizer.ends,
        pad=tokenizer.pad,
        forbidden=None if settings["stop"] else tokenizer.ends,
    )


@torch.no_grad()
def nats(texts: Texts, policy: GPT, ref: GPT, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Nats per sequence of the policy's own samples, each [N].

    kl        log p(policy) - log p(ref), summed over the response [D1]
    entropy   of the policy's distributions, summed
    surprise  -log p(ref), summed: what a model trained on people's texts makes of them
    """
    logprobs, entropy = by_microbatch(response_logprobs, policy, texts, CHUNK, sampling)
    ref_logprobs, _ = by_microbatch(response_logprobs, ref, texts, CHUNK, sampling)
    kl = ppo.kl_estimates(logprobs, ref_logprobs)[0]
    return kl.sum(1), entropy.sum(1), -ref_logprobs.sum(1)


def text_measures(texts: Texts, eos: Ends) -> dict[str, float]:
    """Distinct-n, mean length in tokens, share of responses that ended.  Only lengths count the EOS."""
    rows = [row[~are_ends(row, eos)].tolist() for row in _rows(texts.responses, texts.response_mask)]
    distinct = {f"distinct_{n}": stats.distinct_n(rows, n) for n in (1, 2, 3)}
    lengths = texts.response_mask.sum(1).float()
    return distinct | {
        "mean_length": lengths.mean().item(),
        "eos_rate": texts.ended(eos).float().mean().item(),
    }


def _rows(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """The real tokens of each row, on the host."""
    return [row[real] for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]


Scorers = dict[str, Callable[[Texts, list], Tensor]]  # by name, functions of texts and records -> scores [N]


def scores_of(texts: Texts, scorers: Scorers, tokenizer: Tokenizer, records: list) -> dict[str, list[float]]:
    """{name: N scores of the whole texts} of all scorers and, where it is installed, of the lexicon.

    records: those of the texts' prompts, whose rows reward functions may read.
    """
    with torch.no_grad():
        found = {name: score(texts, records).tolist() for name, score in scorers.items()}
    whole = [tokenizer.decode(row.tolist()) for row in _rows(texts.tokens, texts.mask)]
    if tokenizer.layout.name == TEMPLATE:  # without the words in which a template says whose turn it is
        whole = [f"{prompt} {response}" for prompt, response in zip(*texts.decode(tokenizer), strict=True)]
    lexicon = baselines.vader_lexicon(whole)
    return found | ({} if lexicon is None else {"lexicon": lexicon})


def compare(scores: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, Any]:
    """By scorer: the mean, and how often it prefers the text to the SFT sample on the same prompt.

    Each has its 95 % interval, by prompt [D24].
    """
    row: dict[str, Any] = {}
    for name, values in scores.items():
        rate, low, high = stats.win_rate(values, base[name])
        row[name] = sum(values) / len(values)
        row[f"{name}_interval"] = stats.bootstrap_interval(values, np.random.default_rng(0))
        row[f"{name}_win_rate"] = rate
        row[f"{name}_win_rate_interval"] = [low, high]
    return row


# ------------------------------------------------------------------------------------------------- what is
# loaded


def settings_of(
    about: dict[str, Any], folder: Path, kinds: dict[str, Any], **defaults: Any
) -> dict[str, Any]:
    """The named settings of a checkpoint's training, from its config.json; `defaults` stand in for missing
    ones.

    Raises UserError where one is missing or is not of its kind, a type or a range of cli's.
    """
    settings = about.get("training")
    settings = defaults | (settings if isinstance(settings, dict) else {})
    for name, kind in kinds.items():
        base, *ranges = typing.get_args(kind) or (kind,)
        value = settings.get(name)
        fits = type(value) in ((int, float) if base is float else (base,)) and all(value in r for r in ranges)
        if not fits:
            wanted = " ".join([base.__name__, *map(str, ranges)])
            found = f"{value!r:.40}" if name in settings else "nothing"
            raise UserError(
                f"{folder}/config.json: training.{name}: expected {wanted}, found {found}: "
                f"name another checkpoint"
            )
    return settings


def maximised_model(about: dict[str, Any], run: Path) -> Path | None:
    """Folder of the reward model that PPO maximised; None where it maximised functions alone.

    The model is where it was when PPO ran, or in `run`, which may have been moved or copied since.  It is
    told by its checksum, where that was recorded.  DPO maximised none: the one in `run` scores its texts.
    """
    inputs = about["inputs"] if isinstance(about.get("inputs"), dict) else {}
    recorded = inputs.get("reward_model_path") or about.get("reward_model")
    checksum = inputs.get("reward_model")
    if not recorded and about.get("stage") == "dpo":
        if not (run / "rm" / "config.json").exists():
            raise UserError(
                f"DPO maximised no reward model, and {run}/rm is none: name one with --reward-model"
            )
        return run / "rm"
    if not recorded:
        return None
    places = [Path(recorded), run / Path(recorded).name] if isinstance(recorded, str) else []
    there = [place for place in places if os.path.exists(place / "config.json")]
    same = [place for place in there if checksum and checkpoint.fingerprint(place) == checksum]
    if not there or (checksum and not same):
        why = "was trained again since, or replaced" if there else "is not here"
        raise UserError(f"the policy's reward model, {recorded!r:.100}, {why}: name it with --reward-model")
    return [*same, *there][0]


def load_scorers(
    config: Config, about: dict[str, Any], tokenizer: Tokenizer, device: torch.device
) -> tuple[Scorers, Reads]:
    """`score`, which PPO maximised, and `judge`, if there is one; what reward functions read of the rows."""

    def of_model(folder: Path) -> Callable[[Texts, list], Tensor]:
        reader = RewardReader.load(folder, "train one with train_rm.py")
        reader.model.to(device)
        return lambda texts, records: reader.scores(texts, tokenizer, CHUNK)[0]

    if config.reward and config.reward_model:
        raise UserError("--reward and --reward-model both say what the score is: give one of them")
    rewards = []
    model = None if config.reward else config.reward_model or maximised_model(about, config.run)
    if model is not None:
        scorers: Scorers = {"score": of_model(model)}
        tell_other_rewards(about)
    else:
        rewards = load_rewards(list(config.reward) or trusted_rewards(about))
        if any(function is None for _, function, _ in rewards):
            raise UserError("--reward names functions here: name a reward model with --reward-model")
        rules = Scorer(rewards, tokenizer)
        scorers = {"score": lambda texts, records: rules(texts, records)[0]}
    if config.judge or (config.run / "judge" / "config.json").exists():
        scorers["judge"] = of_model(config.judge or config.run / "judge")
    return scorers, fields_read(rewards)


def tell_other_rewards(about: dict[str, Any]) -> None:
    """Print a line where the policy maximised more than the reward model, whose score alone is compared."""
    specs = about["training"].get("reward")
    if isinstance(specs, list) and any(str(spec).partition(":")[0] != "rm" for spec in specs):
        print(f"note: the policy maximised {specs!r:.200}: `score` is the reward model's alone")


def practised_split(about: dict[str, Any]) -> str:
    """The split of the data that the policy was trained on: train by DPO on judged pairs."""
    settings = about["training"]
    if about.get("stage") == "dpo" and not settings.get("online"):
        return "train"
    split = settings.get("split", "val")
    own = "val" if settings["data"] in data.BUILT_IN else "all"
    return own if split == "auto" else split


def trusted_rewards(about: dict[str, Any]) -> list[str]:
    """The reward functions of a policy's training; UserError unless all are those of minirlhf.rewards."""
    named = about["training"].get("reward")
    specs = [str(spec) for spec in named] if isinstance(named, list) else []
    if not specs or not all(spec.startswith("minirlhf.rewards:") for spec in specs):
        raise UserError(
            f"the policy was trained on {specs!r:.200}: code that a checkpoint names is not run unasked: "
            f"name the functions with --reward"
        )
    return specs


@dataclasses.dataclass
class Setting:
    """What is compared: two models, the prompts that both continue, and who scores their texts."""

    sft: GPT
    policy: GPT
    policy_dir: Path
    about: dict[str, Any]  # the policy's config.json
    tokenizer: Tokenizer
    sampling: Sampling
    scorers: Scorers
    prompts: list[list[int]]
    records: list[Any]  # those of the prompts

    @property
    def name(self) -> str:
        return "DPO" if self.about.get("stage") == "dpo" else "PPO"


def load(config: Config) -> Setting:
    """The models, scorers and prompts that the options name; a line is printed on the prompts."""
    run = config.run
    policy_dir = checkpoint.resolve(
        config.policy or run / "ppo", "run train_ppo.py first, or name one with --policy"
    )
    sft_dir = checkpoint.resolve(config.sft or run / "sft", "run train_sft.py first, or name one with --sft")
    _, about, tokenizer = checkpoint.writer(policy_dir)
    if checkpoint.writer(sft_dir)[2].hash != tokenizer.hash:
        raise UserError(
            f"{sft_dir}: its tokenizer is not that of {policy_dir}, so the two cannot continue the same "
            "prompts: name the model that the policy started from with --sft"
        )
    settings = settings_of(about, policy_dir, SETTINGS, stop=True, fields=[], rating_scale=[])
    sampling = sampling_of(settings, tokenizer)
    device = hardware.setup_machine().device
    scorers, reads = load_scorers(config, about, tokenizer, device)
    sft, policy = (checkpoint.load_gpt(folder).to(device).eval() for folder in (sft_dir, policy_dir))

    cache = settings.get("data_dir")
    cache = cache if isinstance(cache, str) else None
    scale, fields = settings["rating_scale"], settings["fields"]
    source = data.load(settings["data"], settings["skip_bad"], scale, cache, fields, reads)
    part = source.select(config.split, source.genres_among([settings["genre"]]))
    room = min(sft.config.context, policy.config.context) - sampling.max_new
    too_long = "cut" if settings.get("too_long") == "cut" else "drop"
    length = settings["prompt_tokens"]
    prompts, records = data.prompts_and_records(tokenizer, part.records, length, room, too_long, part.ledger)
    print(f"prompts, {config.split} split: {data.account(part.ledger)}")
    picked = data.cursor(len(prompts), min(config.prompts, len(prompts)), config.seed, 0)
    prompts, records = [prompts[i] for i in picked], [records[i] for i in picked]
    return Setting(sft, policy, policy_dir, about, tokenizer, sampling, scorers, prompts, records)


# ------------------------------------------------------------------------------------------------- the table


def evaluate(config: Config) -> dict[str, Any]:
    """The table as a dict: sft_samples, best_of_n, ppo, samples, split, prompts, seed, versions."""
    setting = load(config)
    sft, policy, about, tokenizer = setting.sft, setting.policy, setting.about, setting.tokenizer
    sampling, scorers, prompts = setting.sampling, setting.scorers, setting.prompts
    settings, records = about["training"], setting.records

    # One SFT sample that all are compared with, and n more to choose from.
    draws = range(1 + max(config.best_of, default=0))
    drawn = [write(sft, prompts, sampling, config.seed + k) for k in tqdm(draws, "SFT samples", leave=False)]
    drawn_scores = [scores_of(texts, scorers, tokenizer, records) for texts in drawn]
    base, base_scores = drawn[0], drawn_scores[0]
    tuned = write(policy, prompts, sampling, config.seed)  # with the seeds of the first SFT sample
    tuned_scores = scores_of(tuned, scorers, tokenizer, records)

    def row(
        texts: Texts, scores: dict, kl: float, entropy: Tensor | None = None, surprise: Tensor | None = None
    ) -> dict[str, Any]:
        tokens = texts.response_mask.sum()
        found = compare(scores, base_scores)
        found |= {"kl": kl, "entropy": None if entropy is None else (entropy.sum() / tokens).item()}
        found |= text_measures(texts, tokenizer.ends)
        perplexity = None if surprise is None else math.exp((surprise.sum() / tokens).item())
        return found | {"sft_perplexity": perplexity}

    def best_of(n: int) -> dict[str, Any]:
        scores = torch.tensor([found["score"] for found in drawn_scores[1 : n + 1]])  # [n, N]
        best = list(enumerate(scores.argmax(0).tolist()))
        texts = Texts.cat([drawn[1 + k][i : i + 1] for i, k in best])
        picked = {name: [drawn_scores[1 + k][name][i] for i, k in best] for name in base_scores}
        return row(texts, picked, ppo.best_of_n_kl(n))  # [D20]

    practised = practised_split(about)
    if practised in ("all", config.split):
        print(
            f"note: the policy practised on these prompts (the {practised} split): others are a fairer test"
        )

    kl, entropy, surprise = nats(tuned, policy, sft, sampling)
    _, sft_entropy, sft_surprise = nats(base, sft, sft, sampling)
    shown = slice(0, config.samples)
    (shown_prompts, sft_texts), ppo_texts = base[shown].decode(tokenizer), tuned[shown].decode(tokenizer)[1]
    return {
        "sft_samples": row(base, base_scores, 0.0, sft_entropy, sft_surprise),
        "best_of_n": {str(n): best_of(n) for n in config.best_of},
        "policy": setting.name,  # of the row `ppo`
        "ppo": row(tuned, tuned_scores, kl.mean().item(), entropy, surprise),
        "samples": [
            {
                "prompt": prompt,
                "sft": sft_texts[i],
                "ppo": ppo_texts[i],
                "kl": kl[i].item(),
                "score_sft": base_scores["score"][i],
                "score_ppo": tuned_scores["score"][i],
            }
            for i, prompt in enumerate(shown_prompts)
        ],
        "split": config.split,
        "prompts": len(prompts),
        "seed": settings["seed"],
        "reward": list(config.reward or settings.get("reward", ["rm"])),
        "versions": hardware.versions(),
    }


def collect(run: Path, results: dict[str, Any], report_model: Path, policy: Path) -> dict[str, Any]:
    """The results, with what the stages measured: results.json is the whole run on one page."""
    found = {"sft": {}, "rm": {}} | results
    folders = {"sft": run / "sft", "rm": report_model, "rm_optimised": run / "rm-a", "judge": run / "judge"}
    for name, folder in folders.items():
        if (folder / "config.json").exists():
            found[name] = checkpoint.load_config(folder).get("results", {})
    measured = checkpoint.load_config(policy).get("results", {})
    found["ppo"] = found["ppo"] | {name: measured[name] for name in ("seconds",) if name in measured}
    return found


def print_table(results: dict[str, Any]) -> None:
    """Print a row per writer, and the samples."""
    rows = {"SFT": results["sft_samples"]}
    rows |= {f"best of {n}": row for n, row in results["best_of_n"].items()}
    name = results["policy"]
    rows |= {name: results["ppo"]}
    columns = ["score", "score_win_rate", "judge_win_rate", "lexicon_win_rate", "kl", "entropy"]
    columns += ["sft_perplexity", "distinct_1", "distinct_2", "distinct_3", "mean_length", "eos_rate"]
    columns = [column for column in columns if column in results["ppo"]]
    print(f"\n{results['prompts']} {results['split']} prompts, one SFT sample each to win against")
    heads = [column.replace("_win_rate", " wins").replace("_", " ") for column in columns]
    print(f"{'':12s}" + "".join(f"{head:>16s}" for head in heads))
    for writer, row in rows.items():
        cells = ["" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        print(f"{writer:12s}" + "".join(f"{cell:>16s}" for cell in cells))
    print()
    for sample in results["samples"]:
        print(repr(sample["prompt"]))
        print(f"   SFT {sample['score_sft']:+.2f}          {sample['sft']!r}")
        print(f"   {name} {sample['score_ppo']:+.2f} kl {sample['kl']:4.1f}  {sample['ppo']!r}")


def same_policy(target: Path, policy: Path) -> str:
    """The policy's folder, seen from the file of results; raises UserError if that is about another one."""
    folder = os.path.relpath(policy, target.parent)
    try:
        known = json.loads(target.read_text()).get("policy_folder", "ppo")
    except (OSError, ValueError, AttributeError):  # no file, or not one of ours
        return folder
    if isinstance(known, str) and known != folder:
        other = os.path.normpath(target.parent / known)
        raise UserError(
            f"{target}: holds the results of {other}, and this would be of {policy}: "
            "give --results FILE, or delete it"
        )
    return folder


def main() -> None:
    config = cli.parse_config({"demo": Config()}, __doc__)
    target = config.results or config.run / "results.json"
    if target.is_dir():
        raise UserError(f"--results {target}: is a folder: name a file in it")
    if config.run.exists() and not target.parent.is_dir():
        raise UserError(f"--results {target}: there is no folder {target.parent}: make it first")
    policy = config.policy or config.run / "ppo"
    folder = same_policy(target, policy)
    results = evaluate(config) | {"policy_folder": folder}
    results = collect(config.run, results, config.report_model or config.run / "rm", policy)
    files.write_output(target, json.dumps(results, indent=1))
    print_table(results)
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    cli.run_script(main)
