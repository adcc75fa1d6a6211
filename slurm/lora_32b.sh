#!/usr/bin/env bash
# KDRL of R1-Distill-Qwen-32B with LoRA and the teacher Skywork-OR1-32B, on 4 GPUs of one node:
#
#     sbatch slurm/lora_32b.sh [key=value ...]        the overrides of kdrl_mcore.train; experiment=NAME runs another one
#
# One node is enough; for more of them set cluster.nodes, as with kdrl_70b.sh. Options that your site requires (--account,
# --partition, --time, --gpus-per-node) go before the script's name. See docs/lora.md and docs/slurm.md.
#SBATCH --job-name=lora_32b
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# If a node is preempted or fails, the job goes back to the queue and resumes from its last checkpoint.
#SBATCH --requeue
# Seconds before the time limit at which the job must save and requeue: more than one training step and one checkpoint take.
#SBATCH --signal=B:USR1@900

# SLURM runs a copy of this file; scontrol shows the original's path, next to which launch.sh is.
if [[ -n ${KDRL_ROOT:-} ]]; then
  scripts=$KDRL_ROOT/slurm
  [[ -d $scripts ]] || scripts=$KDRL_ROOT
else
  scripts=$(dirname "${BASH_SOURCE[0]}")
  [[ -f $scripts/launch.sh ]] || scripts=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
    sed -n 's|/[^/]*\.sh\( .*\)\?$||; s|^ *Command=||p' | head -n 1)
  [[ -f $scripts/launch.sh ]] || scripts=${SLURM_SUBMIT_DIR:-.}/slurm
fi
source "$scripts/launch.sh" || {
  echo "error: $scripts has no launch.sh: submit a script from the repository's slurm folder, or from one that kdrl-slurm wrote, or set \
KDRL_ROOT to either" >&2
  exit 1
}
launch lora_32b "$@"
