#!/usr/bin/env bash
# Check a site: a line for each check, "pass" or "FAIL" and how to fix it, in about a minute (under three).
#
#     sbatch slurm/smoke.sh
#     sbatch --nodes 2 --gpus-per-node 8 slurm/smoke.sh
#     sbatch slurm/smoke.sh --checks-only             # without the sample run
#
#SBATCH --job-name=smoke
#SBATCH --output=runs/slurm/%j.log
#SBATCH --requeue
#SBATCH --ntasks-per-node=1
#SBATCH --time=10
[ -e slurm/common.sh ] || cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
. slurm/common.sh || exit 2
checks_only=
[ "${1:-}" = --checks-only ] && checks_only=yes
[ -n "${SLURM_JOB_ID:-}" ] || stop_with 2 "this is a job: sbatch slurm/smoke.sh"
prepare_job
num_failed=0
log=$job_files.smoke.log
run=$job_files.smoke

# tell STATUS CHECK TEXT CURE
tell() {
  if [ "$1" = 0 ]; then echo "pass  $2: $3"; return; fi
  num_failed=$((num_failed + 1))
  echo "FAIL  $2: $3; $4"
  tail -n 15 "$log" | sed 's/^/      | /'
}

train=(train/sst2.py --sample --deepspeed ds_configs/zero2.json --limit-train 1600 --limit-eval 100 --epochs 3
  --base-eval none --checkpoint-every 5 --eval-every 50 --output-dir "$run")
newest() { run_python -m zerotune.cluster.jobs progress "$run" | cut -d' ' -f2 | cut -d+ -f1; }

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; details in $log"
rm -rf "$run" "$job_files.checked"  # of an earlier start of this job
: >"$log"
requeue=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'Requeue=[01]')
[ "$requeue" = Requeue=1 ]
tell $? "requeue" "${requeue:-SLURM does not say}" "jobs do not resume by themselves here: submit the same line again"
ZEROTUNE_COLLECTIVE_TIMEOUT=120  # this checks whether ranks find each other: no need to wait longer
if ! launch --module zerotune.cluster.smoke "$job_files.checked" 2>>"$log"; then
  if [ -e "$job_files.checked" ]; then
    num_failed=$((num_failed + 1))
  else
    tell 1 "launch" "the ranks did not start, or do not reach each other" "the lines below say why; where they time out, \
name the interface by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in slurm/site.env"
    checks_only=yes
  fi
fi
rm -f "$job_files.checked"

# the sample under ZeRO-2: trained, killed, resumed, evaluated
run_sample() {
  local killer status step
  (
    until compgen -G "$run/checkpoints/step-*/COMPLETE" >/dev/null; do sleep 0.1; done
    scancel --signal=KILL "$SLURM_JOB_ID.1"  # the second step of this job
  ) &
  killer=$!
  launch "${train[@]}" >>"$log" 2>&1
  status=$?
  kill "$killer" 2>/dev/null
  step=$(newest)
  [ "$step" -gt 0 ]
  tell $? "train under ZeRO-2" "checkpoint of step $step" "no checkpoint: the lines below say why"
  [ "$status" -ne 0 ]
  tell $? "kill" "SIGKILL to all ranks after step $step" "the run was over before it was killed: submit again"
  launch "${train[@]}" >>"$log" 2>&1
  status=$?
  grep -q 'resumes after step' "$log" || status=1
  tell "$status" "resume" "$(grep -h -o 'resumes after step [0-9]*' "$log" | tail -n 1), finished" "the lines below say why"
  launch eval/sst2.py --sample --model "$run/final" --limit-eval 200 --output-dir "$run/again" >>"$log" 2>&1
  tell $? "evaluate" "$(grep -h -o 'accuracy 0[.0-9]*' "$log" | tail -n 1)" "the lines below say why"
}
[ -n "$checks_only" ] || run_sample

if [ "$num_failed" = 0 ]; then
  rm -rf "$run"
  say "this site is ready (${SECONDS} s)"
else
  stop_with 1 "$num_failed checks failed (${SECONDS} s)"
fi
