#!/usr/bin/env bash
# Measure zerotune on one GPU, and run the GPU tests, in under nine minutes.
#
#     OUT=runs/h200 tests/gpu/measure.sh
#     OUT=runs/h200 WHEELS=wheels SECONDS_TOTAL=520 tests/gpu/measure.sh
#     tests/gpu/measure.sh --only train/Llama --no-tests
#
# Needs torch, transformers, accelerate, peft and pytest, but no network; models have random weights. WHEELS names a
# folder of wheels for packages the machine lacks (bitsandbytes for QLoRA, deepspeed, flash-attn): they are installed
# into a temporary folder without their dependencies. Without a GPU the same code runs on toy sizes in three minutes.
#
# $OUT (default: runs/gpu) gets measure.md (tables) and rows.jsonl (all figures), both updated after every measurement,
# and tests.log and worker.log. The most important measurements come first; those for which SECONDS_TOTAL leaves no time
# are listed at the end. Flags go to measure.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-deps --no-index --no-compile --target "$extra" "$WHEELS"/*.whl
    for package in "$extra"/{bitsandbytes,deepspeed,flash_attn}; do
        # remove what does not import: other libraries assume that an installed package works, and would fail
        { [[ ! -d $package ]] || PYTHONPATH=$extra "$python" -c "import ${package##*/}" || rm -rf "$package"; } &
    done
    wait
fi
export PYTHONPATH="$extra:$PWD:$PWD/tests:$PWD/tests/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # the Trainer would spread over all that it sees

if ! nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null; then
    echo "no GPU: toy sizes, and the GPU tests that a CPU can run"
    export ZEROTUNE_GPU_TESTS_ON_CPU=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
"$python" tests/gpu/measure.py --output "$out" --seconds-total "$((${SECONDS_TOTAL:-520} - SECONDS))" "$@"
