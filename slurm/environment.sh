# The environment of the job's steps, protected from the settings of the user or the site. Sourced by slurm/launch.sh.

# A step's resources come from this launcher, not from variables that sbatch's options or an interactive job have set for srun.
# A step may use all resources of the job on its nodes, even while a shell is open in the job. Without --export=ALL,
# `sbatch --export=NONE` would apply to steps too, which would then not even have PATH.
step=(srun --export=ALL --overlap --mem=0 --mpi=none --cpu-bind=none)

set_environment() {
  unset "${!SLURM_NTASKS@}" SLURM_NPROCS "${!SLURM_CPUS_PER_@}" SRUN_CPUS_PER_TASK "${!SLURM_CPU_BIND@}" SLURM_THREADS_PER_CORE \
    "${!SLURM_GPUS@}" "${!SLURM_GPU_BIND@}" SLURM_GRES SLURM_STEP_GRES "${!SLURM_TRES_@}" "${!SLURM_MEM_@}" SLURM_DISTRIBUTION \
    SLURM_HINT SLURM_EXACT SLURM_EXCLUSIVE SLURM_STDINMODE SLURM_STDERRMODE SLURM_LABELIO SLURM_TIMELIMIT SLURM_REMOTE_CWD \
    SLURM_WORKING_DIR
  # kdrl_mcore is imported from this repository, the user's modules from the working folder or PYTHONPATH.
  export PYTHONSAFEPATH=1 PYTHONPATH=${repository:+$repository:}$PWD${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONUTF8=1 # regardless of LC_ALL
  export KDRL_ROOT KDRL_WORK_DIR=$PWD SLURM_RESTART_COUNT=$start
  ((start)) || unset SLURM_RESTART_COUNT # as SLURM does
  if is_interactive; then # srun may run on another machine, whose address the ranks would take for the first node's
    : "${KDRL_MASTER_ADDR:=$(node_addresses "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")}"
    export KDRL_MASTER_ADDR
  fi
}

ask_for_gpus() { # ask_for_gpus COUNT: sets gres, the arguments of a step that uses COUNT GPUs on each node. Without them
  gres=() # it would get none if the job is only exclusive, and those of its own tasks if the job has --gpus-per-task
  ((most == 0 || $1 == 0)) || gres=(--gres="gpu:$1")
}

choose_python() {
  local asked active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  container=()
  if [[ -n ${KDRL_CONTAINER:-} ]]; then
    : "${KDRL_PYTHON:=python3}"
    use_container "$KDRL_CONTAINER"
    return
  fi
  if [[ -z ${KDRL_PYTHON:-} ]]; then
    KDRL_PYTHON=$KDRL_ROOT/.venv
    [[ ! -f $scripts/interpreter ]] || KDRL_PYTHON=$(<"$scripts/interpreter")
    unset PYTHONHOME # as activating the environment does
  fi
  asked=$KDRL_PYTHON
  [[ ! -d $asked ]] || asked=${asked%/}/bin/python
  KDRL_PYTHON=$(type -P "$asked") || fail "no Python at $asked on $(hostname): run make setup, or set KDRL_PYTHON\
${active:+ (KDRL_PYTHON=$active for the environment that is active)} or KDRL_CONTAINER"
  [[ $KDRL_PYTHON == /* ]] || KDRL_PYTHON=$PWD/$KDRL_PYTHON
}

node_addresses() { # node_addresses NODE,NODE,...: the addresses at which SLURM reaches them, one per line
  scontrol --oneliner show nodes "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2
}
