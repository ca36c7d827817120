"""The tuned policy against the SFT model, on test prompts that no stage has seen, with the same seeds.

    python -m minirlhf.evaluate --run runs/demo           # prints the table, writes runs/demo/results.json

Four writers continue the same prompts: the SFT model, best-of-4 and best-of-16 of its samples (picked by the reward model
that PPO optimised), and the PPO policy.  Three readers compare each with one SFT sample: that reward model, an independent
judge (other items, other seed), and the VADER lexicon.  A policy can win everywhere by degenerating: read KL, distinct-n,
length and the samples beside the win rates.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import checkpoint, data, ppo
from minirlhf.measure import baselines, stats
from minirlhf.model import GPT
from minirlhf.rollout import generate, read, response_logprobs
from minirlhf.support import cli, files, hardware
from minirlhf.tokenizer import Tokenizer

CHUNK = 128  # texts written or read at a time


@dataclasses.dataclass(frozen=True)
class Config:
    run: Path = Path("runs/demo")
    """Folder of the stages; the options below default to folders in it."""
    sft: Path | None = None
    """Default: RUN/sft."""
    policy: Path | None = None
    """Default: RUN/ppo."""
    reward_model: Path | None = None
    """The one that PPO optimised.  Default: the one the policy's checkpoint names."""
    judge: Path | None = None
    """A reward model that shares no item with it.  Default: RUN/judge, if there is one."""
    report_model: Path | None = None
    """The reward model whose test report goes into results.json.  Default: RUN/rm."""
    split: Literal["train", "val", "test"] = "test"
    """Where the prompts come from.  Settings are tuned on train: PPO practises on val, and test is for the last word."""
    prompts: int = 256
    """How many (fewer if there are not so many)."""
    best_of: tuple[int, ...] = (4, 16)
    """Rows for best-of-n of the SFT model."""
    results: Path | None = None
    """Where to write.  Default: RUN/results.json."""
    samples: int = 8
    """Prompts shown with both continuations."""
    seed: int = 1
    """Of everything random; 0 or more."""


