#!/usr/bin/env bash
# One run of a study: a task of the job array that `kdrl-study FILE --slurm` submits. The argument is a folder of lists; the
# list named after the job has one line for each task: the run's identity, train or plan, and its overrides.
#SBATCH --job-name=experiments
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
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
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1/$SLURM_ARRAY_JOB_ID")
eval "words=($line)" # quoted for the shell by kdrl_mcore/studies/slurm.py
if [[ ${words[1]} == plan ]]; then
  prepare
  "${step[@]}" --nodes=1 --ntasks=1 "${container[@]}" "$KDRL_PYTHON" -m kdrl_mcore.studies.planned "${words[@]:2}"
else
  launch tiny_cpu "${words[@]:2}"
fi
