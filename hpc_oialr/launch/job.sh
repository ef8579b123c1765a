# shellcheck shell=bash
# Requeue, signals and srun of every batch script; sourced by slurm/common.sh and by the scripts of `oialr submit`.

# The last thing a job does.
oialr_launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
trap 'sh "$oialr_launch/requeue.sh" "$?"' EXIT

# Signals may reach this shell only: #SBATCH --signal=B:USR2@120, scancel --batch. They would end bash, or be handled
# only after srun. TERM ends a job, and Slurm sends it to all processes itself.
oialr_run='' oialr_signal=''
oialr_forward() {
  oialr_signal=$1
  # srun forwards USR1 and USR2, but kills its tasks upon HUP.
  case $1 in
    TERM) ;;
    HUP) [[ -z $oialr_run ]] || kill -s USR2 "$oialr_run" 2>/dev/null || true ;;
    *) [[ -z $oialr_run ]] || kill -s "$1" "$oialr_run" 2>/dev/null || true ;;
  esac
}
for oialr_each in USR2 USR1 HUP TERM; do
  # shellcheck disable=SC2064
  trap "oialr_forward $oialr_each" "$oialr_each"
done

# Runs Slurm's srun, forwards signals to it, and returns its code.
srun() {
  local code
  # HDF5 locks files, which some parallel file systems do not support.
  export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Since Slurm 22.05 srun does not inherit --cpus-per-task from the job.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # One process that dies ends the step, instead of leaving the others waiting.
  command srun --kill-on-bad-exit=1 --wait=60 "$@" &
  oialr_run=$!
  [[ -z $oialr_signal ]] || oialr_forward "$oialr_signal"
  while :; do
    oialr_signal='' code=0
    wait "$oialr_run" || code=$?
    # A signal may have interrupted wait while srun goes on.
    [[ -n $oialr_signal ]] || break
  done
  oialr_run=
  return "$code"
}
