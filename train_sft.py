"""Stage 1: train a language model from scratch, or go on from a checkpoint, by supervised learning.

    python train_sft.py                                   # the movie reviews of the built-in dataset
    python train_sft.py --preset smoke                    # seconds, to see that it runs
    python train_sft.py --data dialogues.jsonl --init runs/demo/sft --out runs/mine/sft
    torchrun --nproc-per-node 8 train_sft.py --preset gpt2 --data texts/

Every text is one sequence: <|endoftext|> prompt completion <|endoftext|>.  A prompt is read but not learnt [D19]; plain text
is all completion.  Sequences are bucketed by length, not packed, so no text can look into another.  The checkpoint with the
best validation loss is the one that is kept.

Numbers in brackets are the README's register of implementation details.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from kernels import linear_token_logprobs, token_logprobs
from minirlhf import UserError, checkpoint, data, optim, run
from minirlhf.model import GPT, GPTConfig, run_blocks, train_last
from minirlhf.rollout import generate
from minirlhf.support import cli, hardware
from minirlhf.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["smoke", "demo", "gpt2", "smollm2"] = "demo"
    """Named settings; any option given beside it wins."""
    out: Path = Path("runs/demo/sft")
    """Where checkpoints and metrics go."""
    init: Path | None = None
    """Checkpoint to start from, tokenizer included.  None: random weights."""
    data: str = "vader"
    """vader (built in), toy, or a file or folder (.jsonl, .jsonl.gz, .txt)."""
    data_dir: Path | None = None
    """Cache folder of the built-in dataset."""
    genres: tuple[str, ...] = ("movies", "products", "editorials", "tweets")
    """Which sentences of a dataset with genres to train on, in the first epochs."""
    genre: str = "movies"
    """What to validate on, to train the tokenizer on, and to train on in the last --final-epochs."""
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

    # Model (GPT-2's shape, small)
    tokenizer: str = "train"
    """train: a BPE on the training texts; or gpt2, a folder, a .tiktoken file."""
    vocab: int = 8192
    """Tokens of the trained BPE, bytes and specials included."""
    context: int = 128
    """Longest sequence in tokens."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Attention heads."""
    n_embd: int = 192
    """Channels."""
    dropout: float = 0.2
    """On embeddings and on what enters the residual stream."""
    train_layers: int | None = None
    """Train only the last so many blocks and what follows them; None: everything.  The rest is kept in --precision, and has no
    dropout."""

    # Optimisation
    epochs: int = 6
    """Passes over the training texts."""
    final_epochs: int = 4
    """Of these, the last so many see --genre only.  More text first: many passes over little text overfit."""
    batch: int = 32
    """Texts an optimiser step, over all ranks."""
    microbatch: int | None = None
    """Texts a forward pass, a rank; smaller saves memory and changes nothing else [D17]."""
    lr: float = 1.2e-3
    """Highest learning rate."""
    warmup: int = 100
    """Steps of linear warm-up, before a cosine to 0."""
    weight_decay: float = 0.1
    """On matrices only."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Steps are small (about 900 tokens): .99 averages their squared gradients over enough of them."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    patience: int = 2
    """Stop after so many epochs without a better validation loss."""
    fused_head: Literal["auto", "on", "off"] = "auto"
    """Never hold the logits of a batch, at the price of computing them twice.  auto: where they would pass 128 MiB."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: a fraction of the memory, a third more time."""
    compile: bool = False
    """torch.compile the blocks; worth it in long runs."""
    samples: int = 5
    """Texts printed at the end."""

    def __post_init__(self):
        cli.check_positive(self, "epochs", "batch", "microbatch", "lr", "train_layers", "vocab", "context", "n_layer",
                                "n_head", "n_embd", "patience")  # fmt: skip
        if self.microbatch is not None and self.batch % self.microbatch:
            raise UserError(f"--batch {self.batch} does not divide by --microbatch {self.microbatch}")


PRESETS = {
    "demo": Config(),
    "smoke": Config(preset="smoke", out=Path("runs/smoke/sft"), data="toy", vocab=400, n_layer=2, n_head=2, n_embd=64,
                    epochs=2, warmup=5),
    "smollm2": Config(preset="smollm2", out=Path("runs/smollm2/sft"), init=Path("runs/smollm2/base"), genres=("movies",),
                      train_layers=14, dropout=0.0, epochs=1, final_epochs=1, lr=1e-4, warmup=20),
    "gpt2": Config(preset="gpt2", out=Path("runs/gpt2/sft"), tokenizer="gpt2", context=1024, n_layer=12, n_head=12,
                   n_embd=768, epochs=3, batch=64, microbatch=8, lr=3e-4),
}  # fmt: skip


