"""Moving arrays to the device."""

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on the device, without waiting for a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def on_device(inputs: dict[str, np.ndarray | int], device: torch.device) -> dict[str, torch.Tensor | int]:
    """Return a model's inputs with their arrays on the device; plain numbers are unchanged."""
    return {
        name: to_device(value, device) if isinstance(value, np.ndarray) else value for name, value in inputs.items()
    }
