"""Torch's type and autocast for a precision."""

import contextlib

import torch


def compute_dtype(precision: str) -> torch.dtype:
    """Return the type of a precision: "bf16", "fp16" or "fp32"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def autocast(device_type: str, precision: str):
    """Return a context that computes matrix products in the precision, whatever the weights' type."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=compute_dtype(precision))
