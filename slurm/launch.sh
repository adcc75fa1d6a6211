# The launcher that slurm/kdrl_*.sh share; sourced by the batch script, on the job's first node.
#
# Where things run:
#   batch script (this file)   size of the job, preflight, training, requeue
#     srun: slurm/task.sh      once per node (torchrun) or once per GPU; rendezvous, signals, logs
#       kdrl_mcore.train       one process per GPU
#     srun: slurm/serve.sh     on the server nodes (the last cluster.server_nodes of the job): rollout=vllm's servers, as many on
#                              each as engines of rollout.vllm.tensor GPUs fit it
#
# Settings, from the environment (sbatch passes it on):
#   KDRL_ROOT        this repository; default: the folder sbatch was called in
#   KDRL_PYTHON      the Python of a virtual environment; default: .venv/bin/python, in a container python3
#   KDRL_CONTAINER   an image (pyxis/enroot): a .sqsh file or a registry's name; empty runs without a container
#   KDRL_MOUNTS      what the container sees beside the repository: /data:/data,/models:/models
#   KDRL_LAUNCHER    torchrun (default: one task per node) or srun (one task per GPU)
#   KDRL_PREFLIGHT   0 leaves the preflight out
#   KDRL_MIN_BANDWIDTH  GB/s of all-reduce below which the preflight fails; default: 10 with GPUs, else 0
#   KDRL_SERVER_PYTHON, KDRL_SERVER_CONTAINER  Python and image of the servers, where vLLM has an environment of its own
#   KDRL_SERVER_COMMAND  what a server node runs; default: kdrl_mcore.rollout.vllm_server with the configuration's model

launch() { # launch EXPERIMENT [key=value ...]
  set -euo pipefail
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "this script is a SLURM job: sbatch slurm/$1.sh [key=value ...]"
  [[ -f $KDRL_ROOT/slurm/launch.sh ]] || fail "KDRL_ROOT=$KDRL_ROOT is not this repository: submit from its root, or set KDRL_ROOT"
  cd "$KDRL_ROOT"
  export KDRL_ROOT=$PWD
  overrides=("${@:2}")
  [[ " ${overrides[*]-} " == *" experiment="* ]] || overrides=("experiment=$1" "${overrides[@]}")
  choose_python
  read_settings
  fit_allocation
  overrides+=("cluster.nodes=$train_nodes" "cluster.gpus_per_node=$ranks_per_node")
  export KDRL_LOG_DIR=$run_dir/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  mkdir -p "$KDRL_LOG_DIR" || fail "the run directory $run_dir cannot be written: set run.dir to a folder all nodes share"
  export KDRL_RANKS_PER_NODE=$ranks_per_node KDRL_PYTHON KDRL_LAUNCHER=${KDRL_LAUNCHER:-torchrun}
  source slurm/network.sh
  say "job $SLURM_JOB_ID (start ${SLURM_RESTART_COUNT:-0}): $train_nodes x $ranks_per_node ranks on $SLURM_JOB_NODELIST"
  say "run directory $run_dir; output of each node: $KDRL_LOG_DIR"
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM
  if [[ ${KDRL_PREFLIGHT:-1} != 0 ]]; then
    run_step preflight kdrl_mcore.preflight --min-bandwidth "${KDRL_MIN_BANDWIDTH:-auto}" "${overrides[@]}"
  fi
  start_servers
  go_on_from_own_checkpoint
  run_step train kdrl_mcore.train "${overrides[@]}" "${server_overrides[@]}"
  say "finished"
}

choose_python() {
  container=()
  if [[ -n ${KDRL_CONTAINER:-} ]]; then
    : "${KDRL_PYTHON:=python3}"
    use_container "$KDRL_CONTAINER"
    return
  fi
  : "${KDRL_PYTHON:=$KDRL_ROOT/.venv/bin/python}"
  [[ -x $KDRL_PYTHON ]] || fail "no Python at $KDRL_PYTHON: run make setup, or set KDRL_PYTHON or KDRL_CONTAINER"
}

use_container() { # use_container IMAGE: sets the arguments of srun
  container=(--container-image="$1" --container-workdir="$KDRL_ROOT"
    --container-mounts="$KDRL_ROOT:$KDRL_ROOT${KDRL_MOUNTS:+,$KDRL_MOUNTS}")
}

