"""The Python side of slurm/: questions before and after a job, prefetching, lists of evaluations, checks of a site."""
