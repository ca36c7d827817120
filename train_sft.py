"""Stage 1: train a language model from scratch, or continue from a checkpoint, by supervised learning.

    python train_sft.py                                   # the movie reviews of the built-in dataset
    python train_sft.py --preset smoke                    # seconds, to see that it runs
    python train_sft.py --data dialogues.jsonl --init runs/demo/sft --out runs/mine/sft
    torchrun --nproc-per-node 8 train_sft.py --preset pretrained --init runs/big/base --data texts/

Every text is one sequence: <|endoftext|> prompt completion <|endoftext|>.  The prompt is read but not learnt
[D19]; plain text is all completion.  Sequences of like length share a batch and are not packed, so no text
can look into another.  The checkpoint with the best validation loss is the stage's result.

Numbers in brackets are implementation details: docs/details.md names each one's source and test.
"""

from __future__ import annotations

import minirlhf.support.ctrl_c  # noqa: F401  (before torch: Ctrl-C during the slow imports prints one line)

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from kernels import linear_token_logprobs, token_logprobs
from minirlhf import UserError, checkpoint, data, optim
from minirlhf.model import GPT, GPTConfig
from minirlhf.rollout import Sampling, generate
from minirlhf.run import Run, RunConfig
from minirlhf.support import cli, shard
from minirlhf.support.cli import Above0, AtLeast0, Count, CountOr0, Epsilon, ShareBelow1
from minirlhf.support.layout import first_prompts, set_layout
from minirlhf.support.prepare import set_up
from minirlhf.support.ragged import send
from minirlhf.support.schedule import Schedule
from minirlhf.tokenizer import Tokenizer

Example = tuple[list[int], list[bool]]  # token ids, and which of them are learnt


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: Literal["smoke", "demo", "pretrained", "smollm2"] = "demo"
    """Named settings.  Any option given beside it wins."""
    out: Path = Path("runs/demo/sft")
    """Folder for checkpoints and metrics."""

    # Data
    init: Path | None = None
    """Checkpoint to start from, tokenizer included.  Default: random weights."""
    genres: tuple[str, ...] = ("movies", "products", "editorials", "tweets")
    """Which sentences of a dataset with genres to train on in the first epochs."""
    genre: str = "movies"
    """Genre to validate on, to train the tokenizer on, and to train on in the last --final-epochs."""
    layout: Literal["auto", "template", "transcript"] = "auto"
    """How conversations become tokens: by the model's chat template, or as HH-RLHF's transcripts.  auto: as
    --init records, so by the template of an imported model that has one.  Every later stage obeys it."""
    learn: Literal["auto", "all", "last"] = "auto"
    """Which of the assistant's turns in `messages` to learn.  auto: all in a template, else the last one."""

    # Model (GPT-2's shape, small), where there is no --init
    tokenizer: str = "train"
    """Tokenizer: train (a BPE on the training texts), gpt2, a folder, or a .tiktoken file."""
    vocab: Annotated[int, cli.Range(258, 1_000_000)] = 8192
    """Tokens of the trained BPE; 256 bytes and 2 special tokens are among them."""
    context: Annotated[int, cli.Range(2, 1_000_000)] = 128
    """Longest sequence in tokens."""
    n_layer: Annotated[int, cli.Range(1, 1000)] = 4
    """Number of blocks."""
    n_head: Annotated[int, cli.Range(1, 1000)] = 4
    """Number of attention heads."""
    n_embd: Annotated[int, cli.Range(1, 100_000)] = 192
    """Number of channels."""
    dropout: ShareBelow1 = 0.2
    """Dropout on embeddings and on what enters the residual stream."""

    # Optimisation
    epochs: Annotated[int, cli.Range(1, 100_000)] = 6
    """Passes over the training texts."""
    final_epochs: CountOr0 = 4
    """Number of last epochs that see --genre only.  More text comes first: little text soon overfits."""
    batch: Count = 32
    """Texts per optimiser step, over all ranks."""
    microbatch: Count | None = None
    """Most texts per forward pass on each rank.  Smaller values save memory; gradients are the same [D17]."""
    lr: Above0 = 1.2e-3
    """Highest learning rate."""
    warmup: CountOr0 = 100
    """Steps of linear warm-up before a cosine to 0."""
    weight_decay: AtLeast0 = 0.1
    """Weight decay of matrices; vectors have none."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.99)
    """Adam's betas.  Steps are small (about 900 tokens): 0.99 averages over enough of them."""
    adam_eps: Epsilon = 1e-8
    """Adam's epsilon."""
    max_grad_norm: AtLeast0 = 1.0
    """Gradients are scaled down to this norm.  0: no clipping."""
    patience: Count = 2
    """Stop after this many epochs without a better validation loss."""
    fused_head: Literal["auto", "on", "off"] = "auto"
    """Compute logits in tiles, and again in backward, instead of holding them all.  auto: above 128 MiB."""
    samples: Annotated[int, cli.Range(0, 1000)] = 5
    """Number of texts to sample and print at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch is not None and self.batch % self.microbatch:
            raise UserError(f"--batch {self.batch} is not divisible by --microbatch {self.microbatch}")
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd {self.n_embd} is not divisible by --n-head {self.n_head}")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/sft"), data="toy", vocab=400, n_layer=2, n_head=2,
                    n_embd=64, epochs=2, warmup=5),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/sft"), init=Path("runs/smollm2/base"),
                      genres=("movies",), train_layers=14, dropout=0.0, epochs=1, final_epochs=1, lr=1e-4,
                      warmup=20),
    "pretrained": Config(preset="pretrained", out=Path("runs/pretrained/sft"), dropout=0.0, epochs=2,
                         final_epochs=0, microbatch=4, lr=2e-5, warmup=20, weight_decay=0.0),
}  # fmt: skip
OF_A_NEW_MODEL = ("--tokenizer", "--vocab", "--context", "--n-layer", "--n-head", "--n-embd")


def load_model(config: Config, run: Run, init: Path | None, records: list) -> tuple[GPT, Tokenizer]:
    """The model to train, on the run's device, and its tokenizer: those of `init`, or new ones."""
    if init:
        tokenizer = checkpoint.writer(init)[2]
        model = checkpoint.load_gpt(init, dropout=config.dropout)
    else:
        if run.state == "resume":
            tokenizer = Tokenizer.load(run.out)
        elif config.tokenizer == "train":
            texts = ["".join(data.as_example(record)) for record in records]
            tokenizer = Tokenizer.train(texts, config.vocab)
        else:
            tokenizer = Tokenizer.load(config.tokenizer)
        shape = (config.context, config.n_layer, config.n_head, config.n_embd, config.dropout)
        model = GPT(GPTConfig(tokenizer.vocab_size, *shape))
    set_layout(tokenizer, config.layout)
    set_up(model, config, run)
    return model, tokenizer


