"""Items to judge out of a checkpoint: continuations of prompts."""

import argparse
from collections import defaultdict
from itertools import chain, combinations

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data
from minirlhf.feedback.add import tell
from minirlhf.feedback.store import Store
from minirlhf.model import RewardEnsemble
from minirlhf.rewards import encode_for
from minirlhf.rollout import Texts, by_microbatch
from minirlhf.support import hardware
from minirlhf.tools.evaluate import CHUNK, sampling_of, write


def choose(scores: list[tuple[Tensor, ...]], by: list[str], keep: int) -> list[int]:
    """Which items to keep, of every item's texts' scores (for each text [members]): by turns the next best of each criterion.
    What the members make of a pair is the difference of its texts: there a vote tells them apart."""
    value = {
        "disagreement": lambda texts: (texts[0] - texts[-1] if len(texts) > 1 else texts[0]).std(
            correction=0
        ),
        "score": lambda texts: max(text.mean() for text in texts),
    }
    orders = [sorted(range(len(scores)), key=lambda i, of=value[name]: -of(scores[i]).item()) for name in by]
    return list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))[:keep]


def sample(args: argparse.Namespace) -> None:
    """Continue `--limit` prompts K times each, and store every two different responses as a pair (Ouyang et al. 2022), or
    each as a text to rate; all of them, or those that a reward model singles out."""
    folder, about, tokenizer = checkpoint.writer(args.checkpoint)
    setting = {key: about["training"].get(key, default) for key, default in
               (("response_tokens", 24), ("temperature", 1.0), ("stop", True))}  # fmt: skip
    setting |= {k: v for k in ("response_tokens", "temperature") if (v := getattr(args, k)) is not None}
    if (
        min(setting["response_tokens"], args.limit, args.per_prompt, args.prompt_tokens) < 1
        or not setting["temperature"] > 0
    ):
        raise UserError(
            "--response-tokens, --temperature, --limit, --per-prompt and --prompt-tokens must be above 0"
        )
    if args.mode == "pair" and args.per_prompt < 2:
        raise UserError("--per-prompt must be 2 or more to make pairs: raise it, or use --mode rating")
    if (args.keep is None) != (args.reward_model is None) or (args.keep or 1) < 1:
        raise UserError("--reward-model chooses and --keep N, above 0, says how many: give both or neither")
    machine, reward_model = hardware.setup_machine(), None
    if args.reward_model:
        reward_model, reader = checkpoint.load_reward(checkpoint.resolve(args.reward_model))
        reward_model.to(machine.device).eval()
        if "disagreement" in args.by and len(reward_model.members) == 1:
            raise UserError(
                f"--by disagreement: {args.reward_model} has one member: train it with --members 3, or use --by score"
            )
    source = data.load(args.prompts, data_dir=args.data_dir)
    if args.prompts in ("vader", "toy"):  # PPO's own prompts; test texts are for the last word
        source = source.select("val", source.genres_among(["movies"]))
    ledger = source.ledger.copy()
    room = about["model"]["context"] - setting["response_tokens"]
    found = data.encode_prompts(tokenizer, source.records, args.prompt_tokens, room, ledger=ledger)
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, found))]
    prompts = [prompts[i] for i in data.cursor(len(prompts), min(args.limit, len(prompts)), args.seed, 0)]
    print(f"prompts: {data.account(ledger)}")
    store = Store(args.store, create=True, seed=args.seed)

    model, responses = (
        checkpoint.load_gpt(folder).to(machine.device).eval(),
        defaultdict(dict),
    )  # dicts: in order, each once

    def read(reward_model: RewardEnsemble, rows: Texts) -> Tensor:  # each member's scores [b, members]
        tokens, mask, _ = encode_for(reward_model, reader, rows, tokenizer)
        return reward_model.each(tokens, mask).T

    sampling = sampling_of(setting, tokenizer)
    for k in range(args.per_prompt):
        texts = write(model, prompts, sampling, args.seed + k)
        scores = [None] * len(prompts)
        if reward_model:
            with torch.no_grad():
                scores = by_microbatch(read, reward_model, texts, CHUNK)
        for i, (row, real) in enumerate(zip(texts.responses, texts.response_mask, strict=True)):
            responses[i].setdefault(tokenizer.decode(row[real].tolist()), scores[i])
    made = {"checkpoint": str(folder), "step": about["step"], "seed": args.seed} | setting
    items, said = [], []
    for i, ids in enumerate(prompts):
        common = {"mode": args.mode, "prompt": tokenizer.decode(ids), "source": made}
        written = [text for text in responses[i] if text.strip()]
        found = list(combinations(written, 2) if args.mode == "pair" else ((text,) for text in written))
        items += [common | dict(zip("ab", texts, strict=False)) for texts in found]
        said += [tuple(responses[i][text] for text in texts) for texts in found]
    if reward_model:
        made["chosen"] = {"reward_model": str(args.reward_model), "by": args.by}
        items = [items[i] for i in choose(said, args.by, args.keep)]
    tell(store, *store.add(items))
