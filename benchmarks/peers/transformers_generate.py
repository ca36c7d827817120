"""transformers' generate on the work of benchmarks/rollout.py, in an environment of its own; prints a line of JSON."""

import ctypes
import json
import sys
import time
from types import SimpleNamespace

import torch
import transformers

job = json.loads(sys.argv[2])
work = SimpleNamespace(**job["work"])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
if job["keep_freed"]:  # as minirlhf.training.keep_freed_memory
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
        ctypes.CDLL(None).mallopt(parameter, value)

PAD, EOS = work.vocab - 2, work.vocab - 1
shape = transformers.GPT2Config(
    vocab_size=work.vocab, n_positions=1024, n_embd=work.n_embd, n_layer=work.n_layer, n_head=work.n_head, bos_token_id=EOS,
    eos_token_id=EOS, pad_token_id=PAD,
)  # fmt: skip
model = transformers.GPT2LMHeadModel(shape).eval()
if job["precision"] == "bf16":
    model.to(torch.bfloat16)
prompts = torch.randint(PAD, (work.batch, work.prompt))
how = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "use_cache": True,
    "attention_mask": torch.ones_like(prompts),
}

# Not timed: what is sampled from is the whole distribution, less the end of text.
scores = model.generate(
    prompts, **how, min_new_tokens=1, max_new_tokens=1, output_scores=True, return_dict_in_generate=True
).scores[0]  # fmt: skip
assert (scores.isneginf().sum(1) == 1).all() and scores[:, EOS].isneginf().all()

seconds = []
for _ in range(1 + job["calls"]):
    start = time.perf_counter()
    tokens = model.generate(prompts, **how, min_new_tokens=work.response, max_new_tokens=work.response)
    seconds.append(time.perf_counter() - start)
    responses = tokens[:, work.prompt :]
    assert responses.shape == (work.batch, work.response) and not (responses == EOS).any()
versions = {
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "attention": model.config._attn_implementation,
}
print(json.dumps({"seconds": seconds[1:], "tokens": responses.numel(), "versions": versions}))
