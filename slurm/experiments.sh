#!/usr/bin/env bash
# One run of a study: an element of the job array that `tools/experiments.py FILE --slurm` submits. Its argument is the folder
# of lists; the list named after the job has one line for each element: the run's identity, train or plan, its overrides.
#SBATCH --job-name=experiments
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@900

source "${KDRL_ROOT:=${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1/$SLURM_ARRAY_JOB_ID")
eval "words=($line)" # quoted for the shell by kdrl_mcore/experiments/slurm.py
if [[ ${words[1]} == plan ]]; then
  cd "$KDRL_ROOT"
  choose_python
  srun --nodes=1 --ntasks=1 --cpu-bind=none "${container[@]}" "$KDRL_PYTHON" -m kdrl_mcore.experiments.planned "${words[@]:2}"
else
  launch tiny_cpu "${words[@]:2}"
fi
