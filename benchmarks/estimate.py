"""Memory per GPU and seconds per PPO iteration that larger models would need, on 1 to 64 GPUs: computed, not measured.

    python benchmarks/estimate.py                                  # 124M, 1.5B and 7B on H100s
    python benchmarks/estimate.py --one-gpu                        # 0.5B to 8B, what fits 24 GB and 80 GB, with LoRA or not
    python benchmarks/estimate.py --shard --batch 4096 --minibatch 1024   # 1.5B to 70B on 8 to 1,024 GPUs, with --shard
    python benchmarks/estimate.py --gpu-gb 141 --gpu-tb-s 4.8      # the same on H200s
    python benchmarks/estimate.py --batch 1024 --prompt 512 --response 256

Parameters and bytes are counted on the models themselves, made without memory (the meta device), and activations on one
block of each.  `python -m minirlhf.estimate CKPT` prints the same for a checkpoint.  torchrun replicates the models: more
GPUs share the batch, not the weights; with --shard they share the weights.

Assumed: bf16 products run at --share of the GPU's peak in scoring and update; a decoding step reads all weights and the cache
once, at --share of the memory's bandwidth; gradients are summed once per optimiser step in fp32, at --link-gb-s per GPU, with
nothing to overlap.  None of this has run on a GPU: take the seconds as orders of magnitude.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.demo import table  # noqa: E402
from minirlhf.model import GPT, GPTConfig, ValueModel  # noqa: E402
from minirlhf.support import cli, shard  # noqa: E402
from minirlhf.support.prepare import gpts_in, store, store_blocks, train_last  # noqa: E402
from minirlhf.tools import estimate  # noqa: E402

LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False, "tied": False}
SHAPES = {
    "124M (GPT-2)": GPTConfig(50257, 1024, 12, 12, 768),
    "1.5B (GPT-2 XL)": GPTConfig(50257, 1024, 48, 25, 1600),
    "7B (Llama 2)": GPTConfig(32000, 4096, 32, 32, 4096, n_inner=11008, **LLAMA),
}
QWEN = LLAMA | {"qkv_bias": True, "tied": True}
PEOPLES = {  # what people tune on one GPU
    "0.5B (Qwen2.5)": GPTConfig(151936, 32768, 24, 14, 896, n_kv_head=2, n_inner=4864, **QWEN),
    "1B (Llama 3.2)": GPTConfig(
        128256, 131072, 16, 32, 2048, n_kv_head=8, n_inner=8192, **LLAMA | {"tied": True}
    ),
    "3B (Llama 3.2)": GPTConfig(
        128256, 131072, 28, 24, 3072, n_kv_head=8, n_inner=8192, **LLAMA | {"tied": True}
    ),
    "8B (Llama 3.1)": GPTConfig(128256, 131072, 32, 32, 4096, n_kv_head=8, n_inner=14336, **LLAMA),
}
LARGE = {  # with --shard
    "1.5B (Qwen2.5)": GPTConfig(151936, 32768, 28, 12, 1536, n_kv_head=2, n_inner=8960, **QWEN),
    "8B (Llama 3.1)": PEOPLES["8B (Llama 3.1)"],
    "32B (Qwen2.5)": GPTConfig(
        152064, 32768, 64, 40, 5120, n_kv_head=8, n_inner=27648, **QWEN | {"tied": False}
    ),
    "70B (Llama 3.1)": GPTConfig(128256, 131072, 80, 64, 8192, n_kv_head=8, n_inner=28672, **LLAMA),
}
VARIANTS = {  # gradient checkpointing, share of the layers that is trained, rank of adapters
    "all layers": (False, None, 0),
    "all layers, checkpointing": (True, None, 0),
    "a quarter of the layers, checkpointing": (True, 0.25, 0),
    "LoRA 16": (False, None, 16),
    "LoRA 16, checkpointing": (True, None, 16),
}
WIDTH = 2  # bytes of bf16


@functools.cache
def block_bytes(shape: GPTConfig, again: bool) -> float:
    """Bytes per token that autograd keeps in a block in bf16, measured in fp32 on a model of one block."""
    model, tokens = GPT(dataclasses.replace(shape, n_layer=1, vocab_size=8, lora_rank=0)), 16
    model.recompute = again
    forward = lambda n: model(model.wte.weight.new_zeros(n, tokens, dtype=torch.long))
    return estimate.activation_bytes(forward, 8, model.parameters()) / 8 / tokens * WIDTH / 4


def held_beside(policy: GPT, other: GPT | ValueModel) -> list[torch.nn.Parameter]:
    """What a model holds that is not the policy's: where both are frozen they are one tensor."""
    frozen = {
        f"{place}{name}"
        for name, p in policy.named_parameters()
        if not p.requires_grad
        for place in ("", "backbone.")
    }
    return [p for name, p in other.named_parameters() if name not in frozen]