def loss_sum(
    model: GPT, rows: list[tuple[list[int], list[bool]]], pad: int, device, fused_head: str
) -> torch.Tensor:
    """Sum of -log p over the trained tokens of rows [(ids, loss_mask)]."""
    tokens, mask = data.collate([ids for ids, _ in rows], pad)
    trained = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (_, loss_mask) in enumerate(rows):
        trained[i, : len(loss_mask)] = torch.tensor(loss_mask)
    tokens, mask, trained = tokens.to(device), mask.to(device), trained.to(device)[:, 1:]
    hidden = model(tokens[:, :-1], mask[:, 1:])[trained]  # [N, C]; what has no next token predicts nothing
    targets = tokens[:, 1:][trained]
    if optim.fuse_head(fused_head, len(hidden), model.config.vocab_size):
        logprobs, _ = linear_token_logprobs(hidden, model.head_weight, targets)
    else:
        logprobs, _ = token_logprobs(model.logits(hidden), targets)
    return -logprobs.sum()


@torch.no_grad()
def bits_per_byte(model: GPT, rows, n_bytes: int, pad: int, machine, config: Config) -> float:
    """Validation loss that no tokenizer can flatter: all trained tokens' -log2 p over the UTF-8 bytes they stand for."""
    model.eval()
    total = 0.0
    rows = sorted(rows, key=lambda row: len(row[0]))
    for i in range(0, len(rows), 64):
        with machine.autocast(hardware.pick_precision(config.precision)):
            total += loss_sum(model, rows[i : i + 64], pad, machine.device, config.fused_head).item()
    model.train()
    return total / math.log(2) / n_bytes


