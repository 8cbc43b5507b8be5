#!/usr/bin/env bash
# Fetch the items that jobs will read into the shared cache (HF_HOME): run on the login node, where there is a network.
#
#     bash slurm/prefetch.sh train/sst2.py --model meta-llama/Llama-3.2-1B      # all that this run needs
#     bash slurm/prefetch.sh --model google/gemma-2-2b-it@main --dataset stanfordnlp/imdb --wordnet
#     bash slurm/prefetch.sh --verify                                           # hash all that the manifest lists
cd "$(dirname "$0")/.." || exit
ZEROTUNE_ONLINE=1 . slurm/common.sh || exit 2
run_python -m zerotune.cluster.jobs prefetch "$@"
