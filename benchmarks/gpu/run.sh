#!/usr/bin/env bash
# Everything that a machine with one GPU can show of trimtab, within eight minutes: correctness first, then numbers.
#
#   benchmarks/gpu/run.sh                     with the Python of .venv, or PYTHON
#   benchmarks/gpu/run.sh --install           installs the wheels below first (pip, the versions of constraints.txt)
#   benchmarks/gpu/run.sh --device cpu --tiny what CI runs: the same sections, minutes shorter, so that they cannot rot
#
# Each section writes its JSON into --out (default: runs/gpu) as it ends; one that fails does not stop the next.
# WHEELS_DIR=DIR takes wheels from a folder only, for machines without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# All that is needed beside Python 3.11 or later. trimtab itself is read from src/. A C compiler is used if there is one.
WHEELS="torch triton transformers safetensors numpy pydantic pyyaml typer rich psutil filelock platformdirs \
trl accelerate datasets gguf compressed-tensors peft bitsandbytes pytest"

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if [ "${1:-}" = "--install" ]; then
    shift
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet -c constraints.txt ${WHEELS_DIR:+--no-index --find-links "$WHEELS_DIR"} $WHEELS
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" TRIMTAB_CACHE="${TRIMTAB_CACHE:-$PWD/runs/gpu-kernels}"
export TOKENIZERS_PARALLELISM=false
exec "$PYTHON" benchmarks/gpu/run.py "$@"
