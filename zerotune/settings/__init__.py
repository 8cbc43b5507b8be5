"""Flags and the frozen dataclasses that they resolve to. Modules import torch only inside functions."""
