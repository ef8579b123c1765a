#!/usr/bin/env bash
#SBATCH --job-name=tokens_llama
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Llama on token files: sbatch slurm/tokens_llama.sh --data.path FOLDER --model.vocabulary TOKENS
# Settings: slurm/common.sh. A smoke run trains a small model on bytes for four steps.
RECIPE=tokens_llama
SAMPLE=
smoke() {
  settings+=(--data TextFolder --data.path "$root/hpc_oialr" --data.sequence_length 64
    --model.dim 64 --model.depth 2 --model.heads 4 --model.mlp_dim 160 --model.vocabulary 256
    --train.steps 4 --train.global_batch 8 --train.evaluations 1
    --oialr.delay 1 --oialr.frequency 1 --checkpoint.every 2)
}

command=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}')
for root in "${OIALR_ROOT:-}" "${command%/slurm/tokens_llama.sh*}" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$0")/.."; do
  [[ ! -f $root/slurm/common.sh ]] || break
done
# shellcheck source=common.sh
source "$root/slurm/common.sh"
