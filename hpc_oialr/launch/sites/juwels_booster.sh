# shellcheck shell=bash disable=SC2034
# JUWELS Booster (FZJ): 4 NVIDIA A100 and 48 cores a node. Written from
# https://apps.fz-juelich.de/jsc/hps/juwels/booster-overview.html and .../batchsystem.html, not tried there.
# Account: export SBATCH_ACCOUNT=...; OIALR_PARTITION=develbooster for tests, largebooster above 256 nodes.
SITE_SBATCH=(--partition="${OIALR_PARTITION:-booster}" --gres=gpu:4 --cpus-per-task=12)
SITE_SRUN=(--threads-per-core=1)
SITE_MPI=

[[ -n ${SLURM_JOB_ID:-} ]] || return 0

# A virtual environment made with the cluster's Python needs the same modules again.
# shellcheck disable=SC2086
[[ -z ${OIALR_MODULES:-} ]] || module load $OIALR_MODULES
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
# A node's plain name is its Ethernet, which compute nodes of different cells do not share; with an i behind, it
# is its InfiniBand.
if [[ -z ${MASTER_ADDR:-} ]]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)i
  export MASTER_ADDR
fi
: "${OIALR_RUNS:=${SCRATCH:+$SCRATCH/runs}}"
