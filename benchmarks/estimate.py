"""What PPO on a larger model would need: memory a GPU and seconds an iteration, on 1 to 64 GPUs.  Formulas; nothing is run.

    python benchmarks/estimate.py                                  # 124M, 1.5B and 7B on H100s
    python benchmarks/estimate.py --gpu-gb 141 --gpu-tb-s 4.8      # the same on H200s
    python benchmarks/estimate.py --batch 1024 --prompt 512 --response 256

Parameters and bytes are counted on the models themselves, made without memory (the meta device), activations on one block of
each; train_ppo.py --dry-run prints the same for a run of yours.  torchrun replicates the models: more GPUs share
the batch, not the weights.

Assumed: bf16 products at --share of the GPU's peak in scoring and update; a decoding step reads all weights and the cache
once, at --share of the memory's bandwidth; gradients are summed once an optimiser step in fp32, at --link-gb-s a GPU, not
hidden behind anything.  No benchmark of ours has run on a GPU: take the seconds as orders of magnitude.
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
from minirlhf.model import GPT, GPTConfig, ValueModel, store_blocks, train_last  # noqa: E402
from minirlhf.tools import estimate  # noqa: E402

LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False, "tied": False}
SHAPES = {
    "124M (GPT-2)": GPTConfig(50257, 1024, 12, 12, 768),
    "1.5B (GPT-2 XL)": GPTConfig(50257, 1024, 48, 25, 1600),
    "7B (Llama 2)": GPTConfig(32000, 4096, 32, 32, 4096, n_inner=11008, **LLAMA),
}
VARIANTS = {  # shared trunk, gradient checkpointing, layers that are trained
    "four models": (False, False, None),
    "shared trunk, checkpointing": (True, True, None),
    "... and a quarter of the layers": (True, True, 0.25),
}
WIDTH = 2  # bytes of bf16


@functools.cache
def block_bytes(shape: GPTConfig, again: bool) -> float:
    """What autograd keeps of a token in a block, in bf16: tried in fp32 on a model of one block."""
    model, tokens = GPT(dataclasses.replace(shape, n_layer=1, vocab_size=8)), 16
    model.recompute = again
    forward = lambda n: model(model.wte.weight.new_zeros(n, tokens, dtype=torch.long))
    return estimate.activation_bytes(forward, 8, model.parameters()) / 8 / tokens * WIDTH / 4


def needs(shape: GPTConfig, variant: tuple, args: argparse.Namespace, gpus: int) -> tuple[float, float]:
    """(bytes a GPU, seconds an iteration)."""
    shared, again, layers = variant
    with torch.device("meta"):
        policy, ref, reward = GPT(shape), GPT(shape), ValueModel(shape)
        critic = ValueModel(shape, trunk=policy) if shared else ValueModel(shape)
    for model in (policy, critic):
        if layers:
            train_last(model, round(layers * shape.n_layer), torch.bfloat16)
    for model in (ref, reward):
        store_blocks(model.requires_grad_(False), torch.bfloat16)
    batch, length = args.batch // gpus, args.prompt + args.response
    rows = min(args.microbatch, batch)

    known = estimate.parameters([policy, ref, reward, critic])
    trained = estimate.trained_bytes(known)
    blocks = sum(p.numel() for p in policy.blocks.parameters() if p.requires_grad)
    rounded = WIDTH * blocks  # autocast's copies
    activations = shape.n_layer * rows * length * block_bytes(shape, again)
    logits = (
        0
        if 4 * rows * args.response * shape.vocab_size > 2**27
        else 8 * rows * args.response * shape.vocab_size
    )
    cache = estimate.cache_bytes(shape, batch, length, WIDTH)
    gradients = trained if shared else trained / 2
    held = estimate.stored_bytes(known) + 2 * trained + rounded + max(gradients + activations + logits, cache)

    lengths, predicted = torch.full((batch,), length - 1), batch * args.response
    flops, bandwidth = args.share * args.gpu_tflop_s * 1e12, args.share * args.gpu_tb_s * 1e12
    weights = WIDTH * sum(p.numel() for p in policy.parameters())
    rollout = args.response * (weights + cache / 2) / bandwidth
    block, last, head = estimate.forward_operations(policy, lengths, predicted, True)
    one = (shape.n_layer - 1) * block + last
    score = ((3 if shared else 4) * one + 2 * head) / flops
    update = (
        args.epochs
        * estimate.update_operations(policy, critic, lengths, predicted)
        * (4 / 3 if again else 1)
        / flops
    )
    steps = args.epochs * args.batch // args.minibatch
    exchange = steps * 2 * (gpus - 1) / gpus * trained / (args.link_gb_s * 1e9)
    return held, rollout + score + update + exchange


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "batch": 512,
        "minibatch": 64,
        "microbatch": 4,
        "prompt": 256,
        "response": 128,
        "epochs": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU")
    parser.add_argument("--gpu-tflop-s", type=float, default=989, help="its peak in bf16, dense")
    parser.add_argument("--gpu-tb-s", type=float, default=3.35, help="its memory's bandwidth")
    parser.add_argument("--link-gb-s", type=float, default=100, help="between GPUs, each direction, per GPU")
    parser.add_argument("--share", type=float, default=0.4, help="of the two peaks that is reached")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        for variant, how in VARIANTS.items():
            cells = []
            for gpus in args.gpus:
                held, seconds = needs(shape, how, args, gpus)
                fits = held <= 0.9 * args.gpu_gb * 1e9  # the rest is the allocator's, and CUDA's
                cells.append(
                    f"{held / 1e9:.0f} GB, {seconds:.1f} s" if fits else f"{held / 1e9:.0f} GB: too much"
                )
            rows.append([name, variant, *cells])
    print(table(["model", "how", *(f"{n} GPU{'s' * (n > 1)}" for n in args.gpus)], rows))


if __name__ == "__main__":
    main()
