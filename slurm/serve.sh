#!/usr/bin/env bash
# One server of a server node: serve.sh COMMAND. slurm/launch.sh starts as many on each server node as engines of
# rollout.vllm.tensor GPUs fit. A server that ends is restarted until the launcher reports that the job is over.
set -uo pipefail
hosts=($KDRL_SERVER_HOSTS)
host=${hosts[SLURM_NODEID]}
child=

if ((KDRL_SERVER_GPUS)); then # this server's share of the node's GPUs
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((KDRL_SERVER_GPUS * (SLURM_LOCALID + 1) - 1)))}"
  mine=("${gpus[@]:SLURM_LOCALID * KDRL_SERVER_GPUS:KDRL_SERVER_GPUS}")
  export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")
fi
# Unset what is meant only for training (as kdrl_mcore/rollout/vllm/client.py does): NCCL's flight recorder names its files by
# rank, and vLLM's workers cannot share the memory of expandable segments.
unset "${!TORCH_NCCL_@}" "${!TORCH_FR_@}"
for name in PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF; do
  settings=$(tr , '\n' <<<"${!name-}" | grep -v '^ *expandable_segments *:' | paste -sd,)
  if [[ -n $settings ]]; then export "$name=$settings"; else unset "$name"; fi
done

# SLURM sends a preemption's SIGTERM here too, but training still needs the server to end its step.
trap '[[ ! -e $KDRL_LOG_DIR/stop-servers ]] || { kill -KILL "$child" 2>/dev/null; exit 0; }' TERM
trap '' USR1 USR2 INT HUP

while :; do
  (trap '' TERM; eval "exec $1"' --run-dir "$KDRL_RUN_DIR" --index "$SLURM_PROCID" --host "$host"') </dev/null &
  child=$!
  while wait "$child" && code=0 || code=$?; ((code > 128)) && kill -0 "$child" 2>/dev/null; do :; done
  rm -f "$KDRL_RUN_DIR/${KDRL_SERVER_ADDRESS:-servers/}$SLURM_PROCID.json" # no server answers at this address any more
  echo "$(date '+%F %T') server $SLURM_PROCID on $host ended with exit code $code: it is started again"
  sleep "${KDRL_SERVER_PAUSE:-5}" &
  wait $!
done
