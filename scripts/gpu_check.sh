#!/usr/bin/env bash
# One command for a machine with a CUDA device and torch, without a network: tests, equality, speed and memory, in under
# nine minutes. docs/benchmarks.md says what it measures and how to fill DIR with what the machine lacks.
#
#   scripts/gpu_check.sh [--wheels DIR] [options of scripts/gpu_check.py, see --help]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ "${1:-}" = --wheels ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${2:?a folder}"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  shift 2
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$PYTHON" scripts/gpu_check.py "$@"