def needs(shape: GPTConfig, variant: tuple, args: argparse.Namespace, gpus: int) -> tuple[float, float]:
    """(bytes per GPU, seconds per iteration)."""
    again, layers, rank = variant
    shape = dataclasses.replace(shape, lora_rank=rank)
    with torch.device("meta"):
        policy, ref, reward, critic = GPT(shape), GPT(shape), ValueModel(shape), ValueModel(shape)
    for model in (policy, critic):
        if layers:
            train_last(model, round(layers * shape.n_layer), torch.bfloat16)
    for model in (ref, reward):
        store_blocks(model.requires_grad_(False), torch.bfloat16)
    if rank:
        store(policy, torch.bfloat16)
    batch, length = args.batch // gpus, args.prompt + args.response
    rows = min(args.microbatch, batch)

    known = [
        *policy.parameters(),
        *held_beside(policy, ref),
        *held_beside(policy, reward),
        *held_beside(policy, critic),
    ]
    trained = estimate.trained_bytes(estimate.parameters([policy, critic]))
    blocks = sum(p.numel() for p in policy.blocks.parameters() if p.requires_grad)
    rounded = WIDTH * blocks  # autocast's copies
    activations = shape.n_layer * rows * length * block_bytes(shape, again)
    logits = (
        0
        if 4 * rows * args.response * shape.vocab_size > 2**27
        else 8 * rows * args.response * shape.vocab_size
    )
    cache = estimate.cache_bytes(shape, batch, length, WIDTH)
    gradients = trained / 2  # of the policy, then of the critic
    held = estimate.stored_bytes(known) + 2 * trained + rounded + max(gradients + activations + logits, cache)

    lengths, predicted = torch.full((batch,), length - 1), batch * args.response
    flops, bandwidth = args.share * args.gpu_tflop_s * 1e12, args.share * args.gpu_tb_s * 1e12
    weights = WIDTH * sum(p.numel() for p in policy.parameters())
    rollout = args.response * (weights + cache / 2) / bandwidth
    block, last, head = estimate.forward_operations(policy, lengths, predicted, True)
    one = (shape.n_layer - 1) * block + last
    score = (4 * one + 2 * head) / flops
    update = (
        args.epochs
        * estimate.update_operations(policy, critic, lengths, predicted)
        * (4 / 3 if again else 1)
        / flops
    )
    steps = args.epochs * args.batch // args.minibatch
    exchange = steps * 2 * (gpus - 1) / gpus * trained / (args.link_gb_s * 1e9)
    return held, rollout + score + update + exchange


