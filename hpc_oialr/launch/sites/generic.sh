# shellcheck shell=bash disable=SC2034
# Any cluster. A site file is sourced twice: where a job is submitted, for SITE_SBATCH, and in the job.
# Copy this one to any place and take it by SITE=/path/NAME.sh or --site /path/NAME.sh.

# Options of sbatch that every job needs here: partition, constraint, GPUs. The account is yours:
# export SBATCH_ACCOUNT=... once, or --account=... on the command line.
SITE_SBATCH=()
# Options of srun: CPU binding and the like.
SITE_SRUN=()
# What srun needs for an MPI library: pmix (Open MPI), pmi2 (MPICH, Intel MPI), cray_shasta; empty without MPI.
SITE_MPI=

[[ -n ${SLURM_JOB_ID:-} ]] || return 0

# What follows is for the job. PyTorch's packages bring CUDA and NCCL with them; for MPI, or a Python of the
# cluster: OIALR_MODULES="names of modules".
# shellcheck disable=SC2086
[[ -z ${OIALR_MODULES:-} ]] || module load $OIALR_MODULES
# Networks by name, where there are several: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Where run folders go, if not into ./runs: : "${OIALR_RUNS:=$SCRATCH/runs}"
