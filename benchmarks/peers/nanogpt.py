"""nanoGPT's prepare.py and train.py, unmodified, on the text of benchmarks/sft.py; prints a line of JSON.

They run in this process, in a copy of its folder; the one thing put in their way adds the round to the seed that train.py
fixes (round 0: its own). The model that training leaves behind is then evaluated.
"""

import io
import json
import os
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

job = json.loads(sys.argv[2])
torch.set_num_threads(job["threads"])
windows = json.loads(Path(job["folder"], "windows.json").read_text())
os.chdir(Path(job["folder"], "nanogpt"))
sys.path.insert(0, os.getcwd())
manual_seed = torch.manual_seed
torch.manual_seed = lambda seed: manual_seed(seed + job["seed"])
published = (  # in its README; here with the steps of the job
    f"--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size={job['batch']} --n_layer=4 "
    f"--n_head=4 --n_embd=128 --max_iters={job['steps'] - 1} --lr_decay_iters={job['steps']} --dropout=0.0"
)
printed = io.StringIO()
with redirect_stdout(printed):
    if not Path("data/shakespeare_char/meta.pkl").exists():
        runpy.run_path("data/shakespeare_char/prepare.py", run_name="__main__")
    sys.argv = ["train.py", "config/train_shakespeare_char.py", *published.split()]
    left = runpy.run_path("train.py", run_name="__main__")
steps = [
    (int(n), float(ms))
    for n, ms in re.findall(r"^iter (\d+): .* time ([\d.]+)ms", printed.getvalue(), re.MULTILINE)
]
seconds = [ms / 1000 for n, ms in steps if n % left["eval_interval"]]  # the others evaluate first

model, stoi = left["model"].eval(), left["meta"]["stoi"]
assert len(stoi) == left["model_args"]["vocab_size"] and next(model.parameters()).dtype == torch.float32
x = torch.tensor([[stoi[c] for c in window] for window in windows])
with torch.no_grad():
    _, loss = model(x[:, :-1], x[:, 1:].contiguous())  # the mean over characters 2 to the last
print(json.dumps({
    "seconds": seconds, "steps": len(steps), "tokens": left["tokens_per_iter"], "loss": loss.item(),
    "parameters": sum(p.numel() for p in model.parameters()), "versions": {"torch": torch.__version__},
}))  # fmt: skip
