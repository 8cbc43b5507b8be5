# shellcheck shell=bash
# The common part of every job script: sourced from the checkout's root, never run. docs/cluster.md explains it.
#
# Settings, from the environment (slurm/site.env.example has them all):
#   ZEROTUNE_PYTHON               python of the environment          (.venv/bin/python where there is one, else python3)
#   ZEROTUNE_PROCESSES_PER_NODE   ranks on each node                 (its GPUs, else 1)
#   ZEROTUNE_ATTEMPTS             starts without progress            (3)
#   ZEROTUNE_COLLECTIVE_TIMEOUT   seconds before a silent rank is given up (1800)
#   ZEROTUNE_END_TIMEOUT          seconds for the other nodes to end, or to answer, once one has failed (120)
#   ZEROTUNE_STOP_TIMEOUT         seconds for the ranks to save and stop once they are asked to (240)
#   ZEROTUNE_MASTER_ADDR, ZEROTUNE_MASTER_PORT   rendezvous          (the first node; from the job id)
#   ZEROTUNE_ONLINE               not empty: jobs may use the network (empty)

say() { printf 'slurm: %s\n' "$*"; }
stop_with() { local status=$1; shift; say "$*"; exit "$status"; }

IN_CONTAINER=()  # slurm/hook.sh may set it: (apptainer exec --nv image.sif)
early_stop=
if [ -n "${SLURM_JOB_ID:-}" ]; then  # a signal while the hook loads modules is only noted: run_to_end passes it on
  trap 'early_stop=SIGUSR1' USR1
  trap 'early_stop=SIGTERM' TERM
fi
# a job that an array's task submits inherits the array's variables, which are not its own
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && shown=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) &&
  [[ $shown != *"ArrayJobId=$SLURM_ARRAY_JOB_ID "* ]]; then
  unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
fi
# srun starts one task on each node, and would give it the GPUs of only one of the job's tasks
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
# shellcheck source=/dev/null
[ -e slurm/site.env ] && . slurm/site.env
# shellcheck source=/dev/null
[ -e slurm/hook.sh ] && . slurm/hook.sh
set -uo pipefail  # not before: modules and conda read variables that are not set

python=${ZEROTUNE_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export ZEROTUNE_PYTHON=$python
# a signal to the whole job is for the ranks, not for the questions that this script asks between launches
run_python() { (trap '' TERM USR1; exec "${IN_CONTAINER[@]}" "$python" "$@"); }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export ZEROTUNE_ATTEMPTS=${ZEROTUNE_ATTEMPTS:-3}
export ZEROTUNE_COLLECTIVE_TIMEOUT=${ZEROTUNE_COLLECTIVE_TIMEOUT:-1800}
export ZEROTUNE_END_TIMEOUT=${ZEROTUNE_END_TIMEOUT:-120}
export ZEROTUNE_STOP_TIMEOUT=${ZEROTUNE_STOP_TIMEOUT:-240}
for name in ATTEMPTS COLLECTIVE_TIMEOUT END_TIMEOUT STOP_TIMEOUT; do
  name=ZEROTUNE_$name
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop_with 2 "$name is '${!name}': wanted a whole number, at least 1"
done
# sbatch's options reach the steps, also where the site says --export=NONE or SLURM 22.05 forgets the CPUs of a task
export SLURM_EXPORT_ENV=ALL
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
if [ -z "${ZEROTUNE_ONLINE:-}" ]; then
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline}
fi
export HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false
NLTK_DATA=${NLTK_DATA:-${HF_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/huggingface}/nltk_data}
export NLTK_DATA

# submit SBATCH-ARGUMENTS…: prints the job's number. A job that submits another must not pass on its own size.
submit() {
  local name forget=()
  while read -r name; do forget+=(-u "$name"); done < <(compgen -e | grep -E '^(SLURM|SRUN)_' | grep -vx SLURM_CONF)
  env "${forget[@]}" sbatch --parsable "$@" | cut -d';' -f1
  return "${PIPESTATUS[0]}"
}

# --- one launch of a script on all nodes ---

num_launches=0 stop_reason=

