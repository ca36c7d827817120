"""Stage 2: train a reward model on people's judgements, and measure it against them.

    python train_rm.py                                    # after train_sft.py: the built-in human ratings
    python train_rm.py --preset smoke                     # seconds, to see that it runs
    python train_rm.py --data choices.jsonl --loss pairwise --out runs/mine/rm
    python train_rm.py --part b --seed 2 --out runs/demo/judge      # a judge that shares no item with --part a

The model is the SFT model with a two-layer MLP head; all weights are trained.  Ratings are learnt as
regression on the mean score, as Bradley-Terry pairs with the raters' vote shares as soft targets, or both;
choices are learnt as pairs [D15]. Scores are then shifted so that the reference policy's own samples average
0 (and scaled, where the data are choices, whose scale is arbitrary) [D14].  The test split is read once, at
the end, for the report: nothing is chosen on it.

Numbers in brackets are implementation details: docs/details.md names each one's source and test.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data, optim, preference
from minirlhf.feedback import raters
from minirlhf.measure import reward_report
from minirlhf.model import GPT, RewardEnsemble, RewardModel, run_blocks, train_last
from minirlhf.rollout import Sampling, generate
from minirlhf.run import Run, RunConfig
from minirlhf.support import cli
from minirlhf.support.cli import Above0, AtLeast0, Count, CountOr0, Share, ShareBelow1
from minirlhf.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: Literal["smoke", "demo", "gpt2", "smollm2", "minilm"] = "demo"
    """Named settings.  Any option given beside it wins."""
    out: Path = Path("runs/demo/rm")
    """Folder for checkpoints, metrics and the report.  The SFT model is looked for beside it."""

    # Data
    genres: tuple[str, ...] = ("movies", "products", "editorials", "tweets", "words")
    """Which sentences of a dataset with genres to train on."""
    genre: str = "movies"
    """Genre to validate and test on."""
    part: Literal["all", "a", "b"] = "all"
    """Half of the training items (by a hash of the text), for two models that share none."""
    raters: Literal["mean", "majority", "model"] = "mean"
    """How the judgements of several raters become one target.  mean: the mean rating, the share of the votes.
    majority: the median rating, the side with more votes.  model: a fit of all items and raters at once, in
    which each rater has a bias, a slope and a noise (ratings) or a reliability (votes by rater): random
    answers get no weight, inverted ones a negative weight.  Validation and test always use the mean."""
    lowercase: Share = 0.5
    """Share of the training texts that is read in lower case, another one each epoch: rare spellings then
    learn from common ones."""

    # Model
    init: Path | None = None
    """Checkpoint of the backbone and its tokenizer: a language model, or an imported encoder.  Default:
    OUT/../sft."""
    backbone: Literal["auto", "gpt", "bert"] = "auto"
    """What --init must be: a causal language model (gpt) or an encoder (bert).  auto: either."""
    pooling: Literal["last", "mean", "last+mean"] = "last+mean"
    """What the head reads: the last token's hidden state, the mean over the text, or both."""
    head: Literal["mlp", "linear"] = "mlp"
    """Two layers, or one as in transformers' sequence classifiers: with --pooling last such a model can be
    exported."""
    members: Annotated[int, cli.Range(1, 100)] = 1
    """Number of models in the ensemble, which differ in their seeds: scores are means, disagreement is the
    spread."""
    bidirectional: CountOr0 = 0
    """Let this many of the last blocks read in both directions (Dukic and Snajder 2024): whole texts are read
    better.  A prefix then has no score, so PPO's critic cannot start from such a model; and transformers has
    no such model."""
    dropout: ShareBelow1 = 0.2
    """Dropout, in place of the SFT model's."""

    # Optimisation
    loss: Literal["auto", "regression", "pairwise", "both"] = "auto"
    """Loss.  auto: regression for ratings, pairwise for choices."""
    epochs: Annotated[int, cli.Range(1, 100_000)] = 2
    """Passes over the training items."""
    batch: Count = 64
    """Items (ratings) or pairs (choices) per optimiser step, over all ranks."""
    microbatch: Count | None = None
    """Most items per forward pass on each rank.  Smaller values save memory; gradients are the same [D17]."""
    lr: Above0 = 1.5e-4
    """Highest learning rate: linear warm-up, then linear to 0."""
    embedding_lr: AtLeast0 = 12.0
    """Factor on the learning rate of the token embeddings: a rare word is in few batches."""
    warmup: CountOr0 = 50
    """Steps of linear warm-up of each member."""
    weight_decay: AtLeast0 = 0.1
    """Weight decay of matrices; vectors have none."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.98)
    """Adam's betas."""
    adam_eps: Above0 = 1e-8
    """Adam's epsilon."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients are scaled down to this norm.  0: no clipping."""

    # Normalisation of scores on samples of the reference policy
    normalise: Literal["auto", "bias", "scale", "none"] = "auto"
    """Affine transform of the scores [D14].  auto: bias for ratings, scale for choices."""
    reference: Path | None = None
    """Policy whose samples scores are normalised on.  Default: --init, or OUT/../sft where --init is an
    encoder."""
    normalise_samples: Annotated[int, cli.Range(2, 1_000_000)] = 256
    """Number of these samples."""
    prompt_tokens: Count = 4
    """Tokens of a text that become the prompt of a sample: as in train_ppo.py."""
    response_tokens: Count = 24
    """Longest sample in tokens: as in train_ppo.py."""
    temperature: Above0 = 1.0
    """Temperature of these samples: as in train_ppo.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch is not None and self.batch % self.microbatch:
            raise UserError(f"--batch {self.batch} does not divide by --microbatch {self.microbatch}")
        if self.reference and self.normalise == "none":
            raise UserError("--reference is read for --normalise, which is none: drop one of them")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/rm"), data="toy", warmup=5, normalise_samples=32,
                    response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/rm"), genres=("movies",), train_layers=14, pooling="mean",
                      bidirectional=14, dropout=0.1, lowercase=0.0, batch=32, lr=1e-4, epochs=3),
    "minilm": Config(preset="minilm", out=Path("runs/minilm/rm"), init=Path("runs/minilm/base"), genres=("movies",),
                     pooling="mean", dropout=0.1, lowercase=0.0, batch=32, lr=1e-4, embedding_lr=1.0, epochs=4,
                     normalise="none"),
    "gpt2": Config(preset="gpt2", out=Path("runs/gpt2/rm"), lr=3e-5, members=3, microbatch=8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """What the model learns from: judged items in their own spelling and in lower case, and the raters'
    fit."""

    items: list[data.Judged]
    lowered: list[data.Judged]
    raters: dict


def load_training(
    config: Config, run: Run, source: data.Dataset, tokenizer: Tokenizer, context: int
) -> Training:
    """The training split, of one part, with the targets that --raters makes of the judgements."""
    chosen = source.select("train", source.genres_among(config.genres))
    records = [r for r in chosen.records if config.part in ("all", data.part_of(r))]
    chosen.ledger["left: other part"] += len(chosen.records) - len(records)
    records, found = raters.with_targets(records, config.raters)
    items = data.encode_judged(tokenizer, records, context, config.too_long, chosen.ledger)
    run.account(f"train, part {config.part}", chosen.ledger)
    lowered = [data.encode_pair(tokenizer, lower(item.record), context) for item in items]
    return Training(items, lowered, found)


def choose_loss(config: Config, source: data.Dataset) -> tuple[str, str]:
    """(loss, normalisation of the scores) for this kind of judgements, 'auto' resolved."""
    if source.kind not in ("rated", "preference"):
        raise UserError(f"{source.name}: {source.kind} rows hold no judgement: want ratings or preferences")
    rated = source.kind == "rated"
    loss = config.loss if config.loss != "auto" else "regression" if rated else "pairwise"
    if not rated and loss != "pairwise":
        raise UserError(f"--loss {loss} needs ratings, but {source.name} holds choices: use --loss pairwise")
    if rated and loss != "regression" and config.microbatch:
        raise UserError(
            "--microbatch splits a batch, of which --loss pairwise and both make pairs: drop one of them"
        )
    return loss, config.normalise if config.normalise != "auto" else "bias" if rated else "scale"


def load_backbone(config: Config, init: Path) -> tuple[Tokenizer, GPT]:
    """The model whose weights every member starts from, and its tokenizer."""
    tokenizer = Tokenizer.load(init)
    checkpoint.check_tokenizer(checkpoint.load_config(init), tokenizer)
    backbone = checkpoint.load_gpt(init)
    kind = "gpt" if backbone.config.causal else "bert"
    if config.backbone not in ("auto", kind):
        raise UserError(
            f"{init} holds a {kind} model, not a {config.backbone} one: change --backbone or --init"
        )
    if config.bidirectional and kind == "bert":
        raise UserError(
            f"{init} holds an encoder, which reads in both directions already: drop --bidirectional"
        )
    return tokenizer, backbone


def lower(record: data.Response | data.Preference) -> data.Response | data.Preference:
    """The record with its texts in lower case; the prompt stays as it is."""
    names = ("chosen", "rejected") if isinstance(record, data.Preference) else ("response",)
    return dataclasses.replace(record, **{name: getattr(record, name).lower() for name in names})


def make_model(config: Config, run: Run, backbone: GPT, mean_rating: float | None) -> RewardEnsemble:
    """The ensemble: members share the backbone's start, and differ in their heads (and in their order of the
    data)."""
    shape = dataclasses.replace(backbone.config, dropout=config.dropout, n_bidirectional=config.bidirectional)
    model = RewardEnsemble(shape, config.pooling, config.members, config.head == "mlp")
    for k, member in enumerate(model.members):
        run.seed(0, k)
        member.reset_head()
        member.backbone.load_state_dict(backbone.state_dict())
        if mean_rating is not None:  # start at the average rating, so that only differences are left to learn
            member.out.bias.data.fill_(mean_rating)
    model.to(run.device).train()
    train_last(model, config.train_layers, run.frozen_dtype)
    run_blocks([model], config.gradient_checkpointing, config.compile)
    return model


def target_of(item: data.Judged) -> float:
    """What the model learns of an item: the mean rating, or the share of the votes for the first text."""
    return item.record.share if isinstance(item.record, data.Preference) else item.record.rating


def item_loss(scores: Tensor, items: list[data.Judged]) -> Tensor:
    """Mean loss of items whose scores are [b]; of pairs whose scores are [2 b], the first texts before the
    second ones."""
    target = torch.tensor([target_of(item) for item in items], device=scores.device)
    if items[0].ids_b is not None:
        return preference.pairwise_loss(*scores.chunk(2), target)
    return preference.regression_loss(scores, target)


def rating_pairs_loss(
    config: Config, run: Run, step: int, batch: list[data.Judged], mine: list[int], scores: Tensor
) -> Tensor:
    """Pairwise loss on pairs drawn from the ratings of the whole batch, of which this rank has scored the
    items `mine`.

    Scores of other ranks come as constants.  Each rank's gradient is then that of its own items, and the sum
    over ranks is the gradient of one process [D17]."""
    others = torch.zeros(len(batch), device=scores.device)
    places = torch.tensor(mine, dtype=torch.long, device=scores.device)
    others[places] = scores.detach().float()
    everyone = run.sum_(others).index_put((places,), scores.float())
    ratings = [item.record.ratings if config.raters == "mean" else target_of(item) for item in batch]
    rng = np.random.default_rng([config.seed, step])
    a, b, share = preference.pairs_from_ratings(ratings, rng, 4 * len(batch))
    share = torch.tensor(share, dtype=torch.float32, device=scores.device)
    return preference.pairwise_loss(everyone[a], everyone[b], share)


@torch.no_grad()
def score_items(run: Run, members: list[RewardModel], items: list[data.Judged], pad: int) -> list[float]:
    """The members' mean score of each item: of a text, or the margin between a pair's two texts."""
    scores = score_sequences(run, members, [item.ids for item in items], pad)
    if items[0].ids_b is not None:
        scores = scores - score_sequences(run, members, [item.ids_b for item in items], pad)
    return scores.tolist()


@torch.no_grad()
def score_sequences(run: Run, members: list[RewardModel], sequences: list[list[int]], pad: int) -> Tensor:
    """The members' mean scores [len(sequences)] on the CPU; each rank reads a share, and all get all."""
    found = torch.zeros(len(sequences), device=run.device)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for member in members:
        member.eval()
    for i in range(64 * run.rank, len(order), 64 * run.world):
        rows = order[i : i + 64]
        tokens, mask = (x.to(run.device) for x in data.collate([sequences[j] for j in rows], pad))
        with run.autocast():
            scores = torch.stack([member(tokens, mask) for member in members]).mean(0)
        found[torch.tensor(rows, device=run.device)] = scores.float()
    for member in members:
        member.train()
    return run.sum_(found).cpu()


