#!/usr/bin/env bash
# Every benchmark that needs no GPU, one after the other, on a machine that does nothing else. Results: docs/results/cpu/.
# FLOWER_PYTHON=path uses an environment with Flower 1.41 that is there; otherwise .venv-flower is made.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PATH:/usr/sbin" OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
results=${RESULTS:-docs/results/cpu}
mkdir -p "$results"
run() {
  echo "== $* (load $(cut -d' ' -f1 /proc/loadavg))" >&2
  python "tests/benchmarks/$1.py" "${@:2}"
}
run bench_round --out "$results/round.csv" ${FLOWER_PYTHON:+--flower-python "$FLOWER_PYTHON"}
run bench_ingest --out "$results/ingest.csv"
run bench_inference --out "$results/inference.csv"
run bench_edge --out "$results/edge.json"
run bench_plan --csv "$results/plan.csv"
run bench_training --csv "$results/training.csv"
run bench_simulation --csv "$results/simulation.csv"
run bench_page > "$results/page.jsonl"
run kernels/bench_kernels --device cpu --only coral margin gradient_variance --sizes wearable --dtypes float32 \
  --without-compile --seconds 0.3 --csv "$results/kernels.csv"
