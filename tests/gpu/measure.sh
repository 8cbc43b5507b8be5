#!/usr/bin/env bash
# GPU tests, then the throughput of every model shape, in under nine minutes on one GPU.
#
#     tests/gpu/measure.sh
#     OUT=runs/h100 WHEELS=wheels tests/gpu/measure.sh
#
# Leaves measure.md (a table), measure.json and tests.log in $OUT (default: runs/gpu). Needs torch, transformers,
# accelerate, peft and pytest, and no network. WHEELS names a folder of wheels for what the image lacks (bitsandbytes,
# flash-attn …): they are installed into a temporary folder, without their dependencies. Without a GPU the shapes are
# toys, which shows that it works.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$WHEELS" --target "$extra" "$WHEELS"/*.whl
fi
export PYTHONPATH="$extra:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null; then
    on_cpu=0 sizes=()
else
    echo "no GPU: toy shapes, and the GPU tests that a CPU can run"
    on_cpu=1 sizes=(--batch-sizes 8 --steps 5 --rounds 1)
fi
"$python" - <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version

names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "flash-attn")
found = {}
for name in names:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "not installed"
print(f"python {sys.version.split()[0]},", ", ".join(f"{name} {value}" for name, value in found.items()))
END

tests_failed=0
ZEROTUNE_GPU_TESTS_ON_CPU=$on_cpu timeout 120 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider \
    >"$out/tests.log" 2>&1 || tests_failed=$?
tail -n 15 "$out/tests.log"
if [[ $tests_failed == 124 ]]; then
    summary="stopped after 120 s"
else
    summary=$(tail -n 1 "$out/tests.log")
fi

timeout 400 "$python" tests/benchmarks/throughput.py --limit-s 380 "${sizes[@]}" \
    --note "GPU tests: $summary" --markdown "$out/measure.md" --output "$out/measure.json"
echo "$out/measure.md and $out/measure.json"
exit "$tests_failed"
