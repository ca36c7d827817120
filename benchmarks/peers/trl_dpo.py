"""TRL's DPO trainer on the work of benchmarks/dpo.py, in an environment of its own; a line of JSON on standard output.

Texts are random tokens of fixed lengths and so are the weights.  With `precompute` the reference's log-probabilities are
computed before the first step, as ours are; else the reference reads the pairs again in every step, TRL's default.
"""

import sys
import time
from contextlib import redirect_stdout
from copy import deepcopy

import torch
from common import EOS, PAD, job, shape, tell, work

with redirect_stdout(sys.stderr):
    import tokenizers
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({f"w{i}": i for i in range(work.vocab)}, unk_token="w0")
)
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token=f"w{PAD}", eos_token=f"w{EOS}", bos_token=f"w{EOS}"
)
policy = transformers.GPT2LMHeadModel(shape())
steps, begun, took, tokens = job["steps"], [0.0], [], []
draw = lambda n: torch.randint(0, PAD, (steps * work.pairs, n)).tolist()
rows = {"prompt_ids": draw(work.prompt)}
rows |= {name: [[*ids, EOS] for ids in draw(work.response - 1)] for name in ("chosen_ids", "rejected_ids")}
config = DPOConfig(
    output_dir=job["out"], per_device_train_batch_size=work.pairs, gradient_accumulation_steps=1, num_train_epochs=1,
    learning_rate=1e-5, bf16=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(), precompute_ref_log_probs=job["precompute"],
    precompute_ref_batch_size=work.pairs, gradient_checkpointing=False, max_length=None,
)  # fmt: skip


class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *args, **options):
        begun[0] = time.perf_counter()

    def on_step_end(self, *args, **options):
        took.append(time.perf_counter() - begun[0])


class Trainer(DPOTrainer):
    reference = 0.0

    def _prepare_dataset(self, dataset, *args, **options):
        return dataset  # its rows are token ids already

    def _precompute_ref_logps(self, *args, **options):
        start = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **options)
        Trainer.reference += time.perf_counter() - start
        return found

    def _compute_loss(self, model, inputs, *args, **options):
        tokens.append(int(inputs["attention_mask"].sum()))
        return super()._compute_loss(model, inputs, *args, **options)


cpu = time.process_time()
with redirect_stdout(sys.stderr):
    trainer = Trainer(
        model=policy, ref_model=deepcopy(policy), args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
cpu = time.process_time() - cpu
found = [
    {"reference": Trainer.reference / steps, "update": update, "tokens": count}
    for update, count in zip(took, tokens, strict=True)
]
tell({"steps": found, "cpu_seconds": cpu})
