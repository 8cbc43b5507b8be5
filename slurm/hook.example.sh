# shellcheck shell=bash disable=SC2034
# The job's environment: modules, containers, conda. Copy to slurm/hook.sh (git ignores it). Every job script reads it,
# on the first node and again on each node before its ranks start.

# module purge
# module load cuda/12.8 gcc/13

# source /shared/my-project/miniforge/etc/profile.d/conda.sh && conda activate zerotune

# In a container: these words go before every launch. Bind the checkout and HF_HOME.
# IN_CONTAINER=(apptainer exec --nv --bind /shared /shared/my-project/pytorch.sif)
# ZEROTUNE_PYTHON=python3
