"""Are the tokens decisive that the page calls decisive?  They are replaced, and the score is read again.

    python benchmarks/why.py runs/seed-1 runs/seed-2 runs/seed-3    # as make demo leaves them; minutes each
    python benchmarks/why.py --tables                               # the table of the committed results

PPO's texts on the test prompts of minirlhf.evaluate.  Of each text a fifth of the tokens is chosen, or one
token: by a column of the page (minirlhf/tools/why.py), or at random.  The reference model then draws other
tokens in their places, from left to right, and the reward model and the judge read the new text.  The column
`replaced` comes from other draws than those that are measured, so that a token chosen for the luck of its
draws gains nothing by it.  The end of a text is never replaced.

A mask token would be simpler.  None of the models has seen one, though, so their scores would tell how
strange it is; what the reference writes in the place is text as it was before PPO.

Writes benchmarks/results/why.json after each run, with the mean fall of every text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf.measure import attribution  # noqa: E402
from minirlhf.rollout import Texts, response_logprobs  # noqa: E402
from minirlhf.support.files import write_atomically  # noqa: E402
from minirlhf.tools import evaluate, why  # noqa: E402

RESULTS = ROOT / "benchmarks/results/why.json"
WAYS = {
    "replaced": "score share (`replaced`)",
    "added": "score so far (`added`)",
    "nats": "`nats`",
    "advantage": "`advantage`",
    "random": "random tokens",
}
COUNTS = {"fifth": "a fifth", "one": "one token"}
READERS = {"score": "reward model", "judge": "judge"}


def reader_of(setting: evaluate.Setting, name: str) -> attribution.Score:
    """The reward model, or the judge: neither reads the data's rows."""
    return lambda texts: setting.scorers[name](texts, [])


def columns_of(explainer: why.Explainer, row: Texts) -> dict[str, torch.Tensor]:
    """By way of choosing: a number per token [n] of one text, nan where the token cannot be replaced."""
    setting = explainer.setting
    sampling, score = setting.sampling, reader_of(setting, "score")
    where = attribution.replaceable(row, sampling)[0]
    others = attribution.alternatives(setting.sft, row, sampling, explainer.replacements, explainer.generator)
    found = attribution.replaced({"replaced": score}, row, others[0], where)
    found["added"] = attribution.added(score, row)
    ours, theirs = (response_logprobs(m, row, sampling)[0][0] for m in (setting.policy, setting.sft))
    found["nats"] = ours - theirs
    scores = attribution.scored(score, row)
    found["advantage"] = why.of_critic(explainer.critic, setting, row, scores, explainer.kl_coef)[1][0]
    return {name: torch.where(where, values, float("nan")) for name, values in found.items()}


@torch.no_grad()
def measure(run: Path, prompts: int, replacements: int, draws: int) -> dict:
    """{count: {way: {reader: the mean fall of each text's score}}}, and the scores as they were."""
    config = evaluate.Config(run=run, prompts=prompts)
    setting = evaluate.load(config)
    reward_dir = evaluate.maximised_model(setting.about, run)
    explainer = why.Explainer(setting, reward_dir, replacements, seed=1)
    texts = evaluate.write(setting.policy, setting.prompts, setting.sampling, config.seed)
    lengths = texts.response_mask.sum(1).tolist()
    rows = [texts[i : i + 1] for i in range(len(texts))]
    rows = [Texts(r.prompts, r.prompt_mask, r.responses[:, :n], r.response_mask[:, :n])
            for r, n in zip(rows, lengths, strict=True)]  # fmt: skip
    columns = [columns_of(explainer, row) for row in rows]
    readers = {name: reader_of(setting, name) for name in READERS}
    before = {name: attribution.scored(score, texts) for name, score in readers.items()}
    generator, rng = torch.Generator().manual_seed(2), np.random.default_rng(2)
    falls: dict = {}
    for count in COUNTS:
        for way in WAYS:
            found = {name: [] for name in before}
            for _ in range(draws):
                chosen = torch.zeros_like(texts.response_mask)
                for i, column in enumerate(columns):
                    picks = attribution.decisive(column["replaced"])[: 1 if count == "one" else None]
                    if way == "random":
                        known = (~column["replaced"].isnan()).nonzero()[:, 0].numpy()
                        picks = rng.choice(known, len(picks), replace=False)
                    else:
                        picks = attribution.decisive(column[way])[: len(picks)]
                    chosen[i, torch.as_tensor(np.asarray(picks, dtype=np.int64))] = True
                new = attribution.rewritten(setting.sft, texts, chosen, setting.sampling, generator)
                for name, score in readers.items():
                    found[name].append(before[name] - attribution.scored(score, new))
            falls.setdefault(count, {})[way] = {
                name: [round(x, 4) for x in torch.stack(values).mean(0).tolist()]
                for name, values in found.items()
            }
            print(
                run.name,
                count,
                way,
                {name: round(mean(v), 3) for name, v in falls[count][way].items()},
                flush=True,
            )
    tokens = {"fifth": mean(len(attribution.decisive(c["replaced"])) for c in columns), "one": 1}
    return {
        "texts": len(rows), "replacements": replacements, "draws": draws, "tokens": tokens,
        "score": before["score"].mean().item(), "judge": before["judge"].mean().item(), "falls": falls,
    }  # fmt: skip


def ratio(falls: dict, way: str, reader: str) -> tuple[float, float, float]:
    """(mean fall / that of random tokens, and its 95 % interval by text)."""
    ours, random = np.array(falls[way][reader]), np.array(falls["random"][reader])
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(ours), (2000, len(ours)))
    means = ours[picks].mean(1) / random[picks].mean(1)
    return (ours.mean() / random.mean(), *np.quantile(means, [0.025, 0.975]).tolist())


def table(known: dict) -> str:
    """In Markdown: falls in points and against random tokens, mean over the runs."""
    heads = [f"{count}: {reader}" for count in COUNTS.values() for reader in READERS.values()]
    lines = ["| chosen by | " + " | ".join(f"{head} | x random" for head in heads) + " |"]
    lines.append("|---" * (1 + 2 * len(heads)) + "|")
    for way, label in WAYS.items():
        cells = []
        for count in COUNTS:
            for reader in READERS:
                of = [run["falls"][count] for run in known.values()]
                falls = [mean(falls[way][reader]) for falls in of]
                times = [ratio(falls, way, reader)[0] for falls in of]
                cells += [f"{mean(falls):.2f}", f"{mean(times):.1f} ({min(times):.1f} to {max(times):.1f})"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of demo runs, with sft, ppo and a judge")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument(
        "--replacements", type=int, default=8, help="draws per token for the column `replaced`"
    )
    parser.add_argument("--draws", type=int, default=4, help="rewritten texts per way and text")
    parser.add_argument("--tables", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for run in [] if args.tables else args.runs:
        known[run.name] = measure(run, args.prompts, args.replacements, args.draws)
        write_atomically(RESULTS, json.dumps(known))
    if not args.tables:
        for name, run in known.items():
            for reader in READERS:
                times, low, high = ratio(run["falls"]["fifth"], "replaced", reader)
                print(f"{name}, {READERS[reader]}: {times:.2f} times random ({low:.2f} to {high:.2f})")
    print(table(known))


if __name__ == "__main__":
    main()
