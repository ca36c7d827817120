"""TRL's GRPO trainer on the work of benchmarks/ppo.py, in an environment of its own; a line of JSON on standard output.

Prompts are random tokens and so are the weights; the end of text is made as likely as the work says, as in ours. The loss is
ours: the group's mean and standard deviation, a mean over each response and then over responses, and plain k3 in the loss.
Everything else is TRL's fastest: no gradient checkpointing (its default, which saves memory and costs time), no dropout, no
checkpoints, no evaluation, no tables of completions, the fused optimiser, transformers' generate with its dynamic cache (a
static one is slower here, vLLM is for GPUs, and continuous batching did not finish on a CPU). A rollout is generated at once
for several optimiser steps (steps_per_generation), as in ours, so TRL, too, reads each response three times: once for the old
log-probabilities, once by the reference, once to learn from it.
"""

import math
import os
import sys
import time
from collections import Counter
from contextlib import redirect_stdout

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from common import EOS, PAD, job, shape, tell, work

with redirect_stdout(sys.stderr):
    import tokenizers
    import transformers
    from datasets import Dataset
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from trl import GRPOConfig, GRPOTrainer

policy = transformers.GPT2LMHeadModel(shape(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
logit = math.log(work.end * work.vocab / (1 - work.end)) if work.end else -30.0
with torch.no_grad():
    policy.transformer.ln_f.bias.fill_(1 / math.sqrt(work.n_embd))
    policy.transformer.wte.weight[EOS] = logit * policy.transformer.ln_f.bias
policy.save_pretrained(f"{job['out']}/policy")  # from here the trainer reads its reference
policy = transformers.GPT2LMHeadModel.from_pretrained(f"{job['out']}/policy", dtype=torch.float32)

# A text is a list of token numbers, so that what is decoded and encoded again is the same tokens.
words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({str(i): i for i in range(work.vocab)}, unk_token="0")
)
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token=str(PAD), eos_token=str(EOS), padding_side="left"
)
prompts = [
    {"prompt": " ".join(map(str, row))} for row in torch.randint(PAD, (work.batch * 4, work.prompt)).tolist()
]
steps_per_rollout = work.epochs * work.batch // work.minibatch
config = GRPOConfig(
    output_dir=job["out"], per_device_train_batch_size=work.minibatch, gradient_accumulation_steps=1,
    steps_per_generation=work.batch // work.minibatch, num_iterations=work.epochs, num_generations=work.group,
    max_steps=steps_per_rollout * job["iterations"], max_completion_length=work.response, temperature=1.0,
    beta=work.kl_coef, use_bias_correction_kl=False, loss_type="grpo", scale_rewards="group", epsilon=0.2,
    learning_rate=1e-5, max_grad_norm=1.0, bf16=job["bf16"], gradient_checkpointing=False,
    logging_steps=steps_per_rollout, report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True,
    dataloader_num_workers=0, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip

marks: list[tuple[str, float]] = []
mark = lambda name: marks.append((name, time.perf_counter()))
rows: Counter[str] = Counter()
lengths: list[int] = []


def characters(completions, **_):
    """The same reward as ours, which costs nothing."""
    return [float(len(text)) for text in completions]


class Trainer(GRPOTrainer):
    def _generate(self, prompts):
        found = super()._generate(prompts)
        lengths.append(sum(map(len, found[1])))
        assert {len(ids) for ids in found[0]} == {work.prompt} and len(found[1]) == work.batch
        mark("score")
        return found

    def _generate_and_score_completions(self, inputs):
        mark("rollout")
        found = super()._generate_and_score_completions(inputs)
        mark("update")
        return found

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **options):
        rows["trained" if torch.is_grad_enabled() else "read"] += len(input_ids)
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **options)

    def log(self, logs, *args, **options):
        super().log(logs, *args, **options)
        mark("end")


with redirect_stdout(sys.stderr):
    trainer = Trainer(
        model=policy,
        args=config,
        reward_funcs=characters,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    register_optimizer_step_post_hook(lambda *_: rows.update(["steps"]))
    cpu = time.process_time()
    trainer.train()
    cpu = time.process_time() - cpu
assert trainer.ref_model is not None and {p.dtype for p in policy.parameters()} == {torch.float32}
found = []
for i in range(job["iterations"]):
    (_, a), (_, b), (_, c), (name, d) = marks[4 * i : 4 * i + 4]
    assert name == "end", marks
    found.append({"rollout": b - a, "score": c - b, "update": d - c, "seconds": d - a, "tokens": lengths[i]})
tell({"iterations": found, "optimizer_steps": rows.pop("steps"), "rows": rows, "cpu_seconds": cpu})
