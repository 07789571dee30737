#!/bin/bash
# run.sh PYTHON: the RDMA tests in a guest with soft-RoCE devices; PYTHON has jaxdual, for the blocks that are moved.
# Exit status of the tests. What can't be had here (no network, no package) is no failure, but is said loudly.
. "$(dirname "$0")/vm/common.sh"
host_python=$1
export RDMA_UNTIL=$(($(date +%s) + 280)) # the emulator is never left behind
blocks=$cache/out/blocks

exec 9>"$cache/lock"
flock -w 240 9 || { say "another run in this tree does not end"; exit 1; }
status=0
"$vm/prepare.sh" || status=$?
if [ $status -eq $NO_NETWORK ]; then
  echo "===================================================="
  echo "SKIPPED: RDMA was NOT tested, for the reason above."
  echo "===================================================="
  exit 0
fi
[ $status -eq 0 ] || exit $status
cd "$repo"
"$host_python" -m tests.rdma.blocks record "$blocks"
"$vm/boot.sh" 'JAXDUAL_RDMA_BLOCKS=/mnt/blocks /usr/bin/python3 -m pytest --noconftest --color=no -m rdma -rs \
  -k "not (killed_target and verbs-1)" tests/transport/test_contract.py tests/rdma' || status=$?
[ $status -eq 0 ] || exit $status
"$host_python" -m tests.rdma.blocks check "$blocks"
