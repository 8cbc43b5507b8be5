"""Checkpoints scored on items, each id once, and the files that say what came of it."""
