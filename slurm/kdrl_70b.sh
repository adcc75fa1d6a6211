#!/usr/bin/env bash
# KDRL of R1-Distill-Llama-70B with a teacher you name (any model with the same tokenizer):
#
#     sbatch slurm/kdrl_70b.sh teacher.path=DIR [key=value ...]  the overrides of kdrl_mcore.train; experiment=NAME runs another one
#
# The job asks for as many nodes as cluster.nodes says: it starts on one node, checks the configuration there, and if it needs
# more it goes back to the queue, under the same number, asking for them. `sbatch --nodes=32 slurm/kdrl_70b.sh` saves that
# step. What your site wants (--account, --partition, --time, --gpus-per-node) goes before the script's name. docs/slurm.md
# tells the rest.
#SBATCH --job-name=kdrl_70b
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A preempted or failed node puts the job back into the queue; it goes on from its last checkpoint.
#SBATCH --requeue
# This many seconds before the time limit the job is told to save and requeue: more than one training step and one checkpoint.
#SBATCH --signal=B:USR1@900

source "${KDRL_ROOT:=${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
launch kdrl_70b "$@"
