# The launcher that slurm/kdrl_*.sh share; sourced by the batch script, on the job's first node.
#
# Where things run:
#   batch script (this file)   size of the job, preflight, training, requeue
#     srun: slurm/task.sh      once per node (torchrun) or once per GPU; rendezvous, signals, logs
#       kdrl_mcore.train       one process per GPU
#     srun: slurm/serve.sh     on the server nodes (the last cluster.server_nodes of the job): the servers of rollout=vllm, as
#                              many per node as engines of rollout.vllm.tensor GPUs fit
#     srun: slurm/serve.sh     on the cluster.teacher_nodes before these: the servers of teachers, one step for each teacher
#
# Relative paths start at the folder in which the job runs: the one where sbatch was called, or sbatch's --chdir.
#
# Settings, from the environment (sbatch passes it on):
#   KDRL_ROOT        this repository, or the folder that kdrl-slurm wrote; default: where the submitted script is
#   KDRL_PYTHON      a Python, or the folder of its virtual environment; default: this repository's .venv, or the Python that ran
#                    kdrl-slurm; in a container python3
#   KDRL_CONTAINER   an image (pyxis/enroot): a .sqsh file or a registry's name; empty runs without a container
#   KDRL_MOUNTS      further mounts of the container besides KDRL_ROOT and the working folder: /data:/data,/models:/models
#   KDRL_LAUNCHER    torchrun (default: one task per node) or srun (one task per GPU)
#   KDRL_PREFLIGHT   0 skips the preflight
#   KDRL_MIN_BANDWIDTH  GB/s of all-reduce below which the preflight fails; default: 10 with GPUs, else 0
#   KDRL_SERVER_PYTHON, KDRL_SERVER_CONTAINER  Python and image of the servers, if vLLM has a separate environment
#   KDRL_SERVER_COMMAND  what a server node runs; default: kdrl_mcore.rollout.vllm.server with the configuration's model
#   KDRL_TEACHER_COMMAND  what a teacher's node runs; default: kdrl_mcore.cli serve-teacher with the teacher's model

submitted=("$@") # the batch script's arguments
step_pid= server_pid= port= teacher_nodes=0 teacher_servers=()
asked= # when the job was asked to stop, in seconds after its start

launch() { # launch EXPERIMENT [key=value ...]
  set -euo pipefail
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "this script is a SLURM job: sbatch $0 [key=value ...]"
  prepare
  for name in USR1 USR2 TERM INT HUP; do trap "forward $name" "$name"; done
  overrides=("${@:2}")
  check_array "${@:2}"
  [[ " ${overrides[*]-} " == *" experiment="* ]] || overrides=("experiment=$1" "${overrides[@]}")
  expand_overrides
  read_settings
  fit_allocation
  overrides+=("cluster.nodes=$train_nodes" "cluster.gpus_per_node=$ranks_per_node")
  export KDRL_LOG_DIR=$run_dir/logs/$SLURM_JOB_ID-$start
  mkdir -p "$KDRL_LOG_DIR" || fail "the run directory $run_dir cannot be written: set run.dir to a folder all nodes share"
  export KDRL_RANKS_PER_NODE=$ranks_per_node KDRL_GPUS=$gpus KDRL_PYTHON KDRL_LAUNCHER=${KDRL_LAUNCHER:-torchrun}
  source "$scripts/network.sh"
  say "job $job (start $start): $train_nodes x $ranks_per_node ranks on $SLURM_JOB_NODELIST"
  say "run directory $run_dir; output of each node: $KDRL_LOG_DIR"
  if [[ ${KDRL_PREFLIGHT:-1} != 0 ]]; then
    run_step preflight kdrl_mcore.preflight --min-bandwidth "${KDRL_MIN_BANDWIDTH:-auto}" "${overrides[@]}"
  fi
  start_servers
  start_teachers
  resume_from_own_checkpoint
  run_step train kdrl_mcore.train "${overrides[@]}" "${server_overrides[@]}"
  say "finished"
}

