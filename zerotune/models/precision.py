"""What a precision means to torch."""

import contextlib


def compute_dtype(precision: str):
    """The torch dtype of a precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def autocast(device_type: str, precision: str):
    """A context in which matrix products are computed in the precision, whatever the weights' type."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=compute_dtype(precision))
