"""Items to judge out of a checkpoint: continuations of prompts."""

import argparse
from collections import defaultdict
from itertools import combinations

from minirlhf import UserError, checkpoint, data, training
from minirlhf.evaluate import write
from minirlhf.feedback.add import tell
from minirlhf.feedback.store import Store
from minirlhf.tokenizer import Tokenizer


def sample(args: argparse.Namespace) -> None:
    """Continue `--limit` prompts K times each, and store every two different responses as a pair (Ouyang et al. 2022), or
    each as a text to rate."""
    folder = checkpoint.resolve(args.checkpoint)
    about, tokenizer = checkpoint.load_config(folder), Tokenizer.load(folder)
    if "head" in about or not about["model"].get("causal", True):
        raise UserError(
            f"{args.checkpoint}: a {about['stage']} checkpoint writes no text: name one of train_sft.py or train_ppo.py"
        )
    checkpoint.check_tokenizer(about, tokenizer)
    setting = {key: about["training"].get(key, default) for key, default in
               (("response_tokens", 24), ("temperature", 1.0), ("stop", True))}  # fmt: skip
    setting |= {k: v for k in ("response_tokens", "temperature") if (v := getattr(args, k)) is not None}
    if min(setting["response_tokens"], args.limit, args.per_prompt, args.prompt_tokens) < 1 or not setting["temperature"] > 0:
        raise UserError("--response-tokens, --temperature, --limit, --per-prompt and --prompt-tokens must be above 0")
    if args.mode == "pair" and args.per_prompt < 2:
        raise UserError("--per-prompt must be 2 or more to make pairs: raise it, or use --mode rating")
    machine = training.setup_machine(args.seed)
    source = data.load(args.prompts, data_dir=args.data_dir)
    if args.prompts in ("vader", "toy"):  # PPO's own prompts; test texts are for the last word
        source = source.select("val", source.genres_among(["movies"]))
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, data.prompts_of(source.records, tokenizer, args.prompt_tokens)))]
    prompts = [prompts[i] for i in data.cursor(len(prompts), min(args.limit, len(prompts)), args.seed, 0)]
    longest = max(map(len, prompts)) + setting["response_tokens"]
    if longest > about["model"]["context"]:
        raise UserError(f"{args.prompts}: prompt and response reach {longest} tokens, over the model's context of "
                        f"{about['model']['context']}: lower --response-tokens or shorten the prompts")  # fmt: skip
    store = Store(args.store, create=True, seed=args.seed)

    model, responses = checkpoint.load_gpt(folder).to(machine.device).eval(), defaultdict(dict)  # dicts: in order, each once
    for k in range(args.per_prompt):
        texts = write(model, prompts, setting, tokenizer, machine, args.seed + k)
        for i, (row, real) in enumerate(zip(texts.responses, texts.response_mask, strict=True)):
            responses[i][tokenizer.decode(row[real].tolist())] = None
    made = {"checkpoint": str(folder), "step": about["step"], "seed": args.seed} | setting
    items = []
    for i, ids in enumerate(prompts):
        common = {"mode": args.mode, "prompt": tokenizer.decode(ids), "source": made}
        written = [text for text in responses[i] if text.strip()]
        found = combinations(written, 2) if args.mode == "pair" else ((text,) for text in written)
        items += [common | dict(zip("ab", texts, strict=False)) for texts in found]
    tell(store, *store.add(items))
