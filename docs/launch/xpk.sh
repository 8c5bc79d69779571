#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster made by xpk, with runs/ on Filestore:
#
#   export PROJECT=my-project ZONE=europe-west4-b CLUSTER=my-cluster IMAGE=europe-docker.pkg.dev/my-project/zoo/zoo
#   xpk storage create zoo-runs --project=$PROJECT --zone=$ZONE --cluster=$CLUSTER --type=gcpfilestore --size=1024 \
#     --vol=runs --mount-point=/mnt/runs --readonly=false --access-mode=ReadWriteMany    # once
#   docs/launch/xpk.sh my-run v5litepod-16 shakespeare --mesh fsdp=16 --batch 64
#
# The same command again goes on with the run. GKE restarts it after an eviction, and it goes on by itself.
set -euo pipefail

workload=$1 tpu=$2
shift 2
command=$(printf '%q ' exec zoo train "$@" --name "$workload" --runs /mnt/runs)
xpk workload create --project="${PROJECT:?}" --zone="${ZONE:?}" --cluster="${CLUSTER:?}" \
  --workload="$workload" --tpu-type="$tpu" --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?}" --storage=zoo-runs --command="$command" \
  --max-restarts=20 --termination-grace-period-seconds=120
