"""Stage 2: train a reward model on what people said, and measure it against them.

    python train_rm.py                                    # after train_sft.py: the built-in human ratings
    python train_rm.py --preset smoke                     # seconds, to see that it runs
    python train_rm.py --data choices.jsonl --loss pairwise --out runs/mine/rm
    python train_rm.py --part b --seed 2 --out runs/demo/judge      # a judge that shares no item with --part a

The SFT model with a two-layer MLP head, all weights trained.  Ratings are learnt as regression on the mean score, as
Bradley-Terry pairs with the raters' vote shares as soft targets, or both; choices as pairs [D15].  Scores are then shifted so
that the reference policy's own samples average 0 (and scaled, where the data are choices, whose scale is arbitrary) [D14].
Test texts are read once, at the end, for the report: nothing is chosen on them.

Numbers in brackets are the README's register of implementation details.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import UserError, checkpoint, data, optim, preference, run
from minirlhf.feedback.raters import combine_raters
from minirlhf.measure.reward_report import print_report, reward_report, validation_measure
from minirlhf.model import RewardEnsemble, run_blocks, train_last
from minirlhf.rollout import generate
from minirlhf.support import cli, hardware
from minirlhf.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["smoke", "demo", "gpt2", "smollm2", "minilm"] = "demo"
    """Named settings; any option given beside it wins."""
    out: Path = Path("runs/demo/rm")
    """Where checkpoints, metrics and the report go.  The SFT model is looked for beside it."""
    init: Path | None = None
    """Checkpoint of the backbone and its tokenizer: a language model, or an imported encoder.  Default: OUT/../sft."""
    backbone: Literal["auto", "gpt", "bert"] = "auto"
    """What --init must be: a causal language model, or an encoder, which reads a text in both directions.  auto: either."""
    reference: Path | None = None
    """The policy on whose samples scores are normalised.  Default: --init, or, where that is an encoder, OUT/../sft."""
    data: str = "vader"
    """Ratings or preferences: vader (built in), toy, or a file or folder (.jsonl, .jsonl.gz)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset."""
    genres: tuple[str, ...] = ("movies", "products", "editorials", "tweets", "words")
    """What to train on, of a dataset with genres."""
    genre: str = "movies"
    """What to validate and test on."""
    part: Literal["all", "a", "b"] = "all"
    """Half of the training items (by a hash of the text), for two models that share none."""
    skip_bad: bool = False
    """Count and skip malformed rows instead of stopping."""
    resume: bool = False
    """Go on from OUT's newest checkpoint, bit for bit [D21]."""
    overwrite: bool = False
    """Start again even if OUT holds a run."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    seed: int = 1
    """Of everything random; 0 or more."""

    loss: Literal["auto", "regression", "pairwise", "both"] = "auto"
    """auto: regression for ratings, pairwise for choices."""
    pooling: Literal["last", "mean", "last+mean"] = "last+mean"
    """What the head reads: the last token's hidden state, the mean over the text, or both."""
    head: Literal["mlp", "linear"] = "mlp"
    """Two layers, or one, as transformers' sequence classifiers have: with --pooling last such a model can be exported."""
    raters: Literal["mean", "majority", "model"] = "mean"
    """What several raters of a training item come to.  mean: the mean rating, and the share of the votes.  majority: the
    median rating, and the side with more votes.  model: what a fit of all ratings and raters says of the item, each rater
    with a bias, a slope and a noise (ratings) or a reliability (votes, which must be given by rater): who answers at random
    counts nothing, who answers upside down is turned round.  Pairs made of ratings then go by this one number an item.
    Validation and test are always against the mean."""
    members: int = 1
    """Ensemble of so many seeds: the mean is the score, the spread the disagreement."""
    dropout: float = 0.2
    """As in stage 1, in place of the SFT model's."""
    train_layers: int | None = None
    """Train only the last so many blocks and what follows them; None: everything.  The rest is kept in --precision, and has no
    dropout."""
    bidirectional: int = 0
    """Let so many of the last blocks of a language model read in both directions (Dukic and Snajder 2024): whole texts are read
    better.  A prefix then has no score, so PPO's critic cannot start from such a model; nor is there one in transformers."""
    lowercase: float = 0.5
    """Share of the training texts read in lower case, others each epoch: rare spellings learn from common ones."""
    epochs: int = 2
    """Passes over the training items."""
    batch: int = 64
    """Items (ratings) or pairs (choices) an optimiser step, over all ranks."""
    lr: float = 1.5e-4
    """After a short warm-up, linear to 0."""
    embedding_lr: float = 12.0
    """Times the learning rate, for the token embeddings: a rare word is in few batches."""
    warmup: int = 50
    """Steps of linear warm-up, a member."""
    weight_decay: float = 0.1
    """On matrices only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    normalise: Literal["auto", "bias", "scale", "none"] = "auto"
    """Affine transform of scores, fitted on samples of the reference: auto is bias for ratings, scale for choices [D14]."""
    normalise_samples: int = 256
    """How many samples."""
    prompt_tokens: int = 4
    """Of the prompts that these samples continue: as train_ppo.py will cut them."""
    response_tokens: int = 24
    """Longest sample."""
    temperature: float = 1.0
    """Of those samples: as train_ppo.py will sample."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: a fraction of the memory, a third more time."""
    compile: bool = False
    """torch.compile the blocks; worth it in long runs."""

    def __post_init__(self):
        cli.check_positive(
            self,
            "members",
            "epochs",
            "batch",
            "lr",
            "train_layers",
            "prompt_tokens",
            "response_tokens",
            "temperature",
        )
        if not 0 <= self.lowercase <= 1:
            raise UserError(f"--lowercase is a share: want 0 to 1, not {self.lowercase}")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/rm"), data="toy", epochs=2, warmup=5, normalise_samples=32,
                    response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/rm"), genres=("movies",), train_layers=14, pooling="mean",
                      bidirectional=14, dropout=0.1, lowercase=0.0, batch=32, lr=1e-4, epochs=3),
    "minilm": Config(preset="minilm", out=Path("runs/minilm/rm"), init=Path("runs/minilm/base"), genres=("movies",),
                     pooling="mean", dropout=0.1, lowercase=0.0, batch=32, lr=1e-4, embedding_lr=1.0, epochs=4,
                     normalise="none"),
    "gpt2": Config(preset="gpt2", out=Path("runs/gpt2/rm"), epochs=2, lr=3e-5, members=3),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """A training example: one rated text, or (ids_b given) a pair of which `target` is the vote share of the first."""

    ids: list[int]
    target: float
    ids_b: list[int] | None = None


