"""What the scripts in slurm/ ask: before and after a job, offline, in batches, and whether a site will do."""
