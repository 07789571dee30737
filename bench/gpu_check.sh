#!/usr/bin/env bash
# Everything that a GPU machine is needed for, in under ten minutes, from the tracked files alone:
#   bench/gpu_check.sh OUT_DIR
# leaves battery.json, tuning.json, kernels.json, selection.json, engine.json, router_counting.json and cluster.json in
# OUT_DIR. A part that fails or takes too long does not keep the others from running; the exit status is 1 if one did.
# Runs in $PYTHON, else .venv/, else python3, which needs jax with CUDA, flax, jaxtyping, pytest, tokenizers and
# safetensors, and for clusters msgspec, xxhash and obstore: without these cluster.json says so.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bench/gpu_check.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  echo "no GPU that JAX can use; nothing was measured" >&2
  exit 2
fi
status=0
part() { # NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$python" -m "$@" --json "$out/$name.json" || { echo "== $name: exit status $?"; status=1; }
}
# Less than 600 seconds together, and some to spare for the check above.
part battery 130 bench.device_battery
part tuning 85 bench.tune --seconds 50
part kernels 110 bench.kernels --seconds 80
part selection 30 bench.selection --sequences 1 16 --seconds 20
part engine 115 bench.device_engine
part router_counting 50 bench.router_counting --steps 160
part cluster 75 bench.device_cluster
exit $status
