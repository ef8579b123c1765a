# shellcheck shell=bash disable=SC2034
# LUMI-G (CSC): 4 AMD MI250X, which are 8 GPUs to a program, a node. Written from
# https://docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/lumig-job/ and .../distribution-binding/, not tried there.
# Account: export SBATCH_ACCOUNT=project_... A PyTorch for ROCm is needed, best as a container (OIALR_IMAGE).
SITE_SBATCH=(
  --partition="${OIALR_PARTITION:-standard-g}" --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=7
)
# The cores beside each GPU, in the order of the GPUs; the first core of every eight is left to the system.
SITE_SRUN=(
  "--cpu-bind=mask_cpu:fe000000000000,fe00000000000000,fe0000,fe000000,fe,fe00,fe00000000,fe0000000000"
)
SITE_MPI=

[[ -n ${SLURM_JOB_ID:-} ]] || return 0

# shellcheck disable=SC2086
[[ -z ${OIALR_MODULES:-} ]] || module load $OIALR_MODULES
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-hsn0,hsn1,hsn2,hsn3} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-hsn0}
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PHB}
# MIOpen's database is locked by file locks, which hang on Lustre.
export MIOPEN_USER_DB_PATH=${MIOPEN_USER_DB_PATH:-/tmp/miopen-$USER-$SLURM_JOB_ID}
export MIOPEN_CUSTOM_CACHE_DIR=${MIOPEN_CUSTOM_CACHE_DIR:-$MIOPEN_USER_DB_PATH}
: "${OIALR_RUNS:=${SLURM_JOB_ACCOUNT:+/scratch/$SLURM_JOB_ACCOUNT/runs}}"