# prepare_job: sets the job's own variables, for its steps.
prepare_job() {
  mkdir -p runs/slurm
  job_files=runs/slurm/$SLURM_JOB_ID
  # the name of an array's task: the job number of one of them is also that of the whole array
  job_name=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  export ZEROTUNE_PROCESSES_PER_NODE=${ZEROTUNE_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  [ -n "${ZEROTUNE_MASTER_ADDR:-}" ] || ZEROTUNE_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export ZEROTUNE_MASTER_ADDR
  export ZEROTUNE_STOP_FILE=$PWD/$job_files.stop ZEROTUNE_FAILED_FILE=$PWD/$job_files.failed
  export ZEROTUNE_STATE_FILE=$PWD/$job_files.state.json  # for a refusal before there is a run folder
  rm -f "$ZEROTUNE_STOP_FILE" "$ZEROTUNE_FAILED_FILE"
}

note_stop() {
  [ -n "$stop_reason" ] && return
  stop_reason=$1
  say "$1: the ranks are asked to save and stop ($(date +%T))"
  if [ "$1" = SIGUSR1 ] && [ "$SECONDS" -lt 60 ]; then
    say "that was $SECONDS s after the start: if the time limit sent it, ask for more --time, or give --signal=B:USR1@60"
  fi
  if printf '%s\n' "$1" >"$ZEROTUNE_STOP_FILE.new" && mv "$ZEROTUNE_STOP_FILE.new" "$ZEROTUNE_STOP_FILE"; then return; fi
  # a full disk may still take an empty file; else the ranks get a signal
  if ! : >"$ZEROTUNE_STOP_FILE"; then scancel --signal=TERM "$job_name"; fi
}

# end_stuck SRUN: ends a srun that would not end in time, so that the job resumes from the last checkpoint. srun waits
# forever for a node that came back without the job before SLURM noticed (a quick reboot, slurmstepd out of memory); and
# ranks that do not stop when asked (one hangs, a save takes too long) would reach the time limit, which ends a job for
# good.
end_stuck() {
  local after_failure=$ZEROTUNE_END_TIMEOUT after_stop=$ZEROTUNE_STOP_TIMEOUT why tries
  trap '' TERM USR1
  while [ "$after_failure" -gt 0 ] && [ "$after_stop" -gt 0 ]; do
    sleep 5
    kill -0 "$1" 2>/dev/null || return
    [ -e "$ZEROTUNE_FAILED_FILE" ] && after_failure=$((after_failure - 5))
    [ -e "$ZEROTUNE_STOP_FILE" ] && after_stop=$((after_stop - 5))
  done
  why="the ranks were asked to stop and have not"
  [ "$after_failure" -gt 0 ] || why="a node has failed and another has not ended since"
  say "$why: this launch is given up"
  echo "$why" >>"$ZEROTUNE_FAILED_FILE"
  kill -TERM "$1"
  for tries in {1..60}; do
    sleep 5
    kill -0 "$1" 2>/dev/null || return
  done
  say "srun does not end after $((5 * tries)) s either: it is killed"
  kill -KILL "$1"
}

# launch SCRIPT FLAGS…: starts one launcher on each node and waits for them; returns srun's status.
launch() {
  num_launches=$((num_launches + 1))
  # eight launches of each of 1,875 jobs in a row have their own ports, all below those that Linux assigns by itself
  export ZEROTUNE_PORT=${ZEROTUNE_MASTER_PORT:-$((15000 + (SLURM_JOB_ID * 8 + num_launches % 8) % 15000))}
  rm -f "$ZEROTUNE_FAILED_FILE"
  # a site's --wait would end rank 0 while it writes the report and the others have nothing left to do
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 \
    bash slurm/on_node.sh "$@" &
  local step=$! status
  end_stuck "$step" &
  while :; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || return "$status"  # else wait was cut short by a signal
  done
}

# --- one script until it is finished, refused, or out of attempts ---

# attempts_left PROGRESS: counts the starts that left the run where it was; fails when there have been too many. The
# count outlives a requeue.
attempts_left() {
  local seen='' count=0
  read -r seen count <"$job_files.attempts"
  if [ "$seen" = "$1" ]; then count=$((count + 1)); else count=0; fi
  echo "$1 $count" >"$job_files.attempts" || stop_with 1 "runs/slurm cannot be written: make it writable and submit again"
  [ "$count" -lt "$ZEROTUNE_ATTEMPTS" ]
}

# ask VERB ARGUMENTS…: writes the answer of zerotune.cluster.jobs into $job_files.answer. Not with $(…): a
# signal to the whole job would kill its shell.
ask() {
  local status
  while :; do
    run_python -m zerotune.cluster.jobs "$@" >"$job_files.answer"
    status=$?
    case $status in 138 | 143) ;; *) return "$status" ;; esac  # else SIGUSR1 or SIGTERM cut it short
  done
}

