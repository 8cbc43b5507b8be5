"""Count, on a CPU, the operations that would make the host wait for a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a number from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        return function(*args, **(kwargs or {}))
