"""Stage 2: train a reward model on people's judgements, and measure it against them.

    python train_rm.py                                    # after train_sft.py: the built-in human ratings
    python train_rm.py --preset smoke                     # seconds, to see that it runs
    python train_rm.py --data choices.jsonl --loss pairwise --out runs/mine/rm
    python train_rm.py --part b --seed 2 --out runs/demo/judge      # a judge: shares no item with --part a

The model is the SFT model with a two-layer MLP head; by default all weights are trained.  Ratings are learnt
as regression on the mean score, as Bradley-Terry pairs with the raters' vote shares as soft targets, or both;
choices are learnt as pairs, thumbs by binary cross-entropy [D15].  Scores are then shifted so that the
reference policy's own samples average 0 (and scaled, where the data are no ratings, because their scale is
arbitrary) [D14].  The test split is read once, at the end, for the report: nothing is chosen on it.

Numbers in brackets are implementation details: docs/details.md names each one's source and test.
"""

from __future__ import annotations

import minirlhf.support.ctrl_c  # noqa: F401  (before torch: Ctrl-C during the slow imports prints one line)

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data, optim, preference
from minirlhf.feedback import raters
from minirlhf.measure import reward_report
from minirlhf.measure.scoring import Reference, score_items, score_sequences
from minirlhf.model import GPT, RewardEnsemble
from minirlhf.run import Run, RunConfig
from minirlhf.support import cli, judgements
from minirlhf.support.cli import Above0, AtLeast0, Count, CountOr0, Epsilon, Share, ShareBelow1, Temperature
from minirlhf.support.prepare import set_up
from minirlhf.support.ragged import send
from minirlhf.support.schedule import Schedule, ends_a_quarter


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: Literal["smoke", "demo", "pretrained", "smollm2", "minilm"] = "demo"
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
    """Share of the training texts read in lower case, drawn anew each epoch: rare spellings become common."""

    # Model
    init: Path | None = None
    """Checkpoint of the backbone: a language model, or an imported encoder.  Default: OUT/../sft."""
    pooling: Literal["last", "mean", "last+mean"] = "last+mean"
    """What the head reads: the last token's hidden state, the mean over the text, or both."""
    head: Literal["mlp", "linear"] = "mlp"
    """Two layers, or one, as transformers' classifiers have: with --pooling last it can be exported."""
    members: Annotated[int, cli.Range(1, 100)] = 1
    """Number of models that differ in their seeds: scores are means, disagreement is the spread."""
    bidirectional: CountOr0 = 0
    """Let this many last blocks read in both directions (Dukic and Snajder 2024): texts are read better.
    A prefix then has no score, so PPO's critic cannot start from such a model; nor can it be exported."""
    dropout: ShareBelow1 = 0.2
    """Dropout, in place of the SFT model's."""

    # Optimisation
    loss: Literal["auto", "regression", "pairwise", "both", "binary"] = "auto"
    """Loss.  auto: regression for ratings, pairwise for choices, binary cross-entropy for thumbs."""
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
    adam_eps: Epsilon = 1e-8
    """Adam's epsilon."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients are scaled down to this norm.  0: no clipping."""

    # Normalisation of scores on samples of the reference policy
    normalise: Literal["auto", "bias", "scale", "none"] = "auto"
    """Affine transform of the scores [D14].  auto: bias for ratings, scale for choices and thumbs."""
    reference: Path | None = None
    """Policy whose samples scores are normalised on.  Default: --init; OUT/../sft if that is an encoder."""
    normalise_samples: Annotated[int, cli.Range(2, 1_000_000)] = 256
    """Number of these samples."""
    prompt_tokens: Count = 4
    """Tokens of a text that become the prompt of a sample: as in train_ppo.py."""
    response_tokens: Count = 24
    """Longest sample in tokens: as in train_ppo.py."""
    temperature: Temperature = 1.0
    """Temperature of these samples: as in train_ppo.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch is not None and self.batch % self.microbatch:
            raise UserError(f"--batch {self.batch} is not divisible by --microbatch {self.microbatch}")
        if self.reference and self.normalise == "none":
            raise UserError("--reference is read for --normalise, which is none: drop one of them")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/rm"), data="toy", warmup=5, normalise_samples=32,
                    response_tokens=12),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/rm"), genres=("movies",), train_layers=14,
                      pooling="mean", bidirectional=14, dropout=0.1, lowercase=0.0, batch=32, lr=1e-4,
                      epochs=3),
    "minilm": Config(preset="minilm", out=Path("runs/minilm/rm"), init=Path("runs/minilm/base"),
                     genres=("movies",), pooling="mean", dropout=0.1, lowercase=0.0, batch=32, lr=1e-4,
                     embedding_lr=1.0, epochs=4, normalise="none"),
    "pretrained": Config(preset="pretrained", out=Path("runs/pretrained/rm"), lowercase=0.0, dropout=0.0,
                         epochs=1, microbatch=4, lr=1e-5, embedding_lr=1.0, response_tokens=128),
}  # fmt: skip


def make_model(config: Config, run: Run, backbone: GPT, first_score: float | None) -> RewardEnsemble:
    """The ensemble: members start from one backbone and differ in their heads and in their data's order."""
    shape = dataclasses.replace(backbone.config, dropout=config.dropout, n_bidirectional=config.bidirectional)
    model = RewardEnsemble(shape, config.pooling, config.members, config.head == "mlp")
    for k, member in enumerate(model.members):
        run.seed(0, k)
        member.reset_head()
        member.backbone.load_state_dict(backbone.state_dict())
        if first_score is not None:  # start at the average, so that only differences are left to learn
            member.out.bias.data.fill_(first_score)
    set_up(model.train(), config, run)
    return model


