#!/usr/bin/env bash
# One SLURM task of a step: task.sh MODULE ARGUMENTS... Started by slurm/launch.sh, once per node or once per GPU.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

[[ -d $KDRL_WORK_DIR ]] || fail "$KDRL_WORK_DIR is not on $(hostname): submit from a folder that all nodes share"
if ((KDRL_GPUS)); then # checked on every node, as nodes may differ
  gpus=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus)}" | grep -c .) || true
  ((gpus >= KDRL_RANKS_PER_NODE)) || fail "$(hostname) (node $SLURM_NODEID of the job) shows $gpus GPUs for $KDRL_RANKS_PER_NODE\
 ranks${CUDA_VISIBLE_DEVICES+, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES}: ask for them (sbatch --gpus-per-node=$KDRL_RANKS_PER_NODE)\
, leave the node out (--exclude), or set cluster.gpus_per_node"
fi
[[ -d ${TMPDIR:-/tmp} ]] || unset TMPDIR # set for another machine

# The first node's address, as seen from the nodes of the step. MASTER_PORT comes from slurm/launch.sh.
export MASTER_ADDR=${KDRL_MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + KDRL_RANKS_PER_NODE - 1) / KDRL_RANKS_PER_NODE))}

# Micro-batches differ in length, and expandable segments reduce the fragmentation of GPU memory. Only for training: vLLM's
# workers cannot share the memory of such segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}

if [[ $KDRL_LAUNCHER == srun ]]; then
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$KDRL_RANKS_PER_NODE
  command=("$KDRL_PYTHON" -m "$@")
else
  # torchrun would kill its ranks 30 seconds after a SIGTERM; the ranks have their own handler, and a checkpoint may take longer.
  command=("$KDRL_PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID"
    --nproc-per-node="$KDRL_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
    --signals-to-handle=SIGQUIT -m "$@")
fi

# SLURM signals every process of the step. torchrun inherits the ignored signals; the ranks install their own handlers. The exit
# code is sent through a pipe, since `wait` may lose that of a child that ends while a trapped signal arrives.
signals=(TERM USR1 USR2 INT HUP) # a site's --signal may send any of them
exec {codes}<> <(:)
(
  trap '' "${signals[@]}"
  code=0
  "${command[@]}" </dev/null {codes}>&- || code=$?
  echo "$code" >&"$codes"
) &
child=$!

asked=
trap ask_to_stop "${signals[@]}"
ask_to_stop() { # sends SIGUSR1 to the ranks: torchrun's children, or the task itself
  local ranks
  asked=1
  ranks=$(children_of "$child")
  [[ $KDRL_LAUNCHER == srun ]] || ranks=$(children_of $ranks)
  [[ -z $ranks ]] || kill -s USR1 $ranks || true
} 2>/dev/null
children_of() { # children_of [PROCESS]
  [[ -z ${1:-} ]] || cat "/proc/$1/task/$1/children" || true
}

while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
read -r -t 1 code <&"$codes" || code=137
[[ $code != 0 || -z $asked ]] || touch "$KDRL_LOG_DIR/asked-to-stop"
exit "$code"