# ask_again VERB ARGUMENTS…: asks until there is an answer (returns 0) or a refusal (2); returns 1 where the question itself
# has failed too often, as on a node whose disk does not answer. The attempts are counted as those of a launch.
ask_again() {
  local status=0 seen=none
  while :; do
    ask "$@" 2>"$job_files.refusal" || status=$?
    [ "$1" != plan ] || cat "$job_files.answer"
    cat "$job_files.refusal"
    case $status in 0 | 2) return "$status" ;; esac
    say "the question '$1' has failed (status $status)"
    [ -e "$job_files.attempts" ] || echo "none 0" >"$job_files.attempts"
    read -r seen _ <"$job_files.attempts"
    launch_again_or_end "$seen" "$status" || return 1
    status=0
  done
}

# is_ending: whether SLURM itself is about to end this job. Waits while the controller does not answer.
is_ending() {
  local tries
  for tries in {1..30}; do
    if scontrol --oneliner show job "$job_name" >"$job_files.answer" 2>/dev/null; then
      ! grep -q 'JobState=RUNNING' "$job_files.answer"
      return
    fi
    sleep 10
  done
  return 1
}

# nodes_answer: whether every node of the job can start a process: not if one is dead or still runs an earlier step.
nodes_answer() {
  timeout "$ZEROTUNE_END_TIMEOUT" srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

# delete_job_files: deletes files that only a later start of this job would read.
delete_job_files() { rm -f "$job_files".{answer,attempts,begun,failed,refusal,stop}; }

# end_run STATUS: ends the shell.
end_run() {
  delete_job_files
  exit "$1"
}

# has_left_resume FOLDER SCRIPT FLAGS…: whether --resume no longer applies, because this job has saved something. A
# later start with it would go back to PATH and lose what was saved since, or refuse the job's own run for `never`.
has_left_resume() {
  local folder=$1
  shift
  [ -z "$(find "$folder/checkpoints" -name COMPLETE -newer "$job_files.begun" 2>/dev/null)" ] || return 0
  [ "$folder/state.json" -nt "$job_files.begun" ] || return 1
  case " $* " in *" --resume"[\ =]"never "*) ;; *) return 1 ;; esac
}

# in_batch_job: whether this is a job of sbatch, and not a shell in an allocation.
in_batch_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || return 1
  local shown
  shown=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)
  [[ $shown != *BatchFlag=0* ]] && return
  say "a shell in an allocation: this is the plan only; submit it by sbatch, or use accelerate launch here"
  return 1
}

# run_to_end SCRIPT FLAGS…: the whole job, ends the shell. 0 finished, 2 refused, 75 stopped, 1 out of attempts.
run_to_end() {
  local again=() status
  if ! in_batch_job; then  # by bash, on the login node or in a shell of salloc: would the job find what it needs?
    run_python -m zerotune.cluster.jobs plan "$@"
    exit
  fi
  prepare_job
  trap 'note_stop SIGUSR1' USR1
  trap 'note_stop SIGTERM' TERM
  [ -z "$early_stop" ] || note_stop "$early_stop"
  case " $* " in
    *" --seeds"[\ =]* | *" --sweep"[\ =]*) run_members "$@" ;;
    *) run_one "$@" ;;
  esac
  status=$?
  [ "$status" = 1 ] && exit 1  # out of attempts: the count stays
  end_run "$status"
}

