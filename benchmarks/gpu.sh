#!/usr/bin/env bash
# On a CUDA machine: build csrc, run the GPU tests, look for bad memory accesses, measure. `make gpu` calls this.
#   PYTHON    an interpreter with a CUDA torch, Triton, safetensors, pytest and setuptools   (default: python3)
#   RESULTS   where the JSON files go                                          (default: benchmarks/results)
#   STEPS     which of the parts to do                                         (default: all of them)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
STEPS=${STEPS:-build test sanitize bench}
mkdir -p "$RESULTS"

wanted() { [[ " $STEPS " == *" $1 "* ]]; }
measure() { local name=$1; shift; "$PYTHON" -m childtune_kernels bench --device cuda --json "$RESULTS/$GPU-$name.json" "$@"; }

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace("NVIDIA", "").strip().replace(" ", "-").lower())')

if wanted build; then
    CHILDTUNE_BUILD_EXT=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
    "$PYTHON" -m childtune_kernels doctor
fi
if wanted test; then
    CHILDTUNE_REQUIRE_CSRC=1 "$PYTHON" -m pytest -q -m gpu tests
fi
if wanted sanitize; then
    compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
fi
if wanted bench; then
    rest=(clustered "packed gradient" "D p=0.3")
    measure bert-large-float32 --model bert-large --dtype float32 --skip "${rest[@]}"
    measure bert-large-bfloat16 --model bert-large --dtype bfloat16 --skip compiled released "${rest[@]}"  # minutes
    measure bert-large-float32-group-each --model bert-large --group-each --only ours "torch AdamW fused" \
        --skip "${rest[@]}"
    measure llama-7b-bfloat16 --model llama-7b --dtype bfloat16 --only "ours (triton)" "torch AdamW fused" --repeats 10 \
        --skip "${rest[@]}"
    for dtype in float32 bfloat16; do
        measure "bert-large-$dtype-child" --model bert-large --dtype "$dtype" --only "ours (triton)" "torch AdamW fused"
    done
    for what in fisher selection masks memory; do
        PYTHONPATH=. "$PYTHON" "benchmarks/bench_$what.py" "$RESULTS/$GPU-$what.json"
    done
fi
