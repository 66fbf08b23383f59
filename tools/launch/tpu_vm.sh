#!/bin/bash
# Runs one command on all workers of TPU VMs, over ssh, and again where they
# were preempted. `python -m tools.launch tpu_vm` starts it, with:
#   LOGS MAX_RESTARTS WAIT_SECONDS REMOTE TELL NAMES GCLOUD_OPTION...
# REMOTE is what each worker does; TELL, on worker 0, has the run save and leave;
# NAMES are those of the slices, with commas between.
logs=$1 max_restarts=$2 wait=$3 remote=$4 tell=$5
IFS=, read -r -a names <<<"$6"
shift 6
where=("$@")
mkdir -p "$logs"

on() {  # NAME WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" \
    --command="$3"
}

describe() {  # NAME FORMAT
  gcloud compute tpus tpu-vm describe "$1" "${where[@]}" --format="value($2)"
}

stopping=0
running=0
pause=  # the process that is waited for while no run is under way
stop() {
  stopping=1
  if [ "$running" = 1 ]; then
    echo 'the run saves and leaves'
    on "${names[0]}" 0 "$tell"
  elif [ -n "$pause" ]; then
    kill "$pause" 2>/dev/null
  fi
}
trap stop INT TERM

run() {  # sets code, to that of worker 0 of slice 0
  local coordinator pids=() i pid
  coordinator=$(describe "${names[0]}" 'networkEndpoints[0].ipAddress')
  for i in "${!names[@]}"; do
    local who="export slice=$i;"
    if [ "${#names[@]}" -gt 1 ]; then  # 8081: libtpu's port between slices
      who+=" export MEGASCALE_COORDINATOR_ADDRESS=$coordinator:8081"
      who+=" MEGASCALE_NUM_SLICES=${#names[@]} MEGASCALE_SLICE_ID=$i;"
    fi
    # In the background, so that Ctrl-C is for this script alone.
    on "${names[$i]}" all "$who $remote" 2>&1 | if [ "$i" = 0 ]; then
      tee -i "$logs/slice-0.log"
    else
      cat >"$logs/slice-$i.log"
    fi &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  done
  code=$(sed -n 's/.*slice 0, worker 0: exit code \([0-9]*\).*/\1/p' \
    "$logs/slice-0.log" | tail -n 1)
  code=${code:-1}  # the host was lost
}

leave() {  # if a signal came while nothing ran
  if [ "$stopping" = 1 ]; then
    if [ -n "$pause" ]; then kill "$pause" 2>/dev/null; fi
    echo 'stopped while no run was under way'
    exit 0
  fi
}

failures=0
while true; do
  for name in "${names[@]}"; do
    until [ "$(describe "$name" state)" = READY ]; do
      leave
      echo "waiting for $name"
      sleep "$wait" &
      pause=$!
      leave
      wait "$pause"
      pause=
    done
  done
  running=1
  leave
  run
  running=0
  case $code in
    0) exit 0 ;;
    2) exit 2 ;;
    75)  # train.py --stopped_exit_code
      if [ "$stopping" = 1 ]; then exit 0; fi
      echo 'stopped before the last step: starting it again'
      ;;
    *)
      failures=$((failures + 1))
      if [ "$stopping" = 1 ] || [ "$failures" -gt "$max_restarts" ]; then
        echo "failed with exit code $code: giving up"
        exit 1
      fi
      echo "failed with exit code $code: starting it again"
      ;;
  esac
done
