"""The steps of benchmarks/gpu.sh that are Python: packages, kernels against oracles, attention, decode, PPO.

    python benchmarks/gpu.py packages FOLDER                  # install from .wheels/ what is missing here
    python benchmarks/gpu.py oracles OUT.json                 # every op's error, beside plain PyTorch's
    python benchmarks/gpu.py attention OUT.json               # packed tokens beside padded rows
    python benchmarks/gpu.py decode OUT.json                  # the compiled decode step beside the plain one
    python benchmarks/gpu.py ppo OUT.json --compile           # seconds and memory per PPO iteration

With --small the shapes are tiny, and no GPU is needed.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Ahead of this folder, which Python puts first, and whose kernels.py would be imported as `kernels`.
sys.path.insert(0, str(ROOT))

WHEELS = ROOT / ".wheels"
PACKAGES = {  # module: package
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "typing_extensions": "typing-extensions",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "markupsafe": "MarkupSafe",
}


def install(folder: Path) -> int:
    """Install what is missing from .wheels/ into the folder -> exit code."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        print("all packages are here")
        return 0
    if not WHEELS.is_dir():
        print(f"missing: {', '.join(missing)}, and there is no .wheels/: see the top of benchmarks/gpu.sh")
        return 1
    offline = ["--no-index", "--find-links", str(WHEELS), "--no-deps", "--target", str(folder)]
    return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *offline, *missing])


# Kernels against their oracles


def errors(found: dict, want: dict, scale: dict) -> dict[str, float]:
    """The largest error of each result, divided by its scale."""
    return {
        name: float(((value.double() - want[name]).abs() / scale[name]).max())
        for name, value in found.items()
    }


