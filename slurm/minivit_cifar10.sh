#!/usr/bin/env bash
#SBATCH --job-name=minivit_cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Mini ViT on CIFAR-10, fetched before by: oialr data fetch cifar-10
# Settings: slurm/common.sh. A smoke run trains the recipe's own model for four steps.
RECIPE=minivit_cifar10
SAMPLE=cifar-10
smoke() {
  settings+=(--data.data_dir "$samples" --train.steps 4 --train.global_batch 32 --train.evaluations 1
    --oialr.delay 1 --oialr.frequency 1 --checkpoint.every 2)
}

command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
for root in "${OIALR_ROOT:-}" "${command%/slurm/minivit_cifar10.sh*}" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$0")/.."; do
  [[ ! -f $root/slurm/common.sh ]] || break
done
# shellcheck source=common.sh
source "$root/slurm/common.sh"
