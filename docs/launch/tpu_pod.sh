#!/usr/bin/env bash
# A run on all hosts of a TPU slice, from your own machine:
#
#   export TPU_NAME=zoo ZONE=europe-west4-b ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   export FLAXZOO=git+https://...       # what pip installs: a repository or a wheel
#   export NFS=10.0.0.2:/runs            # a Filestore instance in the same network
#   docs/launch/tpu_pod.sh create        # once
#   docs/launch/tpu_pod.sh setup         # once, and after each `create`
#   docs/launch/tpu_pod.sh train shakespeare --mesh fsdp=16 --batch 64
#   docs/launch/tpu_pod.sh train /mnt/runs/shakespeare     # goes on, also on a slice of another size
#   docs/launch/tpu_pod.sh delete
set -euo pipefail

: "${TPU_NAME:?}" "${ZONE:?}"

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

case $1 in
create)
  gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" \
    --accelerator-type="${ACCELERATOR_TYPE:?}" --version="${RUNTIME_VERSION:?}" "${@:2}" # e.g. --spot
  ;;
setup)
  everywhere "set -e
    sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
    sudo mkdir -p /mnt/runs && mountpoint -q /mnt/runs || sudo mount -t nfs '${NFS:?}' /mnt/runs
    sudo chmod a+rwx /mnt/runs
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --python 3.12 ~/zoo
    ~/.local/bin/uv pip install --python ~/zoo 'flaxzoo[tpu] @ ${FLAXZOO:?}'"
  ;;
delete)
  gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE"
  ;;
train)
  # A tmux session on each host outlives the connection; the first host's log is that of the run.
  command=$(printf '%q ' ./zoo/bin/zoo "$@" --runs /mnt/runs)
  everywhere "tmux new-session -d -s zoo \"$command > ~/zoo.log 2>&1\""
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=0 --command='tail -f ~/zoo.log'
  ;;
*)
  everywhere "./zoo/bin/zoo $(printf '%q ' "$@")" # generate, eval
  ;;
esac