def call(function: Callable, tensors: list, rest: list, names: list[str]) -> dict[str, Any]:
    """Results and gradients by name, for an upstream gradient of 1, 2, ... for the results."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, *rest)
    results = {f"result {i}": x.detach() for i, x in enumerate(out)}
    if not out[0].requires_grad:
        return results
    sum((i + 1) * x.sum() for i, x in enumerate(out)).backward()
    return results | {f"d {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}


def oracles(args: argparse.Namespace) -> int:
    """Each op in each dtype: the kernel's error and plain PyTorch's, both against float64."""
    import torch

    import kernels
    from kernels import dispatch
    from kernels.tools.testing import OPS

    if dispatch.INTERPRETED:
        from kernels.tools.interpreter import repair

        repair()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = [(3, 70)] if args.small else [(64, 1031), (64, 50257), (64, 151936)]
    channels, episodes = (
        (24, (3, 40)) if args.small else (256, (4, 300))
    )  # gae's oracle is a double sum in Python
    rows, failed = [], 0
    for op, about in OPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for n, size in sizes if op != "gae" else [episodes]:
                shapes = {"hidden": (n, channels), "weight": (size, channels)}
                tensors = [torch.randn(shapes.get(name, (n, size)), device=device) for name in about.inputs]
                tensors = [
                    (x / channels**0.5 if x.shape[-1] == channels else 3 * x).to(dtype) for x in tensors
                ]
                tokens = [] if op == "gae" else [torch.randint(size, (n,), device=device)]
                row = {"op": op, "dtype": str(dtype).removeprefix("torch."), "rows": n, "size": size}
                row["path"] = "triton" if dispatch.use_triton(*tensors) else "plain"
                try:
                    exact = call(about.reference, [x.double() for x in tensors], tokens, about.inputs)
                    exact = {name: x.to(device) for name, x in exact.items()}
                    scale = {k: x.abs().amax(-1, keepdim=True).clamp(min=1) for k, x in exact.items()}
                    row["kernel"] = errors(
                        call(getattr(kernels, op), tensors, tokens, about.inputs), exact, scale
                    )
                    if op != "gae":
                        row["plain"] = errors(
                            call(about.reference, tensors, tokens, about.inputs), exact, scale
                        )
                    # Results are fp32. A gradient is rounded to its dtype once; the linear op rounds terms.
                    eps = {name: 1e-5 for name in exact} | {
                        f"d {name}": max(1e-5, (8 if op.startswith("linear") else 2) * torch.finfo(dtype).eps)
                        for name in about.inputs
                    }
                    row["ok"] = all(error <= eps[name] for name, error in row["kernel"].items())
                except Exception as error:  # a kernel that does not run is a finding; the others follow
                    row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
                failed += not row["ok"]
                rows.append(row)
                worst = {k: f"{max(row[k].values()):.1e}" for k in ("kernel", "plain") if k in row}
                text = row.get("error") or ", ".join(f"{k} {v}" for k, v in worst.items())
                state = "ok" if row["ok"] else "FAIL"
                print(f"{state:5s}{op} {row['dtype']} [{n}, {size}] {row['path']}: {text}", flush=True)
    args.out.write_text(json.dumps({"device": where(), "rows": rows}, indent=1) + "\n")
    return int(failed > 0)


def where() -> dict[str, str]:
    import torch

    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    if triton := sys.modules.get("triton"):
        versions["triton"] = triton.__version__
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"name": name, **versions}


# PPO iterations

SMOLLM2 = {  # SmolLM2-135M's shape (HuggingFaceTB), with a shorter context
    "shape": {
        "vocab_size": 49152,
        "context": 2048,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "n_embd": 576,
        "n_inner": 1536,
        "norm": "rms",
        "positions": "rotary",
        "rope_theta": 1e5,
        "mlp": "swiglu",
        "bias": False,
    },
    "batch": 64,
    "minibatch": 32,
    "prompt": 32,
    "response": 64,
    "iterations": 6,
    "warm_up": 2,
    "precision": "bf16",
}
SMALL_SHAPE = {"vocab_size": 512, "n_layer": 2, "n_head": 3, "n_kv_head": 1, "n_embd": 24, "n_inner": 48}
SMALL = {"batch": 4, "minibatch": 2, "prompt": 5, "response": 4, "iterations": 2, "warm_up": 1}
SMALL |= {"precision": "fp32", "shape": SMOLLM2["shape"] | SMALL_SHAPE}


def prepare(work: dict, folder: Path) -> None:
    """Write the checkpoints sft and rm with random weights, and texts whose first tokens are prompts."""
    import numpy as np
    import torch

    import train_rm
    import train_sft
    from minirlhf import checkpoint
    from minirlhf.model import GPT, GPTConfig, RewardEnsemble
    from minirlhf.tokenizer import BYTES, Tokenizer

    torch.manual_seed(0)
    letters = [bytes([b]) for b in range(256) if chr(b).isalpha()]
    pieces = BYTES + [a + b for a in letters for b in letters]
    for a in pieces[256:]:
        if len(pieces) >= work["shape"]["vocab_size"]:
            break
        pieces += [a + b for b in letters]
    tokenizer = Tokenizer({piece: i for i, piece in enumerate(pieces[: work["shape"]["vocab_size"] - 2])})
    shape = GPTConfig(**work["shape"])
    head = {"pooling": "last", "members": 1, "mlp": True}
    for stage, model, config, more in (
        ("sft", GPT(shape), train_sft.Config(), {}),
        ("rm", RewardEnsemble(shape), train_rm.Config(), {"head": head}),
    ):
        about = checkpoint.describe(stage, shape, config, 0, True, tokenizer, **more)
        checkpoint.save(folder / stage, 0, model.state_dict(), about, tokenizer)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([p.decode() for p in letters if p.isascii()], 4)) for _ in range(2000)]
    rows = [{"text": " ".join(rng.choice(words, 60))} for _ in range(500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(work: dict, folder: Path, compiled: bool) -> list[str]:
    """The command line of train_ppo.py."""
    named = {"init": folder / "sft", "reward-model": folder / "rm", "data": folder / "texts.jsonl"}
    named |= {"out": folder / "ppo", "prompt-tokens": work["prompt"] - 1, "response-tokens": work["response"]}
    named |= {name: work[name] for name in ("batch", "minibatch", "iterations", "precision")}
    named |= {"lr": 1e-5, "value-lr": 1e-5, "save-every": 10**6, "missing-eos": "none"}
    return [str(x) for name, value in named.items() for x in (f"--{name}", value)] + ["--compile"] * compiled


def run_ppo(job: dict) -> None:
    """Run train_ppo.py in this process, and print the peak of its memory as JSON."""
    import torch

    import train_ppo

    sys.argv = ["train_ppo.py", *job["options"]]
    train_ppo.main()
    if torch.cuda.is_available():
        peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        peak = {"resident": int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10}
    print("\n" + json.dumps(peak))


def estimated(work: dict, folder: Path) -> dict[str, int]:
    """{what: bytes} that minirlhf.estimate expects of the run, without --compile."""
    import torch

    from minirlhf import optim
    from minirlhf.support import hardware
    from minirlhf.tools import estimate

    named = {"reward-model": folder / "rm", "batch": work["batch"], "minibatch": work["minibatch"]}
    named |= {
        "prompt-tokens": work["prompt"] - 1,
        "response-tokens": work["response"],
        "precision": work["precision"],
    }
    args = estimate.parse([str(folder / "sft"), *(str(x) for k, v in named.items() for x in (f"--{k}", v))])
    models = estimate.load_models(args, work["precision"])
    fused = optim.fuse_head("auto", work["minibatch"] * work["response"], work["shape"]["vocab_size"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with hardware.Machine(device).autocast(work["precision"]):
        return estimate.needs(
            models, work["prompt"], work["response"], work["minibatch"], work["batch"], fused
        )


# Attention on packed tokens, and the decode step

DRAWN = {"rows": 64, "shortest": 32, "longest": 512, "rounds": 8}  # texts of an update, by length
DRAWN_SMALL = {"rows": 4, "shortest": 2, "longest": 12, "rounds": 2}


def text_by_text(
    q: Any, k: Any, v: Any, starts: Any, starts_k: Any, longest: int, longest_k: int, **how: Any
) -> Any:
    """torch.nn.attention.varlen.varlen_attn in plain PyTorch, for a machine without a GPU."""
    import torch

    parts = [x.tensor_split(starts[1:-1].tolist()) for x in (q, k, v)]
    attend, causal = torch.nn.functional.scaled_dot_product_attention, how["window_size"] == (-1, 0)
    heads = lambda part: (x.transpose(0, 1) for x in part)
    texts = [attend(*heads(part), is_causal=causal, enable_gqa=True) for part in zip(*parts, strict=True)]
    return torch.cat([text.transpose(0, 1) for text in texts])


def clocked(call: Callable) -> float:
    """Seconds of a call, with all that it asks of the GPU."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def model_on_device(work: dict) -> Any:
    """The policy of `work` with random weights."""
    import torch

    from minirlhf.model import GPT, GPTConfig

    torch.manual_seed(0)
    return GPT(GPTConfig(**work["shape"])).to("cuda" if torch.cuda.is_available() else "cpu")


