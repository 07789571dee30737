#!/bin/bash
# run.sh PYTHON: the RDMA tests in a guest with soft-RoCE devices; PYTHON has jaxdual, for the blocks that are moved.
# Exit status of the tests. What can't be had here (no network, no package) is no failure, but is said loudly.
. "$(dirname "$0")/vm/common.sh"
host_python=$1
blocks=$cache/out/blocks limit=240

# The emulator is never left behind. JAX in it takes two minutes, or more than four on a busy machine.
boot() { RDMA_UNTIL=$(($(date +%s) + limit)) "$vm/boot.sh" "$@"; }

skipped() {
  echo "===================================================="
  echo "SKIPPED: $1 NOT tested, for the reason above."
  echo "===================================================="
}

exec 9>"$cache/lock"
flock -w 240 9 || { say "another run in this tree does not end"; exit 1; }
cd "$repo"
mkdir -p "$cache/out"
"$host_python" -m tests.rdma.blocks record "$blocks" &
recorded=$! status=0
"$vm/prepare.sh" || status=$?
wait $recorded
if [ $status -eq $NO_NETWORK ]; then
  skipped "RDMA was"
  exit 0
fi
[ $status -eq 0 ] || exit $status

"$vm/site.sh" "$host_python" & # beside the first guest, which has one processor
packages=$!
trap 'kill $packages 2>/dev/null || :; wait $packages 2>/dev/null || :' EXIT # errexit holds in traps, too
boot 'JAXDUAL_RDMA_BLOCKS=/mnt/blocks /usr/bin/python3 -m pytest --noconftest --color=no -m rdma -rs \
  -k "not (killed_target and verbs-1)" tests/transport/test_contract.py tests/rdma' || exit
"$host_python" -m tests.rdma.blocks check "$blocks"

wait $packages || status=$?
if [ $status -eq $NO_NETWORK ]; then
  skipped "engines over RDMA were"
  exit 0
fi
[ $status -eq 0 ] || exit $status
limit=330
# Compiled as fast as can be: the emulator is slow, and the programs run a few times.
boot --site 'export JAX_PLATFORMS=cpu NO_COLOR=1
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  /usr/bin/python3 -m tests.rdma.cluster /mnt/blocks'