def items_of(records: list, tokenizer: Tokenizer, context: int) -> list[Item]:
    """Token ids of what the model will read: the same sequences as in stage 1."""
    encode = lambda prompt, text: data.encode_example(tokenizer, prompt, text, context)[0]
    if isinstance(records[0], data.Preference):
        return [Item(encode(r.prompt, r.chosen), r.share, encode(r.prompt, r.rejected)) for r in records]
    return [Item(encode(r.prompt, r.response), r.rating) for r in records]


def settle(records: list, how: str) -> tuple[list, dict]:
    """(the records with the targets that `how` (--raters) makes of their judgements, what it found of each rater)."""
    if how == "mean":  # as they were read, all ratings kept: pairs of them are soft targets
        return records, {}
    choices = isinstance(records[0], data.Preference)
    if choices and how == "model" and not all(r.votes for r in records):
        bare = next(r for r in records if not r.votes)
        raise UserError(f"--raters model needs votes by rater ({{rater: a, b or tie}}), and the pair {bare.chosen[:30]!r} has "
                        "none: use --raters mean or majority")  # fmt: skip
    units = [(r.votes or (r.share,)) if choices else r.ratings for r in records]
    targets, found = combine_raters(units, [r.raters for r in records], how, choices)
    field = "share" if choices else "rating"
    return [
        dataclasses.replace(r, **{field: t}) for r, t in zip(records, targets.tolist(), strict=True)
    ], found


def lowered(record: data.Response | data.Preference) -> data.Response | data.Preference:
    """The record with its texts in lower case, the prompt as it was."""
    names = ("chosen", "rejected") if isinstance(record, data.Preference) else ("response",)
    return dataclasses.replace(record, **{name: getattr(record, name).lower() for name in names})


