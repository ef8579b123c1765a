# shellcheck shell=bash disable=SC2034
# Perlmutter (NERSC): 4 NVIDIA A100 and 64 cores, 128 threads, a GPU node. Written from
# https://docs.nersc.gov/systems/perlmutter/running-jobs/ and https://docs.nersc.gov/jobs/, not tried there.
# Account: export SBATCH_ACCOUNT=m0000_g, a project's GPU account. OIALR_QOS=debug, preempt or regular.
SITE_SBATCH=(--constraint=gpu --qos="${OIALR_QOS:-regular}" --gpus-per-node=4 --cpus-per-task=32)
SITE_SRUN=(--cpu-bind=cores)
# mpi4py on Cray MPICH; without MPI nothing is needed.
SITE_MPI=${OIALR_MODULES:+cray_shasta}

[[ -n ${SLURM_JOB_ID:-} ]] || return 0

# NCCL over Slingshot needs the cluster's plug-in: OIALR_MODULES="nccl-plugin", or the pytorch module.
# shellcheck disable=SC2086
[[ -z ${OIALR_MODULES:-} ]] || module load $OIALR_MODULES
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-hsn} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-hsn0}
: "${OIALR_RUNS:=${PSCRATCH:+$PSCRATCH/runs}}"
