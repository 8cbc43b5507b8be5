#!/usr/bin/env bash
# Compare the evaluations of a list that are done, task by task: slurm/eval.sh submits this after its array.
#
#     sbatch slurm/compare.sh LIST
#
#SBATCH --job-name=compare
#SBATCH --output=runs/slurm/%j.log
#SBATCH --ntasks=1
[ -e slurm/common.sh ] || cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
. slurm/common.sh || exit 2
run_python -m zerotune.cluster.eval_list compare "$1"