def attention(args: argparse.Namespace) -> int:
    """Forward and backward on texts of drawn lengths, packed and padded: seconds, memory, errors against fp32."""
    import torch
    from torch.nn.attention import varlen

    from minirlhf.support import ragged

    work, drawn = (SMALL, DRAWN_SMALL) if args.small else (SMOLLM2, DRAWN)
    model, real = model_on_device(work), torch.cuda.is_available()
    device, packs = model.wte.weight.device, ragged.attends_packed
    if not real:
        varlen.varlen_attn = text_by_text
    lengths = torch.randint(drawn["shortest"], drawn["longest"] + 1, (drawn["rows"],))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(work["shape"]["vocab_size"], mask.shape).to(device)
    found = {"device": where(), "work": work, "drawn": drawn, "real_tokens": int(mask.sum())}
    found |= {"padded_tokens": mask.numel(), "pairs": int(lengths.square().sum())}
    found["padded_pairs"] = mask.numel() * mask.shape[1]

    def run(packed: bool, half: bool = True) -> tuple:
        ragged.attends_packed = (lambda *_: packs(*_) or not real) if packed else lambda *_: False
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            hidden = model(tokens, mask)
        hidden.square().mean().backward()
        return hidden.detach(), model.blocks[0].qkv.weight.grad.clone()

    exact = run(packed=False, half=False)
    for name, packed in (("packed", True), ("padded", False)):
        if real:
            torch.cuda.reset_peak_memory_stats()
        off = [float((a - b).norm() / b.norm()) for a, b in zip(run(packed), exact, strict=True)]
        found[name] = {"error": dict(zip(("hidden", "gradient"), off, strict=True)), "seconds": []}
        if real:
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    for _ in range(drawn["rounds"]):  # in turn
        for name, packed in (("packed", True), ("padded", False)):
            found[name]["seconds"].append(clocked(lambda packed=packed: run(packed)))
    for name in ("packed", "padded"):
        found[name]["median_seconds"] = median(found[name]["seconds"])
    found["padded / packed"] = found["padded"]["median_seconds"] / found["packed"]["median_seconds"]
    ragged.attends_packed = packs
    with torch.autocast(device.type, torch.bfloat16):
        found["kernel"] = packs(device, model.config.head_dim)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in ("work", "device")}, indent=1))
    worse = [kind for kind, e in found["packed"]["error"].items() if e > 2 * found["padded"]["error"][kind]]
    if worse:
        print(f"FAIL: packed attention is less exact than padded: {', '.join(worse)}")
    if real and not found["kernel"]:
        print("packed attention does not run on this GPU and torch: both sides were padded")
    return int(bool(worse))


