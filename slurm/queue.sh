# The launcher's requests to SLURM about its own job: its record, a change of its number of nodes, requeueing.
# Sourced by slurm/launch.sh.

read_record() { # read_record [ATTEMPTS]: sets `record`, one line; fails if SLURM does not answer (the controller may be down)
  local attempt
  record=
  type -P scontrol >/dev/null || return 1
  for ((attempt = ${1:-1}; attempt > 0; attempt--)); do
    # The id of an array's last task is also that of the array; only one line begins with it.
    record=$(scontrol --oneliner --details show job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID ") && return 0
    ((attempt == 1)) || sleep 10
  done
  return 1
}

field() { # field NAME: its value in the record, or nothing
  [[ ! ${record:-} =~ (^|\ )$1=([^\ ]*) ]] || echo "${BASH_REMATCH[2]}"
}

identify_job() { # sets job, array_id, array_task and start. The variables may be those of a job that submitted this one
  array_id=${SLURM_ARRAY_JOB_ID:-} array_task=${SLURM_ARRAY_TASK_ID:-} start=${SLURM_RESTART_COUNT:-0}
  if read_record; then
    array_id=$(field ArrayJobId) array_task=$(field ArrayTaskId) start=$(field Restarts)
  fi
  job=${array_id:+${array_id}_}${array_task:-$SLURM_JOB_ID} # the id of an array's last task alone would mean the whole array
}

count_gpus() { # sets granted and most, the fewest and most GPUs of the job on a node, and poorest, the nodes with the fewest
  local part nodes count first=1
  granted=0 poorest='' most=0
  while read -r part; do # Nodes=n[1-2] CPU_IDs=0-95 Mem=1000 GRES=gpu:h100:8(IDX:0-7),...
    count=0 nodes=${part%% *}
    while [[ $part =~ gpu(:[^:,\(\)]+)?:([0-9]+)\((.*)$ ]]; do
      count=$((count + BASH_REMATCH[2])) part=${BASH_REMATCH[3]}
    done
    if [[ -n $first ]] || ((count < granted)); then
      granted=$count poorest=${nodes#Nodes=}
    fi
    first='' most=$((count > most ? count : most))
  done < <(grep -oE '\bNodes=[^ ]+ CPU_IDs=[^ ]* Mem=[^ ]* GRES=[^ ]*' <<<"${record:-}")
}

is_interactive() { [[ $(field BatchFlag) == 0 ]]; } # salloc

why_it_stays() { # why this job cannot go back to the queue; prints nothing if it can
  if is_interactive; then
    echo "it is interactive"
  elif [[ $(field Requeue) == 0 ]]; then
    echo "it has --no-requeue"
  elif is_warned_at_each_start; then
    echo "it was asked to stop $asked s after its start, as it would be each time: its time limit, $(field TimeLimit), must be longer \
than the time between SLURM's warning and the limit (--signal, 900 s): increase it with --time, or use sbatch --signal=B:USR1@60"
  fi
}

is_warned_at_each_start() { # whether this start was asked to stop because its time limit is shorter than the warning's lead time
  # SLURM does not say why it sent a signal, nor which lead time sbatch was given. It looks at time limits about once a minute, so
  # such a warning comes in the first two; no lead time is an hour; and a preemption is in the record.
  [[ -n $asked && $(field TimeLimit) == 00:* ]] && ((asked < 120)) && ! is_in_this_start PreemptTime
}

is_in_this_start() { # is_in_this_start NAME: whether this time in the record is after the job's last start
  [[ $(field "$1") == [0-9]* && ! $(field "$1") < $(field StartTime) ]]
}

was_suspended() { # whether the job was suspended since this start
  read_record 3 && is_in_this_start SuspendTime
}

grow() { # grow NODES: restarts the job with NODES nodes. SLURM_JOB_ID is unset for scontrol, which would otherwise resize its
  trap '' TERM # current allocation
  env -u SLURM_JOB_ID -u SLURM_JOBID bash -c \
    'scontrol requeuehold "$1" && scontrol update jobid="$1" numnodes="$2-$2" && scontrol release "$1"' _ "$job" "$1"
}

requeue() { # requeue CODE WHY: requeues the job, or ends it with this exit code if it cannot be requeued
  local stays latest again
  latest=$(latest_checkpoint)
  again="submit the same command again${latest:+, it resumes from $latest}"
  if ! read_record 30; then
    say "$2. SLURM does not respond, so the job cannot go back to the queue: $again"
    exit "$1"
  fi
  [[ $(field JobState) == RUNNING ]] || exit 0 # a job that was cancelled must not come back
  stays=$(why_it_stays)
  if [[ -n $stays ]]; then
    say "$2. The job does not go back to the queue, as $stays: $again"
    exit "$1"
  fi
  say "$2: job $SLURM_JOB_ID goes back to the queue"
  [[ -z $server_pid ]] || stop_servers
  if ! scontrol requeue "$job"; then
    say "SLURM refused to requeue it: $again"
    exit "$1"
  fi
  exec sleep 60 # SLURM ends it at once; after exec no trap can delay that
}
