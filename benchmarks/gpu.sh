#!/usr/bin/env bash
# Checks and times everything that has a GPU path, prints a short table and stores one JSON named
# after the device. Needs a CUDA build of torch >= 2.11 and transformers >= 5 in the Python given.
#   benchmarks/gpu.sh            all checks and sizes (about 8 minutes on one large GPU)
#   benchmarks/gpu.sh --smoke    the same code on tiny shapes, on whatever device there is
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
