#!/usr/bin/env bash
# Fine-tune on SST-2: train/sst2.py on the nodes that SLURM gives. The same line starts, resumes, or says that it is finished.
#
#     sbatch slurm/sst2.sh --sample
#     sbatch --nodes 4 --gpus-per-node 8 slurm/sst2.sh --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
#     bash slurm/sst2.sh --model meta-llama/Llama-3.2-1B          # on the login node: is everything there?
#
#SBATCH --job-name=sst2
#SBATCH --output=runs/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
[ -e slurm/common.sh ] || cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
. slurm/common.sh || exit 2
run_to_end train/sst2.py "$@"
