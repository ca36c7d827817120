"""What PPO on a checkpoint needs, before it starts: parameters, bytes and operations.

    python -m minirlhf.estimate runs/demo/sft --reward-model runs/demo/rm
    python -m minirlhf.estimate runs/smollm2/base --train-layers 14 --batch 64 --microbatch 8
    python -m minirlhf.estimate runs/smollm2/base --lora 16
    python -m minirlhf.estimate runs/big/sft --batch 512 --ranks 8 --shard

Nothing is trained.  The bytes that autograd keeps are not a formula here: trial forwards of a few rows tell
what a row costs, for every architecture and option.  Operations are counted as they must be done: two for a
multiply-add of a matrix product, once, whatever is computed a second time to save memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from minirlhf import UserError, checkpoint, optim
from minirlhf.algorithms import ALGORITHMS
from minirlhf.model import GPT, GPTConfig, ValueModel, critic_from, zero_critic
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling, Texts, response_logprobs, response_values
from minirlhf.support import cli, hardware, shard
from minirlhf.support.cli import Count, number
from minirlhf.support.prepare import prepare

MOST_ROWS = 2**14  # of a product whose rate is measured: more do not make it faster


def parameters(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of all models, shared ones once."""
    return list({id(p): p for model in models for p in model.parameters()}.values())


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def trained_bytes(tensors: Iterable[nn.Parameter]) -> int:
    """Bytes of what is trained.  Its gradients take as many, and Adam's moments twice as many."""
    return stored_bytes(p for p in tensors if p.requires_grad)


def cache_bytes(config: GPTConfig, batch: int, length: int, width: int = 4) -> int:
    """Bytes of the keys and values of `length` tokens per row, with `width` bytes per number."""
    return 2 * width * config.n_layer * config.kv_heads * config.head_dim * batch * length


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of forward(), besides the `known` tensors (the weights)."""
    known, seen, held = {t.untyped_storage()._cdata for t in known}, {}, []

    def keep(t: Tensor) -> Tensor:
        held.append(t)  # or its memory could be taken by the next
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(size for place, size in seen.items() if place not in known)


def activation_bytes(forward: Callable[[int], object], rows: int, known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for forward(rows), from trials with 2 rows and 4 (1 alone copies less)."""
    known = list(known)
    two, four = (saved_bytes(lambda n=n: forward(n), known) for n in (2, 4))
    return two + (rows - 2) * (four - two) // 2