@dataclasses.dataclass
class Texts:
    """What one writer wrote: N responses to N prompts."""

    tokens: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    responses: Tensor  # [N, R]
    response_mask: Tensor  # [N, R]

    def __getitem__(self, rows: Tensor) -> Texts:
        return Texts(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


@torch.no_grad()
def write(
    model: GPT, prompts: list[list[int]], setting: dict, tokenizer: Tokenizer, machine, seed: int
) -> Texts:
    """Continue prompts at the policy's own setting (temperature, length, --stop), CHUNK at a time."""
    longest = max(map(len, prompts))
    parts = []
    for i in range(0, len(prompts), CHUNK):
        hardware.seed_everything(seed, i)
        queries, query_mask = data.collate(prompts[i : i + CHUNK], tokenizer.pad, side="left", width=longest)
        queries, query_mask = queries.to(machine.device), query_mask.to(machine.device)
        responses, response_mask = generate(
            model, queries, query_mask, setting["response_tokens"], setting["temperature"], tokenizer.eot, tokenizer.pad,
            forbidden=None if setting["stop"] else tokenizer.eot,
        )  # fmt: skip
        parts.append(
            (
                torch.cat([queries, responses], 1),
                torch.cat([query_mask, response_mask], 1),
                responses,
                response_mask,
            )
        )
    return Texts(*(torch.cat(p) for p in zip(*parts, strict=True)))


@torch.no_grad()
def under_both(texts: Texts, policy: GPT, ref: GPT, setting: dict, eos: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the policy's own samples, [N] each: nats a sequence from ref to policy [D1], summed entropies of the policy, and
    summed -log p under ref: a fluent text surprises the model that learnt from people no more than its own samples do."""
    P = texts.tokens.shape[1] - texts.responses.shape[1]
    forbidden = None if setting["stop"] else eos
    found = []
    for tokens, mask in zip(texts.tokens.split(CHUNK), texts.mask.split(CHUNK), strict=True):
        logprobs, entropies = response_logprobs(policy, tokens, mask, P, setting["temperature"], forbidden)
        ref_logprobs, _ = response_logprobs(ref, tokens, mask, P, setting["temperature"], forbidden)
        found.append(
            (ppo.kl_estimates(logprobs, ref_logprobs)[0].sum(1), entropies.sum(1), -ref_logprobs.sum(1))
        )
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def looks(texts: Texts, eos: int) -> dict[str, float]:
    """What the responses look like, without any reader: lengths count the EOS, n-grams do not."""
    rows = [
        row[keep & (row != eos)].tolist()
        for row, keep in zip(texts.responses, texts.response_mask, strict=True)
    ]
    ended = ((texts.responses == eos) & texts.response_mask).any(1)
    return {f"distinct_{n}": stats.distinct_n(rows, n) for n in (1, 2, 3)} | {
        "mean_length": texts.response_mask.sum(1).float().mean().item(),
        "eos_rate": ended.float().mean().item(),
    }


@torch.no_grad()
def scores_of(texts: Texts, models: dict, tokenizer: Tokenizer) -> dict[str, list[float]]:
    """Every reader's scores [N] of the whole texts."""
    chunks = list(zip(texts.tokens.split(CHUNK), texts.mask.split(CHUNK), strict=True))
    read_all = lambda model, reader: torch.cat(
        [read(model, reader, t, m, tokenizer)[0] for t, m in chunks]
    ).tolist()
    found = {name: read_all(*reader) for name, reader in models.items()}
    lexicon = baselines.vader_lexicon(
        [tokenizer.decode(r[k].tolist()) for r, k in zip(texts.tokens, texts.mask, strict=True)]
    )
    return found | ({"lexicon": lexicon} if lexicon is not None else {})


def compare(scores: dict[str, list[float]], base: dict[str, list[float]]) -> dict:
    """Mean score of each reader, and how often it prefers the writer to the SFT sample on the same prompt, with the 95 %
    interval of each over prompts [D24]."""
    row = {}
    for name, values in scores.items():
        rate, low, high = stats.win_rate(values, base[name])
        row |= {
            name: sum(values) / len(values),
            f"{name}_interval": stats.bootstrap_interval(values, np.random.default_rng(0)),
        }
        row |= {f"{name}_win_rate": rate, f"{name}_win_rate_interval": [low, high]}
    return row


def evaluate(config: Config) -> dict:
    """The table as a dict: sft_samples, best_of_n, ppo (one row each), samples, prompts, seed, versions."""
    run = config.run
    policy_dir = checkpoint.resolve(
        config.policy or run / "ppo", "run train_ppo.py first, or name one with --policy"
    )
    about = checkpoint.load_config(policy_dir)
    setting, tokenizer = about["training"], Tokenizer.load(policy_dir)
    sft_dir = checkpoint.resolve(config.sft or run / "sft", "run train_sft.py first, or name one with --sft")
    machine = hardware.setup_machine(config.seed)
    optimised = Path(
        about["reward_model"]
    )  # as train_ppo.py was told; beside the policy if the run was moved since
    optimised = optimised if optimised.exists() else run / optimised.name
    models = {"score": config.reward_model or optimised}
    if config.judge or (run / "judge" / "latest").exists():
        models["judge"] = config.judge or run / "judge"
    models = {name: checkpoint.load_reward(path) for name, path in models.items()}
    models = {name: (model.to(machine.device).eval(), reader) for name, (model, reader) in models.items()}
    sft, policy = (checkpoint.load_gpt(folder).to(machine.device).eval() for folder in (sft_dir, policy_dir))

    source = data.load(setting["data"], setting["skip_bad"], data_dir=setting["data_dir"])
    records = source.select(config.split, source.genres_among([setting["genre"]])).records
    prompts = data.prompts_of(records, tokenizer, setting["prompt_tokens"])
    prompts = [
        prompts[i] for i in data.cursor(len(prompts), min(config.prompts, len(prompts)), config.seed, 0)
    ]

    # One SFT sample that everyone is compared with, and n more to choose from; the policy under the first one's seeds.
    drawn = [write(sft, prompts, setting, tokenizer, machine, config.seed + k)
             for k in tqdm(range(1 + max(config.best_of)), "SFT samples", leave=False)]  # fmt: skip
    tuned = write(policy, prompts, setting, tokenizer, machine, config.seed)
    read_drawn = [scores_of(d, models, tokenizer) for d in drawn]
    base, base_scores, tuned_scores = drawn[0], read_drawn[0], scores_of(tuned, models, tokenizer)

    def row(
        texts: Texts,
        scores: dict[str, list[float]],
        kl: float,
        entropy: Tensor | None,
        surprise: Tensor | None,
    ) -> dict:
        a_token = lambda x: None if x is None else (x.sum() / texts.response_mask.sum()).item()
        found = (
            compare(scores, base_scores)
            | {"kl": kl, "entropy": a_token(entropy)}
            | looks(texts, tokenizer.eot)
        )
        return found | {"sft_perplexity": None if surprise is None else math.exp(a_token(surprise))}

    kl, *rest = under_both(tuned, policy, sft, setting, tokenizer.eot)
    _, *base_rest = under_both(base, sft, sft, setting, tokenizer.eot)
    best_of_n = {}
    for n in config.best_of:
        pick = (
            torch.tensor([r["score"] for r in read_drawn[1 : n + 1]]).argmax(0).tolist()
        )  # by PPO's own reward model
        texts = Texts(*(torch.stack([getattr(drawn[1 + k], f.name)[i] for i, k in enumerate(pick)])
                        for f in dataclasses.fields(Texts)))  # fmt: skip
        scores = {name: [read_drawn[1 + k][name][i] for i, k in enumerate(pick)] for name in base_scores}
        best_of_n[str(n)] = row(texts, scores, ppo.best_of_n_kl(n), None, None)  # [D20]
    show = lambda texts, i: tokenizer.decode(texts.responses[i][texts.response_mask[i]].tolist())
    return {
        "sft_samples": row(base, base_scores, 0.0, *base_rest),
        "best_of_n": best_of_n,
        "ppo": row(tuned, tuned_scores, kl.mean().item(), *rest),
        "samples": [
            {"prompt": tokenizer.decode(prompts[i]), "sft": show(base, i), "ppo": show(tuned, i), "kl": kl[i].item(),
             "score_sft": base_scores["score"][i], "score_ppo": tuned_scores["score"][i]}
            for i in range(min(config.samples, len(prompts)))
        ],
        "split": config.split,
        "prompts": len(prompts),
        "seed": about["training"]["seed"],
        "versions": hardware.versions(),
    }  # fmt: skip


def collect(run: Path, results: dict, report_model: Path) -> dict:
    """Add what the earlier stages measured: results.json is the whole run on one page."""
    found = {"sft": {}, "rm": {}} | results
    for name, folder in (
        ("sft", run / "sft"),
        ("rm", report_model),
        ("rm_optimised", run / "rm-a"),
        ("judge", run / "judge"),
    ):
        if (folder / "config.json").exists():
            found[name] = checkpoint.load_config(folder).get("results", {})
    if (run / "ppo" / "config.json").exists():
        found["ppo"] = found["ppo"] | checkpoint.load_config(run / "ppo").get("results", {})
    return found


def print_table(results: dict) -> None:
    rows = {"SFT": results["sft_samples"]}
    rows |= {f"best of {n}": row for n, row in results["best_of_n"].items()} | {"PPO": results["ppo"]}
    columns = ["score", "score_win_rate", "judge_win_rate", "lexicon_win_rate", "kl", "entropy", "sft_perplexity", "distinct_1",
               "distinct_2", "distinct_3", "mean_length", "eos_rate"]  # fmt: skip
    columns = [c for c in columns if c in results["ppo"]]
    print(f"\n{results['prompts']} {results['split']} prompts, one SFT sample each to win against")
    print(f"{'':12s}" + "".join(f"{c.replace('_win_rate', ' wins').replace('_', ' '):>14s}" for c in columns))
    for name, row in rows.items():
        print(
            f"{name:12s}" + "".join(f"{row[c]:14.3f}" if row[c] is not None else f"{'':14s}" for c in columns)
        )
    print()
    for s in results["samples"]:
        print(repr(s["prompt"]))
        print(f"   SFT {s['score_sft']:+.2f}          {s['sft']!r}")
        print(f"   PPO {s['score_ppo']:+.2f} kl {s['kl']:4.1f}  {s['ppo']!r}")


def main() -> None:
    config = cli.parse_config({"demo": Config()}, __doc__)
    results = collect(config.run, evaluate(config), config.report_model or config.run / "rm")
    target = config.results or config.run / "results.json"
    files.write_atomically(target, json.dumps(results, indent=1))
    print_table(results)
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    cli.run_script(main)
