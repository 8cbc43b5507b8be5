"""Count, on a CPU, the operations that would make the host wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a number from the device, and calls of `Tensor.cpu`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._plain_cpu = torch.Tensor.cpu

        def cpu(tensor, *args, **kwargs):
            self.count += 1
            return self._plain_cpu(tensor, *args, **kwargs)

        torch.Tensor.cpu = cpu
        return super().__enter__()

    def __exit__(self, *exception):
        torch.Tensor.cpu = self._plain_cpu
        return super().__exit__(*exception)