def schedule_of(config: Config, examples: dict[str, list[Example]]) -> tuple[Schedule, int]:
    """Every optimiser step of the run, (epoch, its texts, whether it is the epoch's last), and all tokens."""
    first_final = config.epochs - config.final_epochs
    names = ["final" if epoch >= first_final else "train" for epoch in range(config.epochs)]
    tokens = {name: sum(len(ids) for ids, _ in pool) for name, pool in examples.items()}

    def batches(epoch: int) -> list[list[Example]]:
        pool = examples[names[epoch]]
        lengths = [len(ids) for ids, _ in pool]
        order = data.batches(len(pool), config.batch, config.seed, epoch, lengths)
        return [[pool[i] for i in picks] for picks in order]

    schedule = Schedule([len(examples[name]) for name in names], config.batch, batches)
    return schedule, sum(tokens[name] for name in names)


def loss_sum(model: GPT, examples: list[Example], pad: int, fused_head: str) -> Tensor:
    """Sum of -log p over the learnt tokens of the examples."""
    device = model.wte.weight.device
    tokens, mask = data.collate([ids for ids, _ in examples], pad)  # [B, T]
    learnt, _ = data.collate([loss_mask for _, loss_mask in examples], 0)
    where = send(learnt[:, 1:].flatten().nonzero().squeeze(1), device)  # [N]
    tokens = send(tokens, device)
    hidden = model(tokens[:, :-1], mask[:, 1:]).flatten(0, 1)[where]  # [N, C]; no text's last token is read
    targets = tokens[:, 1:].flatten()[where]
    if optim.fuse_head(fused_head, len(hidden), model.config.vocab_size):
        logprobs, _ = linear_token_logprobs(hidden, model.head_weight, targets)
    else:
        logprobs, _ = token_logprobs(model.logits(hidden), targets)
    return -logprobs.sum()


