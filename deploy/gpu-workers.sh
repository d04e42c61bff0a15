#!/usr/bin/env bash
# One Dask worker for each GPU of this machine, marked with the resource GPU, so that models run there:
#   deploy/gpu-workers.sh tcp://scheduler:8786 --nthreads 4 [more options of `dask worker`]
# CUDA_VISIBLE_DEVICES chooses among the GPUs (SLURM sets it); without it, all that nvidia-smi lists. When one worker ends,
# all do: whoever started this starts it again. WSI_MMM_GPU_DASHBOARD is the port of the first worker's dashboard.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }

[ $# -ge 1 ] || fail "say: $0 SCHEDULER [options of dask worker]"
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
else
    listed=$(nvidia-smi --query-gpu=index --format=csv,noheader) || fail "nvidia-smi finds no GPU here"
    mapfile -t gpus <<<"$listed"
fi
[ -n "${gpus[0]:-}" ] || fail "there is no GPU here"

workers=()
stop() {
    kill "${workers[@]}" 2>/dev/null || true
    wait || true
}
trap 'stop; exit 0' TERM INT
trap stop EXIT

port=${WSI_MMM_GPU_DASHBOARD:-0}
for gpu in "${gpus[@]}"; do
    CUDA_VISIBLE_DEVICES=$gpu dask worker "$@" --nworkers 1 --resources GPU=1 --dashboard-address ":$port" &
    workers+=($!)
    port=0
done
wait -n || fail "a worker ended"