prepare() { # set up what all steps share: the job, its environment, its Python
  # The user's shell may have exported other rules, other formats of time, and functions by the names of commands.
  unset CDPATH POSIXLY_CORRECT SLURM_TIME_FORMAT
  unset -f cd cat cut grep head readlink scontrol sed sort srun stat tail tr
  export -n SHELLOPTS BASHOPTS
  set +o posix +o noglob +o noclobber
  shopt -u nullglob failglob
  scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  repository=${scripts%/*} KDRL_ROOT=${scripts%/*}
  if [[ -f $scripts/interpreter || -f $scripts/../__init__.py ]]; then # written by kdrl-slurm, or in the installed package
    repository= KDRL_ROOT=$scripts
  fi
  source "$scripts/queue.sh"
  source "$scripts/environment.sh"
  identify_job
  count_gpus
  check_allocation
  set_environment
  choose_python
}

check_allocation() {
  # The variables may come from a job from which this one was submitted. No step runs yet, unless this is one.
  if ((${SLURM_STEP_NUM_TASKS:-1} > 1)) && scontrol show step "$SLURM_JOB_ID.${SLURM_STEP_ID:-0}" 2>/dev/null | grep -q StepId=; then
    fail "srun has started this script ${SLURM_STEP_NUM_TASKS} times, but it starts its own tasks: call it with bash"
  fi
  [[ -z $(field HetJobId) ]] || fail "this is a job of several components (sbatch ... : ...), of which only the first would be \
used: submit one, and ask for server nodes with cluster.server_nodes"
  [[ $record =~ \ WorkDir=(.*)\ StdErr= && ! -d ${BASH_REMATCH[1]} ]] || return 0
  fail "${BASH_REMATCH[1]} is not on $(hostname), so SLURM started the job in $PWD: submit it from a folder that all nodes \
share, or name one with sbatch --chdir"
}

check_array() { # array tasks that run at the same time need separate run directories
  local word
  [[ -n $array_task && ${SLURM_ARRAY_TASK_COUNT:-1} -gt 1 && $(field ArrayTaskThrottle) != 1 ]] || return 0
  # A caller of this script, or slurm/experiments.sh, may have given each task different arguments.
  [[ $0 == */slurm_script && "${submitted[*]-}" == "$*" ]] || return 0
  for word; do [[ $word != run.dir=*@(%a|SLURM_)* ]] || return 0; done
  fail "the tasks of an array need separate run directories: run.dir=.../%a (%a becomes the task's number, in any override); \
tasks that resume from each other's checkpoint run one at a time: sbatch --array=${SLURM_ARRAY_TASK_MIN:-0}-${SLURM_ARRAY_TASK_MAX:-N}%1"
}

