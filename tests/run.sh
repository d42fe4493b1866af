#!/usr/bin/env bash
# Every test: style and types, the fast unit tests, the slow ones, then those of real processes and browsers.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start here, each of which would compile the package again
make --no-print-directory check
python -m pytest -q -n 2 --dist loadfile -m "not slow and not e2e and not browser and not gpu" "$@"
python -m pytest -q -n 2 --dist loadfile -m "slow and not e2e and not browser and not gpu" "$@"
python -m pytest -q -n 2 --dist loadfile -m "(e2e or browser) and not gpu" "$@"
