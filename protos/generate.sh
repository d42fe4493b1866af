#!/usr/bin/env bash
# Regenerates the committed protobuf code; `generate.sh --check` fails when it differs from the schemas.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
target=.
if [ "${1:-}" = "--check" ]; then
  target=$(mktemp -d)
  trap 'rm -rf "$target"' EXIT
fi
bin=$(dirname "$(command -v "$python")")
export PATH="$bin:$PATH"
"$python" -m grpc_tools.protoc -I . --python_out="$target" --mypy_out="quiet:$target" wearfleet_protos/v1/*.proto
services=$(grep -l '^service ' wearfleet_protos/v1/*.proto)
# shellcheck disable=SC2086
"$python" -m grpc_tools.protoc -I . --grpc_python_out="$target" --mypy_grpc_out="quiet:$target" $services
if [ "$target" != . ]; then
  for file in "$target"/wearfleet_protos/v1/*; do
    cmp "$file" "wearfleet_protos/v1/$(basename "$file")" || {
      echo "generated code is out of date: run protos/generate.sh and commit" >&2
      exit 1
    }
  done
fi
