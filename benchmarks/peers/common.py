"""What the scripts of this folder share: the job, a GPT-2 of the work's shape, and the line of JSON at the end."""

import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch

job = json.loads(sys.argv[2])
work = SimpleNamespace(**job["work"])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)

with redirect_stdout(sys.stderr):
    import transformers

PAD, EOS = work.vocab - 2, work.vocab - 1


def shape(**more) -> "transformers.GPT2Config":
    return transformers.GPT2Config(
        vocab_size=work.vocab, n_positions=1024, n_embd=work.n_embd, n_layer=work.n_layer, n_head=work.n_head,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **more,
    )  # fmt: skip


def tell(found: dict) -> None:
    """Print what was measured, with the process' peak memory (ru_maxrss may be the parent's) and the versions."""
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024
    versions = {name: __import__(name).__version__ for name in ("trl", "transformers", "torch")}
    print(json.dumps(found | {"peak_mb": peak, "versions": versions}))
