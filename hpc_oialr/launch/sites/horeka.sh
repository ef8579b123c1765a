# shellcheck shell=bash disable=SC2034
# HoreKa (KIT): 4 NVIDIA A100 a node. Written from https://www.nhr.kit.edu/userdocs/horeka/batch/, not tried there.
# OIALR_PARTITION=accelerated-h100 for the nodes with H100. Account: export SBATCH_ACCOUNT=hk-project-...
SITE_SBATCH=(--partition="${OIALR_PARTITION:-accelerated}" --gres=gpu:4)
SITE_SRUN=()
# The cluster's Open MPI speaks PMIx; OIALR_MODULES="compiler/gnu mpi/openmpi" brings it.
SITE_MPI=${OIALR_MODULES:+pmix}

[[ -n ${SLURM_JOB_ID:-} ]] || return 0

# shellcheck disable=SC2086
[[ -z ${OIALR_MODULES:-} ]] || module load $OIALR_MODULES
# IP over InfiniBand; NCCL itself talks InfiniBand.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
# Run folders belong into a workspace (ws_allocate NAME DAYS): export OIALR_RUNS="$(ws_find NAME)/runs"
