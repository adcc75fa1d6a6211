#!/usr/bin/env bash
# The server of one server node: serve.sh COMMAND. Started by slurm/launch.sh, once per server node. A server that ends is
# started again, until the launcher says that the job is over.
set -uo pipefail
hosts=($KDRL_SERVER_HOSTS)
child=

# SLURM sends a preemption's SIGTERM here too, but training still ends its step, with the server's help.
trap '[[ ! -e $KDRL_LOG_DIR/stop-servers ]] || { kill -KILL "$child" 2>/dev/null; exit 0; }' TERM
trap '' USR1

while :; do
  (trap '' TERM; exec $1 --run-dir "$KDRL_RUN_DIR" --index "$SLURM_PROCID" --host "${hosts[SLURM_PROCID]}") </dev/null &
  child=$!
  while wait "$child" && code=0 || code=$?; ((code > 128)) && kill -0 "$child" 2>/dev/null; do :; done
  rm -f "$KDRL_RUN_DIR/servers/$SLURM_PROCID.json" # nobody answers there
  echo "$(date '+%F %T') server $SLURM_PROCID on ${hosts[SLURM_PROCID]} ended with exit code $code: it is started again"
  sleep "${KDRL_SERVER_PAUSE:-5}" &
  wait $!
done