read_settings() { # sets the variables below from the composed configuration; refuses a wrong override
  local found enter=()
  ((${#container[@]} == 0)) || enter=(srun --nodes=1 --ntasks=1 --cpu-bind=none "${container[@]}")
  found=$("${enter[@]}" "$KDRL_PYTHON" slurm/settings.py "${overrides[@]}") || exit 2
  eval "$(grep -E '^(config_nodes|server_nodes|servers_per_node|server_gpus|ranks_per_node|run_dir|server_(arguments|overrides))=' <<<"$found")"
}

fit_allocation() { # sets train_nodes; sends a one-node job that needs more back to the queue
  local wanted=$((config_nodes + server_nodes))
  if ((SLURM_JOB_NUM_NODES == 1 && wanted > 1)); then
    say "the configuration is good; it needs $wanted nodes: job $SLURM_JOB_ID goes back to the queue for them"
    grow "$wanted" || fail "the job could not change its size: sbatch --nodes=$wanted slurm/... with the same arguments"
    exit 0
  fi
  train_nodes=$((SLURM_JOB_NUM_NODES - server_nodes))
  ((train_nodes > 0)) || fail "cluster.server_nodes=$server_nodes leaves no node for training in a job of $SLURM_JOB_NUM_NODES"
}

grow() { # the job's own resize commands act on the allocation while SLURM_JOB_ID names it: they must not see it
  trap '' TERM
  env -u SLURM_JOB_ID -u SLURM_JOBID bash -c \
    'scontrol requeuehold "$1" && scontrol update jobid="$1" numnodes="$2-$2" && scontrol release "$1"' _ "$SLURM_JOB_ID" "$1"
}

run_step() { # run_step NAME MODULE ARGUMENTS...: on all training nodes; returns when it succeeded, else ends the job
  local name=$1 code=0 tasks=$train_nodes before
  [[ $KDRL_LAUNCHER == srun ]] && tasks=$((train_nodes * ranks_per_node))
  before=$(latest_checkpoint)
  srun --nodes="$train_nodes" --ntasks="$tasks" --ntasks-per-node=$((tasks / train_nodes)) --relative=0 --cpu-bind=none \
    --kill-on-bad-exit=1 --job-name="$name" --output="$KDRL_LOG_DIR/$name-node%n.log" "${container[@]}" \
    bash slurm/task.sh "${@:2}" &
  step_pid=$!
  wait_out "$step_pid" || code=$?
  step_pid=
  if ((code == 0)); then
    [[ ! -e $KDRL_LOG_DIR/asked-to-stop ]] || requeue "$name was asked to stop" # left by slurm/task.sh
    return 0
  fi
  grep -hsE '^(error|hang):' "$KDRL_LOG_DIR/$name"-*.log | sort -u | head -n 20 >&2 || tail -n 30 "$KDRL_LOG_DIR/$name-node0.log" >&2
  # A foreseen error would come again. A hang, a kill or a crash may not: going on is safe while each start gets further.
  if ! grep -qs '^error:' "$KDRL_LOG_DIR/$name"-*.log && [[ $(latest_checkpoint) != "$before" ]]; then
    requeue "$name ended with exit code $code after saving $(latest_checkpoint)"
  fi
  fail "$name ended with exit code $code; its output: $KDRL_LOG_DIR/$name-node*.log"
}

go_on_from_own_checkpoint() { # checkpoint.resume says where a job begins, not what it goes back to each time it was requeued
  local found=$run_dir/logs/$SLURM_JOB_ID-found latest
  latest=$(stat -c '%N %Z' "$run_dir/checkpoints/latest" 2>/dev/null) || true
  if [[ ! -e $found ]]; then
    echo "$latest" >"$found"
  elif [[ $latest != "$(<"$found")" ]]; then
    overrides+=(checkpoint.resume=auto)
  fi
}

latest_checkpoint() { readlink "$run_dir/checkpoints/latest" || true; }

wait_out() { # the exit code of a child, however many trapped signals interrupt the waiting
  local code=0
  while wait "$1" && code=0 || code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
  wait "$1"
}

start_servers() { # on the job's last nodes, while it lasts; training finds their addresses in RUN/servers
  local nodes hosts
  ((server_nodes)) || return 0
  rm -f "$run_dir"/servers/*.json # of another start
  if [[ -n ${KDRL_SERVER_CONTAINER:-} ]]; then
    local container=()
    use_container "$KDRL_SERVER_CONTAINER"
    : "${KDRL_SERVER_PYTHON:=python3}"
  fi
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "$server_nodes")
  mapfile -t hosts < <(scontrol --oneliner show nodes "$(IFS=,; echo "${nodes[*]}")" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
  export KDRL_SERVER_HOSTS=${hosts[*]} KDRL_SERVER_GPUS=$server_gpus KDRL_RUN_DIR=$run_dir
  : "${KDRL_SERVER_COMMAND:=${KDRL_SERVER_PYTHON:-$KDRL_PYTHON} -m kdrl_mcore.rollout.vllm_server $server_arguments}"
  srun --nodes="$server_nodes" --ntasks=$((server_nodes * servers_per_node)) --ntasks-per-node="$servers_per_node" \
    --nodelist="$(IFS=,; echo "${nodes[*]}")" --cpu-bind=none --job-name=servers \
    --output="$KDRL_LOG_DIR/servers-node%n.log" "${container[@]}" bash slurm/serve.sh "$KDRL_SERVER_COMMAND" &
  server_pid=$!
  trap stop_servers EXIT
  say "servers on ${nodes[*]}"
}

stop_servers() { # they outlive a signal that asks the job to stop, since training ends its step: this tells them apart
  touch "$KDRL_LOG_DIR/stop-servers"
  kill "$server_pid" 2>/dev/null || true
}

forward() { # SLURM signals the batch script; srun passes on what it is sent
  say "received SIG$1"
  [[ -z ${step_pid:-} ]] || kill -s USR1 "$step_pid" 2>/dev/null || true
}

requeue() { # requeue WHY; a job that was cancelled must not come back
  local state
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [[ $state == RUNNING ]]; then
    say "$1: job $SLURM_JOB_ID goes back to the queue"
    [[ -z ${server_pid:-} ]] || stop_servers
    scontrol requeue "$SLURM_JOB_ID"
    exec sleep 60 # SLURM ends it at once: no trap is left that would wait for it
  fi
  exit 0
}

say() { echo "$(date '+%F %T') $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}
