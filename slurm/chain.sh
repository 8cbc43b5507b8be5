#!/usr/bin/env bash
# Train, then evaluate a list (which may name the run's final/), then compare: each starts when the one before is done.
#
#     bash slurm/chain.sh LIST [sbatch options] slurm/sst2.sh [flags of train/sst2.py]
cd "$(dirname "$0")/.." || exit
. slurm/common.sh
[ $# -ge 2 ] || stop_with 2 "wanted: bash slurm/chain.sh LIST [sbatch options] slurm/sst2.sh [flags]"
list=$1
shift
run_python -m zerotune.cluster.eval_list todo "$list" >/dev/null || exit 2
train=$(submit "$@") || exit 1
say "training $train: runs/slurm/$train.log"
bash slurm/eval.sh --after "$train" "$list" || { scancel "$train"; exit 1; }