def load_reference(config: Config, init: Path, records: list, context: int) -> tuple[Path, Tokenizer, list]:
    """(folder, tokenizer, prompts) of the policy whose samples scores are normalised on.  Checked before
    training."""
    remedy = (
        "name a language model with --reference, or leave scores on the raters' scale with --normalise none"
    )
    is_gpt = checkpoint.shape_of(init).causal
    folder = checkpoint.resolve(config.reference or (init if is_gpt else config.out.parent / "sft"), remedy)
    tokenizer = checkpoint.writer(folder)[2]
    room = min(context, checkpoint.shape_of(folder).context) - config.response_tokens
    prompts = data.encode_prompts(tokenizer, records, config.prompt_tokens, room, config.too_long)
    return folder, tokenizer, prompts


@torch.no_grad()
def normalise_scores(
    config: Config,
    run: Run,
    model: RewardEnsemble,
    tokenizer: Tokenizer,
    reference: Path,
    reference_tokenizer: Tokenizer,
    prompts: list[list[int]],
    mode: str,
) -> None:
    """Set each member's gain and bias such that samples of the reference policy average 0 [D14].

    The samples are drawn as train_ppo.py will draw them.
    """
    policy = checkpoint.load_gpt(reference).to(run.device).eval()
    pad = reference_tokenizer.pad
    sampling = Sampling(config.response_tokens, config.temperature, reference_tokenizer.eot, pad)
    picks = data.cursor(len(prompts), config.normalise_samples, config.seed, 0)
    sequences = []
    for i in range(0, len(picks), 64):
        queries, query_mask = data.collate([prompts[j] for j in picks[i : i + 64]], pad, side="left")
        texts = generate(policy, queries, query_mask, sampling)
        rows = zip(texts.tokens.cpu(), texts.mask.cpu(), strict=True)
        sequences += [
            data.translate(row[real].tolist(), reference_tokenizer, tokenizer) for row, real in rows
        ]
    for k, member in enumerate(model.members):
        scores = score_sequences(run, [member], sequences, tokenizer.pad)
        gain, bias = preference.fit_affine(scores, mode)
        member.gain.fill_(gain)
        member.bias.fill_(bias)
        run.print(
            f"member {k}: scores x {gain:.3f} {bias:+.3f}, so that the reference policy's samples average 0"
        )


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    run = Run("rm", config)

    # Setup: data, a trained model as backbone of each member, optimisers.
    remedy = "run train_sft.py first, or name one with --init, such as minirlhf.checkpoint import makes"
    init = checkpoint.resolve(config.init or config.out.parent / "sft", remedy)
    source = data.load(config.data, config.skip_bad, data_dir=config.data_dir)
    if not run.begin(source, init=init):
        return
    loss_kind, normalise = choose_loss(config, source)
    tokenizer, backbone = load_backbone(config, init)
    context = backbone.config.context
    home = source.genres_among([config.genre])
    training = load_training(config, run, source, tokenizer, context)
    records = {"train": raters.with_targets(source.select("train", home).records, config.raters)[0]}
    held_out = {}
    for split in ("val", "test"):
        part = source.select(split, home)
        held_out[split] = data.encode_judged(tokenizer, part.records, context, config.too_long, part.ledger)
        records[split] = [item.record for item in held_out[split]]
        run.account(split, part.ledger)
    samples_from = load_reference(config, init, records["val"], context) if normalise != "none" else None

    schedule = []  # (member, places in training.items) of every step
    lengths = [len(item.ids) for item in training.items]
    for k in range(config.members):
        for epoch in range(config.epochs):
            order = data.batches(len(lengths), config.batch, config.seed, epoch, lengths, stream=k)
            schedule += [(k, picks) for picks in order]
    per_member = len(schedule) // config.members
    rated = source.kind == "rated"
    mean_rating = float(np.mean([target_of(item) for item in training.items])) if rated else None
    model = make_model(config, run, backbone, mean_rating)
    settings = (config.lr, config.weight_decay, config.betas, config.adam_eps, config.embedding_lr)
    optimizers = [optim.adamw([member], *settings) for member in model.members]
    run.about["head"] = {"pooling": config.pooling, "members": config.members, "mlp": config.head == "mlp"}
    run.resume(tokenizer, model, **{f"optimizer{k}": optimizer for k, optimizer in enumerate(optimizers)})
    run.print(f"{loss_kind} loss; {len(schedule)} steps; {run.precision} on {run.device}")
    if training.raters:
        run.print(raters.describe_weakest(training.raters))

    # The loop: one optimiser step per iteration; validation four times per member.
    for step in run.loop(len(schedule)):
        k, picks = schedule[step]
        step_of_member = step - k * per_member
        optimizer = optimizers[k]
        lr = config.lr * optim.warmup_linear(step_of_member, per_member, config.warmup)
        optim.set_lr(optimizer, lr)

        # 1. Gradients.  Each microbatch's mean is weighted by its share of the batch, so that parts add up to
        #    the mean over microbatches and ranks [D17].
        in_lower_case = (run.same_on_all_ranks(torch.rand, step, len(picks)) < config.lowercase).tolist()
        batch = [
            (training.lowered if low else training.items)[i]
            for i, low in zip(picks, in_lower_case, strict=True)
        ]
        mine = list(range(run.rank, len(batch), run.world))
        size = config.microbatch or len(batch)
        total = torch.zeros((), device=run.device)
        pairs_of_ratings = loss_kind in ("pairwise", "both") and rated and len(batch) > 1
        for rows in [mine[i : i + size] for i in range(0, len(mine), size)]:
            items = [batch[i] for i in rows]
            sequences = [item.ids for item in items] + [
                item.ids_b for item in items if item.ids_b is not None
            ]
            tokens, mask = data.collate(sequences, tokenizer.pad)
            with run.autocast():
                scores = model.members[k](tokens.to(run.device), mask.to(run.device))
            loss = torch.zeros((), device=run.device)
            if loss_kind in ("regression", "both") or not rated:
                loss = loss + item_loss(scores, items) * (len(items) / len(batch))
            total += loss.detach()
            if pairs_of_ratings:
                pairs_loss = rating_pairs_loss(config, run, step, batch, rows, scores)
                total += pairs_loss.detach() / run.world  # every rank has the whole of it
                loss = loss + pairs_loss
            if loss.requires_grad:  # a lone rated text makes no pair
                loss.backward()
        if pairs_of_ratings and not mine:  # a rank without a text, or the others would wait for it
            total += rating_pairs_loss(config, run, step, batch, mine, total.new_zeros(0)) / run.world

        # 2. Step.
        norm = run.take_step(optimizer, config.max_grad_norm, "reward model")
        metrics = {"train/loss": run.sum_(total).item(), "train/grad_norm": norm, "lr": lr, "member": k}

        # 3. Validation, of the members trained so far.
        last = step_of_member + 1 == per_member
        quarter = max(1, per_member // 4)
        validate = last or (step_of_member + 1) % quarter == 0 and per_member - step_of_member > quarter
        if validate:
            predictions = score_items(run, model.members[: k + 1], held_out["val"], tokenizer.pad)
            metrics |= reward_report.validation_measure(source.kind, predictions, records["val"])
            measured = ", ".join(f"{n} {v:.3f}" for n, v in metrics.items() if n.startswith("val/"))
            run.print(f"step {step + 1}: {measured}")
        if last:
            optimizer.state.clear()  # this member is done: its moments need no memory
        run.log(step + 1, metrics, "loss {train/loss:.3f}")
        run.checkpoint(step + 1, due=validate)

    # The report on test texts, on the raters' own scale; then the transform that PPO will see [D14].
    predictions = score_items(run, model.members, held_out["test"], tokenizer.pad)
    run.seed(len(schedule) + 1)  # whether the last step was run or resumed from [D21]
    if samples_from is not None:
        normalise_scores(config, run, model, tokenizer, *samples_from, normalise)
    if run.rank == 0:
        report = reward_report.reward_report(source.kind, predictions, records, config.part, config.seed)
        results = report | ({"raters": training.raters} if training.raters else {}) | {"seconds": run.elapsed}
        scale = getattr(records["test"][0], "scale", None)
        run.save(run.step, complete=True, results=results, normalise={"mode": normalise, "scale": scale})
        reward_report.print_report(report)
        run.print(f"{run.elapsed:.0f} s; model in {config.out}")


if __name__ == "__main__":
    cli.run_script(main)
