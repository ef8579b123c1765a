# shellcheck shell=bash
# What every batch script does around its run; sourced by slurm/common.sh and by the scripts of `oialr submit`.

# The last thing a job does.
oialr_launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
trap 'sh "$oialr_launch/requeue.sh" "$?"' EXIT

# Signals may reach this shell alone: #SBATCH --signal=B:USR2@120, scancel --batch. bash would end by them, or act on
# them only after srun. TERM is what Slurm ends a job with, and sends to all processes itself.
oialr_run='' oialr_signal=''
oialr_forward() {
  oialr_signal=$1
  # srun hands on USR1 and USR2, but kills its tasks upon HUP.
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

# Slurm's srun, which hands on to the processes what reaches this shell; its code.
srun() {
  local code
  # HDF5 locks files in a way that parallel file systems do not have.
  export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Since 22.05 srun does not take this from the job.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # One process that dies ends the step, instead of leaving the others waiting.
  command srun --kill-on-bad-exit=1 --wait=60 "$@" &
  oialr_run=$!
  [[ -z $oialr_signal ]] || oialr_forward "$oialr_signal"
  while :; do
    oialr_signal='' code=0
    wait "$oialr_run" || code=$?
    # A signal may have ended the waiting, and not srun.
    [[ -n $oialr_signal ]] || break
  done
  oialr_run=
  return "$code"
}
