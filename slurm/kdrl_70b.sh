#!/usr/bin/env bash
# KDRL of R1-Distill-Llama-70B with a teacher you name (any model with the same tokenizer):
#
#     sbatch slurm/kdrl_70b.sh teacher.path=DIR [key=value ...]  the overrides of kdrl_mcore.train; experiment=NAME runs another one
#
# The number of nodes comes from cluster.nodes: the job starts on one node and checks the configuration there. If it needs more
# nodes, it goes back to the queue, with the same job id, and requests them; `sbatch --nodes=32 slurm/kdrl_70b.sh` saves that
# step. Options that your site requires (--account, --partition, --time, --gpus-per-node) go before the script's name. See
# docs/slurm.md.
#SBATCH --job-name=kdrl_70b
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
launch kdrl_70b "$@"
