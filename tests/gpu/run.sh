#!/usr/bin/env bash
# GPU tests (those of the kernels run compiled), then the benchmarks of kernels and trainer. Installs nothing.
# OUT: folder of the CSV files (default docs/results/gpu). BUDGET: seconds for the kernels' benchmark (default 300).
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="protos:models:cloud:edge:tests${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA device, torch sees none")'
"$python" -c 'import torch; print("GPU:", torch.cuda.get_device_name(0), "torch", torch.__version__)'
"$python" -m pytest -q -p no:cacheprovider -o asyncio_mode=auto -o addopts="--import-mode=importlib" -o filterwarnings=default \
  -o timeout=0 -o asyncio_default_fixture_loop_scope=function -W ignore::pytest.PytestConfigWarning tests/gpu tests/cloud/kernels
out=${OUT:-docs/results/gpu}
"$python" tests/benchmarks/kernels/bench_kernels.py --device cuda --budget "${BUDGET:-300}" --csv "$out/kernels.csv"
"$python" tests/benchmarks/bench_training.py --device cuda --threads 1 --csv "$out/training.csv"