def main() -> None:
    config = cli.parse_config(PRESETS, __doc__)
    out = config.out
    todo = run.claim(out, config, config.resume, config.overwrite)
    if todo == "skip":
        print(f"{out} is complete: nothing to do (--overwrite to run it again)")
        return

    # Setup: data, tokenizer, model, optimiser.
    machine = hardware.setup_machine(config.seed)
    precision = hardware.pick_precision(config.precision)
    source = data.load(config.data, config.skip_bad, data_dir=config.data_dir)
    home = source.genres_among([config.genre])
    texts = {"train": source.select("train", source.genres_among(config.genres)).records}
    texts |= {"final": source.select("train", home).records, "val": source.select("val", home).records}
    if config.init:
        init = checkpoint.resolve(
            config.init, "name one with --init; real weights come by python -m minirlhf.checkpoint import"
        )
        tokenizer = Tokenizer.load(init)
        checkpoint.check_tokenizer(checkpoint.load_config(init), tokenizer)
        model = checkpoint.load_gpt(init, dropout=config.dropout)
    else:
        if todo == "resume":
            tokenizer = Tokenizer.load(out)
        elif config.tokenizer == "train":
            tokenizer = Tokenizer.train(["".join(data.as_example(r)) for r in texts["final"]], config.vocab)
        else:
            tokenizer = Tokenizer.load(config.tokenizer)
        model = GPT(
            GPTConfig(
                tokenizer.vocab_size,
                config.context,
                config.n_layer,
                config.n_head,
                config.n_embd,
                config.dropout,
            )
        )
    model.to(machine.device)
    train_last(model, config.train_layers, hardware.frozen_dtype(precision))
    run_blocks([model], config.gradient_checkpointing, config.compile)
    rows = {
        split: data.encode_all(tokenizer, records, model.config.context) for split, records in texts.items()
    }
    # Bytes of what is trained, not of the whole text: --context may have cut it.
    learnt = [
        [t for t, learn in zip(ids, mask, strict=True) if learn and t != tokenizer.eot]
        for ids, mask in rows["val"]
    ]
    n_bytes = sum(len(tokenizer.encoding.decode_bytes(ids)) for ids in learnt)
    optimizer = optim.adamw([model], config.lr, config.weight_decay, config.betas, config.adam_eps)
    schedule = []  # (epoch, rows of the batch, is it the epoch's last)
    for epoch in range(config.epochs):
        pool = rows["final" if epoch >= config.epochs - config.final_epochs else "train"]
        batches = data.batches(len(pool), config.batch, config.seed, epoch, [len(ids) for ids, _ in pool])
        schedule += [(epoch, [pool[i] for i in picks], picks is batches[-1]) for picks in batches]
    total = len(schedule)

    step, best, best_step, best_epoch, seconds = 0, math.inf, 0, 0, 0.0
    trainer_state = checkpoint.load_trainer(out) if todo == "resume" else None
    if trainer_state is not None:
        tensors, state = trainer_state
        model.load_state_dict(checkpoint.load_state(out))
        checkpoint.unpack_optimizer(optimizer, tensors, state["optimizer"], "optimizer.")
        step, best, best_step, best_epoch, seconds = (
            state[k] for k in ("step", "best", "best_step", "best_epoch", "seconds")
        )
        if best_step == step:  # killed after the save and before the link was moved
            checkpoint.point(out, "best", step)
    log = run.MetricLogger(out, machine, config.tensorboard, keep_until=step)
    if machine.rank == 0:
        print(source.describe())
        n_tokens = sum(len(ids) for _, batch, _ in schedule for ids, _ in batch)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {total} steps, {n_tokens:,} tokens; "
              f"{precision} on {machine.device}")  # fmt: skip

    def save(complete: bool, **results) -> None:
        tensors, state = checkpoint.pack_optimizer(optimizer, "optimizer.")
        if machine.rank == 0:
            checkpoint.save(
                out, step, model.state_dict(),
                run.describe("sft", model.config, config, step, complete, tokenizer,
                                  data={"name": source.name, "sha256": source.sha256}, **results),
                tokenizer,
                {"tensors": tensors, "state": {"optimizer": state, "step": step, "best": best, "best_step": best_step,
                                               "best_epoch": best_epoch, "seconds": seconds}},
            )  # fmt: skip

    # The loop: one optimiser step an iteration; validation at the end of each epoch.
    bar = tqdm(schedule[step:], initial=step, total=total, disable=machine.rank > 0)
    model.train()
    with run.Interrupt() as interrupt:
        for epoch, batch, last_of_epoch in bar:
            if epoch - best_epoch > config.patience:  # asked here, so that a resumed run stops as well
                break
            start = time.perf_counter()
            hardware.seed_everything(config.seed, step, machine.rank)  # dropout [D21]
            factor = optim.warmup_cosine(step, total, config.warmup)
            optim.set_lr(optimizer, config.lr * factor)

            # 1. Gradients: the mean over the trained tokens of the whole batch, over microbatches and ranks [D17].
            mine = batch[machine.rank :: machine.world]
            count = float(sum(sum(loss_mask[1:]) for _, loss_mask in batch))
            loss = torch.zeros((), device=machine.device)
            size = config.microbatch or config.batch
            for i in range(0, len(mine), size):
                with machine.autocast(precision):
                    nll = loss_sum(
                        model, mine[i : i + size], tokenizer.pad, machine.device, config.fused_head
                    )
                (nll / count).backward()
                loss += nll.detach() / count

            # 2. Step.
            norm = optim.take_step(machine, optimizer, config.max_grad_norm)
            step += 1
            hardware.trim_freed_memory(step)
            machine.sum_([loss])
            metrics = {"train/loss": loss.item(), "train/grad_norm": norm.item(), "lr": config.lr * factor, "epoch": epoch + 1,
                       "train/tokens": count}  # fmt: skip

            # 3. Validation; the best checkpoint is kept.
            if last_of_epoch:
                bpb = bits_per_byte(model, rows["val"], n_bytes, tokenizer.pad, machine, config)
                metrics["val/bits_per_byte"] = bpb
                if bpb < best:
                    best, best_step, best_epoch = bpb, step, epoch
                tqdm.write(
                    f"epoch {epoch + 1}: validation {bpb:.4f} bits per byte" + " (best)" * (best_step == step)
                )
            seconds += time.perf_counter() - start
            log.log(step, metrics | {"time/seconds": seconds})
            seen = f" val {best:.3f} bits/byte" if best < math.inf else ""
            bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}" + seen)
            stop = interrupt.agreed(machine)
            if last_of_epoch or stop:
                save(complete=False)
                if best_step == step and machine.rank == 0:
                    checkpoint.point(out, "best", step)
            if stop:
                raise UserError(
                    f"stopped at step {step} of {total}; the same command with --resume goes on from {out}"
                )

    # The best checkpoint becomes the stage's result.
    if machine.rank == 0:
        model.load_state_dict(checkpoint.load_state(out / "best"))
        save(complete=True, results={"val_bits_per_byte": best, "best_step": best_step, "seconds": seconds})
        print(
            f"best validation {best:.4f} bits per byte after {best_step} steps; {seconds:.0f} s; model in {out}"
        )
        model.eval()
        start = torch.full((config.samples, 1), tokenizer.bos, device=machine.device)
        real, length = torch.ones_like(start, dtype=torch.bool), min(48, model.config.context - 1)
        with machine.autocast(precision):
            responses, mask = generate(model, start, real, length, 0.8, tokenizer.eot, tokenizer.pad)
        for row, keep in zip(responses, mask, strict=True):
            print(f"  {tokenizer.decode(row[keep].tolist())}")


if __name__ == "__main__":
    cli.run_script(main)