expand_overrides() { # expands ~ at the beginning of a value, as the shell does, and in an array %a and %A, as sbatch's --output
  local i word home
  for i in "${!overrides[@]}"; do
    word=${overrides[i]}
    if [[ $word =~ ^([^=]*=)(~[[:alnum:]._-]*)(/.*)?$ ]]; then
      eval "home=${BASH_REMATCH[2]}"
      word=${BASH_REMATCH[1]}$home${BASH_REMATCH[3]-}
    fi
    if [[ -n $array_task ]]; then
      word=${word//%a/"$array_task"}
      word=${word//%A/"$array_id"}
    fi
    overrides[i]=$word
  done
}

use_container() { # use_container IMAGE: sets the arguments of srun
  local mounts=$KDRL_ROOT:$KDRL_ROOT
  [[ $PWD/ == "$KDRL_ROOT"/* ]] || mounts+=,$PWD:$PWD
  container=(--container-image="$1" --container-workdir="$PWD" --container-mounts="$mounts${KDRL_MOUNTS:+,$KDRL_MOUNTS}")
}

read_settings() { # sets the variables below from the composed configuration; fails on a wrong override
  local found enter=() names='config_nodes|server_nodes|servers_per_node|server_gpus|gpus|ranks_per_node|run_dir|server_(arguments|overrides)|teacher_(nodes|servers)'
  if ((${#container[@]})) || is_interactive; then # salloc's shell may run on another machine
    ask_for_gpus "$granted"
    enter=("${step[@]}" "${gres[@]}" --nodes=1 --ntasks=1 --relative=0 "${container[@]}")
  fi
  found=$("${enter[@]}" "$KDRL_PYTHON" "$scripts/settings.py" "${overrides[@]}") || exit 2
  eval "$(grep -E "^($names)=" <<<"$found")"
}

fit_allocation() { # sets train_nodes; a one-node job that needs more nodes goes back to the queue
  local wanted=$((config_nodes + server_nodes + teacher_nodes)) stays
  if ((SLURM_JOB_NUM_NODES == 1 && wanted > 1)); then
    stays=$(why_it_stays)
    [[ -z $stays ]] || fail "the configuration needs $wanted nodes, and the job cannot go back to the queue for them, as $stays: \
ask for --nodes=$wanted at once"
    say "the configuration is valid and needs $wanted nodes: job $SLURM_JOB_ID goes back to the queue for them"
    grow "$wanted" || fail "the job could not change its size: sbatch --nodes=$wanted slurm/... with the same arguments"
    exit 0
  fi
  ((gpus == 0 || most == 0 || granted >= ranks_per_node)) ||
    fail "$poorest has $granted GPUs for this job and cluster.gpus_per_node is $ranks_per_node: ask for them with sbatch \
--gpus-per-node=$ranks_per_node, leave that node out (--exclude, --constraint), or set cluster.gpus_per_node"
  train_nodes=$((SLURM_JOB_NUM_NODES - server_nodes - teacher_nodes))
  ((train_nodes > 0)) || fail "cluster.server_nodes=$server_nodes$( ((!teacher_nodes)) || echo " and cluster.teacher_nodes=$teacher_nodes") \
leaves no node for training in a job of $SLURM_JOB_NUM_NODES"
}

run_step() { # run_step NAME MODULE ARGUMENTS...: runs on all training nodes; returns on success, otherwise ends the job
  local name=$1 code=0 tasks=$train_nodes before
  [[ $KDRL_LAUNCHER == srun ]] && tasks=$((train_nodes * ranks_per_node))
  [[ -z $asked ]] || requeue 0 "the job was asked to stop"
  before=$(latest_checkpoint)
  choose_port
  ask_for_gpus $((gpus ? ranks_per_node : 0))
  "${step[@]}" "${gres[@]}" --nodes="$train_nodes" --ntasks="$tasks" --ntasks-per-node=$((tasks / train_nodes)) --relative=0 \
    --kill-on-bad-exit=1 --job-name="$name" --output="$KDRL_LOG_DIR/$name-node%n.log" "${container[@]}" \
    bash "$scripts/task.sh" "${@:2}" &
  step_pid=$!
  wait_out "$step_pid" || code=$?
  step_pid=
  if ((code == 0)); then
    # slurm/task.sh creates the file; training that was in its last step is complete nevertheless.
    if [[ -e $KDRL_LOG_DIR/asked-to-stop ]] && ! is_complete "$name"; then
      asked=${asked:-$SECONDS}
      requeue 0 "$name was asked to stop"
    fi
    return 0
  fi
  grep -hsE '^(error|hang):' "$KDRL_LOG_DIR/$name"-*.log | sort -u | head -n 20 >&2 ||
    tail -n 30 "$KDRL_LOG_DIR/$name-node0.log" >&2 || true
  # A foreseen error would recur. A hang, a kill or a crash may not: requeueing is safe as long as each start makes progress. In
  # a job that was suspended, collectives have timed out.
  if ! grep -qs '^error:' "$KDRL_LOG_DIR/$name"-*.log; then
    [[ $(latest_checkpoint) == "$before" ]] || requeue 1 "$name ended with exit code $code after saving $(latest_checkpoint)"
    ! was_suspended || requeue 1 "$name ended with exit code $code after the job was suspended"
  fi
  fail "$name ended with exit code $code; its output: $KDRL_LOG_DIR/$name-node*.log"
}

resume_from_own_checkpoint() { # checkpoint.resume applies to the job's first start, not to those after a requeue
  local found=$run_dir/logs/$SLURM_JOB_ID-found latest
  latest=$(stat -c '%N %Z' "$run_dir/checkpoints/latest" 2>/dev/null) || true
  if [[ ! -e $found ]]; then
    echo "$latest" >"$found"
  elif [[ $latest != "$(<"$found")" ]]; then
    overrides+=(checkpoint.resume=auto)
  fi
}

is_complete() { # is_complete STEP: whether training reached its end, that is, did not report that it stopped
  [[ $1 == train ]] && ! grep -qs 'stopped on ' "$KDRL_LOG_DIR"/train-*.log
}

choose_port() { # sets MASTER_PORT, the next step's rendezvous port: different for each job and step, and free on this node
  local tables=(/proc/net/tcp /proc/net/tcp6)
  port=$((${port:-20000 + SLURM_JOB_ID * 8 % 12000} + 1))
  while grep -qsi ":$(printf %04X "$port") [0-9A-F]*:0000 0A " "${tables[@]}"; do port=$((port == 32000 ? 20001 : port + 1)); done
  export MASTER_PORT=$port
}

latest_checkpoint() { readlink "$run_dir/checkpoints/latest" || true; }

wait_out() { # waits for a child through trapped signals; returns its exit code
  local code=0
  while wait "$1" && code=0 || code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
  wait "$1"
}

start_servers() { # on the job's last nodes, until it ends; training finds their addresses in RUN/servers
  ((server_nodes)) || return 0
  rm -f "$run_dir"/servers/*.json # of an earlier start
  serve servers servers/ $((SLURM_JOB_NUM_NODES - server_nodes)) "$server_nodes" "$servers_per_node" "$server_gpus" \
    "-m kdrl_mcore.rollout.vllm.server $server_arguments" "${KDRL_SERVER_COMMAND:-}"
}

start_teachers() { # on the nodes before these; training finds their addresses in RUN/teachers
  local entry name nodes per_node each_gpus arguments first=$train_nodes
  ((teacher_nodes)) || return 0
  rm -f "$run_dir"/teachers/*.json
  for entry in "${teacher_servers[@]}"; do
    read -r name nodes per_node each_gpus arguments <<<"$entry"
    serve "teacher-$name" "teachers/$name-" "$first" "$nodes" "$per_node" "$each_gpus" \
      "-m kdrl_mcore.cli serve-teacher $arguments" "${KDRL_TEACHER_COMMAND:-}"
    first=$((first + nodes))
  done
}

serve() { # serve NAME ADDRESSES FIRST NODES PER_NODE GPUS ARGUMENTS COMMAND: a step of servers, until the job ends, on the job's
  # NODES nodes after the first FIRST; Python with ARGUMENTS unless there is a COMMAND
  local nodes hosts python=${KDRL_SERVER_PYTHON:-}
  if [[ -n ${KDRL_SERVER_CONTAINER:-} ]]; then
    local container=()
    use_container "$KDRL_SERVER_CONTAINER"
    : "${python:=python3}"
  fi
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "+$(($3 + 1))" | head -n "$4")
  mapfile -t hosts < <(node_addresses "$(IFS=,; echo "${nodes[*]}")")
  export KDRL_SERVER_HOSTS=${hosts[*]} KDRL_SERVER_GPUS=$6 KDRL_RUN_DIR=$run_dir KDRL_SERVER_ADDRESS=$2
  ask_for_gpus $(($5 * $6))
  "${step[@]}" "${gres[@]}" --nodes="$4" --ntasks=$(($4 * $5)) --ntasks-per-node="$5" \
    --nodelist="$(IFS=,; echo "${nodes[*]}")" --job-name="$1" \
    --output="$KDRL_LOG_DIR/$1-node%n.log" "${container[@]}" \
    bash "$scripts/serve.sh" "${8:-$(printf %q "${python:-$KDRL_PYTHON}") $7}" &
  server_pid+=" $!"
  trap stop_servers EXIT
  say "$1 on ${nodes[*]}"
}

stop_servers() { # servers ignore signals that ask the job to stop, as training needs them to end its step; the file stops them
  touch "$KDRL_LOG_DIR/stop-servers"
  kill $server_pid 2>/dev/null || true
}

forward() { # SLURM signals the batch script; srun forwards signals to its tasks
  say "received SIG$1"
  asked=${asked:-$SECONDS}
  [[ -z $step_pid ]] || kill -s USR1 "$step_pid" 2>/dev/null || true
}

say() { echo "$(date '+%F %T') $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}
