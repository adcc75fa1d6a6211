#!/usr/bin/env bash
# One SLURM task of a step: task.sh MODULE ARGUMENTS... Started by slurm/launch.sh, once per node or once per GPU.
set -euo pipefail

# The first node's address, as the nodes that srun started reached it. A port of the job and step: no other job's.
export MASTER_ADDR=${KDRL_MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + SLURM_STEP_ID) % 12000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + KDRL_RANKS_PER_NODE - 1) / KDRL_RANKS_PER_NODE))}

# Micro-batches differ in length: segments that grow leave fewer holes in GPU memory. For training alone: vLLM's workers cannot
# share the memory of such segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}

if [[ $KDRL_LAUNCHER == srun ]]; then
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$KDRL_RANKS_PER_NODE
  command=("$KDRL_PYTHON" -m "$@")
else
  # torchrun would kill its ranks 30 seconds after a SIGTERM; the ranks have their own handler, and a checkpoint may take longer.
  command=("$KDRL_PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID"
    --nproc-per-node="$KDRL_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
    --signals-to-handle=SIGINT -m "$@")
fi

# SLURM signals every process of the step. What is ignored stays ignored in torchrun; the ranks set their handlers over it.
(trap '' TERM USR1; exec "${command[@]}") </dev/null &
child=$!
asked=
trap 'asked=1' TERM USR1
code=0
# A trapped signal ends `wait` early, with a code above 128.
while wait "$child" && code=0 || code=$?; ((code > 128)) && kill -0 "$child" 2>/dev/null; do :; done
wait "$child" && code=0 || code=$?
[[ $code != 0 || -z $asked ]] || touch "$KDRL_LOG_DIR/asked-to-stop"
exit "$code"
