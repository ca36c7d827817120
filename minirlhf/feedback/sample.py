"""Items to judge, written by a checkpoint: continuations of prompts."""

import argparse
from itertools import chain, combinations

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data
from minirlhf.feedback.add import report_added
from minirlhf.feedback.store import Store
from minirlhf.rewards import RewardReader
from minirlhf.rollout import by_microbatch
from minirlhf.support import hardware
from minirlhf.support.conversation import Conversation
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools.evaluate import CHUNK, SAMPLING, sampling_of, settings_of, write

CRITERIA = {  # what an item is worth, from the members' scores [members] of each of its texts
    # A vote tells the two texts of a pair apart: members disagree about the difference of their scores.
    "disagreement": lambda texts: (texts[0] - texts[-1] if len(texts) > 1 else texts[0]).std(correction=0),
    "score": lambda texts: max(text.mean() for text in texts),
}


def choose(scores: list[tuple[Tensor, ...]], by: list[str], keep: int) -> list[int]:
    """Indices of the items to keep: the best by each criterion in turn, then the second best, and so on.

    scores[i] holds the members' scores [members] of each text of item i.
    """
    orders = []
    for name in by:
        worth = [CRITERIA[name](texts).item() for texts in scores]
        orders.append(sorted(range(len(scores)), key=lambda i, worth=worth: -worth[i]))
    return list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))[:keep]


def sample(args: argparse.Namespace) -> None:
    """Continue --limit prompts K times each, and store what was written as items to judge.

    Every two different responses to a prompt are a pair (Ouyang et al. 2022), or each is a text to rate.  All
    items are stored, or those that a reward model singles out.
    """
    if args.mode == "pair" and args.per_prompt < 2:
        raise UserError("--per-prompt must be 2 or more to make pairs: raise it, or use --mode rating")
    if (args.keep is None) != (args.reward_model is None):
        raise UserError("--reward-model chooses and --keep N says how many: give both or neither")
    folder, about, tokenizer = checkpoint.writer(args.checkpoint)
    settings = settings_of(about, folder, SAMPLING, response_tokens=24, temperature=1.0, stop=True)
    for name in ("response_tokens", "temperature"):
        if (given := getattr(args, name)) is not None:
            settings[name] = given
    sampling = sampling_of(settings, tokenizer)
    device, reader = hardware.setup_machine().device, None
    if args.reward_model:
        reader = RewardReader.load(args.reward_model, "train one with train_rm.py")
        if "disagreement" in args.by and len(reader.members) < 2:
            remedy = "train it with --members 3, or use --by score"
            raise UserError(f"--by disagreement: {args.reward_model} has one member: {remedy}")
        reader.model.to(device)
    model = checkpoint.load_gpt(folder).to(device).eval()
    prompts = load_prompts(args, tokenizer, model.config.context - sampling.max_new)
    store = Store(args.store, create=True, seed=args.seed)

    # By prompt: {response: its scores}, in the order in which they were written, each response once.
    responses: list[dict[str, Tensor | None]] = [{} for _ in prompts]
    for k in range(args.per_prompt):
        texts = write(model, prompts, sampling, args.seed + k)
        with torch.no_grad():
            scores = [None] * len(prompts)
            if reader:
                scores, _ = by_microbatch(RewardReader.each, reader, texts, CHUNK, tokenizer)
        shown, written = texts.decode(tokenizer)
        for found, response, score in zip(responses, written, scores, strict=True):
            found.setdefault(response, score)

    source = {"checkpoint": str(folder), "step": about.get("step"), "seed": args.seed}
    source |= {name: settings[name] for name in SAMPLING}
    if reader:
        source["chosen"] = {"reward_model": str(args.reward_model), "by": args.by}
    items, item_scores = [], []
    for prompt, found in zip(shown, responses, strict=True):
        distinct = [text for text in found if text.strip()]
        for texts in combinations(distinct, 2) if args.mode == "pair" else ((text,) for text in distinct):
            told = {"messages": prompt.messages} | prompt.beside if isinstance(prompt, Conversation) else {}
            item = {"mode": args.mode, "prompt": str(prompt), "source": source | told}
            items.append(item | dict(zip("ab", texts, strict=False)))
            item_scores.append(tuple(found[text] for text in texts))
    if reader:
        items = [items[i] for i in choose(item_scores, args.by, args.keep)]
    report_added(store, *store.add(items))


def load_prompts(args: argparse.Namespace, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    """Different prompts in token ids, --limit of them at most, in an order that --seed decides."""
    source = data.load(args.prompts, data_dir=args.data_dir, fields=args.fields)
    if args.prompts in data.BUILT_IN:  # PPO's own prompts: the test split is for the final numbers
        source = source.select("val", source.genres_among(["movies"]))
    ledger = source.ledger.copy()
    encoded = data.encode_prompts(tokenizer, source.records, args.prompt_tokens, room, ledger=ledger)
    print(f"prompts: {data.account(ledger)}")
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, encoded))]
    order = data.cursor(len(prompts), min(args.limit, len(prompts)), args.seed, 0)
    return [prompts[i] for i in order]
