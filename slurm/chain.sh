#!/usr/bin/env bash
# Train, then evaluate a list (which may name the run's final/), then compare: each starts when the one before is done.
#
#     bash slurm/chain.sh LIST [sbatch options] slurm/sst2.sh [flags of train/sst2.py]
#     bash slurm/chain.sh LIST [sbatch options of each evaluation] -- [sbatch options] slurm/sst2.sh [flags]
cd "$(dirname "$0")/.." || exit
. slurm/common.sh || exit 2
[ $# -ge 2 ] || stop_with 2 "wanted: bash slurm/chain.sh LIST [sbatch options] slurm/sst2.sh [flags]"
list=$1
shift
evaluation_options=()
case " $* " in
  *" -- "*)
    while [ "$1" != -- ]; do evaluation_options+=("$1"); shift; done
    shift ;;
esac
run_python -m zerotune.cluster.eval_list all "$list" >/dev/null || exit 2
train=$(submit "$@") || exit 1
say "training $train: runs/slurm/$train.log"
bash slurm/eval.sh --after "$train" "$list" "${evaluation_options[@]}" || { scancel "$train"; exit 1; }
