"""Evaluating models: each item scored once, by a head or a prompt, and the results written into a folder."""
