#!/bin/sh
# requeue.sh CODE: the last command of a batch script. Requeues the job if its run, which exited with CODE (see
# hpc_oialr/exit_codes.py), was stopped before its end and can be resumed, OIALR_MAX_REQUEUES times at most. Exits with
# CODE. Plain sh, since a host that runs images may have no Python.
case ${1:-} in
  '' | *[!0-9]*)
    echo 'usage: requeue.sh EXIT_CODE_OF_THE_RUN' >&2
    exit 2
    ;;
esac
code=$1
job=${SLURM_JOB_ID:-}
# The last task of an array has the number of the whole array.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
limit=${OIALR_MAX_REQUEUES:-20}

leave() {
  [ $# -eq 0 ] || echo "oialr: $1" >&2
  exit "$code"
}

if [ "$code" -eq 75 ]; then
  why='stopped with a checkpoint'
elif [ "$code" -eq 76 ]; then
  why='a process was lost'
elif [ "$code" -gt 128 ] && [ "$code" -le 192 ] && [ "$code" -ne 130 ]; then
  # 130: somebody at a terminal, not the batch system.
  why="killed by signal $((code - 128))"
else
  leave
fi
[ -n "$job" ] || leave
case $limit in
  *[!0-9]*) leave "OIALR_MAX_REQUEUES is '$limit' (from the environment); must be a whole number." ;;
esac
# scancel, scontrol requeue and preemption have decided already: a requeue now would bring a cancelled job back.
known=" $(scontrol --oneliner show job "$job" 2>/dev/null) "
case $known in
  *' JobState=RUNNING '* | *' Reason=TimeLimit '*) ;;
  *' JobState='*) leave "$why; Slurm ends job $job itself, nothing to do" ;;
esac
if [ "$restarts" -ge "$limit" ]; then
  leave "$why; job $job was requeued $restarts times, of $limit. To continue: submit the same command with the same run \
folder again, or raise OIALR_MAX_REQUEUES above $limit"
fi
echo "oialr: $why; requeue $((restarts + 1)) of $limit" >&2
if ! command -v scontrol >/dev/null 2>&1; then
  said='there is no scontrol here'
elif said=$(scontrol requeue "$job" 2>&1); then
  leave
fi
leave "scontrol requeue $job: $said. Where Slurm's programs are, outside of a container, type: scontrol requeue $job"