def resident_bytes() -> int:
    """Memory of this process now, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def forward_operations(gpt: GPT, lengths: Tensor, wanted: float, head: bool) -> tuple[float, float, float]:
    """Operations of a forward pass over texts of these lengths: (a block, the last block, the head).

    The last block and the language-model head are needed at `wanted` places only.  A matrix takes two
    operations per weight and token; attention takes four per channel of all heads and pair of tokens.
    """
    lengths, block = lengths.double(), gpt.blocks[-1]
    back = sum(b.causal for b in gpt.blocks) / len(gpt.blocks)
    joined = back * lengths * (lengths + 1) / 2 + (1 - back) * lengths**2
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    width = gpt.config.n_head * gpt.config.head_dim
    whole = float(2 * matrices * lengths.sum() + 4 * width * joined.sum())
    spared = float(2 * (matrices - block.qkv.weight.numel()) * (lengths.sum() - wanted))
    return whole, whole - spared, 2 * gpt.head_weight.numel() * wanted * head


def training_operations(gpt: GPT, lengths: Tensor, wanted: float, head: bool) -> float:
    """Operations of forward and backward: backward takes twice the forward of what is trained.

    Beside adapters it takes the forward once more: gradients pass through the weights, which have none."""
    block, last, logits = forward_operations(gpt, lengths, wanted, head)
    if gpt.config.lora_rank:
        passed = gpt.config.lora_layers or len(gpt.blocks)
        return (len(gpt.blocks) + passed - 2) * block + 2 * (last + logits)
    trained = sum(b.qkv.weight.requires_grad for b in gpt.blocks)
    blocks = (len(gpt.blocks) - 1 + 2 * max(0, trained - 1)) * block + (1 + 2 * (trained > 0)) * last
    return blocks + (2 + gpt.head_weight.requires_grad) * logits


def update_operations(policy: GPT, critic: ValueModel | None, lengths: Tensor, predicted: float) -> float:
    """Operations of an epoch over texts of these lengths, with `predicted` response tokens; critic None: GRPO
    and its like."""
    of_critic = training_operations(critic.backbone, lengths, predicted, False) if critic else 0
    return training_operations(policy, lengths, predicted, True) + of_critic


def gemm_rate(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.2
) -> float:
    """Operations per second of [rows, columns] @ [columns, 4 columns], the largest product of a block.

    It is the machine's limit for this work, so the fastest of many within some tenths of a second counts.
    """
    a = torch.randn(rows, columns, device=device, dtype=dtype)
    b = torch.randn(4 * columns, columns, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found, until = [], time.perf_counter() + seconds
    while len(found) < 4 or time.perf_counter() < until:
        start = time.perf_counter()
        a @ b.T
        wait()
        found.append(time.perf_counter() - start)
    return 8 * rows * columns**2 / min(found)


def size(n: float, unit: str) -> str:
    """1234567, "B" -> 1.2 MB"""
    for prefix in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.{int(prefix > '')}f} {prefix}{unit}"
        n /= 1000
    return f"{n:.1f} T{unit}"


def needs(
    models: dict[str, nn.Module],
    prompt: int,
    response: int,
    rows: int,
    batch: int,
    fused: bool,
    pieces: dict[str, int] | None = None,
) -> dict[str, int]:
    """{what: bytes} that PPO holds, and its peak, for the models as they are to be trained.

    models            policy, critic if there is one, and those that are only read
    prompt, response  their longest lengths, in tokens
    rows              texts per microbatch
    batch             texts per rollout, on this rank
    fused             whether the logits are never held
    pieces            what shard.needs says, where this is one rank of several that share the models
    """
    policy, critic, weights = models["policy"], models.get("critic"), parameters(models.values())
    device = policy.wte.weight.device
    sampling = Sampling(response, temperature=1.0, eos=0, pad=0, fused_head=fused)

    def texts(n: int) -> Texts:
        halves = [torch.zeros(n, width, dtype=torch.long, device=device) for width in (prompt, response)]
        return Texts(halves[0], halves[0] == 0, halves[1], halves[1] == 0)

    # The policy steps, then the critic: only one model's gradients and activations are in memory at a time.
    of_policy = activation_bytes(lambda n: response_logprobs(policy, texts(n), sampling), rows, weights)
    of_critic = critic and activation_bytes(lambda n: response_values(critic, texts(n)), rows, weights)
    logits = 0 if fused else 4 * rows * response * policy.config.vocab_size  # their gradient
    found = {
        "weights": stored_bytes(weights),
        "Adam's moments": 2 * trained_bytes(weights),
        "gradients": max(trained_bytes(model.parameters()) for model in (policy, critic) if model),
        "a microbatch": max(of_policy, of_critic or 0) + logits,
        "keys and values of a rollout": cache_bytes(policy.config, batch, prompt + response),
    }
    before = resident_bytes() if device.type == "cpu" and not pieces else (pieces or found)["weights"]
    found |= pieces or {}
    rollout = found["keys and values of a rollout"] + (pieces or {}).get(shard.WHOLE, 0)
    most = max(found["gradients"] + found["a microbatch"], rollout)
    return found | {"peak, about": before + found["Adam's moments"] + most}


def load_models(args: argparse.Namespace, precision: str) -> dict[str, nn.Module]:
    """The models of PPO, prepared as train_ppo.py prepares them."""
    folder, _, tokenizer = checkpoint.writer(args.checkpoint)
    policy, frozen = checkpoint.load_gpt(folder), {"reference": checkpoint.load_gpt(folder)}
    critic = zero_critic(policy)
    if args.reward_model is not None:
        reader = RewardReader.load(args.reward_model, "train one with train_rm.py")
        frozen["reward model"] = reader.model
        if reader.members and reader.reads_prefixes(tokenizer):
            critic = critic_from(reader.members[0])
    if args.monitor is not None:
        frozen["judge"] = RewardReader.load(args.monitor, "train one with train_rm.py").model
    models = {"policy": policy, "critic": critic} | frozen
    if ALGORITHMS[args.algorithm].baseline != "critic":
        del models["critic"]
    dtype = hardware.frozen_dtype(precision)
    run = argparse.Namespace(device=hardware.setup_machine().device, frozen_dtype=dtype)
    trained = [model for name, model in models.items() if name not in frozen]
    unsplit = argparse.Namespace(
        **vars(args) | {"shard": False}
    )  # so that this process can count all of them
    prepare(unsplit, run, trained, [*frozen.values()])
    return models


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m minirlhf.estimate", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="SFT checkpoint that PPO starts from.")
    add(
        "--algorithm",
        choices=ALGORITHMS,
        default="ppo",
        help="As in train_ppo.py (%(default)s); all but ppo have no critic.",
    )
    add("--reward-model", type=Path, metavar="CKPT", help="Reward model, from which the critic starts, too.")
    add("--monitor", type=Path, metavar="CKPT", help="Second reward model whose scores are only logged.")
    add("--batch", type=number(Count), default=128, help="Responses per rollout (%(default)s).")
    add("--minibatch", type=number(Count), default=32, help="Responses per optimiser step (%(default)s).")
    add("--microbatch", type=number(Count), help="Responses per forward pass.  Default: --minibatch.")
    add("--prompt-tokens", type=number(Count), default=4, help="Longest prompt, in tokens (%(default)s).")
    add(
        "--response-tokens", type=number(Count), default=24, help="Longest response, in tokens (%(default)s)."
    )
    add(
        "--train-layers", type=number(Count), metavar="N", help="Train only the last N blocks.  Default: all."
    )
    add("--lora", type=number(Count), metavar="R", help="Train adapters of this rank, not the weights.")
    add("--lora-alpha", type=number(cli.Above0), default=32.0, help="As in train_ppo.py (%(default)s).")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="Precision of matrix products (%(default)s).",
    )
    add("--gradient-checkpointing", action="store_true", help="Keep only each block's input for backward.")
    add("--ranks", type=number(Count), default=1, help="Processes that share the batch (%(default)s).")
    add("--shard", action="store_true", help="The processes share the models as well, as with --shard.")
    parser.set_defaults(compile=False)
    args = parser.parse_args(argv)
    for name in ("batch", "minibatch"):
        whole = getattr(args, name)
        setattr(args, name, optim.exact_div(whole, args.ranks, f"--{name} over --ranks {args.ranks}"))
    args.microbatch = min(args.microbatch or args.minibatch, args.minibatch)
    for big, small in ("batch", "minibatch"), ("minibatch", "microbatch"):
        if getattr(args, big) % getattr(args, small):
            raise UserError(
                f"--{big} {getattr(args, big)} is not divisible by --{small} {getattr(args, small)}"
            )
    return args


def main() -> None:
    args = parse()
    precision = hardware.pick_precision(args.precision)
    models = load_models(args, precision)
    policy, critic = models["policy"], models.get("critic")
    prompt = 1 + args.prompt_tokens  # the beginning-of-text token
    length = prompt + args.response_tokens
    for name, model in models.items():
        context = next(m for m in model.modules() if isinstance(m, GPT)).config.context
        if length > context:
            raise UserError(
                f"prompt and response of {length} tokens exceed the {name}'s context of {context}"
            )
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(n for n, is_trained in counts if is_trained)
        print(f"{name:14s}{sum(n for n, _ in counts):>15,} parameters, {trained:,} trained")

    device = policy.wte.weight.device
    fused = optim.fuse_head("auto", args.microbatch * args.response_tokens, policy.config.vocab_size)
    trained = [models[name] for name in ("policy", "critic") if name in models]
    frozen = [model for model in models.values() if model not in trained]
    pieces = shard.needs(trained, frozen, args.ranks, precision == "bf16") if args.shard else None
    with hardware.Machine(device).autocast(precision):
        found = needs(models, prompt, args.response_tokens, args.microbatch, args.batch, fused, pieces)
    if args.ranks > 1:
        print(f"{'processes; each of them holds':30s}{args.ranks:>10,}")
    for name, n in found.items():
        print(f"{name:30s}{size(n, 'B'):>10s}")

    predicted = args.batch * args.response_tokens
    work = args.batch * update_operations(policy, critic, torch.tensor([length - 1]), args.response_tokens)
    dtype = hardware.frozen_dtype(precision)
    rate = gemm_rate(min(args.microbatch * length, MOST_ROWS), policy.config.n_embd, dtype, device)
    print(f"a rollout: up to {args.batch * length:,} tokens, {predicted:,} of them in responses")
    print(
        f"an epoch over it: {args.batch // args.minibatch} optimiser steps, {size(work, 'FLOP')}, at least "
        f"{work / rate:.2g} s at the {size(rate, 'FLOP/s')} of this machine's matrix products in {precision}"
    )


if __name__ == "__main__":
    cli.run_script(main)
