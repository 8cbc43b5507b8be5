#!/usr/bin/env bash
# Evaluate every line of a list "MODEL TASK SHOTS SEED [more flags]" as an array of jobs, then compare them in one more.
#
#     sbatch slurm/eval.sh LIST [sbatch options of each evaluation]
#     bash slurm/eval.sh LIST --gpus-per-node 1       # the same from the login node, where jobs may not call sbatch
#
# Lines that are done are left out: submit the same list again to restart what failed. Results: runs/eval/LIST/.
#
#SBATCH --job-name=eval
#SBATCH --output=runs/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
[ -e slurm/common.sh ] || cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
. slurm/common.sh || exit 2
after=
if [ "${1:-}" = --after ]; then after=$2; shift 2; fi
[ $# -ge 1 ] || stop_with 2 "name a list: sbatch slurm/eval.sh LIST"
list=$1
shift

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  for _ in {1..3}; do  # a node's disk may not answer for a moment
    words=$(run_python -m zerotune.cluster.eval_list line "$list" "$SLURM_ARRAY_TASK_ID")
    status=$?
    case $status in 0 | 2) break ;; esac
    sleep 10
  done
  [ "$status" = 0 ] || stop_with "$status" "line $SLURM_ARRAY_TASK_ID of $list cannot be read: submit the list again"
  mapfile -t command <<<"$words"
  run_to_end "${command[@]}"
fi

# evaluations of a model that training is about to rewrite count as not done
numbers=$(run_python -m zerotune.cluster.eval_list "$([ -n "$after" ] && echo all || echo todo)" "$list") || exit 2
if [ -z "$numbers" ]; then
  say "all of $list is done"
  run_python -m zerotune.cluster.eval_list compare "$list"
  exit
fi
if [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] && [ $# = 0 ]; then
  say "options before slurm/eval.sh are for this job, which only submits; name the evaluations' options after the list: $list --gpus-per-node 1"
fi
# the jobs read a copy: the list may change before they start
name=$(basename "$list")
kept=runs/eval/${name%.*}/lists/$(date +%Y%m%d-%H%M%S)-$$
mkdir -p "$kept" && cp "$list" "$kept/" || exit 1
kept=$kept/$name
# a chain stops where a link fails; else the comparison names the missing evaluations
order=(--kill-on-invalid-dep=yes) kind=afterany
if [ -n "$after" ]; then order+=("--dependency=afterok:$after") kind=afterok; fi
array=$(submit "${order[@]}" --array="$numbers" --output=runs/slurm/%A_%a.log "$@" slurm/eval.sh "$kept") || exit 1
compare=$(submit --kill-on-invalid-dep=yes --dependency="$kind:$array" slurm/compare.sh "$kept") || exit 1
say "evaluations $array (lines $numbers of $list: runs/slurm/${array}_LINE.log), then comparison $compare: runs/slurm/$compare.log"
