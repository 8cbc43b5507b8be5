"""A run as a process and a folder: launch, rank, exit code, signals, names, lock, state, and memory needs."""
