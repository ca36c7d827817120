"""TRL's PPO trainer on the work of benchmarks/ppo.py, in an environment of its own; a line of JSON on standard output.

Prompts are random tokens and so are the weights; the end of text is made as likely as the work says, as in ours.
"""

import json
import math
import re
import sys
import time
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch

job = json.loads(sys.argv[2])
work = SimpleNamespace(**job["work"])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)

with redirect_stdout(sys.stderr):
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD, EOS = work.vocab - 2, work.vocab - 1
shape = transformers.GPT2Config(
    vocab_size=work.vocab, n_positions=1024, n_embd=work.n_embd, n_layer=work.n_layer, n_head=work.n_head, bos_token_id=EOS,
    eos_token_id=EOS, pad_token_id=PAD, num_labels=1,
)  # fmt: skip
policy = transformers.GPT2LMHeadModel(shape)
logit = math.log(work.end * work.vocab / (1 - work.end)) if work.end else -30.0
with torch.no_grad():
    policy.transformer.ln_f.bias.fill_(1 / math.sqrt(work.n_embd))
    policy.transformer.wte.weight[EOS] = logit * policy.transformer.ln_f.bias
value, reward = (transformers.GPT2ForSequenceClassification(shape) for _ in range(2))
ref = deepcopy(policy)
config = PPOConfig(
    output_dir=job["out"], per_device_train_batch_size=work.batch, gradient_accumulation_steps=1,
    num_mini_batches=work.batch // work.minibatch, local_rollout_forward_batch_size=work.batch, num_ppo_epochs=work.epochs,
    total_episodes=work.batch * job["iterations"], response_length=work.response, temperature=1.0, learning_rate=1e-5,
    stop_token_id=EOS if work.end else None, bf16=False, report_to="none", save_strategy="no",
    num_sample_generations=0, missing_eos_penalty=None, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip

marks: list[tuple[str, float]] = []
mark = lambda name: marks.append((name, time.perf_counter()))
steps, lengths = 0, []


def timed_generation(*args, **options):
    mark("rollout")
    queries_responses, logits = generation(*args, **options)
    ended = queries_responses[:, work.prompt :] == EOS
    lengths.append(int(torch.where(ended.any(1), ended.int().argmax(1) + 1, work.response).sum()))
    mark("score")
    return queries_responses, logits


class Trainer(PPOTrainer):
    def log(self, logs, *args, **options):
        mark("end")


generation, ppo_trainer.batch_generation = ppo_trainer.batch_generation, timed_generation
stub = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, save_pretrained=lambda *a, **k: None)
prompts = Dataset.from_dict({"input_ids": torch.randint(0, PAD, (work.batch * 4, work.prompt)).tolist()})
trainer = Trainer(
    args=config, processing_class=stub, model=policy, ref_model=ref, reward_model=reward, value_model=value,
    train_dataset=prompts, eval_dataset=prompts,
    data_collator=lambda rows: {"input_ids": torch.tensor([r["input_ids"] for r in rows])},
)  # fmt: skip
accumulate, step = trainer.accelerator.accumulate, trainer.optimizer.step


def first_update(*args, **options):
    if marks[-1][0] == "score":
        mark("update")
    return accumulate(*args, **options)


def counted_step(*args, **options):
    global steps
    steps += 1
    return step(*args, **options)


trainer.accelerator.accumulate, trainer.optimizer.step = first_update, counted_step
cpu = time.process_time()
with redirect_stdout(sys.stderr):
    trainer.train()
cpu = time.process_time() - cpu
found = []
for i in range(0, len(marks), 4):
    (_, a), (_, b), (_, c), (name, d) = marks[i : i + 4]
    assert name == "end", marks[i : i + 4]
    found.append(
        {"rollout": b - a, "score": c - b, "update": d - c, "seconds": d - a, "tokens": lengths[i // 4]}
    )
peak = (
    int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
)  # (ru_maxrss may be the parent's)
versions = {name: __import__(name).__version__ for name in ("trl", "transformers", "torch")}
print(
    json.dumps(
        {
            "iterations": found,
            "optimizer_steps": steps,
            "peak_mb": peak,
            "cpu_seconds": cpu,
            "versions": versions,
        }
    )
)
