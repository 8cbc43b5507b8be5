"""The Python side of slurm/: answers for job scripts, prefetching, lists of evaluations, checks of a site."""