def started_kernels(model: Any, work: dict) -> int:
    """Operations with results of their own in the second decode step, when autocast has rounded all weights."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from minirlhf.support.cache import KVCache

    class Count(TorchDispatchMode):
        started = 0

        def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: Any = None) -> Any:
            aliases = [result.alias_info for result in function._schema.returns]
            view = all(alias is not None and not alias.is_write for alias in aliases)
            self.started += not view and "empty" not in function._schema.name
            return function(*given, **(named or {}))

    B, device = work["batch"], model.wte.weight.device
    half = torch.autocast(device.type, torch.bfloat16, enabled=work["precision"] == "bf16")
    with torch.no_grad(), half:
        cache, token = KVCache(model, B, 3), torch.zeros(B, dtype=torch.long, device=device)
        model(token[:, None], None, cache)
        model.logits(cache.step(model, token))
        with Count() as count:
            model.logits(cache.step(model, token))
    return count.started


def decode(args: argparse.Namespace) -> int:
    """Rollouts with the plain decode step and the compiled one: seconds, tokens per second, equal tokens."""
    import torch

    from minirlhf.rollout import Sampling, generate
    from minirlhf.support.decode import Decoder, graphs

    work = SMALL if args.small else SMOLLM2
    model, rounds = model_on_device(work), 2 if args.small else 4
    kind = model.wte.weight.device.type
    mode = graphs if kind == "cuda" else lambda step: torch.compile(step, backend="eager", dynamic=False)
    B, P = work["batch"], work["prompt"]
    vocabulary = work["shape"]["vocab_size"]
    prompts, mask = torch.randint(vocabulary, (B, P)), torch.ones(B, P, dtype=torch.bool)
    no_end = Sampling(work["response"], 0.0, eos=vocabulary - 1, pad=0, forbidden=vocabulary - 1)
    found: dict[str, Any] = {
        "device": where(),
        "work": work,
        "compiler": "CUDA graphs" if kind == "cuda" else "eager",
    }
    found["kernels_per_step"] = started_kernels(model, work)
    texts, decoders = {}, {"plain": None, "compiled": Decoder(model, mode)}

    def run(name: str) -> None:
        model.decoder = decoders[name]
        with torch.autocast(kind, torch.bfloat16, enabled=work["precision"] == "bf16"):
            texts[name] = generate(model, prompts, mask, no_end).responses

    for name in decoders:
        found[name] = {"first_seconds": clocked(lambda name=name: run(name)), "seconds": []}
    for _ in range(rounds):  # in turn
        for name in decoders:
            found[name]["seconds"].append(clocked(lambda name=name: run(name)))
    for name in decoders:
        found[name]["median_seconds"] = median(found[name]["seconds"])
        found[name]["tokens_per_second"] = B * work["response"] / found[name]["median_seconds"]
    found["plain / compiled"] = found["plain"]["median_seconds"] / found["compiled"]["median_seconds"]
    same = (texts["plain"] == texts["compiled"]).long()
    found["equal_first_tokens"] = float(same[:, :2].float().mean())  # a tie in bf16 changes all that follow
    found["equal_tokens"] = float(same.float().mean())
    found["tokens_until_they_differ"] = float(same.cumprod(1).sum(1).float().mean())
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in ("work", "device")}, indent=1))
    return int(found["equal_first_tokens"] < 0.9)


def child(command: str, job: dict) -> Any:
    """What a process of this file's `command` prints as its last line, as JSON."""
    call = [sys.executable, __file__, command, json.dumps(job)]
    done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def ppo(args: argparse.Namespace) -> int:
    """Run train_ppo.py on random weights; write seconds per phase, peak memory, and the estimate of it."""
    work = SMALL if args.small else SMOLLM2
    found, start = {"device": where(), "compile": args.compile, "work": work}, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        print(f"checkpoints: {time.perf_counter() - start:.0f} s", flush=True)
        argv = options(work, folder, args.compile)
        try:
            found["peak_bytes"] = child("run-ppo", {"options": argv})
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        metrics = folder / "ppo" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        if not args.compile:
            try:
                found["estimate_bytes"] = child("estimated", {"work": work, "folder": name})
            except Exception as error:
                found["estimate_error"] = f"{type(error).__name__}: {error}"
    ends = [0.0, *(line["time/seconds"] for line in lines)]
    kept = (
        "time/rollout",
        "time/score",
        "time/update",
        "val/ratio",
        "val/ratio_var",
        "objective/kl",
        "val/response_length",
    )
    found["iterations"] = [
        {key: line[key] for key in kept if key in line} | {"seconds": end - start}
        for line, start, end in zip(lines, ends, ends[1:], strict=False)
    ]
    if counted := found["iterations"][work["warm_up"] :]:
        keys = [key for key in counted[0] if key == "seconds" or key.startswith("time/")]
        found["median_seconds"] = {key: median(line[key] for line in counted) for key in keys}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    summary = {
        k: found[k]
        for k in ("median_seconds", "peak_bytes", "estimate_bytes", "error", "estimate_error")
        if k in found
    }
    print(json.dumps(summary, indent=1))
    return int("error" in found or "estimate_error" in found or not found.get("median_seconds"))


def main() -> int:
    if sys.argv[1:2] == ["run-ppo"]:
        run_ppo(json.loads(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["estimated"]:
        job = json.loads(sys.argv[2])
        found = estimated(job["work"], Path(job["folder"]))
        print("\n" + json.dumps(found))
        return 0
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    steps = {"oracles": oracles, "attention": attention, "decode": decode, "ppo": ppo}
    parser.add_argument("step", choices=("packages", *steps))
    parser.add_argument("out", type=Path, help="JSON file for the results; of packages, the folder to fill")
    parser.add_argument("--compile", action="store_true", help="run train_ppo.py with --compile")
    parser.add_argument("--small", action="store_true", help="use tiny shapes, for a machine without a GPU")
    args = parser.parse_args()
    if args.step == "packages":
        return install(args.out)
    return steps[args.step](args)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