@torch.no_grad()
def bits_per_byte(
    model: GPT, examples: list[Example], tokenizer: Tokenizer, run: Run, fused_head: str
) -> float:
    """Validation loss that no tokenizer can flatter: -log2 p of what is learnt, per UTF-8 byte of its text.

    The text is what is learnt of the examples, which the context may have cut.  Each rank takes a share.
    """
    n_bytes = 0
    for ids, loss_mask in examples:
        learnt = [t for t, learn in zip(ids, loss_mask, strict=True) if learn and t not in tokenizer.ends]
        n_bytes += len(tokenizer.encoding.decode_bytes(learnt))
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    ordered = sorted(examples, key=lambda example: len(example[0]))
    for part in run.machine.parts(ordered, 64):
        with run.autocast():
            total += loss_sum(model, part, tokenizer.pad, fused_head)
    model.train()
    run.sum_(total)
    run.require_finite(validation_loss=total)
    return total.item() / math.log(2) / n_bytes


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    cli.refuse_unread(OF_A_NEW_MODEL, "with --init, which brings its own", config.init is not None)
    cli.refuse_unread(["--vocab"], "with --tokenizer, which brings its own", config.tokenizer != "train")
    run = Run("sft", config)

    # Setup: data, tokenizer, model, optimiser.
    source = data.load(config.data, config.skip_bad, config.rating_scale, config.data_dir, config.fields)
    remedy = "name one with --init; real weights come by python -m minirlhf.checkpoint import"
    init = checkpoint.resolve(config.init, remedy) if config.init else None
    if not run.begin(source, init=init):
        return
    home = source.genres_among([config.genre])
    splits = {"train": source.select("train", source.genres_among(config.genres))}
    splits |= {"final": source.select("train", home), "val": source.select("val", home)}
    model, tokenizer = load_model(config, run, init, splits["final"].records)
    examples = {}
    for name, part in splits.items():
        options = (model.config.context, config.too_long, part.ledger, config.learn)
        examples[name] = data.encode_examples(tokenizer, part.records, *options)
        run.account(name, part.ledger)
    schedule, n_tokens = schedule_of(config, examples)
    optimizer = optim.adamw([model], config.lr, config.weight_decay, config.betas, config.adam_eps)
    counters = {"best": math.inf, "best_step": 0, "best_epoch": 0}
    state = run.resume(tokenizer, model, counters, optimizer=optimizer)  # [D21]
    n_parameters = sum(p.numel() for p in model.parameters())
    run.print(f"{n_parameters:,} parameters; {len(schedule)} steps, {n_tokens:,} tokens; {run.where}")

    # The loop: one optimiser step per iteration; validation at the end of each epoch.
    model.train()
    for step in run.loop(len(schedule)):
        epoch, batch, last_of_epoch = schedule[step]
        if epoch - state["best_epoch"] > config.patience:  # asked here, so that a resumed run stops as well
            break
        lr = config.lr * optim.warmup_cosine(step, len(schedule), config.warmup)
        optim.set_lr(optimizer, lr)

        # 1. Gradients: the mean over the learnt tokens of the whole batch, over microbatches and ranks [D17].
        count = float(sum(sum(loss_mask[1:]) for _, loss_mask in batch))
        loss = torch.zeros((), device=run.device)
        for part in run.machine.parts(batch, config.microbatch):
            with run.autocast():
                nll = loss_sum(model, part, tokenizer.pad, config.fused_head)
            (nll / count).backward()
            loss += nll.detach() / count

        # 2. Step.
        norm = run.take_step(optimizer, config.max_grad_norm, "model")
        metrics = {"train/loss": run.sum_(loss).item(), "train/grad_norm": norm, "lr": lr}
        metrics |= {"epoch": epoch + 1, "train/tokens": count}

        # 3. Validation; the best checkpoint stays.
        if last_of_epoch:
            bpb = bits_per_byte(model, examples["val"], tokenizer, run, config.fused_head)
            metrics["val/bits_per_byte"] = bpb
            if bpb < state["best"]:
                state |= {"best": bpb, "best_step": step + 1, "best_epoch": epoch}
            best = " (best)" if state["best_step"] == step + 1 else ""
            run.print(f"epoch {epoch + 1}: validation {bpb:.4f} bits per byte{best}")
        run.log(step + 1, metrics, "loss {train/loss:.3f}")
        run.checkpoint(step + 1, due=last_of_epoch, best=state["best_step"] == step + 1)

    # The best checkpoint becomes the stage's result.
    if run.rank == 0 or config.shard:
        shard.load(model, checkpoint.load_state(config.out / "best"))
    results = {"val_bits_per_byte": state["best"], "best_step": state["best_step"], "seconds": run.elapsed}
    run.save(run.step, complete=True, results=results)
    run.print(f"best validation {state['best']:.4f} bits per byte, after {state['best_step']} steps")
    run.print(f"{run.elapsed:.0f} s; model in {config.out}")
    if config.samples:
        sampling = Sampling(min(48, model.config.context - 1), 0.8, tokenizer.ends, tokenizer.pad)
        room = model.config.context - sampling.max_new
        prompts = first_prompts(tokenizer, splits["val"].records, config.samples, room)
        with run.autocast(whole=model):
            texts = generate(model.eval(), *data.collate(prompts, tokenizer.pad, "left"), sampling)
        run.print("\n".join(f"  {text}" for text in texts.decode(tokenizer)[1]))


if __name__ == "__main__":
    cli.run_script(main)