def schedule_of(config: Config, lengths: list[int]) -> Schedule:
    """Every optimiser step of the run, (pass, its items, whether it is the pass's last).

    One member is trained after the other.  Items are places in a list of texts with these lengths.
    """

    def batches(i: int) -> list[list[int]]:
        member, epoch = divmod(i, config.epochs)
        return data.batches(len(lengths), config.batch, config.seed, epoch, lengths, stream=member)

    return Schedule([len(lengths)] * (config.members * config.epochs), config.batch, batches)


def loss_of(
    run: Run, config: Config, kind: str, step: int, batch: list, rows: list[int], scores: Tensor
) -> Tensor:
    """Loss on the items `rows` of a batch; those of microbatches and ranks add up to the batch's [D17].

    scores: [b] of rated texts, or [2 b] of pairs, the first texts before the second ones.
    """
    loss = scores[:0].sum()  # 0; a rank without a row takes part in backward, too
    target = send(torch.tensor([judgements.target_of(batch[i]) for i in rows]), run.device)
    weight = len(rows) / len(batch)
    choices = isinstance(batch[0].record, data.Preference)
    if choices and rows:
        loss = preference.pairwise_loss(*scores.chunk(2), target) * weight
    elif kind == "binary" and rows:
        loss = preference.binary_loss(scores, target) * weight
    elif kind in ("regression", "both") and rows:
        loss = preference.regression_loss(scores, target) * weight
    if not choices and kind in ("pairwise", "both") and len(batch) > 1:
        loss = loss + judgements.rating_pairs_loss(run, config, step, batch, rows, scores)
    return loss


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    of_samples = ("--normalise-samples", "--prompt-tokens", "--response-tokens", "--temperature")
    cli.refuse_unread(of_samples, "with --normalise none", config.normalise == "none")
    run = Run("rm", config)

    # Setup: data, a trained model as backbone of each member, optimisers.
    remedy = "run train_sft.py first, or name one with --init, such as minirlhf.checkpoint import makes"
    init = checkpoint.resolve(config.init or config.out.parent / "sft", remedy)
    source = data.load(config.data, config.skip_bad, config.rating_scale, config.data_dir, config.fields)
    if not run.begin(source, init=init):
        return
    loss_kind, normalise = judgements.choose_loss(config, source)
    tokenizer, backbone = checkpoint.tokenizer_of(init), checkpoint.load_gpt(init)
    if config.bidirectional and not backbone.config.causal:
        raise UserError(f"{init} holds an encoder, which reads in both directions: drop --bidirectional")
    context = backbone.config.context
    judged = judgements.load_judgements(config, run, source, tokenizer, context)
    reference = None
    if normalise != "none":
        remedy = "name a language model with --reference, or use --normalise none"
        own = init if backbone.config.causal else config.out.parent / "sft"
        policy = checkpoint.resolve(config.reference or own, remedy)
        reference = Reference.load(policy, [item.record for item in judged.val], context, config)

    schedule = schedule_of(config, [len(item.ids) for item in judged.train])
    per_member = len(schedule) // config.members
    model = make_model(config, run, backbone, judgements.first_score(source.kind, judged.train))
    settings = (config.lr, config.weight_decay, config.betas, config.adam_eps, config.embedding_lr)
    optimizers = [optim.adamw([member], *settings) for member in model.members]
    run.about["head"] = {"pooling": config.pooling, "members": config.members, "mlp": config.head == "mlp"}
    run.resume(tokenizer, model, **{f"optimizer{k}": optimizer for k, optimizer in enumerate(optimizers)})
    run.print(f"{loss_kind} loss; {len(schedule)} steps; {run.where}")
    if judged.raters:
        run.print(raters.describe_weakest(judged.raters))

    # The loop: one optimiser step per iteration; validation four times per member.
    for step in run.loop(len(schedule)):
        _, picks, _ = schedule[step]
        k, step_of_member = divmod(step, per_member)
        optimizer = optimizers[k]
        lr = config.lr * optim.warmup_linear(step_of_member, per_member, config.warmup)
        optim.set_lr(optimizer, lr)

        # 1. Gradients.  Each microbatch's mean is weighted by its share of the batch, so that parts add up to
        #    the mean over microbatches and ranks [D17].
        in_lower_case = (run.same_on_all_ranks(torch.rand, step, len(picks)) < config.lowercase).tolist()
        batch = [
            (judged.train_lower if low else judged.train)[i]
            for i, low in zip(picks, in_lower_case, strict=True)
        ]
        total = torch.zeros((), device=run.device)
        for rows in run.machine.parts(range(len(batch)), config.microbatch) or [[]]:
            sequences = [batch[i].ids for i in rows]
            sequences += [batch[i].ids_b for i in rows if batch[i].ids_b is not None]
            tokens, mask = data.collate(sequences, tokenizer.pad)
            with run.autocast():
                scores = model.members[k](send(tokens, run.device), mask)
            loss = loss_of(run, config, loss_kind, step, batch, rows, scores)
            loss.backward()
            total += loss.detach()

        # 2. Step.
        norm = run.take_step(optimizer, config.max_grad_norm, "reward model")
        metrics = {"train/loss": run.sum_(total).item(), "train/grad_norm": norm, "lr": lr, "member": k}

        # 3. Validation, of the members trained so far.
        validate = ends_a_quarter(step_of_member, per_member)
        if validate:
            predictions = score_items(run, model.members[: k + 1], judged.val, tokenizer.pad)
            metrics |= reward_report.validation_measure(source.kind, predictions, judged.records["val"])
            measured = ", ".join(f"{n} {v:.3f}" for n, v in metrics.items() if n.startswith("val/"))
            run.print(f"step {step + 1}: {measured}")
        if step_of_member + 1 == per_member:
            optimizer.state.clear()  # this member is done: its moments need no memory
        run.log(step + 1, metrics, "loss {train/loss:.3f}")
        run.checkpoint(step + 1, due=validate)

    # The report on test texts, on the raters' own scale; then the shift and scale of PPO's scores [D14].
    predictions = score_items(run, model.members, judged.test, tokenizer.pad)
    run.seed(len(schedule) + 1)  # the same samples, resumed or not [D21]
    sequences = reference.samples(config, run, tokenizer) if reference else []
    for k, member in enumerate(model.members if reference else []):
        scores = score_sequences(run, [member], sequences, tokenizer.pad)
        gain, bias = preference.fit_affine(scores, normalise)
        member.gain.fill_(gain)
        member.bias.fill_(bias)
        run.print(f"member {k}: scores x {gain:.3f} {bias:+.3f}: samples of the reference average 0")
    report = {}
    if run.rank == 0:
        report = reward_report.reward_report(
            source.kind, predictions, judged.records, config.part, config.seed
        )
    results = report | ({"raters": judged.raters} if judged.raters else {}) | {"seconds": run.elapsed}
    scale = getattr(judged.test[0].record, "scale", None)
    run.save(run.step, complete=True, results=results, normalise={"mode": normalise, "scale": scale})
    if run.rank == 0:
        reward_report.print_report(report)
        run.print(f"{run.elapsed:.0f} s; model in {config.out}")


if __name__ == "__main__":
    cli.run_script(main)
