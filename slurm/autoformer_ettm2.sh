#!/usr/bin/env bash
#SBATCH --job-name=autoformer_ettm2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Autoformer on ETTm2, fetched before by: oialr data fetch ettm2
# Settings: slurm/common.sh. A smoke run trains the recipe's own model for four steps.
RECIPE=autoformer_ettm2
SAMPLE=ettm2
smoke() {
  settings+=(--data.path "$samples" --data.split_steps "[7000,400,400]" --train.steps 4 --train.global_batch 8
    --train.evaluations 1 --oialr.delay 1 --oialr.frequency 1 --checkpoint.every 2)
}

command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
for root in "${OIALR_ROOT:-}" "${command%/slurm/autoformer_ettm2.sh*}" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$0")/.."; do
  [[ ! -f $root/slurm/common.sh ]] || break
done
# shellcheck source=common.sh
source "$root/slurm/common.sh"
