"""Flags: what the scripts can be told. Nothing in it imports torch, so that `--help` answers at once."""