# run_members SCRIPT FLAGS…: the runs of --seeds and --sweep one after the other; in an array (--array=1-N), the one of this
# task. 0 all finished, 2 some refused, 1 some out of attempts.
run_members() {
  local number numbers command status worst=0 of_job=$job_files
  ask_again members "$@" || return
  read -r numbers <"$job_files.answer"
  for number in ${SLURM_ARRAY_TASK_ID:-$numbers}; do
    ask_again member "$number" "$@" || return
    mapfile -d '' -t command <"$job_files.answer"
    # a run's attempts are its own
    job_files=$of_job.$number
    export ZEROTUNE_FAILED_FILE=$PWD/$job_files.failed ZEROTUNE_STATE_FILE=$PWD/$job_files.state.json
    rm -f "$ZEROTUNE_FAILED_FILE"
    again=()
    run_one "${command[@]}"
    status=$?
    [ "$status" = 0 ] || [ "$worst" = 1 ] || worst=$status
    [ "$status" = 1 ] || delete_job_files
    job_files=$of_job
  done
  run_python -m zerotune.cluster.jobs summarise "$@" || [ "$worst" != 0 ] || worst=2
  return "$worst"
}

# run_one SCRIPT FLAGS…: one run until it is finished (returns 0), refused (2) or out of attempts (1). Ends the shell where
# the job is to start again.
run_one() {
  local folder state=none progress=none stamp before status
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
  ask_again plan "$@" || return
  ask_again folder "$@" || return
  read -r folder <"$job_files.answer"
  while :; do
    before=  # unknown, if the question fails
    ask progress "$folder" && read -r state progress before <"$job_files.answer"
    [ -e "$job_files.attempts" ] || echo "$progress 0" >"$job_files.attempts"
    [ -e "$job_files.begun" ] || : >"$job_files.begun"
    [[ $1 = train/* ]] && has_left_resume "$folder" "$@" && again=(--resume auto)
    rm -f "$ZEROTUNE_STATE_FILE"
    [ -z "$stop_reason" ] || launch_again_or_end "$progress" 75 || return 1  # a launch would only be stopped
    launch "$@" "${again[@]}" --state-file "$ZEROTUNE_STATE_FILE"
    status=$?
    stamp=$before
    ask progress "$folder" && read -r state progress stamp <"$job_files.answer"
    [ "$status" = 0 ] && return 0
    [ -e "$ZEROTUNE_STATE_FILE" ] && return 2
    if [ -n "$before" ] && [ "$stamp" != "$before" ]; then
      case $state in
        finished) return 0 ;;
        refused) return 2 ;;
        preempted) stop_reason=${stop_reason:-a signal to the ranks} ;;  # SLURM's first SIGTERM may not reach this script
      esac
    fi
    launch_again_or_end "$progress" "$status" || return 1
    say "the ranks died (status $status); launched again from the last checkpoint"
  done
}

end_as_slurm_does() { stop_with 75 "SLURM ends this job (requeue or scancel); the same command resumes it"; }

# launch_again_or_end PROGRESS STATUS: after a launch that ended early; returns 0 if the same job is to launch again, 1 if
# it has tried often enough, and ends the shell if another start of the job is to resume.
launch_again_or_end() {
  local tries
  if [ -n "$stop_reason" ] && is_ending; then end_as_slurm_does; fi
  # a start that SLURM stopped says nothing about the run; but the time limit may cut every start short
  if [ "$stop_reason" != SIGTERM ] && ! attempts_left "$1"; then
    say "$ZEROTUNE_ATTEMPTS starts in a row came no further than $1 (last status $2): the lines above say what ended them"
    return 1
  fi
  if [ -s "$ZEROTUNE_FAILED_FILE" ]; then  # the step may never end, and then this job cannot start another
    stop_reason=${stop_reason:-a node that has lost the job}
  fi
  if [ -z "$stop_reason" ]; then
    sleep 2
    if nodes_answer; then return 0; fi
    # a requeued job waits until SLURM has given up on a dead node, 300 s by default (SlurmdTimeout)
    stop_reason="a node that does not answer"
    is_ending && end_as_slurm_does
  fi
  for tries in {1..30}; do
    scontrol requeue "$job_name" && stop_with 75 "requeued ($stop_reason)"
    is_ending && end_as_slurm_does
    ! grep -q 'Requeue=0' "$job_files.answer" ||
      stop_with 75 "this site forbids requeueing: submit the same command again, it resumes"
    sleep 10  # a busy controller
  done
  stop_with 75 "SLURM does not accept the requeue ($tries tries): submit the same command again, it resumes"
}
