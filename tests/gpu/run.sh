#!/usr/bin/env bash
# GPU tests (those of the kernels run compiled), then the benchmarks of kernels and trainer. Installs nothing.
# A process an operation, so that one that breaks the device's context breaks no other; none with a red test is measured.
# OUT: folder of CSV files, tables and plots (default docs/results/gpu). BUDGET: seconds for the kernels' benchmark, which
# takes every operation's first shape before any second one (default: all shapes, most of an hour of compiling).
# DEVICE=cpu tries the script itself out, on a machine without a GPU: a few shapes, kernels in Triton's interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="protos:models:cloud:edge:tests${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-docs/results/gpu} failed=0 green=() quick=()
if [[ $device == cuda ]]; then
  "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA device, torch sees none")'
  "$python" -c 'import torch; print("GPU:", torch.cuda.get_device_name(0), "torch", torch.__version__)'
else
  quick=(--sizes wearable --dtypes float32 --seconds 0.01 --without-compile)
fi

tests() { # pytest without the plugins that pyproject.toml configures
  "$python" -m pytest -q -p no:cacheprovider -o asyncio_mode=auto -o addopts="--import-mode=importlib" -o filterwarnings=default \
    -o timeout=0 -o asyncio_default_fixture_loop_scope=function -W ignore::pytest.PytestConfigWarning "$@"
}

for folder in cloud/wearfleet_cloud/kernels/*/kernel.py; do
  operation=$(basename "$(dirname "$folder")")
  echo "== $operation"
  if tests tests/cloud/kernels/test_"$operation"*.py; then green+=("$operation"); else failed=1; fi
done
tests tests/cloud/kernels/test_{operation,dispatch,memory}.py || failed=1
if [[ $device == cuda ]]; then tests tests/gpu || failed=1; fi

if ((${#green[@]})); then
  "$python" tests/benchmarks/kernels/bench_kernels.py --device "$device" --only "${green[@]}" --budget "${BUDGET:-inf}" \
    --csv "$out/kernels.csv" "${quick[@]}" || failed=1
  "$python" tests/benchmarks/kernels/kernel_report.py "$out/kernels.csv" --out "$out/kernels"
fi
"$python" tests/benchmarks/bench_training.py --device "$device" --threads 1 --csv "$out/training.csv" || failed=1
exit $failed
