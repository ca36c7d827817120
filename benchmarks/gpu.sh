#!/usr/bin/env bash
# Everything that waits for a GPU, in one command of at most seven minutes.
#
#   benchmarks/gpu.sh                         # on a machine with a GPU
#   OUT=/tmp/small benchmarks/gpu.sh --small  # the same steps on tiny shapes, without a GPU
#
# The machine needs torch, triton, numpy, safetensors, tiktoken, pytest, hypothesis and this checkout, and no
# network. The other packages that the scripts import come as wheels from .wheels/ (about 1 MB, ignored by git).
# Make that folder beforehand, with the same version of Python:
#
#   python -m pip download --only-binary=:all: -d .wheels -c constraints.txt tyro tqdm jinja2
#
# Steps: the kernels against their oracles; the tests marked gpu, with the property suite on the GPU; each kernel
# beside the time of its bytes and beside plain PyTorch; attention on packed tokens beside padded rows, and the
# compiled decode step beside the plain one, in SmolLM2's shape and bf16; PPO iterations of that shape, without
# and with --compile, and their memory beside the estimate. Each step has a time limit. A step that fails does
# not stop the next. Logs and JSON go to OUT (default: benchmarks/results/gpu-<card>-<date>). The exit code is 0 if
# all steps passed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
SMALL=""
TOTAL=410 # seconds for all steps
case "${1:-}" in
"") ;;
--small) SMALL=--small ;;
*)
    echo "usage: [OUT=FOLDER] benchmarks/gpu.sh [--small]" >&2
    exit 2
    ;;
esac

NAME='import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
CARD=$("$PYTHON" -c "$NAME") || exit 2
if [ -z "$CARD" ] && [ -z "$SMALL" ]; then
    echo "gpu.sh: torch sees no GPU: add --small to run the steps on tiny shapes" >&2
    exit 2
fi
SLUG=$(printf %s "${CARD:-none}" | tr -cs 'A-Za-z0-9' - | tr A-Z a-z)
OUT=${OUT:-benchmarks/results/gpu-${SLUG%-}-$(date +%Y-%m-%d)}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT/steps.jsonl"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
FAILED=0

# step NAME SECONDS COMMAND...: run the command, at most so long. Its output goes to OUT/NAME.log.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((TOTAL - SECONDS)) rc=0
    shift 2
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    echo "== $name, at most $limit s: $*"
    if [ "$limit" -le 0 ]; then
        echo "no time is left" | tee "$OUT/$name.log"
        rc=124
    else
        timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || rc=$?
        tail -n 25 "$OUT/$name.log"
    fi
    echo "{\"step\": \"$name\", \"exit_code\": $rc, \"seconds\": $((SECONDS - start))}" >>"$OUT/steps.jsonl"
    if [ "$rc" -ne 0 ]; then FAILED=1; fi
}

# What the scripts import and this machine lacks goes into a folder of its own, not into the environment.
PACKAGES=$(mktemp -d)
trap 'rm -rf "$PACKAGES"' EXIT
export PYTHONPATH=$PYTHONPATH:$PACKAGES
step packages 40 "$PYTHON" benchmarks/gpu.py packages "$PACKAGES"

GPU_TESTS=$(grep -rl --include='test_*.py' 'mark\.gpu' tests) # other tests may import what is not here
if [ -n "$SMALL" ]; then
    TRITON_INTERPRET=1 step oracles 120 "$PYTHON" benchmarks/gpu.py oracles "$OUT/oracles.json" --small
    step tests 60 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider $GPU_TESTS
else
    step oracles 60 "$PYTHON" benchmarks/gpu.py oracles "$OUT/oracles.json"
    KERNEL_EXAMPLES=8 step tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rfE $GPU_TESTS
fi
step kernels 100 "$PYTHON" benchmarks/kernels.py --out "$OUT/kernels.json" $SMALL \
    --without torch.compile TRL Liger torchrl
step attention 40 "$PYTHON" benchmarks/gpu.py attention "$OUT/attention.json" $SMALL
step decode 60 "$PYTHON" benchmarks/gpu.py decode "$OUT/decode.json" $SMALL
step ppo 70 "$PYTHON" benchmarks/gpu.py ppo "$OUT/ppo.json" $SMALL
if [ -z "$SMALL" ]; then # on a CPU, torch.compile would start a C++ compiler, for minutes
    step ppo-compile 100 "$PYTHON" benchmarks/gpu.py ppo "$OUT/ppo-compile.json" --compile
fi

echo "== ${CARD:-no GPU}: logs and JSON in $OUT"
cat "$OUT/steps.jsonl"
exit $FAILED
