#!/usr/bin/env bash
#SBATCH --job-name=fashion_mnist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# The demo on Fashion-MNIST, fetched before by: oialr data fetch fashion-mnist. Needs no GPU.
# Settings: slurm/common.sh. A smoke run trains the recipe's own model for four steps.
RECIPE=fashion_mnist_vit
SAMPLE=
smoke() {
  settings+=(--data.limit 2000 --train.steps 4 --train.evaluations 1
    --oialr.delay 1 --oialr.frequency 1 --checkpoint.every 2)
}

command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
for root in "${OIALR_ROOT:-}" "${command%/slurm/fashion_mnist.sh*}" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$0")/.."; do
  [[ ! -f $root/slurm/common.sh ]] || break
done
# shellcheck source=common.sh
source "$root/slurm/common.sh"