def score(model, sequences: list[list[int]], pad: int, machine: hardware.Machine, precision: str) -> Tensor:
    """Scores [len(sequences)] on the CPU, in the given order."""
    scores = torch.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for i in range(0, len(order), 64):
        tokens, mask = data.collate([sequences[j] for j in order[i : i + 64]], pad)
        with torch.no_grad(), machine.autocast(precision):
            out = model(tokens.to(machine.device), mask.to(machine.device))
        scores[order[i : i + 64]] = (out[0] if isinstance(out, tuple) else out).float().cpu()
    return scores


def reference_samples(
    config: Config,
    reference: Path,
    own: Tokenizer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    machine: hardware.Machine,
) -> list[list[int]]:
    """Continuations by the reference policy, as train_ppo.py will see them: prompts in its `own` tokens, prompt and response
    returned in those of `tokenizer`."""
    ref = checkpoint.load_gpt(reference).to(machine.device).eval()
    picks = data.cursor(len(prompts), config.normalise_samples, config.seed, 0)
    found = []
    for i in range(0, len(picks), 64):
        queries, query_mask = data.collate([prompts[j] for j in picks[i : i + 64]], own.pad, side="left")
        responses, keep = generate(ref, queries.to(machine.device), query_mask.to(machine.device), config.response_tokens,
                                   config.temperature, own.eot, own.pad)  # fmt: skip
        found += [
            prompts[j] + row[k].tolist() for j, row, k in zip(picks[i : i + 64], responses, keep, strict=True)
        ]
    return [data.translate(ids, own, tokenizer) for ids in found]


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    out = config.out
    todo = run.claim(out, config, config.resume, config.overwrite)
    if todo == "skip":
        print(f"{out} is complete: nothing to do (--overwrite to run it again)")
        return

    # Setup: data, a trained model as backbone of each member, optimiser.
    init = checkpoint.resolve(
        config.init or out.parent / "sft",
        "run train_sft.py first, or name one with --init, such as minirlhf.checkpoint import makes",
    )
    machine = hardware.setup_machine(config.seed)
    precision = hardware.pick_precision(config.precision)
    source = data.load(config.data, config.skip_bad, data_dir=config.data_dir)
    if source.kind not in ("rated", "preference"):
        raise UserError(f"{source.name}: {source.kind} rows hold no judgement: want ratings or preferences")
    loss_kind = (
        config.loss if config.loss != "auto" else "regression" if source.kind == "rated" else "pairwise"
    )
    if source.kind == "preference" and loss_kind != "pairwise":
        raise UserError(
            f"--loss {loss_kind} needs ratings, but {source.name} holds choices: use --loss pairwise"
        )
    tokenizer, init_config = Tokenizer.load(init), checkpoint.load_config(init)
    checkpoint.check_tokenizer(init_config, tokenizer)
    backbone = checkpoint.load_gpt(init)
    kind = "gpt" if backbone.config.causal else "bert"
    if config.backbone not in ("auto", kind):
        raise UserError(
            f"{init} holds a {kind} model, not a {config.backbone} one: change --backbone or --init"
        )
    if config.bidirectional and kind == "bert":
        raise UserError(
            f"{init} holds an encoder, all of whose blocks read in both directions: leave --bidirectional out"
        )
    shape = dataclasses.replace(backbone.config, dropout=config.dropout, n_bidirectional=config.bidirectional)
    mode = config.normalise if config.normalise != "auto" else "bias" if source.kind == "rated" else "scale"

    home = source.genres_among([config.genre])
    records = {split: source.select(split, home).records for split in ("train", "val", "test")}
    part = lambda rows: [r for r in rows if config.part in ("all", data.part_of(r))]
    train_records = part(source.select("train", source.genres_among(config.genres)).records)
    train_records, raters = settle(train_records, config.raters)
    records["train"], _ = settle(
        records["train"], config.raters
    )  # for the baselines, which learn from the same targets
    spellings = [
        items_of([change(r) for r in train_records], tokenizer, shape.context)
        for change in (lambda r: r, lowered)
    ]
    encoded = {id(r): pair for r, pair in zip(train_records, zip(*spellings, strict=True), strict=True)}
    held = {split: items_of(records[split], tokenizer, shape.context) for split in ("val", "test")}

    def schedule_of(member: int) -> list[tuple[int, list]]:
        """(member, records of a batch), every epoch's."""
        lengths = [len(encoded[id(r)][0].ids) for r in train_records]
        epochs = [
            data.batches(len(lengths), config.batch, config.seed + member, e, lengths)
            for e in range(config.epochs)
        ]
        return [(member, [train_records[i] for i in picks]) for batches in epochs for picks in batches]

    schedule = [entry for member in range(config.members) for entry in schedule_of(member)]
    per_member = len(schedule) // config.members
    model = RewardEnsemble(shape, config.pooling, config.members, config.head == "mlp")
    for k, member in enumerate(model.members):
        hardware.seed_everything(config.seed + k)  # members differ in head and in data order
        member.reset_head()
        member.backbone.load_state_dict(backbone.state_dict())
        if source.kind == "rated":  # start at the average rating, so that only differences are left to learn
            member.out.bias.data.fill_(float(np.mean([r.rating for r in train_records])))
    model.to(machine.device).train()
    train_last(model, config.train_layers, hardware.frozen_dtype(precision))
    run_blocks([model], config.gradient_checkpointing, config.compile)
    new_optimizer = lambda k: optim.adamw(
        [model.members[k]], config.lr, config.weight_decay, config.betas, config.adam_eps, config.embedding_lr
    )

    step, seconds = 0, 0.0
    optimizer = new_optimizer(0)
    trainer_state = checkpoint.load_trainer(out) if todo == "resume" else None
    if trainer_state is not None:
        tensors, state = trainer_state
        step, seconds = state["step"], state["seconds"]
        model.load_state_dict(checkpoint.load_state(out))
        if step % per_member:
            optimizer = new_optimizer(step // per_member)
            checkpoint.unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer.")
    if mode != "none":  # what the reference policy will continue, at the end
        remedy = "name a language model with --reference, or leave scores on the raters' own scale with --normalise none"
        reference = checkpoint.resolve(
            config.reference or (init if kind == "gpt" else out.parent / "sft"), remedy
        )
        reference_tokenizer = Tokenizer.load(reference)
        prompts = data.prompts_of(records["val"], reference_tokenizer, config.prompt_tokens)
        longest = max(map(len, prompts)) + config.response_tokens
        if longest > shape.context:
            raise UserError(f"{source.name}: prompt and response of a reference sample reach {longest} tokens, over the "
                            f"context of {shape.context}: lower --response-tokens or --prompt-tokens")  # fmt: skip
    log = run.MetricLogger(out, machine, config.tensorboard, keep_until=step)
    if machine.rank == 0:
        print(source.describe())
        print(f"{len(train_records)} items to learn from (part {config.part}), {loss_kind} loss; {len(schedule)} steps; "
              f"{precision} on {machine.device}")  # fmt: skip
        if raters:  # first its reliability or its slope
            weakest = sorted(raters.items(), key=lambda r: next(iter(r[1].values())))[:5]
            print(f"weakest of {len(raters)} raters:", "; ".join(f"{who}: " + ", ".join(f"{k} {v:.2f}" for k, v in what.items())
                                                                for who, what in weakest))  # fmt: skip

    def save(complete: bool, **more) -> None:
        tensors, state = checkpoint.pack_optimizer(optimizer, "optimizer.")
        if machine.rank == 0:
            about = run.describe("rm", shape, config, step, complete, tokenizer,
                                      head={"pooling": config.pooling, "members": config.members, "mlp": config.head == "mlp"},
                                      data={"name": source.name, "sha256": source.sha256}, **more)  # fmt: skip
            checkpoint.save(out, step, model.state_dict(), about, tokenizer,
                            {"tensors": tensors, "state": {"optimizer": state, "step": step, "seconds": seconds}})  # fmt: skip

    def held_out(split: str) -> list[float]:
        """The ensemble's scores of a split: of the texts, or margins of the pairs."""
        items = held[split]
        scores = score(model.eval(), [i.ids for i in items], tokenizer.pad, machine, precision)
        if items[0].ids_b is not None:
            scores = scores - score(model, [i.ids_b for i in items], tokenizer.pad, machine, precision)
        model.train()
        return scores.tolist()

    # The loop: one optimiser step an iteration; validation four times a member.
    bar = tqdm(schedule[step:], initial=step, total=len(schedule), disable=machine.rank > 0)
    with run.Interrupt() as interrupt:
        for k, batch in bar:
            start = time.perf_counter()
            hardware.seed_everything(config.seed, step, 0)  # [D21]
            # Drawn before the seeds of the ranks part: how a text is read does not depend on who reads it.
            low = (torch.rand(len(batch)) < config.lowercase).tolist()
            if machine.rank:
                hardware.seed_everything(config.seed, step, machine.rank)  # dropout
            if step == k * per_member and step:
                optimizer = new_optimizer(k)
            at = step - k * per_member
            factor = min(1.0, (at + 1) / max(1, config.warmup)) * (1 - at / per_member)
            optim.set_lr(optimizer, config.lr * factor)

            # 1. Loss.  A rank's mean is weighted by its share of the batch, so that ranks add up to the mean [D17].
            mine = batch[machine.rank :: machine.world]
            loss = torch.zeros((), device=machine.device)
            if mine:
                items = [
                    encoded[id(r)][lower]
                    for r, lower in zip(mine, low[machine.rank :: machine.world], strict=True)
                ]
                sequences = [i.ids for i in items] + [i.ids_b for i in items if i.ids_b is not None]
                tokens, mask = data.collate(sequences, tokenizer.pad)
                with machine.autocast(precision):
                    scores = model.members[k](tokens.to(machine.device), mask.to(machine.device))
                if loss_kind in ("regression", "both"):
                    target = torch.tensor([i.target for i in items], device=machine.device)
                    loss = loss + preference.regression_loss(scores, target)
                if source.kind == "preference":
                    share = torch.tensor([i.target for i in items], device=machine.device)
                    loss = loss + preference.pairwise_loss(*scores.chunk(2), share)
                elif loss_kind in ("pairwise", "both") and len(mine) > 1:
                    ratings = [r.ratings if config.raters == "mean" else r.rating for r in mine]
                    a, b, share = preference.pairs_from_ratings(
                        ratings, np.random.default_rng(step), 4 * len(mine)
                    )
                    share = torch.tensor(share, dtype=torch.float32, device=machine.device)
                    loss = loss + preference.pairwise_loss(scores[a], scores[b], share)
                loss = loss * (len(mine) / len(batch))
                if loss.requires_grad:  # a lone rated text makes no pair
                    loss.backward()

            # 2. Step.
            norm = optim.take_step(machine, optimizer, config.max_grad_norm)
            step += 1
            hardware.trim_freed_memory(step)
            total = loss.detach().clone()
            machine.sum_([total])
            metrics = {
                "train/loss": total.item(),
                "train/grad_norm": norm.item(),
                "lr": config.lr * factor,
                "member": k,
            }

            # 3. Validation.
            quarter = (
                at + 1 == per_member
                or (at + 1) % max(1, per_member // 4) == 0
                and per_member - at > per_member // 4
            )
            if quarter:
                predicted = held_out("val")
                metrics |= validation_measure(source.kind, predicted, records["val"])
                tqdm.write(
                    f"step {step}: "
                    + ", ".join(f"{n} {v:.3f}" for n, v in metrics.items() if n.startswith("val/"))
                )
            seconds += time.perf_counter() - start
            log.log(step, metrics | {"time/seconds": seconds})
            bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}")
            stop = interrupt.agreed(machine)
            if quarter or stop:
                save(complete=False)
            if stop:
                raise UserError(
                    f"stopped at step {step} of {len(schedule)}; the same command with --resume goes on from {out}"
                )

    # The report on test texts, read on the raters' own scale; then the transform that PPO will see [D14].
    if machine.rank == 0:
        found = reward_report(source.kind, held_out("test"), records, config.part, config.seed) | (
            {"raters": raters} if raters else {}
        )
        hardware.seed_everything(config.seed, step)  # whether the last step was run or resumed from [D21]
        if mode != "none":
            samples = reference_samples(config, reference, reference_tokenizer, tokenizer, prompts, machine)
            for member in model.members:
                gain, bias = preference.fit_affine(
                    score(member.eval(), samples, tokenizer.pad, machine, precision), mode
                )
                member.gain.fill_(gain)
                member.bias.fill_(bias)
        scale = getattr(records["test"][0], "scale", None)
        save(complete=True, results=found | {"seconds": seconds}, normalise={"mode": mode, "scale": scale})
        print_report(found)
        if mode != "none":
            print(f"scores x {gain:.3f} {bias:+.3f}: the reference policy's samples average 0")
        print(f"{seconds:.0f} s; model in {out}")


if __name__ == "__main__":
    cli.run_script(main)
