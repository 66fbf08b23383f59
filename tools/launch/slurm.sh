#!/bin/bash
# The batch script of each run on SLURM. `python -m tools.launch slurm` gives it
# to sbatch, with these words, of which the last are the run's own:
#   LOGS PROCESSES GRACE_SECONDS MAX_RESTARTS SHELL COMMAND...
# SHELL is what each process does with COMMAND.
logs=$1 processes=$2 grace=$3 max_restarts=$4 shell=$5
shift 5
mkdir -p "$logs"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The port follows from the job's number, so that two jobs may share a node.
export JAX_COORDINATOR_ADDRESS="${nodes%%$'\n'*}:$((61000 + SLURM_JOB_ID % 4000))"
export JAX_NUM_PROCESSES=$processes

# A limit that leaves no time to train would end in a job that is stopped and
# queued again for ever. SLURM counts in minutes, and may send its signal one
# sooner.
limit=$((${SLURM_JOB_END_TIME:-0} - ${SLURM_JOB_START_TIME:-0}))
least=$(((grace + 59) / 60 * 60 + 120))
if [ "$limit" -gt 0 ] && [ "$limit" -lt $least ]; then
  echo "the time limit is $limit s, and the run is told to save $grace s" \
    "before its end (--grace_seconds): choose $least s or more"
  exit 2
fi

# SIGTERM is for the processes, who save; this script must outlive them.
trap 'echo "SIGTERM: the processes save and leave"' TERM
# Once a process has ended, the others have a minute: to save, where it was told
# to stop, or to notice that it is lost. srun names one that is killed.
srun --kill-on-bad-exit=0 --wait=60 --output="${logs//%/%%}/process-%t.log" \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  bash -c "$shell" process "$@" &
step=$!
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done

# After scancel, which ends it for good, the job is COMPLETING.
again() {
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) in
    COMPLETING|CANCELLED) echo "$1: cancelled" ;;
    *) echo "$1: queued again"; scontrol requeue "$SLURM_JOB_ID" ;;
  esac
}

# The number of a job outlives its being queued again.
failed="$logs/failures-$SLURM_JOB_ID"
failures=$(cat "$failed" 2>/dev/null || echo 0)
case $code in
  0)
    echo 'complete'
    rm -f "$failed"
    ;;
  75)  # train.py --stopped_exit_code
    again 'stopped before the last step'
    ;;
  2)
    echo "it would end so again: see $logs/process-0.log"
    ;;
  *)
    echo $((failures + 1)) >"$failed"
    if [ "$failures" -lt "$max_restarts" ]; then
      again "failed with exit code $code"
    else
      echo "failed with exit code $code: giving up"
    fi
    ;;
esac
exit "$code"
