"""Several runs from one command: each started in its own folder, then summarised together."""
