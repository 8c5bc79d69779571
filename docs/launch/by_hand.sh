#!/usr/bin/env bash
# The same on every machine, with its own number: `FIRST=10.0.0.1 by_hand.sh 0 shakespeare --batch 64` on the first (that
# is its address), `FIRST=10.0.0.1 by_hand.sh 1 shakespeare --batch 64` on the second. All must share the folder RUNS.
set -euo pipefail

export JAX_COORDINATOR_ADDRESS=${FIRST:?}:${PORT:-8476} # process 0 listens here
export JAX_NUM_PROCESSES=${MACHINES:-2}
export JAX_PROCESS_ID=$1
shift
exec zoo train "$@" --runs "${RUNS:-/shared/runs}"
