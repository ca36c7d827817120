"""Dialogue: SmolLM2-Instruct, tuned on what people prefer in answers to instructions, by DPO and by RLOO.

The data are PandaLM's pairs, as in instructions.py.  A fifth of the instructions is for the test.  Half of the
others trains DPO and the reward model that RLOO maximises; the other half trains the judge, which is never
maximised.  Each policy's answers to the test's instructions are compared with those of SmolLM2-Instruct.
"""

from pathlib import Path

from benchmarks.demo import table
from benchmarks.recipes import assistant, frozen, instructions, judged
from benchmarks.recipes.assistant import ADAPTERS, TEMPERATURE, best_of, cell, prompt_row
from benchmarks.recipes.common import side_by_side, stage, write_rows
from benchmarks.recipes.judged import Pair, shares_of, texts_of
from minirlhf.measure.reward_report import sign_accuracy
from minirlhf.rewards import RewardReader
from minirlhf.support.conversation import Conversation

DATA = instructions.DATA
TOKENS = 64  # of the longest answer
# The most words of a prompt to practise on, of one in the test, and of an answer of DPO's pairs: time chose them.
PRACTICE_WORDS, TEST_WORDS, ANSWER_WORDS = 25, 60, 60
SAMPLES, BEST_OF = 4, 8
DPO = ("--epochs", 1, "--batch", 8, "--lr", 1e-3, "--warmup", 3, "--beta", 0.1,
       "--temperature", TEMPERATURE, "--response-tokens", TOKENS)  # fmt: skip
RL = ("--algorithm", "rloo", "--group", 4, "--iterations", 10, "--batch", 48, "--minibatch", 24,
      "--microbatch", 12, "--epochs", 1, "--lr", 1e-3, "--kl-coef", 0.05, "--temperature", TEMPERATURE,
      "--missing-eos-penalty", 0.5, "--response-tokens", TOKENS, "--save-every", 4)  # fmt: skip


def short_prompts(pairs: list[Pair], words: int) -> list[Conversation]:
    """The different prompts of pairs that have at most so many words, the two names of who speaks included."""
    return sorted({pair.prompt for pair in pairs if len(pair.prompt.split()) <= words}, key=str)


def run(home: Path, seed: int, smoke: bool, file: Path) -> dict:
    pairs = instructions.read(file)
    learnt, test = judged.divide(pairs, lambda pair: pair.key, instructions.FOLDS, seed)
    ours, others = judged.divide(learnt, lambda pair: pair.key, 2, seed)
    start = judged.backbone(home, smoke)
    layers, tokens, dpo_options, rl_options = instructions.LAYERS, TOKENS, DPO, RL
    if smoke:
        layers, tokens = 1, 8
        few = ("--train-layers", 1, "--response-tokens", 8)
        dpo_options = (*DPO, *few)
        rl_options = (*RL, *few, "--iterations", 1, "--batch", 16, "--minibatch", 16, "--microbatch", 8)

    base = frozen.shallow(start, layers)
    states, strength = frozen.states_of(base, texts_of(pairs), home.parent), instructions.STRENGTH
    heads = {"rm": frozen.fit(shares_of(ours), states(texts_of(ours)), strength)}
    heads["judge"] = frozen.fit(shares_of(others), states(texts_of(others)), strength)
    for name, head in heads.items():
        frozen.save(home / name, base, head, strength)
    readers = {
        "reward model": RewardReader.load(home / "rm", ""),
        "judge": RewardReader.load(home / "judge", ""),
    }
    margins = judged.minus(heads["judge"](states(texts_of(test))))
    accuracy = sign_accuracy(margins, shares_of(test))

    choices = [
        pair.row | prompt_row(pair.prompt)
        for pair in ours
        if pair.first != pair.second
        and max(len(t.split()) for t in (pair.first, pair.second)) <= ANSWER_WORDS
    ]
    files = {
        "dpo": write_rows(home / "pairs.jsonl", choices),
        "practice": write_rows(
            home / "practice.jsonl", map(prompt_row, short_prompts(learnt, PRACTICE_WORDS))
        ),
        "test": write_rows(home / "test.jsonl", map(prompt_row, short_prompts(test, TEST_WORDS))),
    }
    seconds = {"dpo": stage("train_dpo.py", home / "dpo", seed, "--init", start, "--data", files["dpo"],
                            *ADAPTERS, *dpo_options)}  # fmt: skip
    reward = ("--reward-model", home / "rm")
    seconds["rl"] = stage("train_ppo.py", home / "ppo", seed, "--init", start, "--data", files["practice"],
                          *reward, *ADAPTERS, *rl_options)  # fmt: skip

    ask = lambda policy, samples, *to: assistant.answer(policy, files["test"], samples, tokens, readers, *to)
    answers = ask(start, SAMPLES + BEST_OF)
    untuned, more = answers[:SAMPLES], answers[SAMPLES:]
    policies = {"untuned": untuned, "best": best_of(more, "reward model")}
    policies |= {"dpo": ask(home / "dpo", SAMPLES, start), "rloo": ask(home / "ppo", SAMPLES, start)}
    found = {
        "seconds": seconds,
        "pairs": len(choices),
        "practised": len(short_prompts(learnt, PRACTICE_WORDS)),
        "judge": accuracy,
    }
    for name, answers in policies.items():
        found[name] = assistant.numbers(answers, untuned, "judge")
        found[name] |= {"seconds": answers.seconds, "examples": assistant.examples(answers, 6)}
    return found | {"test": len(untuned.prompts)}


made_up = instructions.made_up


def tables(results: dict) -> list[str]:
    names = {
        "SmolLM2-Instruct": "untuned",
        f"best of {BEST_OF}": "best",
        "DPO": "dpo",
        "RLOO": "rloo",
    }
    columns = {  # (measure, digits, scale)
        "wins, %": ("wins", 1, 100),
        "wins at equal length, %": ("even wins", 1, 100),
        "reward model": ("reward model", 2, 1),
        "judge": ("judge", 2, 1),
        "tokens": ("tokens", 1, 1),
        "ended, %": ("ended", 1, 100),
        "KL, nats": ("kl", 1, 1),
    }
    of = lambda name, measure, *how: cell(results, lambda found: found[name][measure], *how)
    rows = [[label, *(of(name, *column) for column in columns.values())] for label, name in names.items()]
    said = lambda prompt: prompt.strip().removeprefix("Human:").removesuffix("Assistant:").strip()
    samples = side_by_side(results, said, ("untuned", "rloo"))
    return [table(["", *columns], rows), table(["instruction", "SmolLM2-Instruct", "RLOO"], samples)]