def traffic(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of a sharded model in bf16 that pass between all ranks together: each gets (N - 1) / N of them.

    forward, backward: what is gathered in each; gradients: what is summed.  Linear layers of blocks travel in bf16, their
    gradients and all else in fp32; what is frozen, as it is stored."""
    blocks = [block for gpt in gpts_in(model) for block in gpt.blocks]
    linear = [layer for block in blocks for layer in block.children() if isinstance(layer, torch.nn.Linear)]
    rounded = sum(p.nbytes for layer in linear for p in layer.parameters() if layer.weight.requires_grad)
    in_blocks = sum(p.nbytes for block in blocks for p in block.parameters()) - rounded * (4 - WIDTH) // 4
    everything = sum(p.nbytes for p in model.parameters()) - rounded * (4 - WIDTH) // 4
    learnt = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"forward": everything, "backward": in_blocks, "gradients": learnt}


def models_of(shape: GPTConfig) -> tuple[torch.nn.Module, ...]:
    """Policy, critic, reference and reward model as PPO in bf16 holds them, without memory."""
    with torch.device("meta"):
        policy, critic, ref, reward = GPT(shape), ValueModel(shape), GPT(shape), ValueModel(shape)
    for model in (ref, reward):
        store_blocks(model.requires_grad_(False), torch.bfloat16)
    return policy, critic, ref, reward


def sharded(
    shape: GPTConfig, models: tuple, args: argparse.Namespace, gpus: int
) -> tuple[dict[str, float], float]:
    """({what: bytes that one of `gpus` holds}, bytes that it receives per optimiser step of policy and critic).

    models: what models_of returns."""
    policy, critic, ref, reward = models
    held: dict[str, float] = dict(shard.needs([policy, critic], [ref, reward], gpus, half=True))
    rows, length = min(args.microbatch, max(1, args.minibatch // gpus)), args.prompt + args.response
    root = sum(4 * p.numel() for name, p in policy.named_parameters() if not name.startswith("blocks"))
    block = sum(WIDTH * p.numel() for p in policy.blocks[0].parameters())
    held["root and two blocks, whole"] = root + 2 * block
    held["inputs of blocks"] = 4 * shape.n_layer * rows * length * shape.n_embd
    held["cache"] = estimate.cache_bytes(shape, max(1, args.batch // gpus), length, WIDTH)
    passes = max(1, -(-args.minibatch // gpus // rows))
    moved = sum(passes * sum(traffic(model).values()) for model in (policy, critic))
    return held, moved * (gpus - 1) / gpus


def with_shard(args: argparse.Namespace) -> str:
    """A row per model and number of GPUs."""
    rows = []
    for name, shape in LARGE.items():
        models = models_of(shape)
        for gpus in args.gpus:
            held, moved = sharded(shape, models, args, gpus)
            kept = held["weights"] + held["Adam's moments"]
            update = held["gradients"] + held["root and two blocks, whole"] + held["inputs of blocks"]
            rollout = held[shard.WHOLE] + held["cache"]
            peak, free = kept + max(update, rollout), 0.9 * args.gpu_gb * 1e9
            fits = "yes" if peak <= free else "without rollouts" if kept + update <= free else "no"
            seconds = moved / (args.link_gb_s * 1e9)
            cells = [f"{n / 1e9:.1f}" for n in (kept, held["gradients"], update, rollout, peak)]
            rows.append([name, f"{gpus:,}", *cells, fits, f"{moved / 1e9:.0f}", f"{seconds:.1f}"])
    head = [
        "model",
        "GPUs",
        "weights and moments, GB",
        "gradients",
        "update",
        "rollout",
        "peak",
        f"fits {args.gpu_gb:g} GB",
    ]
    return table([*head, "GB received per step", "s at link speed"], rows)


def one_gpu(args: argparse.Namespace) -> str:
    """A row per model and way of training it: what it holds, where it fits, and tokens per second."""
    rows = []
    for name, shape in PEOPLES.items():
        for variant, options in VARIANTS.items():
            held, seconds = needs(shape, options, args, 1)
            fits = ["yes" if held <= 0.9 * gb * 1e9 else "no" for gb in (24, 80)]
            rate = args.batch * (args.prompt + args.response) / seconds
            rows.append(
                [name, variant, f"{held / 1e9:.0f} GB", *fits, f"{rate:,.0f}" if "yes" in fits else "-"]
            )
    return table(["model", "trained", "holds", "24 GB", "80 GB", "tokens per s, computed"], rows)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("batch", 512, "Responses per rollout, over all GPUs."),
        ("minibatch", 64, "Responses per optimiser step, over all GPUs."),
        ("microbatch", 4, "Responses per forward pass on each GPU."),
        ("prompt", 256, "Tokens per prompt."),
        ("response", 128, "Tokens per response."),
        ("epochs", 1, "Passes over a rollout."),
    ):
        parser.add_argument(f"--{name}", type=cli.number(cli.Count), default=default, help=what)
    parser.add_argument("--gpu-gb", type=cli.number(cli.Above0), default=80, help="Memory per GPU, in GB.")
    parser.add_argument(
        "--gpu-tflop-s",
        type=cli.number(cli.Above0),
        default=989,
        help="Peak rate per GPU in bf16, dense, in TFLOP/s.",
    )
    parser.add_argument(
        "--gpu-tb-s", type=cli.number(cli.Above0), default=3.35, help="Memory bandwidth per GPU, in TB/s."
    )
    parser.add_argument(
        "--link-gb-s",
        type=cli.number(cli.Above0),
        default=100,
        help="Bandwidth between GPUs per direction and GPU, in GB/s.",
    )
    parser.add_argument(
        "--share", type=cli.number(cli.Above0), default=0.4, help="Share of the two peaks that is reached."
    )
    parser.add_argument(
        "--gpus",
        type=cli.number(cli.Count),
        nargs="+",
        help="Numbers of GPUs: 1 8 64, or 8 64 256 1024 with --shard.",
    )
    parser.add_argument("--shard", action="store_true", help="Models split over the GPUs: 1.5B to 70B.")
    parser.add_argument("--one-gpu", action="store_true", help="What fits one GPU of 24 GB and of 80 GB.")
    args = parser.parse_args()
    args.gpus = args.gpus or ([8, 64, 256, 1024] if args.shard else [1, 8, 64])
    if args.shard:
        print(with_shard(args))
        return
    if args.one_gpu:
        print(one_gpu(args))
        return
    rows = []
    for name, shape in SHAPES.items():
        for variant, options in VARIANTS.items():
            cells = []
            for gpus in args.gpus:
                held, seconds = needs(shape, options, args, gpus)
                fits = held <= 0.9 * args.gpu_gb * 1e9  # the rest is the allocator's, and CUDA's
                cells.append(
                    f"{held / 1e9:.0f} GB, {seconds:.1f} s" if fits else f"{held / 1e9:.0f} GB: too much"
                )
            rows.append([name, variant, *cells])
    print(table(["model", "trained", *(f"{n} GPU{'s' * (n > 1)}" for n in args.gpus)], rows))


if __name__ == "__main__":
    cli.run_script(main)
