#!/usr/bin/env bash
#SBATCH --job-name=resnet_rs101
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# ResNet-RS 101 on ImageNet: sbatch slurm/resnet_rs101.sh --data.path FOLDER
# Settings: slurm/common.sh. A smoke run trains transformers' ResNet, which needs no timm, for four steps.
RECIPE=resnet_rs101
SAMPLE=imagenet
smoke() {
  settings+=(--data.path "$samples" --train.steps 4 --train.global_batch 8 --train.evaluations 1 --model.library transformers
    --oialr.delay 1 --oialr.frequency 1 --checkpoint.every 2)
}

command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
for root in "${OIALR_ROOT:-}" "${command%/slurm/resnet_rs101.sh*}" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$0")/.."; do
  [[ ! -f $root/slurm/common.sh ]] || break
done
# shellcheck source=common.sh
source "$root/slurm/common.sh"
